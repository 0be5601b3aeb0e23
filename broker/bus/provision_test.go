package bus_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/internal/natstest"
	"github.com/ownllm/ownllm/schemas"
)

// Brokers provision the same over and over, also what an earlier build made, and take
// nothing back that a later one, or one with more copies, has made.
func TestProvisionTakesNothingBack(t *testing.T) {
	nc, q := natstest.Start(t).Queue(2)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	cfg := bus.QueueConfig{PerModel: 7, MaxAge: time.Hour, Replicas: 1}
	version := func(name string) string {
		stream, err := js.Stream(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		return stream.CachedInfo().Config.Metadata["ownllm.version"]
	}
	// alter has a stream say that another build made it.
	alter := func(name, version string) {
		stream, err := js.Stream(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		changed := stream.CachedInfo().Config
		changed.Metadata = map[string]string{}
		if version != "" {
			changed.Metadata["ownllm.version"] = version
		}
		if _, err := js.UpdateStream(t.Context(), changed); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := q.Provision(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{schemas.JobStream, schemas.UsageStream} {
		if got := version(name); got != "1" {
			t.Errorf("%s is of version %q", name, got)
		}
		alter(name, "") // as it was before there were versions
		if err := q.Provision(t.Context(), cfg); err != nil || version(name) != "1" {
			t.Errorf("%s from before: %v, version %q", name, err, version(name))
		}
		for _, later := range []string{"2", "later"} {
			alter(name, later)
			err := q.Provision(t.Context(), cfg)
			if !errors.Is(err, bus.ErrNewerStream) || !strings.Contains(err.Error(), name) {
				t.Errorf("%s of version %s: %v", name, later, err)
			}
			if got := version(name); got != later {
				t.Errorf("%s of version %s became %q", name, later, got)
			}
		}
		alter(name, "1")
	}
}
