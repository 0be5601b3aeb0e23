package worker

import (
	"context"
	"sync"

	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/backend"
)

// allowance is how many tokens the reply to a run may have, all choices together. The
// owner says it with the job, and again with verdicts and controls. These may overtake
// each other, so that an old word may count for a moment; that is why it matters that
// only the last word of an owner denies more. A reply that an old word holds up asks the
// owner, whose answer is the present one.
type allowance struct {
	mu      sync.Mutex
	limit   int64         // 0: any number
	more    bool          // it may yet rise
	held    bool          // the owner hasn't said it yet
	changed chan struct{} // holds one token
}

func newAllowance(job *schemas.Job) *allowance {
	return &allowance{limit: job.Limit, more: job.More, held: job.Hold, changed: make(chan struct{}, 1)}
}

// set takes in what the owner says. A reply without a bound stays without one, but a job
// that is held has none only if the first word of its owner says so.
func (a *allowance) set(limit int64, more bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.held {
		a.held, a.limit, a.more = false, limit, more
		return
	}
	if limit <= 0 || a.limit == 0 || a.limit == limit && a.more == more {
		return
	}
	a.limit, a.more = limit, more
	signal(a.changed)
}

func (a *allowance) get() (limit int64, more bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.limit, a.more
}

// bound lets the allowance hold for a call.
func (a *allowance) bound(c *backend.Call) {
	limit, more := a.get()
	if limit == 0 {
		return
	}
	c.Allowed = func() int64 {
		limit, _ := a.get()
		return limit
	}
	if !more {
		c.MaxTokens = limit
	}
}

// awaitMore waits until the reply may have so many tokens. It returns false if it never
// may.
func (r *run) awaitMore(ctx context.Context, wanted int) (bool, error) {
	defer r.hold(0)
	for {
		limit, more := r.allowance.get()
		if int64(wanted) <= limit {
			return true, nil
		}
		if !more {
			return false, nil
		}
		r.hold(wanted)
		select {
		case <-r.allowance.changed:
		case <-ctx.Done():
			return false, context.Cause(ctx)
		}
	}
}
