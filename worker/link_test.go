package worker_test

import (
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/bus"
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
			if n := s.stats().Active; n != 0 {
				t.Errorf("%d requests are still with the backend", n)
			}
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
