package dispatch

import (
	"bytes"
	"unicode/utf8"

	"github.com/ownllm/ownllm/schemas"
)

// said is what a stream has said so far, as far as another agent has to know it to go on
// from there. Every line that is taken in is read for it, so the reading is by hand: it
// copies nothing but the text.
//
// It is exact: what it doesn't understand to the letter makes the reply one that can't be
// continued, and never a text that differs from what the client has read.
type said struct {
	text  []byte
	ended bool // a finish_reason came
	// more says that it was more than text, or too much of it: it can't be continued.
	more bool
	// before and after are what surrounded the text in the last line that had one. Nearly every
	// line is like the one before it, and needn't be walked over again.
	before, after []byte
}

// take reads the lines of a frame.
func (s *said) take(lines []byte) {
	for len(lines) > 0 && !s.more {
		var line []byte
		line, lines, _ = bytes.Cut(lines, []byte{'\n'})
		s.line(line)
	}
	if s.more {
		s.text, s.before, s.after = nil, nil, nil
	}
}

// again reads a chunk that is like the last one, with another text that has no escapes, and
// reports whether it is.
func (s *said) again(b []byte) bool {
	end := len(b) - len(s.after)
	if len(s.before) == 0 || end < len(s.before) || !bytes.HasPrefix(b, s.before) || !bytes.HasSuffix(b, s.after) {
		return false
	}
	raw := b[len(s.before):end]
	for _, c := range raw {
		if c < ' ' || c == '"' || c == '\\' {
			return false
		}
	}
	if len(s.text)+len(raw) > schemas.MaxContinued || !utf8.Valid(raw) {
		return false
	}
	s.text = append(s.text, raw...)
	return true
}

// line reads one chunk.
func (s *said) line(b []byte) {
	if s.again(b) {
		return
	}
	w := walk{b: b}
	w.want('{')
	seen := false
	for n := 0; w.next(&n, '}'); {
		if string(w.key()) != "choices" {
			w.value(1)
			continue
		}
		w.once(&seen)
		s.choices(&w)
	}
	if w.bad || w.peek() != 0 || w.i < len(b) {
		s.more = true
	} else if w.end > 0 {
		s.before, s.after = append(s.before[:0], b[:w.start]...), append(s.after[:0], b[w.end:]...)
	}
}

// choices reads the choices of a chunk, of which the reply has one.
func (s *said) choices(w *walk) {
	if w.peek() == 'n' {
		w.value(2)
		return
	}
	w.want('[')
	for n := 0; w.next(&n, ']'); {
		if n > 1 {
			w.bad = true
			return
		}
		s.choice(w)
	}
}

func (s *said) choice(w *walk) {
	w.want('{')
	var index, delta, finish bool
	for n := 0; w.next(&n, '}'); {
		switch string(w.key()) {
		case "index":
			w.once(&index)
			w.want('0')
		case "delta":
			w.once(&delta)
			s.delta(w)
		case "finish_reason":
			w.once(&finish)
			if w.peek() != '"' {
				w.null()
				break
			}
			s.ended = len(w.str()) > 0 || s.ended
		default:
			w.value(3)
		}
	}
}

func (s *said) delta(w *walk) {
	w.want('{')
	content := false
	for n := 0; w.next(&n, '}'); {
		switch string(w.key()) {
		case "role":
			w.value(4)
		case "content":
			w.once(&content)
			if w.peek() != '"' {
				w.null()
				break
			}
			s.content(w)
		default:
			// Reasoning, a tool call, a refusal, audio: there is more than text to it.
			if w.value(4) {
				w.bad = true
			}
		}
	}
}

// content takes in a piece of the text.
func (s *said) content(w *walk) {
	raw := w.str()
	w.start, w.end = w.i-1-len(raw), w.i-1
	if w.bad || len(s.text)+len(raw) > schemas.MaxContinued {
		w.bad = true
		return
	}
	start := len(s.text)
	for {
		i := bytes.IndexByte(raw, '\\')
		if i < 0 {
			break
		}
		s.text = append(s.text, raw[:i]...)
		r, size := escaped(raw[i:])
		if size == 0 {
			w.bad = true
			return
		}
		s.text = utf8.AppendRune(s.text, r)
		raw = raw[i+size:]
	}
	s.text = append(s.text, raw...)
	if !utf8.Valid(s.text[start:]) {
		w.bad = true
	}
}

// escaped reads the escape at the beginning of b and returns how many bytes it has; 0 for
// half of a surrogate pair, which nobody reads the way that another does.
func escaped(b []byte) (rune, int) {
	switch b[1] {
	case 'b':
		return '\b', 2
	case 'f':
		return '\f', 2
	case 'n':
		return '\n', 2
	case 'r':
		return '\r', 2
	case 't':
		return '\t', 2
	case 'u':
	default:
		return rune(b[1]), 2
	}
	r := hex4(b[2:6])
	switch {
	case r < 0xd800 || r > 0xdfff:
		return r, 6
	case r > 0xdbff || len(b) < 12 || b[6] != '\\' || b[7] != 'u':
		return 0, 0
	}
	low := hex4(b[8:12])
	if low < 0xdc00 || low > 0xdfff {
		return 0, 0
	}
	return (r-0xd800)<<10 | (low - 0xdc00) + 0x10000, 12
}

// hex4 reads four hexadecimal digits, -1 if they aren't.
func hex4(b []byte) rune {
	var r rune
	for _, c := range b {
		switch {
		case c >= '0' && c <= '9':
			c -= '0'
		case c|0x20 >= 'a' && c|0x20 <= 'f':
			c = c | 0x20 - 'a' + 10
		default:
			return -1
		}
		r = r<<4 | rune(c)
	}
	return r
}

// walk goes over one JSON text, as strictly as encoding/json does, and more so where two
// readers could read it in two ways. Once something is wrong, bad stays true.
type walk struct {
	b   []byte
	i   int
	bad bool
	// start and end are where the text is; end is 0 without one.
	start, end int
}

// deepest bounds the nesting of what is walked over.
const deepest = 100

// peek returns the next byte that isn't white space, 0 at the end or if something is wrong.
func (w *walk) peek() byte {
	for ; w.i < len(w.b) && !w.bad; w.i++ {
		if c := w.b[w.i]; c != ' ' && c != '\t' && c != '\n' && c != '\r' {
			return c
		}
	}
	return 0
}

func (w *walk) eat(c byte) bool {
	if w.peek() != c {
		return false
	}
	w.i++
	return true
}

func (w *walk) want(c byte) {
	if !w.eat(c) {
		w.bad = true
	}
}

// next moves to the next element or member, up to the end. n counts them from 1.
func (w *walk) next(n *int, end byte) bool {
	if w.eat(end) {
		return false
	}
	if *n++; *n > 1 {
		w.want(',')
	}
	return !w.bad
}

// once notes a member of which there may be one.
func (w *walk) once(seen *bool) {
	w.bad = w.bad || *seen
	*seen = true
}

// key returns the name of a member. One that is written with escapes is nothing that we
// or a backend would send.
func (w *walk) key() []byte {
	key := w.str()
	if bytes.IndexByte(key, '\\') >= 0 {
		w.bad = true
	}
	w.want(':')
	return key
}

func (w *walk) null() { w.word("null") }

func (w *walk) word(word string) {
	if w.peek(); w.bad || w.i+len(word) > len(w.b) || string(w.b[w.i:w.i+len(word)]) != word {
		w.bad = true
		return
	}
	w.i += len(word)
}

// str returns what is between the quotes of a string. Its escapes are sound.
func (w *walk) str() []byte {
	w.want('"')
	for start := w.i; w.i < len(w.b) && !w.bad; {
		switch c := w.b[w.i]; {
		case c == '"':
			w.i++
			return w.b[start : w.i-1]
		case c < ' ':
			w.bad = true
		case c == '\\':
			w.escape()
		default:
			w.i++
		}
	}
	w.bad = true
	return nil
}

func (w *walk) escape() {
	rest := w.b[w.i:]
	switch {
	case len(rest) >= 2 && bytes.IndexByte([]byte(`"\/bfnrt`), rest[1]) >= 0:
		w.i += 2
	case len(rest) >= 6 && rest[1] == 'u' && hex4(rest[2:6]) >= 0:
		w.i += 6
	default:
		w.bad = true
	}
}

// value walks over any value and reports whether there is anything in it: null and what is
// empty hold nothing.
func (w *walk) value(depth int) (filled bool) {
	if depth > deepest {
		w.bad = true
	}
	switch c := w.peek(); {
	case c == '"':
		return len(w.str()) > 0
	case c == '{':
		w.i++
		n := 0
		for w.next(&n, '}') {
			w.key()
			w.value(depth + 1)
		}
		return n > 0
	case c == '[':
		w.i++
		n := 0
		for w.next(&n, ']') {
			w.value(depth + 1)
		}
		return n > 0
	case c == 'n':
		w.null()
		return false
	case c == 't':
		w.word("true")
	case c == 'f':
		w.word("false")
	default:
		w.number()
	}
	return true
}

func (w *walk) number() {
	w.eat('-')
	if w.i < len(w.b) && w.b[w.i] == '0' {
		w.i++
	} else {
		w.digits()
	}
	if w.i < len(w.b) && w.b[w.i] == '.' {
		w.i++
		w.digits()
	}
	if w.i < len(w.b) && w.b[w.i]|0x20 == 'e' {
		w.i++
		if w.i < len(w.b) && (w.b[w.i] == '+' || w.b[w.i] == '-') {
			w.i++
		}
		w.digits()
	}
}

func (w *walk) digits() {
	start := w.i
	for w.i < len(w.b) && w.b[w.i] >= '0' && w.b[w.i] <= '9' {
		w.i++
	}
	if w.i == start {
		w.bad = true
	}
}
