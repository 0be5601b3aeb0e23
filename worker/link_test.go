package worker_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// A worker that loses its link takes the next job at once when it is back: what it asked for
// before swallows none.
func TestFirstJobAfterALostLink(t *testing.T) {
	t.Parallel()
	h, s := one(t, demo.Options{}, 1)
	system := h.nats.System()
	cut := func() {
		disconnect(t, system, agent)
	}
	for name, lose := range map[string]func(){
		"cut": cut,
		"renewed": func() { // as after a hello with a model that is new
			before := h.tokens.Stats().Reconnects
			if err := h.tokens.Publish("not.allowed", nil); err != nil {
				t.Fatal(err)
			}
			until(t, "a new connection", func() bool { return h.tokens.Stats().Reconnects > before })
		},
		"cut while one job runs, and another waits": func() {
			first := h.start(request("demo", true, numbered(20, 2*time.Second))).begin()
			second := h.start(request("demo", true, numbered(3, 0)))
			until(t, "the second job to be with the worker", func() bool { return h.status().Waiting == 1 })
			cut()
			first.wantNumbered(20)
			second.wantNumbered(3)
			until(t, "the backend to be free", func() bool { return s.stats().Active == 0 })
		},
	} {
		lose()
		until(t, "the worker to be back", h.tokens.IsConnected)
		began := time.Now()
		h.start(request("demo", true, numbered(3, 0))).wantNumbered(3)
		if took := time.Since(began); took > bus.AckWait/3 {
			t.Errorf("%s: the next job takes %s", name, took)
		}
	}
}

// A model that is removed and comes back takes its next job at once, too, though its queue was
// left in the middle of work.
func TestFirstJobOfAModelThatIsBack(t *testing.T) {
	t.Parallel()
	h, s := one(t, demo.Options{Models: models("demo", "stays")}, 2)
	for round := range 6 {
		busy, stop := context.WithCancel(t.Context())
		var asking sync.WaitGroup
		for range 2 {
			asking.Go(func() {
				for busy.Err() == nil {
					began := time.Now()
					c, err := h.ask(request("demo", true, numbered(2, 0)))
					if err == nil {
						err = c.end()
					}
					if err != nil && err.Code != schemas.CodeModelNotFound {
						t.Errorf("round %d: %v", round, err)
					}
					if took := time.Since(began); took > bus.AckWait/3 {
						t.Errorf("round %d: a job on the way takes %s and ends with %v", round, took, err)
					}
				}
			})
		}
		s.demo.Store(demo.New(demo.Options{Models: models("stays")}))
		until(t, "the model to be gone", func() bool { return h.state("demo") == "" })
		s.demo.Store(demo.New(demo.Options{Models: models("demo", "stays")}))
		until(t, "the model to be back", func() bool { return h.state("demo") == schemas.ModelReady })
		began := time.Now()
		h.start(request("demo", true, numbered(3, 0))).wantNumbered(3)
		if took := time.Since(began); took > bus.AckWait/3 {
			t.Errorf("round %d: the next job takes %s", round, took)
		}
		stop()
		asking.Wait()
	}
}
