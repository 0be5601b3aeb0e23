package books_test

import (
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/pgtest"
	"github.com/ownllm/ownllm/schemas"
)

// movable is a clock that a test moves. It begins in the future, so that the server
// has been up for longer than any lease.
type movable struct{ now time.Time }

func newClock(s *books.Store) *movable {
	m := &movable{time.Date(2041, 5, 15, 12, 0, 0, 0, time.UTC)}
	s.SetClock(func() time.Time { return m.now })
	return m
}

func (m *movable) add(d time.Duration) { m.now = m.now.Add(d) }

func (c *client) sweep(want books.Swept) {
	c.t.Helper()
	got, err := c.s.Sweep(c.t.Context())
	c.must(err)
	if got != want {
		c.t.Errorf("swept %+v, want %+v", got, want)
	}
}

// renew renews the lease, and checks whether it is another one afterwards.
func (c *client) renew(lapsed bool) {
	c.t.Helper()
	lease, err := c.s.RenewLease(c.t.Context(), c.lease.Owner, time.Minute)
	c.must(err)
	if lease.Owner != c.lease.Owner || (lease.Epoch > c.lease.Epoch) != lapsed || lease.Epoch < c.lease.Epoch {
		c.t.Errorf("lease %+v after %+v", lease, c.lease)
	}
	c.lease = lease
}

func (c *client) orphan(a books.Ask, agent schemas.AgentID, want books.Orphan) {
	c.t.Helper()
	got, err := c.s.SettleOrphan(c.t.Context(), c.tenant.ID, agent, &schemas.UsageReport{Request: a.Request, Usage: schemas.Usage{PromptTokens: 50, CompletionTokens: 20}})
	c.must(err)
	if got != want {
		c.t.Errorf("orphan: %s, want %s", got, want)
	}
}

func TestLease(t *testing.T) {
	s := open(t)
	clock := newClock(s)
	c := newClient(t, s, limits{cents: 1, concurrency: 2, qps: 1000})
	agent := schemas.NewAgentID()
	a, b := c.ask(100, 300), c.ask(100, 300)
	a.Agent, b.Agent = agent, agent
	c.admit(a, b)
	admitted := clock.now
	clock.add(59 * time.Second)
	c.sweep(books.Swept{})
	c.renew(false)
	clock.add(59 * time.Second)
	c.sweep(books.Swept{})
	// Late, but nobody took it away: it is still the same.
	clock.add(2 * time.Second)
	c.renew(false)
	c.orphan(a, agent, books.OrphanOwned)

	clock.add(60 * time.Second)
	c.sweep(books.Swept{Leases: 1, Slots: 2})
	c.holds(0, 0, 800) // the money stays
	c.sweep(books.Swept{})
	if got := c.admit(c.ask(1, 1))[0]; got.Reason != books.ReasonLease {
		t.Errorf("admitted under a lapsed lease: %+v", got)
	}
	old := c.lease
	c.renew(true)
	fresh := c.lease
	c.lease = old
	if got := c.admit(c.ask(1, 1))[0]; got.Reason != books.ReasonLease {
		t.Errorf("admitted under an old epoch: %+v", got)
	}
	c.lease = fresh
	d, begun := c.ask(1, 99), clock.now
	if got := c.admit(d)[0]; got.Reason != "" {
		t.Errorf("%+v", got)
	}

	if orphans, err := s.Orphans(t.Context()); err != nil || len(orphans) != 2 || orphans[0].Agent != agent {
		t.Errorf("orphans %+v, %v", orphans, err)
	}
	if n, err := s.ExpireOrphans(t.Context(), []schemas.RequestID{d.Request}); err != nil || n != 0 {
		t.Errorf("%d orphans of an owner that lives, %v", n, err)
	}
	c.orphan(c.ask(1, 1), agent, books.OrphanUnknown)
	c.orphan(a, schemas.NewAgentID(), books.OrphanForeign)
	c.orphan(d, agent, books.OrphanForeign)
	if got, err := s.SettleOrphan(t.Context(), schemas.NewTenantID(), agent, &schemas.UsageReport{Request: a.Request}); err != nil || got != books.OrphanForeign {
		t.Errorf("report of another tenant: %s, %v", got, err)
	}
	c.orphan(a, agent, books.OrphanSettled)
	c.orphan(a, agent, books.OrphanEnded)
	c.holds(1, 70, 500)
	if state := c.settle(a, 1, 1, books.OutcomeDone); state != books.StateSettled || c.rows(a.Request) != 1 {
		t.Errorf("%s, %d rows", state, c.rows(a.Request))
	}

	// Nobody reports b: at its deadline it is charged its prompt.
	clock.now = admitted.Add(10*time.Minute + books.ExpireGrace - time.Millisecond)
	c.renew(false)
	c.sweep(books.Swept{})
	c.holds(1, 70, 500)
	clock.add(time.Millisecond)
	c.sweep(books.Swept{Expired: 1})
	c.holds(1, 170, 100)
	c.orphan(b, agent, books.OrphanEnded)
	if state := c.settle(b, 100, 300, books.OutcomeDone); state != books.StateExpired || c.rows(b.Request) != 1 {
		t.Errorf("%s, %d rows", state, c.rows(b.Request))
	}
	c.holds(1, 170, 100)

	// Who says farewell leaves the rest to the sweeper at once.
	c.must(s.EndLease(t.Context(), old)) // not the present one
	c.sweep(books.Swept{})
	c.must(s.EndLease(t.Context(), c.lease))
	c.sweep(books.Swept{Slots: 1})
	c.holds(0, 170, 100)
	c.alter(books.Alter{Request: d.Request, Key: d.Key, Agent: agent})
	clock.add(time.Second)
	orphans, err := s.Orphans(t.Context())
	want := []books.Orphaned{{Request: d.Request, Agent: agent, Age: clock.now.Sub(begun)}}
	if diff := cmp.Diff(want, orphans); err != nil || diff != "" {
		t.Errorf("orphans: %v (-want +got):\n%s", err, diff)
	}
	ids := []schemas.RequestID{d.Request, a.Request, b.Request, schemas.NewRequestID()}
	for want := 1; want >= 0; want-- {
		if n, err := s.ExpireOrphans(t.Context(), ids); err != nil || n != want {
			t.Errorf("%d orphans, want %d, %v", n, want, err)
		}
	}
	c.holds(0, 171, 0)
}

// What the worker doesn't know of the prompt is charged as it was reserved.
func TestOrphanOfUnknownPrompt(t *testing.T) {
	c := newClient(t, open(t), limits{cents: 1, concurrency: 2, qps: 1000})
	agent := schemas.NewAgentID()
	a := c.ask(100, 300)
	a.Agent = agent
	c.admit(a)
	c.must(c.s.EndLease(t.Context(), c.lease))
	got, err := c.s.SettleOrphan(t.Context(), c.tenant.ID, agent, &schemas.UsageReport{Request: a.Request, Usage: schemas.Usage{CompletionTokens: 20}})
	if err != nil || got != books.OrphanSettled {
		t.Errorf("%s, %v", got, err)
	}
	c.holds(0, 120, 0)
}

// Postgres was away for longer than a lease: nobody could renew, so nothing lapses
// and nothing expires before it has been back for a lease.
func TestSweepAfterRestart(t *testing.T) {
	s := open(t)
	clock := &movable{time.Now().UTC()}
	s.SetClock(func() time.Time { return clock.now })
	c := newClient(t, s, limits{concurrency: 2, qps: 1000})
	start, err := books.Query[time.Time](t.Context(), s, `SELECT pg_postmaster_start_time()`)
	c.must(err)
	clock.now = start.Add(-time.Hour) // before it went away
	c.renew(false)
	a := c.ask(1, 1)
	c.admit(a)
	clock.now = start.Add(9 * time.Second)
	c.sweep(books.Swept{})
	clock.now = start.Add(11 * time.Second)
	c.sweep(books.Swept{Expired: 1}) // its deadline was long ago
	clock.now = start.Add(59 * time.Second)
	c.sweep(books.Swept{})
	clock.now = start.Add(60 * time.Second)
	c.sweep(books.Swept{Leases: 1})
}

func TestSweepForgets(t *testing.T) {
	s := open(t)
	clock := newClock(s)
	c := newClient(t, s, limits{concurrency: 9, qps: 1000})
	a, b := c.ask(1, 1), c.ask(1, 1)
	c.admit(a, b)
	c.settle(a, 1, 1, books.OutcomeDone)
	rows := func() int {
		t.Helper()
		n, err := books.Query[int](t.Context(), s, `SELECT (SELECT count(*) FROM reservations) * 10 + (SELECT count(*) FROM owners)`)
		c.must(err)
		return n
	}
	// Ids are older than the clock of this test, and ended_at says when.
	clock.add(59 * time.Minute)
	c.renew(false)
	c.sweep(books.Swept{Expired: 1})
	if n := rows(); n != 21 {
		t.Errorf("rows: %d", n)
	}
	clock.add(2 * time.Minute)
	c.sweep(books.Swept{Leases: 1})
	if n := rows(); n != 11 {
		t.Errorf("rows: %d", n)
	}
	clock.add(2 * time.Hour)
	c.sweep(books.Swept{})
	if n := rows(); n != 0 {
		t.Errorf("rows: %d", n)
	}
	if state := c.settle(a, 1, 1, books.OutcomeDone); state != books.StateUnknown || c.rows(a.Request) != 1 {
		t.Errorf("%s", state)
	}
	c.renew(true) // an owner that was forgotten doesn't come back as the one it was
}

func TestSweepAtOnce(t *testing.T) {
	address := pgtest.New(t)
	s := openAt(t, books.Config{URL: address})
	c := newClient(t, s, limits{cents: 1, concurrency: 100, qps: 1000})
	for range 50 {
		c.admit(c.ask(1, 1))
	}
	var mu sync.Mutex
	var total books.Swept
	var wg sync.WaitGroup
	for range 6 {
		other := openAt(t, books.Config{URL: address})
		other.SetClock(func() time.Time { return time.Now().Add(time.Hour) })
		wg.Go(func() {
			for range 5 {
				got, err := other.Sweep(t.Context())
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				total.Leases += got.Leases
				total.Slots += got.Slots
				total.Expired += got.Expired
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if total != (books.Swept{Leases: 1, Slots: 50, Expired: 50}) {
		t.Errorf("%+v", total)
	}
	c.holds(0, 50, 0)
}

func TestHeal(t *testing.T) {
	c := newClient(t, open(t), limits{cents: 1, concurrency: 9, qps: 1000})
	c.admit(c.ask(1, 1), c.ask(1, 1))
	heal := func(want int) {
		t.Helper()
		if n, err := c.s.Heal(t.Context()); err != nil || n != want {
			t.Errorf("healed %d, %v", n, err)
		}
	}
	heal(0)
	for _, damage := range []string{
		`UPDATE key_accounts SET in_flight = 7`, `UPDATE budgets SET reserved = 0`,
		`UPDATE key_accounts SET in_flight = 0`, `UPDATE budgets SET reserved = reserved * 2`,
	} {
		c.must(c.s.Exec(t.Context(), damage))
		heal(1)
		c.holds(2, 0, 4)
		heal(0)
	}
}
