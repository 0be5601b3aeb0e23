package worker_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/tidwall/gjson"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/broker/presence"
	"github.com/ownllm/ownllm/broker/quota"
	"github.com/ownllm/ownllm/broker/registry"
	"github.com/ownllm/ownllm/internal/natstest"
	"github.com/ownllm/ownllm/internal/quotatest"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker"
	"github.com/ownllm/ownllm/worker/backend"
	"github.com/ownllm/ownllm/worker/demo"
)

const (
	tenant = schemas.TenantID("ten_1")
	agent  = schemas.AgentID("agt_1")
	// patience is how long a test waits for what has to come.
	patience = time.Minute
	// slack is what busy cores may add to a promised time.
	slack = 2 * time.Second
	// bulkName is what the second connection is called, and bulkRest is worker.BulkRest for those
	// who wait for its end.
	bulkName = "bulk"
	bulkRest = 200 * time.Millisecond
)

// until waits for a condition that nothing signals.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// background runs f until the test ends or stop is called, which waits for it.
func background(t testing.TB, f func(context.Context) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- f(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// server is an inference server that a test can exchange or switch off.
type server struct {
	*httptest.Server
	demo atomic.Pointer[demo.Server] // nil: nobody answers
}

func newServer(t testing.TB, o demo.Options) *server {
	t.Helper()
	s := &server{}
	s.demo.Store(demo.New(o))
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		d := s.demo.Load()
		if d == nil {
			panic(http.ErrAbortHandler)
		}
		d.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	return s
}

func (s *server) stats() demo.Stats { return s.demo.Load().Stats() }

// models are demo models, ready and with all that they need.
func models(ids ...string) []schemas.Model {
	list := make([]schemas.Model, len(ids))
	for i, id := range ids {
		list[i] = demo.DefaultModel()
		list[i].ID = id
	}
	return list
}

// store is a registry's store that takes everything.
type store struct{ agents *natstest.Agents }

// UpsertAgent lets the agent pull what it offers, from its next connection on.
func (s store) UpsertAgent(_ context.Context, r books.AgentReport) error {
	var models []string
	for _, m := range r.Inventory.Models {
		models = append(models, m.ID)
	}
	s.agents.Offer(r.Tenant, r.ID, models...)
	return nil
}
func (store) TouchAgents(context.Context, []schemas.AgentID) error { return nil }

// house is all that lies between a client and a worker: the bus, a broker, an owner.
type house struct {
	t         testing.TB
	nats      *natstest.Server
	queue     *bus.Queue
	table     *presence.Table
	feed      *presence.Feed
	d         *dispatch.Dispatcher
	stopOwner func()
	core      *nats.Conn // to the account of the queue
	tokens    *nats.Conn // of the worker
	stop      func()     // stops the worker, and waits until it has
	books     *quotatest.Books
}

// newHouse starts everything, and a worker with the backends, and waits until the worker
// is there.
func newHouse(t testing.TB, cfg worker.Config) *house {
	t.Helper()
	return newHouseWith(t, cfg, func(*worker.Worker) {})
}

// newHouseWith is newHouse with a worker that is changed before it runs.
func newHouseWith(t testing.TB, cfg worker.Config, change func(*worker.Worker)) *house {
	t.Helper()
	h := &house{t: t, nats: natstest.Start(t), table: presence.NewTable(), books: quotatest.New()}
	h.core, h.queue = h.nats.Queue(100)
	broker, owner := h.nats.Connect("broker"), h.nats.Connect("owner")
	h.feed = presence.NewFeed(owner, h.table, natstest.Log)
	deadlines := dispatch.DefaultConfig()
	deadlines.ColdWait = patience
	h.d = dispatch.New(dispatch.Parts{
		Tokens: owner, Bulk: h.nats.Connect("bulk"), Queue: h.queue, Agents: h.table, Feed: h.feed,
		Gate: h.books.Gate(t, quota.Config{}), Log: natstest.Log,
	}, deadlines)
	background(t, h.feed.Run)
	h.stopOwner = background(t, h.d.Run)
	background(t, registry.New(broker, h.queue, store{h.nats.Agents()}, h.table, natstest.Log).Run)
	cfg.Tenant, cfg.Agent, cfg.Host, cfg.Software = tenant, agent, "host", "test"
	h.tokens = h.nats.Agent(tenant, agent)
	w := worker.New(h.tokens, newBulk(t, h.nats), cfg, natstest.Log)
	change(w)
	h.stop = background(t, w.Run)
	until(t, "the worker", func() bool { return h.status().State == schemas.AgentUp && len(h.status().Models) > 0 })
	return h
}

// newBulk returns the second connection of the worker.
func newBulk(t testing.TB, server *natstest.Server) *bus.Sideline {
	t.Helper()
	cfg := server.AgentConfig(tenant, agent)
	bulk := bus.NewSideline(cfg.As(cfg.User, bulkName), bulkRest, natstest.Log)
	t.Cleanup(bulk.Close)
	return bulk
}

// one is a worker with one backend.
func one(t testing.TB, o demo.Options, slots int) (*house, *server) {
	t.Helper()
	s := newServer(t, o)
	return newHouse(t, worker.Config{Backends: []backend.Config{{URL: s.URL, Slots: slots}}, Drain: patience}), s
}

// status is what is known of the worker.
func (h *house) status() presence.AgentStatus {
	for _, a := range h.table.Agents(tenant) {
		return a
	}
	return presence.AgentStatus{}
}

// state is the state of a model of the worker, or empty.
func (h *house) state(model string) schemas.ModelState {
	for _, m := range h.status().Models {
		if m.ID == model {
			return m.State
		}
	}
	return ""
}

// depth counts the jobs in the queue.
func (h *house) depth() int {
	h.t.Helper()
	depths, err := h.queue.Depths(context.Background(), tenant)
	if err != nil {
		h.t.Fatal(err)
	}
	n := 0
	for _, d := range depths {
		n += int(d)
	}
	return n
}

// request is a request for a model with the faults that are asked of it.
func request(model string, stream bool, faults map[string]any) dispatch.Request {
	body, err := json.Marshal(map[string]any{
		"model": model, "messages": []any{map[string]any{"role": "user", "content": "Hi"}},
		"stream": stream, "demo": faults,
	})
	if err != nil {
		panic(err)
	}
	return dispatch.Request{
		ID: schemas.NewRequestID(), Tenant: tenant, Operation: "chat", Model: model,
		Body: string(body), Stream: stream, Received: time.Now(),
	}
}

// chat is a request on its way.
type chat struct {
	t     testing.TB
	reply *dispatch.Reply
	text  strings.Builder
	body  strings.Builder // all that came
}

// start starts a request, which is closed at the end of the test if it isn't before.
func (h *house) start(req dispatch.Request) *chat {
	h.t.Helper()
	c, err := h.ask(req)
	if err != nil {
		h.t.Fatal(err)
	}
	return c
}

// ask is start for a request that may be refused.
func (h *house) ask(req dispatch.Request) (*chat, *schemas.Error) {
	reply, _, err := h.d.Start(context.Background(), req)
	if err != nil {
		return nil, schemas.AsError(err)
	}
	h.t.Cleanup(reply.Close)
	return &chat{t: h.t, reply: reply}, nil
}

// next takes in the next event.
func (c *chat) next() dispatch.Event {
	timer := time.AfterFunc(patience, func() {
		c.reply.Interrupt(schemas.Errorf(schemas.CodeInternalError, "the test waited in vain"))
	})
	defer timer.Stop()
	ev := c.reply.Next()
	for _, lines := range ev.Payload {
		c.body.Write(lines)
		for line := range strings.Lines(string(lines)) {
			c.text.WriteString(gjson.Get(line, "choices.0.delta.content").Str)
		}
	}
	return ev
}

// begin waits for the first token.
func (c *chat) begin() *chat {
	c.t.Helper()
	for c.text.Len() == 0 {
		if ev := c.next(); ev.Kind != dispatch.EventChunk {
			c.t.Fatalf("before the first token comes %+v", ev)
		}
	}
	return c
}

// end reads to the end and closes the request.
func (c *chat) end() *schemas.Error {
	defer c.reply.Close()
	for {
		switch ev := c.next(); ev.Kind {
		case dispatch.EventDone:
			return nil
		case dispatch.EventError:
			return ev.Err
		}
	}
}

// numbered asks for a reply whose tokens are numbers, in the given time.
func numbered(tokens int, takes time.Duration) map[string]any {
	faults := map[string]any{"numbered": true, "tokens": tokens}
	if takes > 0 {
		faults["tokens_per_second"] = float64(tokens) / takes.Seconds()
	}
	return faults
}

// wantNumbered reads to the end: all numbers have to come, each once, in order.
func (c *chat) wantNumbered(tokens int) {
	c.t.Helper()
	err := c.end()
	var want strings.Builder
	for i := range tokens {
		fmt.Fprintf(&want, " %d", i)
	}
	if err != nil || c.text.String() != want.String() {
		c.t.Errorf("reply is %q and ends with %v, want %d numbers", c.text.String(), err, tokens)
	}
}
