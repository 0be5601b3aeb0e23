package presence

import (
	"context"
	"encoding/json"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/internal/faultproxy"
	"github.com/ownllm/ownllm/internal/natstest"
	"github.com/ownllm/ownllm/schemas"
)

const (
	// busy is what a test machine may add to a promised time.
	busy = 1500 * time.Millisecond
	// patience is how long a test waits for what has to come, and of which no time is promised.
	patience = 30 * time.Second
)

// rig is a feed on a real nats-server.
type rig struct {
	t     *testing.T
	bus   *natstest.Server
	table *Table
	feed  *Feed

	mu   sync.Mutex
	gone map[schemas.Incarnation]time.Time
}

func newRig(t *testing.T) *rig {
	t.Helper()
	t.Parallel()
	server := natstest.Start(t)
	return startRig(t, server, server.Connect("feed"))
}

// startRig runs a feed on the connection.
func startRig(t *testing.T, server *natstest.Server, nc *nats.Conn) *rig {
	t.Helper()
	r := &rig{t: t, bus: server, table: NewTable(), gone: map[schemas.Incarnation]time.Time{}}
	r.table.OnGone(func(g Gone) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.gone[g.Incarnation] = time.Now()
	})
	r.feed = NewFeed(nc, r.table, natstest.Log)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- r.feed.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("feed ended: %v", err)
		}
	})
	until(t, "the feed listens", patience, func() bool { return nc.NumSubscriptions() >= 4 })
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	return r
}

// goneAt is when the feed told that the run has ended.
func (r *rig) goneAt(inc schemas.Incarnation) (time.Time, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	at, ok := r.gone[inc]
	return at, ok
}

func (r *rig) isGone(inc schemas.Incarnation) bool {
	_, ok := r.goneAt(inc)
	return ok
}

// state is what the table says of an agent.
func (r *rig) state(id schemas.AgentID) schemas.AgentState {
	for _, a := range r.table.Agents("") {
		if a.Agent == id {
			return a.State
		}
	}
	return ""
}

func (r *rig) has(model string) bool {
	_, ok := r.table.Find(tenant, model)
	return ok
}

// until polls a condition.
func until(t *testing.T, what string, limit time.Duration, condition func() bool) {
	t.Helper()
	deadline := time.After(limit)
	poll := time.NewTicker(5 * time.Millisecond)
	defer poll.Stop()
	for !condition() {
		select {
		case <-deadline:
			t.Fatalf("not within %v: %s", limit, what)
		case <-poll.C:
		}
	}
}

// throughout fails the test if the condition ceases to hold before the time is over.
func throughout(t *testing.T, what string, d time.Duration, condition func() bool) {
	t.Helper()
	end := time.After(d)
	poll := time.NewTicker(5 * time.Millisecond)
	defer poll.Stop()
	for {
		if !condition() {
			t.Fatalf("no longer true: %s", what)
		}
		select {
		case <-end:
			return
		case <-poll.C:
		}
	}
}

// fakeWorker speaks as a worker does.
type fakeWorker struct {
	t    *testing.T
	nc   *nats.Conn
	id   schemas.AgentID
	inc  schemas.Incarnation
	done chan struct{} // closed when it has stopped beating
	stop context.CancelFunc

	mu        sync.Mutex
	inventory *schemas.Inventory
	answers   bool
	asked     int
	last      time.Time // when it last said something
}

// join connects a worker that answers, and begins to beat.
func (r *rig) join(id schemas.AgentID, models ...string) *fakeWorker {
	r.t.Helper()
	inc := schemas.NewIncarnation()
	cfg := r.bus.AgentConfig(tenant, id)
	cfg.Name = schemas.ConnectionName(tenant, inc)
	w := &fakeWorker{
		t: r.t, nc: r.bus.Open(cfg), id: id, inc: inc, done: make(chan struct{}),
		inventory: inventory(models...), answers: true,
	}
	_, err := w.nc.Subscribe(schemas.ControlSubject(id), func(m *nats.Msg) {
		var c schemas.Control
		if err := json.Unmarshal(m.Data, &c); err != nil || c.Operation != schemas.ControlInventory {
			r.t.Errorf("control request %q", m.Data)
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		w.asked++
		if w.answers {
			w.say(m.Reply, schemas.AgentUp, w.inventory)
		}
	})
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(r.t.Context())
	w.stop = func() {
		cancel()
		<-w.done
	}
	go w.beat(ctx)
	r.t.Cleanup(w.stop)
	until(r.t, "agent is here", patience, func() bool { return r.state(id) == schemas.AgentUp })
	return w
}

// beat says no more than the hash; who wants the inventory has to ask.
func (w *fakeWorker) beat(ctx context.Context) {
	defer close(w.done)
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		w.mu.Lock()
		w.say(schemas.HeartbeatSubject(tenant, w.id), schemas.AgentUp, nil)
		w.mu.Unlock()
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// say publishes a heartbeat. w.mu is held.
func (w *fakeWorker) say(subject string, state schemas.AgentState, inv *schemas.Inventory) {
	hb := schemas.Heartbeat{
		Version: schemas.ProtocolVersion, Incarnation: w.inc, State: state, Hash: w.inventory.Hash(), Inventory: inv, Slots: 4,
	}
	w.last = time.Now()
	if err := w.nc.Publish(subject, hb.Encode()); err != nil && !bus.Down(err) {
		w.t.Errorf("say: %v", err)
	}
}

func (w *fakeWorker) change(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
}

// silence stops the beat and returns when the last word was said.
func (w *fakeWorker) silence() time.Time {
	w.stop()
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.nc.Flush(); err != nil {
		w.t.Errorf("flush: %v", err)
	}
	return w.last
}

func (w *fakeWorker) timesAsked() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.asked
}

func TestFeedReady(t *testing.T) {
	started := time.Now()
	r := newRig(t)
	if ready := r.feed.Ready(); ready && time.Since(started) < beat || !r.feed.Connected() {
		t.Errorf("at once: ready %v, connected %v", ready, r.feed.Connected())
	}
	until(t, "feed is ready", patience, r.feed.Ready)
	if took := time.Since(started); took < time.Second {
		t.Errorf("ready after %v, before every agent has had its beat", took)
	}
	r.bus.Restart(func() {
		until(t, "feed notices that the bus is gone", patience, func() bool { return !r.feed.Ready() && !r.feed.Connected() })
	})
	until(t, "feed is ready again", patience, r.feed.Ready)
}

func TestFeedAsksForInventory(t *testing.T) {
	r := newRig(t)
	w := r.join("a", "m=ready")
	until(t, "model is known", patience, func() bool { return r.has("m") })
	until(t, "nobody asks for what is known", patience, func() bool { // but for a question that is on its way
		asked := w.timesAsked()
		time.Sleep(time.Second) // the time of five beats
		return w.timesAsked() == asked
	})
	w.change(func() { w.inventory = inventory("n=cold") })
	until(t, "model has changed", patience, func() bool { return !r.has("m") && r.has("n") })
	// A new process of the broker or edge learns it all the same.
	second := startRig(t, r.bus, r.bus.Connect("second feed"))
	until(t, "another feed knows the model", patience, func() bool { return second.has("n") })
}

// An agent whose connection closes without a bye is found out by asking: the bus says
// at once that nobody is there.
func TestFeedClosedConnection(t *testing.T) {
	r := newRig(t)
	w, stays := r.join("a", "m=ready"), r.join("b", "m=ready")
	last := w.silence()
	w.nc.Close()
	until(t, "agent is gone", patience, func() bool { return r.isGone(w.inc) })
	at, _ := r.goneAt(w.inc)
	t.Logf("gone %v after its last word", at.Sub(last))
	if took := at.Sub(last); took < beat || took > 2*time.Second+busy {
		t.Errorf("gone %v after its last word, want 1 to 2 s", took)
	}
	if r.state("a") != "" || r.state("b") != schemas.AgentUp || r.isGone(stays.inc) {
		t.Errorf("states %q and %q", r.state("a"), r.state("b"))
	}
}

// An agent that is connected and says nothing is gone after StaleAfter, not before.
func TestFeedSilentAgent(t *testing.T) {
	r := newRig(t)
	w := r.join("a", "m=ready")
	w.change(func() { w.answers = false })
	last := w.silence()
	asked := w.timesAsked()
	until(t, "agent is gone", patience, func() bool { return r.isGone(w.inc) })
	at, _ := r.goneAt(w.inc)
	t.Logf("gone %v after its last word", at.Sub(last))
	if took := at.Sub(last); took < StaleAfter || took > 4*time.Second+busy {
		t.Errorf("gone %v after its last word, want 3.5 to 4 s", took)
	}
	if n := w.timesAsked() - asked; n < 1 || n > 4 {
		t.Errorf("asked %d times in the silence, want once for each missed beat", n)
	}
}

// An agent whose heartbeats get lost is here as long as it answers.
func TestFeedAgentThatOnlyAnswers(t *testing.T) {
	r := newRig(t)
	w := r.join("a", "m=ready")
	w.silence()
	throughout(t, "agent is here", StaleAfter+2*time.Second, func() bool { return !r.isGone(w.inc) && r.state("a") == schemas.AgentUp })
}

func TestFeedBye(t *testing.T) {
	r := newRig(t)
	w := r.join("a", "m=ready")
	w.silence()
	w.change(func() { w.say(schemas.HeartbeatSubject(tenant, "a"), schemas.AgentBye, nil) })
	until(t, "agent is gone", patience, func() bool { return r.isGone(w.inc) })
	// What the same run still sends doesn't bring it back.
	w.change(func() { w.say(schemas.HeartbeatSubject(tenant, "a"), schemas.AgentDraining, nil) })
	// Heartbeats are taken in order: this one is the proof that the other was seen.
	next := schemas.Heartbeat{Version: schemas.ProtocolVersion, Incarnation: "inc_1", State: schemas.AgentUp, Hash: "h", Inventory: inventory()}
	if err := r.bus.Connect("b").Publish(schemas.HeartbeatSubject(tenant, "b"), next.Encode()); err != nil {
		t.Fatal(err)
	}
	until(t, "the next heartbeat is seen", patience, func() bool { return r.state("b") == schemas.AgentUp })
	if s := r.state("a"); s != "" {
		t.Errorf("agent is back in state %q", s)
	}
}

func TestFeedReplacedAgent(t *testing.T) {
	r := newRig(t)
	old := r.join("a", "m=ready")
	young := r.join("a", "m=ready")
	until(t, "the old run is gone", patience, func() bool { return r.isGone(old.inc) })
	// Both beat; the old one stays replaced, and doesn't end the new one.
	throughout(t, "the new run is here", time.Second, func() bool { return !r.isGone(young.inc) && r.state("a") == schemas.AgentUp })
	if got := r.table.Agents(tenant)[0].Incarnation; got != young.inc {
		t.Errorf("incarnation %q, want %q", got, young.inc)
	}
}

// While nats-server is away nobody can be heard, so nobody is gone; nor right after,
// when all that is known of an agent is older than it may be.
func TestFeedServerRestart(t *testing.T) {
	r := newRig(t)
	beats, answers := r.join("a", "m=ready"), r.join("b", "m=ready")
	here := func() bool {
		return !r.isGone(beats.inc) && !r.isGone(answers.inc) && r.state("a") == schemas.AgentUp && r.state("b") == schemas.AgentUp
	}
	answers.silence()
	r.bus.Restart(func() {
		until(t, "feed notices", patience, func() bool { return !r.feed.Connected() })
		throughout(t, "no agent is gone while the bus is away", StaleAfter+time.Second, here)
	})
	until(t, "feed is back", patience, r.feed.Ready)
	throughout(t, "no agent is gone after the bus is back", suspectAfter+time.Second, here)
	// And the feed still looks.
	beats.silence()
	beats.nc.Close()
	until(t, "agent is gone", patience, func() bool { return r.isGone(beats.inc) })
}

// The feed's own link is black-holed: no byte comes through, and nothing is closed. The
// client library takes two to three seconds to notice. An agent that was silent for two
// already would be over its time before that.
func TestFeedBlackHole(t *testing.T) {
	t.Parallel()
	server := natstest.Start(t)
	cfg := server.Config("feed")
	proxy := faultproxy.New(t, cfg.URL)
	cfg.URL = proxy.URL()
	// The server tells clients its own address, past the proxy.
	nc, err := bus.Connect(cfg, natstest.Log, nats.IgnoreDiscoveredServers())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	r := startRig(t, server, nc)
	beats, silent := r.join("a", "m=ready"), r.join("b", "m=ready")
	here := func() bool { return !r.isGone(beats.inc) && !r.isGone(silent.inc) }
	until(t, "feed is ready", patience, r.feed.Ready)
	silent.change(func() { silent.answers = false })
	last := silent.silence()
	throughout(t, "nobody is gone yet", time.Until(last.Add(2*time.Second)), here)
	proxy.Stall()
	silent.change(func() { silent.answers = true })
	throughout(t, "no agent is gone while the feed is deaf", StaleAfter+time.Second, here)
	proxy.Restore()
	until(t, "feed is back", patience, r.feed.Ready)
	throughout(t, "no agent is gone after that", suspectAfter+time.Second, here)
	beats.silence()
	beats.nc.Close()
	until(t, "agent is gone", patience, func() bool { return r.isGone(beats.inc) })
}

func TestFeedDropsNonsense(t *testing.T) {
	r := newRig(t)
	nc := r.bus.Connect("nonsense")
	good := schemas.Heartbeat{Version: schemas.ProtocolVersion, Incarnation: "inc_1", State: schemas.AgentUp, Hash: "h", Inventory: inventory("m=ready")}
	with := func(change func(*schemas.Heartbeat)) []byte {
		hb := good
		change(&hb)
		return hb.Encode()
	}
	for _, m := range []struct {
		subject string
		data    []byte
	}{
		{"ownllm.v1.hb.t", good.Encode()},
		{"ownllm.v1.hb.t.a.b", good.Encode()},
		{"ownllm.v1.hb.t.=41", good.Encode()},
		{schemas.HeartbeatSubject(tenant, "a"), nil},
		{schemas.HeartbeatSubject(tenant, "a"), []byte("{")},
		{schemas.HeartbeatSubject(tenant, "a"), []byte(`"up"`)},
		{schemas.HeartbeatSubject(tenant, "a"), with(func(hb *schemas.Heartbeat) { hb.Version = 0 })},
		{schemas.HeartbeatSubject(tenant, "a"), with(func(hb *schemas.Heartbeat) { hb.Version = schemas.ProtocolVersion + 1 })},
		{schemas.HeartbeatSubject(tenant, "a"), with(func(hb *schemas.Heartbeat) { hb.State = "" })},
		{schemas.HeartbeatSubject(tenant, "a"), with(func(hb *schemas.Heartbeat) { hb.State = "asleep" })},
		{schemas.HeartbeatSubject(tenant, "a"), with(func(hb *schemas.Heartbeat) { hb.Incarnation = "" })},
		{schemas.HeartbeatSubject(tenant, "last"), good.Encode()},
	} {
		if err := nc.Publish(m.subject, m.data); err != nil {
			t.Fatal(err)
		}
	}
	until(t, "the last heartbeat is seen", patience, func() bool { return r.state("last") == schemas.AgentUp })
	if list := r.table.Agents(""); len(list) != 1 {
		t.Errorf("agents %+v", list)
	}
}

// TestFeedAsksTwice: the bus lets an agent answer once to each reply subject, and a second
// question may come before the first one is answered.
func TestFeedAsksTwice(t *testing.T) {
	r := newRig(t)
	nc := r.bus.Agent(tenant, "a")
	questions, err := nc.SubscribeSync(schemas.ControlSubject("a"))
	if err != nil {
		t.Fatal(err)
	}
	hb := schemas.Heartbeat{Version: schemas.ProtocolVersion, Incarnation: "inc_1", State: schemas.AgentUp, Hash: "h"}
	var asked []*nats.Msg
	for range 2 {
		if err := nc.Publish(schemas.HeartbeatSubject(tenant, "a"), hb.Encode()); err != nil {
			t.Fatal(err)
		}
		m, err := questions.NextMsg(patience)
		if err != nil {
			t.Fatal(err)
		}
		asked = append(asked, m)
	}
	hb.Inventory = inventory("m=ready")
	for _, m := range asked {
		if err := m.Respond(hb.Encode()); err != nil {
			t.Fatal(err)
		}
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := nc.LastError(); err != nil {
		t.Errorf("the second answer: %v", err)
	}
	until(t, "the inventory is known", patience, func() bool { return r.has("m") })
}
