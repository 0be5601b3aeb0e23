package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http/httputil"
	"strconv"
	"strings"
	"time"
)

// numbered is the text of a reply of so many tokens: " 0 1 2 …".
func numbered(tokens int) string {
	var b strings.Builder
	for i := range tokens {
		b.WriteString(" " + strconv.Itoa(i))
	}
	return b.String()
}

// target is an API to send requests to.
type target struct {
	addr string // host:port
	key  string // empty for the backend
}

// request is the request for one reply, ready to be written.
func (t target) request(stream bool, tokens int) []byte {
	body := fmt.Sprintf(`{"model":"demo","stream":%t,"max_tokens":%d,"messages":[{"role":"user","content":"Count, please."}],"demo":{"tokens":%d,"numbered":true}}`, stream, tokens, tokens)
	auth := ""
	if t.key != "" {
		auth = "Authorization: Bearer " + t.key + "\r\n"
	}
	return fmt.Appendf(nil, "POST /v1/chat/completions HTTP/1.1\r\nHost: %s\r\n%sContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
		t.addr, auth, len(body), body)
}

// replyWait bounds one reply.
const replyWait = 30 * time.Second

// client sends one request after the other over one connection.
type client struct {
	conn    net.Conn
	in      *bufio.Reader
	request []byte
	stream  bool
	want    string // the text of a reply
	body    []byte // of the last reply
	text    []byte // of the last reply
}

func dial(ctx context.Context, t target, w workload) (*client, error) {
	c := &client{request: t.request(w.Stream, w.Tokens), stream: w.Stream, want: numbered(w.Tokens)}
	if err := c.redial(ctx, t); err != nil {
		return nil, err
	}
	return c, nil
}

// redial gives the client a fresh connection.
func (c *client) redial(ctx context.Context, t target) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", t.addr)
	if err != nil {
		return err
	}
	if c.conn != nil {
		c.close()
	}
	c.conn, c.in = conn, bufio.NewReaderSize(conn, 64<<10)
	return nil
}

func (c *client) close() { _ = c.conn.Close() }

// roundTrip sends the request, reads the whole reply and checks it. It returns the
// time to the first token of a stream, to the end of a reply that isn't one.
func (c *client) roundTrip() (time.Duration, error) {
	start := time.Now()
	if err := c.conn.SetDeadline(start.Add(replyWait)); err != nil {
		return 0, err
	}
	if _, err := c.conn.Write(c.request); err != nil {
		return 0, err
	}
	status, length, err := c.readHead()
	if err != nil {
		return 0, fmt.Errorf("read head: %w", err)
	}
	first, err := c.readBody(length, start)
	if err != nil {
		return 0, fmt.Errorf("read body: %w", err)
	}
	if status != 200 {
		return 0, fmt.Errorf("status %d: %s", status, bytes.TrimSpace(c.body))
	}
	if c.stream {
		c.text, err = checkStream(c.body, c.text[:0], c.want)
	} else {
		err = checkWhole(c.body, c.want)
	}
	return first, err
}

// readHead reads status line and headers. The length is -1 for a body in chunks.
func (c *client) readHead() (status, length int, err error) {
	line, err := c.in.ReadSlice('\n')
	if err != nil {
		return 0, 0, err
	}
	if len(line) < 12 || !bytes.HasPrefix(line, []byte("HTTP/1.1 ")) {
		return 0, 0, fmt.Errorf("not HTTP/1.1: %q", line)
	}
	if status, err = strconv.Atoi(string(line[9:12])); err != nil {
		return 0, 0, fmt.Errorf("not a status: %q", line)
	}
	length = -2
	for {
		line, err := c.in.ReadSlice('\n')
		if err != nil {
			return 0, 0, err
		}
		line = bytes.TrimSpace(line)
		if len(line) == 0 {
			break
		}
		name, value, _ := bytes.Cut(line, []byte(": "))
		switch {
		case bytes.EqualFold(name, []byte("Content-Length")):
			if length, err = strconv.Atoi(string(value)); err != nil {
				return 0, 0, fmt.Errorf("not a length: %q", line)
			}
		case bytes.EqualFold(name, []byte("Transfer-Encoding")):
			length = -1
		}
	}
	if length == -2 {
		return 0, 0, errors.New("no length")
	}
	return status, length, nil
}

// contentMark comes before a piece of text. The first delta, with the role, may have
// an empty one.
var contentMark = []byte(`"content":"`)

// readBody reads the body into c.body, and returns when the first token was there.
func (c *client) readBody(length int, start time.Time) (first time.Duration, err error) {
	c.body = c.body[:0]
	if length >= 0 {
		c.body = append(c.body, make([]byte, length)...)
		_, err = io.ReadFull(c.in, c.body)
		return time.Since(start), err
	}
	chunks := httputil.NewChunkedReader(c.in)
	for {
		if len(c.body) == cap(c.body) {
			c.body = append(c.body, 0)[:len(c.body)]
		}
		n, err := chunks.Read(c.body[len(c.body):cap(c.body)])
		c.body = c.body[:len(c.body)+n]
		if first == 0 && bytes.Contains(c.body, firstToken) {
			first = time.Since(start)
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return 0, err
		}
	}
	// The reader of chunks leaves the empty line that ends them.
	if line, err := c.in.ReadSlice('\n'); err != nil || len(bytes.TrimSpace(line)) > 0 {
		return 0, fmt.Errorf("chunks end with %q: %w", line, err)
	}
	return first, nil
}

var firstToken = []byte(`"content":" 0"`)

// checkStream checks a stream: nothing but data, the numbered tokens in their order,
// one finish_reason, [DONE] at the end. The text is appended to text.
func checkStream(body, text []byte, want string) ([]byte, error) {
	done, finished := false, 0
	for len(body) > 0 {
		line, rest, _ := bytes.Cut(body, []byte{'\n'})
		body = rest
		if len(line) == 0 {
			continue
		}
		data, ok := bytes.CutPrefix(line, []byte("data: "))
		switch {
		case !ok:
			return text, fmt.Errorf("not data: %q", line)
		case done:
			return text, fmt.Errorf("after [DONE]: %q", line)
		case string(data) == "[DONE]":
			done = true
			continue
		case bytes.HasPrefix(data, []byte(`{"error"`)):
			return text, fmt.Errorf("error in the stream: %s", data)
		}
		if bytes.Contains(data, []byte(`"finish_reason":"stop"`)) {
			finished++
		}
		if _, piece, ok := bytes.Cut(data, contentMark); ok {
			piece, _, _ = bytes.Cut(piece, []byte{'"'})
			text = append(text, piece...)
		}
	}
	switch {
	case string(text) != want:
		return text, fmt.Errorf("tokens are %q, want %q", text, want)
	case finished != 1:
		return text, fmt.Errorf("%d finish_reasons", finished)
	case !done:
		return text, errors.New("the stream has no [DONE]")
	}
	return text, nil
}

var wholeFinish = []byte(`"finish_reason":"stop"`)

// checkWhole checks a reply that isn't streamed.
func checkWhole(body []byte, want string) error {
	if _, text, ok := bytes.Cut(body, contentMark); !ok || !bytes.HasPrefix(text, []byte(want+`"`)) || !bytes.Contains(body, wholeFinish) {
		return fmt.Errorf("not the whole reply: %s", body)
	}
	return nil
}
