package telemetry_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/trace/noop"
	collectormetrics "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	collectortrace "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"github.com/ownllm/ownllm/broker/metric"
	"github.com/ownllm/ownllm/broker/trace"
	"github.com/ownllm/ownllm/internal/telemetry"
	"github.com/ownllm/ownllm/schemas"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// clean takes the environment of whoever runs the tests away.
func clean(t testing.TB) {
	for _, name := range []string{
		"OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
		"OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_TRACES_EXPORTER", "OTEL_METRICS_EXPORTER", "OTEL_SDK_DISABLED",
		"OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_TRACES_SAMPLER",
	} {
		t.Setenv(name, "")
	}
}

func start(t testing.TB, log *slog.Logger) *telemetry.Telemetry {
	t.Helper()
	tel, err := telemetry.Start(context.Background(), telemetry.Config{Service: "ownllm-test", Version: "v1.2.3", Log: log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := tel.Shutdown(ctx); err != nil {
			t.Errorf("shutdown: %v", err)
		}
	})
	return tel
}

func scrape(t *testing.T, tel *telemetry.Telemetry) string {
	t.Helper()
	server := httptest.NewServer(tel.Handler())
	defer server.Close()
	reply, err := server.Client().Get(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer reply.Body.Close()
	body, err := io.ReadAll(reply.Body)
	if err != nil || reply.StatusCode != http.StatusOK {
		t.Fatalf("scrape: %s, %v", reply.Status, err)
	}
	return string(body)
}

func TestScrape(t *testing.T) {
	clean(t)
	tel := start(t, slog.New(slog.DiscardHandler))
	i, err := metric.New(tel.MeterProvider())
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	i.RequestStarted(ctx)
	i.RequestStarted(ctx)
	i.StreamOpened(ctx)
	s := i.Series("chat", "vllm", "qwen/qwen2.5:32b")
	s.Queued(ctx)
	s.Queued(ctx)
	s.Queued(ctx)
	s.Dequeued(ctx, 30*time.Millisecond)
	s.Unqueued(ctx)
	s.FirstToken(ctx, 250*time.Millisecond)
	s.Replied(ctx, metric.Reply{
		Code: metric.CodeOK, Duration: 2250 * time.Millisecond, FirstToken: 250 * time.Millisecond,
		Usage: schemas.Usage{PromptTokens: 100, CompletionTokens: 21},
	})
	s.Replied(ctx, metric.Reply{Code: schemas.CodeBackendError, Duration: time.Second})
	s.Replied(ctx, metric.Reply{Code: "code_of_tomorrow", Duration: -time.Second})
	i.RequestEnded(ctx, "chat", metric.CodeOK)
	i.RequestEnded(ctx, "chat", schemas.CodeKeyInvalid)
	i.RequestEnded(ctx, "chat", metric.CodeClientGone)
	i.RequestStarted(ctx)
	i.StreamClosed(ctx)
	i.StreamOpened(ctx)
	i.Failover(ctx)
	i.Dropped(ctx, metric.DropNoReply)
	i.Dropped(ctx, metric.DropForeignReply)
	i.Dropped(ctx, metric.DropForeignReply)
	s.BackendChunk(ctx, 20*time.Millisecond)
	s.BackendCalled(ctx, time.Second, metric.CodeOK)

	const model = `gen_ai_operation_name="chat",gen_ai_provider_name="vllm",gen_ai_request_model="qwen/qwen2.5:32b"`
	const failed = `error_type="%s",gen_ai_operation_name="chat",gen_ai_provider_name="vllm",gen_ai_request_model="qwen/qwen2.5:32b"`
	body := scrape(t, tel)
	for _, line := range []string{
		`ownllm_requests_total{code="ok",gen_ai_operation_name="chat"} 1`,
		`ownllm_requests_total{code="key_invalid",gen_ai_operation_name="chat"} 1`,
		`ownllm_requests_total{code="client_gone",gen_ai_operation_name="chat"} 1`,
		`ownllm_request_active 0`,
		`ownllm_stream_active 1`,
		`ownllm_failovers_total 1`,
		`ownllm_ingress_dropped_total{reason="no_reply"} 1`,
		`ownllm_ingress_dropped_total{reason="foreign_reply"} 2`,
		`ownllm_queue_depth{` + model + `} 1`,
		`ownllm_queue_wait_seconds_bucket{` + model + `,le="0.025"} 0`,
		`ownllm_queue_wait_seconds_bucket{` + model + `,le="0.05"} 1`,
		`gen_ai_server_request_duration_seconds_bucket{` + model + `,le="1.28"} 0`,
		`gen_ai_server_request_duration_seconds_bucket{` + model + `,le="2.56"} 1`,
		`gen_ai_server_request_duration_seconds_sum{` + model + `} 2.25`,
		`gen_ai_server_request_duration_seconds_count{` + fmt.Sprintf(failed, "backend_error") + `} 1`,
		`gen_ai_server_request_duration_seconds_sum{` + fmt.Sprintf(failed, "internal_error") + `} 0`,
		`gen_ai_server_time_to_first_token_seconds_bucket{` + model + `,le="0.1"} 0`,
		`gen_ai_server_time_to_first_token_seconds_bucket{` + model + `,le="0.25"} 1`,
		`gen_ai_server_time_per_output_token_seconds_sum{` + model + `} 0.1`,
		`gen_ai_server_time_per_output_token_seconds_bucket{` + model + `,le="2.5"} 1`,
		`gen_ai_client_token_usage_sum{` + model + `,gen_ai_token_type="input"} 100`,
		`gen_ai_client_token_usage_bucket{` + model + `,gen_ai_token_type="output",le="16"} 0`,
		`gen_ai_client_token_usage_bucket{` + model + `,gen_ai_token_type="output",le="64"} 1`,
		`gen_ai_client_operation_duration_seconds_count{` + model + `} 1`,
		`gen_ai_client_operation_time_to_first_chunk_seconds_count{` + model + `} 1`,
	} {
		if !strings.Contains(body, "\n"+line+"\n") {
			t.Errorf("no line %s", line)
		}
	}
	for _, name := range []string{"go_goroutines ", "process_open_fds ", `target_info{`, `service_name="ownllm-test"`, `service_version="v1.2.3"`} {
		if !strings.Contains(body, name) {
			t.Errorf("no %s", name)
		}
	}
	if t.Failed() {
		t.Log(body)
	}
}

// Model ids come from outside, so their number must not grow the metrics.
func TestCardinalityIsBounded(t *testing.T) {
	clean(t)
	tel := start(t, slog.New(slog.DiscardHandler))
	i, err := metric.New(tel.MeterProvider())
	if err != nil {
		t.Fatal(err)
	}
	var wait sync.WaitGroup
	for g := range 4 {
		wait.Go(func() {
			for n := range 1000 {
				s := i.Series("chat", "vllm", fmt.Sprintf("model-%d-%d", g, n))
				s.FirstToken(t.Context(), time.Millisecond)
				i.RequestEnded(t.Context(), fmt.Sprintf("op-%d", n), metric.CodeOK)
			}
		})
	}
	wait.Wait()
	body := scrape(t, tel)
	if n := strings.Count(body, "gen_ai_server_time_to_first_token_seconds_count{"); n != 257 {
		t.Errorf("%d series of the first token, want 256 and the one for the others", n)
	}
	if !strings.Contains(body, `gen_ai_server_time_to_first_token_seconds_count{gen_ai_operation_name="_other",gen_ai_provider_name="_other",gen_ai_request_model="_other"} 3744`) {
		t.Error("the measurements over the bound are lost")
	}
	if n := strings.Count(body, "ownllm_requests_total{"); n > 257 {
		t.Errorf("%d series of requests", n)
	}
}

func TestRecordingAllocatesNothing(t *testing.T) {
	clean(t)
	i, err := metric.New(start(t, slog.New(slog.DiscardHandler)).MeterProvider())
	if err != nil {
		t.Fatal(err)
	}
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	if n := testing.AllocsPerRun(1000, func() { record(t.Context(), i) }); n != 0 {
		t.Errorf("recording a request allocates %v times", n)
	}
}

// record is all that one request measures.
func record(ctx context.Context, i *metric.Instruments) {
	i.RequestStarted(ctx)
	i.StreamOpened(ctx)
	s := i.Series("chat", "vllm", "llama-3.3-70b")
	s.Queued(ctx)
	s.Dequeued(ctx, time.Millisecond)
	s.FirstToken(ctx, 250*time.Millisecond)
	s.Replied(ctx, metric.Reply{
		Code: metric.CodeOK, Duration: time.Second, FirstToken: 250 * time.Millisecond,
		Usage: schemas.Usage{PromptTokens: 100, CompletionTokens: 21},
	})
	i.StreamClosed(ctx)
	i.RequestEnded(ctx, "chat", metric.CodeOK)
}

func BenchmarkRecordRequest(b *testing.B) {
	clean(b)
	i, err := metric.New(start(b, slog.New(slog.DiscardHandler)).MeterProvider())
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		ctx := context.Background()
		for pb.Next() {
			record(ctx, i)
		}
	})
}

func BenchmarkTracesOff(b *testing.B) {
	clean(b)
	tracer := trace.New(start(b, slog.New(slog.DiscardHandler)).TracerProvider())
	job := &schemas.Job{Request: "req_1", Tenant: "ten_1", Attempt: 1, Model: "m"}
	b.ReportAllocs()
	for b.Loop() {
		ctx, span := tracer.Serve(context.Background(), "POST", "/v1/chat/completions")
		_, sent := tracer.Send(ctx, job)
		trace.End(sent, nil)
		trace.End(span, nil)
	}
}

func TestTracesAreOffByDefault(t *testing.T) {
	for name, env := range map[string]map[string]string{
		"nothing set": nil,
		"disabled":    {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "TRUE"},
		"none": {
			"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none", "OTEL_METRICS_EXPORTER": "none",
		},
		"metrics only": {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://127.0.0.1:1", "OTEL_METRICS_EXPORTER": "none"},
	} {
		t.Run(name, func(t *testing.T) {
			clean(t)
			for k, v := range env {
				t.Setenv(k, v)
			}
			tel := start(t, slog.New(slog.DiscardHandler))
			if _, ok := tel.TracerProvider().(noop.TracerProvider); !ok {
				t.Errorf("the tracer provider is a %T", tel.TracerProvider())
			}
			if trace.New(tel.TracerProvider()) != nil {
				t.Error("the tracer records")
			}
			if otel.GetTracerProvider() != tel.TracerProvider() || otel.GetMeterProvider() != tel.MeterProvider() {
				t.Error("the providers aren't the global ones")
			}
			if !strings.Contains(scrape(t, tel), "go_goroutines") {
				t.Error("nothing to scrape")
			}
		})
	}
}

// collector is an OTLP receiver.
type collector struct {
	mu      sync.Mutex // guards the fields below
	spans   []*tracepb.Span
	service string
	metrics []string
}

func (c *collector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var body io.Reader = r.Body
	if r.Header.Get("Content-Encoding") == "gzip" {
		z, err := gzip.NewReader(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		body = z
	}
	b, err := io.ReadAll(body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch r.URL.Path {
	case "/v1/traces":
		var request collectortrace.ExportTraceServiceRequest
		err = proto.Unmarshal(b, &request)
		for _, rs := range request.ResourceSpans {
			for _, kv := range rs.Resource.Attributes {
				if kv.Key == "service.name" {
					c.service = kv.Value.GetStringValue()
				}
			}
			for _, ss := range rs.ScopeSpans {
				c.spans = append(c.spans, ss.Spans...)
			}
		}
	case "/v1/metrics":
		var request collectormetrics.ExportMetricsServiceRequest
		err = proto.Unmarshal(b, &request)
		for _, rm := range request.ResourceMetrics {
			for _, sm := range rm.ScopeMetrics {
				for _, m := range sm.Metrics {
					c.metrics = append(c.metrics, m.Name)
				}
			}
		}
	default:
		err = errors.New("unknown path")
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
	}
}

func (c *collector) span(t *testing.T, name string) *tracepb.Span {
	t.Helper()
	for _, s := range c.spans {
		if s.Name == name {
			return s
		}
	}
	t.Fatalf("no span %q", name)
	return nil
}

// One trace runs from the edge over the headers of a message to the worker's call
// of its backend, and reaches a real OTLP receiver.
func TestTraceOverOTLP(t *testing.T) {
	clean(t)
	var got collector
	server := httptest.NewServer(&got)
	defer server.Close()
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", server.URL)
	t.Setenv("OTEL_SERVICE_NAME", "from-environment")

	tel := start(t, slog.New(slog.DiscardHandler))
	i, err := metric.New(tel.MeterProvider())
	if err != nil {
		t.Fatal(err)
	}
	tracer := trace.New(tel.TracerProvider())
	const client = "0af7651916cd43dd8448eb211c80319c"
	job := &schemas.Job{Request: "req_1", Tenant: "ten_1", Attempt: 1, Model: "qwen/qwen2.5:32b"}

	edge := trace.Extract(t.Context(), map[string][]string{"Traceparent": {"00-" + client + "-b7ad6b7169203331-01"}})
	edge, served := tracer.Serve(edge, "POST", "/v1/chat/completions")
	owner, sent := tracer.Send(edge, job)
	header := map[string][]string{}
	trace.Inject(owner, header)
	trace.End(sent, nil)

	worker, processed := tracer.Process(context.Background(), header, job, false)
	_, called := tracer.Call(worker, "chat", "vllm", "qwen2.5")
	trace.End(called, schemas.Errorf(schemas.CodeBackendError, "the backend said canary"))
	trace.End(processed, errors.New("canary"))
	_, again := tracer.Process(context.Background(), header, job, true)
	trace.End(again, nil)
	trace.End(served, nil)
	record(t.Context(), i)

	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := tel.Shutdown(ctx); err != nil {
		t.Fatal(err)
	}
	got.mu.Lock()
	defer got.mu.Unlock()
	if got.service != "from-environment" {
		t.Errorf("service.name = %q", got.service)
	}
	if len(got.spans) != 5 {
		t.Fatalf("%d spans, want 5", len(got.spans))
	}
	parent := "b7ad6b7169203331"
	for _, name := range []string{"POST /v1/chat/completions", "send ownllm.v1.job", "process ownllm.v1.job", "chat qwen2.5"} {
		s := got.span(t, name)
		if hex.EncodeToString(s.TraceId) != client || hex.EncodeToString(s.ParentSpanId) != parent {
			t.Errorf("%s: trace %x, parent %x; want %s, %s", name, s.TraceId, s.ParentSpanId, client, parent)
		}
		parent = hex.EncodeToString(s.SpanId)
		if strings.Contains(s.String(), "canary") {
			t.Errorf("%s gives away the text of an error: %s", name, s)
		}
	}
	call := got.span(t, "chat qwen2.5")
	if call.Status.GetCode() != tracepb.Status_STATUS_CODE_ERROR || call.Status.GetMessage() != "backend_error" {
		t.Errorf("status of the call: %v", call.Status)
	}
	redelivered := got.spans[slices.IndexFunc(got.spans, func(s *tracepb.Span) bool { return len(s.Links) > 0 })]
	if hex.EncodeToString(redelivered.TraceId) == client || hex.EncodeToString(redelivered.Links[0].TraceId) != client {
		t.Errorf("a redelivery is in trace %x and links to %x", redelivered.TraceId, redelivered.Links[0].TraceId)
	}
	for _, name := range []string{metric.NameServerDuration, metric.NameServerFirstToken, metric.NameQueueWait, metric.NameRequests} {
		if !slices.Contains(got.metrics, name) {
			t.Errorf("no metric %s came over OTLP", name)
		}
	}
}

// A collector that is away must not fail the process; the log tells of it.
func TestCollectorAway(t *testing.T) {
	clean(t)
	server := httptest.NewServer(http.NotFoundHandler())
	defer server.Close()
	t.Setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", server.URL+"/v1/traces")
	t.Setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
	var out bytes.Buffer
	tel := start(t, slog.New(slog.NewTextHandler(&out, nil)))
	_, span := trace.New(tel.TracerProvider()).Serve(t.Context(), "GET", "/v1/models")
	trace.End(span, nil)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_ = tel.Shutdown(ctx) // says the same
	if !strings.Contains(out.String(), "grpc is not spoken") || !strings.Contains(out.String(), "404") {
		t.Errorf("log:\n%s", out.String())
	}
}

func TestBadResource(t *testing.T) {
	clean(t)
	t.Setenv("OTEL_RESOURCE_ATTRIBUTES", "no equals sign")
	_, err := telemetry.Start(t.Context(), telemetry.Config{Service: "s", Log: slog.New(slog.DiscardHandler)})
	if err == nil {
		t.Error("a malformed environment went unnoticed")
	}
}
