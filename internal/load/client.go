package load

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/ownllm/ownllm/internal/secret"
	"github.com/ownllm/ownllm/schemas"
)

// The causes of failures that aren't the API's.
const (
	CauseRefused  = "connection refused"
	CauseName     = "name not found"
	CauseNetwork  = "network unreachable"
	CauseTLS      = "TLS failed"
	CauseConnect  = "connecting timed out"
	CauseTimeout  = "reply timed out"
	CauseReset    = "connection reset"
	CauseClosed   = "connection closed before the reply"
	CauseCut      = "connection cut in the reply"
	CauseProtocol = "not HTTP/1.1"
	CauseUnsent   = "never sent: too many in flight"
	CauseOther    = "other"
)

// errConnect wraps why a connection couldn't be made.
type errConnect struct{ error }

func (e errConnect) Unwrap() error { return e.error }

// cause is the class of an error. Some systems' errors are known by their text only.
func cause(err error, started bool) string {
	var (
		connect errConnect
		dns     *net.DNSError
		netErr  net.Error
		cert    *tls.CertificateVerificationError
		record  tls.RecordHeaderError
		alert   tls.AlertError
	)
	timeout := errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) || errors.As(err, &netErr) && netErr.Timeout()
	connecting := errors.As(err, &connect)
	switch {
	case errors.As(err, &dns):
		return CauseName
	case errors.As(err, &cert), errors.As(err, &record), errors.As(err, &alert):
		return CauseTLS
	case timeout && connecting:
		return CauseConnect
	case timeout:
		return CauseTimeout
	case errors.Is(err, syscall.ECONNREFUSED):
		return CauseRefused
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH):
		return CauseNetwork
	case errors.Is(err, errProtocol):
		return CauseProtocol
	case started:
		return CauseCut
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return CauseReset
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, net.ErrClosed), errors.Is(err, io.ErrClosedPipe):
		return CauseClosed
	}
	return CauseOther
}

const (
	dialWait = 10 * time.Second
	// idleFor is how long a connection is used again after its last reply. Servers close
	// idle ones after 5 s and more, and a request that meets that would fail for no fault
	// of theirs.
	idleFor    = 3 * time.Second
	readBuffer = 8 << 10
)

// client sends one request at a time, over one connection.
type client struct {
	stage *stage
	rng   *rand.Rand
	conn  net.Conn // nil: not connected
	in    *bufio.Reader
	used  time.Time // when the last reply ended
	body  []byte    // of the request
	out   []byte    // the whole request
	lines lines
	at    time.Time // when the latest bytes arrived
	reply reply
}

func newClient(s *stage, number uint64) *client {
	c := &client{stage: s, rng: newRand(s.config.Seed, number)}
	c.lines.arrived = func() {
		c.at = time.Now()
	}
	return c
}

// do sends one request that was meant to be sent at the instant intended, reads its reply
// and counts it.
func (c *client) do(ctx context.Context, intended time.Time, counts bool) {
	r := &c.reply
	gaps := r.gaps[:0]
	*r = reply{gaps: gaps, live: &c.stage.tokens}
	prompt := c.write()
	c.stage.inFlight.Add(1)
	defer c.stage.inFlight.Add(-1)
	err := c.exchange(ctx, time.Now())
	if ctx.Err() != nil { // it was us who broke it off
		c.close()
		return
	}
	c.used = time.Now()
	if err != nil || r.end.IsZero() {
		r.end = c.used
	}
	r.live.Add(int64(r.tokens() - r.chunks)) // the server's count is the better one
	c.stage.record.take(c.stage.config, r, prompt, intended, err, counts)
	if err != nil {
		c.close()
	}
}

// write makes the next request in c.out, and returns the length of its prompt.
func (c *client) write() (prompt int) {
	config := c.stage.config
	prompt, limit := config.Prompt.Draw(c.rng), config.Reply.Draw(c.rng)
	b := append(c.body[:0], `{"model":`...)
	b = schemas.AppendString(b, config.Model)
	b = append(b, `,"messages":[{"role":"user","content":"`...)
	// Each prompt begins differently, so that no server answers from its prefix cache.
	b = strconv.AppendUint(b, c.rng.Uint64N(1<<40), 36)
	b = c.stage.text.append(b, prompt-1, c.rng)
	b = append(b, `"}],"max_tokens":`...)
	b = strconv.AppendInt(b, int64(limit), 10)
	if config.Stream {
		b = append(b, `,"stream":true,"stream_options":{"include_usage":true}`...)
	}
	b = append(b, c.stage.extra...)
	if config.Verify {
		c.reply.numbers.want = limit
		b = append(b, `,"demo":{"numbered":true,"tokens":`...)
		b = strconv.AppendInt(b, int64(limit), 10)
		b = append(b, c.stage.extraDemo...)
		b = append(b, '}')
	}
	b = append(b, '}')
	c.body = b
	head := c.stage.heads[0]
	if n := len(c.stage.heads); n > 1 {
		head = c.stage.heads[c.rng.IntN(n)]
	}
	c.out = append(c.out[:0], head...)
	c.out = strconv.AppendInt(c.out, int64(len(b)), 10)
	c.out = append(c.out, "\r\n\r\n"...)
	c.out = append(c.out, b...)
	return prompt
}

// exchange sends the request and reads the reply. An error is the transport's.
func (c *client) exchange(ctx context.Context, now time.Time) error {
	if c.conn != nil && now.Sub(c.used) > idleFor {
		c.close()
	}
	if c.conn == nil {
		if err := c.connect(ctx); err != nil {
			return errConnect{err}
		}
		if !c.stage.conns.add(c.conn) {
			return net.ErrClosed
		}
	}
	if err := c.conn.SetDeadline(now.Add(c.stage.config.Timeout)); err != nil {
		return err
	}
	if _, err := c.conn.Write(c.out); err != nil {
		return err
	}
	h, err := readHead(c.in)
	if err != nil {
		return err
	}
	c.reply.status = h.status
	c.lines.reset(h.body(c.in))
	switch {
	case h.status < 200 || h.status > 299:
		c.reply.refused(&c.lines, &c.at)
	case h.stream:
		err = c.reply.stream(&c.lines, &c.at)
	default:
		err = c.reply.whole(&c.lines, &c.at)
	}
	if err == nil && (h.closing || !errors.Is(c.lines.err, io.EOF)) {
		c.close()
	}
	return err
}

func (c *client) connect(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeout(ctx, min(dialWait, c.stage.config.Timeout))
	defer cancel()
	if c.conn, err = c.stage.dial(ctx); err != nil {
		c.conn = nil
		return err
	}
	if c.in == nil {
		c.in = bufio.NewReaderSize(c.conn, readBuffer)
	} else {
		c.in.Reset(c.conn)
	}
	return nil
}

func (c *client) close() {
	if c.conn != nil {
		c.stage.conns.remove(c.conn)
		_ = c.conn.Close()
		c.conn = nil
	}
}

// dialer returns how to connect to the API.
func dialer(config *Config) func(context.Context) (net.Conn, error) {
	if config.Dial != nil {
		return config.Dial
	}
	host, port := config.URL.Hostname(), config.URL.Port()
	secure := config.URL.Scheme == "https"
	if port == "" {
		port = "80"
		if secure {
			port = "443"
		}
	}
	addr := net.JoinHostPort(host, port)
	plain := &net.Dialer{}
	if !secure {
		return func(ctx context.Context) (net.Conn, error) { return plain.DialContext(ctx, "tcp", addr) }
	}
	d := &tls.Dialer{NetDialer: plain, Config: &tls.Config{ServerName: host, MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}}}
	return func(ctx context.Context) (net.Conn, error) { return d.DialContext(ctx, "tcp", addr) }
}

// requestHeads are the heads of requests with each of the keys.
func requestHeads(config *Config) [][]byte {
	keys := config.Keys
	if len(keys) == 0 {
		keys = []secret.String{config.Key}
	}
	heads := make([][]byte, len(keys))
	for i, key := range keys {
		heads[i] = requestHead(config, key)
	}
	return heads
}

// requestHead is the head of a request, up to the value of Content-Length.
func requestHead(config *Config, key secret.String) []byte {
	var b strings.Builder
	b.WriteString("POST " + strings.TrimSuffix(config.URL.EscapedPath(), "/") + "/chat/completions HTTP/1.1\r\nHost: " + config.URL.Host + "\r\n")
	if key != "" {
		b.WriteString("Authorization: Bearer " + key.Reveal() + "\r\n")
	}
	b.WriteString("User-Agent: ownllm-bench\r\nContent-Type: application/json\r\n")
	for name, values := range config.Header {
		for _, v := range values {
			b.WriteString(name + ": " + v + "\r\n")
		}
	}
	b.WriteString("Content-Length: ")
	return []byte(b.String())
}
