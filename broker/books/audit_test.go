package books_test

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/credential"
	"github.com/ownllm/ownllm/internal/pgtest"
	"github.com/ownllm/ownllm/schemas"
)

// audits reads the audit, page by page.
func audits(t *testing.T, s *books.Store, tenant string) (all []books.AuditEntry) {
	t.Helper()
	page := books.Page{Limit: 3}
	for {
		list, next, err := s.ListAudit(t.Context(), tenant, page)
		if err != nil {
			t.Fatal(err)
		}
		if all = append(all, list...); next == "" {
			return all
		}
		page.After = next
	}
}

// Every change by an admin has its entry, and what changes nothing has none.
func TestAudit(t *testing.T) {
	s := open(t)
	admin := books.Actor{Name: "admin", Request: "req_1", Address: "10.0.0.7"}
	ctx := books.WithActor(t.Context(), admin)
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	other, err := s.CreateTenant(t.Context(), books.NewTenant{Slug: "other"}) // by nobody in particular
	must(nil, err)
	tenant, err := s.CreateTenant(ctx, books.NewTenant{Slug: "acme", QPS: new(5)})
	must(nil, err)
	user, err := s.CreateUser(ctx, books.NewUser{Tenant: "acme", Email: "ada@acme.example"})
	must(nil, err)
	given := apikey.New()
	k, _, err := s.CreateKey(ctx, books.NewKey{Tenant: "acme", User: user.Email, Name: "ci", Scopes: []string{"model:a"}, BudgetCents: new(int64(7)), Secret: given})
	must(nil, err)

	type entry struct {
		Action, Object, Detail string
	}
	var want []entry
	for _, step := range []struct {
		work   func() error
		action string // empty: nothing changes
		object string
		detail string
	}{
		{func() error { _, err := s.SetTenant(ctx, "acme", books.TenantChange{}); return err }, "", "", ""},
		{func() error {
			_, err := s.SetTenant(ctx, "acme", books.TenantChange{Name: new("acme"), QPS: new(5)})
			return err
		}, "", "", ""},
		{func() error {
			_, err := s.SetTenant(ctx, "acme", books.TenantChange{Name: new("Acme Ltd"), QPS: new(9)})
			return err
		}, "tenant.set", string(tenant.ID), `{"qps": {"new": 9, "old": 5}, "name": {"new": "Acme Ltd", "old": "acme"}}`},
		{func() error { _, err := s.SetTenantState(ctx, "acme", books.TenantActive); return err }, "", "", ""},
		{func() error { _, err := s.SetTenantState(ctx, "acme", books.TenantSuspended); return err }, "tenant.suspend", string(tenant.ID), `{"state": {"new": "suspended", "old": "active"}}`},
		{func() error { _, err := s.SetTenantState(ctx, "acme", books.TenantSuspended); return err }, "", "", ""},
		{func() error { _, err := s.SetTenantState(ctx, "acme", books.TenantActive); return err }, "tenant.resume", string(tenant.ID), `{"state": {"new": "active", "old": "suspended"}}`},
		{func() error { _, err := s.SetUserState(ctx, user.ID, books.UserActive); return err }, "", "", ""},
		{func() error { _, err := s.SetUserState(ctx, user.ID, books.UserDeactivated); return err }, "user.deactivate", string(user.ID), `{"state": {"new": "deactivated", "old": "active"}}`},
		{func() error { _, err := s.SetUserState(ctx, user.ID, books.UserActive); return err }, "user.activate", string(user.ID), `{"state": {"new": "active", "old": "deactivated"}}`},
		{func() error { _, err := s.SetKey(ctx, k.ID, books.KeyChange{}); return err }, "", "", ""},
		{func() error {
			_, err := s.SetKey(ctx, k.ID, books.KeyChange{Name: new("ci"), Scopes: []string{"model:a", "model:a"}, BudgetCents: new(int64(7)), Concurrency: new(32)})
			return err
		}, "", "", ""},
		{
			func() error {
				_, err := s.SetKey(ctx, k.ID, books.KeyChange{Scopes: []string{"model:*"}, NoBudget: true})
				return err
			}, "key.set", string(k.ID),
			`{"scopes": {"new": ["model:*"], "old": ["model:a"]}, "budget_cents": {"new": null, "old": 7}}`,
		},
		{func() error { _, err := s.SetKey(ctx, k.ID, books.KeyChange{NoBudget: true}); return err }, "", "", ""},
		{func() error { _, err := s.SetKey(ctx, k.ID, books.KeyChange{Concurrency: new(2)}); return err }, "key.set", string(k.ID), `{"concurrency": {"new": 2, "old": 32}}`},
		{func() error { _, err := s.SetPrice(ctx, "acme", "m", 5); return err }, "price.set", "m", `{"micro_cents_per_1k_tokens": {"new": 5, "old": null}}`},
		{func() error { _, err := s.SetPrice(ctx, "acme", "m", 5); return err }, "", "", ""},
		{func() error { _, err := s.SetPrice(ctx, "acme", "m", 0); return err }, "price.set", "m", `{"micro_cents_per_1k_tokens": {"new": 0, "old": 5}}`},
		{func() error { _, err := s.RevokeKey(ctx, k.ID); return err }, "key.revoke", string(k.ID), `{}`},
		{func() error { _, err := s.RevokeKey(ctx, k.ID); return err }, "", "", ""},
		{func() error { return s.TouchAgents(ctx, []schemas.AgentID{schemas.NewAgentID()}) }, "", "", ""},
	} {
		before := everything(t, s)
		if err := step.work(); err != nil {
			t.Fatal(err)
		}
		if after := everything(t, s); (step.action == "") != (before == after) {
			t.Errorf("%q: before\n%safter\n%s", step.action, before, after)
		}
		if step.action != "" {
			want = append(want, entry{step.action, step.object, step.detail})
		}
	}
	list := audits(t, s, "acme")
	var got []entry
	for i, e := range list {
		if e.Actor != admin || e.Tenant != tenant.ID || time.Since(e.At) > time.Minute || i > 0 && e.ID <= list[i-1].ID ||
			string(e.Kind) != strings.SplitN(e.Action, ".", 2)[0] || e.Kind == books.KindTenant && e.Object != string(tenant.ID) {
			t.Errorf("entry %+v", e)
		}
		got = append(got, entry{e.Action, e.Object, string(e.Detail)})
	}
	made := []entry{
		{"tenant.create", string(tenant.ID), `{"qps": 5, "name": "acme", "slug": "acme"}`},
		{"user.create", string(user.ID), `{"email": "ada@acme.example"}`},
		{"key.create", string(k.ID), fmt.Sprintf(`{"name": "ci", "prefix": %q, "scopes": ["model:a"], "user_id": %q, "expires_at": null, "concurrency": 32, "budget_cents": 7}`, given.Prefix(), user.ID)},
	}
	if diff := cmp.Diff(append(made, want...), got); diff != "" {
		t.Error(diff)
	}

	if _, err := s.SetPrice(ctx, "", "m", 8); err != nil {
		t.Fatal(err)
	}
	all := audits(t, s, "")
	if first := all[0]; first.Actor != (books.Actor{Name: "system"}) || first.Tenant != other.ID {
		t.Errorf("first %+v", first)
	}
	if last := all[len(all)-1]; last.Tenant != "" || last.Object != "m" || last.Kind != books.KindPrice {
		t.Errorf("last %+v", last)
	}
	if len(all) != len(list)+2 || len(audits(t, s, string(other.ID))) != 1 {
		t.Errorf("%d entries in all, %d of acme", len(all), len(list))
	}
}

// EnsureFirst's makings are in the audit too, once.
func TestAuditOfTheFirst(t *testing.T) {
	s := open(t)
	secret := apikey.New()
	for range 2 {
		if _, _, _, err := s.EnsureFirst(t.Context(), secret); err != nil {
			t.Fatal(err)
		}
	}
	var actions []string
	for _, e := range audits(t, s, "") {
		actions = append(actions, e.Action)
	}
	if got := strings.Join(actions, " "); got != "tenant.create user.create key.create" {
		t.Error(got)
	}
}

// No secret gets into the audit, or anywhere else in the books, in whatever form.
func TestNoSecretIsStored(t *testing.T) {
	s := open(t)
	_, user := household(t, s, "acme")
	const canary = "CanaryCanaryCanary42"
	var secrets []apikey.Key
	next := func() apikey.Key {
		k, err := apikey.FromSecret(apikey.Begin + fmt.Sprintf("pre%d", len(secrets)) + canary)
		if err != nil {
			t.Fatal(err)
		}
		secrets = append(secrets, k)
		return k
	}
	ctx := books.WithIdempotency(t.Context(), "create")
	k, _, err := s.CreateKey(ctx, books.NewKey{Tenant: "acme", User: user.Email, Secret: next()})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		ctx := books.WithIdempotency(t.Context(), "rotate "+strconv.Itoa(i))
		if _, _, err := s.RotateKey(ctx, k.ID, books.Rotation{Overlap: time.Hour, Secret: next()}); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, _, err := s.EnsureFirst(t.Context(), next()); err != nil {
		t.Fatal(err)
	}
	pairing, credentials := credential.NewPairing(), []credential.Secret{credential.NewAgent(), credential.NewAgent()}
	if _, _, err := s.CreatePairing(books.WithIdempotency(t.Context(), "pairing"), books.NewPairing{Tenant: "acme", Secret: pairing}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.PairAgent(books.WithIdempotency(t.Context(), "pair"), books.PairRequest{Secret: pairing, MachineID: [32]byte{1}, Credential: credentials[0]}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.AddAgent(t.Context(), "acme", schemas.NewAgentID(), "", credentials[1]); err != nil {
		t.Fatal(err)
	}
	// What fails may be told to an admin, and mustn't tell them.
	for _, id := range []string{secrets[0].Reveal(), "key_" + secrets[0].Reveal()} {
		_, _, err := s.RotateKey(t.Context(), schemas.KeyID(id), books.Rotation{})
		if err == nil || strings.Contains(err.Error(), canary) {
			t.Errorf("error %v", err)
		}
	}
	for _, table := range []string{"audit", "idempotency", "api_keys", "key_secrets", "tenants", "users", "changes", "agents", "pairings"} {
		dump, err := books.Query[string](t.Context(), s, `SELECT coalesce(string_agg(x::text, ' '), '') FROM `+table+` AS x`)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(dump, canary) {
			t.Errorf("a secret is in %s: %s", table, dump)
		}
		for _, secret := range append(credentials, pairing) {
			if strings.Contains(dump, secret.Reveal()[12:]) {
				t.Errorf("a secret of an agent is in %s: %s", table, dump)
			}
			if hash := fmt.Sprintf("%x", secret.Hash()); table != "agents" && table != "pairings" && strings.Contains(dump, hash) {
				t.Errorf("a hash is in %s: %s", table, dump)
			}
		}
		for _, secret := range secrets {
			// Nor its hash, by which somebody could find out to whom a secret belongs.
			if hash := fmt.Sprintf("%x", secret.Hash()); table != "key_secrets" && strings.Contains(dump, hash) {
				t.Errorf("a hash is in %s: %s", table, dump)
			}
		}
	}
	entries, err := json.Marshal(audits(t, s, ""))
	if err != nil || strings.Contains(string(entries), canary) || !strings.Contains(string(entries), secrets[0].Prefix()) {
		t.Errorf("audit %s, %v", entries, err)
	}
}

// Ids are in the order of commits: who follows the audit misses nothing, however many
// write at once.
func TestAuditMissesNothing(t *testing.T) {
	address := pgtest.New(t)
	const writers, each = 6, 20
	var wg sync.WaitGroup
	for w := range writers {
		s := openAt(t, books.Config{URL: address, MaxConns: 2})
		wg.Go(func() {
			for i := range each {
				if _, err := s.SetPrice(t.Context(), "", fmt.Sprintf("%d/%d", w, i), 1); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	s := openAt(t, books.Config{URL: address})
	var seen []string
	after, polls := "", 0
	for last := false; ; polls++ {
		list, _, err := s.ListAudit(t.Context(), "", books.Page{After: after, Limit: 50})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range list {
			seen, after = append(seen, e.Object), strconv.FormatInt(e.ID, 10)
		}
		if last && len(list) == 0 {
			break
		}
		select {
		case <-done:
			last = true
		default:
		}
	}
	slices.Sort(seen)
	if n := len(slices.Compact(seen)); n != writers*each || polls < 3 {
		t.Errorf("saw %d of %d in %d polls", n, writers*each, polls)
	}
}

// An entry and what it tells of are written together or not at all.
func TestAuditIsPartOfTheChange(t *testing.T) {
	s := open(t)
	household(t, s, "acme")
	if err := s.Exec(t.Context(), `ALTER TABLE audit ADD CONSTRAINT full_up CHECK (action <> 'tenant.suspend')`); err != nil {
		t.Fatal(err)
	}
	before := everything(t, s)
	_, err := s.SetTenantState(context.WithoutCancel(t.Context()), "acme", books.TenantSuspended)
	if err == nil {
		t.Error("no error")
	}
	if after := everything(t, s); after != before {
		t.Errorf("suspended without an entry:\n%s", after)
	}
}
