package load

import (
	"runtime"
	"time"
)

// health is how the client itself fared in a window.
type health struct {
	cpu      time.Duration // at the start of the window, and after its end used in it
	late     histogram     // by how much timers came late
	launches histogram     // by how much requests of an open loop were sent late
}

const probeEvery = 10 * time.Millisecond

// probe looks how late timers come, until ended is closed. What makes them late, a busy
// machine or a busy client, makes every figure late by as much.
func (h *health) probe(ended <-chan struct{}) {
	timer := time.NewTimer(probeEvery)
	defer timer.Stop()
	for {
		due := time.Now().Add(probeEvery)
		timer.Reset(probeEvery)
		select {
		case <-timer.C:
			h.late.add(time.Since(due))
		case <-ended:
			return
		}
	}
}

// launched notes by how much a request of an open loop was sent late.
func (h *health) launched(late time.Duration) { h.launches.add(late) }

// The client is taken for saturated when it used so much of its cores, or its timers came
// so late.
const (
	busyShare = 0.9
	lateLimit = 20.0 // ms, p99
)

func (h *health) report(window time.Duration) ClientHealth {
	cores := runtime.GOMAXPROCS(0)
	c := ClientHealth{Cores: cores, CPUSeconds: round(h.cpu.Seconds()), Late: h.late.latency()}
	if window > 0 {
		c.CPUShare = round(h.cpu.Seconds() / (window.Seconds() * float64(cores)))
	}
	if !h.launches.empty() {
		c.Launched = h.launches.latency()
	}
	for _, l := range []*Latency{c.Late, c.Launched} {
		if l != nil {
			l.Curve = nil
		}
	}
	c.Saturated = c.CPUShare >= busyShare || c.Late != nil && c.Late.P99 >= lateLimit
	return c
}
