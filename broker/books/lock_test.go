package books_test

import (
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/pgtest"
	"github.com/ownllm/ownllm/schemas"
)

const (
	lockKey    = `UPDATE key_accounts SET in_flight = in_flight WHERE key_id = $1`
	lockTenant = `UPDATE tenant_buckets SET full_at = full_at WHERE tenant_id = $1`
)

// Whatever decides about a key waits for whoever has it, and then sees what that one
// has done. The tenant's bucket would make admissions wait for each other anyway, so
// here what goes before is something that doesn't touch it.
func TestEverythingWaitsForTheKey(t *testing.T) {
	const settled = `SELECT FROM books_settle(NULL, ARRAY[$2::text], ARRAY[$1::text], ARRAY[1::bigint], ARRAY[9::bigint], ARRAY['done'])`
	agent := schemas.NewAgentID()
	for _, c := range []struct {
		name string
		// the other's statement, which gets the id of a request where it has a $2
		meanwhile string
		id        bool
		work      func(c *client, a books.Ask) (got any)
		want      any
		spent     int64
		reserved  int64
	}{
		{
			"admit, when the last slot is taken", `UPDATE key_accounts SET in_flight = 2 WHERE key_id = $1`, false,
			func(c *client, _ books.Ask) any { return c.admit(c.ask(1, 9))[0].Reason }, books.ReasonNoSlot, 0, 100,
		},
		{
			"admit, when the rest of the money is spent", `UPDATE budgets SET spent = 900000 WHERE key_id = $1`, false,
			func(c *client, _ books.Ask) any { return c.admit(c.ask(1, 9))[0].Reason }, books.ReasonMoneyHeld, 900, 100,
		},
		{
			"alter, when the money is spent", `UPDATE budgets SET spent = 900000 WHERE key_id = $1`, false,
			func(c *client, a books.Ask) any {
				return c.alter(books.Alter{Request: a.Request, Key: a.Key, Limit: 500}).Limit
			}, int64(99), 900, 100,
		},
		{
			"alter, when it is settled", settled, true,
			func(c *client, a books.Ask) any {
				return c.alter(books.Alter{Request: a.Request, Key: a.Key, Limit: 500}).State
			}, books.StateSettled, 10, 0,
		},
		{
			"settle, when it is settled", settled, true,
			func(c *client, a books.Ask) any { return c.settle(a, 1, 99, books.OutcomeDone) }, books.StateSettled, 10, 0,
		},
		{
			"report, when it is settled", settled, true,
			func(c *client, a books.Ask) any {
				c.must(c.s.EndLease(c.t.Context(), c.lease))
				got, err := c.s.SettleOrphan(c.t.Context(), c.tenant.ID, agent, &schemas.UsageReport{Request: a.Request, Usage: schemas.Usage{PromptTokens: 1, CompletionTokens: 99}})
				c.must(err)
				return got
			}, books.OrphanEnded, 10, 0,
		},
		{
			"sweep, when it is settled", settled, true,
			func(c *client, _ books.Ask) any {
				c.must(c.s.EndLease(c.t.Context(), c.lease))
				got, err := c.s.Sweep(c.t.Context())
				c.must(err)
				return got
			}, books.Swept{}, 10, 0,
		},
		{
			"expire, when it is settled", settled, true,
			func(c *client, a books.Ask) any {
				c.must(c.s.EndLease(c.t.Context(), c.lease))
				got, err := c.s.ExpireOrphans(c.t.Context(), []schemas.RequestID{a.Request})
				c.must(err)
				return got
			}, 0, 10, 0,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			cl := newClient(t, open(t), limits{cents: 1, concurrency: 2, qps: 1000})
			a := cl.ask(1, 99)
			a.Agent = agent
			cl.admit(a)
			var args []any
			if c.id {
				args = append(args, a.Request)
			}
			var got any
			cl.must(cl.s.Meanwhile(t.Context(), lockKey, string(cl.key.ID), func() { got = c.work(cl, a) }, c.meanwhile, args...))
			if got != c.want {
				t.Errorf("got %v, want %v", got, c.want)
			}
			account, err := cl.s.Account(t.Context(), cl.key.ID)
			cl.must(err)
			if account.Spent != c.spent*perToken || account.Reserved != c.reserved*perToken {
				t.Errorf("the key has %+v, want %d and %d tokens", account, c.spent, c.reserved)
			}
		})
	}
}

// Admissions for different keys of a tenant draw from one bucket, one after the other.
func TestAdmissionWaitsForTheTenant(t *testing.T) {
	c := newClient(t, open(t), limits{concurrency: 9, qps: 1})
	// The bucket has its row, and is full.
	c.admit(c.ask(1, 1))
	c.must(c.s.Exec(t.Context(), `UPDATE tenant_buckets SET full_at = 0`))
	var got books.Decision
	c.must(c.s.Meanwhile(t.Context(), lockTenant, string(c.tenant.ID), func() { got = c.admit(c.ask(1, 1))[0] },
		`UPDATE tenant_buckets SET full_at = (extract(epoch FROM now() + interval '30 s') * 1000000000)::bigint WHERE tenant_id = $1`))
	if got.Reason != books.ReasonTenantQPS {
		t.Errorf("%+v", got)
	}
}

// Turns of every kind at once, each by itself, on one key: no sum is ever wrong.
func TestTurnsAtOnce(t *testing.T) {
	address := pgtest.New(t)
	c := newClient(t, openAt(t, books.Config{URL: address}), limits{cents: 1, concurrency: 8, qps: 1_000_000})
	admitted := make(chan books.Ask, 8)
	var work, settlers sync.WaitGroup
	for range 3 {
		other := *c
		other.s = openAt(t, books.Config{URL: address})
		work.Go(func() {
			for end := time.Now().Add(time.Second); time.Now().Before(end); {
				if a := other.ask(1, 99); other.admit(a)[0].Reason == books.Admitted {
					admitted <- a
				}
			}
		})
		settlers.Go(func() {
			n := 0
			for a := range admitted {
				other.alter(books.Alter{Request: a.Request, Key: a.Key, Limit: 150})
				// Nothing is burnt, so that the money doesn't run out; sometimes twice.
				for range 1 + n%2 {
					other.settle(a, 0, 0, books.OutcomeDone)
				}
				n++
			}
		})
	}
	work.Wait()
	close(admitted)
	settlers.Wait()
	if n, err := c.s.Heal(t.Context()); err != nil || n != 0 {
		t.Errorf("%d keys had to be healed, %v", n, err)
	}
	c.holds(0, 0, 0)
}

// Turns over several tenants and keys at once, in any order, some of them new: nobody
// waits in a circle, which the database would break off with an error.
func TestTurnsDontDeadlock(t *testing.T) {
	address := pgtest.New(t)
	s := openAt(t, books.Config{URL: address})
	lim := limits{cents: 1000, concurrency: 1000, qps: 100_000}
	for range 3 {
		var clients []*client
		for range 8 {
			clients = append(clients, newClient(t, s, lim))
		}
		var work sync.WaitGroup
		for range 6 {
			other := openAt(t, books.Config{URL: address})
			work.Go(func() {
				for range 40 {
					// One that locks tenants and keys, and one that locks only keys.
					admit, settle := books.Turn{Lease: clients[0].lease}, books.Turn{}
					for _, i := range rand.Perm(len(clients))[:5] {
						a := clients[i].ask(1, 1)
						admit.Admit = append(admit.Admit, a)
						settle.Settle = append(settle.Settle, books.Settlement{Request: a.Request, Key: a.Key, Outcome: books.OutcomeDone})
					}
					for _, turn := range []books.Turn{admit, settle} {
						if _, err := other.Turn(t.Context(), turn); err != nil {
							t.Error(err)
							return
						}
					}
				}
			})
		}
		work.Wait()
	}
}
