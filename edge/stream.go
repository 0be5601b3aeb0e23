package edge

import (
	"bytes"
	"io"
	"net"
	"sync"

	"github.com/gofiber/fiber/v2"

	"github.com/ownllm/ownllm/broker/desk"
	"github.com/ownllm/ownllm/broker/dispatch"
)

// The pieces of a stream of server-sent events. A keep-alive is a comment with one
// newline: a blank line behind it would make an empty event of it, which breaks older
// Go SDKs, and any named event breaks the ones of Node and Python.
const (
	eventData = "data: "
	eventEnd  = "\n\n"
	eventDone = "data: [DONE]\n\n"
	keepAlive = ": waiting\n"
)

// sendWhole waits for a reply that isn't streamed, and sends it.
func (w *watched) sendWhole(c *fiber.Ctx) error {
	var body []byte
	for {
		ev := w.reply.Next()
		switch ev.Kind {
		case dispatch.EventTick:
			continue
		case dispatch.EventError:
			desk.Settle(w.reply)
			w.end(ev.Err)
			return ev.Err
		}
		if body == nil && len(ev.Payload) == 1 {
			body = ev.Payload[0]
		} else {
			body = append(body, bytes.Join(ev.Payload, nil)...)
		}
		if ev.Kind == dispatch.EventDone {
			break
		}
	}
	w.answered = true
	desk.Settle(w.reply)
	w.end(nil)
	c.Response().Header.SetContentType(fiber.MIMEApplicationJSON)
	c.Response().SetBodyRaw(body)
	return nil
}

// sendStream waits for the first event, which decides the status, and leaves the
// rest to the server, which reads from w until the end.
func (w *watched) sendStream(c *fiber.Ctx) error {
	ev := w.reply.Next()
	if ev.Kind == dispatch.EventError && len(ev.Payload) == 0 {
		desk.Settle(w.reply)
		w.end(ev.Err)
		return ev.Err
	}
	w.answered = true
	w.edge.Metrics.StreamOpened(w.ctx)
	w.append(ev)
	h := &c.Response().Header
	h.SetContentType("text/event-stream")
	h.Set(fiber.HeaderCacheControl, "no-cache")
	h.Set("X-Accel-Buffering", "no") // nginx would hold tokens back
	if !c.Request().Header.IsHTTP11() {
		w.sendUnframed(c)
		return nil
	}
	c.Context().SetBodyStream(w, -1)
	return nil
}

// sendUnframed streams to a client that speaks HTTP/1.0, as some proxies do unless they
// are told otherwise. It knows no chunks, so the reply ends with the connection.
func (w *watched) sendUnframed(c *fiber.Ctx) {
	defer w.Close() //nolint:errcheck // never fails
	c.Response().Header.SetContentLength(-2)
	// fasthttp would frame it; a hijacked connection is left alone, and closed.
	c.Context().HijackSetNoResponse(true)
	c.Context().Hijack(func(net.Conn) {})
	conn, buf := c.Context().Conn(), make([]byte, 4096)
	for n, err := copy(buf, c.Response().Header.Header()), error(nil); ; n, err = w.Read(buf) {
		if _, werr := conn.Write(buf[:n]); werr != nil || err != nil {
			return
		}
	}
}

// Read implements io.Reader: it waits for the next event and hands it out as
// server-sent events.
func (w *watched) Read(p []byte) (int, error) {
	if !w.fill() {
		return 0, io.EOF
	}
	n := copy(p, w.out)
	w.out = w.out[n:]
	return n, nil
}

// maxChunk bounds what is sent to a client as one chunk, in bytes.
const maxChunk = 32 << 10

// WriteTo implements io.WriterTo: it is Read to the end, without a copy and in larger pieces,
// so that a client that was slow for a moment soon has what waits for it. Whatever is written
// is flushed to the client at once.
func (w *watched) WriteTo(dst io.Writer) (n int64, err error) {
	for w.fill() {
		m, err := dst.Write(w.out[:min(len(w.out), maxChunk)])
		n += int64(m)
		if err != nil {
			return n, err
		}
		w.out = w.out[m:]
	}
	return n, nil
}

// SupportsBodyWriteTo has fasthttp call WriteTo. See fasthttp.BodyWriterTo.
func (w *watched) SupportsBodyWriteTo() bool { return true }

// fill waits until there is something to send, and returns false at the end.
func (w *watched) fill() bool {
	if len(w.out) == 0 && w.pooled != nil {
		w.out = w.buf[:0]
	}
	for len(w.out) == 0 {
		switch {
		case w.over:
			return false
		case w.last != nil:
			w.appendLast()
		default:
			w.append(w.reply.Next())
		}
	}
	return true
}

// append renders an event behind what hasn't been read yet.
func (w *watched) append(ev dispatch.Event) {
	if w.pooled == nil {
		w.pooled = eventBuffers.Get().(*[]byte) // holds nothing else
		w.out = *w.pooled
	}
	w.buf = w.out
	for _, lines := range ev.Payload {
		for len(lines) > 0 {
			line, rest, _ := bytes.Cut(lines, newline)
			lines = rest
			if len(line) > 0 {
				w.buf = append(w.buf, eventData...)
				w.buf = append(w.buf, line...)
				w.buf = append(w.buf, eventEnd...)
			}
		}
	}
	switch ev.Kind {
	case dispatch.EventTick:
		w.buf = append(w.buf, keepAlive...)
	case dispatch.EventDone, dispatch.EventError:
		last := ev // allocated here, and not with each token
		w.last = &last
	}
	w.out = w.buf
}

// appendLast renders the end of the stream. What came before it is on its way to the
// client by now; the end waits until the request is settled.
func (w *watched) appendLast() {
	desk.Settle(w.reply)
	w.over, w.buf = true, w.out
	if err := w.last.Err; err != nil {
		w.err = err
		w.buf = append(w.buf, eventData...)
		w.buf = err.AppendJSON(w.buf)
		w.buf = append(w.buf, eventEnd...)
	} else {
		w.buf = append(w.buf, eventDone...)
	}
	w.out = w.buf
}

var newline = []byte{'\n'}

// eventBuffers are what events are rendered into. One that has grown beyond maxPooled isn't
// kept.
var eventBuffers = sync.Pool{New: func() any { return new([]byte) }}

const maxPooled = 64 << 10

// Close implements io.Closer: the server calls it when the stream has ended or the
// client can't be written to any more.
func (w *watched) Close() error {
	w.end(w.err)
	if w.pooled != nil && cap(w.buf) <= maxPooled {
		*w.pooled = w.buf[:0]
		eventBuffers.Put(w.pooled)
	}
	w.buf, w.out, w.pooled, w.over = nil, nil, nil, true
	return nil
}
