package load

import (
	"math"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestLength(t *testing.T) {
	for _, tc := range []struct {
		text            string
		mean, deviation float64
		low, high       int
	}{
		{"128", 128, 0, 128, 128},
		{"7..7", 7, 0, 7, 7},
		{"100..800", 450, 202.4, 100, 800},
		{"normal:400,50", 400, 50, 1, 800},
		{"normal:400,0", 400, 0, 400, 400},
		{"lognormal:400,300", 400, 300, 1, 20_000},
	} {
		t.Run(tc.text, func(t *testing.T) {
			var l Length
			if err := l.UnmarshalText([]byte(tc.text)); err != nil {
				t.Fatal(err)
			}
			const n = 200_000
			rng := newRand(1, 1)
			sum, squares := 0.0, 0.0
			for range n {
				x := l.Draw(rng)
				if x < tc.low || x > tc.high {
					t.Fatalf("%d is drawn, which is not from %d to %d", x, tc.low, tc.high)
				}
				sum, squares = sum+float64(x), squares+float64(x)*float64(x)
			}
			mean := sum / n
			deviation := math.Sqrt(max(squares/n-mean*mean, 0))
			if math.Abs(mean-tc.mean) > tc.mean*0.02 || math.Abs(deviation-tc.deviation) > tc.deviation*0.05+0.01 {
				t.Errorf("mean %.1f and deviation %.1f, want %.1f and %.1f", mean, deviation, tc.mean, tc.deviation)
			}
		})
	}
	for _, bad := range []string{"", "0", "-5", "x", "1..", "..2", "5..2", "0..3", "2000000", "normal:", "normal:5", "normal:0,1", "lognormal:5,-1", "normal:NaN,1", "lognormal:5,Inf", "1,2"} {
		if err := new(Length).UnmarshalText([]byte(bad)); err == nil {
			t.Errorf("%q is taken for a length", bad)
		}
	}
}

func TestLengthText(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b := rapid.IntRange(1, MaxLength).Draw(t, "a"), rapid.Float64Range(1, MaxLength).Draw(t, "b")
		for _, l := range []Length{Fixed(a), {normal, b, b / 2}, {lognormal, b, b}, {uniform, 1, float64(a) + 1}} {
			if l.kind == uniform && l.b > MaxLength {
				continue
			}
			var again Length
			if err := again.UnmarshalText([]byte(l.String())); err != nil || again != l {
				t.Fatalf("%+v is written %q and read as %+v, %v", l, l, again, err)
			}
			if n := l.Draw(newRand(uint64(a), 0)); n < 1 || n > MaxLength {
				t.Fatalf("%s draws %d", l, n)
			}
		}
	})
}

func TestLevel(t *testing.T) {
	for text, want := range map[string]Level{"32": {32, 32}, "0.5": {0.5, 0.5}, "1..32": {1, 32}, "40..2": {40, 2}} {
		var l Level
		if err := l.UnmarshalText([]byte(text)); err != nil || l != want || l.String() != text {
			t.Errorf("%q is read as %v, %v", text, l, err)
		}
	}
	for _, bad := range []string{"", "0", "-1", "1..", "NaN", "1..Inf", "x", "1e9"} {
		if err := new(Level).UnmarshalText([]byte(bad)); err == nil {
			t.Errorf("%q is taken for a level", bad)
		}
	}
}

// The number of clients at each instant is that of the ramp.
func TestLevelClients(t *testing.T) {
	const d = time.Minute
	for _, l := range []Level{{1, 1}, {8, 8}, {1, 31}, {31, 1}, {10, 20}} {
		from, until := l.clients(d)
		for s := range 60 {
			at, there := time.Duration(s)*time.Second, 0.0
			for i := range from {
				if from[i] <= at && at < until[i] {
					there++
				}
			}
			want := l.From + (l.To-l.From)*float64(s)/60
			if math.Abs(there-want) > 1 {
				t.Errorf("%s after %s: %v clients, want %v", l, at, there, want)
			}
		}
	}
}

func collect(a *arrivals, d time.Duration) (at []time.Duration) {
	for {
		next := a.next()
		if next >= d {
			return at
		}
		at = append(at, next)
	}
}

// Arrivals by chance come at their rate, and the gaps between them have the standard
// deviation of an exponential distribution, which is their mean.
func TestPoissonArrivals(t *testing.T) {
	at := collect(&arrivals{from: 50, to: 50, rng: newRand(1, 1)}, 1000*time.Second)
	if n := float64(len(at)); math.Abs(n-50_000) > 1000 { // 4.5 deviations
		t.Errorf("%v arrivals, want 50000", n)
	}
	sum, squares := 0.0, 0.0
	for i := 1; i < len(at); i++ {
		gap := (at[i] - at[i-1]).Seconds()
		if gap < 0 {
			t.Fatal("time runs back")
		}
		sum, squares = sum+gap, squares+gap*gap
	}
	mean := sum / float64(len(at)-1)
	if deviation := math.Sqrt(squares/float64(len(at)-1) - mean*mean); math.Abs(deviation/mean-1) > 0.03 {
		t.Errorf("gaps have mean %v and deviation %v", mean, deviation)
	}
}

func TestEvenArrivals(t *testing.T) {
	at := collect(&arrivals{from: 10, to: 10, even: true}, time.Second)
	if len(at) != 9 || at[0] != 100*time.Millisecond || at[8] != 900*time.Millisecond {
		t.Errorf("%v", at)
	}
}

// A ramp brings what the rate comes to, in every part of it, and then stays at its end.
func TestRampArrivals(t *testing.T) {
	for _, l := range []Level{{10, 100}, {100, 10}, {50, 50}} {
		at := collect(&arrivals{from: l.From, to: l.To, ramp: 100 * time.Second, even: true}, 200*time.Second)
		for s := 10; s <= 200; s += 10 {
			n := 0
			for _, a := range at {
				if a <= time.Duration(s)*time.Second {
					n++
				}
			}
			x := min(float64(s), 100)
			want := l.From*x + (l.To-l.From)*x*x/200 + l.To*max(float64(s)-100, 0)
			if math.Abs(float64(n)-want) > 2 {
				t.Errorf("%s: %d arrivals in %d s, want %.0f", l, n, s, want)
			}
		}
	}
}

func TestProse(t *testing.T) {
	p := newProse(1)
	rng := newRand(1, 2)
	for _, n := range []int{0, 1, 16, 1000, 40_000} {
		words := 0
		for _, c := range p.append(nil, n, rng) {
			if c == ' ' {
				words++
			}
		}
		if words != n {
			t.Errorf("%d words, want %d", words, n)
		}
	}
}
