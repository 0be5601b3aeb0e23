package edge_test

import (
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/edge"
	"github.com/ownllm/ownllm/schemas"
)

// A client that reads a byte now and then is one that doesn't read: its reply is ended, and
// its connection closed, however long it goes on. Times are a tenth of the real ones. It keeps
// the machine busy, and so isn't parallel to tests that look at the clock.
func TestOneByteASecond(t *testing.T) {
	h := build(t, plan{models: []schemas.Model{talkative()}, dispatch: func(c *dispatch.Config) { c.MaxUnread = 1 << 20 }})
	h.edge.SetWriteWait(6 * time.Second)
	c := h.dialNarrow()
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	before := h.backend.Stats()
	c.post(h.key, ask(`"stream":true,"demo":{"tokens":10000000,"tokens_per_second":20000}`))
	done, slow := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(slow)
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
				if _, err := c.r.Discard(1); err != nil {
					return
				}
			}
		}
	}()
	within(t, 30*time.Second, "the backend to be told", func() bool { return h.backend.Stats().Aborted > before.Aborted })
	resp, body := h.do("POST", "/v1/chat/completions", h.key, ask(""))
	if resp.StatusCode != 200 {
		t.Errorf("somebody else got %d %s", resp.StatusCode, body)
	}
	within(t, 30*time.Second, "the edge to let go of it", func() bool { return h.disp.Active() == 0 && h.edge.Watched() == 0 })
	close(done)
	<-slow
}

// Ten thousand connections that say nothing cost a little memory each, delay nobody, and are
// closed when their time is up.
func TestIdleConnections(t *testing.T) {
	const want, most = 10_000, 48 << 10 // bytes for each, both ends of it and what the test has
	// Root may have as many files as it likes; others make do with fewer connections.
	_ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: 2*want + 2000, Max: 2*want + 2000})
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	n := min(want, (int(limit.Cur)-1000)/2) // of both ends, which are in this process
	if n < 1000 {
		t.Fatalf("a limit of %d open files isn't enough for this test", limit.Cur)
	}
	h := build(t, plan{edge: edge.Config{HeaderTimeout: 30 * time.Second}})
	size := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapInuse + m.StackInuse)
	}
	before := size()
	idle := make([]net.Conn, 0, n)
	defer func() {
		for _, c := range idle {
			_ = c.Close()
		}
	}()
	open := h.edge.Open()
	for range n {
		c, err := net.Dial("tcp", h.addr)
		if err != nil {
			t.Fatal(err)
		}
		idle = append(idle, c)
	}
	until(t, "the edge to have them all", func() bool { return h.edge.Open() >= open+n })
	start := time.Now()
	if resp, body := h.do("POST", "/v1/chat/completions", h.key, ask("")); resp.StatusCode != 200 {
		t.Errorf("with %d idle connections: %d %s", n, resp.StatusCode, body)
	}
	took, each := time.Since(start), (size()-before)/int64(n)
	t.Logf("%d idle connections take %d bytes each, a request beside them %s", n, each, took.Round(time.Millisecond))
	if took > 5*time.Second || each > most {
		t.Errorf("a request took %s, and a connection %d bytes", took, each)
	}
	within(t, 2*time.Minute, "the edge to close them", func() bool { return h.edge.Open() <= open+1 })
	if b, err := io.ReadAll(idle[0]); len(b) > 0 || err != nil {
		t.Errorf("an idle connection was told %q, %v", b, err)
	}
}

// Whoever sends a request a byte at a time is told so when the time for headers is up, and
// cut off.
func TestSlowloris(t *testing.T) {
	t.Parallel()
	h := build(t, plan{edge: edge.Config{HeaderTimeout: 700 * time.Millisecond}})
	loris := h.dial()
	begun, over := time.Now(), make(chan struct{})
	go func() {
		defer close(over)
		for _, b := range []byte("GET /v1/models HTTP/1.1\r\nHost: h\r\nX-Slow: " + strings.Repeat("x", 1000)) {
			if _, err := loris.Write([]byte{b}); err != nil {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
	}()
	resp, body := loris.whole("GET")
	checkRefusal(t, resp, body, "invalid_value", "")
	_ = loris.Close()
	<-over
	if took := time.Since(begun); took > 5*time.Second || !resp.Close {
		t.Errorf("it took %s, and the connection is closed: %v", took, resp.Close)
	}
	// Headers that came in time leave the body time of its own.
	c := h.dial()
	text := ask("")
	c.send(fmt.Sprintf("POST /v1/chat/completions HTTP/1.1\nHost: h\nAuthorization: Bearer %s\nContent-Length: %d\n\n%s", h.key, len(text), text[:10]))
	time.Sleep(1200 * time.Millisecond)
	c.send(text[10:])
	if resp, body := c.whole("POST"); resp.StatusCode != 200 {
		t.Errorf("a slow body got %d %s", resp.StatusCode, body)
	}
}

// A key can't fill the memory with bodies that never end: it may have so many on their way,
// and other keys are none the wiser.
func TestBodiesOnTheirWay(t *testing.T) {
	t.Parallel()
	const concurrency, slack = 2, 32
	h := build(t, plan{})
	_, key := h.newKey(books.NewKey{Concurrency: new(concurrency)})
	until(t, "the key to be known", func() bool { return h.known(key) || h.code("GET", "/v1/models", key, "").code == "" && h.known(key) })
	text := ask("")
	slow := func() *raw {
		c := h.dial()
		c.send(fmt.Sprintf("POST /v1/chat/completions HTTP/1.1\nHost: h\nAuthorization: Bearer %s\nTransfer-Encoding: chunked\n\n5\n%s\n", key, text[:5]))
		return c
	}
	var begun []*raw
	for range concurrency + slack {
		begun = append(begun, slow())
	}
	until(t, "one more to be refused", func() bool {
		got := h.code("POST", "/v1/chat/completions", key, text)
		return got == refusal{429, "concurrency_limit"}
	})
	if resp, body := h.do("POST", "/v1/chat/completions", h.key, text); resp.StatusCode != 200 {
		t.Errorf("another key got %d %s", resp.StatusCode, body)
	}
	c := begun[0]
	c.send(fmt.Sprintf("%x\n%s\n0\n\n", len(text)-5, text[5:]))
	if resp, body := c.whole("POST"); resp.StatusCode != 200 {
		t.Errorf("one of those that were first got %d %s", resp.StatusCode, body)
	}
	for _, c := range begun[1:] {
		_ = c.Close()
	}
	until(t, "the key to be as good as before", func() bool {
		resp, _ := h.do("POST", "/v1/chat/completions", key, text)
		return resp.StatusCode == 200
	})
}

// JSON that is nested 100,000 deep is refused wherever it comes in, and nobody's stack grows.
func TestDeepJSON(t *testing.T) {
	const depth = 100_000
	h := build(t, plan{})
	deep := strings.Repeat("[", depth) + strings.Repeat("]", depth)
	objects := strings.Repeat(`{"a":`, depth) + "1" + strings.Repeat("}", depth)
	for name, body := range map[string]string{
		"an unknown field": ask(`"x":` + deep),
		"objects":          ask(`"x":` + objects),
		"a message":        `{"model":"demo","messages":[{"role":"user","content":` + deep + `}]}`,
		"all of it":        deep,
	} {
		if got := h.code("POST", "/v1/chat/completions", h.key, body); got != (refusal{400, "invalid_json"}) {
			t.Errorf("%s: %+v", name, got)
		}
	}
	if got := h.code("POST", "/api/v1/tenants", adminToken, `{"slug":"a","x":`+deep+`}`); got.status != 400 {
		t.Errorf("admin API: %+v", got)
	}
}

// A body of 32 MB is served, and one of a byte more isn't.
func TestLargestBody(t *testing.T) {
	const limit = 32 << 20
	h := build(t, plan{edge: edge.Config{BodyLimit: limit}})
	body := ask(`"x":""`)
	body = ask(`"x":"` + strings.Repeat("y", limit-len(body)) + `"`)
	if resp, text := h.do("POST", "/v1/chat/completions", h.key, body); resp.StatusCode != 200 {
		t.Errorf("%d bytes: %d %.300s", len(body), resp.StatusCode, text)
	}
	resp, text := h.do("POST", "/v1/chat/completions", h.key, body+" ")
	checkRefusal(t, resp, text, "request_too_large", "")
}
