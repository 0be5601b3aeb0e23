package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/faultproxy"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
)

// victim is an agent of its own, with a model that nobody else has, and all that can
// happen to it: its worker and its backend are processes, its way to the bus a proxy.
type victim struct {
	c       *stack.Cluster
	edges   []*stack.Edge
	agent   schemas.AgentID
	model   string
	backend *stack.MortalBackend
	bus     *faultproxy.Proxy
	dir     string // of the worker
	args    []string
	worker  *stack.Worker // nil until it is started
	thaw    func()
}

// start starts the worker, again with the credential that it has.
func (v *victim) start() {
	v.worker = v.c.RestartWorker(v.dir, v.backend.URL, v.args...)
}

// cause is why a model can't answer.
type cause struct {
	name string
	// outside says that the worker has a server, which it can tell by HTTPS that it lives;
	// late that it is started by do; inside that it has a backend of its own.
	outside, late, inside bool
	do, undo              func(*testing.T, *victim)
	code                  schemas.Code
	retry                 string        // Retry-After, "a-b" for a range, empty: any or none
	within                time.Duration // until clients are told
	also                  schemas.Code  // what they may be told before that
	stays                 time.Duration // for how long the answer is watched
	// cut is the code with which replies end that run; empty: they come whole.
	cut schemas.Code
}

const (
	// atOnce is what a worker that only lost its link is given to come back.
	atOnce = 600 * time.Millisecond
	// busyCores is how much later everything may be in a test.
	busyCores = 2 * time.Second
	// cutWithin is within what time a reply ends that nobody can finish.
	cutWithin = 5 * time.Second
)

var causes = []cause{
	{
		name: "worker stopped", code: schemas.CodeAgentOffline, retry: "5", within: atOnce,
		do:   func(_ *testing.T, v *victim) { v.worker.Signal(syscall.SIGTERM) },
		undo: func(t *testing.T, v *victim) { v.awaitEnd(t); v.start() },
	},
	{
		name: "worker killed", code: schemas.CodeAgentOffline, retry: "5", within: atOnce, cut: schemas.CodeAgentOffline,
		do:   func(_ *testing.T, v *victim) { v.worker.Signal(syscall.SIGKILL) },
		undo: func(t *testing.T, v *victim) { v.awaitEnd(t); v.start() },
	},
	{
		name: "worker frozen", code: schemas.CodeAgentOffline, retry: "5", within: 4 * time.Second, cut: schemas.CodeAgentOffline,
		do:   func(t *testing.T, v *victim) { v.thaw = freeze(t, v.worker.Process) },
		undo: func(_ *testing.T, v *victim) { v.thaw() },
	},
	{
		name: "network black-holed", code: schemas.CodeAgentOffline, retry: "5", within: 4 * time.Second, cut: schemas.CodeAgentOffline,
		do:   func(_ *testing.T, v *victim) { v.bus.Stall() },
		undo: func(_ *testing.T, v *victim) { v.bus.Restore() },
	},
	{
		name: "bus cut, HTTPS works", outside: true, code: schemas.CodeTunnelDown, retry: "5", within: 2 * time.Second,
		also: schemas.CodeAgentOffline, cut: schemas.CodeAgentOffline, stays: 4 * time.Second,
		do:   func(_ *testing.T, v *victim) { v.bus.Cut() },
		undo: func(_ *testing.T, v *victim) { v.bus.Restore() },
	},
	{
		name: "bus black-holed, HTTPS works", outside: true, code: schemas.CodeTunnelDown, retry: "5", within: 5 * time.Second,
		also: schemas.CodeAgentOffline, cut: schemas.CodeAgentOffline,
		do:   func(_ *testing.T, v *victim) { v.bus.Stall() },
		undo: func(_ *testing.T, v *victim) { v.bus.Restore() },
	},
	{
		name: "worker started without a bus", outside: true, late: true, code: schemas.CodeTunnelDown, retry: "5", within: 5 * time.Second,
		also: schemas.CodeModelNotFound,
		do:   func(_ *testing.T, v *victim) { v.bus.Cut(); v.start() },
		undo: func(_ *testing.T, v *victim) { v.bus.Restore() },
	},
	{
		// Backends unload models that weren't used for a while. The first request begins the
		// load, before the agent has noticed.
		name: "model loading", inside: true, code: schemas.CodeModelLoading, retry: "2-10", within: 5 * time.Second,
		do:   func(_ *testing.T, v *victim) { v.backend.Do(http.MethodPut, "/demo/faults", `{"load_ms":8000}`) },
		undo: func(*testing.T, *victim) {}, // the load ends
	},
	{
		name: "model removed", inside: true, code: schemas.CodeModelNotFound, within: 5 * time.Second, stays: 2500 * time.Millisecond,
		do:   func(_ *testing.T, v *victim) { v.backend.Do(http.MethodPost, "/demo/remove", "") },
		undo: func(_ *testing.T, v *victim) { v.backend.Do(http.MethodPost, "/demo/reset", "") },
	},
	{
		name: "backend killed", inside: true, code: schemas.CodeBackendError, within: atOnce, cut: schemas.CodeBackendError, stays: 2500 * time.Millisecond,
		do:   func(_ *testing.T, v *victim) { v.backend.Kill() },
		undo: func(_ *testing.T, v *victim) { v.backend.Start() },
	},
	{
		// As when a machine starts: vLLM doesn't listen before its model is in memory.
		name: "worker up before its backend", inside: true, code: schemas.CodeBackendError, retry: "5", within: 8 * time.Second,
		also: schemas.CodeAgentOffline, cut: schemas.CodeBackendError, stays: 4 * time.Second,
		do: func(t *testing.T, v *victim) {
			v.backend.Kill()
			v.worker.Signal(syscall.SIGTERM)
			v.awaitEnd(t)
			v.start()
		},
		undo: func(_ *testing.T, v *victim) { v.backend.Start() },
	},
}

// awaitEnd waits until the worker is gone.
func (v *victim) awaitEnd(t *testing.T) {
	t.Helper()
	stack.Until(t, 30*time.Second, "the worker to end", func() bool { return !v.worker.Alive() })
}

// TestCauses makes a model unable to answer in every way there is, by real processes and a
// proxy that fails, and asks at two edges what clients are told, and when: those who come,
// and those whose replies run. Then it makes good what it did, and the same agent serves
// again. It logs the whole as a table.
func TestCauses(t *testing.T) {
	c := stack.StartCluster(t)
	edges := c.StartEdges(2, "--cold-wait", "300ms")
	ledger := openLedger(t, c.DatabaseURL)
	key, secret := newKey(t, c, books.NewKey{Concurrency: new(1000)})
	victims, models := make([]*victim, len(causes)), make([]string, len(causes))
	for i := range models {
		models[i] = fmt.Sprintf("model-%d", i)
	}
	backend := stack.StartMortalBackend(t, models...)
	for i, cause := range causes {
		v := &victim{c: c, edges: edges, model: models[i], backend: backend, dir: t.TempDir(), bus: faultproxy.New(t, c.NATSURL())}
		if cause.inside {
			v.backend = stack.StartMortalBackend(t, v.model)
		}
		v.args = []string{"--nats-url", v.bus.URL(), "--model", v.model}
		if cause.outside {
			v.args = append(v.args, "--server", "http://"+edges[0].Addr)
		}
		v.agent = c.Pair(c.Tenant.ID, v.dir)
		if !cause.late {
			v.start()
		}
		victims[i] = v
	}
	rows := make([]string, len(causes))
	t.Run("causes", func(t *testing.T) {
		for i, cause := range causes {
			t.Run(cause.name, func(t *testing.T) {
				t.Parallel()
				rows[i] = cause.test(t, victims[i], clientsOf(t, edges, secret))
			})
		}
	})
	// Whoever served a model was the one agent that it has, whatever was started again.
	agents := make(map[string]int)
	for _, e := range ledger.entries(key) {
		if e.Agent != "" {
			agents[e.Agent]++
		}
	}
	for _, v := range victims {
		if agents[string(v.agent)] == 0 {
			t.Errorf("%s served nobody", v.agent)
		}
	}
	if len(agents) != len(victims) {
		t.Errorf("these served %d models: %v", len(victims), agents)
	}
	var table strings.Builder
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "cause\tcode\tRetry-After\twithin\ttold at edge 1\tand at 2\treplies that ran\tserved again after")
	for _, row := range rows {
		fmt.Fprintln(w, row)
	}
	_ = w.Flush() // to memory
	t.Logf("\n%s", table.String())
}

// test goes through one cause, and returns its row of the table.
func (c *cause) test(t *testing.T, v *victim, clients []*client) string {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	var running []*running
	if !c.late {
		v.serves(ctx, t, clients)
		for _, client := range clients {
			running = append(running, c.run(ctx, t, client, v.model))
		}
		for _, r := range running {
			<-r.began
		}
	}
	since := time.Now()
	c.do(t, v)
	told := make([]reply, len(clients))
	took := make([]time.Duration, len(clients))
	var asking sync.WaitGroup
	for i, client := range clients {
		asking.Go(func() { told[i], took[i] = c.await(ctx, t, client, v.model, since) })
	}
	asking.Wait()
	ends := c.checkRunning(t, running, since)
	for i, client := range clients {
		if took[i] > c.within+busyCores {
			t.Errorf("edge %d has told after %s, the promise is %s", i+1, took[i], c.within)
		}
		if info := c.code.Info(); told[i].status != info.Status || told[i].err == nil || told[i].err.Type != info.Type {
			t.Errorf("edge %d: status %d, error %+v", i+1, told[i].status, told[i].err)
		}
		if c.retry != "" {
			checkRetry(t, told[i].header.Get("Retry-After"), c.retry)
		}
		if r := client.chat(ctx, true, map[string]any{"model": v.model}); r.code() != string(c.code) {
			t.Errorf("edge %d, once it has told, answers a stream with status %d, error %+v", i+1, r.status, r.err)
		}
	}
	c.watch(ctx, t, v, clients)
	if c.code == schemas.CodeModelNotFound {
		for _, edge := range v.edges {
			if list := listed(t, edge, clients[0].key); slices.Contains(list, v.model) || len(list) == 0 {
				t.Errorf("the models are %q", list)
			}
		}
	}
	c.undo(t, v)
	undone := time.Now()
	v.serves(ctx, t, clients)
	again := time.Since(undone)
	round := func(d time.Duration) time.Duration { return d.Round(10 * time.Millisecond) }
	return fmt.Sprintf("%s\t%d %s\t%s\t%s\t%s\t%s\t%s\t%s", c.name, told[0].status, c.code, told[0].header.Get("Retry-After"),
		c.within, round(took[0]), round(took[1]), ends, round(again))
}

// serves waits until each edge has an answer of the model's.
func (v *victim) serves(ctx context.Context, t *testing.T, clients []*client) {
	t.Helper()
	for _, client := range clients {
		stack.Until(t, 30*time.Second, "the model to answer", func() bool {
			r := client.chat(ctx, false, map[string]any{"model": v.model, "demo": map[string]any{"tokens": 1}})
			if r.broken != nil {
				t.Fatal(r.broken)
			}
			return r.err == nil
		})
	}
}

// watch makes sure that the answer stays what it is when the edges learn more: an agent
// falls silent for too long, a worker looks at its backend again.
func (c *cause) watch(ctx context.Context, t *testing.T, v *victim, clients []*client) {
	for until := time.Now().Add(c.stays); time.Now().Before(until); time.Sleep(250 * time.Millisecond) {
		for i, client := range clients {
			if r := client.chat(ctx, false, map[string]any{"model": v.model}); r.code() != string(c.code) {
				t.Errorf("edge %d, once it has told, answers with status %d, error %+v", i+1, r.status, r.err)
			}
		}
	}
}

// await asks for the model until the answer is that of the cause.
func (c *cause) await(ctx context.Context, t *testing.T, client *client, model string, since time.Time) (reply, time.Duration) {
	for {
		r := client.chat(ctx, false, map[string]any{"model": model, "demo": map[string]any{"tokens": 1}})
		took := time.Since(since)
		switch {
		case r.code() == string(c.code):
			return r, took
		case r.broken != nil || r.err != nil && r.err.Code != string(c.also):
			t.Errorf("after %s: status %d, error %+v, broken %v", took, r.status, r.err, r.broken)
			return r, took
		case took > 30*time.Second:
			t.Errorf("%s never came", c.code)
			return r, took
		}
		time.Sleep(50 * time.Millisecond) // leave the processors to those that are watched
	}
}

// running is a reply that runs while the cause comes.
type running struct {
	began chan struct{} // closed with its third token, or its end
	ended chan struct{}
	reply reply
	at    time.Time // when it ended
}

// runs is how many tokens such a reply has: those of 2 s if it is to come whole.
func (c *cause) runs() int {
	if c.cut == "" {
		return 40
	}
	return 10_000
}

func (c *cause) run(ctx context.Context, t *testing.T, client *client, model string) *running {
	r := &running{began: make(chan struct{}), ended: make(chan struct{})}
	began := sync.OnceFunc(func() { close(r.began) })
	go func() {
		defer close(r.ended)
		defer began()
		r.reply = client.follow(ctx, true, map[string]any{"model": model, "demo": map[string]any{
			"tokens": c.runs(), "numbered": true, "tokens_per_second": 20,
		}}, func(seen *reply) {
			if tokensOf(seen.text) >= 3 {
				began()
			}
		})
		r.at = time.Now()
	}()
	t.Cleanup(func() { <-r.ended })
	return r
}

// checkRunning waits for the ends of the replies that ran, and says how that was.
func (c *cause) checkRunning(t *testing.T, running []*running, since time.Time) string {
	if len(running) == 0 {
		return "none"
	}
	var last time.Duration
	for _, r := range running {
		<-r.ended
		last = max(last, r.at.Sub(since))
		if !strings.HasPrefix(numbered(c.runs()), r.reply.text) {
			t.Errorf("a reply that ran has the text %q", r.reply.text)
		}
		if c.cut == "" {
			wantWhole(t, r.reply)
			continue
		}
		if r.reply.done || r.reply.broken != nil || r.reply.code() != string(c.cut) {
			t.Errorf("a reply that ran ended with done %v, broken %v, error %+v", r.reply.done, r.reply.broken, r.reply.err)
		}
	}
	if c.cut == "" {
		return "whole"
	}
	if last > cutWithin {
		t.Errorf("the last reply that ran ended after %s", last)
	}
	return fmt.Sprintf("%s after %s", c.cut, last.Round(10*time.Millisecond))
}

// listed are the models that an edge lists.
func listed(t *testing.T, edge *stack.Edge, key string) (ids []string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, edge.BaseURL+"/models", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+key)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var list struct{ Data []struct{ ID string } }
	if err := json.NewDecoder(resp.Body).Decode(&list); err != nil {
		t.Fatal(err)
	}
	for _, m := range list.Data {
		ids = append(ids, m.ID)
	}
	return ids
}
