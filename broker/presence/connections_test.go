package presence

import (
	"context"
	"testing"
	"time"

	"github.com/ownllm/ownllm/schemas"
)

// watch lets the feed hear of connections that close.
func (r *rig) watch() {
	r.t.Helper()
	system := r.bus.System()
	ctx, cancel := context.WithCancel(r.t.Context())
	ended := make(chan error, 1)
	go func() { ended <- r.feed.WatchConnections(ctx, system) }()
	r.t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			r.t.Errorf("watch ended: %v", err)
		}
	})
	until(r.t, "the feed hears of connections", patience, func() bool { return system.NumSubscriptions() > 0 })
	if err := system.Flush(); err != nil {
		r.t.Fatal(err)
	}
}

// A worker whose connection closes is gone before it has missed a beat.
func TestClosedConnectionTells(t *testing.T) {
	r := newRig(t)
	r.watch()
	w, other := r.join("a", "m=ready"), r.join("b", "m=ready")
	w.stop()
	closed := time.Now()
	w.nc.Close()
	until(t, "the agent is gone", patience, func() bool { return r.isGone(w.inc) })
	at, _ := r.goneAt(w.inc)
	if took := at.Sub(closed); took > suspectAfter-200*time.Millisecond+busy {
		t.Errorf("that took %s", took)
	}
	if r.isGone(other.inc) || r.state("b") != schemas.AgentUp {
		t.Error("another agent is gone too")
	}
}

// A worker that comes back at once was never gone, and a run that has been replaced takes
// nobody with it.
func TestReconnectIsNoEnd(t *testing.T) {
	r := newRig(t)
	r.watch()
	w := r.join("a", "m=ready")
	for range 3 {
		if err := w.nc.ForceReconnect(); err != nil {
			t.Fatal(err)
		}
		throughout(t, "the agent is here", returnWait+returnAgain/2, func() bool { return !r.isGone(w.inc) })
	}
	next := r.join("a", "m=ready")
	until(t, "the new run is here", patience, func() bool { return r.isGone(w.inc) })
	w.stop()
	w.nc.Close()
	throughout(t, "the new run is here", returnWait+closedAsk, func() bool { return !r.isGone(next.inc) && r.state("a") == schemas.AgentUp })
}
