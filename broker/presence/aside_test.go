package presence

import (
	"testing"
	"time"

	"github.com/ownllm/ownllm/schemas"
)

// An agent without a link to the bus that is heard of over HTTPS, at any edge, has a
// tunnel that is down: every edge says so, as long as it is heard.
func TestFeedAside(t *testing.T) {
	r := newRig(t)
	second := startRig(t, r.bus, r.bus.Connect("second feed"))
	w := r.join("a", "m=ready")
	rigs := []*rig{r, second}
	code := func(r *rig) schemas.Code {
		_, err := r.table.Route(tenant, "m", nil)
		return schemas.AsError(err).Code
	}
	for _, r := range rigs {
		until(t, "model is known", patience, func() bool { return r.has("m") })
	}
	w.silence()
	w.nc.Close()
	for _, r := range rigs {
		until(t, "agent is gone", patience, func() bool { return r.isGone(w.inc) })
		if got := code(r); got != schemas.CodeAgentOffline {
			t.Errorf("nobody has heard of it, and the code is %s", got)
		}
	}
	inv := w.inventory
	hb := schemas.Heartbeat{Version: schemas.ProtocolVersion, Incarnation: w.inc, State: schemas.AgentUp, Hash: inv.Hash(), Inventory: inv}
	if err := r.feed.Aside(tenant, "a", hb.Encode()); err != nil {
		t.Fatal(err)
	}
	heard := time.Now()
	for _, r := range rigs {
		until(t, "every edge to know", patience, func() bool { return code(r) == schemas.CodeTunnelDown })
		if e := r.table.Away(tenant, ""); e.Code != schemas.CodeTunnelDown {
			t.Errorf("of all models the code is %s", e.Code)
		}
	}
	for _, r := range rigs {
		until(t, "the silence to tell", StaleAfter+time.Second+busy, func() bool { return code(r) == schemas.CodeAgentOffline })
		if took := time.Since(heard); took < StaleAfter-busy {
			t.Errorf("forgotten after %v", took)
		}
	}
	for name, data := range map[string]string{
		"nothing": "", "another version": `{"v":99,"incarnation":"inc_1","state":"up"}`, "no run": `{"v":1,"state":"up"}`, "no state": `{"v":1,"incarnation":"inc_1"}`,
	} {
		if err := r.feed.Aside(tenant, "a", []byte(data)); err == nil || schemas.AsError(err).Code != schemas.CodeInvalidValue {
			t.Errorf("%s: %v", name, err)
		}
	}
}
