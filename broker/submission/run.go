package submission

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/desk"
	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/broker/metric"
	"github.com/ownllm/ownllm/broker/quota"
	"github.com/ownllm/ownllm/broker/trace"
	"github.com/ownllm/ownllm/schemas"
)

// maxCompletion bounds a completion, in bytes.
const maxCompletion = 64 << 20

// run runs one submission that was claimed, and ends or returns it; entered says whether
// there is room for it at its model. ctx ends, with a *schemas.Error as its cause, when the
// run is to be broken off.
func (s *Scheduler) run(ctx context.Context, c *books.Claim, entered bool) {
	s.Metrics.SubmissionBegun(ctx)
	defer s.Metrics.SubmissionLeft(ctx)
	defer s.forget(c)
	if entered {
		defer s.leave(c)
	}
	id, err := s.Keys.Identify(ctx, c.Key)
	if err != nil {
		s.refused(ctx, c, nil, err, quota.Rate{})
		return
	}
	req, series, err := s.request(id, c)
	if err != nil {
		s.refused(ctx, c, nil, err, quota.Rate{})
		return
	}
	if !entered {
		s.giveBack(ctx, books.Return{Claim: c, For: books.WaitsForCapacity, Pause: busyPause, Tries: c.Tries})
		return
	}
	ctx, span := s.Tracer.Run(ctx)
	if span.IsRecording() {
		span.SetAttributes(trace.AttrRequest.String(string(req.ID)), trace.AttrTenant.String(string(c.Tenant)),
			trace.AttrKey.String(string(c.Key)), trace.AttrModel.String(c.Model))
	}
	trace.End(span, s.execute(ctx, c, id, req, series))
}

// execute runs the request of a claim, and ends or returns the submission. The error is that
// of the run.
func (s *Scheduler) execute(ctx context.Context, c *books.Claim, id books.Identity, req dispatch.Request, series *metric.Series) error {
	reply, rate, err := s.Dispatcher.Start(context.WithoutCancel(ctx), req)
	if err != nil {
		s.refused(ctx, c, nil, err, rate)
		return err
	}
	if c.Tries > 0 {
		// Should that fail, the others are tried one after the other.
		if err := s.Books.SubmissionBegun(ctx, c); err != nil {
			s.Log.WarnContext(ctx, "submissions of a model stay parked", "key", c.Key, "error", err)
		}
	}
	completion, failure := s.read(ctx, id, reply)
	if failure != nil {
		reply.Close()
		desk.Record(ctx, series, reply, failure.Code, false)
		s.refused(ctx, c, reply, failure, quota.Rate{Known: true})
		return failure
	}
	// Recorded before it is waited for the books' settlement: should this process die in
	// between, the request isn't run again, and its worker reports what it cost.
	recorded := s.end(ctx, c, books.End{Request: req.ID, Completion: completion, Usage: reply.Usage()})
	reply.Close()
	s.publish(ctx, c, recorded)
	desk.Settle(reply)
	desk.Record(ctx, series, reply, metric.CodeOK, false)
	return nil
}

// request makes the request of a claim, under an id of its own.
func (s *Scheduler) request(id books.Identity, c *books.Claim) (dispatch.Request, *metric.Series, error) {
	req, model, err := s.Desk.Chat(id, desk.Call{ID: schemas.NewRequestID(), Received: time.Now(), Body: c.Request})
	// The result is one piece, whatever the publisher would have liked over HTTP.
	req.Stream, req.IncludeUsage, req.Continuable = false, false, false
	req.Once = true // what kills the workers that run it must not go on to the next
	if err != nil {
		return req, nil, err
	}
	return req, s.Metrics.Series(schemas.OperationChat, model.Backend, req.Model), nil
}

func (s *Scheduler) forget(c *books.Claim) {
	s.mu.Lock()
	if s.running[c.ID] == c.Run {
		delete(s.running, c.ID)
	}
	s.mu.Unlock()
	s.Wake()
}

// read reads a reply to its end, or until its key isn't valid any more.
func (s *Scheduler) read(ctx context.Context, id books.Identity, reply *dispatch.Reply) (string, *schemas.Error) {
	defer s.Keys.GuardID(id, reply.Interrupt)()
	defer context.AfterFunc(ctx, func() { reply.Interrupt(schemas.AsError(context.Cause(ctx))) })()
	var body []byte
	for {
		e := reply.Next()
		for _, piece := range e.Payload {
			body = append(body, piece...)
		}
		switch {
		case e.Kind == dispatch.EventError:
			return "", e.Err
		case len(body) > maxCompletion:
			reply.Interrupt(schemas.Errorf(schemas.CodeBackendError, "The reply is larger than %d bytes.", maxCompletion))
		case e.Kind == dispatch.EventDone && !json.Valid(body):
			return "", schemas.Errorf(schemas.CodeBackendError, "The inference backend sent something that isn't JSON.")
		case e.Kind == dispatch.EventDone:
			return string(body), nil
		}
	}
}

const (
	// busyPause is after how long it is looked again for room at a model, if no run that
	// ended has told.
	busyPause = 250 * time.Millisecond
	// slotPause is after how long it is looked again for a slot or for money, if no release
	// has told.
	slotPause = 2 * time.Second
	// maxPause bounds the pauses between two tries.
	maxPause = 10 * time.Second
)

// backoff is the pause after so many tries in vain, this one included.
func backoff(tries int) time.Duration {
	return min(time.Second<<min(max(tries-1, 0), 10), maxPause)
}

// refused ends or returns a submission whose run has failed. reply is nil if it wasn't
// begun.
func (s *Scheduler) refused(ctx context.Context, c *books.Claim, reply *dispatch.Reply, err error, rate quota.Rate) {
	var failure *schemas.Error
	if !errors.As(err, &failure) {
		failure = schemas.AsError(err)
		s.Log.ErrorContext(ctx, "submission failed", "tenant", c.Tenant, "key", c.Key, "error", err)
	}
	v := judge(failure, reply != nil && !reply.Timing().Claimed.IsZero(), rate)
	if ctx.Err() != nil && (reply == nil || failure == desk.ErrShuttingDown) {
		v = verdict{waits: books.WaitsForNothing} // the run was broken off by us
	}
	switch {
	case v.lost && c.Lost+1 >= books.MaxLostRuns:
		s.Log.WarnContext(ctx, "a submission is given up, because its runs get lost", "key", c.Key, "error", failure)
		s.publish(ctx, c, s.end(ctx, c, books.End{Err: books.ErrPoison()}))
	case v.waits == "":
		s.publish(ctx, c, s.end(ctx, c, books.End{Err: failure}))
	default:
		r := books.Return{Claim: c, For: v.waits, Code: failure.Code, Pause: v.pause, Tries: c.Tries, Lost: v.lost}
		switch r.For {
		case books.WaitsForModel:
			r.Tries++
			r.Pause = backoff(r.Tries)
		case books.WaitsForSlot, books.WaitsForMoney:
			r.Pause, r.Tries = slotPause, 0 // the model could have been had
		}
		s.giveBack(ctx, r)
	}
}

// verdict is what becomes of a submission whose run has failed: what it waits for, or
// nothing, and then it ends.
type verdict struct {
	waits books.WaitsFor
	pause time.Duration // at least
	lost  bool
}

// judge says what becomes of a submission. begun says that an agent has had it.
func judge(err *schemas.Error, begun bool, rate quota.Rate) verdict {
	switch err.Code {
	case schemas.CodeConcurrencyLimit:
		if rate.Known && rate.RequestsLeft > 0 {
			return verdict{waits: books.WaitsForMoney}
		}
		return verdict{waits: books.WaitsForSlot}
	case schemas.CodeTenantQPSLimit:
		return verdict{waits: books.WaitsForTime, pause: max(err.RetryAfter, minPause)}
	case schemas.CodeModelLoading, schemas.CodeQueueFull:
		return verdict{waits: books.WaitsForModel}
	case schemas.CodeAgentOffline, schemas.CodeTunnelDown, schemas.CodeInternalError:
		return verdict{waits: books.WaitsForModel, lost: begun}
	case schemas.CodeAgentTimeout:
		if !begun { // it lay in the queue of an agent for all the time that it had
			return verdict{waits: books.WaitsForModel}
		}
	}
	return verdict{}
}

// minPause is the shortest pause that a tenant's rate asks for.
const minPause = 50 * time.Millisecond

// end records the end of a submission, as long as it takes. It reports whether it was
// recorded: not if somebody else has the submission by now.
func (s *Scheduler) end(ctx context.Context, c *books.Claim, e books.End) (recorded bool) {
	e.Keep = s.cfg.Keep
	s.insist(ctx, func(ctx context.Context) (err error) {
		recorded, err = s.Books.EndSubmission(ctx, c, e)
		return err
	})
	if recorded {
		s.Metrics.SubmissionEnded(ctx, codeOf(e.Err))
	}
	return recorded
}

// codeOf is the code under which an end is counted.
func codeOf(err *schemas.Error) schemas.Code {
	if err == nil {
		return metric.CodeOK
	}
	return err.Code
}

func (s *Scheduler) giveBack(ctx context.Context, r books.Return) {
	s.insist(ctx, func(ctx context.Context) error {
		_, err := s.Books.ReturnSubmission(ctx, r)
		return err
	})
}

// insist repeats what the books have to take until they do, or this process is to end: then
// the sweep of another lets the submission wait again.
func (s *Scheduler) insist(ctx context.Context, work func(context.Context) error) {
	for {
		bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), booksWait)
		err := work(bounded)
		cancel()
		if err == nil {
			return
		}
		s.Log.WarnContext(ctx, "the books don't take the end of a run", "error", err)
		if ctx.Err() != nil {
			return
		}
		pause(ctx, again)
	}
}
