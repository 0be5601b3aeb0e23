package demo

import (
	"net/http"
	"strconv"
)

// whole answers without a stream.
func (r *run) whole() {
	p := r.p
	tokens := p.end - p.start
	failing := p.fail != failNone && p.failAt <= p.end
	if failing {
		tokens = p.failAt - p.start
	}
	if !r.pace.token(r.done, max(tokens-1, 0)) {
		r.aborted()
	}
	r.server.stats.tokens.Add(int64(tokens * r.q.n))
	if failing {
		switch p.fail {
		case failStall:
			<-r.done
			r.aborted()
		case failDie:
			r.end(outcomeFailed)
			panic(http.ErrAbortHandler)
		case failError:
			r.refuse(500, "The demo model was asked to fail.")
			return
		}
	}
	b := r.appendHead(r.buf, "chat.completion")
	for choice := range r.q.n {
		if choice > 0 {
			b = append(b, ',')
		}
		b = r.appendMessage(b, choice, p.start+tokens, failing)
	}
	b = append(b, ']')
	if !r.f.NoUsage && !failing {
		b = r.appendUsage(append(b, `,"usage":`...), tokens, r.q.n)
	}
	b = append(b, "}\n"...)
	if failing && p.fail == failGarbage {
		b = append(b[:0], "<html>502 Bad Gateway\n"...)
	}
	if failing {
		r.end(outcomeFailed)
	} else {
		r.end(outcomeFinished)
	}
	h := r.w.Header()
	h["Content-Type"], h["Content-Length"] = jsonType, []string{strconv.Itoa(len(b))}
	_, _ = r.w.Write(b)
}

// appendMessage appends one choice of a reply that isn't streamed.
func (r *run) appendMessage(dst []byte, choice, end int, failing bool) []byte {
	p := r.p
	dst = append(dst, `{"index":`...)
	dst = strconv.AppendInt(dst, int64(choice), 10)
	dst = append(dst, `,"message":{"role":"assistant","content":`...)
	content := max(p.start, p.reasoning)
	if calls := p.callsUntil(end); len(calls) > 0 {
		dst = append(dst, `null,"tool_calls":[`...)
		for i, c := range calls {
			if i > 0 {
				dst = append(dst, ',')
			}
			dst = append(appendCall(append(dst, '{'), c.id, c.name, c.arguments), '}')
		}
		dst = append(dst, ']')
	} else {
		dst = append(dst, '"')
		dst = r.appendTokens(dst, content, end, choice)
		dst = append(dst, '"')
	}
	if p.start < min(p.reasoning, end) {
		dst = append(dst, `,"`...)
		dst = append(dst, r.reasoningField()...)
		dst = append(dst, `":"`...)
		dst = r.appendTokens(dst, p.start, min(p.reasoning, end), choice)
		dst = append(dst, '"')
	}
	dst = append(dst, '}')
	if r.q.logprobs && len(p.calls) == 0 {
		dst = r.appendLogprobs(append(dst, `,"logprobs":`...), content, max(content, end), choice)
	}
	if failing {
		return append(dst, `,"finish_reason":null}`...)
	}
	dst = append(dst, `,"finish_reason":"`...)
	dst = append(dst, p.finish...)
	return append(dst, `"}`...)
}
