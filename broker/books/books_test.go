package books_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/faultproxy"
	"github.com/ownllm/ownllm/internal/pgtest"
	"github.com/ownllm/ownllm/schemas"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// openAt opens the books at an address.
func openAt(t *testing.T, cfg books.Config) *books.Store {
	t.Helper()
	s, err := books.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func open(t *testing.T) *books.Store {
	t.Helper()
	return openAt(t, books.Config{URL: pgtest.New(t)})
}

// wantError checks the code and the param of an error.
func wantError(t *testing.T, err error, code schemas.Code, param string) {
	t.Helper()
	var e *schemas.Error
	if !errors.As(err, &e) || e.Code != code || e.Param != param {
		t.Errorf("error %v, want code %s and param %q", err, code, param)
	}
}

// household makes a tenant and a user.
func household(t *testing.T, s *books.Store, slug string) (books.Tenant, books.User) {
	t.Helper()
	tenant, err := s.CreateTenant(t.Context(), books.NewTenant{Slug: slug})
	if err != nil {
		t.Fatal(err)
	}
	user, err := s.CreateUser(t.Context(), books.NewUser{Tenant: slug, Email: "ada@" + slug + ".example"})
	if err != nil {
		t.Fatal(err)
	}
	return tenant, user
}

func TestTenants(t *testing.T) {
	s := open(t)
	made, err := s.CreateTenant(t.Context(), books.NewTenant{Slug: "acme"})
	if err != nil {
		t.Fatal(err)
	}
	if made.Name != "acme" || made.State != books.TenantActive || made.QPS != 32 || schemas.ValidateID(string(made.ID), "ten_") != nil ||
		time.Since(made.CreatedAt) > time.Minute || made.CreatedAt.Location() != time.UTC {
		t.Errorf("made %+v", made)
	}
	full, err := s.CreateTenant(t.Context(), books.NewTenant{Slug: "b-2", Name: "Zoë's 👩‍💻", QPS: new(5)})
	if err != nil || full.QPS != 5 || full.Name != "Zoë's 👩‍💻" {
		t.Errorf("made %+v, %v", full, err)
	}
	for _, ref := range []string{string(made.ID), "acme"} {
		if got, err := s.GetTenant(t.Context(), ref); err != nil || got != made {
			t.Errorf("get %q: %+v, %v", ref, got, err)
		}
	}
	for _, ref := range []string{"", "nobody", "ACME", "a\x00b", "\xff", string(schemas.NewTenantID())} {
		_, err := s.GetTenant(t.Context(), ref)
		wantError(t, err, schemas.CodeNotFound, "")
		_, err = s.SetTenantState(t.Context(), ref, books.TenantActive)
		wantError(t, err, schemas.CodeNotFound, "")
	}
	for _, ref := range []string{"acme", string(made.ID)} {
		if got, err := s.SetTenantState(t.Context(), ref, books.TenantSuspended); err != nil || got.State != books.TenantSuspended || !got.UpdatedAt.After(made.UpdatedAt) {
			t.Errorf("suspend %q: %+v, %v", ref, got, err)
		}
		if got, err := s.SetTenantState(t.Context(), ref, books.TenantActive); err != nil || got.State != books.TenantActive {
			t.Errorf("resume %q: %+v, %v", ref, got, err)
		}
	}
	_, err = s.SetTenantState(t.Context(), "acme", "gone")
	wantError(t, err, schemas.CodeInvalidValue, "state")
	_, err = s.CreateTenant(t.Context(), books.NewTenant{Slug: "acme"})
	wantError(t, err, schemas.CodeInvalidValue, "slug")

	for _, c := range []struct {
		param string
		n     books.NewTenant
	}{
		{"slug", books.NewTenant{}},
		{"slug", books.NewTenant{Slug: "Acme"}},
		{"slug", books.NewTenant{Slug: "-a"}},
		{"slug", books.NewTenant{Slug: "a-"}},
		{"slug", books.NewTenant{Slug: "a.b"}},
		{"slug", books.NewTenant{Slug: "a_b"}},
		{"slug", books.NewTenant{Slug: "ä"}},
		{"slug", books.NewTenant{Slug: "a\n"}},
		{"slug", books.NewTenant{Slug: strings.Repeat("a", 64)}},
		{"name", books.NewTenant{Slug: "x", Name: "a\x1b[31m"}},
		{"name", books.NewTenant{Slug: "x", Name: "a\u202eb"}},
		{"name", books.NewTenant{Slug: "x", Name: "a\x00"}},
		{"name", books.NewTenant{Slug: "x", Name: "\xff"}},
		{"name", books.NewTenant{Slug: "x", Name: strings.Repeat("ä", 201)}},
		{"qps", books.NewTenant{Slug: "x", QPS: new(0)}},
		{"qps", books.NewTenant{Slug: "x", QPS: new(-1)}},
		{"qps", books.NewTenant{Slug: "x", QPS: new(1_000_001)}},
	} {
		_, err := s.CreateTenant(t.Context(), c.n)
		wantError(t, err, schemas.CodeInvalidValue, c.param)
	}
	if _, err := s.CreateTenant(t.Context(), books.NewTenant{Slug: strings.Repeat("a", 63), Name: strings.Repeat("ä", 200)}); err != nil {
		t.Error(err)
	}
}

func TestUsers(t *testing.T) {
	s := open(t)
	tenant, user := household(t, s, "acme")
	other, _ := household(t, s, "other")
	if user.Tenant != tenant.ID || user.State != books.UserActive || user.Email != "ada@acme.example" {
		t.Errorf("made %+v", user)
	}
	for _, ref := range []string{string(user.ID), user.Email, "ADA@acme.example"} {
		if got, err := s.GetUser(t.Context(), "acme", ref); err != nil || got != user {
			t.Errorf("get %q: %+v, %v", ref, got, err)
		}
	}
	for _, c := range [][2]string{{"other", string(user.ID)}, {"acme", "bob"}, {"nobody", user.Email}, {"acme", "a\x00"}} {
		_, err := s.GetUser(t.Context(), c[0], c[1])
		wantError(t, err, schemas.CodeNotFound, "")
	}
	_, err := s.CreateUser(t.Context(), books.NewUser{Tenant: string(tenant.ID), Email: "Ada@ACME.example"})
	wantError(t, err, schemas.CodeInvalidValue, "email")
	_, err = s.CreateUser(t.Context(), books.NewUser{Tenant: "nobody", Email: "a@b.c"})
	wantError(t, err, schemas.CodeNotFound, "")
	if _, err := s.CreateUser(t.Context(), books.NewUser{Tenant: string(other.ID), Email: user.Email}); err != nil {
		t.Errorf("the same address with another tenant: %v", err)
	}
	for _, email := range []string{
		"", "ada", "@x", "ada@", "a b@c.d", "a@b@c", "a@b..c", "a@.b", "a@b.", "<a@b.c>", "a@b.c\n", "a\x00@b.c", "\xff@b.c",
		strings.Repeat("a", 65) + "@b.c", "a@" + strings.Repeat("b", 260), "a@b\u202e.c",
	} {
		_, err := s.CreateUser(t.Context(), books.NewUser{Tenant: "acme", Email: email})
		wantError(t, err, schemas.CodeInvalidValue, "email")
	}
	for _, email := range []string{"root@localhost", "o'neil+tag@mail.example.co.uk", "élodie@exämple.org"} {
		if _, err := s.CreateUser(t.Context(), books.NewUser{Tenant: "acme", Email: email}); err != nil {
			t.Errorf("%s: %v", email, err)
		}
	}
	if got, err := s.SetUserState(t.Context(), user.ID, books.UserDeactivated); err != nil || got.State != books.UserDeactivated {
		t.Errorf("deactivate: %+v, %v", got, err)
	}
	if got, err := s.SetUserState(t.Context(), user.ID, books.UserActive); err != nil || got.State != books.UserActive {
		t.Errorf("activate: %+v, %v", got, err)
	}
	_, err = s.SetUserState(t.Context(), user.ID, "asleep")
	wantError(t, err, schemas.CodeInvalidValue, "state")
	for _, id := range []schemas.UserID{"", "usr_x", schemas.NewUserID()} {
		_, err = s.SetUserState(t.Context(), id, books.UserActive)
		wantError(t, err, schemas.CodeNotFound, "")
	}
}

func TestKeys(t *testing.T) {
	s := open(t)
	tenant, user := household(t, s, "acme")
	other, stranger := household(t, s, "other")

	plain, secret, err := s.CreateKey(t.Context(), books.NewKey{Tenant: "acme", User: user.Email})
	if err != nil {
		t.Fatal(err)
	}
	if plain.Tenant != tenant.ID || plain.User != user.ID || plain.Prefix != secret.Prefix() || plain.Concurrency != 32 ||
		plain.BudgetCents != nil || plain.ExpiresAt != nil || plain.RevokedAt != nil || len(plain.Scopes) != 1 || plain.Scopes[0] != "model:*" {
		t.Errorf("made %+v", plain)
	}
	given := apikey.New()
	full, secret2, err := s.CreateKey(t.Context(), books.NewKey{
		Tenant: string(tenant.ID), User: string(user.ID), Name: "CI", Scopes: []string{"model:qwen/qwen2.5:32b", "model:a b", "model:a b"},
		BudgetCents: new(int64(0)), Concurrency: new(2), TTL: new(time.Hour), Secret: given,
	})
	if err != nil {
		t.Fatal(err)
	}
	if secret2.Hash() != given.Hash() || full.Name != "CI" || strings.Join(full.Scopes, ",") != "model:qwen/qwen2.5:32b,model:a b" ||
		*full.BudgetCents != 0 || full.Concurrency != 2 || full.ExpiresAt.Sub(full.CreatedAt) != time.Hour {
		t.Errorf("made %+v", full)
	}
	dump, err := books.Query[string](t.Context(), s, `SELECT string_agg(k::text || s::text, ' ') FROM api_keys k JOIN key_secrets s ON s.key_id = k.id`)
	if err != nil || strings.Contains(dump, given.Reveal()) || strings.Contains(dump, secret.Reveal()) {
		t.Errorf("the secret is in the books: %v", err)
	}

	_, _, err = s.CreateKey(t.Context(), books.NewKey{Tenant: "other", User: string(stranger.ID), Secret: given})
	wantError(t, err, schemas.CodeInvalidValue, "key")
	for _, c := range []struct {
		code  schemas.Code
		param string
		n     books.NewKey
	}{
		{schemas.CodeNotFound, "", books.NewKey{Tenant: "nobody", User: user.Email}},
		{schemas.CodeNotFound, "", books.NewKey{Tenant: "other", User: string(user.ID)}},
		{schemas.CodeNotFound, "", books.NewKey{Tenant: "acme", User: ""}},
		{schemas.CodeInvalidValue, "name", books.NewKey{Tenant: "acme", User: user.Email, Name: "a\nb"}},
		{schemas.CodeInvalidValue, "scopes", books.NewKey{Tenant: "acme", User: user.Email, Scopes: []string{"*"}}},
		{schemas.CodeInvalidValue, "scopes", books.NewKey{Tenant: "acme", User: user.Email, Scopes: []string{""}}},
		{schemas.CodeInvalidValue, "scopes", books.NewKey{Tenant: "acme", User: user.Email, Scopes: []string{"model:"}}},
		{schemas.CodeInvalidValue, "scopes", books.NewKey{Tenant: "acme", User: user.Email, Scopes: []string{"model: x"}}},
		{schemas.CodeInvalidValue, "scopes", books.NewKey{Tenant: "acme", User: user.Email, Scopes: []string{"model:a\tb"}}},
		{schemas.CodeInvalidValue, "scopes", books.NewKey{Tenant: "acme", User: user.Email, Scopes: []string{"model:" + strings.Repeat("a", 257)}}},
		{schemas.CodeInvalidValue, "scopes", books.NewKey{Tenant: "acme", User: user.Email, Scopes: make([]string, 101)}},
		{schemas.CodeInvalidValue, "budget_cents", books.NewKey{Tenant: "acme", User: user.Email, BudgetCents: new(int64(-1))}},
		{schemas.CodeInvalidValue, "concurrency", books.NewKey{Tenant: "acme", User: user.Email, Concurrency: new(0)}},
		{schemas.CodeInvalidValue, "ttl_seconds", books.NewKey{Tenant: "acme", User: user.Email, TTL: new(time.Duration(0))}},
		{schemas.CodeInvalidValue, "ttl_seconds", books.NewKey{Tenant: "acme", User: user.Email, TTL: new(-time.Second)}},
		{schemas.CodeInvalidValue, "ttl_seconds", books.NewKey{Tenant: "acme", User: user.Email, TTL: new(200 * 365 * 24 * time.Hour)}},
	} {
		_, k, err := s.CreateKey(t.Context(), c.n)
		wantError(t, err, c.code, c.param)
		if !k.IsZero() {
			t.Error("a secret came with an error")
		}
	}

	revoked, err := s.RevokeKey(t.Context(), plain.ID)
	if err != nil || revoked.RevokedAt == nil {
		t.Fatalf("revoke: %+v, %v", revoked, err)
	}
	again, err := s.RevokeKey(t.Context(), plain.ID)
	if err != nil || !again.RevokedAt.Equal(*revoked.RevokedAt) {
		t.Errorf("revoke again: %+v, %v", again, err)
	}
	for _, id := range []schemas.KeyID{"", schemas.NewKeyID(), schemas.KeyID(secret.Reveal())} {
		_, err := s.RevokeKey(t.Context(), id)
		wantError(t, err, schemas.CodeNotFound, "")
		if strings.Contains(err.Error(), secret.Reveal()) {
			t.Error("the error repeats a secret")
		}
	}

	list, next, err := s.ListKeys(t.Context(), "acme", "", books.Page{})
	if err != nil || len(list) != 2 || next != "" || list[0].ID != plain.ID || list[1].ID != full.ID {
		t.Errorf("list: %+v, %q, %v", list, next, err)
	}
	if list, _, err = s.ListKeys(t.Context(), "acme", user.Email, books.Page{}); err != nil || len(list) != 2 {
		t.Errorf("list of the user: %+v, %v", list, err)
	}
	if list, _, err = s.ListKeys(t.Context(), string(other.ID), "", books.Page{}); err != nil || len(list) != 0 {
		t.Errorf("list of the other tenant: %+v, %v", list, err)
	}
	_, _, err = s.ListKeys(t.Context(), "other", string(user.ID), books.Page{})
	wantError(t, err, schemas.CodeNotFound, "")
}

func TestLookupKey(t *testing.T) {
	s := open(t)
	tenant, user := household(t, s, "acme")
	k, secret, err := s.CreateKey(t.Context(), books.NewKey{
		Tenant: "acme", User: user.Email, Name: "n", Scopes: []string{"model:a", "model:b/c:d"}, BudgetCents: new(int64(700)), Concurrency: new(3), TTL: new(time.Hour),
	})
	if err != nil {
		t.Fatal(err)
	}
	look := func() books.Identity {
		t.Helper()
		id, err := s.LookupKey(t.Context(), secret.Hash())
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	id := look()
	if id.Key != k.ID || id.Tenant != tenant.ID || id.Slug != "acme" || id.User != user.ID || id.Name != "n" || id.Prefix != k.Prefix ||
		*id.BudgetCents != 700 || id.Concurrency != 3 || id.QPS != 32 || id.Revoked || !id.ExpiresAt.Equal(*k.ExpiresAt) ||
		id.TenantState != books.TenantActive || id.UserState != books.UserActive || id.AsOf.Before(k.CreatedAt) {
		t.Errorf("identity %+v", id)
	}
	for model, want := range map[string]bool{"a": true, "b/c:d": true, "": false, "ab": false, "*": false, "b": false, "model:a": false} {
		if id.Allows(model) != want {
			t.Errorf("Allows(%q) = %v", model, !want)
		}
	}
	if all := (books.Identity{Scopes: []string{"model:*"}}); !all.Allows("x") || !all.Allows("") {
		t.Error("model:* doesn't allow all")
	}
	if (books.Identity{}).Allows("x") {
		t.Error("no scope allows something")
	}

	before := id.Version
	steps := []struct {
		name   string
		change func() error
		seen   func(books.Identity) bool
	}{
		{"suspend", func() error { _, err := s.SetTenantState(t.Context(), "acme", books.TenantSuspended); return err }, func(i books.Identity) bool { return i.TenantState == books.TenantSuspended }},
		{"deactivate", func() error { _, err := s.SetUserState(t.Context(), user.ID, books.UserDeactivated); return err }, func(i books.Identity) bool { return i.UserState == books.UserDeactivated }},
		{"revoke", func() error { _, err := s.RevokeKey(t.Context(), k.ID); return err }, func(i books.Identity) bool { return i.Revoked }},
	}
	for _, step := range steps {
		if err := step.change(); err != nil {
			t.Fatal(err)
		}
		if id = look(); !step.seen(id) || id.Version != before+1 {
			t.Errorf("%s: identity %+v", step.name, id)
		}
		before = id.Version
	}
	_, err = s.LookupKey(t.Context(), apikey.New().Hash())
	wantError(t, err, schemas.CodeKeyInvalid, "")
}

func TestPages(t *testing.T) {
	s := open(t)
	const n = 7
	for i := range n {
		household(t, s, fmt.Sprintf("t%d", i))
		if _, err := s.CreateUser(t.Context(), books.NewUser{Tenant: "t0", Email: fmt.Sprintf("u%d@x", i)}); err != nil {
			t.Fatal(err)
		}
	}
	for _, limit := range []int{1, 3, n, n + 1, 0} {
		var slugs []string
		page := books.Page{Limit: limit}
		for {
			list, next, err := s.ListTenants(t.Context(), page)
			if err != nil {
				t.Fatal(err)
			}
			if limit > 0 && len(list) > limit || len(list) == 0 {
				t.Fatalf("page of %d with limit %d", len(list), limit)
			}
			for _, x := range list {
				slugs = append(slugs, x.Slug)
			}
			if next == "" {
				break
			}
			page.After = next
		}
		if got := strings.Join(slugs, " "); got != "t0 t1 t2 t3 t4 t5 t6" {
			t.Errorf("limit %d: %s", limit, got)
		}
	}
	users, next, err := s.ListUsers(t.Context(), "t0", books.Page{Limit: n})
	if err != nil || len(users) != n || next == "" {
		t.Errorf("users: %d, %q, %v", len(users), next, err)
	}
	users, next, err = s.ListUsers(t.Context(), "t0", books.Page{Limit: n, After: next})
	if err != nil || len(users) != 1 || next != "" {
		t.Errorf("the rest of the users: %d, %q, %v", len(users), next, err)
	}
	for _, page := range []books.Page{{Limit: -1}, {Limit: 1001}} {
		_, _, err := s.ListTenants(t.Context(), page)
		wantError(t, err, schemas.CodeInvalidValue, "limit")
	}
	for _, after := range []string{"x", "usr_01ARZ3NDEKTSV4RRFFQ69G5FAV", "ten_\x00", "ten_' OR true --"} {
		_, _, err := s.ListTenants(t.Context(), books.Page{After: after})
		wantError(t, err, schemas.CodeInvalidValue, "after")
	}
	_, _, err = s.ListUsers(t.Context(), "nobody", books.Page{})
	wantError(t, err, schemas.CodeNotFound, "")
}

func TestEnsureFirst(t *testing.T) {
	address := pgtest.New(t)
	secret := apikey.New()
	const n = 6
	var wg sync.WaitGroup
	ids := make([]string, n)
	for i := range n {
		s := openAt(t, books.Config{URL: address, MaxConns: 2})
		wg.Go(func() {
			tenant, u, k, err := s.EnsureFirst(t.Context(), secret)
			if err != nil {
				t.Error(err)
			}
			ids[i] = fmt.Sprint(tenant.ID, u.ID, k.ID)
		})
	}
	wg.Wait()
	for i := range n {
		if ids[i] != ids[0] {
			t.Errorf("%d got %s, 0 got %s", i, ids[i], ids[0])
		}
	}
	s := openAt(t, books.Config{URL: address})
	version := changes(t, s, -1).Version
	tenant, u, k, err := s.EnsureFirst(t.Context(), secret)
	if err != nil || tenant.Slug != books.FirstTenant || u.Email != books.FirstEmail || k.Prefix != secret.Prefix() {
		t.Errorf("%+v %+v %+v %v", tenant, u, k, err)
	}
	if got := changes(t, s, -1).Version; got != version {
		t.Error("nothing was made, and the version rose")
	}
	if id, err := s.LookupKey(t.Context(), secret.Hash()); err != nil || id.Key != k.ID || !id.Allows("anything") {
		t.Errorf("identity %+v, %v", id, err)
	}
	// Another data dir, another secret, the same books.
	if _, _, k2, err := s.EnsureFirst(t.Context(), apikey.New()); err != nil || k2.ID == k.ID || k2.User != u.ID {
		t.Errorf("%+v, %v", k2, err)
	}
	if _, err := s.RevokeKey(t.Context(), k.ID); err != nil {
		t.Fatal(err)
	}
	if _, _, k, err = s.EnsureFirst(t.Context(), secret); err != nil || k.RevokedAt == nil {
		t.Errorf("a revoked key came back to life: %+v, %v", k, err)
	}
}

func TestUnavailable(t *testing.T) {
	proxy := faultproxy.New(t, pgtest.New(t))
	s := openAt(t, books.Config{URL: proxy.URL(), Timeout: 2 * time.Second, MaxConns: 3})
	_, user := household(t, s, "acme")
	calls := map[string]func() error{
		"ping":    func() error { return s.Ping(t.Context()) },
		"lookup":  func() error { _, err := s.LookupKey(t.Context(), apikey.New().Hash()); return err },
		"changes": func() error { _, err := s.Changes(t.Context(), 0); return err },
		"list":    func() error { _, _, err := s.ListTenants(t.Context(), books.Page{}); return err },
		"write":   func() error { _, err := s.SetUserState(t.Context(), user.ID, books.UserActive); return err },
		"touch":   func() error { return s.TouchAgents(t.Context(), []schemas.AgentID{schemas.NewAgentID()}) },
	}
	check := func(how string) {
		t.Helper()
		for name, call := range calls {
			start := time.Now()
			err := call()
			if !errors.Is(err, books.ErrUnavailable) {
				t.Errorf("%s while %s: %v", name, how, err)
			}
			if errors.As(err, new(*pgconn.PgError)) || errors.As(err, new(*pgconn.ConnectError)) {
				t.Errorf("%s while %s: an error of the driver got out", name, how)
			}
			if d := time.Since(start); d > 5*time.Second {
				t.Errorf("%s while %s took %v", name, how, d)
			}
		}
	}
	works := func() {
		t.Helper()
		for name, call := range calls {
			if err := call(); errors.Is(err, books.ErrUnavailable) {
				t.Errorf("%s afterwards: %v", name, err)
			}
		}
	}
	proxy.Cut()
	check("the connection is cut")
	if _, err := books.Open(t.Context(), books.Config{URL: proxy.URL(), Timeout: time.Second}); !errors.Is(err, books.ErrUnavailable) {
		t.Errorf("Open while cut: %v", err)
	}
	proxy.Restore()
	works()
	proxy.Stall()
	check("nothing gets through")
	proxy.Restore()
	works()

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.LookupKey(ctx, apikey.New().Hash()); !errors.Is(err, context.Canceled) || errors.Is(err, books.ErrUnavailable) {
		t.Errorf("cancelled by the caller: %v", err)
	}
}

// After a restart of the server every connection of the pool is dead, and no read may
// fail for that.
func TestDeadConnections(t *testing.T) {
	address := pgtest.New(t)
	s := openAt(t, books.Config{URL: address, MaxConns: 4})
	admin := openAt(t, books.Config{URL: address, MaxConns: 2})
	var wg sync.WaitGroup
	for range 4 { // fill the pool
		wg.Go(func() { _ = s.Exec(t.Context(), `SELECT pg_sleep(0.05)`) })
	}
	wg.Wait()
	if err := admin.Exec(t.Context(), `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()`); err != nil {
		t.Fatal(err)
	}
	for i := range 8 {
		if _, err := s.Changes(t.Context(), 0); err != nil {
			t.Errorf("read %d: %v", i, err)
		}
	}
}

func TestOpen(t *testing.T) {
	_, err := books.Open(t.Context(), books.Config{URL: "postgres://u:canary@127.0.0.1:1/x?sslmode=nonsense"})
	if err == nil || strings.Contains(err.Error(), "canary") {
		t.Errorf("a bad URL: %v", err)
	}
	_, err = books.Open(t.Context(), books.Config{URL: "postgres://u:canary@127.0.0.1:1/x", Timeout: time.Second})
	if !errors.Is(err, books.ErrUnavailable) || strings.Contains(err.Error(), "canary") {
		t.Errorf("nobody there: %v", err)
	}
}
