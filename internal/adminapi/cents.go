package adminapi

import (
	"encoding/json"
	"strconv"
	"strings"
)

// Cents is an amount of money, in millionths of a cent. On the wire and for people it
// is a decimal number of cents with at most six decimals; no step on the way there or
// back goes through a floating-point number.
type Cents int64

// microCents is how many of its units a cent has, and decimals how many digits those
// take after the point.
const (
	microCents = 1_000_000
	decimals   = 6
)

// CentsError says why a text isn't an amount.
type CentsError struct{ problem string }

// Error implements error, with the rest of a sentence that begins with the amount's
// name.
func (e *CentsError) Error() string { return e.problem }

var (
	errNoNumber = &CentsError{"must be a decimal number of cents, like 0.25"}
	errTooFine  = &CentsError{"must have at most 6 decimals"}
	errTooLarge = &CentsError{"is too large a number"}
	errNegative = &CentsError{"must not be negative"}
)

// ParseCents reads an amount from a decimal number, 12, 0.25 or 1e-3 say. It isn't
// rounded: a number with more than six decimals is refused, and so is a negative one.
// The error is a *CentsError.
func ParseCents(text string) (Cents, error) {
	number, negative := strings.CutPrefix(text, "-")
	mantissa, exponent, hasExponent := strings.Cut(strings.ToLower(number), "e")
	whole, fraction, hasFraction := strings.Cut(mantissa, ".")
	if !isDigits(whole) || hasFraction && !isDigits(fraction) {
		return 0, errNoNumber
	}
	shift := decimals - len(fraction) // of the point, to the right
	if hasExponent {
		if sign := exponent != "" && (exponent[0] == '+' || exponent[0] == '-'); sign && !isDigits(exponent[1:]) || !sign && !isDigits(exponent) {
			return 0, errNoNumber
		}
		e, err := strconv.ParseInt(exponent, 10, 16)
		if err != nil {
			return 0, errTooLarge
		}
		shift += int(e)
	}
	digits := strings.TrimLeft(whole+fraction, "0")
	if digits == "" {
		return 0, nil
	}
	if negative {
		return 0, errNegative
	}
	kept := strings.TrimRight(digits, "0")
	shift += len(digits) - len(kept)
	const mostDigits = 19 // of an int64
	switch {
	case shift < 0:
		return 0, errTooFine
	case len(kept)+shift > mostDigits:
		return 0, errTooLarge
	}
	n, err := strconv.ParseInt(kept+strings.Repeat("0", shift), 10, 64)
	if err != nil {
		return 0, errTooLarge
	}
	return Cents(n), nil
}

func isDigits(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}

// String returns the amount in cents, with no more decimals than it needs.
func (c Cents) String() string { return c.Fixed(0) }

// Decimals is how many decimals the amount needs, 0 to 6.
func (c Cents) Decimals() int {
	n := decimals
	for v := c; n > 0 && v%10 == 0; v /= 10 {
		n--
	}
	return n
}

// Fixed returns the amount in cents with at least so many decimals, and as many as it
// needs.
func (c Cents) Fixed(least int) string {
	n := min(max(least, c.Decimals()), decimals)
	sign, abs := "", uint64(c)
	if c < 0 {
		sign, abs = "-", -abs
	}
	whole := sign + strconv.FormatUint(abs/microCents, 10)
	if n == 0 {
		return whole
	}
	fraction := strconv.FormatUint(microCents+abs%microCents, 10)[1:]
	return whole + "." + fraction[:n]
}

// MarshalJSON implements json.Marshaler with a number of cents.
func (c Cents) MarshalJSON() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalJSON implements json.Unmarshaler. It takes a number, or a string that holds
// one. The error is a *CentsError.
func (c *Cents) UnmarshalJSON(b []byte) error {
	text := string(b)
	if strings.HasPrefix(text, `"`) {
		if json.Unmarshal(b, &text) != nil {
			return errNoNumber
		}
	}
	n, err := ParseCents(text)
	if err != nil {
		return err
	}
	*c = n
	return nil
}
