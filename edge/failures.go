package edge

import (
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// failures counts the bad requests of each address against an allowance that
// refills. Addresses that behave are forgotten: two generations of limiters take
// turns, each for as long as a full refill takes, so memory is bounded by the number
// of addresses that have failed lately.
type failures struct {
	limit rate.Limit
	burst int
	turn  time.Duration

	mu      sync.Mutex
	now     map[netip.Addr]*rate.Limiter
	before  map[netip.Addr]*rate.Limiter
	changed time.Time
}

// maxFailing bounds one generation. When it is full, the next one begins early.
const maxFailing = 1 << 16

func newFailures(perSecond float64, burst int) *failures {
	return &failures{
		limit: rate.Limit(perSecond), burst: burst,
		turn: time.Duration(float64(burst) / perSecond * float64(time.Second)),
		now:  make(map[netip.Addr]*rate.Limiter), before: make(map[netip.Addr]*rate.Limiter),
	}
}

// key is what is counted: an IPv4 address, or an IPv6 network of 64 bits, of which a
// single customer has all addresses.
func key(a netip.Addr) netip.Addr {
	if a.Is6() && !a.Is4In6() {
		if p, err := a.Prefix(64); err == nil {
			return p.Addr()
		}
	}
	return a
}

// limiter returns the limiter of an address, or nil if it hasn't failed lately and
// make is false. f.mu is held.
func (f *failures) limiter(a netip.Addr, now time.Time, create bool) *rate.Limiter {
	if now.Sub(f.changed) > f.turn || len(f.now) >= maxFailing {
		f.before, f.now, f.changed = f.now, make(map[netip.Addr]*rate.Limiter), now
	}
	a = key(a)
	l := f.now[a]
	if l == nil {
		l = f.before[a]
		if l == nil && create {
			l = rate.NewLimiter(f.limit, f.burst)
		}
		if l != nil {
			f.now[a] = l
		}
	}
	return l
}

// allow counts a bad request, and reports whether the address may make it.
func (f *failures) allow(a netip.Addr, now time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.limiter(a, now, true).AllowN(now, 1)
}

// exhausted reports whether the next bad request of the address is one too many.
func (f *failures) exhausted(a netip.Addr, now time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := f.limiter(a, now, false)
	return l != nil && l.TokensAt(now) < 1
}
