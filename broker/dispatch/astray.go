package dispatch

import "time"

// A job can go astray: a server of a cluster may still hold the pull of a connection that is
// gone, and hand the job to nobody. JetStream would deliver it again after bus.AckWait. An
// agent that is idle for longer than any job needs to reach it shows that sooner, and the
// request gets another attempt at once.

const (
	// strayAfter is how long a job may wait in the queue of an agent that is idle.
	strayAfter = 3 * time.Second
	// strayIdle is for how long of that its heartbeats have to show it: an agent that was cut
	// off is idle when it comes back, too, until it has its job.
	strayIdle = 1500 * time.Millisecond
	// mostStrays is how often that is done for a request. Each time it loses its place in
	// the queue, should it have had one after all.
	mostStrays = 2
)

// astray reports whether nobody will take the current attempt. r.mu is held.
func (r *Reply) astray(a *attempt, now time.Time) bool {
	if a.run != "" || a.queued.IsZero() || now.Sub(a.queued) < strayAfter || r.strays >= mostStrays {
		return false
	}
	return r.d.agents.IdleFor(r.req.Tenant, a.agent, a.incarnation, a.queued) >= strayIdle
}
