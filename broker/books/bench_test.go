package books_test

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/quota"
	"github.com/ownllm/ownllm/internal/postgres"
	"github.com/ownllm/ownllm/schemas"
)

// durable opens the books on a server that flushes every commit to disk, as in
// production; that of pgtest doesn't.
func durable(b *testing.B, conns int) *books.Store {
	b.Helper()
	server, err := postgres.Start(b.Context(), postgres.Config{
		DataDir: filepath.Join(b.TempDir(), "postgres"), Settings: map[string]string{"max_connections": "320"},
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := server.Stop(context.Background()); err != nil {
			b.Error(err)
		}
	})
	s, err := books.Open(b.Context(), books.Config{URL: server.URL(), MaxConns: conns, Timeout: time.Minute})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(s.Close)
	if err := s.Migrate(b.Context()); err != nil {
		b.Fatal(err)
	}
	return s
}

// spread calls work b.N times, from as many goroutines as there are waiters.
func spread(b *testing.B, waiters int, work func(i int) error) {
	b.Helper()
	var next atomic.Int64
	var wg sync.WaitGroup
	b.ResetTimer()
	for range waiters {
		wg.Go(func() {
			for i := next.Add(1); i <= int64(b.N); i = next.Add(1) {
				if err := work(int(i)); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "ops/s")
}

// BenchmarkAdmission compares admission with a bare UPDATE of one row for each request,
// both on connections of their own to the same server: one hot key, and 1,000 keys of 10
// tenants. "admit" is admission and settlement, "reserve" admission alone.
func BenchmarkAdmission(b *testing.B) {
	s := durable(b, 256)
	lim := limits{cents: 1_000_000_000, concurrency: 1_000_000, qps: 1_000_000}
	hot := newClient(b, s, lim)
	var many []*client
	for range 10 {
		c := newClient(b, s, lim)
		many = append(many, c)
		for range 99 {
			k, _, err := s.CreateKey(b.Context(), books.NewKey{Tenant: c.tenant.Slug, User: c.user.Email, Concurrency: &lim.concurrency, BudgetCents: &lim.cents})
			c.must(err)
			other := *c
			other.key = k
			many = append(many, &other)
		}
	}
	for _, set := range []struct {
		name string
		keys []*client
	}{{"hot", []*client{hot}}, {"1000", many}} {
		for _, c := range set.keys { // every row is there
			ask := c.ask(1, 1)
			c.admit(ask)
			c.settle(ask, 1, 1, books.OutcomeDone)
		}
		for _, waiters := range []int{1, 32, 256} {
			at := func(i int) *client { return set.keys[i%len(set.keys)] }
			b.Run(fmt.Sprintf("keys=%s/waiters=%d/bare", set.name, waiters), func(b *testing.B) {
				spread(b, waiters, func(i int) error {
					return s.Exec(b.Context(), `UPDATE budgets SET spent = spent + 1 WHERE key_id = $1`, at(i).key.ID)
				})
			})
			for _, shards := range []int{1, 2} {
				if shards > len(set.keys) {
					continue // one key is always in one shard
				}
				for _, settle := range []bool{false, true} {
					name := "reserve"
					if settle {
						name = "admit"
					}
					b.Run(fmt.Sprintf("keys=%s/waiters=%d/%s/shards=%d", set.name, waiters, name, shards), func(b *testing.B) {
						g := runGate(b, s, shards)
						spread(b, waiters, func(i int) error {
							grant, err := g.Admit(b.Context(), at(i).ask(100, 100))
							if settle && err == nil {
								g.Settle(&grant, nil, 100, books.OutcomeDone)
							}
							return err
						})
						for settle && g.Unsettled() > 0 {
							time.Sleep(time.Millisecond)
						}
						if !settle {
							if err := s.Exec(b.Context(), `DELETE FROM reservations; UPDATE key_accounts SET in_flight = 0; UPDATE budgets SET reserved = 0`); err != nil {
								b.Fatal(err)
							}
						}
					})
				}
			}
		}
	}
}

func runGate(b *testing.B, s *books.Store, shards int) *quota.Gate {
	g := quota.New(s, quota.Config{Owner: schemas.NewOwnerID(), Shards: shards, Wait: time.Minute}, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = g.Run(ctx) // returns nil
	}()
	b.Cleanup(func() {
		cancel()
		<-done
	})
	for !g.Ready() {
		time.Sleep(time.Millisecond)
	}
	return g
}
