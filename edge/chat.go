package edge

import (
	"context"
	"strconv"
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
	if err := e.learn(req); err != nil {
		return err
	}
	reply, rate, err := e.Dispatcher.Start(ctx, req)
	in.rate = rate
	if err != nil {
		return err
	}
	e.tellLimits(c, in)
	w := &watched{
		reply: reply, edge: e, ctx: ctx, span: span, stream: req.Stream,
		series: e.Metrics.Series(operationChat, model.Backend, req.Model),
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

// learnMost bounds how long a request waits for an edge that has just started.
const learnMost = 3 * time.Second

// learn gives an edge that has just started the time to hear who is there, if it knows of
// nobody who could run the request yet: from the books it knows that there are agents, and
// before it says that they are away, it has to have listened. The error says that even then
// it doesn't know.
func (e *Edge) learn(req dispatch.Request) error {
	if e.Feed.Ready() || !e.Feed.Connected() {
		return nil
	}
	if choice, err := e.Agents.Route(req.Tenant, req.Model, nil); err == nil {
		e.Agents.Release(req.Tenant, choice.Agent, req.Model)
		return nil
	}
	timer := time.NewTimer(learnMost)
	defer timer.Stop()
	select {
	case <-e.Feed.Learned():
		return nil
	case <-timer.C:
		return e.unreachable(req.Tenant, req.Model)
	}
}

// admit makes every check of the contract up to the choice of an agent, in its order.
func (e *Edge) admit(ctx context.Context, c *fiber.Ctx, in *call) (dispatch.Request, schemas.Model, error) {
	var none dispatch.Request
	if err := e.authenticate(ctx, c, in); err != nil {
		return none, schemas.Model{}, err
	}
	id := in.identity
	body, err := e.readBody(c, in)
	if err != nil {
		return none, schemas.Model{}, err
	}
	req, err := chat.Parse(body)
	if err != nil {
		return none, schemas.Model{}, err
	}
	in.model = req.Model
	model, err := e.findModel(id, req.Model)
	if err != nil {
		return none, schemas.Model{}, err
	}
	if err := req.CheckModel(model); err != nil {
		return none, schemas.Model{}, err
	}
	wait, err := loadWait(c.Get(headerWait))
	if err != nil {
		return none, schemas.Model{}, err
	}
	return dispatch.Request{
		LoadWait: wait,
		ID:       in.id, Tenant: id.Tenant, Key: id.Key, Operation: operationChat,
		Model: req.Model, Body: body, Stream: req.Stream, IncludeUsage: req.IncludeUsage,
		Continuable: req.Continuable(),
		Prompt:      req.PromptBound(), Limit: req.ReplyLimit(), Most: req.MostTokens(model),
		Received: in.received,
	}, model, nil
}

// headerWait is how a client says for how long it waits for a model that isn't in memory,
// instead of the time that the edge would wait by itself: "30s", or a number of seconds.
const headerWait = "X-OwnLLM-Wait"

// maxLoadWait bounds that; the deadline of the whole request does, too.
const maxLoadWait = time.Hour

func loadWait(value string) (*time.Duration, error) {
	if value == "" {
		return nil, nil
	}
	wait, err := time.ParseDuration(value)
	if seconds, bare := strconv.Atoi(value); bare == nil {
		wait, err = time.Duration(min(max(seconds, -1), int(2*maxLoadWait/time.Second)))*time.Second, nil
	}
	if err != nil || wait < 0 || wait > maxLoadWait {
		return nil, schemas.Errorf(schemas.CodeInvalidValue,
			"The header %s has to be a time like 30s, or a number of seconds, from 0 to %d.", headerWait, int(maxLoadWait/time.Second)).WithParam(headerWait)
	}
	return &wait, nil
}

// watched is a reply on its way to a client. It is the body of a streamed response:
// the server reads it, and closes it whatever happens.
type watched struct {
	reply   *dispatch.Reply
	edge    *Edge
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
}

// settleWait is how long a client waits for the end of its reply until the books have
// what it costs, if its key has little left: it may begin the next request at once, and
// what the last one held has to be free by then, on whichever edge.
const settleWait = time.Second

// settle ends the request, and waits until the books have it, if that matters.
func (w *watched) settle() {
	w.reply.Close()
	if !w.reply.Scarce() {
		return
	}
	select {
	case <-w.reply.Settled():
		return
	default:
	}
	timer := time.NewTimer(settleWait)
	defer timer.Stop()
	select {
	case <-w.reply.Settled():
	case <-timer.C:
	}
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
