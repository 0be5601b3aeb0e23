package dispatch_test

import (
	"strings"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/schemas"
)

// expired reads the reply, which has to end by a deadline that lies d after since.
func expired(t *testing.T, reply *dispatch.Reply, since time.Time, d time.Duration, what string) {
	t.Helper()
	text, err := read(reply)
	took := time.Since(since)
	if err == nil || err.Code != schemas.CodeAgentTimeout || !strings.Contains(err.Message, what) {
		t.Fatalf("reply is %q and ends with %v, want a timeout that says %q", text, err, what)
	}
	if took < d {
		t.Errorf("the deadline of %s struck after %s", d, took)
	}
}

func TestFirstTokenDeadline(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, func(c *dispatch.Config) { c.FirstToken = 300 * time.Millisecond })
	a := h.agent(agentA)
	reply := h.start(request())
	d := a.pull()
	since := time.Now()
	d.claim()
	expired(t, reply, since, 300*time.Millisecond, "first token")
	d.want(schemas.Frame{Kind: schemas.FrameProgress}, schemas.Verdict{Reason: schemas.ReasonCancelled})
	reply.Close()
	d.told()
	h.settled(agentA)
}

// A model that is being loaded takes as long as it takes; the deadline of the first
// token begins when it is there.
func TestLoadingSuspendsTheFirstTokenDeadline(t *testing.T) {
	t.Parallel()
	const firstToken = 300 * time.Millisecond
	h := newHouse(t, 10, func(c *dispatch.Config) {
		c.FirstToken, c.FirstTick, c.KeepAlive = firstToken, 0, 50*time.Millisecond
	})
	a := h.agent(agentA)
	reply := h.start(request())
	d := a.pull()
	d.want(schemas.Frame{Kind: schemas.FrameClaim, Loading: true}, schemas.Verdict{Go: true, Next: 1})
	for claimed := time.Now(); time.Since(claimed) < 3*firstToken; {
		if ev := next(reply); ev.Kind != dispatch.EventTick {
			t.Fatalf("while the model loads, there is %+v", ev)
		}
		d.want(schemas.Frame{Kind: schemas.FrameProgress, Loading: true}, schemas.Verdict{Go: true, Next: 1})
	}
	loaded := time.Now()
	d.want(schemas.Frame{Kind: schemas.FrameProgress}, schemas.Verdict{Go: true, Next: 1})
	expired(t, reply, loaded, firstToken, "first token")
}

func TestIdleDeadline(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, func(c *dispatch.Config) { c.FirstToken, c.Idle = 2*time.Second, 2500*time.Millisecond })
	a := h.agent(agentA)
	reply := h.start(request())
	d := a.pull()
	d.claim()
	since := time.Now()
	d.chunk("one\n")
	if ev := next(reply); ev.Kind != dispatch.EventChunk {
		t.Fatalf("first event is %+v", ev)
	}
	// That the worker is alive isn't enough.
	d.want(schemas.Frame{Kind: schemas.FrameProgress, Seq: 1}, schemas.Verdict{Go: true, Next: 2})
	expired(t, reply, since, 2500*time.Millisecond, "nothing came")
}

// The whole deadline counts from the request, queue included, and for every kind of reply.
func TestTotalDeadline(t *testing.T) {
	t.Parallel()
	const total = 3 * time.Second
	h := newHouse(t, 10, func(c *dispatch.Config) {
		c.Total, c.Idle, c.FirstToken = total, time.Hour, time.Hour
	})
	a := h.agent(agentA)
	queued := request()
	running := request()
	running.Stream = false
	whole := h.start(running)
	d := a.pull()
	d.claim()
	d.chunk("{")
	waiting := h.start(queued)
	expired(t, whole, running.Received, total, "in all")
	expired(t, waiting, queued.Received, total, "in all")
	whole.Close()
	waiting.Close()
	d.told()
	if n := h.depth(); n != 0 {
		t.Errorf("%d jobs are left in the queue", n)
	}
	h.settled(agentA)
}

// A reply that isn't streamed has nothing to show until its end, so that neither a first
// token nor idleness is waited for.
func TestWholeReplyHasOnlyTheTotalDeadline(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, func(c *dispatch.Config) {
		c.FirstToken, c.Idle, c.FirstTick, c.KeepAlive = 100*time.Millisecond, 100*time.Millisecond, 0, 100*time.Millisecond
	})
	a := h.agent(agentA)
	req := request()
	req.Stream = false
	reply := h.start(req)
	d := a.pull()
	d.claim()
	d.chunk("{")
	for ticks := 0; ticks < 5; {
		switch ev := next(reply); ev.Kind {
		case dispatch.EventTick:
			ticks++
		case dispatch.EventChunk:
		default:
			t.Fatalf("reply ends with %+v", ev)
		}
	}
	d.done("}")
	wantText(t, reply, "}")
}

func TestTicks(t *testing.T) {
	t.Parallel()
	const first, later = 400 * time.Millisecond, 200 * time.Millisecond
	h := newHouse(t, 10, func(c *dispatch.Config) { c.FirstTick, c.KeepAlive = first, later })
	a := h.agent(agentA)
	req := request()
	reply := h.start(req)
	// From the beginning, since one tick may be read late, and the next in time.
	for _, after := range []time.Duration{first, first + later, first + 2*later} {
		if ev := next(reply); ev.Kind != dispatch.EventTick {
			t.Fatalf("got %+v, want a tick", ev)
		}
		if took := time.Since(req.Received); took < after {
			t.Errorf("a tick came after %s, want %s", took, after)
		}
	}
	d := a.pull()
	d.claim()
	d.chunk("one\n")
	for {
		ev := next(reply)
		if ev.Kind == dispatch.EventTick {
			continue // it was due before
		}
		if ev.Kind != dispatch.EventChunk {
			t.Fatalf("got %+v, want the chunk", ev)
		}
		break
	}
	if ev := next(reply); ev.Kind != dispatch.EventTick {
		t.Fatalf("got %+v, want a tick in the middle of the stream", ev)
	}
	d.done("")
	wantText(t, reply, "")
}

// A reader that is too slow loses its own reply, and nobody else's.
func TestSlowReaderIsEnded(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, func(c *dispatch.Config) { c.MaxUnread = 10_000 })
	a := h.agent(agentA)
	slow, quick := h.start(request()), h.start(request())
	stalled := make(chan struct{})
	slow.OnStall(func() { close(stalled) })
	quick.OnStall(func() { t.Error("the quick reader counts as stalled") })
	d, e := a.pull(), a.pull()
	d.claim()
	e.claim()
	line := strings.Repeat("x", 999) + "\n"
	for range 10 {
		d.chunk(line)
	}
	d.want(schemas.Frame{Kind: schemas.FrameProgress, Seq: 10}, schemas.Verdict{Go: true, Next: 11})
	d.chunk(line)
	d.want(schemas.Frame{Kind: schemas.FrameProgress, Seq: 11}, schemas.Verdict{Reason: schemas.ReasonCancelled})
	d.told()
	select {
	case <-stalled:
	case <-time.After(patience):
		t.Fatal("nobody was told of the stall")
	}
	for range 20 {
		e.chunk(line)
		if ev := next(quick); ev.Kind != dispatch.EventChunk {
			t.Fatalf("the quick reader got %+v", ev)
		}
	}
	e.done("end\n")
	wantText(t, quick, "end\n")
	text, err := read(slow)
	if text != strings.Repeat(line, 11) || err == nil || err.Code != schemas.CodeAgentTimeout {
		t.Errorf("the slow reader got %d bytes and %v", len(text), err)
	}
	slow.Close()
	quick.Close()
	h.settled(agentA)
}

// A reader that never comes back doesn't hold anything up: its reply ends by itself, and
// closing it later is enough.
func TestReaderThatNeverReads(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, func(c *dispatch.Config) { c.Total = 3 * time.Second })
	a := h.agent(agentA)
	reply := h.start(request())
	d := a.pull()
	d.claim()
	until(t, "the deadline", func() bool { return !d.ask(schemas.Frame{Kind: schemas.FrameProgress}).Go })
	reply.Close()
	d.told()
	if n := h.depth(); n != 0 {
		t.Errorf("%d jobs are left in the queue", n)
	}
	h.settled(agentA)
}
