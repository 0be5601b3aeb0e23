package ingress

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/nats-io/nats.go"
	oteltrace "go.opentelemetry.io/otel/trace"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/desk"
	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/broker/trace"
	"github.com/ownllm/ownllm/schemas"
)

// The ends of a reply that are this package's own.
var (
	errLost = schemas.Errorf(schemas.CodeInternalError,
		"This server has lost its message bus for a moment, and parts of the reply with it. Send the request again.").WithRetryAfter(time.Second)
	errNonsense = schemas.Errorf(schemas.CodeBackendError, "The inference backend sent something that isn't JSON.")
	errTooLong  = schemas.Errorf(schemas.CodeInvalidValue,
		"The reply is larger than a message on the bus may be. Ask for it as a stream.").WithParam("stream")
)

// chat runs a chat completion, and passes its reply on.
func (in *Ingress) chat(ctx context.Context, c *call, id books.Identity) error {
	req, model, err := in.Desk.Chat(id, desk.Call{
		ID: c.id, Received: c.received, Body: string(c.body), Wait: c.option(schemas.HeaderWait), WaitHeader: schemas.HeaderWait,
	})
	if err != nil {
		return err
	}
	c.body = nil
	reply, _, err := in.Dispatcher.Start(ctx, req)
	if err != nil {
		return err
	}
	in.letIn(c)
	series := in.Metrics.Series(schemas.OperationChat, model.Backend, req.Model)
	if req.Stream {
		in.Metrics.StreamOpened(ctx)
		defer in.Metrics.StreamClosed(ctx)
	}
	release := in.watch(c, reply, id)
	err = c.pass(req.Stream)
	release()
	usage := desk.Record(ctx, series, reply, outcome(err), req.Stream)
	if span := oteltrace.SpanFromContext(ctx); span.IsRecording() {
		span.SetAttributes(trace.AttrInputTokens.Int(usage.PromptTokens), trace.AttrOutputTokens.Int(usage.CompletionTokens))
	}
	return err
}

// watch has the reply ended when its publisher is gone, cancels it, or may not have it any
// more, until it is released.
func (in *Ingress) watch(c *call, reply *dispatch.Reply, id books.Identity) (release func()) {
	c.reply, c.reconnects = reply, in.Conn.Stats().Reconnects
	in.mu.Lock()
	in.running[c.id] = c
	in.mu.Unlock()
	unguard := in.Keys.GuardID(id, reply.Interrupt)
	c.beat(time.Now()) // so the publisher learns the id of the request, and we whether it is there
	return func() {
		unguard()
		in.mu.Lock()
		delete(in.running, c.id)
		in.mu.Unlock()
	}
}

// pass sends the reply as it comes, or as a whole, and its end once it is settled.
func (c *call) pass(stream bool) error {
	var whole []byte
	for {
		ev := c.reply.Next()
		for _, payload := range ev.Payload {
			if !stream {
				whole = append(whole, payload...)
			} else if err := c.chunks(payload); err != nil {
				desk.Settle(c.reply)
				return err
			}
		}
		switch ev.Kind {
		case dispatch.EventError:
			desk.Settle(c.reply)
			return ev.Err
		case dispatch.EventDone:
			desk.Settle(c.reply)
			return c.done(whole)
		}
	}
}

// chunks sends lines of a stream.
func (c *call) chunks(lines []byte) *schemas.Error {
	for line := range bytes.SplitSeq(lines, newline) {
		if len(line) == 0 {
			continue
		}
		if !json.Valid(line) {
			return errNonsense
		}
		if err := c.send(&schemas.Answer{Kind: schemas.FrameChunk, Request: c.id, Chunk: line}, ""); err != nil {
			return c.unsent(err)
		}
	}
	return nil
}

var newline = []byte{'\n'}

// done sends the end of a reply that came whole, unless parts of it may be lost.
func (c *call) done(whole []byte) error {
	if len(whole) > 0 && !json.Valid(whole) {
		return errNonsense
	}
	if c.lost() {
		return errLost
	}
	err := c.send(&schemas.Answer{Kind: schemas.FrameDone, Request: c.id, Usage: c.reply.Usage().Total(), Completion: whole}, "")
	if err != nil {
		return c.unsent(err)
	}
	return nil
}

// unsent is what the publisher hears of a message that couldn't be sent.
func (c *call) unsent(err error) *schemas.Error {
	switch {
	case errors.Is(err, nats.ErrMaxPayload):
		return errTooLong
	case !bus.Down(err):
		c.in.Log.Warn("part of a reply not sent", "request", c.id, "error", err)
	}
	return errLost
}

// lost reports whether what was sent may be lost, because the connection was.
func (c *call) lost() bool { return c.in.Conn.Stats().Reconnects != c.reconnects }

// beat asks the publisher whether it is there, when it is time to, and ends the reply if it
// isn't.
func (c *call) beat(now time.Time) {
	c.mu.Lock()
	due := !c.over && now.Sub(c.asked) >= c.in.cfg.Beat
	if due {
		c.asked = now
	}
	silent := c.talks && !c.unanswered.IsZero() && now.Sub(c.unanswered) > c.in.cfg.Silence
	c.mu.Unlock()
	switch {
	case c.lost():
		c.reply.Interrupt(errLost)
		return
	case silent:
		c.reply.Interrupt(dispatch.ErrClientGone)
		return
	case !due:
		return
	}
	to := schemas.ProgressSubject(c.key, c.in.Dispatcher.Owner(), c.id)
	if err := c.send(&schemas.Answer{Kind: schemas.FrameProgress, Request: c.id}, to); err != nil {
		return // it is our own connection that is away
	}
	c.mu.Lock()
	if c.unanswered.IsZero() {
		c.unanswered = now
	}
	c.mu.Unlock()
}

// statusHeader and noResponders are how the server says that nobody listens.
const (
	statusHeader = "Status"
	noResponders = "503"
)

// heard is the callback of what is said to progress messages.
func (in *Ingress) heard(m *nats.Msg) {
	key, _, id, err := schemas.ParseProgressSubject(m.Subject)
	if err != nil {
		return
	}
	c := in.find(key, id)
	switch {
	case c == nil: // it has ended meanwhile
	case len(m.Data) == 0 && m.Header.Get(statusHeader) == noResponders:
		c.reply.Interrupt(dispatch.ErrClientGone)
	default:
		c.mu.Lock()
		c.talks, c.unanswered = true, time.Time{}
		c.mu.Unlock()
	}
}
