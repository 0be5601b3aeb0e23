package backend

import "bytes"

// pattern is what a chunk of a stream looks like apart from its text and its usage, and what
// the client gets of it. Nearly every chunk is like the one before it; one that is needn't
// be taken apart again: only the text and the usage are read, as strictly as ever.
type pattern struct {
	// before, between and after are what surrounds the text and the usage in what the server
	// sends; without a usage, after is empty.
	before, between, after []byte
	usage                  bool
	// open and close are what surrounds the text in what the client gets.
	open, close []byte
	index       int // of the choice
}

// learn notes the chunk that data has become out. It had one choice, of the index, with the text
// in data at text and in out at at, and the usage, if there was one.
func (p *pattern) learn(data, out []byte, index int, text span, at int, usage span) {
	p.before, p.between, p.after = append(p.before[:0], data[:text.start]...), p.between[:0], p.after[:0]
	if p.usage = usage.ok(); p.usage {
		p.between, p.after = append(p.between, data[text.end:usage.start]...), append(p.after, data[usage.end:]...)
	} else {
		p.between = append(p.between, data[text.end:]...)
	}
	p.open, p.close = append(p.open[:0], out[:at]...), append(p.close[:0], out[at+text.end-text.start:]...)
	p.index = index
}

// match returns where data has its text, if it is otherwise what was learnt and its text isn't
// empty; and where its usage is, if there is one, and what that tells.
func (p *pattern) match(data []byte) (text, usage span, prompt, completion int, ok bool) {
	if len(p.before) == 0 || !bytes.HasPrefix(data, p.before) || len(data) == len(p.before) || data[len(p.before)] != '"' {
		return
	}
	text = span{len(p.before), skipString(data, len(p.before))}
	if text.end < 0 || !filled(text.of(data)) || !bytes.HasPrefix(data[text.end:], p.between) {
		return
	}
	end := text.end + len(p.between)
	if p.usage {
		usage.start = end
		if prompt, completion, end = readUsage(data, end); end < 0 || prompt < 0 && completion < 0 {
			return
		}
		usage.end = end
	}
	return text, usage, prompt, completion, string(data[end:]) == string(p.after)
}

// again appends what becomes of a chunk that is like the last one, and reports whether it is.
func (w *rewriter) again(dst, data []byte) ([]byte, bool) {
	text, usage, prompt, completion, ok := w.pattern.match(data)
	if !ok {
		return dst, false
	}
	if usage.ok() {
		w.usage = append(w.usage[:0], usage.of(data)...)
		w.note(prompt, completion, 1, w.pattern.index)
	}
	w.said, w.closing = true, false
	w.choices[w.pattern.index].counted++
	return append(append(append(dst, w.pattern.open...), text.of(data)...), w.pattern.close...), true
}
