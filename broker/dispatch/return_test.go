package dispatch_test

import (
	"testing"
	"time"

	"github.com/nats-io/nats.go"
)

// A request that comes between the returns of the connections, after a restart of the bus,
// waits instead of being refused.
func TestRequestBetweenTheReturnsOfConnections(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a := h.agent(agentA)
	for name, lost := range map[string]*nats.Conn{"the agents' account": h.nc, "the queue's account": h.core} {
		for range 5 {
			away := lost.StatusChanged(nats.RECONNECTING)
			before := lost.Stats().Reconnects
			if err := lost.ForceReconnect(); err != nil {
				t.Fatal(err)
			}
			select {
			case <-away:
			case <-time.After(patience):
				t.Fatalf("%s isn't left", name)
			}
			reply := h.start(request()) // fails the test if it is refused
			if lost.Stats().Reconnects == before {
				t.Errorf("%s: the request didn't wait", name)
			}
			d := a.pull()
			d.claim()
			d.done("x\n")
			wantText(t, reply, "x\n")
			lost.RemoveStatusListener(away)
			until(t, "all to be back", func() bool { return h.nc.IsConnected() && h.core.IsConnected() })
		}
	}
}
