package e2e

import (
	"context"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// upWithBackend runs `ownllm up` in front of a demo backend of the test.
func upWithBackend(t *testing.T, args ...string) (*stack.Backend, *client) {
	t.Helper()
	model := demo.DefaultModel()
	model.ContextWindow = 1 << 20
	backend := stack.StartBackend(t, demo.Options{Models: []schemas.Model{model}})
	up := stack.StartUp(t, t.TempDir(), append([]string{"--backend", backend.URL, "--slots", "256", "--queue-bound", "1000"}, args...)...)
	c := newClient(up.BaseURL, up.APIKey)
	t.Cleanup(c.close)
	return backend, c
}

// TestStreamsAreWhole runs many streams at once and looks at every token. The kinds
// differ in how the backend cuts its reply into chunks and writes.
func TestStreamsAreWhole(t *testing.T) {
	_, c := upWithBackend(t)
	const streams, tokens = 200, 256
	for _, kind := range []struct {
		name string
		demo map[string]any
	}{
		{"one token a chunk", map[string]any{}},
		{"several tokens a chunk", map[string]any{"tokens_per_chunk": 7}},
		{"split inside runes and events", map[string]any{"split_utf8": true}},
		{"with reasoning", map[string]any{"reasoning_tokens": 16}},
		{"paced", map[string]any{"tokens_per_second": 400}},
	} {
		t.Run(kind.name, func(t *testing.T) {
			fields := map[string]any{"tokens": tokens, "numbered": true}
			for k, v := range kind.demo {
				fields[k] = v
			}
			replies := together(streams, func(int) reply {
				return c.chat(t.Context(), true, map[string]any{"demo": fields})
			})
			ids := make(map[string]bool)
			for i, r := range replies {
				wantWhole(t, r)
				if r.text != numbered(tokens) {
					t.Errorf("stream %d: text differs: %.80q … (%d bytes)", i, r.text, len(r.text))
				}
				if r.finish != "stop" {
					t.Errorf("stream %d: finish_reason %q", i, r.finish)
				}
				ids[r.id] = true
			}
			if len(ids) != streams {
				t.Errorf("%d streams have %d ids", streams, len(ids))
			}
		})
	}
}

// together calls f for 0 … n-1 at the same time.
func together(n int, f func(int) reply) []reply {
	replies := make([]reply, n)
	var calls sync.WaitGroup
	for i := range n {
		calls.Go(func() { replies[i] = f(i) })
	}
	calls.Wait()
	return replies
}

// TestFaultsEndInTruth: whatever the backend does, a stream ends with [DONE] only if
// the reply is whole, and else with an error that says what happened. What came before
// the error is a prefix of the reply.
func TestFaultsEndInTruth(t *testing.T) {
	_, c := upWithBackend(t, "--idle-timeout", "2s", "--first-token-timeout", "2s")
	const streams = 20
	for _, fault := range []struct {
		name   string
		demo   map[string]any
		status int
		code   string
	}{
		{"dies in mid-stream", map[string]any{"die_after": 10}, 200, "backend_error"},
		{"dies before the first token", map[string]any{"die_after": 0}, 502, "backend_error"},
		{"error in mid-stream", map[string]any{"error_after": 10}, 200, "backend_error"},
		{"ends without a finish_reason", map[string]any{"end_after": 10}, 200, "backend_error"},
		{"ends at once", map[string]any{"end_after": 0}, 502, "backend_error"},
		{"stalls in mid-stream", map[string]any{"stall_after": 10}, 200, "agent_timeout"},
		{"never begins", map[string]any{"first_token_ms": 60000}, 504, "agent_timeout"},
		{"garbage in mid-stream", map[string]any{"garbage_after": 10}, 200, "backend_error"},
		{"refuses with 500", map[string]any{"status": 500}, 502, "backend_error"},
		{"refuses with 400", map[string]any{"status": 400}, 400, "invalid_value"},
	} {
		t.Run(fault.name, func(t *testing.T) {
			fields := map[string]any{"tokens": 50, "numbered": true}
			for k, v := range fault.demo {
				fields[k] = v
			}
			replies := together(streams, func(int) reply {
				return c.chat(t.Context(), true, map[string]any{"demo": fields})
			})
			for i, r := range replies {
				switch {
				case r.broken != nil || r.done:
					t.Errorf("stream %d: broken %v, done %v", i, r.broken, r.done)
				case r.status != fault.status || r.err == nil || r.err.Code != fault.code:
					t.Errorf("stream %d: status %d, error %+v, want %d %s", i, r.status, r.err, fault.status, fault.code)
				case !strings.HasPrefix(numbered(50), r.text):
					t.Errorf("stream %d: text %q isn't the beginning of the reply", i, r.text)
				case r.status == http.StatusOK && r.text != numbered(10):
					t.Errorf("stream %d: of the 10 tokens before the fault came %q", i, r.text)
				}
			}
		})
	}
}

// TestLargeBody: a body that doesn't fit a message of the bus is fetched by the
// worker, and arrives byte for byte.
func TestLargeBody(t *testing.T) {
	backend, c := upWithBackend(t)
	for _, size := range []int{400 << 10, 600 << 10, 5 << 20} {
		r := c.chat(t.Context(), true, map[string]any{
			"padding": strings.Repeat("äx", size/3),
			"demo":    map[string]any{"tokens": 5, "numbered": true},
		})
		wantWhole(t, r)
		if r.text != numbered(5) {
			t.Errorf("%d bytes: got %q", size, r.text)
		}
	}
	if n := backend.Stats().Finished; n != 3 {
		t.Errorf("backend finished %d requests, want 3", n)
	}
}

// TestLargeReply: a reply that isn't streamed may be larger than a message of the bus.
func TestLargeReply(t *testing.T) {
	_, c := upWithBackend(t)
	const tokens = 400_000
	r := c.chat(t.Context(), false, map[string]any{"demo": map[string]any{"tokens": tokens, "numbered": true}})
	wantWhole(t, r)
	if r.text != numbered(tokens) {
		t.Errorf("got %d bytes, want %d", len(r.text), len(numbered(tokens)))
	}
}

// TestQueueFull fills the queue of the only agent.
func TestQueueFull(t *testing.T) {
	backend := stack.StartBackend(t, demo.Options{})
	up := stack.StartUp(t, t.TempDir(), "--backend", backend.URL, "--slots", "1", "--queue-bound", "3")
	c := newClient(up.BaseURL, up.APIKey)
	defer c.close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var queued sync.WaitGroup
	for range 3 {
		queued.Go(func() {
			c.chat(ctx, true, map[string]any{"demo": map[string]any{"tokens": 1, "first_token_ms": 30000}})
		})
	}
	var r reply
	stack.Until(t, 30*time.Second, "queue_full", func() bool {
		short, stop := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer stop()
		r = c.chat(short, true, nil)
		return r.err != nil && r.err.Code == "queue_full"
	})
	if r.status != 503 || r.header.Get("Retry-After") == "" {
		t.Errorf("queue_full came with status %d and Retry-After %q", r.status, r.header.Get("Retry-After"))
	}
	// Everyone leaves: the queue is empty again, and the backend free.
	cancel()
	queued.Wait()
	stack.Until(t, 30*time.Second, "room in the queue", func() bool {
		return c.chat(t.Context(), true, nil).done
	})
}
