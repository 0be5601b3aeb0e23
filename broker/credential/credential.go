// Package credential makes, parses and hashes the secrets of agents: the pairing key,
// ownllm_pair_…, that an admin makes and a machine spends, and the credential,
// ownllm_agent_…, that the machine gets for it and shows from then on.
//
// Neither is stored but by who has to show it; the books keep their SHA-256. A Secret
// therefore never prints itself: whatever formats, logs or marshals it, alone or inside
// something else, gets only its kind. Only Reveal gives it out.
package credential

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"strings"
)

const (
	// BeginPairing and BeginAgent are how every pairing key and every credential begins.
	BeginPairing = "ownllm_pair_"
	BeginAgent   = "ownllm_agent_"

	// pairingRest is how many hexadecimal digits a pairing key has: 128 random bits.
	pairingRest = 32
	// agentRest is how many characters of base 62 a new credential has: 238 random bits.
	agentRest = 40
	// minAgentRest and maxAgentRest bound what is taken for one.
	minAgentRest = 32
	maxAgentRest = 128
)

// Hash is the SHA-256 of a secret, the form in which it is stored and looked up.
type Hash = [sha256.Size]byte

// Secret is a well-formed pairing key or credential. The zero Secret is none.
type Secret struct {
	// Behind a pointer, so that the fmt verbs, which can't call our methods on an
	// unexported field of another struct, print an address there.
	text *string
}

// NewPairing returns a fresh pairing key.
func NewPairing() Secret { return DerivePairing(random()) }

// NewAgent returns a fresh credential.
func NewAgent() Secret { return DeriveAgent(random()) }

func random() (b [32]byte) {
	_, _ = rand.Read(b[:]) // never fails, see crypto/rand
	return b
}

// DerivePairing returns the pairing key that is made of the given bytes, which nobody may
// be able to guess.
func DerivePairing(from [32]byte) Secret {
	text := BeginPairing + hex.EncodeToString(from[:])[:pairingRest]
	return Secret{&text}
}

// DeriveAgent returns the credential that is made of the given bytes, which nobody may be
// able to guess.
func DeriveAgent(from [32]byte) Secret {
	// 32 bytes have 43 digits of base 62, of which the last 40 are all but equally likely
	// to be anything.
	const digits = 43
	rest := new(big.Int).SetBytes(from[:]).Text(62)
	rest = strings.Repeat("0", digits-len(rest)) + rest
	text := BeginAgent + rest[digits-agentRest:]
	return Secret{&text}
}

// The errors say what is wrong without a word of what was given.
var (
	errPairing = errors.New("a pairing key is ownllm_pair_ followed by 32 hexadecimal digits")
	errAgent   = errors.New("an agent's credential is ownllm_agent_ followed by at least 32 letters and digits")
)

// ParsePairing returns the pairing key with the given text. The error doesn't repeat it.
func ParsePairing(text string) (Secret, error) {
	rest, ok := strings.CutPrefix(text, BeginPairing)
	if !ok || len(rest) != pairingRest || !only(rest, func(c byte) bool { return digit(c) || c >= 'a' && c <= 'f' }) {
		return Secret{}, errPairing
	}
	text = strings.Clone(text) // it may be a part of a buffer
	return Secret{&text}, nil
}

// ParseAgent returns the credential with the given text. The error doesn't repeat it.
func ParseAgent(text string) (Secret, error) {
	rest, ok := strings.CutPrefix(text, BeginAgent)
	if !ok || len(rest) < minAgentRest || len(rest) > maxAgentRest || !only(rest, func(c byte) bool {
		return digit(c) || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
	}) {
		return Secret{}, errAgent
	}
	text = strings.Clone(text)
	return Secret{&text}, nil
}

func digit(c byte) bool { return c >= '0' && c <= '9' }

// only reports whether a text has no byte but such.
func only(text string, such func(byte) bool) bool {
	for i := range len(text) {
		if !such(text[i]) {
			return false
		}
	}
	return true
}

// IsZero reports whether this is no secret.
func (s Secret) IsZero() bool { return s.text == nil }

// Reveal returns the secret itself. It is for handing it out, once, and for showing it.
func (s Secret) Reveal() string {
	if s.text == nil {
		return ""
	}
	return *s.text
}

// Hash returns the SHA-256 of the secret.
func (s Secret) Hash() Hash { return sha256.Sum256([]byte(s.Reveal())) }

// String implements fmt.Stringer with the kind of the secret.
func (s Secret) String() string {
	switch {
	case s.text == nil:
		return "no secret"
	case strings.HasPrefix(*s.text, BeginPairing):
		return BeginPairing + "…"
	}
	return BeginAgent + "…"
}

// GoString implements fmt.GoStringer with the kind of the secret.
func (s Secret) GoString() string { return "credential.Secret(" + s.String() + ")" }

// LogValue implements slog.LogValuer with the kind of the secret.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }

// MarshalText implements encoding.TextMarshaler, and with it what json.Marshal makes of a
// secret, with its kind.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Format implements fmt.Formatter with the kind of the secret for every verb.
func (s Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, s.String()) }
