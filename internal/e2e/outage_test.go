package e2e

import (
	"context"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/faultproxy"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// TestPostgresAway stops PostgreSQL under load for longer than a lease lasts. Meanwhile
// nobody is let in; who was in before goes on, and what needs more money waits for it; and
// afterwards everything is in the ledger once.
func TestPostgresAway(t *testing.T) {
	t.Parallel()
	const (
		away = 14 * time.Second // more than the lease, and a pass of the sweeper
		pace = 20
		open = 100 // tokens that are reserved where the client gives no limit
	)
	postgres := stack.StartPostgres(t)
	backend := stack.StartBackend(t, demo.Options{})
	c := stack.StartClusterOn(t, postgres.Address)
	l := openLedger(t, postgres.Address)
	c.StartWorker(backend.URL)
	setPrice(t, c, demo.ModelID, books.MicroCents)
	edges := c.StartEdges(2, stack.Flag("open-tokens", open))
	awaitModel(t, edges, c.Key.Reveal(), demo.ModelID)

	// A load of short requests, all the time.
	loadKey, secret := newKey(t, c, books.NewKey{BudgetCents: new(int64(100_000))})
	clients := clientsOf(t, edges, secret)
	ctx, stopLoad := context.WithCancel(t.Context())
	defer stopLoad()
	var load sync.WaitGroup
	var mu sync.Mutex
	var replies []loadReply
	for i := range 6 {
		load.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				began := time.Now()
				r := clients[i%2].chat(t.Context(), n%2 == 0, priced(t, 10, map[string]any{"tokens_per_second": 40}))
				mu.Lock()
				replies = append(replies, loadReply{r, began, time.Now()})
				mu.Unlock()
				if r.status != http.StatusOK {
					time.Sleep(50 * time.Millisecond)
				}
			}
		})
	}
	loaded := func(ok func(loadReply) bool) int {
		mu.Lock()
		defer mu.Unlock()
		n := 0
		for _, r := range replies {
			if ok(r) {
				n++
			}
		}
		return n
	}
	whole := func(r loadReply) bool { return r.status == http.StatusOK && r.done }

	// Replies that end while PostgreSQL is away, and later; and the same for those that
	// will need more tokens than they have, which come to a stop meanwhile.
	var flights []*flight
	for _, edge := range edges {
		flights = append(flights, depart(t, c, edge, backend,
			ask{stream: true, tokens: 6 * pace, pace: pace}, ask{tokens: 6 * pace, pace: pace},
			ask{stream: true, tokens: 20 * pace, pace: pace}, ask{tokens: 20 * pace, pace: pace},
			ask{stream: true, tokens: 3 * open, pace: pace, open: true}, ask{stream: true, tokens: 4 * pace, pace: pace, open: true}))
	}
	postgres.Stop()
	stopped := time.Now()
	time.Sleep(away)
	held := 0
	for _, f := range flights {
		held += int(f.taps[4].tokens.Load())
	}
	back := time.Now()
	postgres.Start()
	started := time.Now()
	stack.Until(t, 30*time.Second, "requests to be let in again", func() bool {
		return loaded(func(r loadReply) bool { return whole(r) && r.began.After(started) }) > 6
	})
	admitting := time.Since(started)
	stopLoad()
	load.Wait()

	for _, f := range flights {
		f.land()
		entries := l.wantClosed(f.key, 30*time.Second)
		f.wantPaid(t, entries)
		for i, p := range f.taps {
			got, e := tokensOf(p.reply.text), entries[p.reply.request()]
			if p.reply.broken != nil || !p.reply.done || p.reply.finish != "stop" || got != p.ask.tokens || e.Completion != int64(got) || e.Outcome != "done" {
				t.Errorf("reply %d has %d of %d tokens and ends with %q, error %+v, broken %v; ledger has %+v",
					i, got, p.ask.tokens, p.reply.finish, p.reply.err, p.reply.broken, e)
			}
		}
	}
	for i, f := range flights {
		if n := f.taps[4].tokens.Load(); held >= 2*3*open || n != 3*open {
			t.Errorf("stream %d: an open end didn't wait for its tokens: %d came", i, n)
		}
	}

	entries := l.wantClosed(loadKey, 30*time.Second)
	slices.SortFunc(replies, func(a, b loadReply) int { return a.began.Compare(b.began) })
	paid, refused := 0, 0
	for _, r := range replies {
		e, ok := entries[r.request()]
		switch {
		case whole(r):
			paid++
			if !ok || e.Completion != 10 || e.Outcome != "done" {
				t.Errorf("a whole reply is in the ledger as %+v", e)
			}
			if r.began.After(stopped) && r.ended.Before(back) {
				t.Errorf("a request was let in %s after the end of the database", r.began.Sub(stopped))
			}
		case r.code() == string(schemas.CodeInternalError) && r.status == http.StatusInternalServerError:
			refused++
			if after, err := strconv.Atoi(r.header.Get("Retry-After")); err != nil || after < 1 || after > 10 {
				t.Errorf("refused with Retry-After %q", r.header.Get("Retry-After"))
			}
			if ok {
				t.Errorf("a request that was refused is in the ledger as %+v", e)
			}
		default:
			t.Errorf("a request ended with status %d, error %+v, broken %v", r.status, r.err, r.broken)
		}
	}
	if len(entries) != paid {
		t.Errorf("%d requests were answered, and the ledger has %d", paid, len(entries))
	}
	if during := loaded(func(r loadReply) bool { return r.began.After(stopped) && r.began.Before(started) }); during == 0 || refused == 0 {
		t.Errorf("%d requests came while the database was away; %d were refused", during, refused)
	}
	t.Logf("away for %s; %d requests answered, %d refused; the first were let in %s after the start; %d of %d tokens of the open ends came before",
		started.Sub(stopped).Round(time.Millisecond), paid, refused, admitting.Round(time.Millisecond), held, 2*3*open)
}

// loadReply is a reply, and when its request was sent and when it had ended.
type loadReply struct {
	reply
	began, ended time.Time
}

// TestEdgesCutOffFromPostgres: edges that lose PostgreSQL while all others have it are taken
// for dead. What they go on with ends when they are back, and until then as it would have;
// it is paid for once, for no less than clients got.
func TestEdgesCutOffFromPostgres(t *testing.T) {
	t.Parallel()
	const pace = 20
	backend := stack.StartBackend(t, demo.Options{})
	c := stack.StartCluster(t)
	l := openLedger(t, c.DatabaseURL)
	c.StartWorker(backend.URL)
	setPrice(t, c, demo.ModelID, books.MicroCents)
	direct := c.DatabaseURL
	faults := []func(*faultproxy.Proxy){(*faultproxy.Proxy).Cut, (*faultproxy.Proxy).Stall}
	var proxies []*faultproxy.Proxy
	var edges []*stack.Edge
	for range faults {
		p := faultproxy.New(t, direct)
		c.DatabaseURL = p.URL()
		proxies, edges = append(proxies, p), append(edges, c.StartEdge())
	}
	c.DatabaseURL = direct
	awaitModel(t, edges, c.Key.Reveal(), demo.ModelID)
	var cuts sync.WaitGroup
	for i, cut := range faults {
		f := depart(t, c, edges[i], backend,
			ask{stream: true, tokens: 6 * pace, pace: pace}, ask{tokens: 6 * pace, pace: pace},
			ask{stream: true, tokens: 2000, pace: pace}, ask{tokens: 2000, pace: pace}, ask{stream: true, tokens: 2000, pace: pace, open: true})
		client := newClient(edges[i].BaseURL, c.Key.Reveal())
		cut(proxies[i])
		since := time.Now()
		cuts.Go(func() {
			defer client.close()
			refused := 0
			for {
				h, err := l.look(t.Context(), f.key)
				if err != nil || time.Since(since) > backIn+late() {
					t.Errorf("the slots of an edge without a database aren't back: %+v, %v", h, err)
					break
				}
				if h.InFlight == 0 {
					break
				}
				r := client.chat(t.Context(), refused%2 == 0, priced(t, 5, nil))
				if r.status != http.StatusInternalServerError || r.code() != string(schemas.CodeInternalError) || r.header.Get("Retry-After") == "" {
					t.Errorf("an edge without a database answers with status %d, error %+v, broken %v", r.status, r.err, r.broken)
				}
				refused++
				time.Sleep(100 * time.Millisecond)
			}
			away := time.Since(since)
			proxies[i].Restore()
			restored := time.Now()
			f.land()
			ended := time.Since(restored)
			entries := l.wantClosed(f.key, backIn+late())
			f.wantPaid(t, entries)
			for n, p := range f.taps {
				got, e := tokensOf(p.reply.text), entries[p.reply.request()]
				switch whole := p.reply.done && got == p.ask.tokens; {
				case n < 2 && (!whole || e.Outcome != "done" || e.Completion != int64(got)):
					t.Errorf("a reply that ended meanwhile has %d of %d tokens, error %+v; ledger has %+v", got, p.ask.tokens, p.reply.err, e)
				case n >= 2 && p.reply.code() != string(schemas.CodeInternalError):
					t.Errorf("a reply went on after the lease was lost: done %v, error %+v", p.reply.done, p.reply.err)
				}
			}
			stack.Until(t, 30*time.Second, "a reply again", func() bool {
				r := client.chat(t.Context(), true, priced(t, 5, nil))
				return r.status == http.StatusOK && r.done
			})
			t.Logf("away for %s, %d requests refused; the last reply ended %s after", away.Round(time.Millisecond), refused, ended.Round(time.Millisecond))
		})
	}
	cuts.Wait()
}
