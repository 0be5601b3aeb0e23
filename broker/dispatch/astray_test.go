package dispatch_test

import (
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
)

// A job that was delivered to nobody doesn't wait for JetStream to find out while its agent
// has nothing else to do.
func TestAstray(t *testing.T) {
	h := newHouse(t, 10, nil)
	a := h.agent(agentA)
	began := time.Now()
	reply := h.start(request())
	last := make(chan dispatch.Event, 1)
	go func() {
		for {
			if e := reply.Next(); e.Kind == dispatch.EventDone || e.Kind == dispatch.EventError {
				last <- e
				return
			}
		}
	}()
	lost := a.pull() // by a connection that is gone
	taken := make(chan *delivery, 1)
	go func() { taken <- a.pull() }()
	var second *delivery
	stack.Until(t, patience, "the request to be queued again", func() bool {
		a.beat(schemas.AgentUp)
		select {
		case second = <-taken:
		default:
		}
		return second != nil
	})
	if waited := time.Since(began); waited > bus.AckWait-3*time.Second {
		t.Errorf("it was queued again after %s only", waited)
	}
	if second.job.Request != lost.job.Request || second.job.Nonce == lost.job.Nonce {
		t.Fatalf("the second job is %+v, the first was %+v", second.job, lost.job)
	}
	lost.over(schemas.Frame{Kind: schemas.FrameClaim})
	second.claim()
	second.chunk("data: {}\n\n")
	second.done("data: [DONE]\n\n")
	if e := <-last; e.Kind != dispatch.EventDone {
		t.Errorf("the reply ended with %+v", e)
	}
	reply.Close()
}

// A job that waits because its agent has others to run keeps its place.
func TestWaitingIsNotAstray(t *testing.T) {
	h := newHouse(t, 10, nil)
	a := h.agent(agentA)
	busy := heartbeat(a.incarnation, schemas.AgentUp)
	busy.Running = 1
	reply := h.start(request())
	defer reply.Close()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for reply.Next().Kind == dispatch.EventTick {
		}
	}()
	// Nothing signals that a job is let be.
	for began := time.Now(); time.Since(began) < 5*time.Second; time.Sleep(100 * time.Millisecond) {
		h.table.Observe(tenant, a.id, busy, time.Now())
	}
	first := a.pull()
	if first.job.Attempt != 1 {
		t.Errorf("the job is attempt %d", first.job.Attempt)
	}
	first.claim()
	first.done("data: [DONE]\n\n")
	<-ended
}
