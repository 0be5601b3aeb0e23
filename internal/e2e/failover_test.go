package e2e

import (
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
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
	entries := ledger.wantClosed(key, 10*time.Second)
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
	stack.Until(t, 10*time.Second, "an empty queue", func() bool { return jobs(t, c) == 0 })
}

// TestFailoverFromAFrozenWorker stops a worker for longer than anybody waits for it. What it
// says when it wakes up changes nothing. One that is stopped for a moment only isn't taken
// for dead.
func TestFailoverFromAFrozenWorker(t *testing.T) {
	const streams, tokens, perSecond = 10, 300, 30
	backends := []*stack.Backend{stack.StartBackend(t, longDemo()), stack.StartBackend(t, longDemo())}
	c := stack.StartCluster(t)
	edge := c.StartEdge()
	client, key := failoverClient(t, c, edge)
	ledger := openLedger(t, c.DatabaseURL)
	frozen := c.StartWorker(backends[0].URL).Serving()
	var thawed sync.WaitGroup
	thawed.Go(func() {
		stack.Until(t, 30*time.Second, "streams to run", func() bool { return backends[0].Stats().Tokens > 20*streams })
		c.StartWorker(backends[1].URL).Serving()
		time.Sleep(1500 * time.Millisecond) // until the edge has heard of it
		frozen.Signal(syscall.SIGSTOP)
		time.Sleep(2 * time.Second)
		frozen.Signal(syscall.SIGCONT)
		time.Sleep(1500 * time.Millisecond)
		if n := backends[1].Stats().Started; n != 0 {
			t.Errorf("%d streams have left a worker that was only slow", n)
		}
		frozen.Signal(syscall.SIGSTOP)
		stack.Until(t, 10*time.Second, "the other agent to go on", func() bool { return backends[1].Stats().Active == streams })
		frozen.Signal(syscall.SIGCONT)
	})
	replies := together(streams, func(int) reply {
		return client.chat(t.Context(), true, map[string]any{
			"stream_options": map[string]any{"include_usage": true},
			"demo":           map[string]any{"tokens": tokens, "numbered": true, "tokens_per_second": perSecond},
		})
	})
	thawed.Wait()
	entries := ledger.wantClosed(key, 10*time.Second)
	for _, r := range replies {
		wantOnce(t, r, tokens)
		if e := entries[r.request()]; e.Outcome != "done" || e.Completion != tokens {
			t.Errorf("request %s is in the ledger as %+v", r.request(), e)
		}
	}
	if len(entries) != streams {
		t.Errorf("%d replies, and %d rows in the ledger", streams, len(entries))
	}
	stack.Until(t, 10*time.Second, "the frozen worker to give up", func() bool { return backends[0].Stats().Active == 0 })
	stack.Until(t, 10*time.Second, "an empty queue", func() bool { return jobs(t, c) == 0 })
}
