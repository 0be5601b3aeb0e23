package edge

import (
	"context"

	"github.com/gofiber/fiber/v2"
	oteltrace "go.opentelemetry.io/otel/trace"

	"github.com/ownllm/ownllm/broker/desk"
	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/broker/metric"
	"github.com/ownllm/ownllm/broker/trace"
	"github.com/ownllm/ownllm/schemas"
)

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
	if err := e.Desk.Learn(req); err != nil {
		return err
	}
	reply, rate, err := e.Dispatcher.Start(ctx, req)
	in.rate = rate
	if err != nil {
		return err
	}
	e.tellLimits(c, in)
	w := &watched{
		reply: reply, edge: e, in: in, ctx: ctx, span: span, stream: req.Stream,
		series: e.Metrics.Series(schemas.OperationChat, model.Backend, req.Model),
	}
	in.streaming = req.Stream
	w.unwatch = e.watch.add(in.conn, func() { reply.Interrupt(dispatch.ErrClientGone) })
	w.unguard = e.Keys.Guard(in.key, in.slug, in.identity, reply.Interrupt)
	reply.OnStall(func() { hurryUp(in.conn) })
	if !req.Stream {
		return w.sendWhole(c)
	}
	return w.sendStream(c)
}

// admit makes every check of the contract up to the choice of an agent, in its order.
func (e *Edge) admit(ctx context.Context, c *fiber.Ctx, in *call) (dispatch.Request, schemas.Model, error) {
	var none dispatch.Request
	if err := e.authenticate(ctx, c, in); err != nil {
		return none, schemas.Model{}, err
	}
	if err := e.uploads.begin(in.identity.Key, in.identity.Concurrency); err != nil {
		return none, schemas.Model{}, err
	}
	body, err := e.readBody(c, in)
	e.uploads.end(in.identity.Key)
	if err != nil {
		return none, schemas.Model{}, err
	}
	req, model, err := e.Desk.Chat(in.identity, desk.Call{ID: in.id, Received: in.received, Body: body, Wait: c.Get(headerWait), WaitHeader: headerWait})
	in.model = req.Model
	return req, model, err
}

// headerWait is how a client says for how long it waits for a model that isn't in memory,
// instead of the time that the edge would wait by itself: "30s", or a number of seconds.
const headerWait = "X-OwnLLM-Wait"

// watched is a reply on its way to a client. It is the body of a streamed response:
// the server reads it, and closes it whatever happens.
type watched struct {
	reply   *dispatch.Reply
	edge    *Edge
	in      *call
	ctx     context.Context //nolint:containedctx // of the request, for what is recorded at its end
	span    oteltrace.Span
	series  *metric.Series
	unwatch func()
	unguard func()
	stream  bool

	answered bool // the status was 200
	ended    bool
	last     *dispatch.Event // the last event came
	over     bool            // and was rendered
	err      *schemas.Error  // that ended the stream
	buf, out []byte          // rendered events; out is what hasn't been read of buf
	pooled   *[]byte         // where buf comes from; nil: nothing was rendered yet
}

// end ends the request and records how it went. Of a request that wasn't answered
// with a 200, the error handler records the rest.
func (w *watched) end(err *schemas.Error) {
	if w.ended {
		return
	}
	w.ended = true
	w.unwatch()
	w.unguard()
	w.reply.Close()
	var cause error
	code := metric.CodeOK
	switch {
	case err == nil && !w.over && w.stream, err == dispatch.ErrClientGone:
		code = metric.CodeClientGone
	case err != nil:
		code, cause = err.Code, err
	}
	usage := desk.Record(w.ctx, w.series, w.reply, code, w.stream)
	if !w.answered {
		return
	}
	if code == schemas.CodeInternalError && err != desk.ErrShuttingDown {
		w.edge.failed(w.ctx, w.in, cause)
	}
	if w.stream {
		w.edge.Metrics.StreamClosed(w.ctx)
		w.edge.Metrics.RequestEnded(w.ctx, schemas.OperationChat, code)
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
