package backend

import "strconv"

// end appends the chunk with the usage, if the client asked for one. prompt is the
// size of the prompt for a backend that never told it.
func (w *rewriter) end(dst []byte, prompt int) []byte {
	switch {
	case !w.includeUsage:
		return dst
	case len(w.last) > 0 && !w.continued && !(w.partial && len(w.choices) > 1):
		dst = append(dst, w.last...)
	default:
		dst = append(append(dst, w.head...), `,"choices":[],"usage":`...)
		if len(w.usage) > 0 && len(w.choices) == 1 && !w.continued {
			dst = oneLine(append(dst, w.usage...), len(dst))
		} else {
			dst = w.appendUsage(dst, prompt, w.tokens())
		}
		dst = append(dst, '}')
	}
	return append(dst, '\n')
}

// cut appends the end of a stream of n choices that is ended after so many tokens: for
// each choice whose end hasn't gone out a last chunk, and the usage.
func (w *rewriter) cut(dst []byte, n, prompt, tokens int) []byte {
	for i := range max(n, len(w.choices)) {
		var c choice
		if i < len(w.choices) {
			c = w.choices[i]
		}
		if c.ended {
			continue
		}
		dst = append(append(dst, w.head...), `,"choices":[{"index":`...)
		dst = strconv.AppendInt(dst, int64(i), 10)
		if c.begun {
			dst = append(dst, `,"delta":{},"finish_reason":"length"}]`...)
		} else {
			dst = append(dst, `,"delta":{"role":"assistant","content":""},"finish_reason":"length"}]`...)
		}
		if w.includeUsage {
			dst = append(dst, `,"usage":null`...)
		}
		dst = append(dst, '}', '\n')
	}
	if w.includeUsage {
		dst = append(append(dst, w.head...), `,"choices":[],"usage":`...)
		dst = append(w.appendUsage(dst, prompt, tokens), '}', '\n')
	}
	return dst
}

// passAll notes that all that was read may go to the client.
func (w *rewriter) passAll() {
	for i := range w.choices {
		c := &w.choices[i]
		c.begun, c.ended = c.seen, c.finished
	}
}

// multiply turns the figure of the first choice of a whole reply into one of all
// choices, by their length, and reports whether it had to.
func (w *rewriter) multiply() bool {
	if !w.partial || len(w.choices) < 2 || w.completion < 0 {
		return false
	}
	sum := 0
	for i := range w.choices {
		sum += w.choices[i].counted
	}
	if first := w.choices[0].counted; first > 0 {
		w.completion = (w.completion*sum + first - 1) / first
	}
	return true
}

// promptSize is the size of the prompt: what the server told of it, unless that is guessed from a
// prompt with the text that it goes on from, and the prompt was counted meanwhile. counted is 0 if
// it wasn't.
func (w *rewriter) promptSize(counted int) int {
	if w.prompt < 0 || w.continued && !w.told && counted > 0 {
		return counted
	}
	return w.prompt
}

func (w *rewriter) appendUsage(dst []byte, prompt, tokens int) []byte {
	prompt = w.promptSize(prompt)
	dst = strconv.AppendInt(append(dst, `{"prompt_tokens":`...), int64(prompt), 10)
	dst = strconv.AppendInt(append(dst, `,"completion_tokens":`...), int64(tokens), 10)
	dst = strconv.AppendInt(append(dst, `,"total_tokens":`...), int64(prompt+tokens), 10)
	return append(dst, '}')
}

// tokens is the number of output tokens so far, of the whole reply.
func (w *rewriter) tokens() int { return w.base + w.fresh() }

// fresh is the number of tokens that came from this server: the backend's own figure where it
// told one, else an estimate: one for each delta that carried something, and four
// bytes a token in a reply that came whole.
func (w *rewriter) fresh() int {
	growing := w.stream && w.partial && len(w.choices) > 1
	if w.completion >= 0 && !growing {
		return w.completion
	}
	n := 0
	for i := range w.choices {
		if c := &w.choices[i]; c.told >= 0 {
			n += c.told
		} else {
			n += c.counted
		}
	}
	return max(n, w.completion)
}

// noteUsage keeps what a usage object tells. While choices are streaming it is of
// the one choice that it came with; without choices, or in a whole reply, it is of
// all. It returns false for an object that tells nothing.
func (w *rewriter) noteUsage(raw []byte, choices, single int) bool {
	prompt, completion, _ := readUsage(raw, 0)
	if prompt < 0 && completion < 0 {
		return false
	}
	w.usage = append(w.usage[:0], raw...)
	w.note(prompt, completion, choices, single)
	return true
}

// readUsage reads the usage object at i and returns where it ends, or -1. A figure that it
// doesn't tell is -1.
func readUsage(b []byte, i int) (prompt, completion, end int) {
	prompt, completion = -1, -1
	o := object{b: b, i: i, depth: 1}
	for o.next() {
		start, end := o.skip()
		if end < 0 {
			break
		}
		switch string(o.key) {
		case "prompt_tokens":
			if n, ok := count(b[start:end]); ok {
				prompt = n
			}
		case "completion_tokens":
			if n, ok := count(b[start:end]); ok {
				completion = n
			}
		}
	}
	return prompt, completion, o.end()
}

// noteTimings keeps what llama.cpp tells of its own accord.
func (w *rewriter) noteTimings(raw []byte, choices, single int) {
	prompt, cached, completion := -1, 0, -1
	o := object{b: raw}
	for o.next() {
		start, end := o.skip()
		if end < 0 {
			break
		}
		n, ok := count(raw[start:end])
		if !ok {
			continue
		}
		switch string(o.key) {
		case "prompt_n":
			prompt = n
		case "cache_n":
			cached = n
		case "predicted_n":
			completion = n
		}
	}
	if prompt >= 0 {
		prompt += cached
	}
	w.note(prompt, completion, choices, single)
}

func (w *rewriter) note(prompt, completion, choices, single int) {
	switch {
	case prompt < 0 || w.told:
	case w.continued:
		w.prompt = max(prompt-w.base, 0) // the server's has the text at its end
	default:
		w.prompt = prompt
	}
	switch {
	case completion < 0:
	case w.stream && choices == 1:
		w.choices[single].told = max(w.choices[single].told, completion)
	case w.stream && w.partial && len(w.choices) > 1:
		w.completion = max(w.completion, 0) + completion
	default:
		w.completion = completion
	}
}
