package load

import (
	"fmt"
	"math"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"
)

// Level is how much load a stage makes, in clients or in requests a second. It rises evenly
// from From to To while the stage is measured. Its text form is 32 for a steady level, and
// 1..32 for one that changes.
type Level struct{ From, To float64 }

// MaxLevel bounds every level.
const MaxLevel = 1_000_000

// UnmarshalText implements encoding.TextUnmarshaler.
func (l *Level) UnmarshalText(text []byte) error {
	from, to, ramp := strings.Cut(string(text), "..")
	if !ramp {
		to = from
	}
	a, okA := parseNumber(from, 0.001, MaxLevel)
	b, okB := parseNumber(to, 0.001, MaxLevel)
	if !okA || !okB {
		return fmt.Errorf("%q is neither a number like 32, above 0, nor a ramp like 1..32", text)
	}
	*l = Level{a, b}
	return nil
}

// String returns the text form.
func (l Level) String() string {
	from := strconv.FormatFloat(l.From, 'f', -1, 64)
	if l.From == l.To {
		return from
	}
	return from + ".." + strconv.FormatFloat(l.To, 'f', -1, 64)
}

// Whole reports whether the level is one of clients, of whom there are no halves.
func (l Level) Whole() bool { return l.From == math.Trunc(l.From) && l.To == math.Trunc(l.To) }

// clients returns when each client of a closed loop starts and stops, from the beginning
// of a window of length d. What starts at 0 is there in the warm-up already.
func (l Level) clients(d time.Duration) (from, until []time.Duration) {
	n := int(max(l.From, l.To))
	from, until = make([]time.Duration, n), make([]time.Duration, n)
	for i := range n {
		until[i] = math.MaxInt64
		at := time.Duration(float64(d) * (float64(i+1) - l.From) / (l.To - l.From))
		switch {
		case i >= int(l.From): // rises to it
			from[i] = at
		case i >= int(l.To): // falls below it
			until[i] = at
		}
	}
	return from, until
}

// arrivals are the instants at which requests arrive: a Poisson process whose rate goes
// evenly from one value to another and stays there.
type arrivals struct {
	from, to float64       // requests a second
	ramp     time.Duration // 0: the rate is to from the start
	even     bool
	rng      *rand.Rand
	sum      float64 // of requests that the rate has brought until now
}

// next returns the next arrival, counted from the start.
//
// With the rate r(t), R(t) is its integral, the number of requests that are expected until
// t. The arrivals of a Poisson process are where R passes the sums of exponentially
// distributed numbers; those of an even one where it passes whole numbers.
func (a *arrivals) next() time.Duration {
	if a.even {
		a.sum++
	} else {
		a.sum += a.rng.ExpFloat64()
	}
	d := a.ramp.Seconds()
	onRamp := (a.from + a.to) / 2 * d
	var t float64
	if a.sum >= onRamp {
		t = d + (a.sum-onRamp)/a.to
	} else {
		// R(t) = from·t + slope·t²/2, solved for t in the form that stands a slope of 0.
		slope := (a.to - a.from) / d
		t = 2 * a.sum / (a.from + math.Sqrt(max(a.from*a.from+2*slope*a.sum, 0)))
	}
	return time.Duration(min(t, math.MaxInt64/2e9) * 1e9)
}
