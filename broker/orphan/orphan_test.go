package orphan_test

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/orphan"
	"github.com/ownllm/ownllm/broker/presence"
	"github.com/ownllm/ownllm/internal/faultproxy"
	"github.com/ownllm/ownllm/internal/natstest"
	"github.com/ownllm/ownllm/internal/pgtest"
	"github.com/ownllm/ownllm/schemas"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

const (
	// patience is how long a test waits for what has to come.
	patience = time.Minute
	// slack is what busy cores may add to a promised time.
	slack = 3 * time.Second
	model = "m"
	// perToken is the price of a token, in micro-cents.
	perToken = 1000
)

// house is a key whose requests have lost their owners, and the bus.
type house struct {
	t      testing.TB
	nats   *natstest.Server
	nc     *nats.Conn
	url    string // of the books
	s      *books.Store
	tenant schemas.TenantID
	key    schemas.KeyID
	agent  schemas.AgentID
}

func newHouse(t testing.TB) *house {
	t.Helper()
	h := &house{t: t, nats: natstest.Start(t), url: pgtest.New(t), agent: schemas.NewAgentID()}
	h.nc, _ = h.nats.Queue(10)
	h.s = h.books(h.url)
	many := 1000
	tenant, err := h.s.CreateTenant(t.Context(), books.NewTenant{Slug: "acme", QPS: &many})
	h.must(err)
	user, err := h.s.CreateUser(t.Context(), books.NewUser{Tenant: "acme", Email: "a@b"})
	h.must(err)
	cents := int64(1_000_000)
	key, _, err := h.s.CreateKey(t.Context(), books.NewKey{Tenant: "acme", User: user.Email, Concurrency: &many, BudgetCents: &cents})
	h.must(err)
	_, err = h.s.SetPrice(t.Context(), "acme", model, perToken*1000)
	h.must(err)
	h.tenant, h.key = tenant.ID, key.ID
	return h
}

func (h *house) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

func (h *house) books(url string) *books.Store {
	h.t.Helper()
	s, err := books.Open(h.t.Context(), books.Config{URL: url, Timeout: 2 * time.Second})
	h.must(err)
	h.t.Cleanup(s.Close)
	return s
}

// settler is one that runs until the test ends.
type settler struct {
	agents *presence.Table
	ready  atomic.Bool
}

// Ready implements orphan.Feed.
func (s *settler) Ready() bool { return s.ready.Load() }

// run starts a settler on the books at the address.
func (h *house) run(url string) *settler {
	h.t.Helper()
	s := &settler{agents: presence.NewTable()}
	s.ready.Store(true)
	queue, err := bus.NewQueue(h.nats.Core("broker"))
	h.must(err)
	o := orphan.New(queue, h.books(url), s.agents, s, natstest.Log)
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- o.Run(ctx) }()
	h.t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			h.t.Error(err)
		}
	})
	return s
}

// beat lets a run of an agent be there.
func (s *settler) beat(h *house, incarnation schemas.Incarnation, state schemas.AgentState) {
	s.agents.Observe(h.tenant, h.agent, &schemas.Heartbeat{Incarnation: incarnation, State: state}, time.Now())
}

// owner is one that holds a lease.
func (h *house) owner() books.Lease {
	h.t.Helper()
	lease, err := h.s.RenewLease(h.t.Context(), schemas.NewOwnerID(), time.Minute)
	h.must(err)
	return lease
}

// admit lets requests in, each with a prompt of at most 100 tokens and a reply of at most
// 300, that the agent of the house works on.
func (h *house) admit(lease books.Lease, n int) []schemas.RequestID {
	h.t.Helper()
	turn := books.Turn{Lease: lease}
	for range n {
		turn.Admit = append(turn.Admit, books.Ask{
			Request: schemas.NewRequestID(), Tenant: h.tenant, Key: h.key, Model: model, Prompt: 100, Limit: 300,
			Agent: h.agent, Timeout: time.Hour,
		})
	}
	out, err := h.s.Turn(h.t.Context(), turn)
	h.must(err)
	ids := make([]schemas.RequestID, n)
	for i, d := range out.Admit {
		if d.Reason != books.Admitted {
			h.t.Fatalf("refused: %s", d.Reason)
		}
		ids[i] = turn.Admit[i].Request
	}
	return ids
}

// die ends the lease of an owner.
func (h *house) die(lease books.Lease) {
	h.t.Helper()
	h.must(h.s.EndLease(h.t.Context(), lease))
}

func (h *house) report(id schemas.RequestID, usage schemas.Usage) {
	h.t.Helper()
	h.reportAs(h.tenant, h.agent, id, usage)
}

func (h *house) reportAs(tenant schemas.TenantID, agent schemas.AgentID, id schemas.RequestID, usage schemas.Usage) {
	h.t.Helper()
	h.must(bus.ReportUsage(h.t.Context(), h.nc, tenant, agent, &schemas.UsageReport{
		Version: schemas.ProtocolVersion, Request: id, Attempt: 1, Usage: usage,
	}))
}

// reportAgain reports until it is stored, as a worker does.
func (h *house) reportAgain(id schemas.RequestID, usage schemas.Usage) {
	h.t.Helper()
	for deadline := time.Now().Add(patience); ; {
		err := bus.ReportUsage(h.t.Context(), h.nc, h.tenant, h.agent, &schemas.UsageReport{
			Version: schemas.ProtocolVersion, Request: id, Attempt: 1, Usage: usage,
		})
		if err == nil {
			return
		}
		if !bus.Down(err) || time.Now().After(deadline) {
			h.t.Fatal(err)
		}
	}
}

// account is what the key has spent and holds, in tokens.
func (h *house) account() (spent, reserved int64) {
	h.t.Helper()
	a, err := h.s.Account(h.t.Context(), h.key)
	h.must(err)
	return a.Spent / perToken, a.Reserved / perToken
}

// wantAccount waits until the key has spent and holds so many tokens.
func (h *house) wantAccount(spent, reserved int64) {
	h.t.Helper()
	var s, r int64
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		if s, r = h.account(); s == spent && r == reserved {
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("the key has spent %d tokens and holds %d, want %d and %d", s, r, spent, reserved)
		}
	}
}

// left counts the reports in the stream.
func (h *house) left() int {
	h.t.Helper()
	js, err := h.nc.JetStream()
	h.must(err)
	info, err := js.StreamInfo(schemas.UsageStream)
	h.must(err)
	return int(info.State.Msgs)
}

func (h *house) wantLeft(n int) {
	h.t.Helper()
	for deadline := time.Now().Add(patience); h.left() != n; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			h.t.Fatalf("%d reports are left, want %d", h.left(), n)
		}
	}
}

// A report is settled once the owner's lease is gone, and not before.
func TestReport(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.run(h.url)
	lease := h.owner()
	ids := h.admit(lease, 2)
	h.report(ids[0], schemas.Usage{PromptTokens: 60, CompletionTokens: 40})
	h.report(ids[1], schemas.Usage{CompletionTokens: 7}) // of an unknown prompt
	time.Sleep(1500 * time.Millisecond)                  // more than one try
	if spent, reserved := h.account(); spent != 0 || reserved != 800 || h.left() != 2 {
		t.Fatalf("spent %d and holds %d while the owner has a lease, and %d reports are left", spent, reserved, h.left())
	}
	h.die(lease)
	died := time.Now()
	h.wantAccount(60+40+100+7, 0)
	if took := time.Since(died); took > 2*time.Second+slack {
		t.Errorf("that took %s", took)
	}
	h.wantLeft(0)
}

// Reports that change nothing go away.
func TestReportsOfNothing(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.run(h.url).beat(h, schemas.NewIncarnation(), schemas.AgentUp)
	lease := h.owner()
	ids := h.admit(lease, 2)
	// The first one was settled by its owner, whose answer the worker missed.
	_, err := h.s.Turn(t.Context(), books.Turn{Settle: []books.Settlement{
		{Request: ids[0], Key: h.key, Completion: 50, Outcome: books.OutcomeDone},
	}})
	h.must(err)
	h.die(lease)
	usage := schemas.Usage{PromptTokens: 1, CompletionTokens: 299}
	h.report(ids[0], usage)
	h.report(schemas.NewRequestID(), usage)
	h.reportAs(h.tenant, schemas.NewAgentID(), ids[1], usage)
	h.reportAs(schemas.NewTenantID(), h.agent, ids[1], usage)
	for _, poison := range []string{"", "null", "{", `{"v":2}`, `{"v":1}`, `{"v":1,"request":"x","completion_tokens":-1}`, "\x00"} {
		_, err := h.nc.Request(schemas.UsageSubject(h.tenant, h.agent), []byte(poison), patience)
		h.must(err)
	}
	_, err = h.nc.Request(schemas.Prefix+"usage.x", []byte("{}"), patience)
	h.must(err)
	h.wantLeft(0)
	h.wantAccount(150, 400)
	// And don't stand in the way of one that counts.
	h.report(ids[1], usage)
	h.wantAccount(450, 0)
}

// A worker that doesn't get to know that its report has arrived sends it again.
func TestReportThatIsRepeated(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	lease := h.owner()
	id := h.admit(lease, 1)[0]
	h.die(lease)
	for range 3 {
		h.report(id, schemas.Usage{PromptTokens: 60, CompletionTokens: 40})
	}
	if n := h.left(); n != 1 {
		t.Errorf("the report is stored %d times", n)
	}
	h.nats.Restart(nil)
	h.reportAgain(id, schemas.Usage{PromptTokens: 60, CompletionTokens: 40})
	if n := h.left(); n != 1 {
		t.Errorf("the report is stored %d times after a restart", n)
	}
	h.run(h.url)
	h.wantAccount(100, 0)
	h.wantLeft(0)
}

// Two brokers share the reports, over a restart of the bus, and each request is charged
// once.
func TestTwoBrokers(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	for range 2 {
		h.run(h.url).beat(h, schemas.NewIncarnation(), schemas.AgentUp)
	}
	lease := h.owner()
	const n = 120
	ids := h.admit(lease, n)
	for _, id := range ids[:n/2] {
		h.report(id, schemas.Usage{PromptTokens: 60, CompletionTokens: 40})
	}
	h.nats.Restart(nil)
	h.die(lease)
	for _, id := range ids[n/2:] {
		h.reportAgain(id, schemas.Usage{PromptTokens: 60, CompletionTokens: 40})
	}
	h.wantAccount(n*100, 0)
	h.wantLeft(0)
}

// While the books are away, reports wait.
func TestBooksThatAreAway(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	proxy := faultproxy.New(t, h.url)
	h.run(proxy.URL())
	lease := h.owner()
	ids := h.admit(lease, 2)
	h.die(lease)
	proxy.Cut()
	h.report(ids[0], schemas.Usage{PromptTokens: 60, CompletionTokens: 40})
	time.Sleep(1500 * time.Millisecond) // more than one try
	if spent, reserved := h.account(); spent != 0 || reserved != 800 || h.left() != 1 {
		t.Fatalf("spent %d and holds %d without books, and %d reports are left", spent, reserved, h.left())
	}
	proxy.Restore()
	h.wantAccount(100+100, 0) // the second has no agent that is there
	h.wantLeft(0)
}

// open lists the requests that are still open and have no owner.
func (h *house) open(ids []schemas.RequestID) (still []schemas.RequestID) {
	h.t.Helper()
	list, err := h.s.Orphans(h.t.Context())
	h.must(err)
	for _, id := range ids {
		if slices.ContainsFunc(list, func(o books.Orphaned) bool { return o.Request == id }) {
			still = append(still, id)
		}
	}
	return still
}

// A request whose owner is dead is expired when its agent is gone.
func TestExpire(t *testing.T) {
	t.Parallel()
	type act func(s *settler, h *house)
	beat := func(incarnation schemas.Incarnation, state schemas.AgentState) act {
		return func(s *settler, h *house) { s.beat(h, incarnation, state) }
	}
	lose := func(incarnation schemas.Incarnation) act {
		return func(s *settler, h *house) { s.agents.Lost(h.tenant, h.agent, incarnation) }
	}
	cases := []struct {
		name          string
		expired       bool
		before, after []act // its admission
	}{
		{"nobody has heard of the agent", true, nil, nil},
		{"the agent is here", false, []act{beat("1", schemas.AgentUp)}, nil},
		{"it drains", false, []act{beat("1", schemas.AgentUp)}, []act{beat("1", schemas.AgentDraining)}},
		{"it says goodbye", true, []act{beat("1", schemas.AgentUp)}, []act{beat("1", schemas.AgentBye)}},
		{"it is lost", true, []act{beat("1", schemas.AgentUp)}, []act{lose("1")}},
		{"it seemed to be lost", false, []act{beat("1", schemas.AgentUp)}, []act{lose("1"), beat("1", schemas.AgentUp)}},
		{"it has started again", true, []act{beat("1", schemas.AgentUp)}, []act{beat("2", schemas.AgentUp)}},
		{
			"it has started again, and seemed to be lost", true, []act{beat("1", schemas.AgentUp)},
			[]act{beat("2", schemas.AgentUp), lose("2"), beat("2", schemas.AgentUp)},
		},
		{"it had started again before", false, []act{beat("1", schemas.AgentUp), beat("2", schemas.AgentUp)}, nil},
		{
			"it had started again often", true, []act{beat("1", schemas.AgentUp)},
			[]act{
				beat("2", schemas.AgentUp), beat("3", schemas.AgentUp), beat("4", schemas.AgentUp), beat("5", schemas.AgentUp), beat("6", schemas.AgentUp),
				beat("7", schemas.AgentUp), lose("7"), beat("7", schemas.AgentUp), beat("8", schemas.AgentUp), beat("9", schemas.AgentUp),
			},
		},
	}
	h := newHouse(t)
	s := h.run(h.url)
	// The clock of the books isn't asked at the very moment at which an agent acts.
	apart := func() { time.Sleep(time.Second) }
	agents := make([]schemas.AgentID, len(cases))
	as := func(i int, acts []act) {
		h.agent = agents[i]
		for _, a := range acts {
			a(s, h)
		}
	}
	for i := range cases {
		agents[i] = schemas.NewAgentID()
		as(i, cases[i].before)
	}
	apart()
	lease := h.owner()
	ids := make([]schemas.RequestID, len(cases))
	for i := range cases {
		h.agent = agents[i]
		ids[i] = h.admit(lease, 1)[0]
	}
	apart()
	for i := range cases {
		as(i, cases[i].after)
	}
	time.Sleep(4 * time.Second)
	if spent, reserved := h.account(); spent != 0 || reserved != 400*int64(len(cases)) {
		t.Fatalf("while the owner lives, the key has spent %d and holds %d", spent, reserved)
	}
	dying := time.Now()
	h.die(lease)
	died := time.Now()
	for len(h.open(ids)) == len(ids) {
		if time.Since(died) > patience {
			t.Fatal("nothing is expired")
		}
	}
	if time.Since(dying) < 1500*time.Millisecond || time.Since(died) > 3*time.Second+slack {
		t.Errorf("the first was expired after %s", time.Since(died))
	}
	living := 0
	for _, c := range cases {
		if !c.expired {
			living++
		}
	}
	for len(h.open(ids)) > living && time.Since(died) < patience {
		time.Sleep(5 * time.Millisecond)
	}
	time.Sleep(2 * time.Second) // that no other goes has no signal
	still := h.open(ids)
	open := int64(len(still))
	for i, c := range cases {
		if expired := !slices.Contains(still, ids[i]); expired != c.expired {
			t.Errorf("%s: expired: %t", c.name, expired)
		}
	}
	if spent, reserved := h.account(); spent != 100*(int64(len(cases))-open) || reserved != 400*open {
		t.Errorf("the key has spent %d and holds %d", spent, reserved)
	}
}

// While the table of agents can't be believed nothing is expired, and afterwards not
// before the time of grace.
func TestTableThatCannotBeBelieved(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	s := h.run(h.url)
	lease := h.owner()
	ids := h.admit(lease, 1)
	h.die(lease)
	time.Sleep(700 * time.Millisecond) // seen, and not long enough
	s.ready.Store(false)
	time.Sleep(3 * time.Second)
	if len(h.open(ids)) != 1 {
		t.Fatal("expired for an agent of which nobody knows whether it is here")
	}
	ready := time.Now()
	s.ready.Store(true)
	h.wantAccount(100, 0)
	if took := time.Since(ready); took < 1500*time.Millisecond || took > 3*time.Second+slack {
		t.Errorf("expired after %s", took)
	}
}

// A report that is there counts, though its agent is gone by now.
func TestLastWord(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	for range 2 {
		h.run(h.url)
	}
	lease := h.owner()
	ids := h.admit(lease, 30)
	for _, id := range ids {
		h.report(id, schemas.Usage{PromptTokens: 60, CompletionTokens: 40})
	}
	time.Sleep(300 * time.Millisecond) // they have been tried
	h.die(lease)
	h.wantAccount(30*100, 0)
}

// An agent that comes back in time can still report.
func TestAgentThatComesBack(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	s := h.run(h.url)
	s.beat(h, "1", schemas.AgentUp)
	lease := h.owner()
	id := h.admit(lease, 1)[0]
	s.agents.Lost(h.tenant, h.agent, "1")
	h.die(lease)
	time.Sleep(700 * time.Millisecond) // of two seconds
	s.beat(h, "1", schemas.AgentUp)
	time.Sleep(3 * time.Second)
	h.report(id, schemas.Usage{PromptTokens: 60, CompletionTokens: 40})
	h.wantAccount(100, 0)
}

// broken are books that fail in ways of their own.
type broken struct {
	*books.Store
	mu    sync.Mutex
	fails int // how many calls still fail
}

func (b *broken) fail() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.fails == 0 {
		return nil
	}
	b.fails--
	return errors.New("no")
}

func (b *broken) SettleOrphan(ctx context.Context, tenant schemas.TenantID, agent schemas.AgentID, r *schemas.UsageReport) (books.Orphan, error) {
	if err := b.fail(); err != nil {
		return "", err
	}
	return b.Store.SettleOrphan(ctx, tenant, agent, r)
}

// A failure of any kind loses no report.
func TestFailures(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	b := &broken{Store: h.s, fails: 5}
	table := presence.NewTable()
	queue, err := bus.NewQueue(h.nats.Core("broker"))
	h.must(err)
	o := orphan.New(queue, b, table, &settler{}, natstest.Log)
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- o.Run(ctx) }()
	defer func() {
		stop()
		h.must(<-ended)
	}()
	lease := h.owner()
	ids := h.admit(lease, 3)
	h.die(lease)
	for _, id := range ids {
		h.report(id, schemas.Usage{PromptTokens: 60, CompletionTokens: 40})
	}
	h.wantAccount(300, 0)
	h.wantLeft(0)
}
