package e2e

import (
	"maps"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// longDemo is the demo model with a window for long replies.
func longDemo() demo.Options {
	m := demo.DefaultModel()
	m.ContextWindow = 1 << 20
	return demo.Options{Models: []schemas.Model{m}}
}

// failoverClient is a client with a key of its own, which pays.
func failoverClient(t *testing.T, c *stack.Cluster, edge *stack.Edge) (*client, schemas.KeyID) {
	t.Helper()
	key, secret := newKey(t, c, books.NewKey{Name: "failover", Concurrency: new(1000)})
	client := newClient(edge.BaseURL, secret)
	t.Cleanup(client.close)
	return client, key
}

// wantOnce fails the test unless a numbered reply is whole, and every token came once.
func wantOnce(t *testing.T, r reply, tokens int) {
	t.Helper()
	wantWhole(t, r)
	if r.text != numbered(tokens) || r.roles != 1 || r.finish != "stop" || r.usage != tokens {
		t.Errorf("a reply has %d roles, finish_reason %q, %d tokens: %q", r.roles, r.finish, r.usage, r.text)
	}
}

// TestFailover kills workers in mid-stream, one after the other, while many streams run.
// Each reply comes whole all the same, every token once, and is paid for once.
//
// In a full run, that of `make failover`, they are 200.
func TestFailover(t *testing.T) {
	kills := count(5, 200)
	const streams, tokens, perSecond = 20, 120, 40
	backend := stack.StartBackend(t, longDemo())
	c := stack.StartCluster(t)
	edge := c.StartEdge()
	client, key := failoverClient(t, c, edge)
	ledger := openLedger(t, c.DatabaseURL)
	setPrice(t, c, "demo", 1000)

	workers := []*stack.Worker{c.StartWorker(backend.URL).Serving(), c.StartWorker(backend.URL).Serving()}
	awaitAgents(t, edge, len(workers))
	stop := make(chan struct{})
	var replies []reply
	var mu sync.Mutex
	var clients sync.WaitGroup
	for range streams {
		clients.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				r := client.chat(t.Context(), true, map[string]any{
					"stream_options": map[string]any{"include_usage": true},
					"demo":           map[string]any{"tokens": tokens, "numbered": true, "tokens_per_second": perSecond, "prompt_tokens": 11},
				})
				mu.Lock()
				replies = append(replies, r)
				mu.Unlock()
			}
		})
	}
	for n := range kills {
		before := backend.Stats()
		stack.Until(t, 30*time.Second, "streams to run", func() bool {
			s := backend.Stats()
			return s.Active >= streams/2 && s.Tokens > before.Tokens+5*streams
		})
		doomed := workers[n%2]
		doomed.Kill()
		workers[n%2] = c.RestartWorker(doomed.Dir, backend.URL).Serving()
	}
	close(stop)
	clients.Wait()

	for i, r := range replies {
		wantOnce(t, r, tokens)
		if r.prompt != 11 {
			t.Errorf("reply %d counts a prompt of %d tokens", i, r.prompt)
		}
	}
	entries := ledger.wantClosed(key, 30*time.Second)
	if len(entries) != len(replies) {
		t.Errorf("%d replies, and %d rows in the ledger", len(replies), len(entries))
	}
	for _, r := range replies {
		e, ok := entries[r.request()]
		if !ok || e.Outcome != "done" || e.Completion != tokens || e.Prompt != 11 {
			t.Errorf("request %s is in the ledger as %+v", r.request(), e)
		}
	}
	s := backend.Stats()
	t.Logf("%d workers killed, %d replies, %d calls of the backend", kills, len(replies), s.Started)
	if moved := int(s.Started) - len(replies); moved < kills {
		t.Errorf("only %d times a reply was continued", moved)
	}
	// A job that couldn't be taken out is delivered once more, after AckWait, and refused.
	stack.Until(t, 2*bus.AckWait, "an empty queue", func() bool { return jobs(t, c) == 0 })
}

// TestFailoverFromAFrozenWorker stops a worker for longer than anybody waits for it. What it
// says when it wakes up changes nothing. One that is stopped for a moment only isn't taken
// for dead.
func TestFailoverFromAFrozenWorker(t *testing.T) {
	const streams, tokens, perSecond = 10, 600, 30 // long enough for a second worker to start meanwhile
	backends := []*stack.Backend{stack.StartBackend(t, longDemo()), stack.StartBackend(t, longDemo())}
	c := stack.StartCluster(t)
	edge := c.StartEdge()
	client, key := failoverClient(t, c, edge)
	ledger := openLedger(t, c.DatabaseURL)
	frozen := c.StartWorker(backends[0].URL).Serving()
	awaitAgents(t, edge, 1)
	var thawed sync.WaitGroup
	thawed.Go(func() {
		stack.Until(t, 30*time.Second, "streams to run", func() bool { return backends[0].Stats().Tokens > 20*streams })
		c.StartWorker(backends[1].URL).Serving()
		awaitAgents(t, edge, 2)
		frozen.Signal(syscall.SIGSTOP)
		time.Sleep(1200 * time.Millisecond) // with the second between two beats, well below presence.StaleAfter
		frozen.Signal(syscall.SIGCONT)
		time.Sleep(1500 * time.Millisecond)
		if n := backends[1].Stats().Started; n != 0 {
			t.Errorf("%d streams have left a worker that was only slow", n)
		}
		frozen.Signal(syscall.SIGSTOP)
		stack.Until(t, 30*time.Second, "the other agent to go on", func() bool { return backends[1].Stats().Active == streams })
		frozen.Signal(syscall.SIGCONT)
	})
	replies := together(streams, func(int) reply {
		return client.chat(t.Context(), true, map[string]any{
			"stream_options": map[string]any{"include_usage": true},
			"demo":           map[string]any{"tokens": tokens, "numbered": true, "tokens_per_second": perSecond},
		})
	})
	thawed.Wait()
	entries := ledger.wantClosed(key, 30*time.Second)
	for _, r := range replies {
		wantOnce(t, r, tokens)
		if e := entries[r.request()]; e.Outcome != "done" || e.Completion != tokens {
			t.Errorf("request %s is in the ledger as %+v", r.request(), e)
		}
	}
	if len(entries) != streams {
		t.Errorf("%d replies, and %d rows in the ledger", streams, len(entries))
	}
	stack.Until(t, 30*time.Second, "the frozen worker to give up", func() bool { return backends[0].Stats().Active == 0 })
	stack.Until(t, 30*time.Second, "an empty queue", func() bool { return jobs(t, c) == 0 })
}

// TestWhatCannotBeContinued kills a worker whose replies have more to them than text. Each
// ends with an error, soon, though another worker has the model.
func TestWhatCannotBeContinued(t *testing.T) {
	backends := []*stack.Backend{stack.StartBackend(t, longDemo()), stack.StartBackend(t, longDemo())}
	c := stack.StartCluster(t)
	edge := c.StartEdge()
	client, key := failoverClient(t, c, edge)
	doomed := c.StartWorker(backends[0].URL).Serving()
	awaitAgents(t, edge, 1)
	tools := []any{map[string]any{"type": "function", "function": map[string]any{"name": "f"}}}
	kinds := []struct {
		name         string
		fields, demo map[string]any
	}{
		{"two choices", map[string]any{"n": 2}, nil},
		{"logprobs", map[string]any{"logprobs": true}, nil},
		{"JSON", map[string]any{"response_format": map[string]any{"type": "json_object"}}, nil},
		{"JSON of a schema", map[string]any{"response_format": map[string]any{"type": "json_schema", "json_schema": map[string]any{"name": "x", "schema": map[string]any{}}}}, nil},
		{"a grammar", map[string]any{"guided_regex": "[0-9 ]*"}, nil},
		{"tool calls", map[string]any{"tools": tools}, map[string]any{"tool_calls": 128}},
		{"reasoning", nil, map[string]any{"reasoning_tokens": 500}},
		{"a reply that the client began", map[string]any{"messages": []map[string]string{{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " 0 1"}}}, nil},
	}
	var died atomic.Int64
	var killed sync.WaitGroup
	killed.Go(func() {
		stack.Until(t, 30*time.Second, "streams to run", func() bool {
			s := backends[0].Stats()
			return s.Active == int64(len(kinds)) && s.Tokens > int64(20*len(kinds))
		})
		c.StartWorker(backends[1].URL).Serving()
		awaitAgents(t, edge, 2)
		died.Store(time.Now().UnixNano())
		doomed.Kill()
	})
	ends := make([]time.Time, len(kinds))
	replies := together(len(kinds), func(i int) reply {
		fields := map[string]any{"tokens": 1000, "numbered": true, "tokens_per_second": 20}
		maps.Copy(fields, kinds[i].demo)
		all := map[string]any{"demo": fields}
		maps.Copy(all, kinds[i].fields)
		r := client.chat(t.Context(), true, all)
		ends[i] = time.Now()
		return r
	})
	killed.Wait()
	for i, r := range replies {
		if r.done || r.broken != nil || r.code() != "agent_offline" {
			t.Errorf("%s: done %v, broken %v, error %+v", kinds[i].name, r.done, r.broken, r.err)
		}
		if took := ends[i].Sub(time.Unix(0, died.Load())); took > 5*time.Second {
			t.Errorf("%s: ended %s after its agent", kinds[i].name, took)
		}
	}
	if n := backends[1].Stats().Started; n != 0 {
		t.Errorf("the other backend was asked %d times", n)
	}
	if entries := openLedger(t, c.DatabaseURL).wantClosed(key, 30*time.Second); len(entries) != len(kinds) {
		t.Errorf("%d replies, and %d rows in the ledger", len(kinds), len(entries))
	}
	stack.Until(t, 30*time.Second, "an empty queue", func() bool { return jobs(t, c) == 0 })
}
