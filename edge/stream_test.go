package edge_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/internal/natstest"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/backend"
	"github.com/ownllm/ownllm/worker/demo"
)

// Until the first token there is no status, so that whatever goes wrong has a real one.
func TestStatusIsHeldUntilTheFirstToken(t *testing.T) {
	t.Parallel()
	h := build(t, plan{dispatch: func(c *dispatch.Config) { c.FirstToken = 5 * time.Second }})
	const delay = 250 * time.Millisecond
	c := h.dial()
	start := time.Now()
	c.post(h.key, ask(`"stream":true,"demo":{"tokens":2,"first_token_ms":250}`))
	resp := c.answer("POST")
	if took := time.Since(start); took < delay || took > delay+slack {
		t.Errorf("the status came after %s, the first token was due after %s", took, delay)
	}
	for name, want := range map[string]string{
		"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no",
	} {
		if got := resp.Header.Get(name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if id := resp.Header.Get("X-Request-Id"); !strings.HasPrefix(id, "req_") {
		t.Errorf("X-Request-Id is %q", id)
	}
	for _, test := range []struct{ name, demo, code string }{
		{"status 500", `"status":500`, "backend_error"},
		{"status 503", `"status":503,"retry_after":7`, "backend_error"},
		{"status 400", `"status":400`, "invalid_value"},
		{"dies", `"die_after":0`, "backend_error"},
		{"garbage", `"garbage_after":0`, "backend_error"},
		{"ends", `"end_after":0`, "backend_error"},
		{"error in the stream", `"error_after":0`, "backend_error"},
		{"stalls", `"stall_after":0`, "agent_timeout"},
	} {
		t.Run(test.name, func(t *testing.T) {
			resp, body := h.do("POST", "/v1/chat/completions", h.key, ask(`"stream":true,"demo":{"tokens":10,`+test.demo+`}`))
			checkRefusal(t, resp, body, test.code, "")
			if test.name == "status 503" && resp.Header.Get("Retry-After") != "7" {
				t.Errorf("Retry-After is %q", resp.Header.Get("Retry-After"))
			}
		})
	}
}

// A stream that waits for long gets its status and comments, in the one form that no
// SDK chokes on, and errors come in the stream from then on.
func TestKeepAlive(t *testing.T) {
	t.Parallel()
	const every = 200 * time.Millisecond
	h := build(t, plan{dispatch: func(c *dispatch.Config) {
		c.FirstTick, c.KeepAlive, c.FirstToken = every, every, 5*time.Second
	}})
	const comment = ": waiting\n"
	read := func(members string) (text string, status, took time.Duration) {
		c := h.dial()
		start := time.Now()
		c.post(h.key, ask(members))
		resp := c.answer("POST")
		status = time.Since(start)
		if resp.StatusCode != 200 {
			t.Errorf("%s: %s", members, resp.Status)
		}
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Error(err)
		}
		return string(b), status, time.Since(start)
	}
	text, status, took := read(`"stream":true,"demo":{"tokens":2,"numbered":true,"first_token_ms":1000}`)
	if status > every+slack || status < every {
		t.Errorf("the status came after %s", status)
	}
	if n := strings.Count(text, comment); n < 2 || n > int(took/every) {
		t.Errorf("%d comments in a second of silence, %s in all: %q", n, took, text)
	}
	events := strings.TrimLeft(strings.ReplaceAll(text, comment, ""), "")
	if strings.Contains(text, comment+"\n") || !strings.HasPrefix(text, comment) || !strings.HasPrefix(events, `data: {"id":`) || !strings.HasSuffix(events, "\n\ndata: [DONE]\n\n") {
		t.Errorf("stream is %q", text)
	}

	// Silence in the middle.
	text, _, _ = read(`"stream":true,"demo":{"tokens":2,"numbered":true,"tokens_per_second":1}`)
	if n := strings.Count(text, comment); n < 2 || strings.Contains(text, comment+"\n") || !strings.HasSuffix(text, "data: [DONE]\n\n") {
		t.Errorf("stream with a pause is %q", text)
	}

	for demo, code := range map[string]string{
		`"first_token_ms":1500,"error_after":0`: "backend_error",
		`"stall_after":0`:                       "agent_timeout",
	} {
		text, _, _ := read(`"stream":true,"demo":{"tokens":2,` + demo + `}`)
		last, ok := strings.CutPrefix(strings.ReplaceAll(text, comment, ""), "data: ")
		if !ok || !strings.HasSuffix(text, "\n\n") || !envelope.MatchString(strings.TrimSuffix(last, "\n")) || codeIn(last) != code {
			t.Errorf("%s: stream is %q, want an error %s", demo, text, code)
		}
	}
}

// An error in a stream is one event of the plain form, and the last.
func TestErrorsInAStream(t *testing.T) {
	t.Parallel()
	h := build(t, plan{dispatch: func(c *dispatch.Config) { c.Idle = 2 * time.Second }})
	for demo, code := range map[string]string{
		`"die_after":3`:     "backend_error",
		`"error_after":3`:   "backend_error",
		`"end_after":3`:     "backend_error",
		`"garbage_after":3`: "backend_error",
		`"stall_after":3`:   "agent_timeout",
	} {
		t.Run(demo, func(t *testing.T) {
			resp, text := h.do("POST", "/v1/chat/completions", h.key, ask(`"stream":true,"demo":{"tokens":10,"numbered":true,`+demo+`}`))
			if resp.StatusCode != 200 {
				t.Fatalf("%s %s", resp.Status, text)
			}
			events := strings.Split(strings.TrimSuffix(text, "\n\n"), "\n\n")
			last := events[len(events)-1]
			content := ""
			for _, e := range events[:len(events)-1] {
				var chunk struct {
					Choices []struct{ Delta struct{ Content string } }
					Error   *json.RawMessage
				}
				if err := json.Unmarshal([]byte(strings.TrimPrefix(e, "data: ")), &chunk); err != nil || len(chunk.Choices) != 1 || strings.Contains(e, `"error"`) {
					t.Fatalf("event %q: %v", e, err)
				}
				content += chunk.Choices[0].Delta.Content
			}
			if content != " 0 1 2" {
				t.Errorf("before the error came %q", content)
			}
			if !envelope.MatchString(strings.TrimPrefix(last, "data: ")+"\n") || codeIn(last) != code {
				t.Errorf("last event is %q, want an error %s", last, code)
			}
			for line := range strings.Lines(text) {
				if line != "\n" && !strings.HasPrefix(line, "data: ") {
					t.Errorf("line %q", line)
				}
			}
		})
	}
}

// Each token leaves when it comes, not with the next.
func TestTokensAreFlushedAtOnce(t *testing.T) {
	t.Parallel()
	h := build(t, plan{})
	const pace = time.Second
	c := h.dial()
	c.post(h.key, ask(`"stream":true,"demo":{"tokens":6,"numbered":true,"tokens_per_second":1}`))
	lines := bufio.NewReader(c.answer("POST").Body)
	var at []time.Time
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			break
		}
		if strings.Contains(line, `"content":" `) {
			at = append(at, time.Now())
		}
	}
	if len(at) != 6 {
		t.Fatalf("%d tokens", len(at))
	}
	var gaps []time.Duration
	short := 0
	for i := 1; i < len(at); i++ {
		gap := at[i].Sub(at[i-1])
		gaps = append(gaps, gap)
		if gap < pace/10 {
			short++
		}
	}
	// A token that is held back comes together with the next. A busy machine makes one
	// late, but not one after the other.
	if short > 1 {
		t.Errorf("tokens that are made %s apart came with gaps of %s", pace, gaps)
	}
}

// Fiber reuses the memory of a request for the next one on its connection, be it of
// another tenant. Nothing of the first may be read after that.
func TestTenantsOnOneConnection(t *testing.T) {
	t.Parallel()
	first := demo.DefaultModel()
	first.ID = "model-of-the-first-tenant"
	h := build(t, plan{models: []schemas.Model{first}})
	tenant, _, key := h.newTenant("other")
	second := demo.DefaultModel()
	second.ID = "model-of-the-other-tenant"
	other := demo.New(demo.Options{Models: []schemas.Model{second}})
	l := listen(t, "127.0.0.1:0")
	h.run("second backend", func(ctx context.Context) error { return other.Serve(ctx, l) })
	h.work(tenant.ID, backend.Config{URL: "http://" + l.Addr().String()}, natstest.Log)
	until(t, "the second model", func() bool {
		models, _ := h.agents.Models(tenant.ID)
		return len(models) == 1
	})
	tenants := []struct{ key, model string }{{h.key, first.ID}, {key, second.ID}}

	// Several connections at once, each of which sends all its requests ahead.
	const connections, each = 4, 24
	var all sync.WaitGroup
	for n := range connections {
		all.Go(func() {
			c := h.dial()
			for i := range each {
				who := tenants[(i+n)%2]
				stream := i%3 != 0
				c.post(who.key, fmt.Sprintf(`{"model":%q,"messages":[{"role":"user","content":"request %d of connection %d"}],"stream":%v,"demo":{"echo":true}}`, who.model, i, n, stream))
			}
			for i := range each {
				who, stranger := tenants[(i+n)%2], tenants[(i+n+1)%2]
				resp, text := c.whole("POST")
				content := contents(text, i%3 != 0)
				if resp.StatusCode != 200 || !strings.Contains(text, `"model":"`+who.model+`"`) || strings.Contains(text, stranger.model) ||
					!strings.Contains(content, fmt.Sprintf("request %d of connection %d", i, n)) {
					t.Errorf("reply %d of connection %d: %s %s", i, n, resp.Status, text)
					return
				}
			}
			// The other way round, each is told no.
			for i := range 6 {
				c.post(tenants[i%2].key, fmt.Sprintf(`{"model":%q,"messages":[{"role":"user","content":"Hi"}]}`, tenants[(i+1)%2].model))
			}
			for range 6 {
				if _, text := c.whole("POST"); codeIn(text) != "model_not_found" {
					t.Errorf("another tenant's model: %s", text)
				}
			}
		})
	}
	all.Wait()
}

// contents puts the text of a reply together.
func contents(text string, stream bool) string {
	type message struct{ Content string }
	var b strings.Builder
	for _, line := range strings.Split(text, "\n") {
		if stream {
			line = strings.TrimPrefix(line, "data: ")
		}
		var reply struct {
			Choices []struct{ Delta, Message message }
		}
		if json.Unmarshal([]byte(line), &reply) != nil {
			continue
		}
		for _, c := range reply.Choices {
			b.WriteString(c.Delta.Content + c.Message.Content)
		}
	}
	return b.String()
}

// What nobody here understands reaches the backend as it was.
func TestUnknownFieldsReachTheBackend(t *testing.T) {
	t.Parallel()
	h := build(t, plan{models: []schemas.Model{talkative()}})
	const odd = `"reasoning_effort":"low","chat_template_kwargs":{"a":[1,2.50,{"b":null}]},"x":1e3,"y":"\u00e9\ud83d\ude00"`
	for _, stream := range []bool{true, false} {
		_, text := h.do("POST", "/v1/chat/completions", h.key, ask(fmt.Sprintf(`%s,"stream":%v,"demo":{"echo":true}`, odd, stream)))
		if got := contents(text, stream); !strings.Contains(got, odd) {
			t.Errorf("the backend got %s", got)
		}
	}
	// One that is too large for a message, too.
	large := strings.Repeat("0123456789abcdef", 45_000)
	resp, text := h.do("POST", "/v1/chat/completions", h.key, ask(`"x":"`+large+`","demo":{"echo":true}`))
	if resp.StatusCode != http.StatusOK || !strings.Contains(contents(text, false), `"x":"`+large+`"`) {
		t.Errorf("%s: %d bytes came back", resp.Status, len(text))
	}
}
