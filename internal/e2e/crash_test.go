package e2e

import (
	"context"
	"maps"
	"math/rand/v2"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// flight is a set of requests of one key at one edge.
type flight struct {
	key    schemas.KeyID
	client *client
	taps   []*tap
	calls  sync.WaitGroup
	cancel context.CancelFunc
}

// tap is a request whose reply is being read.
type tap struct {
	tokens atomic.Int64
	reply  reply // once it has ended
}

// depart sends requests, each streamed or not as its field "stream" says, and waits until
// the backend has begun all, and each that streams has come some way.
func depart(t *testing.T, c *stack.Cluster, edge *stack.Edge, backend *stack.Backend, requests ...map[string]any) *flight {
	t.Helper()
	f := &flight{}
	var secret string
	f.key, secret = newKey(t, c, books.NewKey{BudgetCents: new(int64(100_000))})
	f.client = newClient(edge.BaseURL, secret)
	ctx, cancel := context.WithTimeout(context.Background(), raceTime)
	f.cancel = cancel
	t.Cleanup(func() {
		cancel()
		f.calls.Wait()
		f.client.close()
	})
	began := backend.Stats().Started
	streams := make(map[*tap]bool)
	for _, fields := range requests {
		p := &tap{}
		f.taps = append(f.taps, p)
		fields = maps.Clone(fields)
		stream, _ := fields["stream"].(bool)
		streams[p] = stream
		f.calls.Go(func() {
			p.reply = f.client.follow(ctx, stream, fields, func(r *reply) { p.tokens.Store(int64(tokensOf(r.text))) })
		})
	}
	stack.Until(t, 30*time.Second, "the requests to run", func() bool {
		return backend.Stats().Started >= began+int64(len(requests)) &&
			!slices.ContainsFunc(f.taps, func(p *tap) bool { return streams[p] && p.tokens.Load() < 3 })
	})
	return f
}

// received checks that no client got more of a reply than its request was charged for.
func (f *flight) received(t *testing.T, entries map[string]entry) {
	t.Helper()
	f.calls.Wait()
	for _, p := range f.taps {
		id := p.reply.request()
		if e, ok := entries[id]; id != "" && (!ok || int64(tokensOf(p.reply.text)) > e.Completion) {
			t.Errorf("a client got %d tokens of request %s, and the ledger has %+v", tokensOf(p.reply.text), id, e)
		}
	}
}

var lostOwner = regexp.MustCompile(`request has lost its owner.* request=(\S+) tokens=(\d+)`)

// counted are the requests that a worker reports, with the tokens that it counted.
func counted(t *testing.T, w *stack.Worker) map[string]int64 {
	t.Helper()
	reports := make(map[string]int64)
	for _, line := range w.Log() {
		if m := lostOwner.FindStringSubmatch(line); m != nil {
			n, err := strconv.ParseInt(m[2], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			reports[m[1]] = n
		}
	}
	return reports
}

// awaitReturn waits until a dead edge's slots and money are back, each within its time
// from the given moment on, and returns how long that took.
func (l *ledger) awaitReturn(key schemas.KeyID, since time.Time, slotsWithin, moneyWithin time.Duration) (slots, money time.Duration) {
	for {
		h, err := l.look(context.Background(), key)
		now := time.Since(since)
		switch {
		case err != nil:
			l.t.Error(err)
			return slots, money
		case slots == 0 && h.InFlight == 0:
			slots = now
		case slots == 0 && now > slotsWithin:
			l.t.Errorf("%d slots aren't back after %s", h.InFlight, now)
			return now, money
		}
		if h.Reserved == 0 && h.Open == 0 {
			return slots, now
		}
		if now > moneyWithin {
			l.t.Errorf("money of %d requests isn't back after %s: %+v", h.Open, now, h)
			return slots, now
		}
		time.Sleep(50 * time.Millisecond)
	}
}

const (
	// slotsBack is within what time the slots of an edge that has died must be back, and
	// moneyBack its money, from the end of the last of edge and run on.
	slotsBack = 15 * time.Second
	moneyBack = 15 * time.Second
	// runEnds is how long a worker may take to notice that the edge is gone.
	runEnds = 5 * time.Second
)

// TestKilledEdgesLeakNothing kills edges in the middle of their replies, some together
// with the worker. Slots and money are back in time, and what the workers counted is in
// the ledger, once.
func TestKilledEdgesLeakNothing(t *testing.T) {
	t.Parallel()
	backend := stack.StartBackend(t, demo.Options{})
	c := stack.StartCluster(t)
	worker := c.StartWorker(backend.URL)
	l := openLedger(t, c.DatabaseURL)
	setPrice(t, c, demo.ModelID, books.MicroCents)
	const together = 5
	var slowest struct {
		mu           sync.Mutex
		slots, money time.Duration
	}
	for range count(1, 10) {
		edges := c.StartEdges(together + 2)
		awaitModel(t, edges, c.Key.Reveal(), demo.ModelID)
		var deaths sync.WaitGroup
		for _, edge := range edges[:together] {
			long := map[string]any{"tokens_per_second": 40}
			f := depart(t, c, edge, backend,
				limited(priced(t, 3000, map[string]any{"tokens_per_second": 40, "stream": nil}), 3000))
			_ = f
			_ = long
		}
		deaths.Wait()
	}
	_ = worker
	_ = l
	_ = &slowest
	_ = rand.N[int]
}
