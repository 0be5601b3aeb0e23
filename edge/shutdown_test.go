package edge_test

import (
	"io"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/edge"
	"github.com/ownllm/ownllm/schemas"
)

// An edge that stops takes nothing new and lets running replies finish.
func TestDrain(t *testing.T) {
	t.Parallel()
	h := build(t, plan{slots: 2, edge: edge.Config{Drain: patience}})
	idle := h.dial()
	idle.send("GET /healthz HTTP/1.1\nHost: h\n\n")
	idle.whole("GET")
	stream, whole, queued := h.dial(), h.dial(), h.dial()
	stream.post(h.key, ask(`"stream":true,"demo":{"numbered":true,"tokens":200,"tokens_per_second":20}`))
	resp := stream.answer("POST")
	whole.post(h.key, ask(`"demo":{"numbered":true,"tokens":3,"first_token_ms":10000}`))
	until(t, "both to run", func() bool { return h.backend.Stats().Active == 2 })
	queued.post(h.key, ask(`"stream":true,"demo":{"numbered":true,"tokens":3}`))
	until(t, "the third to wait", func() bool { return h.depth() == 3 })
	ended := make(chan error, 1)
	go func() { ended <- h.end() }()

	until(t, "new connections to be refused", func() bool {
		c, err := net.Dial("tcp", h.addr)
		if err == nil {
			_ = c.Close()
		}
		return err != nil
	})
	if r := h.edge.Readiness(t.Context()); r.Ready || !r.Draining {
		t.Errorf("readiness is %+v", r)
	}
	if _, err := idle.r.ReadByte(); err != io.EOF {
		t.Errorf("the idle connection: %v, want EOF", err)
	}
	text, err := io.ReadAll(resp.Body)
	if err != nil || !strings.HasSuffix(string(text), "data: [DONE]\n\n") || contents(string(text), true) != numbered(200) {
		t.Errorf("running stream: error %v, %s", err, text)
	}
	if resp, text := whole.whole("POST"); resp.StatusCode != 200 || contents(text, false) != numbered(3) || !resp.Close {
		t.Errorf("running reply: %s, close %v, %s", resp.Status, resp.Close, text)
	}
	if resp, text := queued.whole("POST"); resp.StatusCode != 200 || contents(text, true) != numbered(3) {
		t.Errorf("queued stream: %s %s", resp.Status, text)
	}
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Fatal("the edge didn't stop")
	}
	h.calm()
}

// While a load balancer may not have seen yet that an edge stops, the edge serves what comes,
// over connections old and new, and leaves none of those open.
func TestDrainDelay(t *testing.T) {
	t.Parallel()
	const delay = 4 * time.Second
	h := build(t, plan{edge: edge.Config{DrainDelay: delay, Drain: patience}})
	kept, silent := h.dial(), h.dial()
	for _, c := range []*raw{kept, silent} {
		c.send("GET /healthz HTTP/1.1\nHost: h\n\n")
		c.whole("GET")
	}
	start := time.Now()
	ended := make(chan error, 1)
	go func() { ended <- h.end() }()
	until(t, "the edge to say that it drains", func() bool { return h.edge.Readiness(t.Context()).Draining })
	for name, c := range map[string]*raw{"a connection that was kept": kept, "a new connection": h.dial()} {
		c.post(h.key, ask(`"demo":{"numbered":true,"tokens":3}`))
		if resp, text := c.whole("POST"); resp.StatusCode != 200 || contents(text, false) != numbered(3) || !resp.Close {
			t.Errorf("%s: %s, close %v, %s", name, resp.Status, resp.Close, text)
		}
		if _, err := c.r.ReadByte(); err != io.EOF {
			t.Errorf("%s: %v, want EOF", name, err)
		}
	}
	if _, err := silent.r.ReadByte(); err != io.EOF || time.Since(start) < delay {
		t.Errorf("the idle connection: %v after %s, want EOF after %s", err, time.Since(start), delay)
	}
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Fatal("the edge didn't stop")
	}
	h.calm()
}

// What doesn't finish within the drain is ended with an error that says so, whatever it
// is doing, and the edge stops even if a client doesn't listen.
func TestDrainIsBounded(t *testing.T) {
	t.Parallel()
	const drain = 500 * time.Millisecond
	h := build(t, plan{
		slots: 4, models: []schemas.Model{talkative()}, edge: edge.Config{Drain: drain},
		dispatch: func(c *dispatch.Config) { c.MaxUnread = 1 << 30 },
	})
	stream, silent, whole, deaf, queued := h.dial(), h.dial(), h.dial(), h.dialNarrow(), h.dial()
	stream.post(h.key, ask(`"stream":true,"demo":{"tokens":1000000,"tokens_per_second":20}`))
	silent.post(h.key, ask(`"stream":true,"demo":{"first_token_ms":60000}`))
	whole.post(h.key, ask(`"demo":{"first_token_ms":60000}`))
	deaf.post(h.key, ask(`"stream":true,"demo":{"tokens":1000000,"tokens_per_second":100000}`))
	// By then the deaf one's buffers are full.
	until(t, "all to run", func() bool { s := h.backend.Stats(); return s.Active == 4 && s.Tokens > 60_000 })
	queued.post(h.key, ask(""))
	until(t, "the last to wait", func() bool { return h.depth() == 5 })
	resp := stream.answer("POST")
	start := time.Now()
	ended := make(chan error, 1)
	go func() { ended <- h.end() }()
	text, err := io.ReadAll(resp.Body)
	if took := time.Since(start); took < drain || took > drain+2*slack {
		t.Errorf("the stream ended after %s", took)
	}
	events := strings.Split(string(text), "\n\n")
	if last := events[max(0, len(events)-2)]; err != nil || codeIn(last) != "internal_error" || !strings.Contains(last, "shutting down") {
		t.Errorf("the stream ended with %v, %q", err, last)
	}
	for name, c := range map[string]*raw{"silent": silent, "whole": whole, "queued": queued} {
		resp, body := c.whole("POST")
		checkRefusal(t, resp, body, "internal_error", "")
		if !strings.Contains(body, "shutting down") || resp.Header.Get("Retry-After") == "" {
			t.Errorf("%s: %s %s", name, resp.Header.Get("Retry-After"), body)
		}
	}
	select {
	case err := <-ended:
		// One client took nothing, so the end wasn't clean.
		if err == nil {
			t.Error("an edge that had to break off a connection doesn't say so")
		}
	case <-time.After(patience):
		t.Fatal("the edge didn't stop")
	}
	if n := h.edge.Open(); n != 0 {
		t.Errorf("%d connections are left", n)
	}
	within(t, patience, "the jobs to be gone", func() bool { return h.depth() == 0 && h.backend.Stats().Active == 0 })
}

// numbered is the text of a numbered reply.
func numbered(n int) string {
	var b strings.Builder
	for i := range n {
		b.WriteByte(' ')
		b.WriteString(strconv.Itoa(i))
	}
	return b.String()
}
