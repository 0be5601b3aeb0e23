package presence

import (
	"context"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

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
	for swift, deadline := 0, time.Now().Add(patience); swift < 3; {
		back := w.nc.StatusChanged(nats.CONNECTED)
		left := time.Now()
		if err := w.nc.ForceReconnect(); err != nil {
			t.Fatal(err)
		}
		select {
		case <-back:
		case <-time.After(patience):
			t.Fatal("the worker doesn't come back")
		}
		away := time.Since(left)
		w.nc.RemoveStatusListener(back)
		time.Sleep(time.Until(left.Add(returnWait + returnAgain/2))) // that nothing happens has no signal
		switch gone := r.isGone(w.inc); {
		case away < returnWait:
			if swift++; gone {
				t.Fatalf("the agent counted as gone, and was away for %s", away)
			}
		case time.Now().After(deadline):
			t.Fatalf("the worker takes %s to come back", away)
		case gone: // rightly so
			w = r.join("a", "m=ready")
		}
	}
	next := r.join("a", "m=ready")
	until(t, "the new run is here", patience, func() bool { return r.isGone(w.inc) })
	w.stop()
	w.nc.Close()
	throughout(t, "the new run is here", returnWait+closedAsk, func() bool { return !r.isGone(next.inc) && r.state("a") == schemas.AgentUp })
}
