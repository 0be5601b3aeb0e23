package keyring

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/schemas"
)

// history is what was true of a key, and since when.
type history []struct {
	at    time.Time
	valid bool
}

// ever reports whether the key was in that state at some moment from a to b.
func (h history) ever(valid bool, a, b time.Time) bool {
	for i, e := range h {
		if e.valid == valid && !e.at.After(b) && (i+1 == len(h) || h[i+1].at.After(a)) {
			return true
		}
	}
	return false
}

// Whatever the order of changes, polls and slow answers, and however often the books
// are away: an answer was true at some moment between a second before the question
// and the answer.
func TestAnswersAreFresh(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		seed := rapid.Uint64().Draw(rt, "seed")
		slow := rapid.IntRange(0, 900).Draw(rt, "slowest answer, ms")
		outages := rapid.Bool().Draw(rt, "outages")
		synctest.Test(t, func(t *testing.T) {
			if wrong := simulate(t, seed, slow, outages); wrong != "" {
				t.Errorf("seed %d, slow %d, outages %v: %s", seed, slow, outages, wrong)
			}
		})
		if t.Failed() {
			rt.FailNow()
		}
	})
}

func simulate(t *testing.T, seed uint64, slow int, outages bool) (wrong string) {
	var mu sync.Mutex // guards random, past and wrong
	random := rand.New(rand.NewPCG(seed, 1))
	upTo := func(ms int) time.Duration {
		mu.Lock()
		defer mu.Unlock()
		return time.Duration(random.IntN(ms+1)) * time.Millisecond
	}
	store := newFake()
	dawdle := func(context.Context) { time.Sleep(upTo(slow / 2)) }
	store.before, store.after = dawdle, dawdle

	key, id := apikey.New(), valid()
	store.put(key, id, books.KindKey)
	past := history{{time.Now(), true}}
	k := New(store, quiet)
	const length = 20 * time.Second
	end := time.Now().Add(length)

	running(t, k, func() {
		var wg sync.WaitGroup
		wg.Go(func() { // the admin
			for time.Now().Before(end) {
				time.Sleep(upTo(2500))
				id.UserState = map[books.UserState]books.UserState{books.UserActive: books.UserDeactivated, books.UserDeactivated: books.UserActive}[id.UserState]
				mu.Lock()
				past = append(past, struct {
					at    time.Time
					valid bool
				}{time.Now(), id.UserState == books.UserActive})
				mu.Unlock()
				store.put(key, id, books.KindUser)
			}
		})
		wg.Go(func() { // the weather
			for outages && time.Now().Before(end) {
				time.Sleep(upTo(3000))
				store.set(true)
				time.Sleep(upTo(2000))
				store.set(false)
			}
		})
		for range 4 {
			wg.Go(func() { // the clients
				for time.Now().Before(end) {
					time.Sleep(upTo(150))
					asked := time.Now()
					_, err := k.Authenticate(t.Context(), key, "")
					answered := time.Now()
					if err != nil && !errors.Is(err, errUser) {
						if !outages || schemas.AsError(err).Code != schemas.CodeInternalError {
							t.Errorf("refused: %v", err)
						}
						continue
					}
					mu.Lock()
					if !past.ever(err == nil, asked.Add(-maxStale), answered) {
						wrong = fmt.Sprintf("asked %v before the end, answered %v, after %v", end.Sub(asked), err, answered.Sub(asked))
					}
					mu.Unlock()
				}
			})
		}
		wg.Wait()
	})
	return wrong
}
