package demo

import (
	"net/http"
	"strconv"
	"time"
	"unicode/utf8"
)

func (r *run) streamed() {
	r.flush, _ = r.w.(http.Flusher)
	r.head = r.appendHead([]byte("data: "), "chat.completion.chunk")
	h := r.w.Header()
	h["Content-Type"], h["Cache-Control"] = eventType, noCache
	perChunk, p := max(r.f.TokensPerChunk, 1), r.p
	for pos := p.start; ; {
		if p.fail != failNone && pos == p.failAt {
			r.failStream()
			return
		}
		if pos >= p.end {
			break
		}
		next := p.stretch(pos, perChunk)
		if !r.pace.token(r.done, next-1-p.start) {
			r.aborted()
		}
		r.openRole()
		for choice := range r.q.n {
			r.send(r.appendChunk(r.buf[:0], pos, next, choice))
		}
		r.server.stats.tokens.Add(int64((next - pos) * r.q.n))
		pos = next
	}
	if p.start == p.end && !r.pace.token(r.done, 0) {
		r.aborted()
	}
	r.openRole()
	for choice := range r.q.n {
		b := r.appendChoice(r.buf[:0], choice)
		b = append(b, `},"finish_reason":"`...)
		b = append(b, p.finish...)
		r.send(r.appendTail(append(b, `"}]`...), p.end))
	}
	if r.q.usage && !r.f.NoUsage {
		b := append(r.buf[:0], r.head...)
		b = append(b, `],"usage":`...)
		b = r.appendUsage(b, p.end-p.start, r.q.n)
		r.send(append(b, "}\n\n"...))
	}
	if gone(r.done) {
		r.aborted()
	}
	r.end(outcomeFinished)
	r.send([]byte("data: [DONE]\n\n"))
}

// openRole sends the chunk with the role, once and for each choice.
func (r *run) openRole() {
	if r.begun {
		return
	}
	r.begun = true
	for choice := range r.q.n {
		b := r.appendChoice(r.buf[:0], choice)
		r.send(r.appendTail(append(b, `"role":"assistant","content":""},"finish_reason":null}]`...), r.p.start))
	}
}

// send writes one event. It returns only if the client still seems to be there.
func (r *run) send(event []byte) {
	r.buf = event // it may have grown
	if r.f.SplitUTF8 {
		cut := splitPoint(event)
		r.write(event[:cut])
		if !r.pace.wait(r.done, time.Now().Add(time.Millisecond)) {
			r.aborted()
		}
		event = event[cut:]
	}
	r.write(event)
}

func (r *run) write(b []byte) {
	if _, err := r.w.Write(b); err != nil {
		r.aborted()
	}
	if r.flush != nil {
		r.flush.Flush()
	}
}

// splitPoint is inside the first character of several bytes, or in the middle.
func splitPoint(b []byte) int {
	for i, c := range b {
		if c >= utf8.RuneSelf {
			return i + 1
		}
	}
	return len(b) / 2
}

func (r *run) appendChoice(dst []byte, choice int) []byte {
	dst = append(dst, r.head...)
	dst = append(dst, `{"index":`...)
	dst = strconv.AppendInt(dst, int64(choice), 10)
	return append(dst, `,"delta":{`...)
}

// appendTail ends the event of a choice that has come to the position pos.
func (r *run) appendTail(dst []byte, pos int) []byte {
	switch {
	case r.f.NoUsage || !r.q.usage:
	case r.q.continuous:
		dst = r.appendUsage(append(dst, `,"usage":`...), pos-r.p.start, 1)
	default:
		dst = append(dst, `,"usage":null`...)
	}
	return append(dst, "}\n\n"...)
}

// appendChunk appends the event with the tokens from pos to next, which are of one
// kind.
func (r *run) appendChunk(dst []byte, pos, next, choice int) []byte {
	p := r.p
	dst = r.appendChoice(dst, choice)
	if pos >= p.reasoning && len(p.calls) > 0 {
		dst = r.appendCallDelta(dst, pos, next)
		return r.appendTail(append(dst, `},"finish_reason":null}]`...), next)
	}
	dst = append(dst, '"')
	if pos < p.reasoning {
		dst = append(dst, r.reasoningField()...)
	} else {
		dst = append(dst, "content"...)
	}
	dst = append(dst, `":"`...)
	dst = r.appendTokens(dst, pos, next, choice)
	dst = append(dst, `"}`...)
	if r.q.logprobs && pos >= p.reasoning {
		dst = r.appendLogprobs(append(dst, `,"logprobs":`...), pos, next, choice)
	}
	return r.appendTail(append(dst, `,"finish_reason":null}]`...), next)
}

func (r *run) appendCallDelta(dst []byte, pos, next int) []byte {
	p := r.p
	first := p.pieces[pos-p.reasoning]
	dst = append(dst, `"tool_calls":[{"index":`...)
	dst = strconv.AppendInt(dst, int64(first.call), 10)
	if first.opens {
		dst = appendCall(append(dst, ','), p.calls[first.call].id, p.calls[first.call].name, "")
		return append(dst, `}]`...)
	}
	dst = append(dst, `,"function":{"arguments":"`...)
	for _, part := range p.pieces[pos-p.reasoning : next-p.reasoning] {
		dst = appendInner(dst, part.arguments)
	}
	return append(dst, `"}}]`...)
}

// failStream ends a stream in the way that was asked for.
func (r *run) failStream() {
	if r.p.failAt == r.p.start && !r.pace.token(r.done, 0) {
		r.aborted()
	}
	switch r.p.fail {
	case failStall:
		<-r.done
		r.aborted()
	case failDie:
		r.end(outcomeFailed)
		panic(http.ErrAbortHandler)
	}
	r.end(outcomeFailed)
	switch r.p.fail {
	case failEnd:
		r.write(nil)
	case failError:
		b := appendError(append(r.buf[:0], "data: "...), 500, "The demo model was asked to fail.")
		r.send(append(b, "\n\ndata: [DONE]\n\n"...))
	case failGarbage:
		r.send(append(r.buf[:0], "data: <html>502 Bad Gateway\n\n"...))
	}
}
