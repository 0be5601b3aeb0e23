package backend

import (
	"bytes"
	"encoding/json"
)

// The scanner walks over JSON text once, checks it as strictly as encoding/json
// does, and copies nothing: it deals in positions. A position of -1 stands for text
// that isn't JSON.

// maxDepth bounds the nesting of arrays and objects, so that hostile text can't
// exhaust the stack.
const maxDepth = 1000

// plain marks the bytes that a JSON string holds as they are.
var plain = func() (t [256]bool) {
	for c := range t {
		t[c] = c >= ' ' && c != '"' && c != '\\'
	}
	return t
}()

// skipSpace returns the position of the first byte at or after i that isn't white
// space.
func skipSpace(b []byte, i int) int {
	for i < len(b) && (b[i] == ' ' || b[i] == '\n' || b[i] == '\t' || b[i] == '\r') {
		i++
	}
	return i
}

// skipValue returns the end of the value that begins at i.
func skipValue(b []byte, i, depth int) int {
	if i < 0 || i >= len(b) || depth > maxDepth {
		return -1
	}
	switch c := b[i]; {
	case c == '"':
		return skipString(b, i)
	case c == '{':
		o := object{b: b, i: i, depth: depth}
		for o.next() {
			o.skip()
		}
		return o.end()
	case c == '[':
		a := array{b: b, i: i, depth: depth}
		for a.next() {
			a.i = skipValue(b, a.i, depth+1)
		}
		return a.end()
	case c == 't':
		return skipWord(b, i, "true")
	case c == 'f':
		return skipWord(b, i, "false")
	case c == 'n':
		return skipWord(b, i, "null")
	case c == '-' || c >= '0' && c <= '9':
		return skipNumber(b, i)
	}
	return -1
}

func skipWord(b []byte, i int, word string) int {
	if end := i + len(word); end <= len(b) && string(b[i:end]) == word {
		return end
	}
	return -1
}

// skipString returns the end of the string whose opening quote is at i.
func skipString(b []byte, i int) int {
	i++
	for {
		for i < len(b) && plain[b[i]] {
			i++
		}
		if i >= len(b) {
			return -1
		}
		switch b[i] {
		case '"':
			return i + 1
		case '\\':
			if i+1 >= len(b) {
				return -1
			}
			switch b[i+1] {
			case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
				i += 2
			case 'u':
				if i+6 > len(b) || !hex(b[i+2]) || !hex(b[i+3]) || !hex(b[i+4]) || !hex(b[i+5]) {
					return -1
				}
				i += 6
			default:
				return -1
			}
		default:
			return -1
		}
	}
}

func hex(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F'
}

func skipNumber(b []byte, i int) int {
	if b[i] == '-' {
		i++
	}
	switch {
	case i < len(b) && b[i] == '0':
		i++
	default:
		if i = skipDigits(b, i); i < 0 {
			return -1
		}
	}
	if i < len(b) && b[i] == '.' {
		if i = skipDigits(b, i+1); i < 0 {
			return -1
		}
	}
	if i < len(b) && (b[i] == 'e' || b[i] == 'E') {
		i++
		if i < len(b) && (b[i] == '+' || b[i] == '-') {
			i++
		}
		return skipDigits(b, i)
	}
	return i
}

// skipDigits returns the end of the digits at i, of which there must be one.
func skipDigits(b []byte, i int) int {
	start := i
	for i < len(b) && b[i] >= '0' && b[i] <= '9' {
		i++
	}
	if i == start {
		return -1
	}
	return i
}

// object walks over the members of an object. After next, key and keyStart name the
// member and i is where its value begins; the caller moves i to the value's end, by
// skip or by walking over it.
type object struct {
	b        []byte
	i        int // at first the opening brace
	depth    int
	keyStart int
	key      []byte // without quotes; unescaped if it held an escape
	begun    bool
	done     bool
}

func (o *object) next() bool {
	if o.i < 0 || o.done {
		return false
	}
	i := o.i
	if !o.begun {
		o.begun = true
		if i >= len(o.b) || o.b[i] != '{' {
			o.i = -1
			return false
		}
		i = skipSpace(o.b, i+1)
		if i < len(o.b) && o.b[i] == '}' {
			o.i, o.done = i+1, true
			return false
		}
	} else {
		i = skipSpace(o.b, i)
		if i < len(o.b) && o.b[i] == '}' {
			o.i, o.done = i+1, true
			return false
		}
		if i >= len(o.b) || o.b[i] != ',' {
			o.i = -1
			return false
		}
		i = skipSpace(o.b, i+1)
	}
	if i >= len(o.b) || o.b[i] != '"' {
		o.i = -1
		return false
	}
	end := skipString(o.b, i)
	if end < 0 {
		o.i = -1
		return false
	}
	o.keyStart, o.key = i, o.b[i+1:end-1]
	if bytes.IndexByte(o.key, '\\') >= 0 {
		// Rare, but "\u0069d" is the key "id" to whoever reads it.
		var s string
		if json.Unmarshal(o.b[i:end], &s) == nil {
			o.key = []byte(s)
		}
	}
	i = skipSpace(o.b, end)
	if i >= len(o.b) || o.b[i] != ':' {
		o.i = -1
		return false
	}
	o.i = skipSpace(o.b, i+1)
	return true
}

// skip moves over the value of the current member and returns where it began and
// ended; the end is -1 if the value isn't JSON.
func (o *object) skip() (start, end int) {
	start = o.i
	o.i = skipValue(o.b, o.i, o.depth+1)
	return start, o.i
}

// end is the position after the closing brace, once next has returned false.
func (o *object) end() int {
	if !o.done {
		return -1
	}
	return o.i
}

// array walks over the elements of an array. After next, i is where an element
// begins; the caller moves i to its end.
type array struct {
	b     []byte
	i     int // at first the opening bracket
	depth int
	begun bool
	done  bool
}

func (a *array) next() bool {
	if a.i < 0 || a.done {
		return false
	}
	i := a.i
	if !a.begun {
		a.begun = true
		if i >= len(a.b) || a.b[i] != '[' {
			a.i = -1
			return false
		}
		i = skipSpace(a.b, i+1)
		if i < len(a.b) && a.b[i] == ']' {
			a.i, a.done = i+1, true
			return false
		}
		a.i = i
		return true
	}
	i = skipSpace(a.b, i)
	switch {
	case i < len(a.b) && a.b[i] == ']':
		a.i, a.done = i+1, true
		return false
	case i < len(a.b) && a.b[i] == ',':
		a.i = skipSpace(a.b, i+1)
		return true
	}
	a.i = -1
	return false
}

func (a *array) end() int {
	if !a.done {
		return -1
	}
	return a.i
}

// isNull reports whether the raw value is null.
func isNull(raw []byte) bool { return len(raw) == 4 && raw[0] == 'n' }

// count reads a raw value as a count: a whole number from 0 to a billion.
func count(raw []byte) (int, bool) {
	if len(raw) == 0 || len(raw) > 9 {
		return 0, false
	}
	n := 0
	for _, c := range raw {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = n*10 + int(c-'0')
	}
	return n, true
}
