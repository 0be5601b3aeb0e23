package dispatch

import (
	"context"
	"strings"
	"sync"
	"time"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/metric"
	"github.com/ownllm/ownllm/broker/presence"
	"github.com/ownllm/ownllm/broker/quota"
	"github.com/ownllm/ownllm/schemas"
)

// EventKind says what an Event carries.
type EventKind int

const (
	// EventChunk carries lines of a stream, or a piece of the body of a reply that
	// isn't streamed.
	EventChunk EventKind = iota
	// EventDone ends the reply; Payload is what was left of it.
	EventDone
	// EventError ends the reply with an error.
	EventError
	// EventTick says that nothing has come for a while.
	EventTick
)

// Event is what Next returns.
type Event struct {
	Kind EventKind
	// Payload holds lines, each one an OpenAI chunk followed by a newline, which are good
	// until the next call of Next; of a reply that isn't streamed, pieces of its body, which
	// stay good.
	Payload [][]byte
	// Err is set on an EventError.
	Err *schemas.Error
}

// Timing is when the stages of a request were reached; the zero time stands for
// never.
type Timing struct {
	Received, Claimed, FirstChunk, Ended time.Time
}

// attempt is one try of a request on one agent.
type attempt struct {
	agent       schemas.AgentID
	incarnation schemas.Incarnation
	nonce       schemas.Nonce
	subject     string // of its frames
	body        string // the subject on which its body is asked for; empty if the job holds it
	seq         uint64 // in the stream; 0 until JetStream has answered
	published   time.Time
	series      *metric.Series

	// Guarded by Reply.mu.
	queued  time.Time // when JetStream had it; zero until it has answered
	held    bool      // its claim isn't answered before the request is admitted
	waiting string    // where the answer to a claim that is held goes; empty: there is none
	ahead   uint64    // the highest number of the frames of a run that is held
	run     string    // the run whose claim was granted or is held, or empty
	claimed time.Time // when it was granted
	loading bool
	over    bool // the last frame was taken; the worker acknowledges the job
	began   bool // something of the reply has come
	next    uint64
}

// Reply is the reply to one request as it comes in. Next and Close belong to one
// goroutine, the reader; Interrupt may be called from any.
type Reply struct {
	d        *Dispatcher
	ctx      context.Context //nolint:containedctx // a Reply lives exactly as long as its request
	req      Request
	attempts int // belongs to the reader
	bill     bill
	// failed are the agents that couldn't go on with the reply; belongs to the reader.
	failed map[schemas.AgentID]bool

	wake chan struct{} // holds one token; given whenever something below changes

	mu        sync.Mutex
	cur       *attempt // nil between attempts and after the end
	unread    unread
	delivered bool                  // a payload was handed to the reader or waits for it
	lost      bool                  // the agent of cur is gone, or has failed
	stray     bool                  // cur is lost on its way to an agent that is there
	strays    int                   // how often that was so
	failure   *schemas.Error        // how it failed
	said      said                  // of a reply that can be continued
	from      *schemas.Continuation // what the attempts continue; nil: nothing
	ended     bool                  // nothing more is taken
	closed    bool
	done      bool // the reply came whole
	tick      bool // a Tick is due
	err       *schemas.Error
	usage     schemas.Usage
	tokens    int
	heard     time.Time // when the last frame was taken in
	ticked    time.Time // when the last Tick was given
	timing    Timing
	onStall   func() // called when the reader is too slow
}

// OnStall registers a function that is called, from another goroutine, when the
// reply is ended because its reader is too slow: the reader may be stuck in a write
// that has to be broken off.
func (r *Reply) OnStall(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.onStall = f
}

// Next waits for the next event. After EventDone or EventError there is none.
func (r *Reply) Next() Event {
	for {
		r.mu.Lock()
		r.unread.back()
		if r.bill.grant.Expired() {
			// Others may have settled it: nothing more may be delivered.
			r.fail(quota.ErrEnded)
			r.unread.drop()
		}
		switch {
		case len(r.unread.lines) > 0 && !r.ended:
			e := Event{Kind: EventChunk, Payload: r.unread.hand()}
			r.mu.Unlock()
			return e
		case r.ended && r.err != nil:
			// What came before the error is still the client's.
			e := Event{Kind: EventError, Payload: r.unread.hand(), Err: r.err}
			r.mu.Unlock()
			return e
		case r.ended:
			e := Event{Kind: EventDone, Payload: r.unread.hand()}
			r.mu.Unlock()
			return e
		case r.lost:
			r.mu.Unlock()
			r.failover()
			continue
		case r.tick:
			r.tick = false
			r.mu.Unlock()
			return Event{Kind: EventTick}
		}
		r.mu.Unlock()
		<-r.wake
	}
}

// ErrClientGone is for Interrupt when nobody reads the reply any more.
var ErrClientGone = schemas.Errorf(schemas.CodeInternalError, "the client went away")

// Interrupt ends the reply with an error, unless it has ended already.
func (r *Reply) Interrupt(err *schemas.Error) { r.end(err) }

func (r *Reply) end(err *schemas.Error) {
	r.mu.Lock()
	if !r.ended {
		r.fail(err)
	}
	r.mu.Unlock()
	r.signal()
}

// fail ends the reply with an error, unless there is one already. r.mu is held.
func (r *Reply) fail(err *schemas.Error) {
	if r.err == nil {
		r.err = err
	}
	if !r.ended {
		r.ended, r.timing.Ended = true, time.Now()
	}
}

func (r *Reply) signal() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// Close ends the request, whatever its state: a job that still waits is removed, one
// that runs is cancelled, and the request is settled. It doesn't wait for the books; see
// Settled. Again, it does nothing.
func (r *Reply) Close() {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return
	}
	r.closed = true
	a := r.cur
	over := a != nil && a.over
	if !r.ended {
		r.ended, r.timing.Ended = true, time.Now()
	}
	r.settle(nil)
	r.mu.Unlock()
	r.bill.end()
	switch {
	case a == nil:
	case over:
		r.d.agents.Release(r.req.Tenant, a.agent, r.req.Model)
	default:
		r.retire(a)
		r.remove(a)
	}
}

// retire forgets the current attempt: frames of it fail from now on. It reports whether
// anything of the reply was delivered before, and whether it has ended.
func (r *Reply) retire(a *attempt) (delivered, ended bool) {
	r.d.forget(a.nonce)
	r.mu.Lock()
	r.cur, r.lost, r.stray = nil, false, false
	delivered, ended = r.delivered, r.ended
	claimed := !a.claimed.IsZero()
	r.mu.Unlock()
	r.d.agents.Release(r.req.Tenant, a.agent, r.req.Model)
	if !claimed {
		a.series.Unqueued(r.ctx)
	}
	return delivered, ended
}

// removeWait bounds the removal of a job from the queue.
const removeWait = 2 * time.Second

// remove makes sure that nobody runs an attempt that was retired: its worker is told,
// and the job is taken out of the queue, since the worker may be gone. A claim that
// comes all the same is refused, so a failure here costs a delivery, and nothing else.
func (r *Reply) remove(a *attempt) {
	r.d.cancel(a.agent, a.nonce)
	if a.seq == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.ctx), removeWait)
	defer cancel()
	if err := r.d.queue.Delete(ctx, a.agent, a.seq); err != nil && !bus.Down(err) {
		r.d.log.WarnContext(ctx, "job not removed", "request", r.req.ID, "error", err)
	}
}

// has reports whether frames of the nonce that come on the line, which is all of a subject but
// its last token, are of the attempt.
func (a *attempt) has(line string, nonce schemas.Nonce) bool {
	return a.nonce == nonce && len(a.subject) == len(line)+len(nonce) && strings.HasPrefix(a.subject, line)
}

// take checks a frame against the current attempt and takes it in. It returns the
// verdict, or false for a frame that isn't answered: one that came before its claim,
// which got lost and will be sent again, one that comes before the request is admitted, or
// one that comes after the last one, which is answered when the books have it. line is the
// subject that it came on, without the nonce, and inbox where an answer goes.
func (r *Reply) take(line string, nonce schemas.Nonce, inbox string, f *schemas.Frame, now time.Time) (schemas.Verdict, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	a := r.cur
	v := schemas.Verdict{Seq: f.Seq}
	switch {
	case a == nil || !a.has(line, nonce):
		v.Reason = schemas.ReasonSuperseded
		return v, true
	case a.over && f.Run == a.run:
		r.bill.unheard = inbox
		return v, false
	case r.ended:
		v.Reason = schemas.ReasonCancelled
		return v, true
	case a.run == "" && f.Kind == schemas.FrameClaim:
		a.run, a.loading = f.Run, f.Loading
		if a.held {
			a.hold(inbox, f)
			return v, false
		}
		r.grant(a, now)
	case a.run == "":
		return v, false
	case f.Run != a.run:
		v.Reason = schemas.ReasonSuperseded
		return v, true
	case a.held:
		a.hold(inbox, f)
		return v, false
	case f.Kind == schemas.FrameClaim || f.Kind == schemas.FrameProgress:
		if a.loading && !f.Loading {
			a.claimed = now // the first token is waited for from here
		}
		a.loading = f.Loading
	case f.Seq == a.next:
		r.accept(a, f, now)
	}
	if a.over {
		r.bill.unheard = inbox
		r.settle(func() { r.heed(a) })
		return v, false
	}
	r.count(f)
	// A frame that was seen is answered like one that is taken; a gap shows in Next.
	v.Go, v.Next, v.Limit, v.More = true, a.next, r.bill.limit, r.bill.more
	return v, true
}

// lends reports whether the body of the current attempt is asked for on the subject.
func (r *Reply) lends(subject string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.cur != nil && r.cur.body == subject
}

// accept takes in the frame whose turn it is. r.mu is held.
func (r *Reply) accept(a *attempt, f *schemas.Frame, now time.Time) {
	a.next++
	a.loading = false
	r.heard, r.tokens = now, f.Tokens
	if r.from != nil {
		r.tokens = max(r.tokens, r.from.Tokens)
	}
	if len(f.Payload) > 0 {
		a.began = true
		if r.movable() {
			r.said.take(f.Payload)
		}
		if !r.delivered {
			r.delivered = true
			r.timing.FirstChunk = now
		}
		if r.req.Stream {
			r.unread.copy(f.Payload)
		} else {
			r.unread.add(f.Payload)
		}
	}
	switch {
	case f.Kind == schemas.FrameError && r.moves(f.Error):
		r.lost, r.failure = true, f.Error
	case f.Kind == schemas.FrameError:
		r.ended, a.over, r.err = true, true, f.Error
	case f.Kind == schemas.FrameDone:
		r.ended, a.over, r.done = true, true, true
	case r.req.Stream && r.unread.size > r.d.cfg.MaxUnread:
		r.ended = true
		r.err = schemas.Errorf(schemas.CodeAgentTimeout,
			"The reply was ended because you read it too slowly: more than %d bytes of it were waiting.", r.d.cfg.MaxUnread)
		r.d.cancel(a.agent, a.nonce)
		if r.onStall != nil {
			go r.onStall()
		}
	}
	if f.Usage != nil {
		r.usage = *f.Usage
	}
	if r.ended {
		r.timing.Ended = now
	}
	r.signal()
}

// agentGone notes that the agent of the current attempt can't finish it.
func (r *Reply) agentGone(g presence.Gone) {
	r.mu.Lock()
	defer r.mu.Unlock()
	a := r.cur
	if a == nil || r.ended || a.agent != g.Agent || a.incarnation != g.Incarnation {
		return
	}
	// An agent that drains finishes what it has begun.
	if g.Draining && a.run != "" {
		return
	}
	r.lost = true
	r.signal()
}

// sweep checks the deadlines of the reply.
func (r *Reply) sweep(now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	a := r.cur
	if a == nil || r.ended || a.held {
		return
	}
	r.noteDue(a, now)
	cfg := &r.d.cfg
	switch {
	case r.bill.grant.Expired():
		r.fail(quota.ErrEnded)
		r.signal()
	case now.Sub(r.req.Received) > cfg.Total:
		r.expire("it took longer than %s in all", cfg.Total)
	case r.req.Stream && a.began && now.Sub(r.heard) > cfg.Idle && r.bill.away:
		r.fail(schemas.Errorf(schemas.CodeInternalError,
			"The reply was cut short: the server can't reach its database, and without it can't pay for more tokens."))
		r.signal()
	case r.req.Stream && a.began && now.Sub(r.heard) > cfg.Idle:
		r.expire("nothing came from the backend for %s", cfg.Idle)
	case r.req.Stream && !a.began && a.run != "" && !a.loading && now.Sub(a.claimed) > cfg.FirstToken:
		r.expire("the first token didn't come within %s", cfg.FirstToken)
	case r.astray(a, now):
		r.strays++
		r.lost, r.stray = true, true
		r.signal()
	case r.tickDue(now):
		r.tick, r.ticked = true, now
		r.signal()
	}
}

// tickDue reports whether the reader is to be told that nothing comes: for the first
// time when the request as a whole is FirstTick old, later after KeepAlive of silence.
func (r *Reply) tickDue(now time.Time) bool {
	if r.ticked.IsZero() && !r.delivered {
		return now.Sub(r.req.Received) > r.d.cfg.FirstTick
	}
	return now.Sub(r.heard) > r.d.cfg.KeepAlive && now.Sub(r.ticked) > r.d.cfg.KeepAlive
}

func (r *Reply) expire(format string, d time.Duration) {
	r.ended = true
	r.err = schemas.Errorf(schemas.CodeAgentTimeout, "The request was ended: "+format+".", d)
	r.timing.Ended = time.Now()
	r.signal()
}

// Usage is what the reply burnt, once it has ended.
func (r *Reply) Usage() schemas.Usage {
	r.mu.Lock()
	defer r.mu.Unlock()
	u := r.usage
	u.CompletionTokens = max(u.CompletionTokens, r.tokens)
	return u
}

// Timing tells when the stages of the request were reached.
func (r *Reply) Timing() Timing {
	r.mu.Lock()
	defer r.mu.Unlock()
	t := r.timing
	t.Received = r.req.Received
	return t
}
