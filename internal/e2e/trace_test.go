package e2e

import (
	"encoding/hex"
	"io"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/worker/demo"
)

// traces is an OTLP receiver.
type traces struct {
	mu    sync.Mutex
	spans []*tracepb.Span
}

func (c *traces) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b, err := io.ReadAll(r.Body)
	var in collector.ExportTraceServiceRequest
	if err == nil && r.URL.Path == "/v1/traces" {
		err = proto.Unmarshal(b, &in)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, resource := range in.ResourceSpans {
		for _, scope := range resource.ScopeSpans {
			c.spans = append(c.spans, scope.Spans...)
		}
	}
}

// named returns the span of a trace, or of any if that is empty, with the given name.
func (c *traces) named(trace, name string) *tracepb.Span {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.spans {
		if (trace == "" || hex.EncodeToString(s.TraceId) == trace) && s.Name == name {
			return s
		}
	}
	return nil
}

// TestOneTrace follows a request from its client's own span to the call of the
// backend, through processes that have only the bus in common.
func TestOneTrace(t *testing.T) {
	received := &traces{}
	otlp := httptest.NewServer(received)
	defer otlp.Close()
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", otlp.URL)
	t.Setenv("OTEL_METRICS_EXPORTER", "none")
	t.Setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
	backend := stack.StartBackend(t, demo.Options{})
	c := stack.StartCluster(t)
	c.StartWorker(backend.URL)
	edge := c.StartEdge()
	awaitModel(t, []*stack.Edge{edge}, c.Key.Reveal(), demo.ModelID)

	const trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
	client := newClient(edge.BaseURL, c.Key.Reveal())
	defer client.close()
	client.header = http.Header{"Traceparent": {"00-" + trace + "-" + parent + "-01"}}
	wantWhole(t, client.chat(t.Context(), true, nil))

	received.wantChain(t, trace, parent, "POST /v1/chat/completions", "send ownllm.v1.job", "process ownllm.v1.job", "chat demo")

	// The same over NATS.
	const busTrace, busParent = "5bf92f3577b34da6a3ce929d0e0e4737", "10f067aa0ba902b8"
	id, secret := newKey(t, c, books.NewKey{})
	p := newPublisher(t, c.NATSURL(), id, secret)
	p.header = nats.Header{"traceparent": {"00-" + busTrace + "-" + busParent + "-01"}}
	wantDone(t, p.chat(t.Context(), true, nil))
	received.wantChain(t, busTrace, busParent, "process ownllm.v1.in.chat", "send ownllm.v1.job", "process ownllm.v1.job", "chat demo")

	// A submission is run in a trace of its own.
	s := &submitter{t, c, id, secret}
	s.accept("one", says("one"))
	s.done("one", "one")
	const run = "run submission"
	stack.Until(t, 30*time.Second, "the span of the run", func() bool { return received.named("", run) != nil })
	received.wantChain(t, hex.EncodeToString(received.named("", run).TraceId), "", run, "send ownllm.v1.job", "process ownllm.v1.job", "chat demo")
}

// wantChain waits for the spans of a trace, each of which is the child of the one before.
func (c *traces) wantChain(t *testing.T, trace, parent string, names ...string) {
	t.Helper()
	up := parent
	for _, name := range names {
		var span *tracepb.Span
		stack.Until(t, 30*time.Second, "the span "+name, func() bool {
			span = c.named(trace, name)
			return span != nil
		})
		if got := hex.EncodeToString(span.ParentSpanId); got != up {
			t.Errorf("span %q is a child of %s, want %s", name, got, up)
		}
		up = hex.EncodeToString(span.SpanId)
	}
}
