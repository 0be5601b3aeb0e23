package telemetry

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/getsentry/sentry-go"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/time/rate"
)

// ReporterConfig says who reports, and where to.
type ReporterConfig struct {
	// DSN is the address of a project at Sentry, https://KEY@HOST/PROJECT. It is a secret.
	DSN string
	// Role is the part of OwnLLM that this process is, "ownllm-edge" say.
	Role string
	// Release is the version of the build.
	Release string
	// Log is told when Sentry doesn't take reports. It must not be one of Reporter.Logger.
	Log *slog.Logger
}

// Reporter sends to Sentry what is logged at slog.LevelError: the answers with status 500, the
// panics that were recovered, the failures of what runs in the background. A report has the
// message, the error's text, the id of the trace, and of the record's attributes those in
// reported; so it holds less than the log does, and no prompt, completion, secret, header
// or body.
//
// Nobody waits for Sentry. Reports stand in a queue of reportQueue, and what comes when it is
// full is dropped. An outage, which fails every request alike, is reported some times and then
// now and then (see flood), along with how often it wasn't.
//
// The SDK reads SENTRY_ENVIRONMENT and SENTRY_TAGS_… itself.
type Reporter struct {
	client *sentry.Client
	role   string
	flood  flood
}

const (
	reportQueue = 100
	// reportWait bounds the delivery of one report.
	reportWait = 5 * time.Second
	// reportText bounds the text of an error, in bytes.
	reportText = 2 << 10
	// complainEvery is how often the log says that Sentry takes no reports.
	complainEvery = time.Minute
)

// errDSN doesn't show the DSN, which is a secret.
var errDSN = errors.New("the DSN of Sentry doesn't look like https://KEY@HOST/PROJECT")

// CheckDSN reports what is wrong with a DSN.
func CheckDSN(dsn string) error {
	if _, err := sentry.NewDsn(dsn); err != nil {
		return errDSN
	}
	return nil
}

// StartReporter starts the delivery of reports. End it with Close. The error is that of
// CheckDSN.
func StartReporter(c ReporterConfig) (*Reporter, error) {
	if err := CheckDSN(c.DSN); err != nil {
		return nil, err
	}
	transport := sentry.NewHTTPTransport()
	transport.BufferSize, transport.Timeout = reportQueue, reportWait
	client, err := sentry.NewClient(sentry.ClientOptions{
		Dsn: c.DSN, Release: c.Release, Transport: transport,
		HTTPTransport:        &delivery{log: c.Log, complain: rate.Sometimes{First: 1, Interval: complainEvery}},
		MaxBreadcrumbs:       -1,
		DisableClientReports: true,
		Integrations: func(all []sentry.Integration) []sentry.Integration {
			return slices.DeleteFunc(all, func(i sentry.Integration) bool { return i.Name() == "Modules" }) // the release tells
		},
	})
	if err != nil {
		return nil, errDSN
	}
	return &Reporter{client: client, role: c.Role, flood: newFlood()}, nil
}

// Logger returns a logger that writes to the same place as log, and reports what is an error.
func (r *Reporter) Logger(log *slog.Logger) *slog.Logger {
	return slog.New(reporting{Handler: log.Handler(), reporter: r})
}

// Close sends what hasn't been sent, for no longer than ctx allows, and stops what
// StartReporter started. The error says that reports were lost.
func (r *Reporter) Close(ctx context.Context) error {
	sent := r.client.FlushWithContext(ctx)
	r.client.Close()
	if !sent {
		return errors.New("the last reports to Sentry are lost")
	}
	return nil
}

// reporting hands errors to the reporter, besides writing them.
type reporting struct {
	slog.Handler
	reporter *Reporter
	attrs    []slog.Attr // of the logger
}

// Enabled implements slog.Handler. Errors are reported even if nobody wants to read them in
// the log.
func (h reporting) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= slog.LevelError || h.Handler.Enabled(ctx, level)
}

// Handle implements slog.Handler.
func (h reporting) Handle(ctx context.Context, r slog.Record) error {
	if r.Level >= slog.LevelError {
		h.reporter.report(ctx, r, h.attrs)
		if !h.Handler.Enabled(ctx, r.Level) {
			return nil
		}
	}
	return h.Handler.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (h reporting) WithAttrs(attrs []slog.Attr) slog.Handler {
	return reporting{h.Handler.WithAttrs(attrs), h.reporter, append(slices.Clip(h.attrs), attrs...)}
}

// WithGroup implements slog.Handler. The house opens no groups.
func (h reporting) WithGroup(name string) slog.Handler {
	return reporting{h.Handler.WithGroup(name), h.reporter, h.attrs}
}

// reported are the attributes of a log record that a report has, by their keys, and whether
// Sentry can search by them. Texts that come from elsewhere aren't among them, nor network
// addresses.
var reported = map[string]bool{
	"request": true, "tenant": true, "key": true, "agent": true, "owner": true, "model": true,
	"operation": true, "code": true, "component": true,
	"account": false, "attempt": false, "completion_tokens": false, "connection": false, "consumer": false, "count": false,
	"duration": false, "keys": false, "kind": false, "reason": false, "state": false, "status": false, "stream": false, "subject": false,
}

// report sends a record, unless it is one too many.
func (r *Reporter) report(ctx context.Context, record slog.Record, attrs []slog.Attr) {
	suppressed, ok := r.flood.allow(record.Message, record.Time)
	if !ok {
		return
	}
	e := sentry.NewEvent()
	e.Level, e.Timestamp, e.Logger = sentry.LevelError, record.Time, "slog"
	e.Tags["role"] = r.role
	details := sentry.Context{}
	if suppressed > 0 {
		details["suppressed"] = suppressed // of the same message, since the last report
	}
	problem := sentry.Exception{Type: record.Message}
	panicked := false
	take := func(a slog.Attr) bool {
		value := a.Value.Resolve().String()
		search, ok := reported[a.Key]
		switch {
		case value == "":
		case a.Key == "error":
			problem.Value = clip(value)
		case a.Key == "stack":
			panicked = true
		case ok && search:
			e.Tags[a.Key] = clip(value)
		case ok:
			details[a.Key] = clip(value)
		}
		return true
	}
	for _, a := range attrs {
		take(a)
	}
	record.Attrs(take)
	if sc := trace.SpanContextFromContext(ctx); sc.IsValid() {
		e.Tags["trace_id"] = sc.TraceID().String()
		e.Contexts["trace"] = sentry.Context{"trace_id": sc.TraceID().String(), "span_id": sc.SpanID().String()}
	}
	e.User.ID = e.Tags["key"] // so that Sentry counts who is affected
	e.Contexts["details"] = details
	if panicked {
		problem.Stacktrace = sentry.NewStacktrace() // who logs a panic is still in it
	} else {
		e.Fingerprint = []string{r.role, record.Message} // messages are constants
	}
	e.Exception = []sentry.Exception{problem}
	r.client.CaptureEvent(e, nil, nil)
}

// clip bounds a text.
func clip(text string) string {
	if len(text) > reportText {
		text = strings.ToValidUTF8(text[:reportText], "") + "…"
	}
	return text
}

// flood decides what is reported of errors that come in masses: of each message floodBurst at
// once and one each floodEvery, and of all together floodAllBurst and one each floodAllEvery.
type flood struct {
	mu       sync.Mutex
	all      *rate.Limiter
	messages map[string]*message
}

// message is what is known of the records with the same message.
type message struct {
	limit      *rate.Limiter
	suppressed int // since the last report
}

const (
	floodBurst, floodEvery       = 5, 30 * time.Second
	floodAllBurst, floodAllEvery = 50, 2 * time.Second
	// floodMessages bounds how many are known; then all are forgotten. Only what
	// nats-server says isn't constant.
	floodMessages = 256
)

func newFlood() flood {
	return flood{all: rate.NewLimiter(rate.Every(floodAllEvery), floodAllBurst), messages: make(map[string]*message)}
}

// allow reports whether a record is to be reported, and how many with the same message weren't
// since the last one.
func (f *flood) allow(text string, now time.Time) (suppressed int, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.messages[text]
	if m == nil {
		if len(f.messages) >= floodMessages {
			clear(f.messages)
		}
		m = &message{limit: rate.NewLimiter(rate.Every(floodEvery), floodBurst)}
		f.messages[text] = m
	}
	if !m.limit.AllowN(now, 1) || !f.all.AllowN(now, 1) {
		m.suppressed++
		return 0, false
	}
	suppressed, m.suppressed = m.suppressed, 0
	return suppressed, true
}

// delivery says in the log, now and then, that Sentry doesn't take reports.
type delivery struct {
	log      *slog.Logger
	complain rate.Sometimes
}

// RoundTrip implements http.RoundTripper.
func (d *delivery) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := http.DefaultTransport.RoundTrip(req)
	problem := err
	if err == nil && resp.StatusCode >= http.StatusBadRequest {
		problem = fmt.Errorf("status %d", resp.StatusCode)
	}
	if problem != nil {
		d.complain.Do(func() { d.log.Warn("Sentry doesn't take reports", "error", problem) })
	}
	return resp, err
}
