package worker_test

import (
	"testing"
	"time"

	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker"
	"github.com/ownllm/ownllm/worker/backend"
	"github.com/ownllm/ownllm/worker/demo"
)

// A worker that stops finishes what runs, leaves what waits, and says goodbye.
func TestDrain(t *testing.T) {
	t.Parallel()
	h, s := one(t, demo.Options{}, 1)
	running := h.start(request("demo", true, numbered(30, 8*time.Second))).begin()
	atWorker := h.start(request("demo", true, numbered(3, 0)))
	until(t, "the second to wait at the worker", func() bool { return h.status().Waiting == 1 })
	queued := h.start(request("demo", true, numbered(3, 0)))
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		h.stop()
	}()
	// Nobody else has the model, so that who waits hears at once that nobody will come.
	for _, c := range []*chat{atWorker, queued} {
		if err := c.end(); err == nil || err.Code != schemas.CodeAgentOffline {
			t.Errorf("who waits for a worker that stops gets %v", err)
		}
	}
	if !running.reply.Timing().Ended.IsZero() {
		t.Error("those who wait had to wait for the one that runs")
	}
	running.wantNumbered(30)
	<-stopped
	until(t, "the goodbye", func() bool { return h.status().State == "" })
	if n := s.stats(); n.Started != 1 || n.Finished != 1 {
		t.Errorf("the backend saw %+v, want the one request", n)
	}
	until(t, "an empty queue", func() bool { return h.depth() == 0 })
}

// What doesn't end within the drain time is ended, with an error that says so.
func TestDrainThatIsOver(t *testing.T) {
	t.Parallel()
	s := newServer(t, demo.Options{})
	h := newHouse(t, worker.Config{Backends: []backend.Config{{URL: s.URL}}, Drain: 300 * time.Millisecond})
	c := h.start(request("demo", true, numbered(6000, 10*time.Minute))).begin()
	began := time.Now()
	h.stop()
	if took := time.Since(began); took < 300*time.Millisecond || took > 10*time.Second {
		t.Errorf("stopping took %s", took)
	}
	if err := c.end(); err == nil || err.Code != schemas.CodeAgentOffline {
		t.Errorf("the reply ends with %v", err)
	}
	until(t, "the backend to be free", func() bool { return s.stats().Active == 0 })
	until(t, "an empty queue", func() bool { return h.depth() == 0 })
}

// A worker stops although nobody is there to say goodbye to.
func TestStopWithoutABus(t *testing.T) {
	t.Parallel()
	s := newServer(t, demo.Options{})
	h := newHouse(t, worker.Config{Backends: []backend.Config{{URL: s.URL}}, Drain: 300 * time.Millisecond})
	c := h.start(request("demo", true, numbered(6000, 10*time.Minute))).begin()
	h.nats.Restart(func() {
		until(t, "the loss of the bus", func() bool { return !h.tokens.IsConnected() })
		began := time.Now()
		h.stop()
		if took := time.Since(began); took > 8*time.Second {
			t.Errorf("stopping took %s", took)
		}
		until(t, "the backend to be free", func() bool { return s.stats().Active == 0 })
	})
	c.reply.Close()
}
