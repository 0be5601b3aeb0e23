package chat

import (
	"encoding/json"
	"errors"
	"strings"
	"unicode/utf8"

	"github.com/tidwall/gjson"

	"github.com/ownllm/ownllm/schemas"
)

// maxDepth is how deep arrays and objects of a body may nest. Real requests, with
// their tool and reply schemas, stay below 50; Python backends give up near 1000.
const maxDepth = 500

// maxLocated is the size in bytes up to which a body that doesn't parse is read a
// second time, to tell the client where it is broken.
const maxLocated = 1 << 20

// validate checks that body is one JSON object that every backend reads the same
// way: valid UTF-8, valid JSON, no lone surrogate, nested at most maxDepth deep. It
// uses constant stack.
func validate(body string) *schemas.Error {
	trimmed := strings.TrimLeft(body, " \t\r\n")
	if trimmed == "" {
		return schemas.Errorf(schemas.CodeInvalidJSON, "The body is empty. Send a JSON object with model and messages.")
	}
	if !utf8.ValidString(body) {
		return schemas.Errorf(schemas.CodeInvalidJSON, "The body isn't valid UTF-8 (byte %d). Encode it as UTF-8.", invalidUTF8(body))
	}
	// The depth comes first: gjson recurses, so it may only see what is known to be
	// shallow. Up to the first syntax error both read the same structure.
	if deeper(body, maxDepth) {
		return schemas.Errorf(schemas.CodeInvalidJSON, "The body nests arrays and objects more than %d deep.", maxDepth)
	}
	if !gjson.Valid(body) {
		return syntaxError(body)
	}
	if trimmed[0] != '{' {
		return schemas.Errorf(schemas.CodeInvalidJSON, "The body is %s, not a JSON object. Send an object with model and messages.", kindOf(trimmed))
	}
	if at := loneSurrogate(body); at >= 0 {
		return schemas.Errorf(schemas.CodeInvalidJSON,
			"The body has half of a surrogate pair (%s at byte %d), so a string was cut inside a character, such as an emoji. Cut strings between characters.",
			body[at:at+6], at)
	}
	return nil
}

func invalidUTF8(s string) int {
	for i, r := range s {
		if r == utf8.RuneError {
			if _, size := utf8.DecodeRuneInString(s[i:]); size == 1 {
				return i
			}
		}
	}
	return len(s)
}

func syntaxError(body string) *schemas.Error {
	if len(body) <= maxLocated {
		var raw json.RawMessage
		var syntax *json.SyntaxError
		if errors.As(json.Unmarshal([]byte(body), &raw), &syntax) {
			return schemas.Errorf(schemas.CodeInvalidJSON, "The body isn't valid JSON: %s (byte %d).", syntax, syntax.Offset)
		}
	}
	return schemas.Errorf(schemas.CodeInvalidJSON, "The body isn't valid JSON.")
}

// deeper reports whether s, which need not be valid, nests deeper than limit.
func deeper(s string, limit int) bool {
	depth := 0
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '"':
			i = endOfString(s, i) - 1
		case '{', '[':
			if depth++; depth > limit {
				return true
			}
		case '}', ']':
			depth--
		}
	}
	return false
}

// endOfString returns the index after the string that begins at s[i], or len(s) if
// it doesn't end.
func endOfString(s string, i int) int {
	for i++; i < len(s); i++ {
		quote := strings.IndexByte(s[i:], '"')
		if quote < 0 {
			return len(s)
		}
		start := i
		i += quote
		escapes := 0
		for j := i - 1; j >= start && s[j] == '\\'; j-- {
			escapes++
		}
		if escapes%2 == 0 {
			return i + 1
		}
	}
	return len(s)
}

// loneSurrogate returns the index of the first \uXXXX of valid JSON that is half of
// a surrogate pair without the other half, or -1.
func loneSurrogate(s string) int {
	for i := 0; ; {
		next := strings.IndexByte(s[i:], '\\')
		if next < 0 {
			return -1
		}
		i += next
		_, size := escape(s[i:])
		if size == 0 {
			return i
		}
		i += size
	}
}

// escape decodes the escape sequence at the start of s, which is valid JSON. Its
// size is 0 for half of a surrogate pair.
func escape(s string) (r rune, size int) {
	if s[1] != 'u' {
		return rune(s[1]), 2 // the value of \n and its like doesn't matter, one byte each
	}
	r = hex4(s[2:])
	if r < 0xd800 || r > 0xdfff {
		return r, 6
	}
	if r >= 0xdc00 || len(s) < 12 || s[6] != '\\' || s[7] != 'u' {
		return r, 0
	}
	low := hex4(s[8:])
	if low < 0xdc00 || low > 0xdfff {
		return r, 0
	}
	return (r-0xd800)<<10 + (low - 0xdc00) + 0x10000, 12
}

func hex4(s string) (r rune) {
	for i := range 4 {
		c := rune(s[i])
		switch {
		case c <= '9':
			c -= '0'
		default:
			c = c&^0x20 - 'A' + 10
		}
		r = r<<4 | c
	}
	return r
}

// textLen returns the length in bytes of the string that a JSON string literal,
// quotes included, stands for.
func textLen(literal string) int {
	s := literal[1 : len(literal)-1]
	n := 0
	for {
		next := strings.IndexByte(s, '\\')
		if next < 0 {
			return n + len(s)
		}
		r, size := escape(s[next:])
		n += next + utf8.RuneLen(r)
		s = s[next+size:]
	}
}

// text returns the string that a JSON string literal stands for.
func text(literal string) string {
	s := literal[1 : len(literal)-1]
	if strings.IndexByte(s, '\\') < 0 {
		return s
	}
	return gjson.Parse(literal).Str
}

// The three functions below walk over JSON that validate has accepted, so they
// needn't look for errors.

func skipSpace(s string, i int) int {
	for s[i] == ' ' || s[i] == '\n' || s[i] == '\t' || s[i] == '\r' {
		i++
	}
	return i
}

func endOfValue(s string, i int) int {
	switch s[i] {
	case '"':
		return endOfString(s, i)
	case '{', '[':
		for depth := 0; ; i++ {
			switch s[i] {
			case '"':
				i = endOfString(s, i) - 1
			case '{', '[':
				depth++
			case '}', ']':
				if depth--; depth == 0 {
					return i + 1
				}
			}
		}
	}
	for i < len(s) && strings.IndexByte(",]} \n\t\r", s[i]) < 0 {
		i++
	}
	return i
}

// members calls f with the key literal and the value of each member of an object,
// until it returns a fault.
func members(object string, f func(key, value string) *fault) *fault {
	for i := skipSpace(object, 1); object[i] != '}'; {
		end := endOfString(object, i)
		key := object[i:end]
		i = skipSpace(object, skipSpace(object, end)+1)
		end = endOfValue(object, i)
		if err := f(key, object[i:end]); err != nil {
			return err
		}
		if i = skipSpace(object, end); object[i] == ',' {
			i = skipSpace(object, i+1)
		}
	}
	return nil
}

// elements calls f with the index and the value of each element of an array, until
// it returns a fault.
func elements(array string, f func(i int, value string) *fault) *fault {
	n := 0
	for i := skipSpace(array, 1); array[i] != ']'; n++ {
		end := endOfValue(array, i)
		if err := f(n, array[i:end]); err != nil {
			return err
		}
		if i = skipSpace(array, end); array[i] == ',' {
			i = skipSpace(array, i+1)
		}
	}
	return nil
}
