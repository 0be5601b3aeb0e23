package worker_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker"
	"github.com/ownllm/ownllm/worker/backend"
	"github.com/ownllm/ownllm/worker/demo"
)

// aside is who is told while there is no bus.
type aside struct {
	mu    sync.Mutex
	heard []schemas.Heartbeat
	err   error
	wait  bool // never answers
}

func (a *aside) Beat(ctx context.Context, hb schemas.Heartbeat) error {
	a.mu.Lock()
	a.heard = append(a.heard, hb)
	err, wait := a.err, a.wait
	a.mu.Unlock()
	if wait {
		<-ctx.Done()
		return ctx.Err()
	}
	return err
}

func (a *aside) set(wait bool, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.wait, a.err = wait, err
}

func (a *aside) list() []schemas.Heartbeat {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]schemas.Heartbeat(nil), a.heard...)
}

// While the bus is away, and only then, the worker is heard of beside it, once a second,
// with its inventory the first time.
func TestBeatsBesideTheBus(t *testing.T) {
	t.Parallel()
	told := &aside{}
	h := newHouse(t, worker.Config{Aside: told, Backends: []backend.Config{{URL: newServer(t, demo.Options{}).URL}}})
	if n := len(told.list()); n != 0 {
		t.Errorf("%d beats beside a bus that is there", n)
	}
	var start time.Time
	h.nats.Restart(func() {
		start = time.Now()
		until(t, "three beats", func() bool { return len(told.list()) >= 3 })
	})
	if took := time.Since(start); took < 1500*time.Millisecond {
		t.Errorf("three beats within %s", took)
	}
	until(t, "the worker to be back", func() bool {
		return h.tokens.IsConnected() && h.core.IsConnected() && h.feed.Ready() && h.status().State == schemas.AgentUp
	})
	list := told.list()
	for i, hb := range list {
		if hb.Version != schemas.ProtocolVersion || hb.State != schemas.AgentUp || hb.Incarnation != list[0].Incarnation ||
			hb.Hash == "" || (hb.Inventory != nil) != (i == 0) || i == 0 && len(hb.Inventory.Models) == 0 {
			t.Errorf("beat %d: %+v", i, hb)
		}
	}

	// Who doesn't answer delays nothing, and who turns the worker away isn't pressed.
	told.set(true, nil)
	h.nats.Restart(func() { until(t, "a beat", func() bool { return len(told.list()) > len(list) }) })
	until(t, "the worker to be back", func() bool {
		return h.tokens.IsConnected() && h.core.IsConnected() && h.feed.Ready() && h.status().State == schemas.AgentUp
	})
	c := h.start(request("demo", true, numbered(20, 100*time.Millisecond)))
	c.wantNumbered(20)

	told.set(false, schemas.Errorf(schemas.CodeKeyInvalid, "removed"))
	until(t, "calm", func() bool { n := len(told.list()); time.Sleep(1200 * time.Millisecond); return n == len(told.list()) })
	before := len(told.list())
	h.nats.Restart(func() {
		until(t, "a beat", func() bool { return len(told.list()) > before })
		time.Sleep(2500 * time.Millisecond) // that nothing comes has no signal
	})
	if n := len(told.list()); n != before+1 {
		t.Errorf("%d beats to one who turns the worker away", n-before)
	}
}

// A worker that ends without a bus says goodbye beside it.
func TestByeBesideTheBus(t *testing.T) {
	t.Parallel()
	told := &aside{}
	h := newHouse(t, worker.Config{Aside: told, Backends: []backend.Config{{URL: newServer(t, demo.Options{}).URL}}})
	h.nats.Restart(func() {
		until(t, "a beat", func() bool { return len(told.list()) > 0 })
		h.stop()
	})
	list := told.list()
	if last := list[len(list)-1]; last.State != schemas.AgentBye {
		t.Errorf("last %+v", last)
	}
}
