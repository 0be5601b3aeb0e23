package dispatch_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/schemas"
)

// An agent that goes away before it has said anything is replaced by another one, whether
// it had claimed the job or not.
func TestFailoverBeforeTheFirstToken(t *testing.T) {
	for _, claimed := range []bool{false, true} {
		name := "queued"
		if claimed {
			name = "claimed"
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHouse(t, 10, nil)
			a, b := h.agent(agentA), h.agent(agentB)
			reply := h.start(request())
			first := a.pull()
			if claimed {
				first.claim()
			}
			b.idle()
			a.lost()
			done := make(chan struct{})
			go func() {
				defer close(done)
				wantText(t, reply, "one\ntwo\n")
			}()
			second := b.pull()
			if second.job.Attempt != first.job.Attempt+1 || second.job.Nonce == first.job.Nonce || second.job.MsgID() == first.job.MsgID() {
				t.Errorf("second attempt %+v is too much like the first %+v", second.job, first.job)
			}
			if second.job.Request != first.job.Request || second.job.Completion != first.job.Completion || second.job.Created != first.job.Created {
				t.Errorf("second attempt %+v is of another request than %+v", second.job, first.job)
			}
			first.told()
			if n := h.depth(); n != 1 {
				t.Errorf("%d jobs in the queue, want the one of the second attempt", n)
			}
			// The first agent isn't dead after all, and neither claim nor token counts.
			first.want(schemas.Frame{Kind: schemas.FrameClaim}, schemas.Verdict{Reason: schemas.ReasonFinished})
			first.chunk("forged\n")
			second.claim()
			second.chunk("one\n")
			first.chunk("forged\n")
			second.done("two\n")
			<-done
			reply.Close()
			b.untold()
			h.settled(agentB)
			a.restart()
			h.settled(agentA, agentB)
		})
	}
}

// The only agent may be back already, as a new run.
func TestFailoverToTheSameAgent(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a := h.agent(agentA)
	reply := h.start(request())
	first := a.pull()
	first.claim()
	a.restart()
	done := make(chan struct{})
	go func() {
		defer close(done)
		wantText(t, reply, "one\n")
	}()
	second := a.pull()
	if second.job.Attempt <= first.job.Attempt || second.job.Nonce == first.job.Nonce {
		t.Errorf("second attempt is %+v, first was %+v", second.job, first.job)
	}
	second.claim()
	second.done("one\n")
	<-done
	reply.Close()
	h.settled(agentA)
}

func TestFailoverToNobody(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a := h.agent(agentA)
	reply := h.start(request())
	d := a.pull()
	a.lost()
	if err := wantError(t, reply, schemas.CodeAgentOffline); err.RetryAfterSeconds() == 0 {
		t.Error("no advice when to come back")
	}
	d.told()
	if n := h.depth(); n != 0 {
		t.Errorf("%d jobs are left in the queue", n)
	}
	reply.Close()
	a.restart()
	h.settled(agentA)
}

// What was delivered can't be taken back, and isn't repeated: the client is told.
func TestNoFailoverAfterTheFirstToken(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a, b := h.agent(agentA), h.agent(agentB)
	reply := h.start(request())
	d := a.pull()
	d.claim()
	d.chunk("one\n")
	a.barrier()
	a.lost()
	text, err := read(reply)
	if text != "one\n" || err == nil || err.Code != schemas.CodeAgentOffline || !strings.Contains(err.Message, "middle") {
		t.Errorf("reply is %q and ends with %v", text, err)
	}
	b.idle()
	d.told()
	reply.Close()
	a.restart()
	h.settled(agentA, agentB)
}

// The end of another run, or of another agent, says nothing.
func TestEndOfSomebodyElse(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a, b := h.agent(agentA), h.agent(agentB)
	reply := h.start(request())
	d := a.pull()
	d.claim()
	b.lost()
	h.table.Lost(tenant, agentA, schemas.NewIncarnation())
	d.done("one\n")
	wantText(t, reply, "one\n")
	a.untold()
}

// An agent that drains finishes what it has begun; what only waits there goes to another.
func TestDrainingAgent(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a := h.agent(agentA)
	running, waiting := h.start(request()), h.start(request())
	d := a.pull()
	d.claim()
	b := h.agent(agentB)
	a.beat(schemas.AgentDraining)
	done := make(chan struct{})
	go func() {
		defer close(done)
		wantText(t, waiting, "moved\n")
	}()
	moved := b.pull()
	if moved.job.Request == d.job.Request {
		t.Fatal("the running request was moved")
	}
	moved.claim()
	moved.done("moved\n")
	<-done
	d.chunk("one\n")
	d.done("two\n")
	wantText(t, running, "one\ntwo\n")
	a.idle()
	running.Close()
	waiting.Close()
	if n := h.depth(); n != 0 {
		t.Errorf("%d jobs are left in the queue", n)
	}
	// The next request knows better than to go there.
	third := h.start(request())
	b.pull()
	third.Close()
	a.beat(schemas.AgentBye)
	a.restart()
	h.settled(agentA, agentB)
}

func TestFullQueue(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 2, nil)
	a, b := h.agent(agentA), h.agent(agentB)
	// Requests of another process fill the queue of A; this one doesn't know.
	b.beat(schemas.AgentBye)
	first := []*dispatch.Reply{h.start(request()), h.start(request())}
	b.restart()
	h.table.Release(tenant, agentA, model)
	h.table.Release(tenant, agentA, model)
	// A seems to be free, and is asked first.
	third := h.start(request())
	b.pull().claim()
	fourth := h.start(request())
	if _, _, err := h.d.Start(t.Context(), request()); !errors.Is(err, schemas.Errorf(schemas.CodeQueueFull, "")) {
		t.Errorf("the fifth of four got %v", err)
	} else if schemas.AsError(err).RetryAfterSeconds() == 0 {
		t.Error("no advice when to come back")
	}
	if n := h.d.Active(); n != 4 {
		t.Errorf("%d requests are active, want 4", n)
	}
	if n := h.assigned(agentB); n != 2 {
		t.Errorf("%d attempts are assigned to B, want 2", n)
	}
	for _, r := range append(first, third, fourth) {
		r.Close()
	}
	a.idle()
	h.settled(agentA, agentB)
}

func TestNobodyHasTheModel(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	req := request()
	if _, _, err := h.d.Start(t.Context(), req); !errors.Is(err, schemas.Errorf(schemas.CodeModelNotFound, "")) {
		t.Errorf("got %v", err)
	}
	h.agent(agentA).beat(schemas.AgentBye)
	if _, _, err := h.d.Start(t.Context(), req); !errors.Is(err, schemas.Errorf(schemas.CodeAgentOffline, "")) {
		t.Errorf("got %v", err)
	}
	h.settled()
}

// wantOurs checks that a request is refused, and that this process takes the blame.
func wantOurs(t *testing.T, h *house) {
	t.Helper()
	_, _, err := h.d.Start(t.Context(), request())
	if got := schemas.AsError(err); err == nil || got.Code != schemas.CodeInternalError || got.RetryAfterSeconds() == 0 {
		t.Errorf("without a bus a request gets %v", err)
	}
}

func TestBusDown(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a := h.agent(agentA)
	reply := h.start(request())
	h.server.Restart(func() {
		until(t, "the loss of the bus", func() bool { return !h.feed.Connected() })
		wantOurs(t, h)
		// Nor can a request move that was lost meanwhile, and nothing hangs.
		a.lost()
		wantError(t, reply, schemas.CodeInternalError)
		reply.Close()
		a.restart()
		h.settled(agentA)
	})
	until(t, "the bus to be back", func() bool { return h.feed.Connected() && h.core.IsConnected() })
	h.start(request()).Close()
	h.settled(agentA)
}

// The bus is there, but JetStream isn't.
func TestNoStream(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 0, nil)
	h.agent(agentA)
	wantOurs(t, h)
	h.settled(agentA)
}

// JetStream doesn't answer. The job may be in the queue or not, so its claim is refused.
func TestPublishUnanswered(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 0, nil)
	a := h.agent(agentA)
	jobs := h.slowStream()
	wantOurs(t, h)
	first, second := <-jobs, <-jobs
	if got, want := second.Header.Get(schemas.HeaderMsgID), first.Header.Get(schemas.HeaderMsgID); got != want {
		t.Errorf("the second try has the id %q, the first %q", got, want)
	}
	a.deliver(first.Data, "").want(schemas.Frame{Kind: schemas.FrameClaim}, schemas.Verdict{Reason: schemas.ReasonFinished})
	h.settled(agentA)
}

// An agent that goes away while its job is being published is noticed like any other, and
// the word is not taken for that of the next agent.
func TestAgentGoesWhilePublishing(t *testing.T) {
	for _, full := range []bool{false, true} {
		name := "stored"
		if full {
			name = "refused"
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHouse(t, 0, nil)
			a, b := h.agent(agentA), h.agent(agentB)
			jobs := h.slowStream()
			started := h.startLater(request())
			m := <-jobs
			a.lost()
			if full {
				refuse(t, m)
			} else {
				acknowledge(t, m, 7)
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				if reply := <-started; reply != nil {
					defer reply.Close()
					wantText(t, reply, "one\ntwo\n")
				}
			}()
			m = <-jobs
			acknowledge(t, m, 8)
			d := b.deliver(m.Data, "")
			d.claim()
			d.chunk("one\n")
			d.done("two\n")
			<-done
			b.untold()
			a.restart()
			h.settled(agentA, agentB)
		})
	}
}

// The end of an agent comes at any moment between its choice and the publish. None may be
// missed: the request would wait for an agent that isn't there until its whole time is up.
func TestAgentGoesWhileItIsChosen(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 1000, func(c *dispatch.Config) { c.Total = time.Hour })
	h.agent(agentA)
	incarnation := schemas.NewIncarnation()
	var ends sync.WaitGroup
	for range 2000 {
		h.table.Observe(tenant, agentA, heartbeat(incarnation, schemas.AgentUp), time.Now())
		ends.Go(func() { h.table.Lost(tenant, agentA, incarnation) })
		reply, _, err := h.d.Start(context.Background(), request())
		if err == nil {
			wantError(t, reply, schemas.CodeAgentOffline)
			reply.Close()
		} else if !errors.Is(err, &schemas.Error{Code: schemas.CodeAgentOffline}) {
			t.Fatal(err)
		}
		ends.Wait()
	}
	h.table.Observe(tenant, agentA, heartbeat(incarnation, schemas.AgentUp), time.Now())
	h.settled(agentA)
}

// A token can come while its attempt is being given up. It was delivered then, so that no
// other attempt may begin from the start.
func TestTokenWhileTheAttemptIsGivenUp(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a, b := h.agent(agentA), h.agent(agentB)
	for _, kind := range []schemas.FrameKind{schemas.FrameChunk, schemas.FrameDone} {
		b.restart()
		reply := h.start(request())
		d := a.pull()
		d.claim()
		a.lost()
		held, release := h.d.Hold()
		type outcome struct {
			text string
			err  *schemas.Error
		}
		ended := make(chan outcome, 1)
		go func() {
			text, err := read(reply)
			ended <- outcome{text, err}
		}()
		until(t, "the attempt to be given up", held)
		v, ok := reply.Take(&schemas.Frame{Run: d.run, Seq: 1, Kind: kind, Payload: []byte("a\n")})
		release()
		if kind == schemas.FrameChunk && !v.Go || ok != (kind == schemas.FrameChunk) { // the last one is answered later
			t.Fatalf("verdict is %+v, %t", v, ok)
		}
		got := <-ended
		switch {
		case got.text != "a\n":
			t.Errorf("%s: reply is %q", kind, got.text)
		case kind == schemas.FrameDone && got.err != nil:
			t.Errorf("%s: a reply that is complete ends with %v", kind, got.err)
		case kind == schemas.FrameChunk && (got.err == nil || got.err.Code != schemas.CodeAgentOffline):
			t.Errorf("%s: a reply that was begun ends with %v", kind, got.err)
		}
		b.idle()
		reply.Close()
		a.restart()
	}
	h.settled(agentA, agentB)
}

// The end of an agent races its first token. Either the token was delivered, and the reply
// ends with an error, or it wasn't, and another agent gives the whole reply: never both.
func TestEndRacesTheFirstToken(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 1000, nil)
	a, b := h.agent(agentA), h.agent(agentB)
	moved := 0
	for range 300 {
		b.beat(schemas.AgentUp)
		reply := h.start(request())
		d := a.pull()
		d.claim()
		var race sync.WaitGroup
		race.Go(a.lost)
		race.Go(func() { d.chunk("a\n") })
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			switch text, err := read(reply); {
			case text == "b\n" && err == nil:
				moved++
			case text == "a\n" && err != nil && err.Code == schemas.CodeAgentOffline:
			default:
				t.Errorf("reply is %q and ends with %v", text, err)
			}
			reply.Close()
		}()
		race.Wait()
		for served := false; !served; {
			select {
			case <-ended:
				served = true
			default:
				if m := b.request(0); len(m.Data) > 0 {
					e := b.deliver(m.Data, m.Reply)
					if e.ask(schemas.Frame{Kind: schemas.FrameClaim}).Go {
						e.done("b\n")
					}
				}
			}
		}
		a.restart()
	}
	t.Logf("%d of 300 were moved", moved)
	h.settled(agentA, agentB)
}
