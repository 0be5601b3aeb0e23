// Package metric defines what OwnLLM measures, in one place for edge, broker and
// worker: the GenAI metrics of OpenTelemetry and the few of our own.
//
// # What it promises
//
// Recording allocates nothing: the attribute sets are built once for each
// (operation, provider, model) and kept. Cardinality is bounded: at most maxSeries
// such triples exist, further ones share one series under the name "_other", and
// error codes come from the contract's table. No label holds an agent, a tenant or
// a key: which of them a number belongs to is in the logs and traces.
//
// A nil *Instruments and a nil *Series are valid and discard what they are told, so
// a part that isn't measured, say in a test, needs no special case.
package metric

import (
	"context"
	"errors"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/otel/attribute"
	otelmetric "go.opentelemetry.io/otel/metric"

	"github.com/ownllm/ownllm/schemas"
)

// Scope is the name of the instrumentation scope of everything that OwnLLM
// measures and traces.
const Scope = "github.com/ownllm/ownllm"

// The metrics of our own.
const (
	// NameRequests counts requests that ended, by operation and code.
	NameRequests = "ownllm.requests"
	// NameRequestActive is how many requests are in flight.
	NameRequestActive = "ownllm.request.active"
	// NameStreamActive is how many streaming replies are open.
	NameStreamActive = "ownllm.stream.active"
	// NameAdmission is how long the books took to admit or refuse a request, in seconds,
	// and NameTopUps counts the times that a reply in mid-stream was given more tokens, or
	// was refused them.
	NameAdmission = "ownllm.admission.duration"
	NameTopUps    = "ownllm.top_ups"
	// NameQueueWait is how long a job waited until a worker's claim was granted, in
	// seconds.
	NameQueueWait = "ownllm.queue.wait"
	// NameQueueDepth is how many jobs of this owner wait for a claim.
	NameQueueDepth = "ownllm.queue.depth"
	// NameFailovers counts the attempts after a request's first.
	NameFailovers = "ownllm.failovers"
	// NameDropped counts the requests of publishers that couldn't be answered, by reason:
	// DropNoReply or DropForeignReply.
	NameDropped = "ownllm.ingress.dropped"
	// NameSubmissions counts the submissions that this process has ended, by code, and
	// NameSubmissionActive is how many it runs. NameSubmissionWaiting is how many wait, and
	// NameSubmissionOldest for how long the oldest of them has, in seconds: these two are of
	// all brokers, and each tells the same.
	NameSubmissions       = "ownllm.submissions"
	NameSubmissionActive  = "ownllm.submission.active"
	NameSubmissionWaiting = "ownllm.submission.waiting"
	NameSubmissionOldest  = "ownllm.submission.oldest"

	// NameAgents is how many agents this process knows of, by state: those of a
	// heartbeat, or StateAside or StateAway.
	NameAgents = "ownllm.agents"

	attrCode  = attribute.Key("code")
	attrState = attribute.Key("state")
)

// The two outcomes of a request that aren't codes of the contract.
const (
	// CodeOK is a reply that was delivered whole.
	CodeOK schemas.Code = "ok"
	// CodeClientGone is a client that left before the end.
	CodeClientGone schemas.Code = "client_gone"
)

// Why a request of a publisher couldn't be answered.
const (
	// DropNoReply is one without a reply subject.
	DropNoReply = "no_reply"
	// DropForeignReply is one whose reply subject isn't in the inbox of its key.
	DropForeignReply = "foreign_reply"
)

const (
	// maxSeries bounds the triples of operation, provider and model that get a series
	// of their own. Model ids come from workers, so they are not ours to trust.
	maxSeries = 256
	other     = "_other"
)

// bucketsWait spans from a worker that is already pulling to the deadline of a
// first token.
var bucketsWait = []float64{0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120}

type seriesKey struct{ operation, provider, model string }

type outcomeKey struct {
	operation string
	code      schemas.Code
}

// Instruments are the instruments of one process. All methods may be called from
// several goroutines.
type Instruments struct {
	requests      otelmetric.Int64Counter
	requestActive otelmetric.Int64UpDownCounter
	streamActive  otelmetric.Int64UpDownCounter
	failovers     otelmetric.Int64Counter
	dropped       otelmetric.Int64Counter
	topUps        otelmetric.Int64Counter

	submissions       otelmetric.Int64Counter
	submissionActive  otelmetric.Int64UpDownCounter
	submissionWaiting otelmetric.Int64Gauge
	submissionOldest  otelmetric.Float64Gauge

	admission  otelmetric.Float64Histogram
	queueWait  otelmetric.Float64Histogram
	queueDepth otelmetric.Int64UpDownCounter

	serverDuration    otelmetric.Float64Histogram
	serverFirstToken  otelmetric.Float64Histogram
	serverPerToken    otelmetric.Float64Histogram
	tokens            otelmetric.Int64Histogram
	backendDuration   otelmetric.Float64Histogram
	backendFirstChunk otelmetric.Float64Histogram

	overflow *Series

	mu       sync.RWMutex // guards the two maps below
	series   map[seriesKey]*Series
	outcomes map[outcomeKey][]otelmetric.AddOption
}

// New makes the instruments with the meter of the provider that is named Scope.
func New(provider otelmetric.MeterProvider) (*Instruments, error) {
	var (
		m    = provider.Meter(Scope)
		errs []error
	)
	counter := func(name, unit, text string) otelmetric.Int64Counter {
		c, err := m.Int64Counter(name, otelmetric.WithUnit(unit), otelmetric.WithDescription(text))
		errs = append(errs, err)
		return c
	}
	level := func(name, unit, text string) otelmetric.Int64UpDownCounter {
		c, err := m.Int64UpDownCounter(name, otelmetric.WithUnit(unit), otelmetric.WithDescription(text))
		errs = append(errs, err)
		return c
	}
	seconds := func(name, text string, buckets []float64) otelmetric.Float64Histogram {
		h, err := m.Float64Histogram(name, otelmetric.WithUnit("s"), otelmetric.WithDescription(text),
			otelmetric.WithExplicitBucketBoundaries(buckets...))
		errs = append(errs, err)
		return h
	}
	tokens, err := m.Int64Histogram(NameTokenUsage, otelmetric.WithUnit("{token}"),
		otelmetric.WithDescription("Tokens of a request, by type."),
		otelmetric.WithExplicitBucketBoundaries(bucketsTokens...))
	errs = append(errs, err)
	waiting, err := m.Int64Gauge(NameSubmissionWaiting, otelmetric.WithUnit("{submission}"), otelmetric.WithDescription("Submissions that wait, at all brokers together."))
	errs = append(errs, err)
	oldest, err := m.Float64Gauge(NameSubmissionOldest, otelmetric.WithUnit("s"), otelmetric.WithDescription("How long the oldest submission that waits has been there."))
	errs = append(errs, err)

	i := &Instruments{
		requests:         counter(NameRequests, "{request}", "Requests that ended, by operation and code."),
		requestActive:    level(NameRequestActive, "{request}", "Requests in flight."),
		streamActive:     level(NameStreamActive, "{stream}", "Streaming replies that are open."),
		failovers:        counter(NameFailovers, "{attempt}", "Attempts after the first of a request."),
		dropped:          counter(NameDropped, "{request}", "Requests of publishers that couldn't be answered, by reason."),
		topUps:           counter(NameTopUps, "{request}", "Times that a reply was given more tokens in mid-stream, or refused them."),
		admission:        seconds(NameAdmission, "Time that the books took to admit or refuse a request.", bucketsWait),
		submissions:      counter(NameSubmissions, "{submission}", "Submissions that ended, by code."),
		submissionActive: level(NameSubmissionActive, "{submission}", "Submissions that this process runs."),

		submissionWaiting: waiting, submissionOldest: oldest,

		queueWait:  seconds(NameQueueWait, "Time from publishing a job to granting its claim.", bucketsWait),
		queueDepth: level(NameQueueDepth, "{request}", "Jobs of this owner that wait for a claim."),

		serverDuration:    seconds(NameServerDuration, "Duration of a request, as its client sees it.", bucketsDuration),
		serverFirstToken:  seconds(NameServerFirstToken, "Time to the first token of a reply.", bucketsFirstToken),
		serverPerToken:    seconds(NameServerPerToken, "Mean time for each token after the first.", bucketsPerToken),
		tokens:            tokens,
		backendDuration:   seconds(NameBackendDuration, "Duration of a worker's call of its backend.", bucketsDuration),
		backendFirstChunk: seconds(NameBackendFirstChunk, "Time to the first chunk of a backend.", bucketsFirstToken),

		series:   make(map[seriesKey]*Series),
		outcomes: make(map[outcomeKey][]otelmetric.AddOption),
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	i.overflow = newSeries(i, seriesKey{other, other, other})
	return i, nil
}

// RequestStarted counts a request in. Each is followed by one RequestEnded.
func (i *Instruments) RequestStarted(ctx context.Context) {
	if i != nil {
		i.requestActive.Add(ctx, 1)
	}
}

// RequestEnded counts a request out, by the code that it ended with: one of the
// contract's, CodeOK or CodeClientGone. The operation is the API's ("chat").
func (i *Instruments) RequestEnded(ctx context.Context, operation string, code schemas.Code) {
	if i == nil {
		return
	}
	i.requestActive.Add(ctx, -1)
	i.requests.Add(ctx, 1, i.outcome(operation, code)...)
}

// StreamOpened counts a streaming reply in. Each is followed by one StreamClosed.
func (i *Instruments) StreamOpened(ctx context.Context) {
	if i != nil {
		i.streamActive.Add(ctx, 1)
	}
}

// StreamClosed counts a streaming reply out.
func (i *Instruments) StreamClosed(ctx context.Context) {
	if i != nil {
		i.streamActive.Add(ctx, -1)
	}
}

// Admitted records how long the books took to decide on a request.
func (i *Instruments) Admitted(ctx context.Context, took time.Duration) {
	if i != nil {
		i.admission.Record(ctx, seconds(took))
	}
}

// ToppedUp counts a reply that needed more tokens; more says whether it got them.
func (i *Instruments) ToppedUp(ctx context.Context, more bool) {
	if i == nil {
		return
	}
	if more {
		i.topUps.Add(ctx, 1, toppedUp)
	} else {
		i.topUps.Add(ctx, 1, cutShort)
	}
}

// The two ends of a top-up.
var (
	toppedUp = otelmetric.WithAttributeSet(attribute.NewSet(attribute.String("outcome", "granted")))
	cutShort = otelmetric.WithAttributeSet(attribute.NewSet(attribute.String("outcome", "refused")))
)

// Failover counts an attempt after a request's first.
func (i *Instruments) Failover(ctx context.Context) {
	if i != nil {
		i.failovers.Add(ctx, 1)
	}
}

// Dropped counts a request of a publisher that couldn't be answered, by reason:
// DropNoReply, or DropForeignReply.
func (i *Instruments) Dropped(ctx context.Context, reason string) {
	if i == nil {
		return
	}
	option := droppedForeign
	if reason == DropNoReply {
		option = droppedNoReply
	}
	i.dropped.Add(ctx, 1, option)
}

// SubmissionBegun counts in the run of a submission. Each is followed by one SubmissionLeft.
func (i *Instruments) SubmissionBegun(ctx context.Context) {
	if i != nil {
		i.submissionActive.Add(ctx, 1)
	}
}

// SubmissionLeft counts out the run of a submission.
func (i *Instruments) SubmissionLeft(ctx context.Context) {
	if i != nil {
		i.submissionActive.Add(ctx, -1)
	}
}

// SubmissionEnded counts the end of a submission: CodeOK, or the code of its error.
func (i *Instruments) SubmissionEnded(ctx context.Context, code schemas.Code) {
	if i != nil {
		i.submissions.Add(ctx, 1, i.outcome(operationSubmission, code)...)
	}
}

// operationSubmission is the operation that submissions are counted under.
const operationSubmission = "submission"

// SubmissionsWait records how many submissions wait, and for how long the oldest has.
func (i *Instruments) SubmissionsWait(ctx context.Context, n int, oldest time.Duration) {
	if i != nil {
		i.submissionWaiting.Record(ctx, int64(n))
		i.submissionOldest.Record(ctx, seconds(oldest))
	}
}

var (
	droppedNoReply = otelmetric.WithAttributeSet(attribute.NewSet(attribute.String("reason", DropNoReply)))
	droppedForeign = otelmetric.WithAttributeSet(attribute.NewSet(attribute.String("reason", DropForeignReply)))
)

// Series returns the series of one operation ("chat"), provider (the kind of
// backend: "vllm") and model. Ask for it once a request and keep it.
func (i *Instruments) Series(operation, provider, model string) *Series {
	if i == nil {
		return nil
	}
	key := seriesKey{operation, provider, model}
	i.mu.RLock()
	s, full := i.series[key], len(i.series) >= maxSeries
	i.mu.RUnlock()
	switch {
	case s != nil:
		return s
	case full:
		return i.overflow
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if s := i.series[key]; s != nil {
		return s
	}
	if len(i.series) >= maxSeries {
		return i.overflow
	}
	// The strings may be parts of a request; the series outlives it.
	key = seriesKey{strings.Clone(operation), strings.Clone(provider), strings.Clone(model)}
	s = newSeries(i, key)
	i.series[key] = s
	return s
}

func (i *Instruments) outcome(operation string, code schemas.Code) []otelmetric.AddOption {
	key := outcomeKey{operation, bounded(code)}
	i.mu.RLock()
	options := i.outcomes[key]
	i.mu.RUnlock()
	if options != nil {
		return options
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if len(i.outcomes) >= maxSeries {
		key.operation = other
	}
	options = []otelmetric.AddOption{otelmetric.WithAttributeSet(attribute.NewSet(
		attrOperation.String(key.operation), attrCode.String(string(key.code))))}
	i.outcomes[key] = options
	return options
}

// bounded keeps a code of another version out of the labels.
func bounded(code schemas.Code) schemas.Code {
	if code == CodeOK || code == CodeClientGone || code.Known() {
		return code
	}
	return schemas.CodeInternalError
}

func seconds(d time.Duration) float64 { return max(d, 0).Seconds() }
