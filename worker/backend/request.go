package backend

import (
	"bytes"
	"strconv"

	"github.com/ownllm/ownllm/schemas"
)

// splice is one change to a JSON text: what is between start and end gives way to
// text.
type splice struct {
	span
	text []byte
}

// apply makes the changes, which are in ascending order, in a fresh copy.
func apply(body []byte, changes []splice) []byte {
	size := len(body)
	for _, s := range changes {
		size += len(s.text)
	}
	out := make([]byte, 0, size)
	at := 0
	for _, s := range changes {
		out = append(append(out, body[at:s.start]...), s.text...)
		at = s.end
	}
	return append(out, body[at:]...)
}

// withModel returns the body with the model's id replaced.
func withModel(body []byte, model string) ([]byte, error) {
	return edit(body, func(e *editor) { e.set("model", schemas.AppendString(nil, model)) })
}

// requestBody returns the client's body with what the server has to have otherwise:
// its own id of the model; stream as it was asked for; in a stream the usage, always,
// because it is what is billed, and the count so far where the stream has a bound; no
// more tokens than most, unless that is 0; and for Ollama the token limit under the name
// that it knows. All other bytes are the client's own. bounded reports whether the client
// asked for more than most.
func (k Kind) requestBody(c *Call, model string, most, window int64) (body []byte, bounded bool, err error) {
	body, err = edit(c.Body, func(e *editor) {
		e.set("model", schemas.AppendString(nil, model))
		if c.Stream {
			e.set("stream", []byte("true"))
			options := []string{"include_usage"}
			if k == VLLM || k == Demo && c.Allowed != nil {
				options = append(options, "continuous_usage_stats")
			}
			e.switchOn("stream_options", options)
			if k == LlamaCPP && c.Allowed != nil && !e.has(perToken) {
				e.add(perToken, []byte("true"))
			}
		} else if e.has("stream") {
			e.set("stream", []byte("false"))
		}
		// vLLM refuses to be allowed as many tokens as its window has, which bounds the
		// reply by itself.
		needless := (k == VLLM || k == Demo) && window > 0 && most/e.choices() >= window
		if most > 0 && !needless {
			bounded = e.bound(k, max(1, most/e.choices()))
		}
		if k == Ollama {
			e.rename("max_completion_tokens", "max_tokens")
		}
	})
	return body, bounded, err
}

// perToken is what makes llama.cpp tell its count with every chunk.
const perToken = "timings_per_token"

// choices is how many replies are asked for.
func (e *editor) choices() int64 {
	n := 1
	for _, m := range e.members {
		if m.key == "n" {
			n, _ = count(m.value.of(e.b))
		}
	}
	return max(1, int64(n))
}

// bound keeps each choice of the reply to most tokens, by all the names that the server
// knows for that, and reports whether the client's own limit doesn't.
func (e *editor) bound(k Kind, most int64) (bounded bool) {
	limit := strconv.AppendInt(nil, most, 10)
	told := false
	for _, m := range e.members {
		switch {
		case m.key == "max_tokens", m.key == "max_completion_tokens", m.key == "n_predict" && k == LlamaCPP:
		default:
			continue
		}
		value := m.value.of(e.b)
		if isNull(value) {
			continue
		}
		if n, ok := count(value); !ok || int64(n) > most {
			e.replace(m.value, limit)
			bounded = true
		}
		// Old builds of llama.cpp don't know the newer name.
		told = told || m.key == "max_tokens" || k != LlamaCPP
	}
	if !told {
		e.set("max_tokens", limit)
		bounded = true
	}
	return bounded
}

// editor collects changes to the members of one object.
type editor struct {
	b       []byte
	members []member
	open    int // position after the opening brace
	added   []byte
	changes map[int]splice // by start
}

// member is one member of an object: where its key begins, and its value.
type member struct {
	key   string
	at    int
	value span
}

// edit walks over the object b and lets do change its members.
func edit(b []byte, do func(*editor)) ([]byte, error) {
	e := editor{b: b, changes: map[int]splice{}}
	if err := e.read(); err != nil {
		return nil, err
	}
	do(&e)
	return e.result(), nil
}

func (e *editor) read() error {
	o := object{b: e.b, i: skipSpace(e.b, 0)}
	e.open = o.i + 1
	for o.next() {
		at := o.keyStart
		start, end := o.skip()
		e.members = append(e.members, member{string(o.key), at, span{start, end}})
	}
	if end := o.end(); end < 0 || skipSpace(e.b, end) != len(e.b) {
		return schemas.Errorf(schemas.CodeInvalidJSON, "The body isn't a JSON object.")
	}
	return nil
}

func (e *editor) result() []byte {
	changes := make([]splice, 0, len(e.changes)+1)
	if len(e.added) > 0 {
		if len(e.members) == 0 {
			e.added = bytes.TrimSuffix(e.added, []byte{','})
		}
		changes = append(changes, splice{span{e.open, e.open}, e.added})
	}
	for _, m := range e.members {
		for _, at := range [...]int{m.at, m.value.start} {
			if s, ok := e.changes[at]; ok {
				changes = append(changes, s)
			}
		}
	}
	return apply(e.b, changes)
}

func (e *editor) has(key string) bool {
	for _, m := range e.members {
		if m.key == key {
			return true
		}
	}
	return false
}

func (e *editor) replace(s span, text []byte) {
	if !bytes.Equal(s.of(e.b), text) {
		e.changes[s.start] = splice{s, text}
	}
}

func (e *editor) add(key string, value []byte) {
	e.added = append(schemas.AppendString(e.added, key), ':')
	e.added = append(append(e.added, value...), ',')
}

// set gives a member the value. A key that occurs twice gets it twice: which of them
// counts is for the server to say.
func (e *editor) set(key string, value []byte) {
	found := false
	for _, m := range e.members {
		if m.key == key {
			found = true
			e.replace(m.value, value)
		}
	}
	if !found {
		e.add(key, value)
	}
}

// switchOn makes a member an object in which the options are true, and keeps what
// else is in it.
func (e *editor) switchOn(key string, options []string) {
	fresh := []byte{'{', '}'}
	found := false
	for _, m := range e.members {
		if m.key != key {
			continue
		}
		found = true
		old := m.value.of(e.b)
		if old[0] != '{' {
			old = fresh
		}
		if text, err := edit(old, setTrue(options)); err == nil {
			e.replace(m.value, text)
		}
	}
	if !found {
		if text, err := edit(fresh, setTrue(options)); err == nil {
			e.add(key, text)
		}
	}
}

func setTrue(options []string) func(*editor) {
	return func(e *editor) {
		for _, name := range options {
			e.set(name, []byte("true"))
		}
	}
}

// rename passes the value of the member from on under the name to: by changing its
// name, or the other's value where the client gave both. A null says nothing.
func (e *editor) rename(from, to string) {
	for _, m := range e.members {
		value := m.value.of(e.b)
		if m.key != from || isNull(value) {
			continue
		}
		if e.has(to) {
			if s, ok := e.changes[m.value.start]; ok {
				value = s.text
			}
			e.set(to, value)
			continue
		}
		e.changes[m.at] = splice{span{m.at, skipString(e.b, m.at)}, schemas.AppendString(nil, to)}
	}
}
