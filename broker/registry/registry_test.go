package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/presence"
	"github.com/ownllm/ownllm/internal/natstest"
	"github.com/ownllm/ownllm/internal/pgtest"
	"github.com/ownllm/ownllm/schemas"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

const (
	tenant   = schemas.TenantID("ten_1")
	agent    = schemas.AgentID("agt_1")
	patience = 30 * time.Second
)

// fake is a store that remembers, and fails when it is told to.
type fake struct {
	mu      sync.Mutex
	reports []books.AgentReport
	asked   chan struct{} // holds one token
	touched chan []schemas.AgentID
	err     error
}

func newFake() *fake {
	return &fake{asked: make(chan struct{}, 1), touched: make(chan []schemas.AgentID, 16)}
}

func (f *fake) UpsertAgent(_ context.Context, r books.AgentReport) error {
	select {
	case f.asked <- struct{}{}:
	default:
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil {
		f.reports = append(f.reports, r)
	}
	return f.err
}

func (f *fake) TouchAgents(_ context.Context, ids []schemas.AgentID) error {
	f.touched <- ids
	return f.fails()
}

func (f *fake) fails() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

func (f *fake) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
}

func (f *fake) stored() []books.AgentReport {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.reports)
}

// house is a bus with a queue, and a worker's connection to it.
type house struct {
	t      *testing.T
	server *natstest.Server
	core   *nats.Conn
	nc     *nats.Conn // of the worker
	queue  *bus.Queue
	table  *presence.Table
}

func newHouse(t *testing.T) *house {
	t.Helper()
	h := &house{t: t, server: natstest.Start(t), table: presence.NewTable()}
	h.core, h.queue = h.server.Queue(10)
	cfg := h.server.Config("worker")
	cfg.InboxPrefix = schemas.AgentInboxPrefix(agent)
	h.nc = h.server.Open(cfg)
	return h
}

// serve runs a registry until the test ends or stop is called. It returns once the
// registry answers.
func (h *house) serve(s Store) (stop func()) {
	h.t.Helper()
	r := New(h.server.Connect("broker"), h.queue, s, h.table, natstest.Log)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			h.t.Error(err)
		}
		_ = r.nc.Flush() // from here the server knows that nobody listens; or it is gone itself
	})
	h.t.Cleanup(stop)
	for deadline := time.Now().Add(patience); r.nc.NumSubscriptions() == 0; {
		if time.Now().After(deadline) {
			h.t.Fatal("the registry doesn't listen")
		}
	}
	if err := r.nc.Flush(); err != nil {
		h.t.Fatal(err)
	}
	return stop
}

func hello(models ...string) schemas.Hello {
	h := schemas.Hello{
		Version: schemas.ProtocolVersion, Incarnation: schemas.NewIncarnation(), Software: "test", Host: "office",
		Inventory: schemas.Inventory{Models: []schemas.Model{}},
	}
	for _, id := range models {
		h.Inventory.Models = append(h.Inventory.Models, schemas.Model{ID: id, State: schemas.ModelReady, Backend: "demo", Slots: 1})
	}
	return h
}

// ask says hello as the agent that the subject names, and returns the answer.
func (h *house) ask(subject string, payload []byte, wait time.Duration) (*nats.Msg, error) {
	sub, err := h.nc.SubscribeSync("_INBOX_" + schemas.LastToken(subject) + "." + nats.NewInbox())
	if err != nil {
		return nil, err
	}
	defer sub.Unsubscribe()
	if err := h.nc.PublishRequest(subject, sub.Subject, payload); err != nil {
		return nil, err
	}
	return sub.NextMsg(wait)
}

// say says hello and returns the answer.
func (h *house) say(subject string, payload []byte) schemas.Welcome {
	h.t.Helper()
	m, err := h.ask(subject, payload, patience)
	if err != nil {
		h.t.Fatal(err)
	}
	var w schemas.Welcome
	if err := json.Unmarshal(m.Data, &w); err != nil {
		h.t.Fatal(err)
	}
	return w
}

// wantConsumer checks that jobs of the model can be pulled from the consumer.
func (h *house) wantConsumer(name, model string) {
	h.t.Helper()
	m, err := h.core.Request("$JS.API.CONSUMER.INFO."+schemas.JobStream(agent)+"."+name, nil, patience)
	if err != nil {
		h.t.Fatal(err)
	}
	var info struct {
		Config struct {
			Filter string `json:"filter_subject"`
			Memory bool   `json:"mem_storage"`
		} `json:"config"`
	}
	if err := json.Unmarshal(m.Data, &info); err != nil {
		h.t.Fatal(err)
	}
	if want := schemas.JobSubject(tenant, agent, model); info.Config.Filter != want || !info.Config.Memory {
		h.t.Errorf("consumer of %s is %s", model, m.Data)
	}
}

var subject = schemas.HelloSubject(tenant, agent)

func TestHelloGetsConsumers(t *testing.T) {
	t.Parallel()
	h, s := newHouse(t), newFake()
	h.serve(s)
	first := hello("qwen/qwen2.5:32b", "llama-3.3-70b")
	w := h.say(subject, first.Encode())
	if w.Error != nil || w.Stream != schemas.JobStream(agent) || len(w.Consumers) != 2 {
		t.Fatalf("welcome is %+v", w)
	}
	for model, name := range w.Consumers {
		h.wantConsumer(name, model)
	}
	// The same again changes nothing; another inventory is stored, and may be empty.
	if again := h.say(subject, first.Encode()); len(again.Consumers) != 2 || again.Consumers["llama-3.3-70b"] != w.Consumers["llama-3.3-70b"] {
		t.Errorf("a second welcome is %+v, the first was %+v", again, w)
	}
	if none := h.say(subject, hello().Encode()); none.Error != nil || len(none.Consumers) != 0 {
		t.Errorf("without models the welcome is %+v", none)
	}
	stored := s.stored()
	if len(stored) != 3 {
		t.Fatalf("%d reports were stored, want 3", len(stored))
	}
	if r := stored[0]; r.ID != agent || r.Tenant != tenant || r.Name != "office" || r.Incarnation != first.Incarnation || r.Inventory.Hash() != first.Inventory.Hash() {
		t.Errorf("stored is %+v", r)
	}
}

// The subject, which permissions are enforced on, says who speaks.
func TestHelloIsRefused(t *testing.T) {
	t.Parallel()
	h, s := newHouse(t), newFake()
	h.serve(s)
	ours := schemas.ProtocolVersion
	of := func(newest, oldest int) []byte {
		one := hello("demo")
		one.Version, one.Oldest = newest, oldest
		return one.Encode()
	}
	for name, tc := range map[string]struct {
		subject string
		payload []byte
		want    schemas.Code
		says    string
	}{
		"too old":       {subject, of(schemas.OldestProtocol-1, 0), schemas.CodeInvalidValue, "Upgrade this machine's worker"},
		"too new":       {subject, of(ours+1, ours+1), schemas.CodeInvalidValue, "Upgrade the brokers and edges"},
		"only the next": {subject, of(ours+1, 0), schemas.CodeInvalidValue, fmt.Sprintf("this worker version %d", ours+1)},
		"two ahead":     {subject, of(ours+2, ours+1), schemas.CodeInvalidValue, fmt.Sprintf("versions %d and %d", ours+1, ours+2)},
		"no JSON":       {subject, []byte("hello"), schemas.CodeInvalidJSON, "JSON"},
		"empty":         {subject, nil, schemas.CodeInvalidJSON, "JSON"},
		"bad tenant":    {schemas.Prefix + "hello.=zz." + string(agent), hello("demo").Encode(), schemas.CodeInvalidValue, "tenant"},
		"bad agent":     {schemas.Prefix + "hello.ten_1.a=", hello("demo").Encode(), schemas.CodeInvalidValue, "agent"},
	} {
		w := h.say(tc.subject, tc.payload)
		if w.Error == nil || w.Error.Code != tc.want || !strings.Contains(w.Error.Message, tc.says) || w.Stream != "" || len(w.Consumers) != 0 {
			t.Errorf("%s: welcome is %+v", name, w)
		}
	}
	if w := h.say(subject, of(ours+1, ours)); w.Error != nil || w.Version != ours || w.Stream == "" {
		t.Errorf("a worker one version ahead gets %+v", w)
	}
	if stored := s.stored(); len(stored) != 1 {
		t.Errorf("stored was %+v", stored)
	}
	s.fail(schemas.Errorf(schemas.CodeInvalidValue, "There is no such tenant."))
	if w := h.say(subject, hello("demo").Encode()); w.Error == nil || w.Error.Message != "There is no such tenant." {
		t.Errorf("what the store refuses gets %+v", w)
	}
	if stored := s.stored(); len(stored) != 1 {
		t.Errorf("stored was %+v", stored)
	}
}

// What isn't the worker's fault isn't answered: it asks again, and maybe another broker.
func TestNoAnswerWithoutAStore(t *testing.T) {
	t.Parallel()
	for name, err := range map[string]error{
		"away":   errors.New("connection refused"),
		"broken": schemas.Errorf(schemas.CodeInternalError, "broken"),
		"slow":   context.DeadlineExceeded,
	} {
		h, s := newHouse(t), newFake()
		stop := h.serve(s)
		s.fail(err)
		inbox, suberr := h.nc.SubscribeSync(h.nc.NewInbox())
		if suberr != nil {
			t.Fatal(suberr)
		}
		if err := h.nc.PublishRequest(subject, inbox.Subject, hello("demo").Encode()); err != nil {
			t.Fatal(err)
		}
		if err := h.nc.Flush(); err != nil {
			t.Fatal(err)
		}
		select {
		case <-s.asked:
		case <-time.After(patience):
			t.Fatalf("%s: the store wasn't asked", name)
		}
		stop()
		if err := h.nc.Flush(); err != nil {
			t.Fatal(err)
		}
		if n, _, _ := inbox.Pending(); n != 0 {
			m, err := inbox.NextMsg(patience)
			t.Errorf("%s: the answer is %s, %v", name, m.Data, err)
		}
	}
}

func TestBrokersShareTheWork(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	stores := []*fake{newFake(), newFake()}
	var stops []func()
	for _, s := range stores {
		stops = append(stops, h.serve(s))
	}
	const hellos = 100
	for range hellos {
		if w := h.say(subject, hello("demo").Encode()); w.Error != nil {
			t.Fatal(w.Error)
		}
	}
	a, b := len(stores[0].stored()), len(stores[1].stored())
	if a+b != hellos || a == 0 || b == 0 {
		t.Errorf("of %d hellos one answered %d and the other %d", hellos, a, b)
	}
	// One that leaves leaves the work to the other.
	stops[0]()
	for range 10 {
		h.say(subject, hello("demo").Encode())
	}
	if got := len(stores[1].stored()); got != b+10 {
		t.Errorf("the one that stayed answered %d, want %d", got-b, 10)
	}
}

// A server that restarts forgets the consumers; the next hello makes them again, and the
// jobs are still there.
func TestConsumersAfterARestart(t *testing.T) {
	t.Parallel()
	h, s := newHouse(t), newFake()
	h.serve(s)
	name := h.say(subject, hello("demo").Encode()).Consumers["demo"]
	h.wantConsumer(name, "demo")
	h.server.Restart(nil)
	var w schemas.Welcome
	for deadline := time.Now().Add(patience); w.Stream == ""; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("nobody answers after the restart")
		}
		m, err := h.nc.Request(subject, hello("demo").Encode(), time.Second)
		if err != nil {
			continue // not reconnected yet
		}
		if err := json.Unmarshal(m.Data, &w); err != nil {
			t.Fatal(err)
		}
	}
	if w.Consumers["demo"] != name {
		t.Errorf("the consumer is %q, and was %q", w.Consumers["demo"], name)
	}
	h.wantConsumer(name, "demo")
}

// Agents that are here are noted as seen, and only they, also after a failure.
func TestTouch(t *testing.T) {
	t.Parallel()
	h, s := newHouse(t), newFake()
	s.fail(errors.New("away"))
	here := schemas.Heartbeat{Incarnation: schemas.NewIncarnation(), State: schemas.AgentUp}
	h.table.Observe(tenant, agent, &here, time.Now())
	h.table.Observe("ten_2", "agt_2", &here, time.Now())
	h.table.Restore(presence.Known{Tenant: tenant, Agent: "agt_away"})
	h.serve(s)
	for range 2 {
		select {
		case ids := <-s.touched:
			if want := []schemas.AgentID{agent, "agt_2"}; !slices.Equal(ids, want) {
				t.Errorf("touched are %v, want %v", ids, want)
			}
		case <-time.After(2*touchEvery + patience):
			t.Fatal("nobody was touched")
		}
	}
}

// The same against the real books.
func TestBooks(t *testing.T) {
	t.Parallel()
	store, err := books.Open(t.Context(), books.Config{URL: pgtest.New(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.Close)
	ten, err := store.CreateTenant(t.Context(), books.NewTenant{Slug: "office"})
	if err != nil {
		t.Fatal(err)
	}
	other, err := store.CreateTenant(t.Context(), books.NewTenant{Slug: "lab"})
	if err != nil {
		t.Fatal(err)
	}
	h := newHouse(t)
	h.serve(store)
	id, said := schemas.NewAgentID(), hello("demo")
	if w := h.say(schemas.HelloSubject(ten.ID, id), said.Encode()); w.Error != nil || w.Consumers["demo"] == "" {
		t.Fatalf("welcome is %+v", w)
	}
	list, _, err := store.ListAgents(t.Context(), "office", books.Page{})
	if err != nil {
		t.Fatal(err)
	}
	if len(list) != 1 || list[0].ID != id || list[0].Name != "office" || list[0].Incarnation != said.Incarnation || list[0].InventoryHash != said.Inventory.Hash() {
		t.Errorf("the books have %+v", list)
	}
	// An agent belongs to one tenant, and a tenant has to exist.
	for name, tenant := range map[string]schemas.TenantID{"another tenant": other.ID, "no tenant": schemas.NewTenantID()} {
		if w := h.say(schemas.HelloSubject(tenant, id), hello("demo").Encode()); w.Error == nil || w.Error.Status() >= 500 || len(w.Consumers) != 0 {
			t.Errorf("%s: welcome is %+v", name, w)
		}
	}
}

// The newest run of an agent replaces older ones: they are told, and their hellos are
// refused.
func TestNewestRunReplacesOlderOnes(t *testing.T) {
	t.Parallel()
	h, s := newHouse(t), newFake()
	h.serve(s)
	control, err := h.nc.SubscribeSync(schemas.ControlSubject(agent))
	if err != nil {
		t.Fatal(err)
	}
	old, fresh := hello("demo"), hello("demo")
	fresh.Incarnation = old.Incarnation + "Z" // sorts after it, whatever the clock says
	if w := h.say(subject, fresh.Encode()); w.Error != nil {
		t.Fatalf("the newer run got %+v", w.Error)
	}
	m, err := control.NextMsg(patience)
	if err != nil {
		t.Fatal(err)
	}
	if want := (schemas.Control{Operation: schemas.ControlReplaced, Incarnation: fresh.Incarnation}).Encode(); string(m.Data) != string(want) {
		t.Errorf("the agent was told %s, want %s", m.Data, want)
	}
	h.table.Observe(tenant, agent, &schemas.Heartbeat{Version: schemas.ProtocolVersion, Incarnation: fresh.Incarnation, State: schemas.AgentUp}, time.Now())
	if w := h.say(subject, old.Encode()); w.Error == nil || !strings.Contains(w.Error.Message, "taken over") || len(w.Consumers) != 0 {
		t.Errorf("the older run got %+v", w)
	}
	h.table.Lost(tenant, agent, fresh.Incarnation)
	if w := h.say(subject, old.Encode()); w.Error != nil {
		t.Errorf("once the newer one is away, the older run gets %+v", w.Error)
	}
}
