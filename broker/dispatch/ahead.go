package dispatch

import (
	"errors"
	"time"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/presence"
	"github.com/ownllm/ownllm/broker/quota"
	"github.com/ownllm/ownllm/schemas"
)

// A job may be published while the books are still being asked, so that the way through the
// queue to a worker's slot costs no time of its own. Its claim is held: it is answered once
// the request is admitted, and the worker, which the job tells to wait for that, calls no
// backend before. So nothing runs that the books haven't let in; see Reply.foreseen for those that
// are still writing that down. If the request is refused, the job is
// taken back as that of a client who has left; if this process dies, the worker hears that
// nobody listens, as with any claim.
//
// That is done for the first attempt of a request that will most likely be let in, at an
// agent that is known to wait. All others go one step after the other.

// holdFor bounds for how long a job waits at its worker for the admission of its request. It
// has a slot there, which others may need.
const holdFor = 250 * time.Millisecond

// outlook reports whether the next attempt is to be published before the request is admitted.
func (r *Reply) outlook(choice presence.Choice) (quota.Outlook, bool) {
	if r.bill.admitted || !choice.Holds {
		return quota.Outlook{}, false
	}
	return r.d.gate.Outlook(r.req.Key, r.req.Model)
}

// ahead admits the request and publishes its first attempt at the same time. refused says why
// it wasn't admitted, and err what became of the attempt.
//
// The books take longer than the queue, so they are asked from here, and publishing is left to
// another goroutine, since it is mostly this one that goes on first.
func (r *Reply) ahead(choice presence.Choice, ends uint64, outlook quota.Outlook) (refused, err error) {
	admitted, published := make(chan struct{}), make(chan error, 1)
	go func() { published <- r.publishAhead(choice, ends, &outlook, admitted) }()
	refused = r.admit(choice.Agent, func(grant quota.Grant) { r.foreseen(choice.Agent, grant) })
	outlook.Over()
	close(admitted)
	err = <-published
	if errors.Is(err, bus.ErrQueueFull) {
		// By others that wait for admission, perhaps: that is no reason to refuse one that
		// was admitted.
		err = errChooseAgain
	}
	return refused, err
}

// publishAhead publishes an attempt, and takes it back if its request isn't admitted in time.
// Unless publishing fails, it returns once one or the other has happened.
func (r *Reply) publishAhead(choice presence.Choice, ends uint64, outlook *quota.Outlook, admitted <-chan struct{}) error {
	if err := r.publish(choice, ends, outlook); err != nil {
		return err
	}
	timer := time.NewTimer(r.d.holdFor)
	defer timer.Stop()
	select {
	case <-admitted:
	case <-timer.C:
		if a := r.cur; r.takeBack(a) {
			r.remove(a)
			return errChooseAgain
		}
	}
	return nil
}

// takeBack retires an attempt, unless its request has been admitted meanwhile.
func (r *Reply) takeBack(a *attempt) bool {
	r.mu.Lock()
	held := a.held
	if held {
		// No frame of it counts from here on.
		r.cur = nil
	}
	r.mu.Unlock()
	if held {
		r.retire(a)
	}
	return held
}

// hold keeps in mind that the claim of a run waits for its answer, and which of its frames
// the answer has to ask for once more: a run may tell of a failure before it is granted.
func (a *attempt) hold(inbox string, f *schemas.Frame) {
	if inbox != "" {
		a.waiting = inbox
	}
	a.ahead = max(a.ahead, f.Seq)
	a.loading = f.Loading
}

// letGo lets the request run, now that it is admitted. It returns the answer to a claim that
// waits for it, and where to: nowhere if none does. r.mu is held.
func (r *Reply) letGo(now time.Time) (inbox string, v schemas.Verdict) {
	r.bill.let = true
	a := r.cur
	if a == nil || !a.held {
		return "", v
	}
	a.held, v.Seq = false, a.ahead
	switch {
	case a.run == "":
	case r.ended:
		v.Reason = schemas.ReasonCancelled
	default:
		r.grant(a, now)
		v.Go, v.Next, v.Limit, v.More = true, a.next, r.bill.limit, r.bill.more
	}
	return a.waiting, v
}

// grant grants the claim of an attempt. r.mu is held.
func (r *Reply) grant(a *attempt, now time.Time) {
	a.claimed, r.heard, r.timing.Claimed = now, now, now
	a.series.Dequeued(r.ctx, now.Sub(a.published))
}
