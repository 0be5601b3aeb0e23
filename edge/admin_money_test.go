package edge_test

import (
	"context"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/edge"
	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/internal/natstest"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/backend"
	"github.com/ownllm/ownllm/worker/demo"
)

// The same create under the same name makes one thing, and gets the same answer each
// time, the secret of a key included; another create under that name is refused.
func TestIdempotencyKey(t *testing.T) {
	t.Parallel()
	h := build(t, plan{empty: true})
	name := func(n string) string { return adminapi.IdempotencyHeader + ": " + n }

	user := `{"tenant":"local","email":"ada@example.com"}`
	first := admin[adminapi.User](h, "POST", "/users", user, name("u"))
	if again := admin[adminapi.User](h, "POST", "/users", user, name("u")); again != first {
		t.Errorf("the second answer is %+v, want %+v", again, first)
	}
	resp, body := h.do("POST", "/api/v1/users", adminToken, user) // without the name it's a duplicate
	checkRefusal(t, resp, body, "invalid_value", "email")
	resp, body = h.do("POST", "/api/v1/users", adminToken, `{"tenant":"local","email":"eve@example.com"}`, name("u"))
	checkRefusal(t, resp, body, "invalid_value", adminapi.IdempotencyHeader)

	tenant := admin[adminapi.Tenant](h, "POST", "/tenants", `{"slug":"acme"}`, name("t"))
	if again := admin[adminapi.Tenant](h, "POST", "/tenants", `{"slug":"acme"}`, name("t")); again != tenant {
		t.Errorf("the second answer is %+v, want %+v", again, tenant)
	}

	key := `{"tenant":"local","user":"ada@example.com","ttl_seconds":3600,"budget_cents":7}`
	var secrets []string
	var mu sync.Mutex
	var all sync.WaitGroup
	for range 8 { // at once, as retries may come
		all.Go(func() {
			k := admin[adminapi.CreatedKey](h, "POST", "/keys", key, name("k"))
			mu.Lock()
			defer mu.Unlock()
			secrets = append(secrets, string(k.ID)+" "+k.Secret)
		})
	}
	all.Wait()
	slices.Sort(secrets)
	if secrets = slices.Compact(secrets); len(secrets) != 1 {
		t.Fatalf("eight requests under one name made %q", secrets)
	}
	id, secret, _ := strings.Cut(secrets[0], " ")
	if got := h.code("GET", "/v1/models", secret, ""); got.status == http.StatusUnauthorized {
		t.Errorf("the secret gets %+v", got)
	}
	for about, other := range map[string]adminapi.CreatedKey{
		"another name": admin[adminapi.CreatedKey](h, "POST", "/keys", key, name("k2")),
		"no name":      admin[adminapi.CreatedKey](h, "POST", "/keys", key),
	} {
		if other.Secret == secret || string(other.ID) == id {
			t.Errorf("%s: the same key", about)
		}
	}
	for about, body := range map[string]string{
		"another budget":   strings.Replace(key, "7", "8", 1),
		"another lifetime": strings.Replace(key, "3600", "3601", 1),
	} {
		t.Run(about, func(t *testing.T) {
			resp, body := h.do("POST", "/api/v1/keys", adminToken, body, name("k"))
			checkRefusal(t, resp, body, "invalid_value", adminapi.IdempotencyHeader)
			if strings.Contains(body, secret) {
				t.Errorf("the secret is in %s", body)
			}
		})
	}

	rotate := "/keys/" + id + "/rotate"
	rotated := admin[adminapi.CreatedKey](h, "POST", rotate, `{"overlap_seconds":60}`, name("r"))
	if again := admin[adminapi.CreatedKey](h, "POST", rotate, `{"overlap_seconds":60}`, name("r")); again.Secret != rotated.Secret || string(again.ID) != id {
		t.Errorf("the second rotation gave %s, the first %s", again.Prefix, rotated.Prefix)
	}
	if rotated.Secret == secret {
		t.Error("a rotation gave the old secret")
	}
	// A name is for one request, not for one of each kind.
	resp, body = h.do("POST", "/api/v1"+rotate, adminToken, ``, name("k"))
	checkRefusal(t, resp, body, "invalid_value", adminapi.IdempotencyHeader)
	for _, bad := range []string{strings.Repeat("x", 256), "a\x01b"} {
		resp, body := h.do("POST", "/api/v1/tenants", adminToken, `{"slug":"bad"}`, name(bad))
		if resp.StatusCode != http.StatusBadRequest {
			t.Errorf("name %.10q: %s %s", bad, resp.Status, body)
		}
	}
	if list := byAdmin(h); len(list) != 1+1+3+1 { // user, tenant, keys, rotation
		t.Errorf("audit: %+v", list)
	}

	// A name that the books have forgotten makes the secret that it made before: that one
	// must not come back.
	other := build(t, plan{empty: true})
	old := must(apikey.FromSecret(secret))
	must(other.store.CreateUser(t.Context(), books.NewUser{Tenant: "local", Email: "ada@example.com"}))
	if _, _, err := other.store.CreateKey(t.Context(), books.NewKey{Tenant: "local", User: "ada@example.com", Secret: old}); err != nil {
		t.Fatal(err)
	}
	resp, body = other.do("POST", "/api/v1/keys", adminToken, key, name("k"))
	checkRefusal(t, resp, body, "invalid_value", adminapi.IdempotencyHeader)
}

// What is changed of a key or a tenant changes, and the rest stays.
func TestChanges(t *testing.T) {
	t.Parallel()
	h := build(t, plan{empty: true})
	path := "/keys/" + string(h.keyID())
	was := admin[adminapi.List[adminapi.Key]](h, "GET", "/keys?tenant=local", "").Data[0]
	if was.BudgetCents != nil || was.Concurrency != 32 {
		t.Errorf("the first key: %+v", was)
	}
	five := int64(5)
	for _, step := range []struct {
		body   string
		change func(*adminapi.Key)
	}{
		{`{}`, func(*adminapi.Key) {}},
		{`{"name":"a'; DROP TABLE api_keys; --"}`, func(k *adminapi.Key) { k.Name = "a'; DROP TABLE api_keys; --" }},
		{`{"budget_cents":5}`, func(k *adminapi.Key) { k.BudgetCents = &five }},
		{`{"concurrency":1,"scopes":["model:demo","model:demo","model:b"]}`, func(k *adminapi.Key) { k.Concurrency, k.Scopes = 1, []string{"model:demo", "model:b"} }},
		{`{"name":"","budget_cents":null}`, func(k *adminapi.Key) { k.Name, k.BudgetCents = "", nil }},
		{`{"name":"` + strings.Repeat("é", 200) + `","scopes":["model:*"]}`, func(k *adminapi.Key) { k.Name, k.Scopes = strings.Repeat("é", 200), []string{"model:*"} }},
	} {
		step.change(&was)
		got := admin[adminapi.Key](h, "PATCH", path, step.body)
		if diff := cmp.Diff(was, got); diff != "" {
			t.Errorf("%s, -want +got:\n%s", step.body, diff)
		}
		if diff := cmp.Diff(was, admin[adminapi.List[adminapi.Key]](h, "GET", "/keys", "").Data[0]); diff != "" {
			t.Errorf("%s, listed, -want +got:\n%s", step.body, diff)
		}
	}

	tenant := admin[adminapi.Tenant](h, "PATCH", "/tenants/local", `{"qps":7,"name":"My house"}`)
	if tenant.QPS != 7 || tenant.Name != "My house" || tenant.Slug != "local" {
		t.Errorf("%+v", tenant)
	}
	if tenant = admin[adminapi.Tenant](h, "PATCH", "/tenants/"+string(tenant.ID), `{"name":""}`); tenant.Name != "local" || tenant.QPS != 7 {
		t.Errorf("%+v", tenant)
	}
	within(t, noticed+slack, "the new limit to be known", func() bool {
		id, err := h.keys.Authenticate(t.Context(), must(apikey.FromSecret(h.key)), "")
		return err == nil && id.QPS == 7
	})
}

// A new secret works at once, the old one for as long as was said, and not longer.
func TestRotation(t *testing.T) {
	t.Parallel()
	h := build(t, plan{empty: true})
	path := "/keys/" + string(h.keyID()) + "/rotate"
	works := func(secret string) bool {
		return h.code("GET", "/v1/models", secret, "").status != http.StatusUnauthorized
	}

	second := admin[adminapi.CreatedKey](h, "POST", path, `{"overlap_seconds":3600}`)
	if second.ID != h.keyID() || second.Secret == h.key || !strings.HasPrefix(second.Secret, second.Prefix) || !works(second.Secret) || !works(h.key) {
		t.Errorf("after a rotation with an overlap: %+v, new %v, old %v", second.Key, works(second.Secret), works(h.key))
	}
	third := admin[adminapi.CreatedKey](h, "POST", path, ``)
	if !works(third.Secret) {
		t.Error("the third secret doesn't work")
	}
	within(t, noticed+slack, "the older secrets to end", func() bool { return !works(second.Secret) && !works(h.key) })
	if !works(third.Secret) {
		t.Error("the third secret doesn't work any more")
	}
	admin[adminapi.Key](h, "POST", strings.Replace(path, "rotate", "revoke", 1), "")
	resp, body := h.do("POST", "/api/v1"+path, adminToken, ``)
	checkRefusal(t, resp, body, "invalid_value", "key")
	resp, body = h.do("POST", "/api/v1"+path, adminToken, ``, adminapi.IdempotencyHeader+": n")
	checkRefusal(t, resp, body, "invalid_value", "key")
}

// Prices come back as they were set, to the last digit.
func TestPrices(t *testing.T) {
	t.Parallel()
	h := build(t, plan{})
	for text, want := range map[string]string{
		`0`: "0", `0.000001`: "0.000001", `"0.1"`: "0.1", `0.30`: "0.3", `10000`: "10000", `"9999.999999"`: "9999.999999", `2.5e-1`: "0.25", `0.3333330000`: "0.333333",
	} {
		_, body := h.do("PUT", "/api/v1/prices", adminToken, `{"model":"a/b:c","cents_per_1k_tokens":`+text+`}`)
		if !strings.Contains(body, `"cents_per_1k_tokens":`+want+`,`) {
			t.Errorf("%s: %s", text, body)
		}
		_, body = h.do("GET", "/api/v1/prices", adminToken, "")
		if !strings.Contains(body, `"cents_per_1k_tokens":`+want+`,`) {
			t.Errorf("%s: %s", text, body)
		}
	}
	priceOf := func() *adminapi.Cents {
		return admin[adminapi.List[adminapi.Model]](h, "GET", "/models?tenant=local", "").Data[0].CentsPer1kTokens
	}
	admin[adminapi.Price](h, "PUT", "/prices", `{"model":"demo","cents_per_1k_tokens":2}`)
	if p := priceOf(); p == nil || p.String() != "2" {
		t.Errorf("everybody's price: %v", p)
	}
	mine := admin[adminapi.Price](h, "PUT", "/prices", `{"model":"demo","tenant":"local","cents_per_1k_tokens":0}`)
	if p := priceOf(); p == nil || *p != 0 || mine.Tenant != h.tenant.ID || mine.TenantSlug != "local" {
		t.Errorf("the tenant's own price: %v, %+v", p, mine)
	}
	h.newTenant("acme")
	for query, want := range map[string]string{
		"": "a/b:c  demo  demo local", "?tenant=local": "a/b:c  demo local", "?tenant=acme": "a/b:c  demo ",
	} {
		var got []string
		for _, p := range pages[adminapi.Price](h, "/prices"+query) {
			got = append(got, p.Model+" "+p.TenantSlug)
		}
		if text := strings.Join(got, " "); text != want {
			t.Errorf("%s: %q, want %q", query, text, want)
		}
	}
}

// pages reads a list one by one, by its pages.
func pages[T any](h *house, path string) (all []T) {
	h.t.Helper()
	sign := "?"
	if strings.Contains(path, "?") {
		sign = "&"
	}
	for after := ""; ; {
		p := admin[adminapi.List[T]](h, "GET", path+sign+"limit=1"+after, "")
		if p.HasMore != (p.Next != "") || len(p.Data) > 1 {
			h.t.Fatalf("page %+v", p)
		}
		all = append(all, p.Data...)
		if !p.HasMore {
			return all
		}
		after = "&after=" + p.Next
	}
}

// What was used is told alike by pages, as a whole, as CSV, and from the books.
func TestUsage(t *testing.T) {
	t.Parallel()
	h := build(t, plan{})
	admin[adminapi.Price](h, "PUT", "/prices", `{"model":"demo","cents_per_1k_tokens":"0.333"}`)
	names := []string{"=cmd|' /C calc'!A0", `Ada's "best", laptop`, ""}
	for i, name := range names {
		_, secret := h.newKey(books.NewKey{Tenant: "local", User: books.FirstEmail, Name: name})
		for range i + 1 {
			if got := h.code("POST", "/v1/chat/completions", secret, ask(`"max_tokens":7`)); got.status != 200 {
				t.Fatalf("%+v", got)
			}
		}
	}
	var total adminapi.Usage
	until(t, "all requests in the ledger", func() bool {
		total = admin[adminapi.List[adminapi.Usage]](h, "GET", "/usage", "").Data[0]
		return total.Requests == 6
	})
	if total.CompletionTokens != 6*7 || total.PromptTokens < 6 || total.CostCents == 0 || total.Tenant != "" || total.Model != "" {
		t.Errorf("total %+v", total)
	}
	by := func(query string) []adminapi.Usage {
		return admin[adminapi.List[adminapi.Usage]](h, "GET", "/usage?"+query, "").Data
	}
	for _, query := range []string{"by=key", "by=model", "by=tenant,user,key,model,day", "by=day,key&tenant=local&model=demo", "by=key&since=2020-01-01&until=2999-01-01T00:00:00%2B02:00"} {
		rows := by(query)
		if diff := cmp.Diff(rows, pages[adminapi.Usage](h, "/usage?"+query)); diff != "" {
			t.Errorf("%s, -whole +pages:\n%s", query, diff)
		}
		var sum adminapi.Usage
		for _, u := range rows {
			sum.Requests += u.Requests
			sum.PromptTokens += u.PromptTokens
			sum.CompletionTokens += u.CompletionTokens
			sum.CostCents += u.CostCents
		}
		if sum != total {
			t.Errorf("%s adds up to %+v, want %+v", query, sum, total)
		}
	}
	for query, want := range map[string]int{
		"by=key&until=2020-01-01": 0, "by=key&since=2999-01-01": 0, "by=key&model=other": 0, "by=key": 3,
		"by=key&user=" + string(h.user.ID): 3, "by=key&user=LOCAL@localhost&tenant=local": 3, "until=2020-01-01": 1,
	} {
		if rows := by(query); len(rows) != want {
			t.Errorf("%s: %+v", query, rows)
		}
	}
	one := by("by=key,user,tenant,model,day")[0]
	if one.TenantSlug != "local" || one.Email != books.FirstEmail || one.Model != "demo" || !strings.HasPrefix(one.KeyPrefix, "sk-ownllm-") || len(one.Day) != len("2026-11-30") {
		t.Errorf("%+v", one)
	}
	if rows := by("by=model&key=" + string(one.Key)); len(rows) != 1 || rows[0].Requests != 1 {
		t.Errorf("of one key: %+v", rows)
	}

	for _, way := range []struct{ query, header string }{{"&format=csv", "X: y"}, {"", "Accept: text/csv"}, {"", "Accept: text/html, text/csv;q=0.9, */*;q=0.1"}} {
		resp, text := h.do("GET", "/api/v1/usage?by=key,day"+way.query, adminToken, "", way.header)
		if kind := resp.Header.Get("Content-Type"); !strings.HasPrefix(kind, "text/csv") || !strings.Contains(resp.Header.Get("Content-Disposition"), "usage.csv") {
			t.Errorf("%+v: %s", way, kind)
		}
		lines, err := csv.NewReader(strings.NewReader(text)).ReadAll()
		if err != nil || len(lines) != 4 || strings.Join(lines[0], " ") != "key key_name key_prefix day requests prompt_tokens completion_tokens cost_cents" {
			t.Fatalf("%v: %s", err, text)
		}
		for i, u := range by("by=key,day") {
			want := []string{string(u.Key), u.KeyName, u.KeyPrefix, u.Day, fmt.Sprint(u.Requests), fmt.Sprint(u.PromptTokens), fmt.Sprint(u.CompletionTokens), u.CostCents.String()}
			if u.KeyName == names[0] {
				want[1] = "'" + u.KeyName
			}
			if diff := cmp.Diff(want, lines[i+1]); diff != "" {
				t.Errorf("-JSON +CSV:\n%s", diff)
			}
		}
	}
	for _, accept := range []string{"X: y", "Accept: */*", "Accept: application/json", "Accept: text/csv;q=0.1, application/json"} {
		if resp, _ := h.do("GET", "/api/v1/usage", adminToken, "", accept); resp.Header.Get("Content-Type") != "application/json" {
			t.Errorf("%s: %s", accept, resp.Header.Get("Content-Type"))
		}
	}
}

// A CSV file has all rows, however many pages of the books that takes.
func TestUsageCSVIsWhole(t *testing.T) {
	t.Parallel()
	h := build(t, plan{empty: true})
	admin[adminapi.Tenant](h, "PATCH", "/tenants/local", `{"qps":1000000}`)
	admin[adminapi.Key](h, "PATCH", "/keys/"+string(h.keyID()), `{"concurrency":100000}`)
	lease := must(h.store.RenewLease(t.Context(), schemas.NewOwnerID(), time.Minute))
	const requests, batch = 2100, 300
	for n := 0; n < requests; n += batch {
		admit, settle := books.Turn{Lease: lease}, books.Turn{}
		for i := range batch {
			id, prompt := schemas.NewRequestID(), int64(1)
			admit.Admit = append(admit.Admit, books.Ask{
				Request: id, Tenant: h.tenant.ID, Key: h.keyID(), Model: fmt.Sprintf("m%04d", n+i), Prompt: 1, Limit: 1, Timeout: time.Minute,
			})
			settle.Settle = append(settle.Settle, books.Settlement{Request: id, Key: h.keyID(), Prompt: &prompt, Completion: 1, Outcome: books.OutcomeDone})
		}
		must(h.store.Turn(t.Context(), admit))
		must(h.store.Turn(t.Context(), settle))
	}
	_, text := h.do("GET", "/api/v1/usage?by=model&format=csv", adminToken, "")
	lines, err := csv.NewReader(strings.NewReader(text)).ReadAll()
	if err != nil || len(lines) != requests+1 {
		t.Fatalf("%d lines, %v", len(lines), err)
	}
	for i, line := range lines[1:] {
		if want := fmt.Sprintf("m%04d 1 1 1 0", i); strings.Join(line, " ") != want {
			t.Fatalf("line %d is %v, want %s", i, line, want)
		}
	}
}

// The audit says who changed what, and never a secret.
func TestAudit(t *testing.T) {
	t.Parallel()
	h := build(t, plan{empty: true, edge: edge.Config{TrustedProxies: prefixes("127.0.0.0/8")}})
	requests := map[string]string{} // by action
	do := func(action, method, path, body string) string {
		t.Helper()
		resp, text := h.do(method, adminapi.Prefix+path, adminToken, body, "X-Forwarded-For: 203.0.113.7")
		if resp.StatusCode/100 != 2 {
			t.Fatalf("%s: %s %s", action, resp.Status, text)
		}
		if action != "" {
			requests[action] = resp.Header.Get("X-Request-Id")
		}
		return text
	}
	do("tenant.create", "POST", "/tenants", `{"slug":"acme"}`)
	do("tenant.set", "PATCH", "/tenants/acme", `{"qps":5}`)
	do("", "PATCH", "/tenants/acme", `{"qps":5}`)
	do("tenant.suspend", "POST", "/tenants/acme/suspend", ``)
	do("", "POST", "/tenants/acme/suspend", ``)
	do("tenant.resume", "POST", "/tenants/acme/resume", ``)
	var user adminapi.User
	if err := json.Unmarshal([]byte(do("user.create", "POST", "/users", `{"tenant":"acme","email":"a@b"}`)), &user); err != nil {
		t.Fatal(err)
	}
	do("user.deactivate", "POST", "/users/"+string(user.ID)+"/deactivate", ``)
	do("user.activate", "POST", "/users/"+string(user.ID)+"/activate", ``)
	var key, rotated adminapi.CreatedKey
	if err := json.Unmarshal([]byte(do("key.create", "POST", "/keys", `{"tenant":"acme","user":"a@b"}`)), &key); err != nil {
		t.Fatal(err)
	}
	do("key.set", "PATCH", "/keys/"+string(key.ID), `{"budget_cents":5}`)
	if err := json.Unmarshal([]byte(do("key.rotate", "POST", "/keys/"+string(key.ID)+"/rotate", `{"overlap_seconds":5}`)), &rotated); err != nil {
		t.Fatal(err)
	}
	do("key.revoke", "POST", "/keys/"+string(key.ID)+"/revoke", ``)
	do("price.set", "PUT", "/prices", `{"model":"demo","tenant":"acme","cents_per_1k_tokens":1}`)

	entries := pages[adminapi.AuditEntry](h, "/audit?tenant=acme")
	got := map[string]string{}
	for i, a := range entries {
		got[a.Action] = a.Request
		if a.Actor != "admin" || a.Address != "203.0.113.7" || a.Tenant != user.Tenant || a.TenantSlug != "acme" || a.Object == "" || a.At.IsZero() || i > 0 && a.ID <= entries[i-1].ID {
			t.Errorf("%+v", a)
		}
	}
	if diff := cmp.Diff(requests, got); diff != "" || len(entries) != len(requests) {
		t.Errorf("%d entries, -done +listed:\n%s", len(entries), diff)
	}
	text, err := json.Marshal(entries)
	if err != nil || strings.Contains(string(text), key.Secret) || strings.Contains(string(text), rotated.Secret) || strings.Contains(string(text), adminToken) {
		t.Errorf("%v: the audit holds a secret: %s", err, text)
	}
	if diff := cmp.Diff(entries, byAdmin(h)); diff != "" {
		t.Errorf("-of the tenant +of all:\n%s", diff)
	}
	if first := pages[adminapi.AuditEntry](h, "/audit")[0]; first.Actor != "system" || first.Action != "tenant.create" {
		t.Errorf("the first entry is %+v", first)
	}
}

// byAdmin is the audit of what was changed over HTTP.
func byAdmin(h *house) (list []adminapi.AuditEntry) {
	h.t.Helper()
	for _, a := range pages[adminapi.AuditEntry](h, "/audit") {
		if a.Actor == "admin" {
			list = append(list, a)
		}
	}
	return list
}

// Lists of all tenants, and of things that only the edge knows, come in pages too, with
// the slugs of tenants.
func TestListsOfAllTenants(t *testing.T) {
	t.Parallel()
	h := build(t, plan{})
	tenants := map[string]bool{"local": true}
	l := listen(t, "127.0.0.1:0")
	h.run("backend", func(ctx context.Context) error { return demo.New(demo.Options{}).Serve(ctx, l) })
	for _, slug := range []string{"acme", "zeta"} {
		tenant, _, _ := h.newTenant(slug)
		h.work(tenant.ID, backend.Config{URL: "http://" + l.Addr().String()}, natstest.Log)
		tenants[slug] = true
		until(t, "the agent of "+slug, func() bool {
			models, _ := h.agents.Models(tenant.ID)
			return len(models) > 0
		})
	}
	for path, slugs := range map[string][]string{
		"/agents": slugsIn(pages[adminapi.Agent](h, "/agents"), func(a adminapi.Agent) string { return a.TenantSlug }),
		"/models": slugsIn(pages[adminapi.Model](h, "/models"), func(m adminapi.Model) string { return m.TenantSlug }),
		"/users":  slugsIn(pages[adminapi.User](h, "/users"), func(u adminapi.User) string { return u.TenantSlug }),
		"/keys":   slugsIn(pages[adminapi.Key](h, "/keys"), func(k adminapi.Key) string { return k.TenantSlug }),
	} {
		if want := slices.Sorted(maps.Keys(tenants)); !slices.Equal(slugs, want) {
			t.Errorf("%s: of %v, want %v", path, slugs, want)
		}
	}
	if list := pages[adminapi.Agent](h, "/agents?tenant=acme"); len(list) != 1 || list[0].TenantSlug != "acme" {
		t.Errorf("%+v", list)
	}
	// What was learnt outlives the books.
	h.database.Cut()
	defer h.database.Restore()
	if list := pages[adminapi.Agent](h, "/agents"); len(list) != 3 || list[0].TenantSlug != "local" {
		t.Errorf("without the books: %+v", list)
	}
	resp, body := h.do("GET", "/api/v1/models", adminToken, "") // whose prices aren't known
	checkRefusal(t, resp, body, "internal_error", "")
	h.database.Restore()
	if list := pages[adminapi.Key](h, "/keys?user="+string(h.user.ID)); len(list) != 1 || list[0].User != h.user.ID {
		t.Errorf("%+v", list)
	}
}

func slugsIn[T any](list []T, slug func(T) string) []string {
	out := make([]string, len(list))
	for i, v := range list {
		out[i] = slug(v)
	}
	slices.Sort(out)
	return out
}
