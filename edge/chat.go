package edge

import (
	"context"
	"time"

	"github.com/gofiber/fiber/v2"
	oteltrace "go.opentelemetry.io/otel/trace"

	"github.com/ownllm/ownllm/broker/chat"
	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/broker/metric"
	"github.com/ownllm/ownllm/broker/trace"
	"github.com/ownllm/ownllm/schemas"
)

const operationChat = "chat"

// chat answers POST /v1/chat/completions.
func (e *Edge) chat(c *fiber.Ctx) error {
	in := callOf(c)
	ctx, span := e.Tracer.Serve(trace.Extract(c.UserContext(), traceHeader(c)), in.method, chatPath)
	c.SetUserContext(ctx)

	req, model, err := e.admit(ctx, c, in)
	if err != nil {
		return err
	}
	// The request may outlive this handler, and Fiber's context with it.
	ctx = context.WithoutCancel(ctx)
	reply, err := e.Dispatcher.Start(ctx, req)
	if err != nil {
		return err
	}
	w := &watched{
		reply: reply, edge: e, ctx: ctx, span: span, stream: req.Stream,
		series: e.Metrics.Series(operationChat, model.Backend, req.Model),
	}
	in.streaming = req.Stream
	w.unwatch = e.watch.add(in.conn, func() { reply.Interrupt(errClientGone) })
	reply.OnStall(func() { hurryUp(in.conn) })
	if !req.Stream {
		return w.sendWhole(c)
	}
	return w.sendStream(c)
}

// admit makes every check of the contract up to the choice of an agent, in its order.
func (e *Edge) admit(ctx context.Context, c *fiber.Ctx, in *call) (dispatch.Request, schemas.Model, error) {
	var none dispatch.Request
	id, err := e.authenticate(ctx, c, in)
	if err != nil {
		return none, schemas.Model{}, err
	}
	body, err := e.readBody(c, in)
	if err != nil {
		return none, schemas.Model{}, err
	}
	req, err := chat.Parse(body)
	if err != nil {
		return none, schemas.Model{}, err
	}
	model, err := e.findModel(id, req.Model)
	if err != nil {
		return none, schemas.Model{}, err
	}
	if err := req.CheckModel(model); err != nil {
		return none, schemas.Model{}, err
	}
	return dispatch.Request{
		ID: in.id, Tenant: id.Tenant, Key: id.Key, Operation: operationChat,
		Model: req.Model, Body: body, Stream: req.Stream, IncludeUsage: req.IncludeUsage,
		Received: in.received,
	}, model, nil
}

// errClientGone ends the reply of a client that closed its connection. Nobody gets
// to see it.
var errClientGone = schemas.Errorf(schemas.CodeInternalError, "the client went away")

// watched is a reply on its way to a client. It is the body of a streamed response:
// the server reads it, and closes it whatever happens.
type watched struct {
	reply   *dispatch.Reply
	edge    *Edge
	ctx     context.Context //nolint:containedctx // of the request, for what is recorded at its end
	span    oteltrace.Span
	series  *metric.Series
	unwatch func()
	stream  bool

	answered bool // the status was 200
	ended    bool
	over     bool           // the last event was rendered
	err      *schemas.Error // that ended the stream
	buf, out []byte         // rendered events; out is what hasn't been read of buf
}

// end ends the request and records how it went. Of a request that wasn't answered
// with a 200, the error handler records the rest.
func (w *watched) end(err *schemas.Error) {
	if w.ended {
		return
	}
	w.ended = true
	w.unwatch()
	w.reply.Close()
	var cause error
	code := metric.CodeOK
	switch {
	case err == nil && !w.over && w.stream, err == errClientGone:
		code = metric.CodeClientGone
	case err != nil:
		code, cause = err.Code, err
	}
	timing, usage := w.reply.Timing(), w.reply.Usage()
	record := metric.Reply{Code: code, Duration: time.Since(timing.Received), Usage: usage}
	if w.stream && !timing.FirstChunk.IsZero() {
		record.FirstToken = timing.FirstChunk.Sub(timing.Received)
		w.series.FirstToken(w.ctx, record.FirstToken)
	}
	w.series.Replied(w.ctx, record)
	if !w.answered {
		return
	}
	if w.stream {
		w.edge.Metrics.StreamClosed(w.ctx)
		w.edge.Metrics.RequestEnded(w.ctx, operationChat, code)
	}
	w.span.SetAttributes(trace.AttrInputTokens.Int(usage.PromptTokens), trace.AttrOutputTokens.Int(usage.CompletionTokens))
	trace.End(w.span, cause)
}

// traceHeader returns the trace context that the client sent along.
func traceHeader(c *fiber.Ctx) map[string][]string {
	h := make(map[string][]string, 2)
	for _, name := range []string{"traceparent", "tracestate"} {
		if v := c.Get(name); v != "" {
			h[name] = []string{v}
		}
	}
	return h
}
