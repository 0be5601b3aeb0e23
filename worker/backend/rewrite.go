package backend

import (
	"bytes"
	"errors"
	"strconv"

	"github.com/ownllm/ownllm/schemas"
)

var (
	errNotJSON  = errors.New("it sent something that isn't JSON")
	errNotReply = errors.New("it sent something that isn't a chat completion")
)

// backendFailure is an error that the backend reported inside a reply: the raw value
// of its "error".
type backendFailure struct{ raw []byte }

func (f *backendFailure) Error() string { return "the backend reported an error" }

// maxChoices bounds the index of a choice.
const maxChoices = 1024

// choice is what is known of one choice of a reply.
type choice struct {
	seen     bool // it has a delta with the role
	finished bool
	begun    bool // both as of what may go to the client, where that is bounded
	ended    bool
	counted  int // deltas that carried something; of a whole reply, a quarter of its bytes
	told     int // tokens as the backend counts them, -1 if it doesn't
}

// span is a part of a buffer.
type span struct{ start, end int }

func (s span) of(b []byte) []byte { return b[s.start:s.end] }
func (s span) ok() bool           { return s.end > 0 }

// rewriter turns the objects that a backend sends into those that the client gets:
// id, object, created and model are ours, reasoning has one name, the first delta of
// a choice has the role, usage is where the client asked for it. Every other field
// is copied as it is. A rewriter belongs to one reply.
type rewriter struct {
	// head opens every object: {"id":…,"object":…,"created":…,"model":…
	head []byte
	// message is the key of what a choice says: "delta" in a stream, else "message".
	message      string
	stream       bool
	includeUsage bool
	// partial says that the backend tells the usage of one choice at a time: of several
	// choices llama.cpp sends a usage chunk for each, and in a whole reply only that of
	// the first.
	partial bool
	// hideTimings keeps the client from what it hasn't asked for: llama.cpp's timings
	// before the end.
	hideTimings bool
	// continued says that the reply goes on where another broke off, and textual that there
	// was text; base is how many tokens there were, and told that the size of the client's
	// prompt is known. repeated and blank are what is left of those of the Call.
	continued, textual, told bool
	base                     int
	repeated, blank          string

	choices []choice
	// said and closing are of the last chunk: it has output, and it ends a choice.
	said, closing bool
	// prompt and completion are the backend's figures of the whole reply, -1 while it
	// has not told.
	prompt, completion int
	// usage is the last usage object that the backend sent, last the chunk for the
	// client that carries it.
	usage, last []byte
	// text is where the last chunk has its text, if one like it may come again, at where that is
	// in what the client gets, and index the choice's.
	text      span
	at, index int
	pattern   pattern
}

func (w *rewriter) reset(kind Kind, c *Call) {
	w.partial = kind == LlamaCPP
	w.message, w.stream, w.includeUsage = "message", c.Stream, c.IncludeUsage
	w.prompt, w.completion = -1, -1
	w.pattern.before = w.pattern.before[:0]
	if from := c.Continue; from != nil {
		w.continued, w.textual, w.base = true, from.Text != "", from.Tokens
		w.repeated, w.blank = c.repeated, c.blank
		// The client has had the role.
		w.choices = append(w.choices[:0], choice{seen: true, begun: true, told: -1})
		if prompt := max(from.PromptTokens, c.prompt()); prompt > 0 {
			w.prompt, w.told = prompt, true
		}
	}
	w.head = append(w.head[:0], `{"id":`...)
	w.head = schemas.AppendString(w.head, c.Completion)
	if c.Stream {
		w.message = "delta"
		w.head = append(w.head, `,"object":"chat.completion.chunk","created":`...)
	} else {
		w.head = append(w.head, `,"object":"chat.completion","created":`...)
	}
	w.head = strconv.AppendInt(w.head, c.Created, 10)
	w.head = append(w.head, `,"model":`...)
	w.head = schemas.AppendString(w.head, c.ReplyModel)
}

// chunk appends the chunk for the client and a newline, or nothing if the client is
// not to see it. On an error dst comes back as it was.
func (w *rewriter) chunk(dst, data []byte) ([]byte, error) {
	if dst, ok := w.again(dst, data); ok {
		return dst, nil
	}
	start := len(dst)
	dst, choices, usage, err := w.object(dst, data)
	if err != nil {
		return dst[:start], err
	}
	if usage.ok() && choices == 0 {
		if w.includeUsage {
			w.last = append(append(w.last[:0], dst[start:]...), `,"usage":`...)
			w.last = oneLine(append(append(w.last, usage.of(data)...), '}'), 0)
		}
		return dst[:start], nil
	}
	if w.includeUsage {
		dst = append(dst, `,"usage":null`...)
	}
	dst = append(oneLine(append(dst, '}'), start), '\n')
	if choices == 1 && w.text.ok() && (!usage.ok() || usage.start > w.text.end) {
		w.pattern.learn(data, dst[start:], w.index, w.text, w.at-start, usage)
	}
	return dst, nil
}

// whole appends the reply that isn't streamed. prompt is the size of the prompt for a
// backend that doesn't tell it.
func (w *rewriter) whole(dst, data []byte, prompt int) ([]byte, error) {
	start := len(dst)
	dst, choices, usage, err := w.object(dst, data)
	if err == nil && choices == 0 {
		err = errNotReply
	}
	if err != nil {
		return dst[:start], err
	}
	dst = append(dst, `,"usage":`...)
	if usage.ok() && !w.multiply() {
		dst = append(dst, usage.of(data)...)
	} else {
		dst = w.appendUsage(dst, prompt, w.tokens())
	}
	return append(dst, '}'), nil
}

// finished reports whether there was a choice, and every choice came to its end.
func (w *rewriter) finished() bool {
	for i := range w.choices {
		if !w.choices[i].finished {
			return false
		}
	}
	return len(w.choices) > 0
}

// object appends the object up to its usage, leaving the closing brace to the
// caller, and returns how many choices it has and where in data its usage is.
func (w *rewriter) object(dst, data []byte) (out []byte, choices int, usage span, err error) {
	dst = append(dst, w.head...)
	w.said, w.closing, w.text = false, false, span{}
	var flatError, hasChoices bool
	var single int // index of the last choice
	var timings, failure span
	o := object{b: data, i: skipSpace(data, 0)}
	for o.next() {
		switch string(o.key) {
		case "id", "created", "model":
			o.skip()
		case "object":
			start, end := o.skip()
			flatError = end > 0 && string(data[start:end]) == `"error"`
		case "error":
			if start, end := o.skip(); end > 0 && blames(data[start:end]) {
				failure = span{start, end}
			}
		case "usage":
			if start, end := o.skip(); end > 0 && !isNull(data[start:end]) {
				usage = span{start, end}
			}
		case "choices":
			hasChoices = true
			dst = append(dst, `,"choices":[`...)
			if dst, choices, single, err = w.appendChoices(dst, &o, choices); err != nil {
				return dst, 0, span{}, err
			}
			dst = append(dst, ']')
		default:
			key := o.keyStart
			start, end := o.skip()
			if end < 0 {
				continue // which ends the loop
			}
			if string(o.key) == "timings" {
				timings = span{start, end}
				if w.hideTimings && choices > 0 && !w.closing {
					continue
				}
			}
			dst = append(append(dst, ','), data[key:end]...)
		}
	}
	end := o.end()
	switch {
	case end < 0 || skipSpace(data, end) != len(data):
		return dst, 0, span{}, errNotJSON
	case failure.ok():
		return dst, 0, span{}, &backendFailure{failure.of(data)}
	case flatError:
		return dst, 0, span{}, &backendFailure{data[skipSpace(data, 0):end]}
	case !hasChoices && !usage.ok():
		return dst, 0, span{}, errNotReply
	case !hasChoices:
		dst = append(dst, `,"choices":[]`...)
	}
	if usage.ok() && !w.noteUsage(usage.of(data), choices, single) {
		usage = span{}
	}
	if timings.ok() {
		w.text = span{} // they differ from chunk to chunk
	}
	if timings.ok() && !usage.ok() {
		w.noteTimings(timings.of(data), choices, single)
	}
	return dst, choices, usage, nil
}

// blames reports whether the raw value of an "error" is one. Some servers send an
// empty one along with every chunk.
func blames(raw []byte) bool {
	switch string(raw) {
	case "null", "false", `""`, "{}":
		return false
	}
	return true
}

// appendChoices appends the elements of the array that o stands at. n counts the
// choices, last is the index of the last of them.
func (w *rewriter) appendChoices(dst []byte, o *object, n int) (out []byte, total, last int, err error) {
	if o.i < len(o.b) && o.b[o.i] == 'n' {
		// "choices":null, which some servers send along with the usage.
		if _, end := o.skip(); end < 0 {
			return dst, n, 0, errNotJSON
		}
		return dst, n, 0, nil
	}
	if o.i < len(o.b) && o.b[o.i] != '[' {
		return dst, n, 0, errNotReply
	}
	a := array{b: o.b, i: o.i, depth: o.depth + 1}
	for first := true; a.next(); first = false {
		if !first {
			dst = append(dst, ',')
		}
		dst, a.i, last, err = w.appendChoice(dst, a.b, a.i, n)
		if err != nil {
			return dst, n, last, err
		}
		n++
	}
	if o.i = a.end(); o.i < 0 {
		return dst, n, last, errNotJSON
	}
	return dst, n, last, nil
}

// appendChoice appends the choice that begins at i and returns where it ends. It
// walks over the choice once; only one that has to change is walked over again.
func (w *rewriter) appendChoice(dst, b []byte, i, position int) (out []byte, end, index int, err error) {
	if i < len(b) && b[i] != '{' {
		return dst, -1, 0, errNotReply
	}
	index = position
	var d delta
	var hasIndex, hasMessage, hasFinish, emptyFinish, finished bool
	o := object{b: b, i: i, depth: 2}
	for o.next() {
		switch string(o.key) {
		case "index":
			start, end := o.skip()
			if end < 0 {
				continue
			}
			var ok bool
			if index, ok = count(b[start:end]); !ok || index >= maxChoices {
				return dst, -1, 0, errNotReply
			}
			hasIndex = true
		case "finish_reason":
			start, end := o.skip()
			if end < 0 {
				continue
			}
			hasFinish, emptyFinish = true, string(b[start:end]) == `""`
			finished = b[start] == '"' && !emptyFinish
		case w.message:
			hasMessage = true
			if d, o.i = scanDelta(b, o.i); o.i < 0 {
				return dst, -1, 0, errNotReply
			}
		default:
			o.skip()
		}
	}
	if end = o.end(); end < 0 {
		return dst, -1, 0, errNotJSON
	}
	for len(w.choices) <= index {
		w.choices = append(w.choices, choice{told: -1})
	}
	if w.continued && d.size > 0 {
		if w.textual && d.reasoning.ok() && filled(d.reasoning.of(b)) {
			return dst, -1, 0, errNotContinued // thoughts come before the text
		}
		if d.text.ok() && (w.repeated != "" || w.blank != "") {
			if d.left, d.cut, err = w.skip(d.text.of(b)); err != nil {
				return dst, -1, 0, err
			}
			if d.cut && d.left == "" {
				d.size -= d.text.end - d.text.start
			}
		}
	}
	c := &w.choices[index]
	first := !c.seen
	c.seen = true
	c.finished = c.finished || finished
	w.said, w.closing = w.said || d.size > 0, w.closing || finished
	switch {
	case !w.stream:
		c.counted = (d.size + 3) / 4
	case d.size > 0:
		c.counted++
	}
	if !first && !finished && !d.cut && w.repeated == "" && w.blank == "" && d.text.ok() && filled(d.text.of(b)) {
		w.text, w.index = d.text, index
	}
	if hasIndex && hasMessage && hasFinish && !emptyFinish && !d.changes(first, w.stream) {
		dst = append(dst, b[i:end]...)
		w.at = len(dst) - (end - d.text.start)
		return dst, end, index, nil
	}

	dst = append(dst, '{')
	start := len(dst)
	o = object{b: b, i: i, depth: 2}
	for o.next() {
		key, from := o.keyStart, o.i
		o.skip()
		if len(dst) > start {
			dst = append(dst, ',')
		}
		switch string(o.key) {
		case w.message:
			dst = append(append(append(dst, '"'), w.message...), '"', ':')
			dst = w.appendDelta(dst, b, from, &d, first)
		case "finish_reason":
			if emptyFinish {
				dst = append(dst, `"finish_reason":null`...)
				break
			}
			dst = append(dst, b[key:o.i]...)
		default:
			dst = append(dst, b[key:o.i]...)
		}
	}
	if !hasIndex {
		dst = strconv.AppendInt(append(comma(dst, start), `"index":`...), int64(index), 10)
	}
	if !hasMessage {
		dst = append(append(append(comma(dst, start), '"'), w.message...), '"', ':')
		dst = w.appendDelta(dst, nil, -1, &d, first)
	}
	if !hasFinish {
		dst = append(comma(dst, start), `"finish_reason":null`...)
	}
	return append(dst, '}'), end, index, nil
}

func comma(dst []byte, start int) []byte {
	if len(dst) > start {
		return append(dst, ',')
	}
	return dst
}

// delta is what scanDelta found in a delta, or in the message of a whole reply.
type delta struct {
	null      bool // null instead of an object
	role      bool // has a role
	assistant bool // and it is "assistant"
	content   bool // has a content, null perhaps
	size      int  // bytes of output that it carries
	rename    bool // has reasoning under a name that isn't ours
	rank      int  // rank of the name that reasoning was found under
	reasoning span
	text      span   // the content, if it is a string
	cut       bool   // of the content only left goes to the client
	left      string // as it is
}

// reasoningRank ranks the names under which backends send reasoning; 0 is no name
// of it. A server may send the same text under two.
func reasoningRank(key []byte) int {
	switch string(key) {
	case "reasoning_content":
		return 3
	case "reasoning":
		return 2
	case "thinking":
		return 1
	}
	return 0
}

// text reports whether the raw value is a string or null: what reasoning has to be
// for us to touch it.
func text(raw []byte) bool { return raw[0] == '"' || raw[0] == 'n' }

// scanDelta walks over the delta at i and returns where it ends, or -1.
func scanDelta(b []byte, i int) (d delta, end int) {
	if i < len(b) && b[i] == 'n' {
		d.null = true
		return d, skipWord(b, i, "null")
	}
	o := object{b: b, i: i, depth: 3}
	for o.next() {
		start, end := o.skip()
		if end < 0 {
			break
		}
		raw := b[start:end]
		switch string(o.key) {
		case "role":
			d.role, d.assistant = true, string(raw) == `"assistant"`
			continue
		case "content":
			d.content = true
			if raw[0] == '"' {
				d.text = span{start, end}
			}
		}
		// Whatever else a delta has, text, tool calls, a refusal, audio, costs tokens.
		if filled(raw) {
			d.size += len(raw)
		}
		if rank := reasoningRank(o.key); rank > 0 && text(raw) {
			if rank < 3 {
				d.rename = true
			}
			// A null says less than a text under a lower name.
			if raw[0] == '"' {
				rank += 3
			}
			if rank >= d.rank {
				d.rank, d.reasoning = rank, span{start, end}
			}
		}
	}
	return d, o.end()
}

// filled reports whether a raw value holds anything.
func filled(raw []byte) bool {
	switch raw[0] {
	case '"', '[', '{':
		return len(raw) > 2
	}
	return false
}

// changes reports whether the delta has to be written anew. The role belongs into
// the first delta only: the SDKs' helpers join the strings of all deltas, and make
// "assistantassistant" of two.
func (d *delta) changes(first, stream bool) bool {
	switch {
	case d.null || d.rename || d.cut:
		return true
	case !stream:
		return !d.assistant || !d.content
	case first:
		return !d.assistant
	}
	return d.role
}

// appendDelta appends the delta at from, or an empty one if from is -1.
func (w *rewriter) appendDelta(dst, b []byte, from int, d *delta, first bool) []byte {
	dst = append(dst, '{')
	start := len(dst)
	if first {
		dst = append(dst, `"role":"assistant"`...)
	}
	if !w.stream && !d.content {
		dst = append(comma(dst, start), `"content":null`...)
	}
	if from < 0 || d.null {
		return append(dst, '}')
	}
	o := object{b: b, i: from, depth: 3}
	for o.next() {
		key := o.keyStart
		begin, end := o.skip()
		switch {
		case string(o.key) == "role":
		case d.cut && string(o.key) == "content":
			dst = schemas.AppendString(append(comma(dst, start), `"content":`...), d.left)
		case reasoningRank(o.key) > 0 && text(b[begin:end]):
			if begin == d.reasoning.start {
				dst = append(comma(dst, start), `"reasoning_content":`...)
				dst = append(dst, b[begin:end]...)
			}
		default:
			dst = append(comma(dst, start), b[key:end]...)
			if begin == d.text.start {
				w.at = len(dst) - (end - begin)
			}
		}
	}
	return append(dst, '}')
}

// oneLine makes one line of JSON text from position start on. Strings hold no line
// ends, so only white space between values changes.
func oneLine(b []byte, start int) []byte {
	for _, end := range []byte{'\n', '\r'} {
		for rest := b[start:]; ; {
			i := bytes.IndexByte(rest, end)
			if i < 0 {
				break
			}
			rest[i] = ' '
			rest = rest[i+1:]
		}
	}
	return b
}
