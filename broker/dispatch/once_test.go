package dispatch_test

import (
	"testing"

	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/schemas"
)

// A request that wants to be begun once ends with the agent that has begun it; one that
// still lies in the queue goes to another.
func TestOnce(t *testing.T) {
	for _, claimed := range []bool{false, true} {
		h := newHouse(t, 10, nil)
		a, b := h.agent(agentA), h.agent(agentB)
		req := request()
		req.Stream, req.Once = false, true
		reply := h.start(req)
		first := a.pull()
		if claimed {
			first.claim()
		}
		last := make(chan dispatch.Event, 1)
		go func() {
			for {
				if e := reply.Next(); e.Kind == dispatch.EventDone || e.Kind == dispatch.EventError {
					last <- e
					return
				}
			}
		}()
		a.lost()
		if !claimed {
			second := b.pull()
			second.claim()
			second.done("{}")
		}
		if e := <-last; claimed != (e.Err != nil && e.Err.Code == schemas.CodeAgentOffline) {
			t.Errorf("claimed %v: %+v, %v", claimed, e, e.Err)
		}
		b.idle()
		reply.Close()
	}
}
