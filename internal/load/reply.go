package load

import (
	"bytes"
	"errors"
	"io"
	"sync/atomic"
	"time"

	"github.com/tidwall/gjson"
)

// reply is one reply, as far as it has been read.
type reply struct {
	status int
	// first and last are when the first and the latest piece of it arrived, tokens with a
	// text or anything else that a model makes; zero before. gaps are the times between
	// pieces.
	first, last time.Time
	gaps        []time.Duration
	end         time.Time // when the terminal frame, or the end of the body, arrived
	chunks      int       // that brought tokens
	prompt      int       // tokens, as the server counts; 0: it doesn't say
	completion  int
	finished    bool // there was a finish_reason
	done        bool // there was a [DONE]
	refusal     *refusal
	numbers     numbers
	live        *atomic.Int64 // counts tokens as they arrive
}

// refusal is an error of the API.
type refusal struct{ code, kind, message string }

// tokens is how many tokens came: as the server counts, else a token for each chunk.
func (r *reply) tokens() int {
	if r.completion > 0 {
		return r.completion
	}
	return r.chunks
}

// meanGap is the mean time between two pieces.
func (r *reply) meanGap() time.Duration {
	if len(r.gaps) == 0 {
		return 0
	}
	return r.last.Sub(r.first) / time.Duration(len(r.gaps))
}

// piece notes that tokens came.
func (r *reply) piece(at time.Time) {
	r.chunks++
	r.live.Add(1)
	if r.first.IsZero() {
		r.first = at
	} else {
		r.gaps = append(r.gaps, at.Sub(r.last))
	}
	r.last = at
}

var (
	dataMark    = []byte("data:")
	doneMark    = []byte("[DONE]")
	contentMark = []byte(`"content":"`)
	finishMark  = []byte(`"finish_reason":"`)
	usageMark   = []byte(`"usage":{`)
	errorMark   = []byte(`"error"`)
)

// event takes one line of a stream.
func (r *reply) event(line []byte, at time.Time) {
	data, ok := bytes.CutPrefix(line, dataMark)
	if !ok {
		return // the end of an event, or a comment that keeps the connection alive
	}
	data = bytes.TrimLeft(data, " ")
	if bytes.Equal(data, doneMark) {
		r.done = true
		return
	}
	// Nearly every chunk brings content and nothing else. The mark can't be part of a text,
	// where quotes are escaped.
	if _, text, ok := bytes.Cut(data, contentMark); ok && len(text) > 0 && text[0] != '"' &&
		!bytes.Contains(data, finishMark) && !bytes.Contains(data, usageMark) && !bytes.Contains(data, errorMark) {
		r.numbers.take(text)
		r.piece(at)
		return
	}
	r.slowEvent(data, at)
}

// slowEvent takes any chunk, however it is spelt.
func (r *reply) slowEvent(data []byte, at time.Time) {
	if !gjson.ValidBytes(data) {
		r.refusal = &refusal{code: "not_json"}
		return
	}
	chunk := gjson.ParseBytes(data)
	if e := chunk.Get("error"); e.Exists() && e.Type != gjson.Null {
		r.refusal = parseRefusal(e)
		return
	}
	r.usage(chunk)
	choice := chunk.Get("choices.0")
	delta := choice.Get("delta")
	if content := delta.Get("content"); content.Str != "" {
		r.numbers.take(insideOf(content))
		r.piece(at)
	} else if delta.Get("reasoning_content").Str != "" || delta.Get("reasoning").Str != "" || delta.Get("tool_calls.#").Int() > 0 {
		r.piece(at)
	}
	if choice.Get("finish_reason").Str != "" {
		r.finished = true
	}
}

// insideOf is the JSON string of a value without its opening quote.
func insideOf(v gjson.Result) []byte { return []byte(v.Raw[1:]) }

func (r *reply) usage(of gjson.Result) {
	if u := of.Get("usage"); u.IsObject() {
		r.prompt, r.completion = int(u.Get("prompt_tokens").Int()), int(u.Get("completion_tokens").Int())
	}
}

func parseRefusal(e gjson.Result) *refusal {
	if e.Type == gjson.String {
		return &refusal{message: e.Str}
	}
	return &refusal{e.Get("code").String(), e.Get("type").Str, e.Get("message").Str}
}

// stream reads a reply that is streamed. at is when the latest bytes arrived.
func (r *reply) stream(l *lines, at *time.Time) error {
	for {
		line, err := l.next()
		if errors.Is(err, io.EOF) {
			if r.end.IsZero() {
				r.end = *at
			}
			return nil
		}
		if err != nil {
			return err
		}
		if r.end.IsZero() { // what comes behind the terminal frame is read, and no part of it
			r.event(line, *at)
			if r.done || r.refusal != nil {
				r.end = *at
			}
		}
	}
}

// whole reads a reply that isn't streamed.
func (r *reply) whole(l *lines, at *time.Time) error {
	body, err := l.all()
	if err != nil {
		return err
	}
	r.end = *at
	if !gjson.ValidBytes(body) {
		r.refusal = &refusal{code: "not_json"}
		return nil
	}
	root := gjson.ParseBytes(body)
	if e := root.Get("error"); e.Exists() && e.Type != gjson.Null {
		r.refusal = parseRefusal(e)
		return nil
	}
	r.usage(root)
	choice := root.Get("choices.0")
	r.finished = choice.Get("finish_reason").Str != ""
	r.done = r.finished
	if content := choice.Get("message.content"); content.Str != "" {
		r.numbers.take(insideOf(content))
		r.chunks++
		r.live.Add(1)
	}
	return nil
}

// refused reads the body of a response whose status is no success.
func (r *reply) refused(l *lines, at *time.Time) {
	r.refusal = &refusal{}
	if body, err := l.all(); err == nil && gjson.ValidBytes(body) {
		if e := gjson.GetBytes(body, "error"); e.Exists() {
			r.refusal = parseRefusal(e)
		}
	}
	r.end = *at
}
