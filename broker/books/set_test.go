package books_test

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/schemas"
)

type prefixes struct{ Old, New string }

func prefixChange(t *testing.T, e books.AuditEntry) prefixes {
	t.Helper()
	var detail struct{ Prefix prefixes }
	if err := json.Unmarshal(e.Detail, &detail); err != nil {
		t.Fatal(err)
	}
	return detail.Prefix
}

func TestSetTenant(t *testing.T) {
	s := open(t)
	made, _ := household(t, s, "acme")
	want := made
	for _, c := range []struct {
		ref    string
		change books.TenantChange
		apply  func(*books.Tenant)
	}{
		{"acme", books.TenantChange{}, func(*books.Tenant) {}},
		{"acme", books.TenantChange{QPS: new(1)}, func(x *books.Tenant) { x.QPS = 1 }},
		{string(made.ID), books.TenantChange{Name: new("Zoë's 👩‍💻")}, func(x *books.Tenant) { x.Name = "Zoë's 👩‍💻" }},
		{"acme", books.TenantChange{Name: new(""), QPS: new(1_000_000)}, func(x *books.Tenant) { x.Name, x.QPS = "acme", 1_000_000 }},
	} {
		before, version := want, changes(t, s, -1).Version
		c.apply(&want)
		got, err := s.SetTenant(t.Context(), c.ref, c.change)
		if err != nil {
			t.Fatal(err)
		}
		changed := want != before
		if got.UpdatedAt.After(want.UpdatedAt) != changed {
			t.Errorf("%+v: updated at %v, and before at %v", c.change, got.UpdatedAt, want.UpdatedAt)
		}
		want.UpdatedAt = got.UpdatedAt
		if stored, err := s.GetTenant(t.Context(), "acme"); err != nil || got != want || stored != want {
			t.Errorf("%+v: %+v, stored %+v, want %+v, %v", c.change, got, stored, want, err)
		}
		if n := len(changes(t, s, version).Changes); (n == 1) != changed {
			t.Errorf("%+v: %d changes", c.change, n)
		}
	}
	if other, err := s.CreateTenant(t.Context(), books.NewTenant{Slug: "other"}); err != nil || other.QPS != 32 {
		t.Errorf("%+v, %v", other, err)
	}
}

func TestSetKey(t *testing.T) {
	s := open(t)
	_, user := household(t, s, "acme")
	made, secret, err := s.CreateKey(t.Context(), books.NewKey{Tenant: "acme", User: user.Email, TTL: new(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	other, _, err := s.CreateKey(t.Context(), books.NewKey{Tenant: "acme", User: user.Email})
	if err != nil {
		t.Fatal(err)
	}
	want := made
	for _, c := range []struct {
		change books.KeyChange
		apply  func(*books.Key) bool
	}{
		{books.KeyChange{}, func(*books.Key) bool { return false }},
		{books.KeyChange{NoBudget: true}, func(*books.Key) bool { return false }},
		{books.KeyChange{BudgetCents: new(int64(0))}, func(k *books.Key) bool { k.BudgetCents = new(int64(0)); return true }},
		{books.KeyChange{BudgetCents: new(int64(0))}, func(*books.Key) bool { return false }},
		{books.KeyChange{BudgetCents: new(int64(1_000_000_000_000)), Concurrency: new(1)}, func(k *books.Key) bool {
			k.BudgetCents, k.Concurrency = new(int64(1_000_000_000_000)), 1
			return true
		}},
		{books.KeyChange{Name: new("ci"), Scopes: []string{"model:b", "model:a", "model:b"}}, func(k *books.Key) bool {
			k.Name, k.Scopes = "ci", []string{"model:b", "model:a"}
			return true
		}},
		{books.KeyChange{Name: new(""), NoBudget: true}, func(k *books.Key) bool { k.Name, k.BudgetCents = "", nil; return true }},
	} {
		version := changes(t, s, -1).Version
		changed := c.apply(&want)
		got, err := s.SetKey(t.Context(), made.ID, c.change)
		if diff := cmp.Diff(want, got); diff != "" || err != nil {
			t.Errorf("%+v: %v, %s", c.change, err, diff)
		}
		list, _, err := s.ListKeys(t.Context(), "acme", "", books.Page{})
		if diff := cmp.Diff([]books.Key{want, other}, list); diff != "" || err != nil {
			t.Errorf("%+v: %v, %s", c.change, err, diff)
		}
		id, err := s.LookupKey(t.Context(), secret.Hash())
		if err != nil || !cmp.Equal(id.BudgetCents, want.BudgetCents) || id.Concurrency != want.Concurrency || !cmp.Equal(id.Scopes, want.Scopes) || id.Name != want.Name {
			t.Errorf("identity %+v, %v", id, err)
		}
		if n := len(changes(t, s, version).Changes); (n == 1) != changed {
			t.Errorf("%+v: %d changes", c.change, n)
		}
	}
}

// New limits hold for the very next admission, whether they are higher or lower, and take
// nothing from what is in flight.
func TestLimitsHoldAtOnce(t *testing.T) {
	c := newClient(t, open(t), limits{cents: 1, concurrency: 2, qps: 1000})
	set := func(change books.KeyChange) {
		t.Helper()
		_, err := c.s.SetKey(t.Context(), c.key.ID, change)
		c.must(err)
	}
	want := func(reason books.Reason, prompt, limit int64) books.Ask {
		t.Helper()
		a := c.ask(prompt, limit)
		if got := c.admit(a)[0]; got.Reason != reason {
			t.Errorf("%+v, want %q", got, reason)
		}
		return a
	}
	first := want(books.Admitted, 100, 300)
	second := want(books.Admitted, 100, 300)
	want(books.ReasonNoSlot, 1, 1)
	set(books.KeyChange{Concurrency: new(3)})
	third := want(books.Admitted, 100, 100)
	want(books.ReasonNoSlot, 1, 1)
	set(books.KeyChange{Concurrency: new(1)})
	c.settle(first, 100, 100, books.OutcomeDone)
	want(books.ReasonNoSlot, 1, 1) // two are in flight, where one may be
	set(books.KeyChange{Concurrency: new(32)})
	c.holds(2, 200, 600)

	want(books.ReasonMoneyHeld, 1, 200)
	set(books.KeyChange{BudgetCents: new(int64(2))})
	fourth := want(books.Admitted, 100, 900) // 1,800 of 2,000 tokens are spent or held
	set(books.KeyChange{BudgetCents: new(int64(1))})
	want(books.ReasonMoneyHeld, 1, 1)
	// What holds more than there is keeps that, and gets no more.
	if got := c.alter(books.Alter{Request: fourth.Request, Key: fourth.Key, Limit: 950}); got.Limit != 900 || got.Amount != 1000*perToken {
		t.Errorf("%+v", got)
	}
	for _, a := range []books.Ask{second, third, fourth} {
		c.settle(a, 100, 200, books.OutcomeDone) // third: as much as it held
	}
	c.holds(0, 1000, 0)
	if got := c.admit(c.ask(1, 1))[0]; got.Reason != books.ReasonBudget || got.BudgetFree != 0 || *got.Budget != books.MicroCents {
		t.Errorf("%+v", got)
	}
	set(books.KeyChange{NoBudget: true})
	c.settle(want(books.Admitted, 1000, 1_000_000), 1000, 1000, books.OutcomeDone)
	set(books.KeyChange{BudgetCents: new(int64(0))})
	want(books.ReasonBudget, 1, 1)
	c.holds(0, 3000, 0)
}

func TestRateHoldsAtOnce(t *testing.T) {
	c := newClient(t, open(t), limits{concurrency: 100, qps: 1})
	now := time.Date(2041, 1, 1, 0, 0, 0, 0, time.UTC)
	c.s.SetClock(func() time.Time { return now })
	c.lease, _ = c.s.RenewLease(t.Context(), c.lease.Owner, time.Hour)
	count := func() (n int) {
		t.Helper()
		for range 20 {
			switch got := c.admit(c.ask(1, 1))[0]; got.Reason {
			case books.Admitted:
				n++
			case books.ReasonTenantQPS:
			default:
				t.Fatalf("%+v", got)
			}
		}
		return n
	}
	if got := count(); got != 1 {
		t.Errorf("%d of 1", got)
	}
	set := func(qps int) {
		t.Helper()
		_, err := c.s.SetTenant(t.Context(), c.tenant.Slug, books.TenantChange{QPS: &qps})
		c.must(err)
		now = now.Add(time.Second)
	}
	set(10)
	if got := count(); got != 10 {
		t.Errorf("%d of 10", got)
	}
	set(2)
	if got := count(); got != 2 {
		t.Errorf("%d of 2", got)
	}
}

// An admission finds out itself what has become of a key since it was looked up.
func TestAdmissionLooksForItself(t *testing.T) {
	s := open(t)
	for name, c := range map[string]struct {
		change func(*client) error
		want   books.Reason
	}{
		"revoked": {func(c *client) error { _, err := s.RevokeKey(t.Context(), c.key.ID); return err }, books.ReasonKeyInvalid},
		"expired": {func(c *client) error {
			return s.Exec(t.Context(), `UPDATE api_keys SET expires_at = now() WHERE id = $1`, c.key.ID)
		}, books.ReasonKeyExpired},
		"suspended": {func(c *client) error {
			_, err := s.SetTenantState(t.Context(), c.tenant.Slug, books.TenantSuspended)
			return err
		}, books.ReasonTenantDisabled},
		"deactivated": {func(c *client) error {
			_, err := s.SetUserState(t.Context(), c.user.ID, books.UserDeactivated)
			return err
		}, books.ReasonUserDeactivated},
		"rotated":   {func(c *client) error { _, _, err := s.RotateKey(t.Context(), c.key.ID, books.Rotation{}); return err }, books.Admitted},
		"another's": {func(c *client) error { c.key.ID = schemas.NewKeyID(); return nil }, books.ReasonKeyInvalid},
	} {
		x := newClient(t, s, limits{concurrency: 5, qps: 100})
		if got := x.admit(x.ask(1, 1))[0]; got.Reason != books.Admitted {
			t.Errorf("%s: %+v", name, got)
		}
		x.must(c.change(x))
		if got := x.admit(x.ask(1, 1))[0]; got.Reason != c.want {
			t.Errorf("%s: %+v, want %q", name, got, c.want)
		}
	}
}
