// Package apikey makes, parses and hashes API keys: sk-ownllm-….
//
// The secret is stored nowhere but with its user; the books keep its SHA-256. A Key
// therefore never prints itself: whatever formats, logs or marshals it, alone or
// inside something else, gets its visible prefix or less. Only Reveal gives it out.
package apikey

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"

	"github.com/ownllm/ownllm/schemas"
)

const (
	// Begin is how every key begins.
	Begin = "sk-ownllm-"

	// minRest and maxRest bound what follows, in characters.
	minRest = 16
	maxRest = 128
	// newRest is how many characters of base62 a new key has: 142 random bits.
	newRest = 24
	// prefixLen is how much of a key may be seen.
	prefixLen = len(Begin) + 4

	base62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
)

// Hash is the SHA-256 of a key, the form in which it is stored and looked up.
type Hash [sha256.Size]byte

// Fingerprint is the hash as 64 hex digits, a name for the secret that gives nothing of it
// away.
func (h Hash) Fingerprint() string { return hex.EncodeToString(h[:]) }

// ParseFingerprint is the inverse of Hash.Fingerprint.
func ParseFingerprint(text string) (h Hash, err error) {
	if len(text) != hex.EncodedLen(len(h)) || strings.ToLower(text) != text {
		return Hash{}, errFingerprint
	}
	if _, err := hex.Decode(h[:], []byte(text)); err != nil {
		return Hash{}, errFingerprint
	}
	return h, nil
}

var errFingerprint = errors.New("the fingerprint of a key is 64 hex digits, in lower case")

// Key is a well-formed API key. The zero Key is none.
type Key struct {
	// Behind a pointer, so that the fmt verbs, which can't call our methods on an
	// unexported field of another struct, print an address there.
	secret *string
}

// New returns a fresh random key.
func New() Key {
	// A byte is taken only below the largest multiple of 62, so that every character
	// is equally likely.
	const limit = 256 - 256%len(base62)
	secret := make([]byte, 0, len(Begin)+newRest)
	secret = append(secret, Begin...)
	var random [newRest]byte
	for len(secret) < cap(secret) {
		_, _ = rand.Read(random[:]) // never fails, see crypto/rand
		for _, b := range random {
			if int(b) < limit && len(secret) < cap(secret) {
				secret = append(secret, base62[int(b)%len(base62)])
			}
		}
	}
	s := string(secret)
	return Key{&s}
}

// errMalformed says what is wrong without a word of what was sent.
var errMalformed = errors.New("an API key is sk-ownllm- followed by 16 to 128 letters, digits, hyphens or underscores")

// FromSecret returns the key with the given text. The error doesn't repeat it.
func FromSecret(secret string) (Key, error) {
	rest, ok := strings.CutPrefix(secret, Begin)
	if !ok || len(rest) < minRest || len(rest) > maxRest {
		return Key{}, errMalformed
	}
	for i := 0; i < len(rest); i++ {
		c := rest[i]
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_') {
			return Key{}, errMalformed
		}
	}
	secret = strings.Clone(secret) // it may be a part of a buffer, or of a large header
	return Key{&secret}, nil
}

// Parse returns the key in the value of an Authorization header: "Bearer", in
// any case, one or more spaces, and the key. Anything else is a key_malformed
// *schemas.Error whose message doesn't repeat what was sent.
func Parse(authorization string) (Key, error) {
	if authorization == "" {
		return Key{}, schemas.Errorf(schemas.CodeKeyMalformed,
			"No API key was sent. Send it in the header `Authorization: Bearer sk-ownllm-…`.")
	}
	scheme, rest, ok := strings.Cut(authorization, " ")
	if !ok || !strings.EqualFold(scheme, "Bearer") {
		return Key{}, schemas.Errorf(schemas.CodeKeyMalformed,
			"The Authorization header isn't of the form Bearer sk-ownllm-… .")
	}
	key, err := FromSecret(strings.TrimLeft(rest, " "))
	if err != nil {
		return Key{}, schemas.Errorf(schemas.CodeKeyMalformed,
			"The API key in the Authorization header isn't well-formed: %v. Check that it was copied whole.", err)
	}
	return key, nil
}

// IsZero reports whether this is no key.
func (k Key) IsZero() bool { return k.secret == nil }

// Reveal returns the whole key. It is for showing a new key to its user, once.
func (k Key) Reveal() string {
	if k.secret == nil {
		return ""
	}
	return *k.secret
}

// Hash returns the SHA-256 of the key.
func (k Key) Hash() Hash {
	var buf [len(Begin) + maxRest]byte // on the stack: this runs for every request
	return sha256.Sum256(buf[:copy(buf[:], k.Reveal())])
}

// Prefix returns the part of the key that may be seen, by which its user tells it
// from others: sk-ownllm-ab12.
func (k Key) Prefix() string {
	if k.secret == nil {
		return ""
	}
	return (*k.secret)[:prefixLen]
}

// String implements fmt.Stringer with the visible part.
func (k Key) String() string {
	if k.secret == nil {
		return "no key"
	}
	return k.Prefix() + "…"
}

// GoString implements fmt.GoStringer with the visible part.
func (k Key) GoString() string { return "apikey.Key(" + k.String() + ")" }

// Format implements fmt.Formatter with the visible part for every verb.
func (k Key) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, k.String()) }

// LogValue implements slog.LogValuer with the visible part.
func (k Key) LogValue() slog.Value { return slog.StringValue(k.String()) }

// MarshalText implements encoding.TextMarshaler, and with it what json.Marshal
// makes of a key, with the visible part.
func (k Key) MarshalText() ([]byte, error) { return []byte(k.String()), nil }
