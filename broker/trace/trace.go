// Package trace carries traces over the bus and names the spans of a request, so
// that edge, broker and worker draw one picture of it:
//
//	POST /v1/chat/completions   server    edge (or process ownllm.v1.in.chat, broker; or
//	                                      run submission, internal, broker)
//	└ send ownllm.v1.job        producer  owner
//	  └ process ownllm.v1.job   consumer  worker
//	    └ chat llama-3.3-70b    client    worker, around its call of the backend
//
// Trace context travels in the W3C headers traceparent and tracestate. With no
// exporter configured nothing is recorded, and a Tracer costs next to nothing, but a
// client's own trace context still reaches the backend.
//
// Spans hold ids, model names, counts and codes; prompts and completions never.
package trace

import (
	"context"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	oteltrace "go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"

	"github.com/ownllm/ownllm/schemas"
)

const scope = "github.com/ownllm/ownllm"

// The attributes that callers set themselves, where they come to know the value.
const (
	AttrRequest      = attribute.Key("ownllm.request.id")
	AttrAttempt      = attribute.Key("ownllm.attempt")
	AttrTenant       = attribute.Key("ownllm.tenant.id")
	AttrKey          = attribute.Key("ownllm.key.id")
	AttrAgent        = attribute.Key("ownllm.agent.id")
	AttrModel        = attribute.Key("gen_ai.request.model")
	AttrInputTokens  = attribute.Key("gen_ai.usage.input_tokens")
	AttrOutputTokens = attribute.Key("gen_ai.usage.output_tokens")
	AttrStatus       = attribute.Key("http.response.status_code")
)

const (
	attrMethod    = attribute.Key("http.request.method")
	attrRoute     = attribute.Key("http.route")
	attrSystem    = attribute.Key("messaging.system")
	attrOpType    = attribute.Key("messaging.operation.type")
	attrOpName    = attribute.Key("messaging.operation.name")
	attrTemplate  = attribute.Key("messaging.destination.name")
	attrMessage   = attribute.Key("messaging.message.id")
	attrOperation = attribute.Key("gen_ai.operation.name")
	attrProvider  = attribute.Key("gen_ai.provider.name")
	attrErrorType = attribute.Key("error.type")
)

// JobDestination stands for the subjects of jobs in the names of spans, which must
// not hold a tenant, an agent or a model.
const JobDestination = schemas.Prefix + "job"

// off is the span of a tracer that is off: never the one that ctx holds, which
// another part may have started and End would end.
var off oteltrace.Span = noop.Span{}

// Tracer starts the spans of a request. A nil *Tracer is valid and records nothing.
type Tracer struct {
	tracer oteltrace.Tracer
}

// New returns a tracer of the provider. If that records nothing, neither does the
// tracer, and it builds no attributes either.
func New(provider oteltrace.TracerProvider) *Tracer {
	if _, off := provider.(noop.TracerProvider); off || provider == nil {
		return nil
	}
	return &Tracer{provider.Tracer(scope)}
}

// Serve starts the span of an HTTP request at the edge. The parent is what ctx
// holds, so Extract comes first. The route is its pattern, not its path.
func (t *Tracer) Serve(ctx context.Context, method, route string) (context.Context, oteltrace.Span) {
	if t == nil {
		return ctx, off
	}
	return t.tracer.Start(ctx, method+" "+route, oteltrace.WithSpanKind(oteltrace.SpanKindServer),
		oteltrace.WithAttributes(attrMethod.String(method), attrRoute.String(route)))
}

// InDestination stands for the subjects of publishers' requests in the names of spans.
const InDestination = schemas.Prefix + "in"

// Take starts the span of a publisher's request, from the bus. The parent is what ctx
// holds, so Extract comes first.
func (t *Tracer) Take(ctx context.Context, operation string) (context.Context, oteltrace.Span) {
	if t == nil {
		return ctx, off
	}
	return t.tracer.Start(ctx, "process "+InDestination+"."+operation, oteltrace.WithSpanKind(oteltrace.SpanKindServer),
		oteltrace.WithAttributes(attrSystem.String("nats"), attrTemplate.String(InDestination+"."+operation),
			attrOpType.String("process"), attrOpName.String(operation)))
}

// Run starts the span of a run of a submission, in a trace of its own: whoever submitted it
// isn't waiting.
func (t *Tracer) Run(ctx context.Context) (context.Context, oteltrace.Span) {
	if t == nil {
		return ctx, off
	}
	return t.tracer.Start(ctx, "run submission", oteltrace.WithNewRoot(), oteltrace.WithSpanKind(oteltrace.SpanKindInternal))
}

// Send starts the span of a job's publishing. Inject its context into the headers of
// the message.
func (t *Tracer) Send(ctx context.Context, job *schemas.Job) (context.Context, oteltrace.Span) {
	if t == nil {
		return ctx, off
	}
	return t.tracer.Start(ctx, "send "+JobDestination, oteltrace.WithSpanKind(oteltrace.SpanKindProducer),
		oteltrace.WithAttributes(append(jobAttributes(job), attrOpType.String("send"), attrOpName.String("publish"))...))
}

// Process starts the span of a job's run at a worker. header is the message's. The
// first delivery is a child of the span that sent it; a later one is a trace of its
// own that links there, since the sender isn't waiting for it in that form.
func (t *Tracer) Process(ctx context.Context, header map[string][]string, job *schemas.Job, redelivered bool) (context.Context, oteltrace.Span) {
	if t == nil {
		return Extract(ctx, header), off
	}
	options := []oteltrace.SpanStartOption{
		oteltrace.WithSpanKind(oteltrace.SpanKindConsumer),
		oteltrace.WithAttributes(append(jobAttributes(job), attrOpType.String("process"), attrOpName.String("process"))...),
	}
	sent := Extract(ctx, header)
	if redelivered {
		options = append(options, oteltrace.WithNewRoot(), oteltrace.WithLinks(oteltrace.LinkFromContext(sent)))
	} else {
		ctx = sent
	}
	return t.tracer.Start(ctx, "process "+JobDestination, options...)
}

// Call starts the span of a worker's call of its backend. provider is the kind of
// the backend, model the id that it knows.
func (t *Tracer) Call(ctx context.Context, operation, provider, model string) (context.Context, oteltrace.Span) {
	if t == nil {
		return ctx, off
	}
	return t.tracer.Start(ctx, operation+" "+model, oteltrace.WithSpanKind(oteltrace.SpanKindClient),
		oteltrace.WithAttributes(attrOperation.String(operation), attrProvider.String(provider), AttrModel.String(model)))
}

func jobAttributes(job *schemas.Job) []attribute.KeyValue {
	return []attribute.KeyValue{
		attrSystem.String("nats"),
		attrTemplate.String(JobDestination),
		attrMessage.String(job.MsgID()),
		AttrRequest.String(string(job.Request)),
		AttrAttempt.Int(job.Attempt),
		AttrTenant.String(string(job.Tenant)),
		AttrModel.String(job.Model),
	}
}

// End ends a span that one of the functions above started. err is nil if all went
// well; of any other error only the code gets into the span, because its text may
// come from a backend and hold what must not be recorded.
func End(span oteltrace.Span, err error) {
	if !span.IsRecording() {
		return
	}
	if err != nil {
		code := string(schemas.AsError(err).Code)
		span.SetAttributes(attrErrorType.String(code))
		span.SetStatus(codes.Error, code)
	}
	span.End()
}
