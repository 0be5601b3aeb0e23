// Package quotatest has books that a test plays by hand, for tests of what stands on
// package quota.
package quotatest

import (
	"context"
	"maps"
	"sync"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/quota"
	"github.com/ownllm/ownllm/internal/natstest"
	"github.com/ownllm/ownllm/schemas"
)

// Books are books with one key that has a purse. Its fields may be changed in Set.
type Books struct {
	mu sync.Mutex
	// Price is that of 1,000 tokens; 0: all is free.
	Price int64
	// Purse is how many tokens are still to be had; prompts are free.
	Purse int64
	// Away says that nobody answers, and Deaf that settlements aren't taken.
	Away, Deaf bool
	// Refuse is why nobody is let in.
	Refuse books.Reason
	// Hang holds up whoever wants to be let in, until it is closed.
	Hang chan struct{}
	// Flush, unless it is nil, holds up what was decided for whoever wants to be let in, until
	// it is closed; if the books are Away by then, nothing comes of it.
	Flush chan struct{}
	// Epoch is that of the lease.
	Epoch int64
	// Ended are the requests that somebody else has ended.
	Ended map[schemas.RequestID]bool
	// Agents and Prompts are what was noted of each request.
	Agents  map[schemas.RequestID]schemas.AgentID
	Prompts map[schemas.RequestID]int64

	holds   map[schemas.RequestID]int64 // the tokens that each request has
	settled map[schemas.RequestID]books.Settlement
}

// New returns books that let everybody in, for nothing.
func New() *Books {
	return &Books{
		Purse: books.MaxTokens, holds: make(map[schemas.RequestID]int64), Ended: make(map[schemas.RequestID]bool),
		Agents: make(map[schemas.RequestID]schemas.AgentID), settled: make(map[schemas.RequestID]books.Settlement),
		Prompts: make(map[schemas.RequestID]int64), Epoch: 1,
	}
}

// Set changes the books.
func (l *Books) Set(change func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change()
}

// Turn implements quota.Books.
func (l *Books) Turn(_ context.Context, turn books.Turn) (out books.Outcomes, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if hang := l.Hang; hang != nil && len(turn.Admit) > 0 {
		l.mu.Unlock()
		<-hang
		l.mu.Lock()
	}
	if l.Away || l.Deaf && len(turn.Settle) > 0 {
		return out, books.ErrUnavailable
	}
	purse, holds, settled := l.Purse, maps.Clone(l.holds), maps.Clone(l.settled)
	for _, s := range turn.Settle {
		was := books.StateOpen
		if _, ok := l.settled[s.Request]; ok || l.Ended[s.Request] {
			was = books.StateSettled
		} else {
			l.settled[s.Request] = s
			l.Purse += l.holds[s.Request]
			delete(l.holds, s.Request)
		}
		out.Settled = append(out.Settled, was)
	}
	for _, a := range turn.Alter {
		if _, ok := l.settled[a.Request]; ok || l.Ended[a.Request] {
			out.Altered = append(out.Altered, books.Altered{State: books.StateSettled})
			continue
		}
		if a.Agent != "" {
			l.Agents[a.Request] = a.Agent
		}
		if a.Prompt != nil {
			l.Prompts[a.Request] = *a.Prompt
		}
		if more := min(a.Limit-l.holds[a.Request], l.Purse); more > 0 {
			l.Purse -= more
			l.holds[a.Request] += more
		}
		others := int64(0)
		for id, n := range l.holds {
			if id != a.Request {
				others += n
			}
		}
		out.Altered = append(out.Altered, books.Altered{State: books.StateOpen, Limit: l.holds[a.Request], Others: others})
	}
	for _, a := range turn.Admit {
		d := books.Decision{Reason: l.Refuse, Price: l.Price, Slots: 32, SlotsFree: 31, Budget: new(int64(1)), Wait: time.Hour}
		if d.Reason == books.Admitted {
			d.Limit = min(max(a.Limit, turn.OpenTokens*min(1, max(0, 1-a.Limit))), l.Purse)
			l.Purse -= d.Limit
			l.holds[a.Request], l.Agents[a.Request] = d.Limit, a.Agent
			d.Amount = d.Limit
			if more := min(a.Most-d.Limit, l.Purse); a.Limit <= 0 && a.Most > 0 {
				d.Grown = more > 0 || len(l.holds) == 1
				more = max(more, 0)
				d.Limit, l.Purse, l.holds[a.Request] = d.Limit+more, l.Purse-more, d.Limit+more
			}
		}
		d.BudgetFree = l.Purse
		out.Admit = append(out.Admit, d)
	}
	if flush := l.Flush; flush != nil && len(turn.Admit) == 1 && out.Admit[0].Reason == books.Admitted && turn.Foreseen != nil {
		l.mu.Unlock()
		turn.Foreseen(out.Admit[0])
		<-flush
		l.mu.Lock()
		if l.Away {
			l.Purse, l.holds, l.settled = purse, holds, settled
			return books.Outcomes{}, books.ErrUnavailable
		}
	}
	return out, nil
}

// RenewLease implements quota.Books.
func (l *Books) RenewLease(_ context.Context, owner schemas.OwnerID, _ time.Duration) (books.Lease, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.Away {
		return books.Lease{}, books.ErrUnavailable
	}
	return books.Lease{Owner: owner, Epoch: l.Epoch}, nil
}

// EndLease implements quota.Books.
func (l *Books) EndLease(context.Context, books.Lease) error { return nil }

// Standing implements quota.Books.
func (l *Books) Standing(context.Context, schemas.KeyID, string) (books.Standing, error) {
	return books.Standing{}, nil
}

// Charged waits until a request is settled, and returns how.
func (l *Books) Charged(t testing.TB, id schemas.RequestID) books.Settlement {
	t.Helper()
	var s books.Settlement
	until(t, "a settlement", func() (ok bool) {
		l.mu.Lock()
		defer l.mu.Unlock()
		s, ok = l.settled[id]
		return ok
	})
	return s
}

// Gate runs a gate in front of the books until the test ends.
func (l *Books) Gate(t testing.TB, cfg quota.Config) *quota.Gate {
	t.Helper()
	g := quota.New(l, cfg, natstest.Log)
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	until(t, "a lease", g.Ready)
	return g
}

// until waits for a condition that nothing signals.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}
