package telemetry_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/trace"
	"github.com/ownllm/ownllm/internal/logtest"
	"github.com/ownllm/ownllm/internal/secret"
	"github.com/ownllm/ownllm/internal/sentrytest"
	"github.com/ownllm/ownllm/internal/telemetry"
)

// reporter returns a logger that reports, what it writes, and how to end it.
func reporter(t *testing.T, dsn string, level slog.Level) (log *slog.Logger, written *logtest.Book, flush func() error) {
	t.Helper()
	for _, name := range []string{"SENTRY_DSN", "SENTRY_RELEASE", "SENTRY_ENVIRONMENT"} {
		t.Setenv(name, "")
	}
	t.Cleanup(http.DefaultClient.CloseIdleConnections)
	written = new(logtest.Book)
	log, err := telemetry.NewLogger(written, level, telemetry.FormatJSON)
	if err != nil {
		t.Fatal(err)
	}
	r, err := telemetry.StartReporter(telemetry.ReporterConfig{DSN: dsn, Role: "ownllm-test", Release: "v1.2.3", Log: log})
	if err != nil {
		t.Fatal(err)
	}
	return r.Logger(log), written, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 4*time.Second)
		defer cancel()
		return r.Close(ctx)
	}
}

func TestReport(t *testing.T) {
	s := sentrytest.Start(t)
	log, written, flush := reporter(t, s.DSN, slog.LevelInfo)
	ctx := trace.Extract(t.Context(), map[string][]string{
		"traceparent": {"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
	})
	log.Warn("not an error")
	log.With("component", "dispatch", "text", "of Postgres").ErrorContext(ctx, "request failed",
		"request", "req_1", "tenant", "tnt_1", "key", "key_1", "agent", "", "address", "192.0.2.1:4222", "count", 3,
		"owner", secret.String("canary"), "error", fmt.Errorf("claim job: %w", errors.New("connection reset")))
	if err := flush(); err != nil {
		t.Fatal(err)
	}
	events := s.Events()
	if len(events) != 1 {
		t.Fatalf("%d reports, want 1", len(events))
	}
	e := events[0]
	want := map[string]string{
		"role": "ownllm-test", "request": "req_1", "tenant": "tnt_1", "key": "key_1", "component": "dispatch", "owner": "[redacted]",
		"trace_id": "0af7651916cd43dd8448eb211c80319c",
	}
	for key, value := range want {
		if e.Tags[key] != value {
			t.Errorf("the tag %s is %q, want %q", key, e.Tags[key], value)
		}
	}
	if len(e.Tags) != len(want) {
		t.Errorf("tags %v", e.Tags)
	}
	if e.Title() != "request failed" || e.Exception[0].Value != "claim job: connection reset" || e.Exception[0].Stacktrace != nil {
		t.Errorf("exception %+v", e.Exception)
	}
	if e.Level != "error" || e.Release != "v1.2.3" || e.User.ID != "key_1" || e.Contexts["details"]["count"] != "3" ||
		e.Contexts["trace"]["span_id"] != "b7ad6b7169203331" || !slices.Equal(e.Fingerprint, []string{"ownllm-test", "request failed"}) {
		t.Errorf("report %+v", e)
	}
	for _, canary := range []string{"canary", "192.0.2.1", "of Postgres"} {
		if strings.Contains(s.Raw(), canary) {
			t.Errorf("the report holds %q", canary)
		}
	}
	for _, line := range []string{"not an error", "connection reset", "192.0.2.1"} {
		if !strings.Contains(written.String(), line) {
			t.Errorf("the log lacks %q: %s", line, written)
		}
	}
}

// A panic's report has the stack up to where it was raised.
func TestReportOfPanic(t *testing.T) {
	s := sentrytest.Start(t)
	log, written, flush := reporter(t, s.DSN, slog.LevelError+1) // nobody reads the log
	func() {
		defer func() { log.Error("panic", "error", recover(), "stack", "as text") }()
		raise()
	}()
	if err := flush(); err != nil {
		t.Fatal(err)
	}
	events := s.Events()
	if len(events) != 1 || events[0].Exception[0].Stacktrace == nil {
		t.Fatalf("reports %+v", events)
	}
	frames := events[0].Exception[0].Stacktrace.Frames
	if last := frames[len(frames)-1].Function; last != "raise" || events[0].Exception[0].Value != "raised" {
		t.Errorf("it was raised in %s: %+v", last, events[0].Exception)
	}
	if len(events[0].Fingerprint) != 0 {
		t.Errorf("panics are taken for one by %v", events[0].Fingerprint)
	}
	if written.String() != "" {
		t.Errorf("the log has %s", written)
	}
}

//go:noinline
func raise() { panic("raised") }

// An outage is reported, but not with every request that fails.
func TestReportsAreFew(t *testing.T) {
	s := sentrytest.Start(t)
	log, written, flush := reporter(t, s.DSN, slog.LevelInfo)
	const requests = 5000
	for range requests {
		log.Error("request failed", "error", "database is down")
	}
	for i := range 1000 { // and as many others
		log.Error(fmt.Sprint("server says ", i)) //nolint:sloglint // as what nats-server says
	}
	if err := flush(); err != nil {
		t.Fatal(err)
	}
	same, all := 0, len(s.Events())
	for _, e := range s.Events() {
		if e.Title() == "request failed" {
			same++
		}
	}
	if same < 1 || same > 10 || all < 20 || all > 70 {
		t.Errorf("%d reports of the same failure, %d of all, want a few", same, all)
	}
	if n := written.Count("\n"); n != requests+1000 {
		t.Errorf("%d lines are in the log", n)
	}
}

// Nobody waits for a Sentry that isn't there, and the log says so, once.
func TestSentryIsAway(t *testing.T) {
	s := sentrytest.Start(t)
	refuses := s.DSN
	s.Answer(http.StatusInternalServerError)
	away := "http://key@127.0.0.1:1/1"
	for _, dsn := range []string{refuses, away} {
		log, written, flush := reporter(t, dsn, slog.LevelInfo)
		began := time.Now()
		for i := range 20 {
			log.Error(fmt.Sprint("failure ", i)) //nolint:sloglint // different ones
		}
		if took := time.Since(began); took > 3*time.Second {
			t.Errorf("20 failures took %s to log", took)
		}
		if err := flush(); err != nil {
			t.Error(err)
		}
		if n := written.Count("doesn't take reports"); n != 1 {
			t.Errorf("the log says %d times that nobody takes the reports: %s", n, written)
		}
	}
}

// A Sentry that takes reports and never answers holds the end up for as long as it was given.
func TestSentryHangs(t *testing.T) {
	block := make(chan struct{})
	web := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-block }))
	t.Cleanup(web.Close)
	log, _, flush := reporter(t, strings.Replace(web.URL, "://", "://key@", 1)+"/1", slog.LevelInfo)
	log.Error("failure")
	began := time.Now()
	err := flush()
	if took := time.Since(began); err == nil || took < 3*time.Second || took > 15*time.Second {
		t.Errorf("the end took %s, %v", took, err)
	}
	close(block)
}

func TestCheckDSN(t *testing.T) {
	for _, dsn := range []string{"https://key@o1.ingest.example.com/42", "http://key:secret@127.0.0.1:9000/path/42"} {
		if err := telemetry.CheckDSN(dsn); err != nil {
			t.Errorf("%s: %v", dsn, err)
		}
	}
	for _, dsn := range []string{"", "canary", "https://example.com/42", "https://canary@example.com/", "ftp://canary@example.com/42", "https://canary@:x/1", "\x00canary"} {
		err := telemetry.CheckDSN(dsn)
		if err == nil || strings.Contains(err.Error(), "canary") {
			t.Errorf("%q: %v", dsn, err)
		}
		if _, err := telemetry.StartReporter(telemetry.ReporterConfig{DSN: dsn, Log: slog.New(slog.DiscardHandler)}); err == nil {
			t.Errorf("%q: it reports", dsn)
		}
	}
}
