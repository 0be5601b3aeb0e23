package demo

import "time"

// pacer says when the tokens of a reply are due. The times are counted from its
// beginning, so that late tokens are caught up and the pace holds.
type pacer struct {
	start  time.Time
	first  time.Duration
	gap    float64 // nanoseconds; 0: no pace
	jitter float64
	seed   uint64
	timer  *time.Timer
}

func (p *pacer) begin(f *Faults, seed int64) {
	p.first = time.Duration(f.FirstTokenMS) * time.Millisecond
	if f.TokensPerSecond > 0 {
		p.gap = 1e9 / f.TokensPerSecond
	}
	p.jitter, p.seed = f.Jitter, uint64(seed)
	if p.first > 0 || p.gap > 0 {
		p.start = time.Now()
	}
}

// token waits until the i-th token of the reply is due. It is false if done was
// closed before.
func (p *pacer) token(done <-chan struct{}, i int) bool {
	if p.start.IsZero() {
		return !gone(done)
	}
	offset := float64(i)
	if p.jitter > 0 && i > 0 {
		offset += p.jitter * noise(p.seed+uint64(i))
	}
	return p.wait(done, p.start.Add(p.first+time.Duration(offset*p.gap)))
}

// noise returns a number from 0 to 1 that is the same for the same x.
func noise(x uint64) float64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return float64((x^x>>31)>>11) / (1 << 53)
}

// wait waits until an instant. It is false if done was closed before.
func (p *pacer) wait(done <-chan struct{}, until time.Time) bool {
	left := time.Until(until)
	if left <= 0 {
		return !gone(done)
	}
	if p.timer == nil {
		p.timer = time.NewTimer(left)
	} else {
		p.timer.Reset(left)
	}
	select {
	case <-p.timer.C:
		return true
	case <-done:
		p.timer.Stop()
		return false
	}
}

func gone(done <-chan struct{}) bool {
	select {
	case <-done:
		return true
	default:
		return false
	}
}
