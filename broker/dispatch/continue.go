package dispatch

import (
	"strconv"
	"time"

	"github.com/ownllm/ownllm/schemas"
)

// errCutShort is what a client gets when the agent went away after a part of the reply, and
// nobody can go on.
func errCutShort() *schemas.Error {
	return schemas.Errorf(schemas.CodeAgentOffline,
		"The GPU machine that was answering went away in the middle of the reply. What you have is incomplete; send the request again.")
}

// failover starts another attempt in place of the one whose agent is gone or has failed:
// from the start if nothing of the reply has been delivered yet, else from where it broke
// off. If nobody can, the reply ends with an error.
func (r *Reply) failover() {
	r.mu.Lock()
	a, stray := r.cur, r.stray
	r.mu.Unlock()
	// What was delivered is known for good only once no frame is taken any more.
	delivered, ended := r.retire(a)
	r.remove(a)
	claimed := !r.Timing().Claimed.IsZero()
	if ended { // just now
		return
	}
	r.mu.Lock()
	failure := r.failure
	r.failure = nil
	whole := delivered && r.movable() && r.said.ended
	can := (!delivered || r.movable()) && !(r.req.Once && claimed && failure == nil)
	switch {
	case whole:
		r.complete()
	case can && delivered:
		r.from = &schemas.Continuation{Text: string(r.said.text), Tokens: r.tokens, PromptTokens: r.promptTokens()}
	}
	r.mu.Unlock()
	switch {
	case whole:
		r.signal()
		return
	case !can:
		r.end(orCutShort(failure))
		return
	}
	r.d.metrics.Failover(r.ctx)
	var err error
	if stray {
		r.d.log.WarnContext(r.ctx, "job went astray, request is queued again", "request", r.req.ID, "agent", a.agent)
	} else {
		r.d.log.InfoContext(r.ctx, "agent went away, request goes to another", "request", r.req.ID, "agent", a.agent)
		if failure != nil {
			r.failed = with(r.failed, a.agent)
		}
		err = r.attempt(with(r.failed, a.agent))
	}
	if stray || err != nil && failure == nil {
		// The agent may be back already, as a new run.
		err = r.attempt(r.failed)
	}
	switch e := schemas.AsError(err); {
	case err == nil:
	case failure != nil:
		r.end(orCutShort(failure))
	case delivered && e.Code != schemas.CodeInternalError:
		r.end(errCutShort())
	default:
		r.end(e)
	}
}

// orCutShort is the failure of an attempt as the client gets it in the middle of a reply: a
// complaint about the request, which is as it was, would make no sense there.
func orCutShort(failure *schemas.Error) *schemas.Error {
	if failure != nil && (failure.Code == schemas.CodeBackendError || failure.Code == schemas.CodeAgentOffline) {
		return failure
	}
	return errCutShort()
}

// movable reports whether what was delivered of the reply can be gone on with. r.mu is held.
func (r *Reply) movable() bool { return r.req.Stream && r.req.Continuable && !r.said.more }

// moves reports whether the error that a worker sent is one after which another agent may
// do better: the worker is being stopped; its backend broke off a reply that can be
// continued; or it couldn't continue one. r.mu is held.
func (r *Reply) moves(e *schemas.Error) bool {
	switch {
	case r.delivered && !r.movable():
		return false
	case e.Code == schemas.CodeAgentOffline, r.from != nil:
		return true
	}
	return r.delivered && e.Code == schemas.CodeBackendError
}

// promptTokens is the size of the prompt, 0 if nobody has told. r.mu is held.
func (r *Reply) promptTokens() int {
	if r.bill.prompt != nil {
		return int(*r.bill.prompt)
	}
	return r.usage.PromptTokens
}

// complete ends a reply whose agent went away after it had said all of it. The usage is
// what is charged. r.mu is held.
func (r *Reply) complete() {
	prompt := r.promptTokens()
	if prompt == 0 {
		prompt = int(r.req.Prompt)
	}
	r.usage = schemas.Usage{PromptTokens: prompt, CompletionTokens: r.tokens}
	if r.req.IncludeUsage {
		b := append([]byte(`{"id":`), schemas.AppendString(nil, r.req.ID.CompletionID())...)
		b = strconv.AppendInt(append(b, `,"object":"chat.completion.chunk","created":`...), r.req.Received.Unix(), 10)
		b = schemas.AppendString(append(b, `,"model":`...), r.req.Model)
		b = strconv.AppendInt(append(b, `,"choices":[],"usage":{"prompt_tokens":`...), int64(prompt), 10)
		b = strconv.AppendInt(append(b, `,"completion_tokens":`...), int64(r.tokens), 10)
		b = strconv.AppendInt(append(b, `,"total_tokens":`...), int64(prompt+r.tokens), 10)
		r.unread.add(append(b, "}}\n"...))
	}
	r.ended, r.done, r.timing.Ended = true, true, time.Now()
}

// inline reports whether the body travels in the job of the next attempt, beside the text
// that it continues, which JSON may make six times as long.
func (r *Reply) inline() bool {
	size := len(r.req.Body)
	if r.from != nil {
		size += 6 * len(r.from.Text)
	}
	return size <= schemas.MaxInlineBody
}
