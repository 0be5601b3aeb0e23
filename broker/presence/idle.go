package presence

import (
	"time"

	"github.com/ownllm/ownllm/schemas"
)

// idleness is for how long the heartbeats of an agent have said, one after the other, that it
// has nothing to do. Both times are zero while it has something.
type idleness struct {
	run        schemas.Incarnation
	from, till time.Time // the first and the last of these heartbeats
}

// idleGap is how far apart two heartbeats may be if nothing has happened in between. Workers
// send one each second.
const idleGap = 2500 * time.Millisecond

func (i *idleness) observe(hb *schemas.Heartbeat, now time.Time) {
	switch {
	case hb.State != schemas.AgentUp || hb.Running+hb.Waiting > 0:
		*i = idleness{}
	case i.run != hb.Incarnation || now.Sub(i.till) > idleGap:
		*i = idleness{hb.Incarnation, now, now}
	default:
		i.till = now
	}
}

// IdleFor returns for how long a run of an agent has been idle since the given time, as its
// heartbeats show it.
func (t *Table) IdleFor(tenant schemas.TenantID, id schemas.AgentID, run schemas.Incarnation, since time.Time) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	a := t.tenants[tenant][id]
	if a == nil || a.state == "" || a.idle.run != run {
		return 0
	}
	from := a.idle.from
	if since.After(from) {
		from = since
	}
	return max(0, a.idle.till.Sub(from))
}
