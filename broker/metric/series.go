package metric

import (
	"context"
	"sync"
	"time"

	"go.opentelemetry.io/otel/attribute"
	otelmetric "go.opentelemetry.io/otel/metric"

	"github.com/ownllm/ownllm/schemas"
)

// Series records the requests of one operation, provider and model.
type Series struct {
	instruments *Instruments
	attributes  []attribute.KeyValue

	add    []otelmetric.AddOption
	record []otelmetric.RecordOption
	input  []otelmetric.RecordOption
	output []otelmetric.RecordOption

	mu       sync.RWMutex // guards failures
	failures map[schemas.Code][]otelmetric.RecordOption
}

func newSeries(i *Instruments, key seriesKey) *Series {
	s := &Series{
		instruments: i,
		attributes: []attribute.KeyValue{
			attrOperation.String(key.operation),
			attrProvider.String(key.provider),
			attrModel.String(key.model),
		},
		failures: make(map[schemas.Code][]otelmetric.RecordOption),
	}
	s.record = s.with()
	s.add = []otelmetric.AddOption{otelmetric.WithAttributeSet(attribute.NewSet(s.attributes...))}
	s.input = s.with(attrTokenType.String("input"))
	s.output = s.with(attrTokenType.String("output"))
	return s
}

// with returns the options of the series' attributes and the further ones.
func (s *Series) with(further ...attribute.KeyValue) []otelmetric.RecordOption {
	all := append(append([]attribute.KeyValue(nil), s.attributes...), further...)
	return []otelmetric.RecordOption{otelmetric.WithAttributeSet(attribute.NewSet(all...))}
}

// outcome returns the options for a request that ended with the code.
func (s *Series) outcome(code schemas.Code) []otelmetric.RecordOption {
	if code == CodeOK {
		return s.record
	}
	code = bounded(code)
	s.mu.RLock()
	options := s.failures[code]
	s.mu.RUnlock()
	if options != nil {
		return options
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	options = s.with(attrErrorType.String(string(code)))
	s.failures[code] = options
	return options
}

// Queued counts a job into the queue: its owner has published it. Each is followed
// by one Dequeued or Unqueued.
func (s *Series) Queued(ctx context.Context) {
	if s != nil {
		s.instruments.queueDepth.Add(ctx, 1, s.add...)
	}
}

// Dequeued counts a job out of the queue: a claim was granted after wait.
func (s *Series) Dequeued(ctx context.Context, wait time.Duration) {
	if s == nil {
		return
	}
	s.instruments.queueDepth.Add(ctx, -1, s.add...)
	s.instruments.queueWait.Record(ctx, seconds(wait), s.record...)
}

// Unqueued counts a job out of the queue that nobody ever claimed.
func (s *Series) Unqueued(ctx context.Context) {
	if s != nil {
		s.instruments.queueDepth.Add(ctx, -1, s.add...)
	}
}

// FirstToken records the time from the arrival of a request to the first token that
// left for its client.
func (s *Series) FirstToken(ctx context.Context, d time.Duration) {
	if s != nil {
		s.instruments.serverFirstToken.Record(ctx, seconds(d), s.record...)
	}
}

// Reply is how a request went, as its owner saw it.
type Reply struct {
	// Code is CodeOK, CodeClientGone or a code of the contract.
	Code schemas.Code
	// Duration runs from the arrival of the request to the end of the reply.
	Duration time.Duration
	// FirstToken runs from the arrival to the first token, 0 if none came.
	FirstToken time.Duration
	// Usage is what the reply burnt.
	Usage schemas.Usage
}

// Replied records a request that reached a worker and ended: its duration, its
// tokens, and the mean time for each token after the first.
func (s *Series) Replied(ctx context.Context, r Reply) {
	if s == nil {
		return
	}
	s.instruments.serverDuration.Record(ctx, seconds(r.Duration), s.outcome(r.Code)...)
	if r.Usage.PromptTokens > 0 {
		s.instruments.tokens.Record(ctx, int64(r.Usage.PromptTokens), s.input...)
	}
	if r.Usage.CompletionTokens > 0 {
		s.instruments.tokens.Record(ctx, int64(r.Usage.CompletionTokens), s.output...)
	}
	if after := r.Usage.CompletionTokens - 1; r.FirstToken > 0 && after > 0 {
		s.instruments.serverPerToken.Record(ctx, seconds(r.Duration-r.FirstToken)/float64(after), s.record...)
	}
}

// BackendChunk records how long a worker waited for the first chunk of its backend.
func (s *Series) BackendChunk(ctx context.Context, d time.Duration) {
	if s != nil {
		s.instruments.backendFirstChunk.Record(ctx, seconds(d), s.record...)
	}
}

// BackendCalled records a worker's call of its backend, from the request to the end
// of the reply.
func (s *Series) BackendCalled(ctx context.Context, d time.Duration, code schemas.Code) {
	if s != nil {
		s.instruments.backendDuration.Record(ctx, seconds(d), s.outcome(code)...)
	}
}
