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
	for _, name := range []string{schemas.JobStream(agentA), schemas.UsageStream} {
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

// The one stream of a build before there were shards goes once it is empty, and not before.
func TestOldStreamIsRetired(t *testing.T) {
	server := natstest.Start(t)
	nc := server.Core("old")
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	old, err := js.CreateStream(t.Context(), jetstream.StreamConfig{
		Name: "OWNLLM_JOBS", Subjects: []string{schemas.JobSubjects}, Retention: jetstream.WorkQueuePolicy,
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.Publish(t.Context(), schemas.Prefix+"job.ten_1.agt_1.m", []byte("a job")); err != nil {
		t.Fatal(err)
	}
	q, err := bus.NewQueue(nc)
	if err != nil {
		t.Fatal(err)
	}
	cfg := bus.QueueConfig{PerModel: 7, MaxAge: time.Hour, Replicas: 1}
	if err := q.Provision(t.Context(), cfg); !errors.Is(err, bus.ErrOldStream) {
		t.Fatalf("with a job in the old stream: %v", err)
	}
	if info, err := old.Info(t.Context()); err != nil || info.State.Msgs != 1 {
		t.Fatalf("the old stream is %+v, %v", info, err)
	}
	if err := old.Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := q.Provision(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := js.Stream(t.Context(), "OWNLLM_JOBS"); !errors.Is(err, jetstream.ErrStreamNotFound) {
		t.Errorf("the old stream is still there: %v", err)
	}
}
