package backend

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"
)

// transport carries requests to a server. It does what http.Transport does with two
// goroutines and a hand-over between them for every connection, in the goroutine that asks:
// an open stream costs half the memory so, and a token no change of goroutines.
//
// The messages are read and written by net/http. What is rare is left to http.Transport as a
// whole: TLS, proxies, and bodies that a server may answer before it has read them.
type transport struct {
	rare *http.Transport
	dial net.Dialer

	mu   sync.Mutex
	idle []*conn // the one that was used last is the last
}

const (
	// maxDirect is the size in bytes up to which a body is sent before the answer is read.
	maxDirect = 64 << 10
	// maxIdle is how many connections wait for the next request, and idleFor how long each.
	maxIdle = 1024
	idleFor = 60 * time.Second
	// maxHead bounds the status line and headers of an answer, in bytes.
	maxHead = 1 << 20
	// lateAnswer is for how long an answer is waited for that may explain why a request
	// couldn't be sent.
	lateAnswer = 50 * time.Millisecond
)

func newTransport() *transport {
	dial := net.Dialer{Timeout: 5 * time.Second, KeepAlive: 15 * time.Second}
	return &transport{dial: dial, rare: &http.Transport{
		Proxy:               http.ProxyFromEnvironment,
		DialContext:         dial.DialContext,
		TLSHandshakeTimeout: 5 * time.Second,
		MaxIdleConnsPerHost: maxIdle,
		IdleConnTimeout:     idleFor,
		DisableCompression:  true, // a compressed stream is a delayed stream
		WriteBufferSize:     2 << 10,
	}}
}

// RoundTrip implements http.RoundTripper. When the context of the request ends, before the
// answer or in the middle of it, the connection is closed, which makes the server stop.
//
// Servers close idle connections when they like (vLLM after 5 s). A request that meets such a
// connection, and gets no answer at all, is sent once more on a fresh one.
func (t *transport) RoundTrip(req *http.Request) (*http.Response, error) {
	proxy, err := http.ProxyFromEnvironment(req)
	if req.URL.Scheme != "http" || req.ContentLength > maxDirect || proxy != nil || err != nil {
		if _, ok := req.Header["Idempotency-Key"]; !ok {
			req.Header["Idempotency-Key"] = nil // isn't sent, and has it sent once more
		}
		return t.rare.RoundTrip(req)
	}
	address := req.URL.Host
	if req.URL.Port() == "" {
		address = net.JoinHostPort(req.URL.Hostname(), "80")
	}
	if c := t.reuse(address); c != nil {
		resp, err := c.exchange(req)
		if err == nil || !errors.Is(err, errNoAnswer) || req.Context().Err() != nil {
			return resp, err
		}
		if req.GetBody != nil {
			if req.Body, err = req.GetBody(); err != nil {
				return nil, fmt.Errorf("send again: %w", err)
			}
		}
	}
	nc, err := t.dial.DialContext(req.Context(), "tcp", address)
	if err != nil {
		return nil, err
	}
	return (&conn{Conn: nc, of: t, address: address}).exchange(req)
}

// reuse takes a connection that waits, if there is a sound one, and closes those that have
// waited for too long.
func (t *transport) reuse(address string) *conn {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.expire()
	for n := len(t.idle) - 1; n >= 0; n-- {
		c := t.idle[n]
		t.idle[n] = nil
		t.idle = t.idle[:n]
		if c.address == address && c.silent() {
			return c
		}
		_ = c.Close()
	}
	return nil
}

// keep puts a connection by for the next request.
func (t *transport) keep(c *conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.expire(); len(t.idle) == maxIdle {
		_ = c.Close()
		return
	}
	c.since = time.Now()
	t.idle = append(t.idle, c)
}

// expire closes the connections that have waited for too long. That it happens with requests
// only is enough: a server is asked every few seconds what it has. t.mu is held.
func (t *transport) expire() {
	n := 0
	for n < len(t.idle) && time.Since(t.idle[n].since) > idleFor {
		_ = t.idle[n].Close()
		n++
	}
	if n > 0 {
		left := copy(t.idle, t.idle[n:])
		clear(t.idle[left:])
		t.idle = t.idle[:left]
	}
}

// CloseIdleConnections closes the connections that wait for a request.
func (t *transport) CloseIdleConnections() {
	t.rare.CloseIdleConnections()
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, c := range t.idle {
		_ = c.Close()
	}
	t.idle = nil
}

// conn is a connection to a server. It has one request at a time.
type conn struct {
	net.Conn
	of      *transport
	address string
	since   time.Time // when it was put by
	left    int       // bytes that the head of the answer may still have
	// plenty says that the last read found at least as much as it had room for. Then the next
	// one has more room, in stage; ahead is what is left of that.
	plenty bool
	stage  *[]byte
	ahead  []byte
}

var (
	// errNoAnswer says that not a single byte of an answer came.
	errNoAnswer = errors.New("no answer came")
	// errHead is why the beginning of an answer can't be read.
	errHead   = errors.New("the answer isn't HTTP")
	errClosed = errors.New("the answer was closed")
)

// Read implements io.Reader, for the reader that the answer is parsed from.
func (c *conn) Read(p []byte) (int, error) {
	if c.left <= 0 {
		return 0, errHead
	}
	n, err := c.read(p[:min(len(p), c.left)])
	c.left -= n
	return n, err
}

// read reads from the connection, in large pieces as long as a server is faster than it is read
// from: then a stream costs fewer reads, and fewer frames. One that has to be waited for has no
// more than its small buffers.
func (c *conn) read(p []byte) (n int, err error) {
	if len(c.ahead) == 0 {
		if !c.plenty {
			n, err = c.Conn.Read(p)
			c.plenty = n == len(p) && n > readBuffer/2
			return n, err
		}
		c.stage = stages.Get().(*[]byte) // holds nothing else
		n, err = c.Conn.Read(*c.stage)
		c.ahead, c.plenty = (*c.stage)[:n], n == stageSize
	}
	n = copy(p, c.ahead)
	if c.ahead = c.ahead[n:]; len(c.ahead) == 0 {
		c.unstage()
	}
	return n, err
}

// unstage gives the stage back, and drops what is on it.
func (c *conn) unstage() {
	if c.stage != nil {
		stages.Put(c.stage)
		c.stage, c.ahead = nil, nil
	}
}

// stages are where connections read to that have plenty.
var stages = sync.Pool{New: func() any { return new(make([]byte, stageSize)) }}

// stageSize is that of a stage, in bytes.
const stageSize = 32 << 10

// readers and writers are what answers are read and requests are written through. An open
// stream keeps the reader of its connection, and has long sent its request.
var (
	readers = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, readBuffer) }}
	writers = sync.Pool{New: func() any { return bufio.NewWriterSize(nil, readBuffer) }}
)

func takeReader(from io.Reader) *bufio.Reader {
	r := readers.Get().(*bufio.Reader) // holds nothing else
	r.Reset(from)
	return r
}

func giveReader(r *bufio.Reader) {
	r.Reset(nil)
	readers.Put(r)
}

// exchange sends the request and reads the head of the answer. The connection belongs to the
// answer's body then, and is closed if there is none.
func (c *conn) exchange(req *http.Request) (*http.Response, error) {
	stop := context.AfterFunc(req.Context(), func() { _ = c.Close() })
	r := takeReader(c)
	resp, err := c.ask(req, r)
	if err != nil {
		stop()
		_ = c.Close()
		giveReader(r)
		return nil, err
	}
	resp.Body = &body{text: resp.Body, r: r, conn: c, stop: stop, whole: resp.Body == http.NoBody, last: resp.Close || req.Close}
	return resp, nil
}

func (c *conn) ask(req *http.Request, r *bufio.Reader) (*http.Response, error) {
	w := writers.Get().(*bufio.Writer) // holds nothing else
	w.Reset(c.Conn)
	sent := req.Write(w)
	if sent == nil {
		sent = w.Flush()
	}
	w.Reset(nil)
	writers.Put(w)
	if sent != nil {
		// A server that refuses a request may say so and close before it has read it.
		_ = c.SetReadDeadline(time.Now().Add(lateAnswer))
	}
	for range maxInterim {
		c.left = maxHead
		if _, err := r.Peek(1); err != nil {
			if sent != nil {
				err = sent
			}
			return nil, fmt.Errorf("%w: %w", errNoAnswer, err)
		}
		resp, err := http.ReadResponse(r, req)
		switch {
		case err != nil:
			return nil, fmt.Errorf("%w: %s", errHead, err.Error()) // not wrapped: an early end isn't that of a connection
		case resp.StatusCode >= http.StatusOK:
			c.left = math.MaxInt
			resp.Close = resp.Close || sent != nil
			return resp, nil
		case resp.StatusCode == http.StatusSwitchingProtocols:
			return nil, fmt.Errorf("%w any more", errHead)
		}
	}
	return nil, fmt.Errorf("%w: nothing but interim answers", errHead)
}

// maxInterim is how many answers of status 1xx may come, the real one included.
const maxInterim = 6

// body is the body of an answer. Its end gives the connection back.
type body struct {
	text  io.Reader // what net/http makes of the connection; nil: closed
	r     *bufio.Reader
	conn  *conn
	stop  func() bool
	whole bool // the end was read
	last  bool // the connection has no further request
}

// Read implements io.Reader.
func (b *body) Read(p []byte) (int, error) {
	if b.text == nil {
		return 0, errClosed
	}
	n, err := b.text.Read(p)
	b.whole = b.whole || errors.Is(err, io.EOF)
	return n, err
}

// await returns once a Read finds something: more of the answer, its end, or why there is none.
func (b *body) await() {
	if b.text != nil && !b.whole {
		_, _ = b.r.Peek(1) // whose error a Read meets, too
	}
}

// ready reports whether a Read finds some of the answer in memory, and doesn't wait: enough for
// the head of a chunk is there.
func (b *body) ready() bool {
	return b.text != nil && !b.whole && b.r.Buffered()+len(b.conn.ahead) > maxChunkHead
}

// maxChunkHead is more than the head of a chunk has, with the line end before it, in bytes.
const maxChunkHead = 64

// Close implements io.Closer. Unless the answer was read to its end, it closes the connection.
func (b *body) Close() error {
	if b.text == nil {
		return nil
	}
	sound := b.stop() && b.whole && !b.last && b.r.Buffered()+len(b.conn.ahead) == 0
	giveReader(b.r)
	b.conn.unstage()
	b.conn.plenty = false
	b.text, b.r = nil, nil
	if sound {
		b.conn.of.keep(b.conn)
	} else {
		_ = b.conn.Close() // by now perhaps for the second time
	}
	return nil
}

// silent reports whether the server has neither closed the connection nor said anything on it
// that nobody asked for, the farewell of one that has waited for too long, say.
func (c *conn) silent() bool {
	sc, ok := c.Conn.(syscall.Conn)
	if !ok {
		return true
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return false
	}
	silent := false
	err = raw.Read(func(fd uintptr) bool {
		silent = nothingToRead(fd)
		return true
	})
	return err == nil && silent
}
