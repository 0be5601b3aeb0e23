package books_test

import (
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
)

// TestClockJumps moves the clock of the database by an hour, there and back, while requests
// are open. Only time is lost by it: leases have to be renewed, a tenant may wait a minute. No
// slot and no money gets lost, nothing is charged twice, and months go by the admission.
func TestClockJumps(t *testing.T) {
	const hour = time.Hour
	for _, test := range []struct {
		name string
		jump time.Duration
	}{{"ahead", hour}, {"back", -hour}, {"a month ahead", 31 * 24 * hour}, {"a month back", -31 * 24 * hour}} {
		t.Run(test.name, func(t *testing.T) {
			s := open(t)
			clock := newClock(s)
			c := newClient(t, s, limits{cents: 10, concurrency: 3, qps: 1})
			settled, left := c.ask(100, 300), c.ask(100, 300)
			for _, a := range []books.Ask{settled, left} {
				if got := c.admit(a)[0]; got.Reason != "" {
					t.Fatalf("%+v", got)
				}
				clock.add(2 * time.Second)
			}
			month := func(a books.Ask) string {
				m, err := books.Query[string](t.Context(), s, `SELECT month::text FROM reservations WHERE id = $1`, a.Request)
				c.must(err)
				return m
			}
			was := month(settled)

			clock.add(test.jump)
			// The owner's renewal comes before anybody's sweep, or after it: both do.
			c.renew(false)
			c.sweep(books.Swept{Expired: map[bool]int{true: 2}[test.jump > 0]})
			if state := c.settle(settled, 100, 50, books.OutcomeDone); test.jump < 0 && state != books.StateOpen {
				t.Errorf("settled after the jump, when it was %s", state)
			}
			if c.rows(settled.Request) != 1 || month(settled) != was {
				t.Errorf("%d rows in the ledger, in the month %s, want %s", c.rows(settled.Request), month(settled), was)
			}
			// The bucket was drawn from by another clock.
			next := c.ask(100, 300)
			got := c.admit(next)[0]
			if got.Reason != "" {
				t.Errorf("after the jump: %+v", got)
			}
			c.settle(next, 100, 50, books.OutcomeDone)

			clock.add(-test.jump)
			c.renew(false)
			last := c.ask(100, 300)
			clock.add(time.Minute)
			if got := c.admit(last)[0]; got.Reason != "" {
				t.Errorf("a minute after the clock was put right: %+v", got)
			}
			c.settle(last, 100, 50, books.OutcomeDone)
			// Whoever is left behind is found once its time has come by the clock that is right.
			clock.add(10*time.Minute + books.ExpireGrace)
			if _, err := s.Sweep(t.Context()); err != nil {
				t.Fatal(err)
			}
			for _, a := range []books.Ask{settled, left, next, last} {
				if n := c.rows(a.Request); n != 1 {
					t.Errorf("%d rows in the ledger", n)
				}
			}
			held, err := books.Query[int64](t.Context(), s, `SELECT (SELECT sum(in_flight) FROM key_accounts) + (SELECT sum(reserved) FROM budgets)`)
			if err != nil || held != 0 {
				t.Errorf("slots and money that are still held: %d, %v", held, err)
			}
			off, err := books.Query[int64](t.Context(), s, `SELECT (SELECT sum(cost) FROM ledger) - (SELECT sum(spent) FROM budgets)`)
			if err != nil || off != 0 {
				t.Errorf("the ledger and the budgets differ by %d, %v", off, err)
			}
		})
	}
}
