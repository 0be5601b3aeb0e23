package e2e

import (
	"context"
	"math/rand/v2"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// ask is a request for a reply of a number of tokens.
type ask struct {
	model  string // empty: the demo model
	stream bool
	tokens int
	open   bool // without a limit of tokens
	pace   int  // tokens a second
}

func (a ask) fields(t *testing.T) map[string]any {
	fields := priced(t, a.tokens, map[string]any{"tokens_per_second": a.pace})
	if !a.open {
		fields = limited(fields, a.tokens)
	}
	if a.model != "" {
		fields["model"] = a.model
	}
	return fields
}

// tap is a request whose reply is being read.
type tap struct {
	ask
	tokens atomic.Int64 // that have come, of a stream
	ended  chan struct{}
	reply  reply // once it has ended
}

// flight is a set of requests of one key at one edge.
type flight struct {
	key  schemas.KeyID
	taps []*tap
}

// depart sends requests with a key of their own, and waits until the backend has begun
// them all, and each that is streamed has come some way.
func depart(t *testing.T, c *stack.Cluster, edge *stack.Edge, backend *stack.Backend, asks ...ask) *flight {
	t.Helper()
	f := &flight{}
	var secret string
	f.key, secret = newKey(t, c, books.NewKey{BudgetCents: new(int64(100_000))})
	client := newClient(edge.BaseURL, secret)
	ctx, cancel := context.WithTimeout(context.Background(), raceTime)
	t.Cleanup(func() {
		cancel()
		f.land()
		client.close()
	})
	began := backend.Stats().Started
	for _, a := range asks {
		p := &tap{ask: a, ended: make(chan struct{})}
		f.taps = append(f.taps, p)
		fields := a.fields(t)
		go func() {
			defer close(p.ended)
			p.reply = client.follow(ctx, a.stream, fields, func(r *reply) { p.tokens.Store(int64(tokensOf(r.text))) })
		}()
	}
	stack.Until(t, 30*time.Second, "the requests to run", func() bool {
		return backend.Stats().Started >= began+int64(len(asks)) &&
			!slices.ContainsFunc(f.taps, func(p *tap) bool { return p.stream && p.tokens.Load() < 3 })
	})
	return f
}

// land waits until all replies have ended.
func (f *flight) land() {
	for _, p := range f.taps {
		<-p.ended
	}
}

// wantPaid makes sure that each request is in the ledger, and that no client got more of a
// reply than was charged.
func (f *flight) wantPaid(t *testing.T, entries map[string]entry) {
	t.Helper()
	f.land()
	if len(entries) != len(f.taps) {
		t.Errorf("the ledger has %d requests, want %d", len(entries), len(f.taps))
	}
	for _, p := range f.taps {
		id, got := p.reply.request(), tokensOf(p.reply.text)
		if id == "" {
			continue // its client didn't even get a status
		}
		if e, ok := entries[id]; !ok || int64(got) > e.Completion {
			t.Errorf("a client got %d tokens of request %s, and the ledger has %+v", got, id, e)
		}
	}
}

// awaitReturn waits until what a key holds is back, its slots and its money each within a
// time from the given moment on, and returns how long that took.
func (l *ledger) awaitReturn(key schemas.KeyID, since time.Time, slotsWithin, moneyWithin time.Duration) (slots, money time.Duration) {
	for {
		h, err := l.look(context.Background(), key)
		now := time.Since(since)
		switch {
		case err != nil:
			l.t.Error(err)
			return now, now
		case slots == 0 && h.InFlight == 0:
			slots = now
		case slots == 0 && now > slotsWithin:
			l.t.Errorf("after %s these aren't back: %+v", now, h)
			return now, now
		}
		switch {
		case slots > 0 && h.Reserved == 0 && h.Open == 0:
			return slots, now
		case now > moneyWithin:
			l.t.Errorf("after %s these aren't back: %+v", now, h)
			return slots, now
		}
		time.Sleep(50 * time.Millisecond)
	}
}

var lostOwner = regexp.MustCompile(`request has lost its owner.* request=(\S+) completion_tokens=(\d+)`)

// reported are the requests that a worker reports because their owner is gone, with the
// tokens that it counted.
func reported(t *testing.T, w *stack.Worker) map[string]int64 {
	t.Helper()
	reports := make(map[string]int64)
	for _, line := range w.Log() {
		if m := lostOwner.FindStringSubmatch(line); m != nil {
			n, err := strconv.ParseInt(m[2], 10, 64)
			if err != nil {
				t.Error(err)
			}
			reports[m[1]] = n
		}
	}
	return reports
}

const (
	// backIn is within what time slots must be back from the death of an edge on, and money
	// from the end of the last of edge and run on.
	backIn = 15 * time.Second
	// runEnds is how long a worker may take to notice that the edge of a run is gone.
	runEnds = 5 * time.Second
)

// late is how much later it may be on a busy machine in an ordinary run: the longest that
// the steps on the way take is 14 s.
func late() time.Duration { return time.Duration(count(5, 0)) * time.Second }

// returns gathers how long slots and money took to come back.
type returns struct {
	mu    sync.Mutex
	taken map[string][2]time.Duration
}

func (r *returns) note(kind string, slots, money time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.taken == nil {
		r.taken = make(map[string][2]time.Duration)
	}
	was := r.taken[kind]
	r.taken[kind] = [2]time.Duration{max(slots, was[0]).Round(time.Millisecond), max(money, was[1]).Round(time.Millisecond)}
}

// doom is a worker that dies together with an edge.
type doom struct {
	model   string
	backend *stack.Backend
	worker  *stack.Worker
	again   bool // it comes back at once, as a new run of the same agent
}

// TestKilledEdgesLeakNothing kills edges in the middle of their replies, some together with
// the worker. Slots and money are back in time, and the ledger has each request once: with
// what the worker counted if that lived, and else with its prompt and nothing more.
func TestKilledEdgesLeakNothing(t *testing.T) {
	t.Parallel()
	const kills, pace = 5, 40
	backend := stack.StartBackend(t, demo.Options{})
	c := stack.StartCluster(t)
	l := openLedger(t, c.DatabaseURL)
	worker := c.StartWorker(backend.URL)
	setPrice(t, c, demo.ModelID, books.MicroCents)
	dooms := []*doom{{model: "doomed"}, {model: "returning", again: true}}
	for _, d := range dooms {
		d.backend = stack.StartBackend(t, demo.Options{Models: []schemas.Model{model(d.model, nil)}})
		d.worker = c.StartWorker(d.backend.URL)
		setPrice(t, c, d.model, books.MicroCents)
	}
	var took returns
	killed := 0
	for round := range count(1, 10) {
		edges := c.StartEdges(kills + len(dooms))
		awaitModel(t, edges, c.Key.Reveal(), demo.ModelID)
		var deaths sync.WaitGroup
		for _, edge := range edges[:kills] {
			f := depart(t, c, edge, backend,
				ask{stream: true, tokens: 3000, pace: pace}, ask{stream: true, tokens: 3000, pace: pace, open: true},
				ask{tokens: 3000, pace: pace}, ask{stream: true, tokens: 10 + rand.IntN(5*pace), pace: pace})
			deaths.Go(func() {
				time.Sleep(rand.N(300 * time.Millisecond))
				since := time.Now()
				edge.Kill()
				slots, money := l.awaitReturn(f.key, since, backIn+late(), runEnds+backIn+late())
				took.note("edge", slots, money)
				wantReported(t, f, l.entries(f.key), worker)
			})
			killed++
		}
		for i, d := range dooms {
			edge := edges[kills+i]
			if round > 0 && !d.worker.Alive() {
				d.worker = c.RestartWorker(d.worker.Dir, d.backend.URL)
			}
			awaitModel(t, []*stack.Edge{edge}, c.Key.Reveal(), d.model)
			f := depart(t, c, edge, d.backend,
				ask{model: d.model, stream: true, tokens: 3000, pace: pace}, ask{model: d.model, stream: true, tokens: 3000, pace: pace, open: true},
				ask{model: d.model, tokens: 3000, pace: pace})
			edge.Signal(syscall.SIGKILL)
			d.worker.Kill()
			since := time.Now()
			if d.again {
				d.worker = c.RestartWorker(d.worker.Dir, d.backend.URL)
			}
			deaths.Go(func() {
				slots, money := l.awaitReturn(f.key, since, backIn+late(), backIn+late())
				took.note("edge and worker, "+d.model, slots, money)
				wantPromptsOnly(t, f, l.entries(f.key))
			})
		}
		deaths.Wait()
	}
	t.Logf("%d edges killed; slots and money took at most: %v", killed, took.taken)
}

// wantReported makes sure that the ledger has what the worker counted.
func wantReported(t *testing.T, f *flight, entries map[string]entry, worker *stack.Worker) {
	t.Helper()
	f.wantPaid(t, entries)
	bound := int64(promptBound(t))
	var reports map[string]int64
	stack.Until(t, 10*time.Second, "the worker's log to tell what it has counted", func() bool {
		reports = reported(t, worker)
		for id, e := range entries {
			if _, lost := reports[id]; !lost && e.Outcome != "done" {
				return false
			}
		}
		return true
	})
	for id, e := range entries {
		n, lost := reports[id]
		if lost && n != e.Completion || e.Prompt != bound {
			t.Errorf("ledger has %+v, the worker counted %d, with a prompt of %d; reported: %v", e, n, bound, lost)
		}
	}
}

// wantPromptsOnly makes sure that the ledger has nothing but prompts.
func wantPromptsOnly(t *testing.T, f *flight, entries map[string]entry) {
	t.Helper()
	f.land()
	if len(entries) != len(f.taps) {
		t.Errorf("the ledger has %d requests, want %d", len(entries), len(f.taps))
	}
	bound := int64(promptBound(t))
	for _, e := range entries {
		if e.Prompt != bound || e.Completion != 0 || e.Cost != bound*books.MicroCents/1000 {
			t.Errorf("ledger has %+v, want a prompt of %d and nothing more", e, bound)
		}
	}
}

// freeze stops a process, and returns what lets it go on.
func freeze(t *testing.T, p *stack.Process) (thaw func()) {
	thaw = sync.OnceFunc(func() { p.Signal(syscall.SIGCONT) })
	t.Cleanup(thaw) // before it is asked to end, which it would have to hear
	p.Signal(syscall.SIGSTOP)
	return thaw
}

// TestFrozenEdgesDeliverNothingUnbilled stops edges in the middle of their replies, and lets
// them go on: before their lease has lapsed, after it was taken away, and after the worker
// has reported what it counted. No client gets a token that nobody is charged for.
func TestFrozenEdgesDeliverNothingUnbilled(t *testing.T) {
	t.Parallel()
	const pace = 20
	backend := stack.StartBackend(t, demo.Options{})
	c := stack.StartCluster(t)
	l := openLedger(t, c.DatabaseURL)
	c.StartWorker(backend.URL)
	setPrice(t, c, demo.ModelID, books.MicroCents)
	edges := c.StartEdges(3)
	awaitModel(t, edges, c.Key.Reveal(), demo.ModelID)
	long := []ask{{stream: true, tokens: 2000, pace: pace}, {stream: true, tokens: 2000, pace: pace, open: true}, {tokens: 2000, pace: pace}}
	short := []ask{{stream: true, tokens: 6 * pace, pace: pace}, {stream: true, tokens: 6 * pace, pace: pace, open: true}, {tokens: 6 * pace, pace: pace}}
	var freezes sync.WaitGroup
	for i, test := range []struct {
		name string
		asks []ask
		over func(holding) bool // when the edge may go on; nil: soon
	}{
		{"within its lease", short, nil},
		{"after its lease", long, func(h holding) bool { return h.InFlight == 0 }},
		{"after the report of the worker", long, func(h holding) bool { return h.Open == 0 }},
	} {
		f := depart(t, c, edges[i], backend, test.asks...)
		thaw := freeze(t, edges[i].Process)
		frozen := time.Now()
		freezes.Go(func() {
			if test.over == nil {
				time.Sleep(3 * time.Second)
			} else {
				for h, err := l.look(context.Background(), f.key); err == nil && !test.over(h) && time.Since(frozen) < time.Minute; h, err = l.look(context.Background(), f.key) {
					time.Sleep(20 * time.Millisecond)
				}
			}
			before := 0
			for _, p := range f.taps {
				before += int(p.tokens.Load())
			}
			open, err := l.look(context.Background(), f.key)
			if err != nil {
				t.Error(err)
			}
			thaw()
			thawed := time.Now()
			f.land()
			for _, p := range f.taps {
				switch {
				case test.over == nil:
					if got := tokensOf(p.reply.text); got != p.ask.tokens || !p.reply.done {
						t.Errorf("%s: a reply has %d of %d tokens; %+v", test.name, got, p.ask.tokens, p.reply.err)
					}
				case p.reply.done || p.reply.broken == nil && p.reply.code() != string(schemas.CodeInternalError):
					t.Errorf("%s: a reply ended with done %v, error %+v", test.name, p.reply.done, p.reply.err)
				}
			}
			entries := l.wantClosed(f.key, backIn+late())
			f.wantPaid(t, entries)
			got, paid := 0, int64(0)
			for _, p := range f.taps {
				got += tokensOf(p.reply.text)
				paid += entries[p.reply.request()].Completion
			}
			t.Logf("%s: frozen for %s with %d of %d requests open at its end; clients got %d tokens before and %d after, and ended %s after; charged are %d",
				test.name, thawed.Sub(frozen).Round(time.Millisecond), open.Open, len(f.taps), before, got-before, time.Since(thawed).Round(time.Millisecond), paid)
		})
	}
	freezes.Wait()
}

// TestStoppedEdgeSettlesAtOnce: what an edge that is asked to stop breaks off is settled
// before it is gone, and nobody has to wait for its lease.
func TestStoppedEdgeSettlesAtOnce(t *testing.T) {
	const pace = 20
	backend := stack.StartBackend(t, demo.Options{})
	c := stack.StartCluster(t)
	l := openLedger(t, c.DatabaseURL)
	c.StartWorker(backend.URL)
	setPrice(t, c, demo.ModelID, books.MicroCents)
	edge := c.StartEdge("--drain-timeout", "500ms")
	awaitModel(t, []*stack.Edge{edge}, c.Key.Reveal(), demo.ModelID)
	f := depart(t, c, edge, backend,
		ask{stream: true, tokens: 2000, pace: pace}, ask{stream: true, tokens: 2000, pace: pace, open: true}, ask{tokens: 2000, pace: pace})
	if err := edge.Stop(); err != nil {
		t.Error(err)
	}
	entries := l.wantClosed(f.key, time.Second)
	f.wantPaid(t, entries)
	for _, e := range entries {
		if e.Outcome != "error" || e.Completion > 10*pace {
			t.Errorf("ledger has %+v", e)
		}
	}
}
