package demo

import (
	"sync/atomic"
	"time"
)

// Stats are what a Server has done since its start or the last reset. They count chat
// completions: Started is the sum of Active, Finished, Failed and Aborted.
type Stats struct {
	Started int64 `json:"started"`
	Active  int64 `json:"active"`
	// Peak is the largest number that was active at once.
	Peak     int64 `json:"peak"`
	Finished int64 `json:"finished"`
	// Failed counts requests that were refused, or ended by a fault that was asked for.
	Failed int64 `json:"failed"`
	// Aborted counts requests whose client was gone before their end, LastAbort is when
	// that was last seen.
	Aborted   int64      `json:"aborted"`
	LastAbort *time.Time `json:"last_abort"`
	// Tokens counts generated tokens, of all choices, reasoning included.
	Tokens int64 `json:"tokens"`
}

// outcome is how a request ended.
type outcome int

const (
	outcomeFailed outcome = iota
	outcomeFinished
	outcomeAborted
)

type counters struct {
	started, active, peak, finished, failed, aborted, tokens atomic.Int64

	lastAbort atomic.Int64 // Unix nanoseconds; 0: never
}

func (c *counters) begin() {
	c.started.Add(1)
	active := c.active.Add(1)
	for {
		peak := c.peak.Load()
		if active <= peak || c.peak.CompareAndSwap(peak, active) {
			return
		}
	}
}

// end counts the outcome before it takes the request from the active ones: whoever
// waits for none to be active then finds them all counted.
func (c *counters) end(o outcome) {
	switch o {
	case outcomeFailed:
		c.failed.Add(1)
	case outcomeFinished:
		c.finished.Add(1)
	case outcomeAborted:
		c.lastAbort.Store(time.Now().UnixNano())
		c.aborted.Add(1)
	}
	c.active.Add(-1)
}

// reset forgets all but the requests that run.
func (c *counters) reset() {
	active := c.active.Load()
	c.started.Store(active)
	c.peak.Store(active)
	for _, n := range []*atomic.Int64{&c.finished, &c.failed, &c.aborted, &c.tokens, &c.lastAbort} {
		n.Store(0)
	}
}

// Stats returns the counters.
func (s *Server) Stats() Stats {
	c := &s.stats
	stats := Stats{
		Started: c.started.Load(), Active: c.active.Load(), Peak: c.peak.Load(), Finished: c.finished.Load(),
		Failed: c.failed.Load(), Aborted: c.aborted.Load(), Tokens: c.tokens.Load(),
	}
	if at := c.lastAbort.Load(); at != 0 {
		t := time.Unix(0, at).UTC()
		stats.LastAbort = &t
	}
	return stats
}
