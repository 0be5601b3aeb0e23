package worker_test

import (
	"testing"
	"time"

	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker"
	"github.com/ownllm/ownllm/worker/backend"
	"github.com/ownllm/ownllm/worker/demo"
)

// A worker that gathers frames and a real owner: each reply is whole, whatever the others do.
func TestRepliesInBundles(t *testing.T) {
	t.Parallel()
	s := newServer(t, demo.Options{Models: models("demo")})
	const replies = 12
	h := newHouseWith(t, worker.Config{Backends: []backend.Config{{URL: s.URL, Slots: 2 * replies}}, Drain: patience}, (*worker.Worker).GatherAlways)
	spy := h.nats.Connect("spy")
	bundles, err := spy.SubscribeSync(schemas.BundleSubject(agent, h.d.Owner()))
	if err != nil {
		t.Fatal(err)
	}
	if err := spy.Flush(); err != nil {
		t.Fatal(err)
	}
	var whole []*chat
	for range replies {
		whole = append(whole, h.start(request("demo", true, numbered(100, time.Second))))
	}
	left := h.start(request("demo", true, numbered(1e6, 1e5*time.Second)))
	broken := h.start(request("demo", true, map[string]any{"numbered": true, "tokens": 100, "tokens_per_second": 100, "die_after": 50}))
	left.begin().reply.Close()
	for _, c := range whole {
		c.wantNumbered(100)
	}
	if err := broken.end(); err == nil || err.Code != schemas.CodeBackendError {
		t.Errorf("a backend that breaks off ends with %v", err)
	}
	until(t, "an empty queue", func() bool { return h.depth() == 0 })
	if n, _, err := bundles.Pending(); err != nil || n == 0 {
		t.Errorf("%d bundles were sent, %v", n, err)
	}
}
