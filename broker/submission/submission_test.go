package submission_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/desk"
	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/broker/keyring"
	"github.com/ownllm/ownllm/broker/presence"
	"github.com/ownllm/ownllm/broker/quota"
	"github.com/ownllm/ownllm/broker/submission"
	"github.com/ownllm/ownllm/internal/natstest"
	"github.com/ownllm/ownllm/internal/pgtest"
	"github.com/ownllm/ownllm/schemas"
)

func TestMain(m *testing.M) {
	pgtest.Main(m, goleak.IgnoreTopFunction("github.com/jackc/pgx/v5/pgxpool.(*Pool).backgroundHealthCheck"))
}

const model = "m"

// house is a scheduler on real books and a real bus. No agent is there but in the table.
type house struct {
	t       *testing.T
	store   *books.Store
	counted *counted
	table   *presence.Table
	keys    *keyring.Keyring
	gate    *quota.Gate
	feed    *presence.Feed
	s       *submission.Scheduler
	key     books.Key
	id      books.Identity
}

func newHouse(t *testing.T, cfg submission.Config) *house {
	t.Helper()
	h := &house{t: t, table: presence.NewTable()}
	var err error
	if h.store, err = books.Open(t.Context(), books.Config{URL: pgtest.New(t)}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.store.Close)
	h.counted = &counted{Store: h.store}
	tenant, err := h.store.CreateTenant(t.Context(), books.NewTenant{Slug: "acme"})
	h.must(err)
	user, err := h.store.CreateUser(t.Context(), books.NewUser{Tenant: "acme", Email: "a@b"})
	h.must(err)
	h.key, _, err = h.store.CreateKey(t.Context(), books.NewKey{Tenant: string(tenant.ID), User: string(user.ID), Scopes: []string{"model:" + model}})
	h.must(err)
	server := natstest.Start(t)
	nc := server.Connect("tokens")
	_, queue := server.Queue(10)
	h.feed = presence.NewFeed(nc, h.table, natstest.Log)
	h.keys = keyring.New(h.store, natstest.Log)
	h.gate = quota.New(h.store, quota.Config{}, natstest.Log)
	h.s = submission.New(submission.Parts{
		Books: h.counted, Keys: h.keys, Desk: desk.New(h.table, h.feed), Agents: h.table, Feed: h.feed, Gate: h.gate,
		Dispatcher: dispatch.New(dispatch.Parts{
			Tokens: nc, Bulk: server.Connect("bulk"), Queue: queue, Agents: h.table, Feed: h.feed, Gate: h.gate, Log: natstest.Log,
		}, dispatch.DefaultConfig()),
		Ingress: server.Ingress("submissions"), Log: natstest.Log,
	}, cfg)
	h.id, err = h.keys.Identify(t.Context(), h.key.ID)
	h.must(err)
	return h
}

func (h *house) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

// until waits for something.
func (h *house) until(ok func() bool) {
	h.t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			h.t.Fatal("waited too long")
		}
	}
}

// counted are books that count what is returned. A look for strays may ask for that, too, when
// a run has just done it.
type counted struct {
	*books.Store
	returned atomic.Int64
}

func (c *counted) ReturnSubmission(ctx context.Context, r books.Return) (bool, error) {
	ok, err := c.Store.ReturnSubmission(ctx, r)
	if ok {
		c.returned.Add(1)
	}
	return ok, err
}

// run runs a part until the test ends.
func (h *house) run(parts ...func(context.Context) error) {
	for _, part := range parts {
		ctx, stop := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() { ended <- part(ctx) }()
		h.t.Cleanup(func() {
			stop()
			if err := <-ended; err != nil {
				h.t.Error(err)
			}
		})
	}
}

func (h *house) submit(id, request string, deadline *int) (schemas.Accepted, error) {
	return h.s.Submit(h.t.Context(), h.id, schemas.SubmitRequest{ID: id, Request: json.RawMessage(request), DeadlineSeconds: deadline})
}

const request = `{"model":"m","messages":[{"role":"user","content":"Hello"}]}`

func wantCode(t *testing.T, err error, code schemas.Code) {
	t.Helper()
	var refusal *schemas.Error
	if !errors.As(err, &refusal) || refusal.Code != code {
		t.Errorf("%v, want %s", err, code)
	}
}

func TestSubmit(t *testing.T) {
	h := newHouse(t, submission.Config{})
	got, err := h.submit("a", request, nil)
	h.must(err)
	if want := (schemas.Accepted{Kind: "accepted", ID: "a", State: schemas.SubmissionWaiting}); got != want {
		t.Errorf("%+v", got)
	}
	// White space is no difference.
	if got, err = h.submit("a", strings.ReplaceAll(request, ":", " :\n"), nil); err != nil || !got.Duplicate {
		t.Errorf("%+v, %v", got, err)
	}
	_, err = h.submit("a", strings.ReplaceAll(request, "Hello", "Bye"), nil)
	wantCode(t, err, schemas.CodeInvalidValue)
	_, err = h.submit("b", `{"model":"m","messages":[]}`, nil)
	wantCode(t, err, schemas.CodeMessagesRequired)
	_, err = h.submit("b", strings.ReplaceAll(request, `"m"`, `"other"`), nil)
	wantCode(t, err, schemas.CodeScopeRequired)
	for _, seconds := range []int{-1 << 60, -1, 0, 7*86400 + 1, 1 << 60} {
		_, err = h.submit("b", request, &seconds)
		wantCode(t, err, schemas.CodeInvalidValue)
	}
	_, err = h.submit("b", request, new(7*86400))
	h.must(err)
}

// Who waits for a result has it when it is there, whoever ended the submission.
func TestResult(t *testing.T) {
	h := newHouse(t, submission.Config{Poll: 20 * time.Millisecond})
	h.run(h.s.Run)
	_, err := h.s.Result(t.Context(), h.key.ID, schemas.ResultRequest{ID: "a", WaitSeconds: 60})
	wantCode(t, err, schemas.CodeInvalidValue)
	_, err = h.submit("a", request, nil)
	h.must(err)
	r, err := h.s.Result(t.Context(), h.key.ID, schemas.ResultRequest{ID: "a"})
	h.must(err)
	if r.State != schemas.SubmissionWaiting || r.Created == 0 || r.Finished != 0 {
		t.Errorf("%+v", r)
	}
	// Somebody whose broker shuts its door meanwhile hears how it stands.
	gone, leave := context.WithCancel(t.Context())
	answers := make(chan *schemas.Result, 2)
	for _, ctx := range []context.Context{gone, t.Context()} {
		go func() {
			r, err := h.s.Result(ctx, h.key.ID, schemas.ResultRequest{ID: "a", WaitSeconds: 60})
			if err != nil {
				t.Error(err)
			}
			answers <- r
		}()
	}
	h.until(func() bool { return h.s.Waiting() > 0 })
	leave()
	if r := <-answers; r == nil || r.State != schemas.SubmissionWaiting {
		t.Errorf("%+v", r)
	}
	_, err = h.store.RevokeKey(t.Context(), h.key.ID)
	h.must(err)
	if r := <-answers; r == nil || r.State != schemas.SubmissionError || r.Error == nil || r.Error.Code != schemas.CodeKeyInvalid || r.Finished == 0 {
		t.Errorf("%+v", r)
	}
	if n := h.s.Waiting(); n != 0 {
		t.Errorf("%d still wait", n)
	}
}

// What can't be run waits, and its key isn't tried all the time.
func TestNoHotLoop(t *testing.T) {
	h := newHouse(t, submission.Config{Poll: 50 * time.Millisecond})
	h.run(h.gate.Run, h.feed.Run, h.keys.Run)
	h.until(func() bool { return h.gate.Ready() && h.feed.Ready() })
	// The model is known, and its agent is away.
	h.table.Restore(presence.Known{Tenant: h.id.Tenant, Agent: schemas.NewAgentID(), Inventory: schemas.Inventory{Models: []schemas.Model{{ID: model, Capabilities: schemas.Capabilities{Completion: true}}}}})
	for i := range 20 {
		_, err := h.submit(string(rune('a'+i)), request, nil)
		h.must(err)
	}
	h.run(h.s.Run)
	// The first look takes them all; then one goes ahead, after 1 s and after 3 s.
	h.until(func() bool { return h.counted.returned.Load() >= 20 })
	time.Sleep(2500 * time.Millisecond)
	if n := h.counted.returned.Load(); n < 20 || n > 24 {
		t.Errorf("%d runs were refused, want 20 and one or two more", n)
	}
}

func TestJudge(t *testing.T) {
	full, held := quota.Rate{Known: true}, quota.Rate{Known: true, RequestsLeft: 1}
	for _, c := range []struct {
		code  schemas.Code
		begun bool
		rate  quota.Rate
		waits books.WaitsFor
		lost  bool
	}{
		{schemas.CodeConcurrencyLimit, false, full, books.WaitsForSlot, false},
		{schemas.CodeConcurrencyLimit, false, held, books.WaitsForMoney, false},
		{schemas.CodeConcurrencyLimit, false, quota.Rate{}, books.WaitsForSlot, false},
		{schemas.CodeTenantQPSLimit, false, full, books.WaitsForTime, false},
		{schemas.CodeModelLoading, true, full, books.WaitsForModel, false},
		{schemas.CodeQueueFull, false, full, books.WaitsForModel, false},
		{schemas.CodeAgentOffline, false, full, books.WaitsForModel, false},
		{schemas.CodeAgentOffline, true, full, books.WaitsForModel, true},
		{schemas.CodeTunnelDown, false, full, books.WaitsForModel, false},
		{schemas.CodeInternalError, false, full, books.WaitsForModel, false},
		{schemas.CodeInternalError, true, full, books.WaitsForModel, true},
		{schemas.CodeAgentTimeout, false, full, books.WaitsForModel, false},
		{schemas.CodeAgentTimeout, true, full, "", false},
		{schemas.CodeBudgetExceeded, false, full, "", false},
		{schemas.CodeBackendError, true, full, "", false},
		{schemas.CodeModelNotFound, false, full, "", false},
		{schemas.CodeKeyInvalid, true, full, "", false},
		{schemas.CodeContextLengthExceeded, true, full, "", false},
	} {
		waits, pause, lost := submission.Judge(schemas.Errorf(c.code, "m"), c.begun, c.rate)
		if waits != c.waits || lost != c.lost || (waits == books.WaitsForTime) != (pause > 0) {
			t.Errorf("%+v: %q, %s, %v", c, waits, pause, lost)
		}
	}
	if _, pause, _ := submission.Judge(schemas.Errorf(schemas.CodeTenantQPSLimit, "m").WithRetryAfter(time.Minute), false, full); pause != time.Minute {
		t.Errorf("a rate pauses for %s", pause)
	}
	for tries, want := range map[int]time.Duration{0: time.Second, 1: time.Second, 2: 2 * time.Second, 4: 8 * time.Second, 5: 10 * time.Second, 1000: 10 * time.Second} {
		if got := submission.Backoff(tries); got != want {
			t.Errorf("the pause after %d tries is %s, want %s", tries, got, want)
		}
	}
}

// A model gets as many as it has slots, and a few more.
func TestRoom(t *testing.T) {
	h := newHouse(t, submission.Config{})
	agent, now := schemas.NewAgentID(), time.Now()
	inventory := schemas.Inventory{Models: []schemas.Model{{ID: model, State: schemas.ModelReady}}}
	list := make([]books.Claim, 100)
	for i := range list {
		list[i] = books.Claim{Key: "a", Tenant: h.id.Tenant, Model: model}
	}
	enter := func() (n int) {
		for i, entered := range h.s.Enter(list) {
			if entered {
				n++
				defer h.s.Leave(&list[i])
			}
		}
		return n
	}
	if n := enter(); n != 100 {
		t.Errorf("%d enter where nobody is, want all: they are told why", n)
	}
	for slots, want := range map[int]int{1: 2, 2: 3, 4: 5, 8: 10, 0: 2} {
		h.table.Observe(h.id.Tenant, agent, &schemas.Heartbeat{
			Version: schemas.ProtocolVersion, Incarnation: schemas.NewIncarnation(), State: schemas.AgentUp, Hash: inventory.Hash(), Inventory: &inventory, Slots: slots,
		}, now)
		if n := enter(); n != want {
			t.Errorf("%d enter for %d slots, want %d", n, slots, want)
		}
	}
}

// Where there isn't room for all, keys take turns, however many each has claimed, and in
// whatever order that was.
func TestTurns(t *testing.T) {
	h := newHouse(t, submission.Config{})
	inventory := schemas.Inventory{Models: []schemas.Model{{ID: model, State: schemas.ModelReady}}}
	h.table.Observe(h.id.Tenant, schemas.NewAgentID(), &schemas.Heartbeat{
		Version: schemas.ProtocolVersion, Incarnation: schemas.NewIncarnation(), State: schemas.AgentUp, Hash: inventory.Hash(), Inventory: &inventory, Slots: 4,
	}, time.Now())
	claims := func(keys string) (list []books.Claim) {
		for _, k := range keys {
			list = append(list, books.Claim{Key: schemas.KeyID(k), Tenant: h.id.Tenant, Model: model})
		}
		return list
	}
	enter := func(keys string) (in []books.Claim) {
		list := claims(keys)
		for i, entered := range h.s.Enter(list) {
			if entered {
				in = append(in, list[i])
			}
		}
		return in
	}
	inside := enter("aaaaaaaa")
	if len(inside) != 5 {
		t.Fatalf("%d enter, want 5", len(inside))
	}
	for _, turn := range []struct{ who, enters string }{
		{"aab", "b"}, {"aab", "a"}, {"baa", "b"}, {"abc", "c"}, {"cba", "a"}, {"ab", "b"}, {"aaaaa", "a"}, {"ad", "d"},
	} {
		h.s.Leave(&inside[0])
		inside = inside[1:]
		in := enter(turn.who)
		if len(in) != 1 || string(in[0].Key) != turn.enters {
			t.Errorf("of %q there enter %v, want %s", turn.who, in, turn.enters)
		}
		inside = append(inside, in...)
	}
	// A model that is never idle doesn't come to know all keys, and knows the last ones.
	for i := range 3 * submission.MostTurns {
		h.s.Leave(&inside[0])
		next := books.Claim{Key: schemas.KeyID(fmt.Sprint(i)), Tenant: h.id.Tenant, Model: model}
		if in := h.s.Enter([]books.Claim{inside[1], next}); in[0] || !in[1] {
			t.Fatalf("the key that had a turn just now, and key %d: %v enter", i, in)
		}
		inside = append(inside[1:], next)
	}
	if n := h.s.Turns(); n > submission.MostTurns || n < submission.MostTurns/2 {
		t.Errorf("%d turns are known", n)
	}
	for i := range inside {
		h.s.Leave(&inside[i])
	}
	if in := enter("abaa"); len(in) != 4 {
		t.Errorf("%d enter where there is room for all 4", len(in))
	}
}
