// Package secret holds the type of values that must not be printed: tokens,
// passwords, keys, and addresses that carry one.
package secret

import (
	"fmt"
	"log/slog"
)

const redacted = "[redacted]"

// String is a string that every way of printing renders as "[redacted]": fmt with
// any verb, slog, JSON and text. An empty one prints as nothing, so that a log
// still tells whether a secret was given. Only Reveal gives the value away, so a
// search for Reveal finds every place that does.
type String string

// Reveal returns the value.
func (s String) Reveal() string { return string(s) }

// String implements fmt.Stringer.
func (s String) String() string {
	if s == "" {
		return ""
	}
	return redacted
}

// Format implements fmt.Formatter, so that no verb reaches the value.
func (s String) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(s.String())) }

// LogValue implements slog.LogValuer.
func (s String) LogValue() slog.Value { return slog.StringValue(s.String()) }

// MarshalText implements encoding.TextMarshaler, which JSON uses too.
func (s String) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *String) UnmarshalText(text []byte) error {
	*s = String(text)
	return nil
}
