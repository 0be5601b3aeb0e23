package worker_test

import (
	"context"
	"testing"
	"time"

	"github.com/ownllm/ownllm/internal/natstest"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker"
	"github.com/ownllm/ownllm/worker/backend"
	"github.com/ownllm/ownllm/worker/demo"
)

// A later worker of an agent takes over, and earlier ones stop by themselves.
func TestReplacedWorker(t *testing.T) {
	t.Parallel()
	s := newServer(t, demo.Options{})
	h := newHouse(t, worker.Config{Backends: []backend.Config{{URL: s.URL, Slots: 1}}, Drain: patience})
	fresh := func() *worker.Worker {
		return worker.New(h.nats.Agent(tenant, agent), newBulk(t, h.nats), worker.Config{
			Tenant: tenant, Agent: agent, Host: "host", Software: "test",
			Backends: []backend.Config{{URL: s.URL, Slots: 1}}, Drain: patience,
		}, natstest.Log)
	}
	first := h.status().Incarnation
	ended := make(chan error, 1)
	go func() { ended <- fresh().Run(context.Background()) }()
	until(t, "the second worker to take over", func() bool { return h.status().Incarnation > first })
	second := h.status().Incarnation
	background(t, fresh().Run)
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Fatal("the second worker goes on")
	}
	until(t, "the third worker to be there", func() bool {
		a := h.status()
		return a.State == schemas.AgentUp && a.Incarnation > second
	})
	h.start(request("demo", true, numbered(3, 0))).wantNumbered(3)
}
