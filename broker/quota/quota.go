// Package quota is the front of the books for whoever owns requests: it gathers what
// many requests want at the same time, and asks the books once.
//
// # What it promises
//
// A request that Admit lets in holds a slot of its key and the most that it can cost,
// until it is settled; one that is refused holds nothing. No budget is overspent, and
// no key has more requests in flight than it may, however many processes admit.
//
// Safety comes from the books, where one transaction decides and notes: this package
// keeps no count of its own that anything depends on. Each question can be asked again,
// since it names its request. If the answer to an admission gets lost, the request may
// or may not hold something, so it is voided, which also bars it if the first question
// should get through only then. A settlement is kept until the books have taken it.
//
// Liveness comes from the lease: the Gate renews it every few seconds, and when the
// process dies the sweeper returns its slots. A process that was stopped, and whose
// lease may have lapsed, must not deliver what nobody would bill: Grant.Expired tells.
// While the books can't be reached nobody sweeps, and nothing is admitted, but what is
// in flight goes on: its money is held until its deadline, by which it has ended, and
// once the books are back nothing lapses for as long as a lease takes, in which time
// what has ended is settled.
//
// # Group commit
//
// Keys are spread over a few shards. Each has one transaction under way; what comes in
// meanwhile waits, and goes into the next one together. So the busier a key is, the more
// of its requests share a commit, and nobody waits for a timer. In each transaction
// settlements go first, so that what they return is there for the admissions. A
// settlement alone, of a key that has plenty left, lies for a few milliseconds until an
// admission takes it along: a transaction costs the database several times what one more
// settlement in it does.
package quota

import (
	"context"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/schemas"
)

// Books is what a Gate needs of the books.
type Books interface {
	Turn(ctx context.Context, turn books.Turn) (books.Outcomes, error)
	RenewLease(ctx context.Context, owner schemas.OwnerID, ttl time.Duration) (books.Lease, error)
	EndLease(ctx context.Context, lease books.Lease) error
	Standing(ctx context.Context, key schemas.KeyID, model string) (books.Standing, error)
}

// Config holds the bounds of a Gate. The zero value of each stands for its default.
type Config struct {
	// Owner is under which id requests are owned; it must be that of this run of the
	// process alone. Empty: a fresh one.
	Owner schemas.OwnerID
	// Lease is for how long the books wait for a sign of life: 10 s.
	Lease time.Duration
	// Shards is how many transactions may be under way at once: 1. With the database on
	// the same two cores, 2 were no faster; a key is always in one of them.
	Shards int
	// OpenTokens is what a request without a limit gets at first: 1,024.
	OpenTokens int64
	// Wait bounds how long an admission waits for the books: 5 s.
	Wait time.Duration
	// SecondLook is after how long a request is looked at again that was refused because
	// others in flight hold what it needs: 10 ms. A release may be on its way.
	SecondLook time.Duration
}

func (c Config) withDefaults() Config {
	set := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	if c.Owner == "" {
		c.Owner = schemas.NewOwnerID()
	}
	set(&c.Lease, 10*time.Second)
	set(&c.Wait, 5*time.Second)
	set(&c.SecondLook, 10*time.Millisecond)
	if c.Shards <= 0 {
		c.Shards = 1
	}
	if c.OpenTokens <= 0 {
		c.OpenTokens = books.DefaultOpenTokens
	}
	return c
}

// Ask asks for the admission of a request; see books.Ask.
type Ask = books.Ask
