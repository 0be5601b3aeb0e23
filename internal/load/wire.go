package load

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http/httputil"
	"strconv"
	"strings"
)

// errProtocol says that the server doesn't speak HTTP/1.1.
var errProtocol = errors.New("not HTTP/1.1")

// head is what matters of the head of a response.
type head struct {
	status  int
	length  int64 // of the body; -1: in chunks, -2: until the connection closes
	closing bool  // the connection is of no further use
	stream  bool  // server-sent events
}

// readHead reads a status line and headers. Informational responses are skipped.
func readHead(in *bufio.Reader) (head, error) {
	for {
		h, err := readOneHead(in)
		if err != nil || h.status >= 200 {
			return h, err
		}
	}
}

func readOneHead(in *bufio.Reader) (head, error) {
	line, err := in.ReadSlice('\n')
	if err != nil {
		return head{}, tooLong(err)
	}
	if len(line) < 12 || !bytes.HasPrefix(line, []byte("HTTP/1.")) {
		return head{}, fmt.Errorf("%w: it begins with %q", errProtocol, line[:min(len(line), 16)])
	}
	h := head{length: -2, closing: line[7] == '0'}
	if h.status, err = strconv.Atoi(string(line[9:12])); err != nil {
		return head{}, fmt.Errorf("%w: no status", errProtocol)
	}
	for {
		line, err := in.ReadSlice('\n')
		if err != nil {
			return head{}, tooLong(err)
		}
		line = bytes.TrimSpace(line)
		if len(line) == 0 {
			break
		}
		if err := h.header(line); err != nil {
			return head{}, err
		}
	}
	if h.status == 204 || h.status == 304 {
		h.length = 0
	}
	h.closing = h.closing || h.length == -2
	return h, nil
}

func (h *head) header(line []byte) (err error) {
	name, value, _ := bytes.Cut(line, []byte{':'})
	value = bytes.TrimSpace(value)
	switch {
	case bytes.EqualFold(name, []byte("Content-Length")) && h.length != -1:
		if h.length, err = strconv.ParseInt(string(value), 10, 63); err != nil || h.length < 0 {
			return fmt.Errorf("%w: Content-Length", errProtocol)
		}
	case bytes.EqualFold(name, []byte("Transfer-Encoding")):
		h.length = -1
	case bytes.EqualFold(name, []byte("Connection")):
		h.closing = h.closing || strings.EqualFold(string(value), "close")
	case bytes.EqualFold(name, []byte("Content-Type")):
		h.stream = bytes.HasPrefix(value, []byte("text/event-stream"))
	}
	return nil
}

func tooLong(err error) error {
	if errors.Is(err, bufio.ErrBufferFull) {
		return fmt.Errorf("%w: a header is too long", errProtocol)
	}
	return err
}

// body returns the reader of a response's body.
func (h head) body(in *bufio.Reader) io.Reader {
	switch h.length {
	case -1:
		return &chunked{httputil.NewChunkedReader(in), in}
	case -2:
		return in
	}
	return &sized{in, h.length}
}

// sized reads a body of known length. Unlike io.LimitedReader it tells a body that was cut
// off from a whole one.
type sized struct {
	in   *bufio.Reader
	left int64
}

func (s *sized) Read(b []byte) (int, error) {
	if s.left == 0 {
		return 0, io.EOF
	}
	n, err := s.in.Read(b[:min(int64(len(b)), s.left)])
	s.left -= int64(n)
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// chunked reads a body in chunks, and the trailers behind it, which the reader of the
// standard library leaves where they are.
type chunked struct {
	chunks io.Reader
	in     *bufio.Reader
}

func (c *chunked) Read(b []byte) (int, error) {
	n, err := c.chunks.Read(b)
	if !errors.Is(err, io.EOF) {
		return n, err
	}
	for {
		line, err := c.in.ReadSlice('\n')
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return n, tooLong(err)
		}
		if len(bytes.TrimSpace(line)) == 0 {
			return n, io.EOF
		}
	}
}

// maxLine bounds a line of a stream, and a body that isn't one.
const maxLine = 64 << 20

// lines reads a stream by lines. The lines of one read came at the same time, and share
// their look at the clock.
type lines struct {
	r          io.Reader
	arrived    func() // called after each read that brought something
	buf        []byte
	start, end int
	err        error
}

func (l *lines) reset(r io.Reader) { l.r, l.start, l.end, l.err = r, 0, 0, nil }

// next returns the next line without its end, good until the next call. After the last one
// the error is io.EOF.
func (l *lines) next() ([]byte, error) {
	scanned := 0
	for {
		if i := bytes.IndexByte(l.buf[l.start+scanned:l.end], '\n'); i >= 0 {
			line := l.buf[l.start : l.start+scanned+i]
			l.start += scanned + i + 1
			return bytes.TrimSuffix(line, []byte{'\r'}), nil
		}
		scanned = l.end - l.start
		if l.err != nil {
			if line := l.buf[l.start:l.end]; len(line) > 0 && errors.Is(l.err, io.EOF) {
				l.start = l.end
				return line, nil
			}
			return nil, l.err
		}
		if err := l.fill(); err != nil {
			return nil, err
		}
	}
}

func (l *lines) fill() error {
	if l.start > 0 {
		l.end = copy(l.buf, l.buf[l.start:l.end])
		l.start = 0
	}
	if l.end == len(l.buf) {
		if l.end >= maxLine {
			return fmt.Errorf("%w: a line is over %d MB", errProtocol, maxLine>>20)
		}
		l.buf = append(l.buf, make([]byte, max(len(l.buf), 4<<10))...)
	}
	n, err := l.r.Read(l.buf[l.end:])
	l.end, l.err = l.end+n, err
	if n > 0 {
		l.arrived()
	}
	return nil
}

// all reads what is left, up to a bound, good until the next call.
func (l *lines) all() ([]byte, error) {
	for l.err == nil {
		if err := l.fill(); err != nil {
			return nil, err
		}
	}
	if !errors.Is(l.err, io.EOF) {
		return nil, l.err
	}
	return l.buf[l.start:l.end], nil
}
