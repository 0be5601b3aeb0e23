package load

import (
	"fmt"
	"math"
	"math/rand/v2"
	"strconv"
	"strings"
)

// Length is the length of a text in tokens: always the same, or drawn for each request. Its
// text form is one of
//
//	128                   always 128
//	100..800              any from 100 to 800, all alike
//	normal:400,100        normally distributed, with this mean and standard deviation
//	lognormal:400,300     likewise, with the long tail that real prompts have
//
// What is drawn is rounded, and at least 1 and at most MaxLength.
type Length struct {
	kind kind
	a, b float64
}

type kind int

const (
	fixed kind = iota
	uniform
	normal
	lognormal
)

var kindNames = map[kind]string{normal: "normal:", lognormal: "lognormal:"}

// MaxLength bounds every length.
const MaxLength = 1_000_000

// Fixed returns the length that is always n.
func Fixed(n int) Length { return Length{fixed, float64(n), float64(n)} }

// UnmarshalText implements encoding.TextUnmarshaler.
func (l *Length) UnmarshalText(text []byte) error {
	if parsed, ok := parseLength(string(text)); ok {
		*l = parsed
		return nil
	}
	return fmt.Errorf("%q isn't a length in tokens like 128, 100..800, normal:400,100 or lognormal:400,300, of 1 to %d", text, MaxLength)
}

func parseLength(text string) (Length, bool) {
	for _, k := range []kind{normal, lognormal} {
		if rest, ok := strings.CutPrefix(text, kindNames[k]); ok {
			mean, deviation, both := strings.Cut(rest, ",")
			a, okA := parseNumber(mean, 1, MaxLength)
			b, okB := parseNumber(deviation, 0, MaxLength)
			return Length{k, a, b}, both && okA && okB
		}
	}
	low, high, isRange := strings.Cut(text, "..")
	if !isRange {
		high = low
	}
	a, errA := strconv.Atoi(low)
	b, errB := strconv.Atoi(high)
	if errA != nil || errB != nil || a < 1 || b < a || b > MaxLength {
		return Length{}, false
	}
	if a == b {
		return Fixed(a), true
	}
	return Length{uniform, float64(a), float64(b)}, true
}

func parseNumber(text string, low, high float64) (float64, bool) {
	f, err := strconv.ParseFloat(text, 64)
	return f, err == nil && f >= low && f <= high
}

// String returns the text form.
func (l Length) String() string {
	a, b := strconv.FormatFloat(l.a, 'f', -1, 64), strconv.FormatFloat(l.b, 'f', -1, 64)
	switch l.kind {
	case uniform:
		return a + ".." + b
	case normal, lognormal:
		return kindNames[l.kind] + a + "," + b
	}
	return a
}

// MarshalText implements encoding.TextMarshaler.
func (l Length) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// Draw returns a length.
func (l Length) Draw(rng *rand.Rand) int {
	x := l.a
	switch l.kind {
	case uniform:
		return int(l.a) + rng.IntN(int(l.b-l.a)+1)
	case normal:
		x += l.b * rng.NormFloat64()
	case lognormal:
		// The parameters of the logarithm, so that the length itself has this mean and deviation.
		variance := math.Log1p(l.b * l.b / (l.a * l.a))
		x = math.Exp(math.Log(l.a) - variance/2 + math.Sqrt(variance)*rng.NormFloat64())
	}
	return int(math.Round(min(max(x, 1), MaxLength)))
}
