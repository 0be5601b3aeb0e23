package dispatch_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/broker/presence"
	"github.com/ownllm/ownllm/broker/quota"
	"github.com/ownllm/ownllm/internal/natstest"
	"github.com/ownllm/ownllm/internal/quotatest"
	"github.com/ownllm/ownllm/schemas"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	tenant = schemas.TenantID("ten_1")
	agentA = schemas.AgentID("agt_a")
	agentB = schemas.AgentID("agt_b")
	model  = "qwen/qwen2.5:32b"

	// patience is how long a test waits for what has to come.
	patience = 30 * time.Second
)

// house is a dispatcher with all that it needs, and agents that a test plays by hand.
type house struct {
	t      testing.TB
	server *natstest.Server
	nc     *nats.Conn // of the dispatcher
	core   *nats.Conn // likewise, to the account of the queue
	queue  *bus.Queue
	table  *presence.Table
	d      *dispatch.Dispatcher
	feed   *presence.Feed
	books  *quotatest.Books
}

// newHouse starts a server with a queue that holds perModel jobs, none if it is 0, and a
// dispatcher with the given change to the usual deadlines.
func newHouse(t testing.TB, perModel int64, change func(*dispatch.Config)) *house {
	t.Helper()
	return newHouseWith(t, perModel, change, quota.Config{})
}

func newHouseWith(t testing.TB, perModel int64, change func(*dispatch.Config), gate quota.Config) *house {
	t.Helper()
	h := &house{t: t, server: natstest.Start(t), table: presence.NewTable(), books: quotatest.New()}
	h.core = h.server.Core("core")
	queue, err := bus.NewQueue(h.core)
	if err != nil {
		t.Fatal(err)
	}
	if perModel > 0 {
		_, h.queue = h.server.Queue(perModel)
	}
	cfg := dispatch.DefaultConfig()
	if change != nil {
		change(&cfg)
	}
	h.nc = h.server.Connect("tokens")
	bulk := h.server.Connect("bulk")
	h.feed = presence.NewFeed(h.nc, h.table, natstest.Log)
	d := dispatch.New(dispatch.Parts{
		Tokens: h.nc, Bulk: bulk, Queue: queue, Agents: h.table, Feed: h.feed, Gate: h.books.Gate(t, gate), Log: natstest.Log,
	}, cfg)
	h.d = d
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	probe := h.server.Agent(tenant, "agt_probe")
	until(t, "a dispatcher that listens", func() bool {
		_, err1 := probe.Request(schemas.OutSubject("agt_probe", d.Owner(), "probe"), nil, patience)
		_, err2 := probe.Request(schemas.BodySubject("agt_probe", d.Owner(), "probe"), nil, patience)
		return err1 == nil && err2 == nil
	})
	return h
}

// until waits for a condition that nothing signals.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// request is a streaming request.
func request() dispatch.Request {
	return dispatch.Request{
		ID: schemas.NewRequestID(), Tenant: tenant, Key: "key_1", Operation: "chat", Model: model,
		Body: `{"model":"x"}`, Stream: true, IncludeUsage: true, Received: time.Now(),
	}
}

// start starts a request, which is closed at the end of the test if it isn't before.
func (h *house) start(req dispatch.Request) *dispatch.Reply {
	h.t.Helper()
	reply, _, err := h.d.Start(context.Background(), req)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(reply.Close)
	return reply
}

// next is Next, but doesn't wait for ever.
func next(reply *dispatch.Reply) dispatch.Event {
	timer := time.AfterFunc(patience, func() {
		reply.Interrupt(schemas.Errorf(schemas.CodeInternalError, "the test waited in vain"))
	})
	defer timer.Stop()
	return reply.Next()
}

// read reads a reply to its end and returns its text and the error that ended it.
func read(reply *dispatch.Reply) (string, *schemas.Error) {
	var text strings.Builder
	for {
		ev := next(reply)
		for _, p := range ev.Payload {
			text.Write(p)
		}
		if ev.Kind == dispatch.EventDone || ev.Kind == dispatch.EventError {
			return text.String(), ev.Err
		}
	}
}

func wantText(t testing.TB, reply *dispatch.Reply, want string) {
	t.Helper()
	if got, err := read(reply); got != want || err != nil {
		t.Errorf("reply is %q, %v, want %q", got, err, want)
	}
}

func wantError(t testing.TB, reply *dispatch.Reply, want schemas.Code) *schemas.Error {
	t.Helper()
	got, err := read(reply)
	if err == nil || err.Code != want {
		t.Fatalf("reply is %q and ends with %v, want %s", got, err, want)
	}
	return err
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

// assigned counts the attempts that the table believes this process to have on an agent.
// An agent that only exists for the question is given more and more to do, until the one
// that is asked about is preferred.
func (h *house) assigned(agent schemas.AgentID) int {
	h.t.Helper()
	const probe = schemas.AgentID("agt_zz")
	incarnation := schemas.NewIncarnation()
	defer h.table.Lost(tenant, probe, incarnation)
	exclude := map[schemas.AgentID]bool{agentA: true, agentB: true}
	delete(exclude, agent)
	for n := range 1000 {
		hb := heartbeat(incarnation, schemas.AgentUp)
		hb.Running = n
		h.table.Observe(tenant, probe, hb, time.Now())
		choice, err := h.table.Route(tenant, model, exclude)
		if err != nil {
			h.t.Fatal(err)
		}
		h.table.Release(tenant, choice.Agent, model)
		if choice.Agent == agent {
			return n
		}
	}
	h.t.Fatalf("agent %s is never chosen", agent)
	return 0
}

// settled checks that nothing is left of any request.
func (h *house) settled(agents ...schemas.AgentID) {
	h.t.Helper()
	if n := h.d.Active(); n != 0 {
		h.t.Errorf("%d requests are still active", n)
	}
	for _, a := range agents {
		if n := h.assigned(a); n != 0 {
			h.t.Errorf("%d attempts are still assigned to %s", n, a)
		}
	}
}

func heartbeat(i schemas.Incarnation, s schemas.AgentState) *schemas.Heartbeat {
	inventory := schemas.Inventory{Models: []schemas.Model{{ID: model, State: schemas.ModelReady, Backend: "demo", Slots: 4, Continues: true}}}
	return &schemas.Heartbeat{
		Version: schemas.ProtocolVersion, Incarnation: i, State: s, Hash: inventory.Hash(), Inventory: &inventory, Slots: 4, Holds: true,
	}
}
