package trace_test

import (
	"context"
	"testing"

	"go.opentelemetry.io/otel/trace/noop"

	oteltrace "go.opentelemetry.io/otel/trace"

	"github.com/ownllm/ownllm/broker/trace"
	"github.com/ownllm/ownllm/schemas"
)

const (
	parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	older  = "00-11111111111111111111111111111111-2222222222222222-01"
)

func TestExtract(t *testing.T) {
	for name, tc := range map[string]struct {
		header map[string][]string
		want   string
	}{
		"lower case":           {map[string][]string{"traceparent": {parent}}, "0af7651916cd43dd8448eb211c80319c"},
		"canonical":            {map[string][]string{"Traceparent": {parent}}, "0af7651916cd43dd8448eb211c80319c"},
		"both, lower case won": {map[string][]string{"traceparent": {parent}, "Traceparent": {older}}, "0af7651916cd43dd8448eb211c80319c"},
		"empty values":         {map[string][]string{"traceparent": {}}, ""},
		"malformed":            {map[string][]string{"traceparent": {"00-zz"}}, ""},
		"none":                 {map[string][]string{"other": {parent}}, ""},
		"nil":                  {nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			sc := oteltrace.SpanContextFromContext(trace.Extract(t.Context(), tc.header))
			got := ""
			if sc.HasTraceID() {
				got = sc.TraceID().String()
			}
			if got != tc.want {
				t.Errorf("trace id %q, want %q", got, tc.want)
			}
			if tc.want != "" && !sc.IsRemote() {
				t.Error("the span context isn't marked as remote")
			}
		})
	}
}

func TestInjectWritesOneLowerCaseHeader(t *testing.T) {
	ctx := trace.Extract(t.Context(), map[string][]string{"Traceparent": {parent}, "Tracestate": {"a=1"}})
	header := map[string][]string{"Traceparent": {older}, "Nats-Msg-Id": {"x"}}
	trace.Inject(ctx, header)
	if got := header["traceparent"]; len(got) != 1 || got[0] != parent {
		t.Errorf("traceparent = %q", got)
	}
	if got := header["tracestate"]; len(got) != 1 || got[0] != "a=1" {
		t.Errorf("tracestate = %q", got)
	}
	if _, ok := header["Traceparent"]; ok {
		t.Error("the canonical form was left behind")
	}
	if len(header) != 3 {
		t.Errorf("headers = %v", header)
	}
	if keys := trace.Carrier(header).Keys(); len(keys) != 3 {
		t.Errorf("Keys() = %v", keys)
	}
}

func TestInjectNothing(t *testing.T) {
	header := map[string][]string{}
	trace.Inject(t.Context(), header)
	if len(header) != 0 {
		t.Errorf("headers = %v", header)
	}
}

// A tracer that is off passes a client's trace context on, and never hands out the
// span of its caller.
func TestOff(t *testing.T) {
	off := trace.New(noop.NewTracerProvider())
	if off != nil {
		t.Fatal("a tracer that records nothing isn't nil")
	}
	job := &schemas.Job{Request: "req_1", Tenant: "ten_1", Attempt: 1}
	header := map[string][]string{"traceparent": {parent}}
	starts := map[string]func(context.Context) (context.Context, oteltrace.Span){
		"Serve": func(ctx context.Context) (context.Context, oteltrace.Span) { return off.Serve(ctx, "POST", "/v1") },
		"Take":  func(ctx context.Context) (context.Context, oteltrace.Span) { return off.Take(ctx, "chat") },
		"Send":  func(ctx context.Context) (context.Context, oteltrace.Span) { return off.Send(ctx, job) },
		"Process": func(ctx context.Context) (context.Context, oteltrace.Span) {
			return off.Process(ctx, header, job, false)
		},
		"Call": func(ctx context.Context) (context.Context, oteltrace.Span) { return off.Call(ctx, "chat", "vllm", "m") },
	}
	ctx := trace.Extract(t.Context(), header)
	for name, start := range starts {
		next, span := start(ctx)
		if span.SpanContext().IsValid() {
			t.Errorf("%s handed out the caller's span", name)
		}
		trace.End(span, nil)
		out := map[string][]string{}
		trace.Inject(next, out)
		if got := out["traceparent"]; len(got) != 1 || got[0] != parent {
			t.Errorf("%s lost the client's trace: %q", name, got)
		}
		if name == "Process" {
			continue // reads headers
		}
		if n := testing.AllocsPerRun(100, func() { _, span := start(ctx); trace.End(span, nil) }); n != 0 {
			t.Errorf("%s allocates %v times while off", name, n)
		}
	}
}
