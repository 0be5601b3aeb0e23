package books_test

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/quota"
	"github.com/ownllm/ownllm/internal/postgres"
)

// BenchmarkAdmission compares admission with bare statements, on the same server:
//
//   - admit: what the program does for a request, an admission and a settlement. Only
//     the admission is waited for, and only it counts in p50 and p99; but the clock
//     stops when all is settled. trips/op is how many transactions there were for each
//     request, all of them one round trip;
//   - alone: the same, but the next request comes when the one before is settled;
//   - update: one UPDATE of the row of the same key in a table like budgets, by as many
//     waiters, which share conns connections;
//   - select: SELECT 1, which is a round trip and nothing else.
//
// keys=1 is one hot key, keys=1000 are those of 10 tenants in turn. internal/bench runs
// this once in each of its rounds, and makes a table of it.
func BenchmarkAdmission(b *testing.B) {
	address := durable(b)
	s := connect(b, address, 0)
	defer s.Close()
	if err := s.Migrate(b.Context()); err != nil {
		b.Fatal(err)
	}
	clients := newClients(b, s, 10, 100)
	if err := s.Exec(b.Context(), `
		CREATE TABLE bare (key_id text COLLATE "C" PRIMARY KEY, spent bigint NOT NULL, reserved bigint NOT NULL) WITH (fillfactor = 50);
		INSERT INTO bare SELECT id, 0, 0 FROM api_keys`); err != nil {
		b.Fatal(err)
	}
	selectOne := func(s *books.Store, _ int) error { return s.Exec(b.Context(), `SELECT 1`) }
	for _, keys := range []int{1, len(clients)} {
		at := func(i int) *client { return clients[i%keys] }
		update := func(s *books.Store, i int) error {
			return s.Exec(b.Context(), `UPDATE bare SET reserved = reserved + $1 WHERE key_id = $2`, 1000, at(i).key.ID)
		}
		for _, waiters := range []int{1, 32, 256} {
			name := fmt.Sprintf("keys=%d/waiters=%d/", keys, waiters)
			lone := keys == 1 && waiters == 1
			if lone {
				bare(b, name+"select", address, waiters, waiters, selectOne)
			}
			for _, conns := range pools(waiters) {
				bare(b, fmt.Sprintf("%supdate/conns=%d", name, conns), address, waiters, conns, update)
			}
			if lone {
				b.Run(name+"alone", func(b *testing.B) { admit(b, s, waiters, at, true) })
			}
			b.Run(name+"admit", func(b *testing.B) { admit(b, s, waiters, at, false) })
		}
	}
}

// durable starts a server that flushes every commit to disk, as in production; that of
// pgtest doesn't. It has room for the most connections that are measured.
func durable(b *testing.B) (address string) {
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
	return server.URL()
}

// connect opens the books, with that many connections; 0 stands for as many as the
// program has.
func connect(b *testing.B, address string, conns int) *books.Store {
	b.Helper()
	s, err := books.Open(b.Context(), books.Config{URL: address, MaxConns: conns, Timeout: time.Minute})
	if err != nil {
		b.Fatal(err)
	}
	return s
}

// newClients makes keys, each with more of everything than a benchmark can use.
func newClients(b *testing.B, s *books.Store, tenants, each int) (all []*client) {
	b.Helper()
	lim := limits{cents: 1_000_000_000, concurrency: 1_000_000, qps: 1_000_000}
	for range tenants {
		first := newClient(b, s, lim)
		all = append(all, first)
		for range each - 1 {
			k, _, err := s.CreateKey(b.Context(), books.NewKey{
				Tenant: first.tenant.Slug, User: first.user.Email, Concurrency: &lim.concurrency, BudgetCents: &lim.cents,
			})
			first.must(err)
			other := *first
			other.key = k
			all = append(all, &other)
		}
	}
	return all
}

// pools are the numbers of connections that the bare loop is tried with: one for each
// waiter, as it would be written first, and fewer, because sessions that wait for one
// row disturb each other.
func pools(waiters int) []int {
	return slices.DeleteFunc([]int{8, 64, waiters}, func(n int) bool { return n > waiters })
}

// bare measures one statement for each operation.
func bare(b *testing.B, name, address string, waiters, conns int, statement func(s *books.Store, i int) error) {
	b.Helper()
	var s *books.Store
	b.Run(name, func(b *testing.B) { // it is called with growing b.N
		if s == nil {
			s = connect(b, address, conns)
			var all errgroup.Group
			for range conns { // all are open before the clock starts
				all.Go(func() error { return s.Exec(b.Context(), `SELECT pg_sleep(0.1)`) })
			}
			if err := all.Wait(); err != nil {
				b.Fatal(err)
			}
		}
		spread(b, waiters, func(_, i int) (time.Duration, error) {
			begun := time.Now()
			err := statement(s, i)
			return time.Since(begun), err
		}, func(int) {})
	})
	if s != nil {
		s.Close()
	}
}

// counted are books whose turns are counted.
type counted struct {
	*books.Store
	turns atomic.Int64
}

// Turn implements quota.Books.
func (c *counted) Turn(ctx context.Context, turn books.Turn) (books.Outcomes, error) {
	c.turns.Add(1)
	return c.Store.Turn(ctx, turn)
}

// admit measures admission and settlement by a gate with the settings of the program.
func admit(b *testing.B, s *books.Store, waiters int, at func(i int) *client, alone bool) {
	b.Helper()
	c := &counted{Store: s}
	g := quota.New(c, quota.Config{Wait: time.Minute}, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = g.Run(ctx) // returns nil
	}()
	defer func() {
		cancel()
		<-done
	}()
	for !g.Ready() {
		time.Sleep(time.Millisecond)
	}
	settled := make([]<-chan struct{}, waiters) // the last one of each
	wait := func(waiter int) {
		if settled[waiter] != nil {
			<-settled[waiter]
		}
	}
	spread(b, waiters, func(waiter, i int) (time.Duration, error) {
		begun := time.Now()
		grant, err := g.Admit(b.Context(), at(i).ask(100, 100))
		took := time.Since(begun)
		if err == nil {
			settled[waiter] = g.Settle(&grant, nil, 100, books.OutcomeDone, nil)
			if alone {
				wait(waiter)
			}
		}
		return took, err
	}, wait)
	b.ReportMetric(float64(c.turns.Load())/float64(b.N), "trips/op")
}

// spread has work done b.N times, by as many goroutines as there are waiters; work says
// how long the part of it took that counts in p50 and p99. At its end each goroutine
// calls finish, and the clock stops after the last one.
func spread(b *testing.B, waiters int, work func(waiter, i int) (time.Duration, error), finish func(waiter int)) {
	b.Helper()
	var next atomic.Int64
	var wg sync.WaitGroup
	took := make([][]time.Duration, waiters)
	b.ResetTimer()
	for w := range waiters {
		wg.Go(func() {
			for i := next.Add(1); i <= int64(b.N); i = next.Add(1) {
				d, err := work(w, int(i))
				if err != nil {
					b.Error(err)
					return
				}
				took[w] = append(took[w], d)
			}
			finish(w)
		})
	}
	wg.Wait()
	b.StopTimer()
	all := slices.Concat(took...)
	if b.Failed() || len(all) == 0 {
		return
	}
	slices.Sort(all)
	b.ReportMetric(float64(len(all))/b.Elapsed().Seconds(), "ops/s")
	b.ReportMetric(float64(all[len(all)/2].Nanoseconds())/1e3, "p50-us")
	b.ReportMetric(float64(all[len(all)*99/100].Nanoseconds())/1e3, "p99-us")
}
