package bus_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/internal/natstest"
	"github.com/ownllm/ownllm/schemas"
)

// A stream takes 1,000 consumers unless that is raised, and file-backed ones make the
// server stop slowly, ten milliseconds for each.
func TestManyConsumers(t *testing.T) {
	server := natstest.Start(t)
	_, q := server.Queue(10)
	const models = 1100
	for i := range models {
		if _, err := q.EnsureConsumer(t.Context(), tenant, agentA, fmt.Sprintf("model-%d", i)); err != nil {
			t.Fatalf("consumer %d: %v", i, err)
		}
	}
	start := time.Now()
	server.Restart(nil)
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("a server with %d consumers took %s to restart", models, took)
	}
}

// What is published while the bus is away is refused at once, and never arrives late:
// a token or a heartbeat from before would be taken for one of now.
func TestNothingStaleIsReplayed(t *testing.T) {
	server := natstest.Start(t)
	nc := server.Connect("publisher")
	server.Restart(func() {
		deadline := time.Now().Add(patience)
		for nc.IsConnected() {
			if time.Now().After(deadline) {
				t.Fatal("the loss of the server wasn't noticed")
			}
		}
		if err := nc.Publish("x", []byte("stale")); !bus.Down(err) {
			t.Errorf("publish without a server: got %v, want an error that says that the bus is down", err)
		}
	})
	listener := server.Connect("listener")
	sub, err := listener.SubscribeSync("x")
	if err != nil {
		t.Fatal(err)
	}
	if err := listener.Flush(); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(patience)
	for nc.Publish("x", []byte("fresh")) != nil {
		if time.Now().After(deadline) {
			t.Fatal("the publisher didn't come back")
		}
	}
	m, err := sub.NextMsg(patience)
	if err != nil {
		t.Fatal(err)
	}
	if string(m.Data) != "fresh" {
		t.Errorf("got %q", m.Data)
	}
}

// Two tenants that choose the same request id don't swallow each other's jobs:
// deduplication ids are unique in the whole stream.
func TestTenantsDontShareIDs(t *testing.T) {
	_, q := natstest.Start(t).Queue(10)
	for _, other := range []schemas.TenantID{"ten_1", "ten_2"} {
		j := job("req_same", 1)
		j.Tenant = other
		if _, err := q.Publish(t.Context(), agentA, j, "{}", map[string][]string{}); err != nil {
			t.Errorf("%s: %v", other, err)
		}
	}
}

// A job leaves the queue when its time is over, even if nobody ever takes it, and even if that
// was before it got there.
func TestJobsExpire(t *testing.T) {
	nc, q := natstest.Start(t).Queue(10)
	name, err := q.EnsureConsumer(t.Context(), tenant, agentA, model)
	if err != nil {
		t.Fatal(err)
	}
	for id, left := range map[string]time.Duration{"req_1": 500 * time.Millisecond, "req_2": -time.Second} {
		j := job(id, 1)
		j.Deadline = time.Now().Add(left).UnixMilli()
		if _, err := q.Publish(t.Context(), agentA, j, "{}", map[string][]string{}); err != nil {
			t.Fatal(err)
		}
	}
	deadline := time.Now().Add(patience)
	for {
		depths, err := q.Depths(t.Context(), tenant)
		if err != nil {
			t.Fatal(err)
		}
		if len(depths) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the queue still holds %v", depths)
		}
		time.Sleep(20 * time.Millisecond)
	}
	if m := pull(t, nc, name, 200*time.Millisecond); m.Header.Get("Status") != "408" {
		t.Errorf("got %v %q, want nothing", m.Header, m.Data)
	}
}
