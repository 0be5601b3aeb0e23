package books_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/faultproxy"
	"github.com/ownllm/ownllm/internal/pgtest"
	"github.com/ownllm/ownllm/schemas"
)

// client is one key, and a store that admits for it.
type client struct {
	t      testing.TB
	s      *books.Store
	tenant books.Tenant
	user   books.User
	key    books.Key
	lease  books.Lease
}

const testModel = "m"

// price of testModel: 1 cent for 1,000 tokens, so 1,000 micro-cents a token.
const perToken = 1000

type limits struct {
	cents       int64 // 0: no budget
	concurrency int
	qps         int
}

func newClient(t testing.TB, s *books.Store, l limits) *client {
	t.Helper()
	c := &client{t: t, s: s}
	var err error
	c.tenant, err = s.CreateTenant(t.Context(), books.NewTenant{Slug: slug(), QPS: &l.qps})
	c.must(err)
	c.user, err = s.CreateUser(t.Context(), books.NewUser{Tenant: c.tenant.Slug, Email: "a@b"})
	c.must(err)
	n := books.NewKey{Tenant: c.tenant.Slug, User: c.user.Email, Concurrency: &l.concurrency}
	if l.cents > 0 {
		n.BudgetCents = &l.cents
	}
	c.key, _, err = s.CreateKey(t.Context(), n)
	c.must(err)
	_, err = s.SetPrice(t.Context(), c.tenant.Slug, testModel, books.MicroCents)
	c.must(err)
	c.lease, err = s.RenewLease(t.Context(), schemas.NewOwnerID(), time.Minute)
	c.must(err)
	return c
}

func (c *client) must(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
}

func (c *client) ask(prompt, limit int64) books.Ask {
	return books.Ask{
		Request: schemas.NewRequestID(), Tenant: c.tenant.ID, Key: c.key.ID, Model: testModel,
		Prompt: prompt, Limit: limit, Timeout: 10 * time.Minute,
	}
}

func (c *client) admit(asks ...books.Ask) []books.Decision {
	c.t.Helper()
	out, err := c.s.Turn(c.t.Context(), books.Turn{Admit: asks, Lease: c.lease})
	c.must(err)
	return out.Admit
}

func (c *client) settle(a books.Ask, prompt, completion int64, outcome books.Outcome) books.State {
	c.t.Helper()
	out, err := c.s.Turn(c.t.Context(), books.Turn{Settle: []books.Settlement{
		{Request: a.Request, Key: a.Key, Prompt: &prompt, Completion: completion, Outcome: outcome},
	}})
	c.must(err)
	return out.Settled[0]
}

func (c *client) alter(a books.Alter) books.Altered {
	c.t.Helper()
	out, err := c.s.Turn(c.t.Context(), books.Turn{Alter: []books.Alter{a}})
	c.must(err)
	return out.Altered[0]
}

// holds checks what the key holds, in tokens.
func (c *client) holds(inFlight int, spent, reserved int64) {
	c.t.Helper()
	got, err := c.s.Account(c.t.Context(), c.key.ID)
	c.must(err)
	if want := (books.Account{InFlight: inFlight, Spent: spent * perToken, Reserved: reserved * perToken}); got != want {
		c.t.Errorf("the key has %+v, want %+v", got, want)
	}
}

// rows counts the rows of the ledger of a request.
func (c *client) rows(id schemas.RequestID) int {
	c.t.Helper()
	n, err := books.Query[int](c.t.Context(), c.s, `SELECT count(*) FROM ledger WHERE request_id = $1`, id)
	c.must(err)
	return n
}

func reasons(list []books.Decision) (r []books.Reason) {
	for _, d := range list {
		r = append(r, d.Reason)
	}
	return r
}

func TestAdmitBudget(t *testing.T) {
	c := newClient(t, open(t), limits{cents: 1, concurrency: 32, qps: 1000}) // pays for 1,000 tokens
	a, b := c.ask(100, 300), c.ask(100, 500)
	got := c.admit(a, c.ask(100, 901), b, c.ask(100, 1), c.ask(1, 0))
	if diff := cmp.Diff([]books.Reason{books.Admitted, books.ReasonBudget, books.Admitted, books.ReasonMoneyHeld, books.ReasonMoneyHeld}, reasons(got)); diff != "" {
		t.Fatal(diff)
	}
	first := got[0]
	month := time.Date(time.Now().UTC().Year(), time.Now().UTC().Month(), 1, 0, 0, 0, 0, time.UTC)
	want := books.Decision{
		Limit: 300, Amount: 400 * perToken, Price: books.MicroCents, Month: month, Slots: 32, SlotsFree: 31,
		Budget: new(int64(books.MicroCents)), BudgetFree: 600 * perToken,
	}
	if diff := cmp.Diff(want, first); diff != "" {
		t.Error(diff)
	}
	if w := got[1].Wait; w <= 0 || w > 31*24*time.Hour {
		t.Errorf("the next month is in %v", w)
	}
	c.holds(2, 0, 1000)

	// A second time, it takes nothing more.
	if again := c.admit(a)[0]; again.Reason != "" || again.Limit != 300 || again.Amount != first.Amount {
		t.Errorf("again: %+v", again)
	}
	c.holds(2, 0, 1000)

	if state := c.settle(a, 90, 60, books.OutcomeDone); state != books.StateOpen {
		t.Errorf("settled what was %s", state)
	}
	c.holds(1, 150, 600)
	for range 2 {
		if state := c.settle(a, 90, 60, books.OutcomeDone); state != books.StateSettled || c.rows(a.Request) != 1 {
			t.Errorf("settled again what was %s, %d rows", state, c.rows(a.Request))
		}
	}
	c.holds(1, 150, 600)
	if again := c.admit(a)[0]; again.Reason != books.ReasonEnded {
		t.Errorf("admitted after its end: %+v", again)
	}

	// An open end gets the default, or what is left if nothing else is in flight.
	if got := c.admit(c.ask(10, 0)); got[0].Reason != books.ReasonMoneyHeld {
		t.Errorf("open end beside another: %+v", got)
	}
	c.settle(b, 50, 50, books.OutcomeCancelled)
	c.holds(0, 250, 0)
	last := c.ask(10, 0)
	if got := c.admit(last)[0]; got.Reason != "" || got.Limit != 740 || got.BudgetFree != 0 {
		t.Errorf("open end alone: %+v", got)
	}
	// More than was held isn't charged.
	c.settle(last, 10, 100_000, books.OutcomeDone)
	c.holds(0, 1000, 0)
	if got := c.admit(c.ask(0, 1), c.ask(0, 0)); got[0].Reason != books.ReasonBudget || got[1].Reason != books.ReasonBudget {
		t.Errorf("all is spent: %+v", got)
	}
	free := c.ask(1_000_000, 1_000_000)
	free.Model = "free"
	if got := c.admit(free)[0]; got.Reason != "" || got.Amount != 0 {
		t.Errorf("a model without a price: %+v", got)
	}
}

func TestAdmitOpenEnd(t *testing.T) {
	c := newClient(t, open(t), limits{cents: 10, concurrency: 32, qps: 1000})
	if got := c.admit(c.ask(10, 0))[0]; got.Limit != books.DefaultOpenTokens {
		t.Errorf("%+v", got)
	}
	out, err := c.s.Turn(t.Context(), books.Turn{Admit: []books.Ask{c.ask(10, 0)}, Lease: c.lease, OpenTokens: 77})
	if err != nil || out.Admit[0].Limit != 77 {
		t.Errorf("%+v, %v", out, err)
	}
}

func TestAdmitBounds(t *testing.T) {
	c := newClient(t, open(t), limits{concurrency: 1_000_000, qps: 1_000_000})
	if _, err := c.s.SetPrice(t.Context(), "", "dear", books.MaxPrice); err != nil {
		t.Fatal(err)
	}
	for _, model := range []string{"dear", "free", testModel} {
		a := c.ask(1<<62, 1<<62)
		a.Model, a.Timeout = model, 1<<62
		if got := c.admit(a)[0]; got.Reason != "" || got.Limit != books.MaxTokens {
			t.Errorf("%s: %+v", model, got)
		}
		if state := c.settle(a, 1<<62, 1<<62, books.OutcomeDone); state != books.StateOpen {
			t.Errorf("%s: %s", model, state)
		}
		a = c.ask(-1, -1)
		if got := c.admit(a)[0]; got.Reason != "" || got.Limit != books.DefaultOpenTokens {
			t.Errorf("%s: %+v", model, got)
		}
		c.settle(a, -1, -1, books.OutcomeDone)
	}
}

func TestAdmitInvalid(t *testing.T) {
	s := open(t)
	c := newClient(t, s, limits{concurrency: 32, qps: 1000})
	check := func(name string, want books.Reason, a books.Ask) {
		t.Helper()
		if got := c.admit(a)[0]; got.Reason != want {
			t.Errorf("%s: %+v", name, got)
		}
	}
	other := newClient(t, s, limits{concurrency: 32, qps: 1000})
	a := c.ask(1, 1)
	a.Tenant = other.tenant.ID
	check("key of another tenant", books.ReasonKeyInvalid, a)
	a = c.ask(1, 1)
	a.Tenant = schemas.NewTenantID()
	check("no tenant", books.ReasonKeyInvalid, a)
	a = c.ask(1, 1)
	a.Key = schemas.NewKeyID()
	check("no key", books.ReasonKeyInvalid, a)
	kept := c.lease
	c.lease = books.Lease{Owner: schemas.NewOwnerID(), Epoch: 1}
	check("no lease", books.ReasonLease, c.ask(1, 1))
	c.lease = books.Lease{Owner: kept.Owner, Epoch: kept.Epoch + 1}
	check("lease of another epoch", books.ReasonLease, c.ask(1, 1))
	c.lease = kept
	check("fine", books.Admitted, c.ask(1, 1))
	_, err := s.SetUserState(t.Context(), c.user.ID, books.UserDeactivated)
	c.must(err)
	check("deactivated", books.ReasonUserDeactivated, c.ask(1, 1))
	_, err = s.SetTenantState(t.Context(), c.tenant.Slug, books.TenantSuspended)
	c.must(err)
	check("suspended", books.ReasonTenantDisabled, c.ask(1, 1))
	c.must(s.Exec(t.Context(), `UPDATE api_keys SET expires_at = now() WHERE id = $1`, c.key.ID))
	check("expired", books.ReasonKeyExpired, c.ask(1, 1))
	_, err = s.RevokeKey(t.Context(), c.key.ID)
	c.must(err)
	check("revoked", books.ReasonKeyInvalid, c.ask(1, 1))
	c.holds(1, 0, 2)
}

func TestAdmitSlotsAndBucket(t *testing.T) {
	s := open(t)
	now := time.Date(2031, 5, 31, 23, 59, 59, 0, time.UTC)
	s.SetClock(func() time.Time { return now })
	c := newClient(t, s, limits{cents: 1, concurrency: 2, qps: 3})
	asks := []books.Ask{c.ask(0, 10), c.ask(0, 10), c.ask(0, 10), c.ask(0, 2000)}
	got := c.admit(asks...)
	if diff := cmp.Diff([]books.Reason{"", "", books.ReasonNoSlot, books.ReasonBudget}, reasons(got)); diff != "" {
		t.Fatal(diff)
	}
	if got[3].Wait != time.Second {
		t.Errorf("the month ends in %v", got[3].Wait)
	}
	if got[0].SlotsFree != 1 || got[1].SlotsFree != 0 || got[2].Slots != 2 {
		t.Errorf("%+v", got)
	}
	c.settle(asks[0], 0, 10, books.OutcomeDone)
	// The refused took nothing, so one is left in the bucket; then it drips every 1/3 s.
	last := c.ask(0, 10)
	if got := c.admit(last, c.ask(0, 10)); got[0].Reason != "" || got[1].Reason != books.ReasonTenantQPS || got[1].Wait != 334*time.Millisecond {
		t.Errorf("%+v", got)
	}
	c.settle(last, 0, 10, books.OutcomeDone)
	now = now.Add(333 * time.Millisecond)
	if got := c.admit(c.ask(0, 1))[0]; got.Reason != books.ReasonTenantQPS || got.Wait != time.Millisecond {
		t.Errorf("%+v", got)
	}
	now = now.Add(667 * time.Millisecond) // June
	c.holds(1, 0, 0)
	if got := c.admit(c.ask(0, 990))[0]; got.Reason != "" || got.Month.Month() != time.June {
		t.Errorf("%+v", got)
	}
	// What was admitted in May is charged to May.
	c.settle(asks[1], 0, 10, books.OutcomeDone)
	c.holds(1, 0, 990)
	// A clock that was far ahead doesn't lock the tenant out.
	c.must(s.Exec(t.Context(), `UPDATE tenant_buckets SET full_at = 9000000000000000000`))
	if got := c.admit(c.ask(0, 1))[0]; got.Reason != "" {
		t.Errorf("%+v", got)
	}
}

func TestAlter(t *testing.T) {
	c := newClient(t, open(t), limits{cents: 1, concurrency: 32, qps: 1000})
	a, b := c.ask(100, 300), c.ask(100, 100)
	c.admit(a, b)
	want := func(step string, got books.Altered, limit, amount, others int64) {
		t.Helper()
		if diff := cmp.Diff(books.Altered{State: books.StateOpen, Limit: limit, Amount: amount * perToken, Others: others * perToken}, got); diff != "" {
			t.Errorf("%s: %s", step, diff)
		}
	}
	id := func(x books.Alter) books.Alter { x.Request, x.Key = a.Request, a.Key; return x }
	want("nothing", c.alter(id(books.Alter{})), 300, 400, 200)
	want("less", c.alter(id(books.Alter{Limit: 200})), 300, 400, 200)
	want("exact prompt", c.alter(id(books.Alter{Prompt: new(int64(40))})), 300, 340, 200)
	want("more", c.alter(id(books.Alter{Limit: 500})), 500, 540, 200)
	want("again", c.alter(id(books.Alter{Limit: 500})), 500, 540, 200)
	want("more than there is", c.alter(id(books.Alter{Limit: 5000})), 760, 800, 200)
	c.holds(2, 0, 1000)
	c.settle(b, 100, 50, books.OutcomeDone)
	want("what came free", c.alter(id(books.Alter{Limit: 5000})), 810, 850, 0)
	want("longer prompt", c.alter(id(books.Alter{Prompt: new(int64(60))})), 790, 850, 0)
	want("a prompt beyond all", c.alter(id(books.Alter{Prompt: new(int64(10_000))})), 0, 850, 0)
	want("and back", c.alter(id(books.Alter{Prompt: new(int64(60)), Limit: 790})), 790, 850, 0)
	// Whoever lowers the cap can't take back what was granted.
	c.must(c.s.Exec(t.Context(), `UPDATE api_keys SET budget_cents = 0 WHERE id = $1`, c.key.ID))
	want("lower cap", c.alter(id(books.Alter{Limit: 5000})), 790, 850, 0)
	if got := c.admit(c.ask(0, 1))[0]; got.Reason != books.ReasonBudget || got.BudgetFree != 0 {
		t.Errorf("%+v", got)
	}
	c.must(c.s.Exec(t.Context(), `UPDATE api_keys SET budget_cents = NULL WHERE id = $1`, c.key.ID))
	want("no cap", c.alter(id(books.Alter{Limit: 5000})), 5000, 5060, 0)
	c.settle(a, 60, 5000, books.OutcomeDone)
	c.holds(0, 5210, 0)
	if got := c.alter(id(books.Alter{Limit: 6000})); got != (books.Altered{State: books.StateSettled}) {
		t.Errorf("after the end: %+v", got)
	}
	if got := c.alter(books.Alter{Request: schemas.NewRequestID(), Key: a.Key}); got != (books.Altered{State: books.StateUnknown}) {
		t.Errorf("unknown: %+v", got)
	}
}

func TestVoid(t *testing.T) {
	c := newClient(t, open(t), limits{cents: 1, concurrency: 32, qps: 1000})
	a, b := c.ask(1, 1), c.ask(1, 1)
	c.admit(a)
	if state := c.settle(a, 1, 1, books.OutcomeVoid); state != books.StateOpen {
		t.Error(state)
	}
	if state := c.settle(b, 1, 1, books.OutcomeVoid); state != books.StateUnknown {
		t.Error(state)
	}
	if state := c.settle(b, 1, 1, books.OutcomeVoid); state != books.StateSettled {
		t.Error(state)
	}
	for _, x := range []books.Ask{a, b} {
		if got := c.admit(x)[0]; got.Reason != books.ReasonEnded {
			t.Errorf("admitted after it was voided: %+v", got)
		}
		if n := c.rows(x.Request); n != 0 {
			t.Errorf("%d rows", n)
		}
	}
	if state := c.settle(c.ask(1, 1), 1, 1, books.OutcomeDone); state != books.StateUnknown {
		t.Error(state)
	}
	c.holds(0, 0, 0)
}

// In one turn, what is given back is there for whoever asks.
func TestTurnOrder(t *testing.T) {
	c := newClient(t, open(t), limits{cents: 1, concurrency: 1, qps: 1000})
	a, b := c.ask(0, 1000), c.ask(0, 900)
	c.admit(a)
	zero := int64(0)
	out, err := c.s.Turn(t.Context(), books.Turn{
		Settle: []books.Settlement{
			{Request: a.Request, Key: a.Key, Prompt: &zero, Completion: 100, Outcome: books.OutcomeDone},
			{Request: a.Request, Key: a.Key, Prompt: &zero, Completion: 100, Outcome: books.OutcomeDone},
		},
		Admit: []books.Ask{b, b, c.ask(0, 1)}, Lease: c.lease,
	})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]books.State{books.StateOpen, books.StateSettled}, out.Settled); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]books.Reason{"", "", books.ReasonNoSlot}, reasons(out.Admit)); diff != "" {
		t.Error(diff)
	}
	c.holds(1, 100, 900)
	if out, err := c.s.Turn(t.Context(), books.Turn{}); err != nil || out.Admit != nil {
		t.Errorf("an empty turn: %+v, %v", out, err)
	}
}

func TestPrices(t *testing.T) {
	s := open(t)
	household(t, s, "acme")
	for _, p := range []struct {
		tenant, model string
		price         int64
	}{{"", "a", 5}, {"", "b/c:d", 6}, {"acme", "a", 7}, {"acme", "a", 8}} {
		if got, err := s.SetPrice(t.Context(), p.tenant, p.model, p.price); err != nil || got.MicroCents != p.price {
			t.Errorf("%+v, %v", got, err)
		}
	}
	for tenant, want := range map[string]string{"": "a5 a8 b/c:d6 ", "acme": "a8 b/c:d6 "} {
		list, _, err := s.ListPrices(t.Context(), tenant, books.Page{})
		if err != nil {
			t.Fatal(err)
		}
		var got string
		for _, p := range list {
			got += fmt.Sprint(p.Model, p.MicroCents, " ")
		}
		if got != want {
			t.Errorf("prices of %q: %s", tenant, got)
		}
	}
	for _, model := range []string{"", " a", "a\x00", "\xff"} {
		_, err := s.SetPrice(t.Context(), "", model, 1)
		wantError(t, err, schemas.CodeInvalidValue, "model")
	}
	for _, price := range []int64{-1, books.MaxPrice + 1} {
		_, err := s.SetPrice(t.Context(), "", "a", price)
		wantError(t, err, schemas.CodeInvalidValue, "cents_per_1k_tokens")
	}
	_, err := s.SetPrice(t.Context(), "nobody", "a", 1)
	wantError(t, err, schemas.CodeNotFound, "")
}

func TestTurnUnavailable(t *testing.T) {
	proxy := faultproxy.New(t, pgtest.New(t))
	s := openAt(t, books.Config{URL: proxy.URL(), Timeout: time.Second})
	c := newClient(t, s, limits{concurrency: 1, qps: 10})
	a := c.ask(1, 1)
	turn := books.Turn{Admit: []books.Ask{a}, Lease: c.lease}
	proxy.Cut()
	if _, err := s.Turn(t.Context(), turn); !errors.Is(err, books.ErrUnavailable) {
		t.Error(err)
	}
	proxy.Restore()
	if out, err := s.Turn(t.Context(), turn); err != nil || out.Admit[0].Reason != "" {
		t.Errorf("%+v, %v", out, err)
	}
	proxy.Stall()
	if _, err := s.Turn(t.Context(), turn); !errors.Is(err, books.ErrUnavailable) {
		t.Error(err)
	}
	proxy.Restore()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Turn(ctx, turn); err == nil {
		t.Error("no error")
	}
	if out, err := s.Turn(t.Context(), turn); err != nil || out.Admit[0].Reason != "" {
		t.Errorf("%+v, %v", out, err)
	}
	c.holds(1, 0, 2)
}
