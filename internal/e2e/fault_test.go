package e2e

import (
	"context"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// jobs counts the jobs in the queue.
func jobs(t *testing.T, c *stack.Cluster) uint64 {
	t.Helper()
	nc, err := nats.Connect(c.NATSURL(), nats.UserInfo(bus.UserCore, c.Token()), nats.Timeout(patient))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patient) // for all of them
	defer cancel()
	var n uint64
	for name := range schemas.JobStreams() {
		stream, err := js.Stream(ctx, name)
		if err != nil {
			t.Fatal(err)
		}
		n += stream.CachedInfo().State.Msgs
	}
	return n
}

// TestNATSRestart kills nats-server while jobs are queued and running. Each runs once,
// and each client gets its whole reply: also when the broker, which lets agents in, is
// later there again than the agent, whose first attempt to come back then hangs.
func TestNATSRestart(t *testing.T) {
	t.Run("all at once", func(t *testing.T) { natsRestart(t, 0) })
	t.Run("the broker late", func(t *testing.T) { natsRestart(t, 2*time.Second) })
}

func natsRestart(t *testing.T, late time.Duration) {
	backend := stack.StartBackend(t, demo.Options{})
	c := stack.StartCluster(t)
	c.StartWorker(backend.URL, "--slots", "4")
	edge := c.StartEdge()
	awaitModel(t, []*stack.Edge{edge}, c.Key.Reveal(), demo.ModelID)
	setPrice(t, c, demo.ModelID, books.MicroCents)
	key, secret := newKey(t, c, books.NewKey{BudgetCents: new(int64(1000))})
	client := newClient(edge.BaseURL, secret)
	defer client.close()

	const streams, tokens = 12, 60 // 4 run for 3 s each, 8 wait
	var began sync.WaitGroup
	began.Go(func() {
		stack.Until(t, 30*time.Second, "jobs to run", func() bool {
			s := backend.Stats()
			return s.Active == 4 && s.Tokens > 20
		})
		c.Broker.Signal(syscall.SIGSTOP)
		c.NATS.Kill()
		c.StartNATS()
		time.Sleep(late)
		c.Broker.Signal(syscall.SIGCONT)
	})
	replies := together(streams, func(i int) reply {
		return client.chat(t.Context(), i%3 != 0, limited(priced(t, tokens, map[string]any{"tokens_per_second": 20}), tokens))
	})
	began.Wait()
	for i, r := range replies {
		wantWhole(t, r)
		if r.text != numbered(tokens) {
			t.Errorf("reply %d: got %q", i, r.text)
		}
	}
	if s := backend.Stats(); s.Started != streams || s.Finished != streams {
		t.Errorf("backend started %d and finished %d requests, want %d", s.Started, s.Finished, streams)
	}
	stack.Until(t, 30*time.Second, "an empty queue", func() bool { return jobs(t, c) == 0 })
	entries := openLedger(t, c.DatabaseURL).wantClosed(key, 30*time.Second)
	for _, r := range replies {
		if e := entries[r.request()]; e.Completion != tokens || e.Outcome != "done" {
			t.Errorf("ledger has %+v", e)
		}
	}
	if len(entries) != streams {
		t.Errorf("the ledger has %d requests, want %d", len(entries), streams)
	}
}

// TestAgentDiesBeforeFirstToken kills the worker that has the requests: the other one
// serves them, and is paid for it, and the clients see only time.
func TestAgentDiesBeforeFirstToken(t *testing.T) {
	slow := stack.StartBackend(t, demo.Options{})
	quick := stack.StartBackend(t, demo.Options{})
	c := stack.StartCluster(t)
	doomed := c.StartWorker(slow.URL, "--slots", "2")
	edge := c.StartEdge()
	awaitModel(t, []*stack.Edge{edge}, c.Key.Reveal(), demo.ModelID)
	setPrice(t, c, demo.ModelID, books.MicroCents)
	key, secret := newKey(t, c, books.NewKey{BudgetCents: new(int64(1000))})
	client := newClient(edge.BaseURL, secret)
	defer client.close()
	faults := demo.NoFaults()
	faults.FirstTokenMS = 60_000
	if err := slow.SetFaults("", faults); err != nil {
		t.Fatal(err)
	}
	const streams = 6 // 2 run, 4 wait
	var killed sync.WaitGroup
	killed.Go(func() {
		stack.Until(t, 30*time.Second, "jobs to run", func() bool { return slow.Stats().Active == 2 })
		stack.Until(t, 30*time.Second, "jobs to wait", func() bool { return jobs(t, c) == streams })
		c.StartWorker(quick.URL, "--slots", "2").Serving()
		doomed.Kill()
	})
	start := time.Now()
	replies := together(streams, func(i int) reply {
		return client.chat(t.Context(), i%2 == 0, map[string]any{"demo": map[string]any{"tokens": 20, "numbered": true}})
	})
	killed.Wait()
	for _, r := range replies {
		wantWhole(t, r)
		if r.text != numbered(20) {
			t.Errorf("got %q", r.text)
		}
	}
	t.Logf("%d requests served after %s", streams, time.Since(start))
	stack.Until(t, 30*time.Second, "an empty queue", func() bool { return jobs(t, c) == 0 })
	entries := openLedger(t, c.DatabaseURL).wantClosed(key, 30*time.Second)
	agents := make(map[string]int)
	for _, r := range replies {
		e := entries[r.request()]
		if e.Completion != 20 || e.Outcome != "done" {
			t.Errorf("ledger has %+v", e)
		}
		agents[e.Agent]++
	}
	if len(entries) != streams || len(agents) != 1 {
		t.Errorf("the ledger has %d requests, by agent %v", len(entries), agents)
	}
}

// TestAgentDiesInMidStream: nobody else has the model, so the stream ends with an error,
// soon.
func TestAgentDiesInMidStream(t *testing.T) {
	backend := stack.StartBackend(t, demo.Options{})
	c := stack.StartCluster(t)
	doomed := c.StartWorker(backend.URL)
	edge := c.StartEdge()
	awaitModel(t, []*stack.Edge{edge}, c.Key.Reveal(), demo.ModelID)
	client := newClient(edge.BaseURL, c.Key.Reveal())
	defer client.close()
	var died atomic.Int64
	var killed sync.WaitGroup
	ends := make([]time.Time, 10)
	begun := make([]atomic.Bool, len(ends))
	killed.Go(func() {
		stack.Until(t, 30*time.Second, "tokens in every stream", func() bool {
			for i := range begun {
				if !begun[i].Load() {
					return false
				}
			}
			return true
		})
		died.Store(time.Now().UnixNano())
		doomed.Kill()
	})
	replies := together(len(ends), func(i int) reply {
		r := client.follow(t.Context(), true, map[string]any{"demo": map[string]any{
			"tokens": 1000, "numbered": true, "tokens_per_second": 20,
		}}, func(r *reply) { begun[i].Store(r.text != "") })
		ends[i] = time.Now()
		return r
	})
	killed.Wait()
	for i, r := range replies {
		if r.done || r.broken != nil || r.err == nil || r.err.Code != "agent_offline" {
			t.Errorf("stream %d: done %v, broken %v, error %+v", i, r.done, r.broken, r.err)
		}
		if !strings.HasPrefix(numbered(1000), r.text) || r.text == "" {
			t.Errorf("stream %d: got %q", i, r.text)
		}
		if took := ends[i].Sub(time.Unix(0, died.Load())); took > 5*time.Second {
			t.Errorf("stream %d ended %s after its agent", i, took)
		}
	}
	r := client.chat(t.Context(), true, nil)
	if r.status != 503 || r.err == nil || r.err.Code != "agent_offline" {
		t.Errorf("without an agent: status %d, error %+v", r.status, r.err)
	}
}

// TestCancelRacesDelivery closes connections at random moments around the claim: the
// backend ends up with nothing to do, and the queue empty.
func TestCancelRacesDelivery(t *testing.T) {
	backend := stack.StartBackend(t, demo.Options{})
	c := stack.StartCluster(t)
	c.StartWorker(backend.URL, "--slots", "8")
	edge := c.StartEdge()
	awaitModel(t, []*stack.Edge{edge}, c.Key.Reveal(), demo.ModelID)
	client := newClient(edge.BaseURL, c.Key.Reveal())
	defer client.close()
	const requests, parallel = 400, 20
	var next atomic.Int64
	together(parallel, func(int) reply {
		for i := next.Add(1); i <= requests; i = next.Add(1) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rand.IntN(30_000))*time.Microsecond)
			client.chat(ctx, i%2 == 0, map[string]any{"demo": map[string]any{"tokens": 2000, "tokens_per_second": 50}})
			cancel()
		}
		return reply{}
	})
	stack.Until(t, 30*time.Second, "the backend to be idle", func() bool { return backend.Stats().Active == 0 })
	stack.Until(t, 30*time.Second, "an empty queue", func() bool { return jobs(t, c) == 0 })
	wantWhole(t, client.chat(t.Context(), true, nil))
}

// TestEdgeDies: nobody waits for its replies any more, so the GPU work stops.
func TestEdgeDies(t *testing.T) {
	backend := stack.StartBackend(t, demo.Options{})
	c := stack.StartCluster(t)
	c.StartWorker(backend.URL)
	edge, other := c.StartEdge(), c.StartEdge()
	awaitModel(t, []*stack.Edge{edge, other}, c.Key.Reveal(), demo.ModelID)
	client := newClient(edge.BaseURL, c.Key.Reveal())
	defer client.close()
	var killed sync.WaitGroup
	killed.Go(func() {
		stack.Until(t, 30*time.Second, "tokens", func() bool { return backend.Stats().Tokens > 100 })
		edge.Kill()
	})
	replies := together(10, func(int) reply {
		return client.chat(t.Context(), true, map[string]any{"demo": map[string]any{"tokens": 10_000, "tokens_per_second": 20}})
	})
	killed.Wait()
	for _, r := range replies {
		if r.done || r.broken == nil {
			t.Errorf("a reply of a dead edge: done %v, broken %v, error %+v", r.done, r.broken, r.err)
		}
	}
	stack.Until(t, 30*time.Second, "the backend to be idle", func() bool { return backend.Stats().Active == 0 })
	stack.Until(t, 30*time.Second, "an empty queue", func() bool { return jobs(t, c) == 0 })
	second := newClient(other.BaseURL, c.Key.Reveal())
	defer second.close()
	wantWhole(t, second.chat(t.Context(), true, nil))
}

// TestWorkerDrains: a worker that is asked to stop finishes what it runs, and leaves
// what waits to another.
func TestWorkerDrains(t *testing.T) {
	backend := stack.StartBackend(t, demo.Options{})
	c := stack.StartCluster(t)
	first := c.StartWorker(backend.URL, "--slots", "2")
	edge := c.StartEdge()
	awaitModel(t, []*stack.Edge{edge}, c.Key.Reveal(), demo.ModelID)
	client := newClient(edge.BaseURL, c.Key.Reveal())
	defer client.close()
	const streams = 6
	var drained sync.WaitGroup
	drained.Go(func() {
		stack.Until(t, 30*time.Second, "jobs to run and wait", func() bool {
			return backend.Stats().Active == 2 && backend.Stats().Tokens > 4 && jobs(t, c) == streams
		})
		c.StartWorker(backend.URL, "--slots", "2").Serving()
		first.Signal(syscall.SIGTERM)
	})
	replies := together(streams, func(int) reply {
		return client.chat(t.Context(), true, map[string]any{"demo": map[string]any{
			"tokens": 40, "numbered": true, "tokens_per_second": 10,
		}})
	})
	drained.Wait()
	for _, r := range replies {
		wantWhole(t, r)
		if r.text != numbered(40) {
			t.Errorf("got %q", r.text)
		}
	}
	if err := first.Stop(); err != nil {
		t.Errorf("drained worker ended with %v", err)
	}
	if s := backend.Stats(); s.Started != streams {
		t.Errorf("backend started %d requests, want %d", s.Started, streams)
	}
}

// TestColdModel: the first request starts the load; who waits too long hears that the
// model is loading, and when to come back.
func TestColdModel(t *testing.T) {
	model := demo.DefaultModel()
	model.State = schemas.ModelCold
	backend := stack.StartBackend(t, demo.Options{Models: []schemas.Model{model}})
	faults := demo.NoFaults()
	faults.LoadMS = 4000
	if err := backend.SetFaults("", faults); err != nil {
		t.Fatal(err)
	}
	up := stack.StartUp(t, t.TempDir(), "--backend", backend.URL, "--cold-wait", "1s")
	c := newClient(up.BaseURL, up.APIKey)
	defer c.close()
	r := c.chat(t.Context(), true, nil)
	if r.status != http.StatusServiceUnavailable || r.err == nil || r.err.Code != "model_loading" {
		t.Fatalf("status %d, error %+v, want model_loading", r.status, r.err)
	}
	if r.header.Get("Retry-After") == "" {
		t.Error("model_loading without Retry-After")
	}
	// The load goes on without anybody waiting for it.
	stack.Until(t, 30*time.Second, "the model to be loaded", func() bool {
		r = c.chat(t.Context(), true, nil)
		return r.err == nil
	})
	wantWhole(t, r)
}
