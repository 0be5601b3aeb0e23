package worker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/metric"
	"github.com/ownllm/ownllm/broker/trace"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/backend"
)

// run is one delivery of a job to this worker, from its claim to its last frame.
type run struct {
	*sender
	w      *Worker
	job    *schemas.Job
	body   []byte
	ctx    context.Context //nolint:containedctx // a run lives exactly as long as its job
	cancel context.CancelCauseFunc
	life   context.Context //nolint:containedctx // of the worker, for what outlives the job
	// started is closed once the run has its slot, or needs none.
	started chan struct{}
	working atomic.Bool  // has a slot
	prompt  atomic.Int64 // its exact size in tokens, 0 if it wasn't counted
	told    atomic.Int64 // what the backend says of it in its reply, 0 until it does
	// allowance is how many tokens the reply may have.
	allowance *allowance
	// count is the late count of the prompt, silence the look for a model that has left memory.
	count, silence late
}

func newRun(life context.Context, w *Worker, m *nats.Msg) (*run, error) {
	job, body, err := schemas.DecodeJob(m.Data)
	if err != nil {
		return nil, err
	}
	if job.Tenant != w.cfg.Tenant {
		return nil, fmt.Errorf("job %s is of tenant %s", job.Request, job.Tenant)
	}
	r := &run{w: w, job: job, body: body, life: life, started: make(chan struct{}), allowance: newAllowance(job)}
	r.ctx, r.cancel = context.WithCancelCause(life)
	r.sender = newSender(w, job, m.Reply, r.cancel)
	return r, nil
}

// do runs the job. Whatever happens, the owner hears of it, and the job is
// acknowledged exactly once: a job that must not be run (any more) by anybody is
// taken out of the queue, since only its owner may start another attempt.
func (r *run) do(header nats.Header) {
	defer r.discard()
	defer r.w.forget(r)
	defer r.cancel(nil)
	ctx, span := r.w.cfg.Tracer.Process(r.ctx, header, r.job, false)
	deadline := time.UnixMilli(r.job.Deadline)
	ctx, cancel := context.WithDeadlineCause(ctx, deadline, errLate)
	defer cancel()
	err := r.serve(ctx)
	r.finish(ctx, err)
	trace.End(span, err)
}

// serve runs the job and returns nil if it was done. Any other error is told to the
// owner, unless it was the owner who ended the run.
func (r *run) serve(ctx context.Context) error {
	leave := onceClose(r.started)
	defer leave()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	p, ok := r.w.stock.find(r.job.Model)
	if !ok {
		return schemas.Errorf(schemas.CodeModelNotFound, "The GPU machine doesn't have the model %q any more.", r.job.ReplyModel)
	}
	if p.cold() {
		leave() // a load takes no slot
		r.claim(true)
		if err := r.awaitGo(ctx); err != nil {
			return err
		}
		if err := r.warm(ctx, p, r.coldWait()); err != nil {
			return err
		}
	}
	if err := p.slots.acquire(ctx); err != nil {
		return err
	}
	defer p.slots.release()
	r.working.Store(true)
	defer r.working.Store(false)
	leave()
	r.claim(false)
	if err := r.awaitGo(ctx); err != nil {
		return err
	}
	body, err := r.fetchBody(ctx)
	if err != nil {
		return err
	}
	from := r.job.Continue
	// What a backend says of a prompt counts the text that it goes on from, too.
	prompt, err := p.backend.CheckContext(ctx, r.job.Model, body, r.job.Count || from != nil && from.PromptTokens == 0)
	if err != nil {
		return err
	}
	if prompt > 0 && (r.job.Count || from != nil) {
		r.counted(prompt)
	}
	r.prompt.Store(int64(prompt))
	if r.job.CountLate && prompt == 0 {
		r.countLate(ctx, p.backend, body)
		defer r.count.stop()
	}
	return r.chat(ctx, p.backend, body)
}

// countAfter is how long a run has to last for its prompt to be counted late: a count is
// a request of its own, and a short reply soon tells by itself.
const countAfter = 100 * time.Millisecond

// countLate tells the owner how many tokens the prompt has while the run is under way, until
// r.count is stopped. It is counted unless the reply has told by then.
func (r *run) countLate(ctx context.Context, b *backend.Backend, body []byte) {
	r.count.after(ctx, countAfter, func(ctx context.Context) {
		if n := int(r.told.Load()); n > 0 {
			r.counted(n)
			return
		}
		// A count that fails is no error: the reply may tell.
		if n, err := b.CountPrompt(ctx, r.job.Model, body); err == nil && n > 0 {
			r.prompt.Store(int64(n))
			r.counted(n)
		}
	})
}

// coldWait is how long the request may wait for its model to be loaded.
func (r *run) coldWait() time.Duration { return time.Duration(r.job.ColdWait) * time.Millisecond }

// warm waits for the model to be loaded, for the given time at the most.
func (r *run) warm(ctx context.Context, p *place, wait time.Duration) error {
	l := r.w.stock.warm(r.life, p, r.job.Model)
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-l.done:
		if l.err != nil {
			return schemas.Errorf(schemas.CodeBackendError, "The model %q couldn't be loaded by its %s server.", r.job.ReplyModel, p.backend.Kind().Label())
		}
		return nil
	case <-timer.C:
		return p.loading(r.job.Model, r.job.ReplyModel)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

const (
	// lookAfter is how long a backend may be silent before it is looked whether the model is
	// in memory, and lookEvery how often from then on. A model counts as out of memory once
	// two looks have said so: one may have come as it was unloaded right behind the reply.
	lookAfter = time.Second
	lookEvery = 250 * time.Millisecond
)

// lookOut looks, until r.silence is stopped, whether the model has left memory without the
// worker's knowing, so that the backend loads it before it answers. Then the request waits
// for that load as it would have from the start, and is given up, by end, once it has waited
// for long enough. The worker asks for the load, too, so that it doesn't end with the request:
// Ollama breaks a load off whose request is gone, and then begins it once more for the worker's.
// A model that is in memory after all ends no request, since asking for it takes no time.
func (r *run) lookOut(ctx context.Context, end context.CancelCauseFunc) {
	began := time.Now()
	r.silence.after(ctx, lookAfter, func(ctx context.Context) {
		tick := time.NewTicker(lookEvery)
		defer tick.Stop()
		for cold := 0; cold < 2; {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			if p, ok := r.w.stock.find(r.job.Model); !ok || !p.cold() {
				cold = 0
			} else if cold++; cold == 2 {
				r.claim(true)
				if err := r.warm(ctx, p, max(r.coldWait()-time.Since(began), lookEvery)); err != nil && ctx.Err() == nil {
					end(err)
					return
				}
				r.claim(false)
			}
		}
	})
}

// chat calls the backend and sends on what it says.
func (r *run) chat(ctx context.Context, b *backend.Backend, body []byte) error {
	series := r.w.cfg.Metrics.Series(r.job.Operation, string(b.Kind()), r.job.Model)
	callCtx, span := r.w.cfg.Tracer.Call(ctx, r.job.Operation, string(b.Kind()), r.job.Model)
	start := time.Now()
	callCtx, end := context.WithCancelCause(callCtx)
	defer end(nil)
	r.lookOut(callCtx, end)
	defer r.silence.stop()
	err := r.relay(callCtx, b, body, func() error {
		r.silence.stop()
		series.BackendChunk(callCtx, time.Since(start))
		return context.Cause(callCtx)
	})
	trace.End(span, err)
	series.BackendCalled(callCtx, time.Since(start), outcome(err))
	return err
}

// relay sends on what the backend says. It calls first as soon as that is something, and ends
// if that returns an error.
func (r *run) relay(ctx context.Context, b *backend.Backend, body []byte, first func() error) error {
	call := &backend.Call{
		Model: r.job.Model, Body: body, Stream: r.job.Stream, IncludeUsage: r.job.IncludeUsage,
		Completion: r.job.Completion, Created: r.job.Created, ReplyModel: r.job.ReplyModel,
		Prompt: func() int { return int(r.prompt.Load()) }, Continue: r.job.Continue,
	}
	r.allowance.bound(call)
	reply, err := b.Chat(ctx, call)
	if err != nil {
		return err
	}
	defer func() {
		r.spent(reply.Usage().PromptTokens)
		reply.Close()
	}()
	if !r.job.Stream {
		whole, err := reply.Body()
		if err != nil {
			return err
		}
		if err := first(); err != nil {
			return err
		}
		for len(whole) > maxPiece {
			if err := r.chunk(ctx, whole[:maxPiece], reply.Tokens()); err != nil {
				return err
			}
			whole = whole[maxPiece:]
		}
		r.done(whole, reply.Tokens(), reply.Usage())
		return nil
	}
	buffer := lineBuffers.Get().(*[]byte) // holds nothing else
	lines := *buffer
	defer func() {
		if cap(lines) <= maxPooled {
			*buffer = lines
			lineBuffers.Put(buffer)
		}
	}()
	for {
		lines, err = reply.Next(lines[:0])
		if first != nil && (len(lines) > 0 || err != nil) {
			if ended := first(); ended != nil {
				return ended
			}
			first = nil
		}
		switch {
		case errors.Is(err, io.EOF):
			r.done(lines, reply.Tokens(), reply.Usage())
			return nil
		case len(lines) > maxPiece:
			return schemas.Errorf(schemas.CodeBackendError, "The inference backend sent a chunk of %d bytes, more than the %d that can be passed on.", len(lines), maxPiece)
		}
		if len(lines) > 0 {
			// Of a reply that goes on where another broke off, the backend tells the prompt and what was said.
			if r.job.CountLate && r.job.Continue == nil && r.told.Load() == 0 {
				r.told.Store(int64(reply.Usage().PromptTokens))
			}
			if sendErr := r.chunk(ctx, lines, reply.Tokens()); sendErr != nil {
				return sendErr
			}
		}
		if errors.Is(err, backend.ErrHeld) {
			var allowed bool
			if allowed, err = r.awaitMore(ctx, reply.Wanted()); err == nil && !allowed {
				r.done(reply.Cut(lines[:0]), reply.Tokens(), reply.Usage())
				return nil
			}
		}
		if err != nil {
			return err
		}
	}
}

// lineBuffers are what the chunks of streams are gathered in, one for each stream that
// runs. A buffer that has grown beyond maxPooled isn't kept.
var lineBuffers = sync.Pool{New: func() any { return new([]byte) }}

const maxPooled = 256 << 10

// maxPiece bounds the payload of one frame, so that it fits the bus's default limit of
// 1 MiB for a message.
const maxPiece = 768 << 10

// fetchBody returns the client's body, which a large request leaves with its owner.
func (r *run) fetchBody(ctx context.Context) ([]byte, error) {
	if r.job.BodySize == 0 {
		return r.body, nil
	}
	subject := schemas.BodySubject(r.w.cfg.Agent, r.job.Owner, r.job.Nonce)
	body := make([]byte, 0, r.job.BodySize)
	for len(body) < r.job.BodySize {
		m, err := r.w.askBulk(ctx, subject, schemas.BodyRequest{Offset: len(body)}.Encode())
		switch {
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case err != nil && bus.Down(err):
			// The bus or the owner may be back in a moment; if the owner isn't, the claim,
			// which is repeated, ends the run.
			select {
			case <-time.After(fetchRetry):
			case <-ctx.Done():
			}
			continue
		case err != nil:
			return nil, fmt.Errorf("fetch body: %w", err)
		case len(m.Data) == 0 || len(body)+len(m.Data) > r.job.BodySize:
			return nil, errCancelled // the owner has ended the attempt
		}
		body = append(body, m.Data...)
	}
	return body, nil
}

// askBulk asks over the second connection.
func (w *Worker) askBulk(ctx context.Context, subject string, question []byte) (answer *nats.Msg, err error) {
	err = w.bulk.Use(func(nc *nats.Conn) error {
		askCtx, cancel := context.WithTimeout(ctx, fetchWait)
		defer cancel()
		answer, err = nc.RequestWithContext(askCtx, subject, question)
		return err
	})
	return answer, err
}

const (
	// fetchWait bounds the wait for one piece of a body, and fetchRetry is the pause
	// before it is asked for again.
	fetchWait  = 10 * time.Second
	fetchRetry = 100 * time.Millisecond
)

// finish tells the owner how the run ended, and waits until it has heard.
func (r *run) finish(ctx context.Context, err error) {
	cause := context.Cause(r.ctx)
	switch {
	case err == nil:
	case errors.Is(cause, errDraining):
		r.fail(schemas.Errorf(schemas.CodeAgentOffline, "The GPU machine was shut down before the reply was complete. Send the request again."))
	case cause != nil, errors.Is(err, errCancelled), errors.Is(err, errOwnerGone):
		// Nobody waits for this run any more. What the backend complains of is only the
		// echo of its end.
		r.settle(ackTerm)
		if errors.Is(cause, errOwnerGone) {
			r.account()
		}
		return
	case errors.Is(err, errLate):
		// An owner whose clock agrees has ended the request by itself, and only says so.
		r.fail(schemas.Errorf(schemas.CodeAgentTimeout,
			"By the clock of the GPU machine the request's time was up. If it wasn't, set that clock."))
	default:
		var e *schemas.Error
		if !errors.As(err, &e) {
			r.w.log.ErrorContext(ctx, "job failed", "request", r.job.Request, "error", err)
		}
		r.fail(schemas.AsError(err))
	}
	r.awaitHeard(r.life)
	r.settle(ackDone)
	r.account()
}

// account has the brokers told what the run burnt, unless its owner knows.
func (r *run) account() {
	usage, unsettled := r.unsettled()
	if !unsettled {
		return
	}
	r.w.log.Warn("request has lost its owner", "request", r.job.Request, "completion_tokens", usage.CompletionTokens)
	r.w.reports.add(&schemas.UsageReport{
		Version: schemas.ProtocolVersion, Request: r.job.Request, Attempt: r.job.Attempt, Usage: usage,
	})
}

func onceClose(c chan struct{}) func() {
	closed := false
	return func() {
		if !closed {
			closed = true
			close(c)
		}
	}
}

// outcome is the code under which a call of the backend is counted.
func outcome(err error) schemas.Code {
	if err == nil {
		return metric.CodeOK
	}
	return schemas.AsError(err).Code
}

// verdict takes in the owner's answer to a frame, or the bus's word that there is no
// owner.
func (w *Worker) verdict(m *nats.Msg) {
	w.mu.Lock()
	r := w.byRun[schemas.LastToken(m.Subject)]
	w.mu.Unlock()
	if r == nil {
		return
	}
	if len(m.Data) == 0 && m.Header.Get("Status") == "503" {
		r.ownerSilent(time.Now())
		return
	}
	var v schemas.Verdict
	if err := json.Unmarshal(m.Data, &v); err != nil {
		w.log.Warn("verdict dropped", "error", err)
		return
	}
	r.allowance.set(v.Limit, v.More)
	r.answered(v, time.Now())
}
