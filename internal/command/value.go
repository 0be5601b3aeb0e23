package command

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/ownllm/ownllm/worker/backend"
)

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
