package dispatch

import (
	"context"
	"sync"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/quota"
	"github.com/ownllm/ownllm/schemas"
)

// What a request holds in the books, and what it is charged in the end.
//
// A reservation is made once the agent is chosen and before the job is run, so nothing
// is delivered that isn't paid for; see ahead.go for jobs that are published before. Billed is
// what was taken in: the tokens of the frames that passed Reply.take. The last frame of a
// worker is answered only once the books have its settlement; if this process dies before
// that, the worker reports what it counted, and if the worker dies first, this process
// settles what it took in.

const (
	// topUpWait is how long a reply that needs more tokens waits for money that others
	// hold.
	topUpWait = 5 * time.Second
	// topUpRetry is the pause after a failed try to reach the books.
	topUpRetry = 250 * time.Millisecond
	// noteWait bounds how long a failover waits for the books to take note.
	noteWait = time.Second
	// noteAfter is how long a reply has to be under way until the books are told how long
	// its prompt is. What a short one holds too much comes back with its settlement.
	noteAfter = 100 * time.Millisecond
)

// bill is the state of a Reply's reservation.
type bill struct {
	// Written once, under Reply.mu, and before Start returns; see Reply.foreseen.
	grant    quota.Grant
	admitted bool
	agent    schemas.AgentID // whom the books know; belongs to the reader once it is admitted

	// changes ends what is still being asked of the books when the request ends.
	changes context.Context //nolint:containedctx // see Reply.ctx
	stop    context.CancelFunc
	work    sync.WaitGroup

	settled chan struct{} // closed once the books have the settlement

	// Guarded by Reply.mu.
	let      bool  // the request may run
	begun    bool  // the job was published
	settling bool  // nothing more is asked of the books
	limit    int64 // the most tokens that the reply may have; 0: it needs no bound
	more     bool  // more can be had
	topping  bool  // more is being asked for
	away     bool  // the books can't be reached for it
	prompt   *int64
	noted    bool // the books know it, or are being told
	// unheard is where the worker waits for the word that its last frame has been taken.
	unheard string
}

// assign sees to it that the books know which agent gets the job: the first time by
// admitting the request. The error is a *schemas.Error, or that of the context.
func (r *Reply) assign(agent schemas.AgentID) error {
	b := &r.bill
	if !b.admitted {
		return r.admit(agent, nil) // nothing of it waits yet
	}
	if b.agent == agent {
		return nil
	}
	ctx, cancel := context.WithTimeout(b.changes, noteWait)
	defer cancel()
	limit, err := r.d.gate.Claimed(ctx, &b.grant, agent, nil)
	switch {
	case quota.IsEnded(err):
		return quota.ErrEnded
	case err != nil:
		// Should this process die, too, before the books are back, the worker's count
		// isn't believed, and only the prompt is charged.
		r.d.log.WarnContext(r.ctx, "books don't know the agent of a failover", "request", r.req.ID, "agent", agent, "error", err)
		return nil
	}
	b.agent = agent
	r.mu.Lock()
	r.limited(limit)
	r.mu.Unlock()
	return nil
}

// admit asks the books to let the request in. See quota.Gate.AdmitForeseen.
func (r *Reply) admit(agent schemas.AgentID, foreseen func(quota.Grant)) error {
	b, d := &r.bill, r.d
	asked := time.Now()
	ask := quota.Ask{
		Request: r.req.ID, Tenant: r.req.Tenant, Key: r.req.Key, Model: r.req.Model,
		Prompt: r.req.Prompt, Limit: r.req.Limit, Agent: agent, Timeout: d.cfg.Total - time.Since(r.req.Received),
	}
	if !r.req.Stream {
		ask.Most = r.req.Most // see short
	}
	grant, err := d.gate.AdmitForeseen(r.ctx, ask, foreseen)
	d.metrics.Admitted(r.ctx, time.Since(asked))
	if err != nil {
		r.mu.Lock()
		b.grant.Rate = grant.Rate
		r.mu.Unlock()
		return err
	}
	r.admitted(agent, grant)
	limit := grant.Limit
	if r.short(&grant) {
		// The gate didn't know that it takes money, or others hold what is wanted.
		ctx, cancel := context.WithTimeout(b.changes, topUpWait)
		defer cancel()
		if limit, err = d.gate.Extend(ctx, &b.grant, limit, r.req.Most); err != nil {
			return err
		}
	}
	r.let(limit)
	return nil
}

// foreseen takes in a grant that the books have decided on and not written yet, so that the agent can
// begin meanwhile. Nothing of the reply gets to anybody before Start has returned, and that
// waits for the books. If nothing comes of the grant after all, Start fails and the attempt
// is taken back; the settlement is then of a request that the books don't have.
func (r *Reply) foreseen(agent schemas.AgentID, grant quota.Grant) {
	if !r.short(&grant) && r.admitted(agent, grant) {
		r.let(grant.Limit)
	}
}

// short reports whether the reply needs more than was granted before it can begin: what comes
// in one piece can't be given more on the way.
func (r *Reply) short(grant *quota.Grant) bool {
	return grant.Open && !grant.Grown && !r.req.Stream && grant.Price > 0 && grant.Limit < r.req.Most
}

// admitted takes in what the request holds, unless it has been before, or the reply was closed.
func (r *Reply) admitted(agent schemas.AgentID, grant quota.Grant) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	b := &r.bill
	if b.admitted || r.closed {
		return false
	}
	b.grant, b.admitted, b.agent = grant, true, agent
	b.changes, b.stop = context.WithCancel(context.WithoutCancel(r.ctx))
	b.more = grant.Open && r.req.Stream && grant.Price > 0
	return true
}

// let lets the request run, with so many tokens.
func (r *Reply) let(limit int64) {
	r.mu.Lock()
	r.limited(limit)
	inbox, v := r.letGo(time.Now())
	r.mu.Unlock()
	r.d.answer(inbox, v)
}

// limited notes how many tokens the reply may have. r.mu is held. A model that is free
// needs no bound but the client's own, which its backend keeps.
func (r *Reply) limited(limit int64) {
	if r.bill.grant.Price > 0 {
		r.bill.limit = max(limit, 1) // 0 would be none
	}
}

// count heeds what a frame says of tokens: when half of what may be had is used up, more
// is asked for. r.mu is held.
func (r *Reply) count(f *schemas.Frame) {
	b := &r.bill
	if b.settling {
		return
	}
	if f.PromptTokens > 0 && b.prompt == nil {
		b.prompt = new(int64(f.PromptTokens))
	}
	if b.more && !b.topping && int64(f.Tokens)*2 >= b.limit {
		b.topping = true
		b.work.Go(r.topUp)
	}
}

// noteDue has the books told how long the prompt is, once it is due. r.mu is held.
func (r *Reply) noteDue(a *attempt, now time.Time) {
	b := &r.bill
	if b.noted || b.settling || b.prompt == nil || b.grant.Price == 0 || now.Sub(a.claimed) < noteAfter {
		return
	}
	b.noted = true
	n := *b.prompt
	b.work.Go(func() { r.notePrompt(a, n) })
}

// notePrompt tells the books how long the prompt is.
func (r *Reply) notePrompt(a *attempt, n int64) {
	b := &r.bill
	limit, err := r.d.gate.Claimed(b.changes, &b.grant, a.agent, &n)
	switch {
	case quota.IsEnded(err):
		r.end(quota.ErrEnded)
	case err == nil:
		r.mu.Lock()
		lowered := !b.topping && limit < b.limit
		if lowered {
			r.limited(limit)
		}
		r.mu.Unlock()
		if lowered {
			r.tellLimit()
		}
	}
}

// topUp asks for more tokens, until there are enough for a while or no more can be had.
func (r *Reply) topUp() {
	b := &r.bill
	for {
		r.mu.Lock()
		have := b.limit
		want := 2 * have
		if most := r.req.Most; most > 0 {
			want = max(min(want, most), have)
		}
		r.mu.Unlock()
		limit, err := have, error(nil)
		if want > have { // else the context window is the bound
			ctx, cancel := context.WithTimeout(b.changes, topUpWait)
			limit, err = r.d.gate.Extend(ctx, &b.grant, have, want)
			cancel()
		}
		switch {
		case b.changes.Err() != nil:
			return
		case quota.IsEnded(err):
			r.end(quota.ErrEnded)
			return
		case err != nil:
			r.mu.Lock()
			b.away = true
			r.mu.Unlock()
			select {
			case <-time.After(topUpRetry):
				continue
			case <-b.changes.Done():
				return
			}
		}
		r.mu.Lock()
		b.away = false
		b.more = limit > have
		r.limited(limit)
		enough := !b.more || int64(r.tokens)*2 < b.limit
		b.topping = !enough
		r.mu.Unlock()
		r.d.metrics.ToppedUp(r.ctx, limit > have)
		r.tellLimit()
		if enough {
			return
		}
	}
}

// tellLimit tells the worker how many tokens the reply may have now. If the word gets
// lost, the next verdict says the same.
func (r *Reply) tellLimit() {
	r.mu.Lock()
	a, limit, more := r.cur, r.bill.limit, r.bill.more
	r.mu.Unlock()
	if a == nil {
		return
	}
	r.d.control(a.agent, schemas.Control{Operation: schemas.ControlLimit, Nonce: a.nonce, Limit: limit, More: more})
}

// Scarce reports whether the next request of the key may have to wait until this one is
// settled.
func (r *Reply) Scarce() bool { return r.bill.grant.Scarce }

// Settled is closed once the books have what the request is charged, after Close.
func (r *Reply) Settled() <-chan struct{} { return r.bill.settled }

// settle ends the reservation; then is called once the books have it. The first call
// counts. r.mu is held.
func (r *Reply) settle(then func()) {
	b := &r.bill
	if b.settling {
		return
	}
	b.settling = true
	if !b.admitted {
		close(b.settled)
		return
	}
	prompt, completion, outcome := r.charge()
	r.d.gate.Settle(&b.grant, prompt, completion, outcome, func() {
		close(b.settled)
		if then != nil {
			then()
		}
	})
}

// heed tells the worker that its last frame was taken, now that it is in the books.
func (r *Reply) heed(a *attempt) {
	r.d.forget(a.nonce)
	r.mu.Lock()
	inbox, v := r.bill.unheard, schemas.Verdict{Go: true, Seq: a.next - 1, Next: a.next}
	r.mu.Unlock()
	r.d.answer(inbox, v)
}

// end breaks off what is still being asked of the books, and waits for that. The
// request is being settled by then.
func (b *bill) end() {
	if b.admitted {
		b.stop()
		b.work.Wait()
	}
}

// charge says what a request that has ended is charged: what of its reply was taken in,
// and the prompt along with it. A client that goes away before the first token pays for
// the prompt if an agent was at it; an error before the first token costs nothing. r.mu
// is held.
func (r *Reply) charge() (prompt *int64, completion int64, outcome books.Outcome) {
	b := &r.bill
	prompt = b.prompt // nil stands for what was reserved
	if n := int64(r.usage.PromptTokens); n > 0 {
		prompt = &n
	}
	completion = int64(max(r.usage.CompletionTokens, r.tokens))
	switch {
	case !b.let, !b.begun && r.timing.Claimed.IsZero():
		outcome = books.OutcomeVoid
	case r.err == nil && r.done:
		outcome = books.OutcomeDone
	case r.err == nil || r.err == ErrClientGone:
		outcome = books.OutcomeCancelled
	default:
		outcome = books.OutcomeError
	}
	began := r.delivered || outcome == books.OutcomeDone || outcome == books.OutcomeCancelled && !r.timing.Claimed.IsZero()
	if !began {
		prompt, completion = new(int64), 0
	}
	return prompt, completion, outcome
}
