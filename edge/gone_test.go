package edge_test

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/edge"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// noticed is how soon a client that leaves has to be noticed, and slack what a busy
// machine may add.
const (
	noticed = time.Second
	slack   = 2 * time.Second
)

// depth counts the jobs in the stream.
func (h *house) depth() int {
	h.t.Helper()
	depths, err := h.queue.Depths(h.t.Context(), h.tenant.ID)
	if err != nil {
		h.t.Fatal(err)
	}
	n := 0
	for _, d := range depths {
		n += int(d)
	}
	return n
}

// leave is a way to go away.
var leave = map[string]func(*raw){
	"closes": func(c *raw) { _ = c.Close() },
	"resets": func(c *raw) {
		_ = c.Conn.(*net.TCPConn).SetLinger(0)
		_ = c.Close()
	},
}

// A client that leaves is noticed within a second, whatever its request is doing, and
// the backend stops.
func TestClientLeavesARunningRequest(t *testing.T) {
	t.Parallel()
	h := build(t, plan{})
	for name, members := range map[string]string{
		"before the first token": `"stream":true,"demo":{"tokens":10,"first_token_ms":60000}`,
		"between two tokens":     `"stream":true,"demo":{"tokens":1000,"tokens_per_second":0.05}`,
		"in a fast stream":       `"stream":true,"demo":{"tokens":100000,"tokens_per_second":200}`,
		"of a whole reply":       `"demo":{"tokens":10,"first_token_ms":60000}`,
	} {
		for how, go_ := range leave {
			t.Run(name+", "+how, func(t *testing.T) {
				before := h.backend.Stats()
				c := h.dial()
				c.post(h.key, ask(members))
				until(t, "the backend to be called", func() bool { return h.backend.Stats().Started == before.Started+1 })
				if strings.Contains(members, "tokens_per_second") {
					if resp := c.answer("POST"); resp.StatusCode != 200 {
						t.Fatal(resp.Status)
					}
				}
				go_(c)
				within(t, noticed+slack, "the backend to be told", func() bool { return h.backend.Stats().Aborted == before.Aborted+1 })
				within(t, noticed+slack, "the job to be gone", func() bool { return h.depth() == 0 && h.disp.Active() == 0 })
			})
		}
	}
	h.calm()
}

// A job that waits for a slot leaves the queue with its client. One that the worker had at
// hand already may get as far as the backend, and is stopped there by the answer to its
// claim.
func TestClientLeavesTheQueue(t *testing.T) {
	t.Parallel()
	h := build(t, plan{slots: 1})
	busy := h.dial()
	busy.post(h.key, ask(`"stream":true,"demo":{"tokens":1000,"tokens_per_second":0.05}`))
	busy.answer("POST")
	const slow = `"demo":{"tokens":100,"first_token_ms":60000}`
	for how, go_ := range leave {
		for name, members := range map[string]string{"stream": slow + `,"stream":true`, "whole": slow} {
			t.Run(name+", "+how, func(t *testing.T) {
				clients := make([]*raw, 5) // the worker takes one of them to hand, the others lie in the stream
				for i := range clients {
					clients[i] = h.dial()
					clients[i].post(h.key, ask(members))
				}
				until(t, "the jobs to be queued", func() bool { return h.depth() == 1+len(clients) })
				for _, c := range clients {
					go_(c)
				}
				within(t, noticed+slack, "the jobs to be gone", func() bool { return h.depth() == 1 && h.disp.Active() == 1 })
			})
		}
	}
	_ = busy.Close()
	within(t, noticed+slack, "the busy one to end", func() bool { return h.disp.Active() == 0 && h.backend.Stats().Active == 0 })
	if s := h.backend.Stats(); s.Finished != 0 || s.Started > 1+4 {
		t.Errorf("jobs of clients that had left were run: %+v", s)
	}
	// The slot is free again.
	if resp, _ := h.do("POST", "/v1/chat/completions", h.key, ask("")); resp.StatusCode != 200 {
		t.Error(resp.Status)
	}
}

// cancels listens to what the worker is told to stop.
func (h *house) cancels() func() int {
	h.t.Helper()
	agents := h.agents.Agents(h.tenant.ID)
	sub, err := h.bus.Connect("eavesdropper").SubscribeSync(schemas.ControlSubject(agents[0].Agent))
	if err != nil {
		h.t.Fatal(err)
	}
	n := 0
	return func() int {
		for {
			m, err := sub.NextMsg(time.Millisecond)
			if err == nats.ErrTimeout {
				return n
			}
			if err != nil {
				h.t.Fatal(err)
			}
			var c schemas.Control
			if err := json.Unmarshal(m.Data, &c); err != nil {
				h.t.Fatal(err)
			}
			if c.Operation == schemas.ControlCancel {
				n++
			}
		}
	}
}

// Node and Go close right after [DONE]. That is no cancel.
func TestLeavingAfterTheEndIsNoCancel(t *testing.T) {
	t.Parallel()
	h := build(t, plan{})
	cancels := h.cancels()
	const streams = 50
	for range streams {
		c := h.dial()
		c.post(h.key, ask(`"stream":true,"demo":{"tokens":3}`))
		resp := c.answer("POST")
		var seen strings.Builder
		for !strings.HasSuffix(seen.String(), "data: [DONE]\n\n") {
			b := make([]byte, 1)
			n, err := resp.Body.Read(b)
			seen.Write(b[:n])
			if n == 0 && err != nil {
				t.Fatalf("after %q: %v", seen.String(), err)
			}
		}
		_ = c.Close()
	}
	until(t, "all to be over", func() bool { return h.disp.Active() == 0 && h.depth() == 0 && h.backend.Stats().Active == 0 })
	if s := h.backend.Stats(); s.Aborted != 0 || s.Finished != streams {
		t.Errorf("backend: %+v", s)
	}
	if n := cancels(); n != 0 {
		t.Errorf("%d finished runs were cancelled", n)
	}
	// And the count isn't zero because nobody listens.
	c := h.dial()
	c.post(h.key, ask(`"stream":true,"demo":{"tokens":10,"first_token_ms":60000}`))
	until(t, "the backend to be called", func() bool { return h.backend.Stats().Active == 1 })
	_ = c.Close()
	until(t, "the cancel", func() bool { return cancels() > 0 })
}

// A client that doesn't read has its stream ended at the bound, with an error if it
// reads on in time, and slows nobody.
func TestClientThatReadsTooSlowly(t *testing.T) {
	t.Parallel()
	const bound = 1 << 20
	h := build(t, plan{models: []schemas.Model{talkative()}, dispatch: func(c *dispatch.Config) { c.MaxUnread = bound }})
	flood := func(tokens, perSecond int) string {
		return ask(fmt.Sprintf(`"stream":true,"demo":{"tokens":%d,"tokens_per_second":%d}`, tokens, perSecond))
	}
	stalled := func() *raw {
		c := h.dialNarrow()
		before := h.backend.Stats().Aborted
		c.post(h.key, flood(10_000_000, 20_000))
		until(t, "the stream to be ended", func() bool { return h.backend.Stats().Aborted > before })
		return c
	}
	t.Run("others go on", func(t *testing.T) {
		var others sync.WaitGroup
		defer others.Wait()
		for i := range 4 {
			others.Go(func() {
				start := time.Now()
				_, text := h.do("POST", "/v1/chat/completions", h.key, ask(`"stream":true,"demo":{"numbered":true,"tokens":50,"tokens_per_second":50}`))
				if took := time.Since(start); took > 10*time.Second || !strings.HasSuffix(text, "data: [DONE]\n\n") {
					t.Errorf("stream %d took %s and ended with %.60q", i, took, text[max(0, len(text)-60):])
				}
			})
		}
		others.Go(func() {
			// It comes to more than the bound, and on a busy machine its reader may be seconds late.
			_, text := h.do("POST", "/v1/chat/completions", h.key, flood(8_000, 2_000))
			if !strings.HasSuffix(text, "data: [DONE]\n\n") || len(text) <= bound {
				t.Errorf("a stream of %d bytes that is read ended with %.200q", len(text), text[max(0, len(text)-200):])
			}
		})
		for range 2 {
			stalled()
		}
	})
	t.Run("reads on", func(t *testing.T) {
		c := stalled()
		resp := c.answer("POST")
		text, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		events := strings.Split(string(text), "\n\n")
		last := events[len(events)-2]
		if !strings.HasPrefix(last, `data: {"error":{"message":"`) || codeIn(last) != "agent_timeout" || !strings.Contains(last, fmt.Sprint(bound)) {
			t.Errorf("last event is %q", last)
		}
		for _, e := range events[:len(events)-2] {
			if !strings.HasPrefix(e, `data: {"id":`) {
				t.Fatalf("event %q", e)
			}
		}
		// The connection is as good as before.
		c.post(h.key, ask(""))
		if resp, body := c.whole("POST"); resp.StatusCode != 200 {
			t.Errorf("next request: %d %s", resp.StatusCode, body)
		}
	})
	t.Run("never reads", func(t *testing.T) {
		stalled()
		until(t, "the edge to let go of it", func() bool { return h.disp.Active() == 0 && h.edge.Watched() == 0 })
	})
	within(t, patience, "all to be over", func() bool { return h.depth() == 0 && h.backend.Stats().Active == 0 })
}

// What is left of a reply when its backend has finished needs a reader, too.
func TestClientThatStopsReading(t *testing.T) {
	t.Parallel()
	h := build(t, plan{models: []schemas.Model{talkative()}, dispatch: func(c *dispatch.Config) { c.MaxUnread = 64 << 20 }})
	h.edge.SetWriteWait(300 * time.Millisecond)
	for name, members := range map[string]string{
		"stream": `"stream":true,"demo":{"tokens":100000}`,
		"whole":  `"demo":{"tokens":1000000}`,
	} {
		t.Run(name, func(t *testing.T) {
			c := h.dialNarrow()
			before := h.backend.Stats()
			c.post(h.key, ask(members))
			until(t, "the backend to be through with it", func() bool {
				s := h.backend.Stats()
				return s.Finished+s.Aborted > before.Finished+before.Aborted
			})
			// It would keep the connection of a reply that went out whole.
			until(t, "the edge to let go of it", func() bool { return h.disp.Active() == 0 && h.edge.Open() == 0 })
		})
	}
}

// talkative is the demo model with room for very long replies.
func talkative() schemas.Model {
	m := demo.DefaultModel()
	m.ContextWindow = 1 << 30
	return m
}

// dialNarrow connects with a small window, so that what isn't read stays with the edge.
func (h *house) dialNarrow() *raw {
	h.t.Helper()
	d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		var set error
		err := c.Control(func(fd uintptr) { set = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4096) })
		if err != nil {
			return err
		}
		return set
	}}
	c, err := d.Dial("tcp", h.addr)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { _ = c.Close() })
	return newRaw(h.t, c)
}

func TestTLS(t *testing.T) {
	t.Parallel()
	cert, key, pool := certificate(t)
	h := build(t, plan{slots: 1, edge: edge.Config{CertFile: cert, KeyFile: key}})
	dial := func() *raw {
		c, err := tls.Dial("tcp", h.addr, &tls.Config{RootCAs: pool, ServerName: "edge.test"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return newRaw(t, c)
	}
	c := dial()
	for range 2 {
		c.post(h.key, ask(`"stream":true,"demo":{"numbered":true,"tokens":20}`))
		if resp, text := c.whole("POST"); resp.StatusCode != 200 || !strings.HasSuffix(text, "data: [DONE]\n\n") || strings.Count(text, `"content":" `) != 20 {
			t.Errorf("%d %s", resp.StatusCode, text)
		}
	}
	for _, members := range []string{`"stream":true,"demo":{"first_token_ms":60000}`, `"demo":{"first_token_ms":60000}`} {
		before := h.backend.Stats()
		running, waiting := dial(), dial()
		running.post(h.key, ask(members))
		until(t, "the backend to be called", func() bool { return h.backend.Stats().Started == before.Started+1 })
		waiting.post(h.key, ask(members))
		until(t, "the second to be queued", func() bool { return h.depth() == 2 })
		_ = waiting.Close()
		within(t, noticed+slack, "the queued job to be gone", func() bool { return h.depth() == 1 })
		_ = running.Close()
		within(t, noticed+slack, "the backend to be told", func() bool { return h.backend.Stats().Aborted == before.Aborted+1 })
	}
	// Who doesn't speak TLS is turned away, and so is an old version.
	plain := h.dial()
	plain.send("GET /healthz HTTP/1.1\nHost: h\n\n")
	if b, err := io.ReadAll(plain); err == nil && strings.Contains(string(b), "200 OK") {
		t.Errorf("plain HTTP got %q", b)
	}
	if _, err := tls.Dial("tcp", h.addr, &tls.Config{RootCAs: pool, ServerName: "edge.test", MaxVersion: tls.VersionTLS11, MinVersion: tls.VersionTLS10}); err == nil {
		t.Error("TLS 1.1 is taken")
	}
	// A refusal reaches a client that still sends.
	big := dial()
	go func() {
		_, _ = io.WriteString(big, "POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 20000000\r\n\r\n"+strings.Repeat("x", 20_000_000))
	}()
	resp, body := big.whole("POST")
	checkRefusal(t, resp, body, "key_malformed", "")
}

// After a thousand requests whose clients left at some moment, nothing is left of them.
func TestNothingIsLeftOfAThousandAbortedRequests(t *testing.T) {
	h := build(t, plan{slots: 8})
	c := h.dial()
	c.post(h.key, ask("")) // whatever is made on first use
	c.whole("POST")
	_ = c.Close()
	until(t, "all to be over", func() bool { return h.edge.Open() == 0 && h.edge.Watched() == 0 })
	before := goleak.IgnoreCurrent()
	const clients, each = 50, 20
	var all sync.WaitGroup
	for i := range clients {
		all.Go(func() {
			for j := range each {
				members := []string{
					`"stream":true,"demo":{"tokens":100,"tokens_per_second":100}`,
					`"stream":true,"demo":{"tokens":100,"first_token_ms":5000}`,
					`"demo":{"tokens":100,"tokens_per_second":50}`,
				}[(i+j)%3]
				conn, err := net.Dial("tcp", h.addr)
				if err != nil {
					t.Error(err)
					return
				}
				c := newRaw(t, conn)
				c.post(h.key, ask(members))
				// Leave at once, after some time, or after the first bytes of the reply.
				_ = c.SetReadDeadline(time.Now().Add(time.Duration((i*each+j)%40) * 5 * time.Millisecond))
				_, _ = c.Read(make([]byte, 512))
				_ = c.Close()
			}
		})
	}
	all.Wait()
	until(t, "all to be over", func() bool {
		return h.disp.Active() == 0 && h.edge.Open() == 0 && h.edge.Watched() == 0 && h.backend.Stats().Active == 0 && h.depth() == 0
	})
	// The edge's server keeps the goroutines of connections for the next ones for
	// seconds, the worker its connections to the backend, and the books theirs.
	idle := []goleak.Option{before}
	for _, f := range []string{"github.com/valyala/fasthttp.(*workerPool).workerFunc", "net/http.(*persistConn).readLoop",
		"net/http.(*persistConn).writeLoop", "net/http.(*conn).serve", "net/http.(*connReader).backgroundRead",
		"github.com/ownllm/ownllm/internal/faultproxy.(*Proxy).serve", "github.com/ownllm/ownllm/internal/faultproxy.(*Proxy).serve.func1"} {
		idle = append(idle, goleak.IgnoreAnyFunction(f))
	}
	var left error
	defer func() {
		if left != nil {
			t.Log(left)
		}
	}()
	until(t, "their goroutines to end", func() bool { left = goleak.Find(idle...); return left == nil })
	if resp, _ := h.do("POST", "/v1/chat/completions", h.key, ask("")); resp.StatusCode != 200 {
		t.Error(resp.Status)
	}
	if strings.Contains(h.log.String(), "went away") {
		t.Error("clients that leave are no reason for a word in the log")
	}
}
