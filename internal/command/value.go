package command

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/worker/backend"
)

// Span is a length of time. Its text form is that of time.Duration, which may begin
// with days: 90m, 24h, 7d, 1d12h.
type Span time.Duration

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Span) UnmarshalText(text []byte) error {
	var total time.Duration
	days, rest, ok := strings.Cut(string(text), "d")
	if !ok {
		days, rest = "0", days
	}
	const day, mostDays = 24 * time.Hour, 100 * 366
	n, err := strconv.ParseUint(days, 10, 32)
	if err == nil && n <= mostDays && (rest != "" || ok) {
		total = time.Duration(n) * day
		if rest != "" {
			var d time.Duration
			d, err = time.ParseDuration(rest)
			total += d
		}
		if err == nil && total >= 0 {
			*s = Span(total)
			return nil
		}
	}
	return fmt.Errorf("%q isn't a length of time like 90m, 24h or 7d", text)
}

// seconds is the span in whole seconds.
func (s Span) seconds() int64 { return int64(time.Duration(s) / time.Second) }

// String returns the text form.
func (s Span) String() string {
	d := time.Duration(s)
	text := ""
	if days := d / (24 * time.Hour); days > 0 {
		text, d = strconv.Itoa(int(days))+"d", d%(24*time.Hour)
		if d == 0 {
			return text
		}
	}
	rest := d.String()
	if strings.HasSuffix(rest, "m0s") {
		rest = strings.TrimSuffix(rest, "0s")
	}
	if strings.HasSuffix(rest, "h0m") {
		rest = strings.TrimSuffix(rest, "0m")
	}
	return text + rest
}

// Moment is a point in time. Its text form is an RFC 3339 time; or a date, which stands
// for its beginning in UTC; or a Span, which stands for so long ago.
type Moment time.Time

// UnmarshalText implements encoding.TextUnmarshaler.
func (m *Moment) UnmarshalText(text []byte) error {
	for _, layout := range []string{time.DateOnly, time.RFC3339} {
		if t, err := time.Parse(layout, string(text)); err == nil {
			*m = Moment(t)
			return nil
		}
	}
	var ago Span
	if ago.UnmarshalText(text) == nil {
		*m = Moment(time.Now().Add(-time.Duration(ago)))
		return nil
	}
	return fmt.Errorf("%q isn't a time like 2026-11-01, 2026-11-01T18:00:00Z, 24h or 7d", text)
}

// Budget is a bound of what is spent, as a whole number of cents, or "none". The zero
// value stands for not given.
type Budget adminapi.Budget

// UnmarshalText implements encoding.TextUnmarshaler.
func (b *Budget) UnmarshalText(text []byte) error {
	if string(text) == "none" {
		*b = Budget{Given: true}
		return nil
	}
	n, err := strconv.ParseInt(string(text), 10, 64)
	if err != nil || n < 0 {
		return fmt.Errorf("%q is neither a whole number of cents nor none", text)
	}
	*b = Budget{Given: true, Cents: &n}
	return nil
}

// Cents is an amount of money, as a decimal number of cents.
type Cents adminapi.Cents

// UnmarshalText implements encoding.TextUnmarshaler.
func (c *Cents) UnmarshalText(text []byte) error {
	n, err := adminapi.ParseCents(string(text))
	if err != nil {
		return fmt.Errorf("%q: an amount %w", text, err)
	}
	*c = Cents(n)
	return nil
}

// ByteSize is a number of bytes. Its text form is a whole number and a unit: B (or
// none), KB, MB or GB, which count in steps of 1024, as KiB, MiB and GiB do.
type ByteSize int64

var byteUnits = []struct {
	suffix string
	factor int64
}{
	{"KIB", 1 << 10}, {"MIB", 1 << 20}, {"GIB", 1 << 30},
	{"KB", 1 << 10}, {"MB", 1 << 20}, {"GB", 1 << 30},
	{"B", 1},
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *ByteSize) UnmarshalText(text []byte) error {
	number, factor := strings.ToUpper(strings.TrimSpace(string(text))), int64(1)
	for _, unit := range byteUnits {
		if rest, ok := strings.CutSuffix(number, unit.suffix); ok {
			number, factor = strings.TrimSpace(rest), unit.factor
			break
		}
	}
	n, err := strconv.ParseInt(number, 10, 64)
	if err != nil || n < 0 || n > math.MaxInt64/factor {
		return fmt.Errorf("%q isn't a size like 32MB or 512KB", text)
	}
	*s = ByteSize(n * factor)
	return nil
}

// Offer is a model that a worker offers, as ID[=ALIAS].
type Offer struct {
	// ID is the backend's own id of the model.
	ID string
	// Alias is the id that clients ask for; the same if none is given.
	Alias string
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (o *Offer) UnmarshalText(text []byte) error {
	id, alias, ok := strings.Cut(string(text), "=")
	if id == "" || ok && alias == "" {
		return fmt.Errorf("%q isn't ID or ID=ALIAS", text)
	}
	if !ok {
		alias = id
	}
	*o = Offer{id, alias}
	return nil
}

// Capability is what a model can do besides what its backend says, as
// MODEL:tools|vision. The model comes first and may hold colons itself.
type Capability struct {
	Model string
	Names []string
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (c *Capability) UnmarshalText(text []byte) error {
	i := strings.LastIndexByte(string(text), ':')
	if i <= 0 {
		return fmt.Errorf("%q isn't MODEL:tools|vision", text)
	}
	names := strings.Split(string(text[i+1:]), "|")
	for _, name := range names {
		if !slices.Contains(backend.CapabilityNames, name) {
			return fmt.Errorf("%q: %q is none of %s", text, name, strings.Join(backend.CapabilityNames, ", "))
		}
	}
	*c = Capability{string(text[:i]), names}
	return nil
}
