package dispatch

import (
	"time"

	"github.com/ownllm/ownllm/schemas"
)

// HoldFor sets for how long a job waits for the admission of its request.
func (d *Dispatcher) HoldFor(wait time.Duration) { d.holdFor = wait }

// Hold keeps attempts from being registered and given up until release is called; held
// reports whether somebody is kept waiting.
func (d *Dispatcher) Hold() (held func() bool, release func()) {
	d.mu.RLock()
	held = func() bool {
		if d.mu.TryRLock() {
			d.mu.RUnlock()
			return false
		}
		return true
	}
	return held, d.mu.RUnlock
}

// Take has the current attempt take in a frame, as if it had just been looked up.
func (r *Reply) Take(f *schemas.Frame) (schemas.Verdict, bool) {
	r.mu.Lock()
	subject := r.cur.subject
	r.mu.Unlock()
	return r.take(subject, "", f, time.Now())
}
