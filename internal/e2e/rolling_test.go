package e2e

import (
	"context"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/worker/demo"
)

// balancer sends requests to edges as load balancers do, over connections that it keeps: to
// any, or to one that says that it is ready; and once more to the other if that one doesn't
// take it.
type balancer struct {
	clients []*client // of the edges

	mu      sync.Mutex
	edges   []*stack.Edge
	refused int // requests that one edge didn't take
}

func (b *balancer) replace(i int, edge *stack.Edge) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.edges[i] = edge
}

// first is the edge to try first.
func (b *balancer) first(blind bool) int {
	i := rand.IntN(2)
	b.mu.Lock()
	ready := b.edges[i].OpsURL + "/readyz"
	b.mu.Unlock()
	if blind || stack.Answers(ready) {
		return i
	}
	return 1 - i
}

func (b *balancer) chat(ctx context.Context, blind, stream bool, fields map[string]any) reply {
	i := b.first(blind)
	r := b.clients[i].chat(ctx, stream, fields)
	if r.status != 0 {
		return r
	}
	b.mu.Lock()
	b.refused++
	b.mu.Unlock()
	return b.clients[1-i].chat(ctx, stream, fields)
}

// counting asks for a numbered reply that tells its usage.
func counting(stream bool, tokens, perSecond int) map[string]any {
	fields := map[string]any{"demo": map[string]any{"tokens": tokens, "numbered": true, "tokens_per_second": perSecond}}
	if stream {
		fields["stream_options"] = map[string]any{"include_usage": true}
	}
	return fields
}

// TestRollingRestart restarts both edges and both workers, one after the other, as systemd
// does and while streams run. No request is lost, every reply comes whole, and the ledger has
// each once. The workers come back with the credentials that they have.
func TestRollingRestart(t *testing.T) {
	const clients, tokens, perSecond = 12, 30, 20
	backend := stack.StartBackend(t, longDemo())
	c := stack.StartCluster(t)
	edges := c.StartEdges(2)
	workers := []*stack.Worker{c.StartWorker(backend.URL).Serving(), c.StartWorker(backend.URL).Serving()}
	setPrice(t, c, "demo", 1000)
	key, secret := newKey(t, c, books.NewKey{Concurrency: new(1000)})
	for _, edge := range edges {
		awaitAgents(t, edge, len(workers))
	}
	lb := &balancer{clients: clientsOf(t, edges, secret), edges: slices.Clone(edges)}
	stop := make(chan struct{})
	var mu sync.Mutex
	var replies []reply
	var load sync.WaitGroup
	for n := range clients {
		load.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				stream := n%3 != 0
				r := lb.chat(t.Context(), n%2 == 0, stream, counting(stream, tokens, perSecond))
				mu.Lock()
				replies = append(replies, r)
				mu.Unlock()
			}
		})
	}
	running := func() {
		before := backend.Stats().Tokens
		stack.Until(t, 30*time.Second, "replies to run", func() bool {
			s := backend.Stats()
			return s.Active >= clients/2 && s.Tokens > before+5*clients
		})
	}
	restart := func(p *stack.Process) {
		t.Helper()
		running()
		if err := p.Stop(); err != nil {
			t.Errorf("a process that was to stop ended with %v", err)
		}
	}
	for i, edge := range edges {
		restart(edge.Process)
		lb.replace(i, c.RestartEdge(edge))
	}
	for i, w := range workers {
		restart(w.Process)
		workers[i] = c.RestartWorker(w.Dir, backend.URL).Serving()
	}
	running()
	close(stop)
	load.Wait()

	ledger := openLedger(t, c.DatabaseURL)
	entries := ledger.wantClosed(key, 30*time.Second)
	if len(entries) != len(replies) {
		t.Errorf("%d replies, and %d rows in the ledger", len(replies), len(entries))
	}
	agents := make(map[string]bool)
	for _, r := range replies {
		wantWhole(t, r)
		if r.text != numbered(tokens) || r.usage != tokens {
			t.Errorf("a reply has %d tokens: %q", r.usage, r.text)
		}
		e, ok := entries[r.request()]
		if !ok || e.Outcome != "done" || e.Completion != tokens {
			t.Errorf("request %s is in the ledger as %+v", r.request(), e)
		}
		agents[e.Agent] = true
	}
	if len(agents) != len(workers) {
		t.Errorf("the agents were %v", agents)
	}
	t.Logf("%d replies, %d calls of the backend, %d requests not taken by the first edge", len(replies), backend.Stats().Started, lb.refused)
	stack.Until(t, 30*time.Second, "an empty queue", func() bool { return jobs(t, c) == 0 })
}

// TestDrainRunsOut asks workers to stop whose replies take longer than they are given: while
// there is another worker it goes on with them, and else each ends with an error that says
// so.
func TestDrainRunsOut(t *testing.T) {
	const streams, tokens, perSecond = 6, 200, 20
	backends := []*stack.Backend{stack.StartBackend(t, longDemo()), stack.StartBackend(t, longDemo())}
	c := stack.StartCluster(t)
	edge := c.StartEdge()
	client, key := failoverClient(t, c, edge)
	hasty := []string{"--drain-timeout", "500ms"}
	first := c.StartWorker(backends[0].URL, hasty...).Serving()
	awaitAgents(t, edge, 1)
	var second *stack.Worker
	var stopped time.Time
	var stopping sync.WaitGroup
	stopAfter := func(backend *stack.Backend, worker func() *stack.Worker) {
		stopping.Go(func() {
			stack.Until(t, 30*time.Second, "replies to run", func() bool {
				s := backend.Stats()
				return s.Active == streams && s.Tokens > 10*streams
			})
			w := worker()
			stopped = time.Now()
			if err := w.Stop(); err != nil {
				t.Errorf("the worker ended with %v", err)
			}
			if took := time.Since(stopped); took > 5*time.Second {
				t.Errorf("the worker took %s to stop", took)
			}
		})
	}
	stopAfter(backends[0], func() *stack.Worker {
		second = c.StartWorker(backends[1].URL, hasty...).Serving()
		awaitAgents(t, edge, 2)
		return first
	})
	// One in three comes in one piece, of which nothing is there yet.
	whole := together(streams, func(i int) reply {
		stream := i%3 != 0
		return client.chat(t.Context(), stream, counting(stream, tokens, perSecond))
	})
	for i, r := range whole {
		wantWhole(t, r)
		if r.text != numbered(tokens) || r.usage != tokens || r.finish != "stop" {
			t.Errorf("reply %d has %d tokens, finish_reason %q: %q", i, r.usage, r.finish, r.text)
		}
	}
	stopping.Wait()
	if n := backends[1].Stats().Started; n != streams {
		t.Errorf("the second worker went on with %d replies, want %d", n, streams)
	}

	before := backends[1].Stats().Tokens
	stopAfter(backends[1], func() *stack.Worker {
		stack.Until(t, 30*time.Second, "tokens", func() bool { return backends[1].Stats().Tokens > before+10*streams })
		return second
	})
	ends := make([]time.Time, streams)
	replies := together(streams, func(i int) reply {
		stream := i%3 != 0
		r := client.chat(t.Context(), stream, counting(stream, 100*tokens, perSecond))
		ends[i] = time.Now()
		return r
	})
	stopping.Wait()
	for i, r := range replies {
		status := http.StatusOK
		if i%3 == 0 {
			status = http.StatusServiceUnavailable
		}
		if r.done || r.broken != nil || r.code() != "agent_offline" || r.status != status {
			t.Errorf("reply %d without another worker: status %d, done %v, broken %v, error %+v", i, r.status, r.done, r.broken, r.err)
		}
		if !strings.HasPrefix(numbered(100*tokens), r.text) || (r.text == "") == (status == http.StatusOK) {
			t.Errorf("reply %d has the text %q", i, r.text)
		}
		if took := ends[i].Sub(stopped); took > 500*time.Millisecond+cutWithin {
			t.Errorf("reply %d ended %s after the signal", i, took)
		}
	}
	entries := openLedger(t, c.DatabaseURL).wantClosed(key, 30*time.Second)
	outcomes := make(map[string]int)
	for _, e := range entries {
		outcomes[e.Outcome]++
	}
	if len(entries) != 2*streams || outcomes["done"] != streams || outcomes["error"] != streams {
		t.Errorf("the ledger has %v", outcomes)
	}
	stack.Until(t, 30*time.Second, "an empty queue", func() bool { return jobs(t, c) == 0 })
}

// TestNewEdgeListensFirst: an edge takes requests before it has heard who is there. The first
// one is answered all the same, instead of being told that the agent is away.
func TestNewEdgeListensFirst(t *testing.T) {
	backend := stack.StartBackend(t, demo.Options{})
	c := stack.StartCluster(t)
	c.StartWorker(backend.URL).Serving()
	edge := c.StartEdge()
	awaitAgents(t, edge, 1)
	client := newClient(edge.BaseURL, c.Key.Reveal())
	defer client.close()
	for range 3 {
		if err := edge.Stop(); err != nil {
			t.Error(err)
		}
		var first reply
		var asking sync.WaitGroup
		asking.Go(func() {
			for start := time.Now(); first.status == 0 && time.Since(start) < 30*time.Second; time.Sleep(5 * time.Millisecond) {
				first = client.chat(t.Context(), true, nil)
			}
		})
		edge = c.RestartEdge(edge)
		asking.Wait()
		wantWhole(t, first)
	}
}
