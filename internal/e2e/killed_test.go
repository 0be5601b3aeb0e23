package e2e

import (
	"context"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// TestPostgresKilled kills PostgreSQL by SIGKILL under load, several times. What it said is
// stored: afterwards each request that was answered is in the ledger once, nothing is
// overspent, and no slot is lost.
func TestPostgresKilled(t *testing.T) {
	t.Parallel()
	const (
		kills, clients = 3, 12
		slots          = 8
		cents          = 40 // what the thrifty key may spend
	)
	postgres := stack.StartMortalPostgres(t)
	backend := stack.StartBackend(t, demo.Options{})
	c := stack.StartClusterOn(t, postgres.Address)
	l := openLedger(t, postgres.Address)
	l.notePeaks()
	c.StartWorker(backend.URL)
	setPrice(t, c, demo.ModelID, tabPrice)
	edges := c.StartEdges(2)
	awaitModel(t, edges, c.Key.Reveal(), demo.ModelID)

	// One key has money enough, and the other comes to the end of it on the way.
	rich, richSecret := newKey(t, c, books.NewKey{BudgetCents: new(int64(100_000)), Concurrency: new(slots)})
	thrifty, thriftySecret := newKey(t, c, books.NewKey{BudgetCents: new(int64(cents)), Concurrency: new(slots)})
	ctx, stopLoad := context.WithCancel(t.Context())
	defer stopLoad()
	var load sync.WaitGroup
	var mu sync.Mutex
	whole := map[schemas.KeyID]map[string]bool{rich: {}, thrifty: {}} // by request
	codes := make(map[string]int)
	answered := func() int {
		mu.Lock()
		defer mu.Unlock()
		return len(whole[rich])
	}
	fields := priced(t, tab-promptBound(t), map[string]any{"tokens_per_second": 400})
	for key, secret := range map[schemas.KeyID]string{rich: richSecret, thrifty: thriftySecret} {
		atEdges := clientsOf(t, edges, secret)
		for i := range clients / 2 {
			load.Go(func() {
				for n := 0; ctx.Err() == nil; n++ {
					r := atEdges[i%2].chat(t.Context(), n%2 == 0, limited(fields, tab-promptBound(t)))
					mu.Lock()
					switch {
					case r.status == http.StatusOK && r.done:
						whole[key][r.request()] = true
					case r.broken != nil || r.err == nil:
						t.Errorf("a request ends with status %d, broken %v", r.status, r.broken)
					default:
						codes[r.code()]++
					}
					mu.Unlock()
					if r.status != http.StatusOK {
						time.Sleep(100 * time.Millisecond)
					}
				}
			})
		}
	}
	for range kills {
		had := answered()
		stack.Until(t, 30*time.Second, "the load to run", func() bool { return answered() >= had+10 })
		postgres.Kill()
		time.Sleep(300 * time.Millisecond)
		postgres.Start()
	}
	had := answered()
	stack.Until(t, 30*time.Second, "requests to be let in again", func() bool { return answered() >= had+10 })
	stopLoad()
	load.Wait()

	for code := range codes {
		switch schemas.Code(code) {
		case schemas.CodeInternalError, schemas.CodeBudgetExceeded, schemas.CodeConcurrencyLimit:
		default:
			t.Errorf("%d requests were refused with %s", codes[code], code)
		}
	}
	for name, key := range map[string]schemas.KeyID{"rich": rich, "thrifty": thrifty} {
		entries := l.wantClosed(key, 30*time.Second)
		for id := range whole[key] {
			if e, ok := entries[id]; !ok || e.Outcome != "done" || e.Prompt+e.Completion != tab {
				t.Errorf("%s: a whole reply is in the ledger as %+v", name, e)
			}
		}
		var twice int
		if err := l.pool.QueryRow(t.Context(), `SELECT count(*) - count(DISTINCT request_id) FROM ledger WHERE key_id = $1`, key).Scan(&twice); err != nil || twice != 0 {
			t.Errorf("%s: %d rows of the ledger are of a request that has one already, %v", name, twice, err)
		}
		money, most := l.peaks(key)
		if limit := int64(cents) * books.MicroCents; key == thrifty && money > limit || most > slots {
			t.Errorf("%s: it had up to %d of money and %d slots", name, money, most)
		}
		t.Logf("%s: %d whole replies, %d rows in the ledger, at most %d slots", name, len(whole[key]), len(entries), most)
	}
	t.Logf("%d kills, refusals %v", kills, codes)
}
