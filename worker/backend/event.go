package backend

import (
	"bufio"
	"bytes"
	"errors"
	"io"
)

const (
	// readBuffer is the size of the buffer that a stream is read through. Its connection has
	// another one of that size behind it, which is all that a stream has while it waits.
	readBuffer = 4 << 10
	// maxEvent bounds one event of a stream, in bytes: a tool call that comes whole
	// may be large, a backend gone mad may not fill the memory.
	maxEvent = 4 << 20
)

var (
	// errNotYet says that no whole event is buffered.
	errNotYet = errors.New("no event is buffered")
	// errTooLong says that an event is over maxEvent.
	errTooLong = errors.New("event is too long")
)

// events reads server-sent events. It understands what the backends send in
// practice: data with or without a space, data over several lines, comments, CRLF,
// the field "error" of old llama.cpp servers, and a last event without the blank
// line that should end it.
type events struct {
	r *bufio.Reader
	// body is what r reads from; nil: it can't be waited for but by a read.
	body *body
	// line is the beginning of a line that didn't fit the reader's buffer.
	line []byte
	// data is what the lines of the current event have told so far; it is kept apart
	// from the reader's buffer, which the next read overwrites.
	data []byte
	// open says that the current event has data, failed that it came in the field
	// "error".
	open, failed bool
}

// begin has them read from the body of an answer.
func (e *events) begin(from io.Reader) {
	e.r = takeReader(from)
	e.body, _ = from.(*body) // else it is http.Transport's
}

// end gives the reader back, if there is one.
func (e *events) end() {
	if e.r != nil {
		giveReader(e.r)
		e.r, e.body = nil, nil
	}
}

// next returns the data of the next event, valid until the following call, and
// whether it came in the field "error". With wait false it returns errNotYet rather
// than wait for the connection. At the end of the stream it returns io.EOF.
func (e *events) next(wait bool) (data []byte, failed bool, err error) {
	for {
		line, err := e.readLine(wait)
		if err != nil && (!errors.Is(err, io.EOF) || len(line) == 0) {
			if errors.Is(err, io.EOF) && e.open {
				return e.flush(), e.failed, nil
			}
			return nil, false, err
		}
		if len(line) == 0 {
			if e.open {
				return e.flush(), e.failed, nil
			}
			continue
		}
		value, failed, ok := field(line)
		if !ok {
			continue
		}
		if !e.open {
			if e.blankNext() {
				return value, failed, nil
			}
			e.open, e.failed, e.data = true, failed, append(e.data[:0], value...)
			continue
		}
		if len(e.data)+len(value) > maxEvent {
			return nil, false, errTooLong
		}
		e.failed = e.failed || failed
		e.data = append(append(e.data, '\n'), value...)
	}
}

func (e *events) flush() []byte {
	e.open = false
	return e.data
}

// blankNext consumes the blank line that ends an event if it is already buffered, as
// it nearly always is; then the data needn't be copied. Nothing is read, so the
// slice that holds the data stays valid.
func (e *events) blankNext() bool {
	n := min(e.r.Buffered(), 2)
	if n == 0 {
		return false
	}
	b, _ := e.r.Peek(n)
	switch {
	case b[0] == '\n':
		_, _ = e.r.Discard(1)
	case n == 2 && b[0] == '\r' && b[1] == '\n':
		_, _ = e.r.Discard(2)
	default:
		return false
	}
	return true
}

// readLine returns the next line without its end. At the end of the stream it
// returns what is left along with io.EOF.
func (e *events) readLine(wait bool) ([]byte, error) {
	if !wait && !e.lineReady() {
		return nil, errNotYet
	}
	e.line = e.line[:0]
	for {
		e.await()
		part, err := e.r.ReadSlice('\n')
		if len(e.line)+len(part) > maxEvent {
			return nil, errTooLong
		}
		if errors.Is(err, bufio.ErrBufferFull) {
			e.line = append(e.line, part...)
			continue
		}
		if len(e.line) > 0 {
			e.line = append(e.line, part...)
			part = e.line
		}
		part = bytes.TrimSuffix(part, []byte{'\n'})
		return bytes.TrimSuffix(part, []byte{'\r'}), err
	}
}

// lineReady reports whether there is a whole line without waiting for it.
func (e *events) lineReady() bool {
	for {
		b, _ := e.r.Peek(e.r.Buffered())
		switch {
		case bytes.IndexByte(b, '\n') >= 0:
			return true
		case len(b) == e.r.Size() || e.body == nil || !e.body.ready():
			return false
		}
		if _, err := e.r.Peek(len(b) + 1); err != nil {
			return false // the next read meets it, too
		}
	}
}

// await waits until there is more to read. Others have the reader meanwhile: most streams wait
// most of the time.
func (e *events) await() {
	if e.body == nil || e.r.Buffered() > 0 {
		return
	}
	giveReader(e.r)
	e.body.await()
	e.r = takeReader(e.body)
}

// field takes a line apart. It is ok for the fields that count; comments and the
// fields event, id and retry don't.
func field(line []byte) (value []byte, failed, ok bool) {
	value, ok = bytes.CutPrefix(line, []byte("data"))
	if !ok {
		if value, ok = bytes.CutPrefix(line, []byte("error")); !ok {
			return nil, false, false
		}
		failed = true
	}
	if len(value) == 0 {
		return value, failed, true
	}
	if value[0] != ':' {
		return nil, false, false
	}
	return bytes.TrimPrefix(value[1:], []byte{' '}), failed, true
}
