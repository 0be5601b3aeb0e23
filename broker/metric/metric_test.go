package metric_test

import (
	"testing"

	"go.opentelemetry.io/otel/metric/noop"

	"github.com/ownllm/ownllm/broker/metric"
)

// What is told to nobody must still be callable, in every form.
func TestDiscard(t *testing.T) {
	off, err := metric.New(noop.NewMeterProvider())
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	for name, i := range map[string]*metric.Instruments{"nil": nil, "no-op": off} {
		t.Run(name, func(*testing.T) {
			i.RequestStarted(ctx)
			i.StreamOpened(ctx)
			s := i.Series("chat", "vllm", "m")
			s.Queued(ctx)
			s.Dequeued(ctx, 1)
			s.Unqueued(ctx)
			s.FirstToken(ctx, 1)
			s.Replied(ctx, metric.Reply{})
			s.BackendChunk(ctx, 1)
			s.BackendCalled(ctx, 1, metric.CodeOK)
			i.Failover(ctx)
			i.Dropped(ctx, metric.DropNoReply)
			i.SubmissionBegun(ctx)
			i.SubmissionLeft(ctx)
			i.SubmissionEnded(ctx, metric.CodeOK)
			i.SubmissionsWait(ctx, 1, 1)
			i.StreamClosed(ctx)
			i.RequestEnded(ctx, "chat", metric.CodeOK)
		})
	}
}

func TestSeriesIsKept(t *testing.T) {
	i, err := metric.New(noop.NewMeterProvider())
	if err != nil {
		t.Fatal(err)
	}
	first := i.Series("chat", "vllm", "m")
	if i.Series("chat", "vllm", "m") != first {
		t.Error("the same triple got another series")
	}
	if i.Series("chat", "ollama", "m") == first {
		t.Error("another provider shares the series")
	}
}
