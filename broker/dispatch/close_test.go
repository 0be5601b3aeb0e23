package dispatch_test

import (
	"sync"
	"testing"

	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/schemas"
)

func TestCloseWhileQueued(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a := h.agent(agentA)
	reply := h.start(request())
	if n := h.depth(); n != 1 {
		t.Fatalf("%d jobs in the queue, want 1", n)
	}
	reply.Close()
	if n := h.depth(); n != 0 {
		t.Errorf("%d jobs are left in the queue", n)
	}
	a.idle()
	h.settled(agentA)
	reply.Close() // once more does no harm
	h.settled(agentA)
}

// A job that is on its way to the worker while it is closed is refused when it is claimed.
func TestCloseRacesTheClaim(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a := h.agent(agentA)
	reply := h.start(request())
	d := a.pull()
	reply.Close()
	d.want(schemas.Frame{Kind: schemas.FrameClaim}, schemas.Verdict{Reason: schemas.ReasonFinished})
	d.told()
	h.settled(agentA)
}

func TestCloseWhileRunning(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a := h.agent(agentA)
	reply := h.start(request())
	d := a.pull()
	d.claim()
	d.chunk("one\n")
	if ev := next(reply); ev.Kind != dispatch.EventChunk {
		t.Fatalf("got %+v", ev)
	}
	reply.Close()
	d.told()
	if n := h.depth(); n != 0 {
		t.Errorf("%d jobs are left in the queue", n)
	}
	if v := d.ask(schemas.Frame{Kind: schemas.FrameProgress, Seq: 1}); v != (schemas.Verdict{Reason: schemas.ReasonFinished}) {
		t.Errorf("the worker hears %+v", v)
	}
	h.settled(agentA)
	if got := reply.Usage().CompletionTokens; got != 1 {
		t.Errorf("%d tokens are known to have been delivered, want 1", got)
	}
}

// When the worker has said its last word, closing says nothing more.
func TestCloseAfterTheEnd(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a := h.agent(agentA)
	reply := h.start(request())
	d := a.pull()
	d.claim()
	d.done("one\n")
	wantText(t, reply, "one\n")
	ended := reply.Timing().Ended
	reply.Close()
	a.untold()
	h.settled(agentA)
	if reply.Timing().Ended != ended {
		t.Error("closing has moved the end")
	}
}

func TestInterrupt(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a := h.agent(agentA)
	cause := schemas.Errorf(schemas.CodeInternalError, "shutting down")
	replies := []*dispatch.Reply{h.start(request()), h.start(request()), h.start(request())}
	running := a.pull()
	running.claim()
	running.chunk("one\n")
	ended := a.pull()
	ended.claim()
	ended.done("all\n")
	var interrupts sync.WaitGroup
	for range 4 { // from any goroutine, and any number of times
		interrupts.Go(func() { h.d.InterruptAll(cause) })
	}
	for i, want := range []string{"one\n", "all\n", ""} {
		text, err := read(replies[i])
		if text != want {
			t.Errorf("reply %d is %q, want %q", i, text, want)
		}
		if i == 1 && err != nil {
			t.Errorf("a reply that was complete ends with %v", err)
		}
		if i != 1 && err != cause {
			t.Errorf("reply %d ends with %v", i, err)
		}
	}
	interrupts.Wait()
	running.want(schemas.Frame{Kind: schemas.FrameProgress, Seq: 1}, schemas.Verdict{Reason: schemas.ReasonCancelled})
	for _, r := range replies {
		r.Close()
	}
	running.told()
	h.settled(agentA)
	if n := h.depth(); n != 0 {
		t.Errorf("%d jobs are left in the queue", n)
	}
}

// Next is woken up by an interrupt that comes while it waits.
func TestInterruptWakesTheReader(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	h.agent(agentA)
	reply := h.start(request())
	cause := schemas.Errorf(schemas.CodeInternalError, "gone")
	go reply.Interrupt(cause)
	if err := wantError(t, reply, cause.Code); err != cause {
		t.Errorf("got %v", err)
	}
}

// A request can be ended while its job is still being published.
func TestInterruptWhilePublishing(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 0, nil)
	a := h.agent(agentA)
	jobs := h.slowStream()
	started := h.startLater(request())
	m := <-jobs
	cause := schemas.Errorf(schemas.CodeInternalError, "shutting down")
	h.d.InterruptAll(cause)
	d := a.deliver(m.Data, "")
	d.want(schemas.Frame{Kind: schemas.FrameClaim}, schemas.Verdict{Reason: schemas.ReasonCancelled})
	acknowledge(t, m, 7)
	reply := <-started
	wantError(t, reply, cause.Code)
	reply.Close()
	d.told()
	h.settled(agentA)
}
