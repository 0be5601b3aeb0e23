package edge_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/edge"
	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/schemas"
)

func TestAdminTokenIsChecked(t *testing.T) {
	t.Parallel()
	h := build(t, plan{empty: true})
	for _, header := range []string{
		"", "Authorization: Bearer ", "Authorization: Bearer x", "Authorization: Bearer " + adminToken + "x", "Authorization: Bearer " + adminToken[1:],
		"Authorization: Basic " + adminToken, "Authorization: " + adminToken, "Authorization: Bearer " + h.key, "X-API-Key: " + adminToken,
	} {
		for _, route := range []struct{ method, path string }{
			{"GET", "/api/v1/tenants"}, {"POST", "/api/v1/keys"}, {"GET", "/api/v1/status"}, {"POST", "/api/v1/keys/x/revoke"}, {"GET", "/api/v1/nothing"},
		} {
			var headers []string
			if header != "" {
				headers = []string{header}
			}
			resp, body := h.do(route.method, route.path, "", "", headers...)
			checkRefusal(t, resp, body, "key_invalid", "")
			if strings.Contains(body, adminToken) {
				t.Errorf("the token is in the answer: %s", body)
			}
		}
	}
	if got := h.code("GET", "/api/v1/tenants?token="+adminToken, "", ""); got.code != "key_invalid" {
		t.Errorf("a token in the address: %+v", got)
	}
	for _, scheme := range []string{"Bearer", "bearer"} {
		if resp, body := h.do("GET", "/api/v1/tenants", "", "", "Authorization: "+scheme+" "+adminToken); resp.StatusCode != 200 {
			t.Errorf("%s: %s %s", scheme, resp.Status, body)
		}
	}
}

// Without a token of its own the edge has no admin API: an empty token opens nothing.
func TestAdminAPIWithoutAToken(t *testing.T) {
	t.Parallel()
	h := build(t, plan{empty: true, closed: true})
	for _, header := range []string{"Authorization: Bearer ", "Authorization: Bearer", "Authorization: ", "X: y"} {
		resp, body := h.do("GET", "/api/v1/tenants", "", "", header)
		checkRefusal(t, resp, body, "key_invalid", "")
	}
}

func TestAdminRequestsThatAreWrong(t *testing.T) {
	t.Parallel()
	h := build(t, plan{empty: true, edge: edge.Config{BodyLimit: 8 << 20}})
	user := fmt.Sprintf(`"tenant":%q,"user":%q`, h.tenant.ID, h.user.ID)
	before := h.written()
	for _, test := range []struct{ method, path, body, code, param string }{
		{"POST", "/tenants", ``, "invalid_json", ""},
		{"POST", "/tenants", `{`, "invalid_json", ""},
		{"POST", "/tenants", `[]`, "invalid_json", ""},
		{"POST", "/tenants", `"x"`, "invalid_json", ""},
		{"POST", "/tenants", `{"slug":"a"} {"slug":"b"}`, "invalid_json", ""},
		{"POST", "/tenants", `{"slug":"a"}]`, "invalid_json", ""},
		{"POST", "/tenants", `{"slug":1}`, "invalid_value", "slug"},
		{"POST", "/tenants", `{"slug":null}`, "invalid_value", "slug"},
		{"POST", "/tenants", `{}`, "invalid_value", "slug"},
		{"POST", "/tenants", `{"slug":"A B"}`, "invalid_value", "slug"},
		{"POST", "/tenants", `{"slug":"local"}`, "invalid_value", "slug"},
		{"POST", "/tenants", `{"slug":"x","qsp":1}`, "invalid_value", "qsp"},
		{"POST", "/tenants", `{"slug":"` + strings.Repeat("x", 1<<20) + `"}`, "request_too_large", ""},
		{"POST", "/tenants", `null`, "invalid_json", ""},
		{"POST", "/tenants", "{\"slug\":\"x\xff\"}", "invalid_json", ""},
		{"POST", "/tenants", `{"Slug":"x"}`, "invalid_value", "Slug"},
		{"POST", "/tenants", `{"slug":"x","` + strings.Repeat("y", 1000) + `":1}`, "invalid_value", strings.Repeat("y", 64) + "…"},
		{"POST", "/tenants", `{"slug":"x'; DROP TABLE tenants; --"}`, "invalid_value", "slug"},
		{"POST", "/tenants", `{"slug":"x\u0000"}`, "invalid_value", "slug"},
		{"POST", "/tenants", `{"slug":"x","name":"a\u0000b"}`, "invalid_value", "name"},
		{"POST", "/tenants", `{"slug":"x","name":"a\u001b[31mb"}`, "invalid_value", "name"},
		{"POST", "/tenants", `{"slug":"x","name":"a\u202eb"}`, "invalid_value", "name"},
		{"POST", "/tenants", `{"slug":"x","name":"` + strings.Repeat("é", 201) + `"}`, "invalid_value", "name"},
		{"POST", "/tenants", `{"slug":"x","name":["a"]}`, "invalid_value", "name"},
		{"POST", "/tenants", `{"slug":"x","qps":0}`, "invalid_value", "qps"},
		{"POST", "/tenants", `{"slug":"x","qps":-1}`, "invalid_value", "qps"},
		{"POST", "/tenants", `{"slug":"x","qps":1.5}`, "invalid_value", "qps"},
		{"POST", "/tenants", `{"slug":"x","qps":"5"}`, "invalid_value", "qps"},
		{"POST", "/tenants", `{"slug":"x","qps":1000001}`, "invalid_value", "qps"},
		{"POST", "/tenants", `{"slug":"x","qps":9223372036854775808}`, "invalid_value", "qps"},
		{"POST", "/tenants", `{"slug":"x","qps":` + strings.Repeat("9", 100_000) + `}`, "invalid_value", "qps"},
		{"PATCH", "/tenants/local", `{"slug":"x"}`, "invalid_value", "slug"},
		{"PATCH", "/tenants/local", `{"state":"suspended"}`, "invalid_value", "state"},
		{"PATCH", "/tenants/local", `{"qps":0}`, "invalid_value", "qps"},
		{"PATCH", "/tenants/local", `{"name":"\u0007"}`, "invalid_value", "name"},
		{"PATCH", "/tenants/local", ``, "invalid_json", ""},
		{"PATCH", "/tenants/nobody", `{"qps":1}`, "not_found", ""},
		{"PUT", "/tenants/local", `{"qps":1}`, "method_not_allowed", ""},
		{"POST", "/tenants/nobody/suspend", ``, "not_found", ""},
		{"POST", "/tenants/nobody/delete", ``, "not_found", ""},
		{"DELETE", "/tenants", ``, "method_not_allowed", ""},
		{"POST", "/users", `{"tenant":"nobody","email":"a@b"}`, "not_found", ""},
		{"POST", "/users", `{"tenant":"local","email":"what"}`, "invalid_value", "email"},
		{"POST", "/users", `{"tenant":"local","email":"a@b\u0000"}`, "invalid_value", "email"},
		{"POST", "/users", `{"tenant":"local","email":"a@b\u0085"}`, "invalid_value", "email"},
		{"POST", "/users", `{"tenant":"local","email":"LOCAL@localhost"}`, "invalid_value", "email"},
		{"POST", "/users", `{"tenant":"local\u0000","email":"a@b"}`, "not_found", ""},
		{"POST", "/users", `{"tenant":"' OR 1=1 --","email":"a@b"}`, "not_found", ""},
		{"POST", "/users/nobody/deactivate", ``, "not_found", ""},
		{"GET", "/users?tenant=nobody", ``, "not_found", ""},
		{"GET", "/tenants?limit=0", ``, "invalid_value", "limit"},
		{"GET", "/tenants?limit=x", ``, "invalid_value", "limit"},
		{"GET", "/tenants?limit=501", ``, "invalid_value", "limit"},
		{"GET", "/tenants?tenant=local", ``, "invalid_value", "tenant"},
		{"GET", "/keys?tenat=local", ``, "invalid_value", "tenat"},
		{"GET", "/keys?tenant=local&tenant=x", ``, "invalid_value", "tenant"},
		{"GET", "/keys?user=a@b", ``, "invalid_value", "user"},
		{"GET", "/tenants?after=x", ``, "invalid_value", "after"},
		{"GET", "/agents?after=x", ``, "invalid_value", "after"},
		{"GET", "/models?after=x/y", ``, "invalid_value", "after"},
		{"GET", "/prices?after=x", ``, "invalid_value", "after"},
		{"GET", "/audit?after=-1", ``, "invalid_value", "after"},
		{"GET", "/audit?tenant=nobody", ``, "not_found", ""},
		{"GET", "/usage?after=x&by=day", ``, "invalid_value", "after"},
		{"GET", "/usage?tenant=nobody", ``, "not_found", ""},
		{"GET", "/usage?key=" + h.key, ``, "not_found", ""},
		{"GET", "/usage?user=a@b", ``, "invalid_value", "user"},
		{"GET", "/usage?by=hour", ``, "invalid_value", "by"},
		{"GET", "/usage?by=day,day", ``, "invalid_value", "by"},
		{"GET", "/usage?by=day,", ``, "invalid_value", "by"},
		{"GET", "/usage?since=yesterday", ``, "invalid_value", "since"},
		{"GET", "/usage?since=2026-02-30", ``, "invalid_value", "since"},
		{"GET", "/usage?until=2026-11-01T00:00:00", ``, "invalid_value", "until"},
		{"GET", "/usage?since=2026-11-02&until=2026-11-01", ``, "invalid_value", "until"},
		{"GET", "/usage?format=xml", ``, "invalid_value", "format"},
		{"GET", "/usage?format=csv&limit=5", ``, "invalid_value", "limit"},
		{"GET", "/usage?format=csv&after=x", ``, "invalid_value", "after"},
		{"GET", "/usage?model=a%00", ``, "invalid_value", "model"},
		{"GET", "/agents?tenant=nobody", ``, "not_found", ""},
		{"GET", "/models?tenant=nobody", ``, "not_found", ""},
		{"POST", "/keys", `{"tenant":"nobody","user":"x"}`, "not_found", ""},
		{"POST", "/keys", `{"tenant":"local","user":"nobody"}`, "not_found", ""},
		{"POST", "/keys", `{` + user + `,"scopes":["demo"]}`, "invalid_value", "scopes"},
		{"POST", "/keys", `{` + user + `,"scopes":"model:*"}`, "invalid_value", "scopes"},
		{"POST", "/keys", `{` + user + `,"ttl_seconds":-1}`, "invalid_value", "ttl_seconds"},
		{"POST", "/keys", `{` + user + `,"ttl_seconds":9223372036854775807}`, "invalid_value", "ttl_seconds"},
		{"POST", "/keys", `{` + user + `,"ttl_seconds":1.5}`, "invalid_value", "ttl_seconds"},
		{"POST", "/keys", `{` + user + `,"scopes":[]}`, "invalid_value", "scopes"},
		{"POST", "/keys", `{` + user + `,"scopes":[""]}`, "invalid_value", "scopes"},
		{"POST", "/keys", `{` + user + `,"scopes":["model:"]}`, "invalid_value", "scopes"},
		{"POST", "/keys", `{` + user + `,"scopes":["*"]}`, "invalid_value", "scopes"},
		{"POST", "/keys", `{` + user + `,"scopes":["model:llama*"]}`, "invalid_value", "scopes"},
		{"POST", "/keys", `{` + user + `,"scopes":["model:a","admin:*"]}`, "invalid_value", "scopes"},
		{"POST", "/keys", `{` + user + `,"scopes":["model:a\u0000"]}`, "invalid_value", "scopes"},
		{"POST", "/keys", `{` + user + `,"scopes":[5]}`, "invalid_value", "scopes"},
		{"POST", "/keys", `{` + user + `,"name":"a\nb"}`, "invalid_value", "name"},
		{"POST", "/keys", `{` + user + `,"budget_cents":-1}`, "invalid_value", "budget_cents"},
		{"POST", "/keys", `{` + user + `,"budget_cents":0.5}`, "invalid_value", "budget_cents"},
		{"POST", "/keys", `{` + user + `,"budget_cents":1000000000001}`, "invalid_value", "budget_cents"},
		{"POST", "/keys", `{` + user + `,"budget_cents":99999999999999999999}`, "invalid_value", "budget_cents"},
		{"POST", "/keys", `{` + user + `,"concurrency":0}`, "invalid_value", "concurrency"},
		{"POST", "/keys", `{` + user + `,"concurrency":-5}`, "invalid_value", "concurrency"},
		{"POST", "/keys", `{` + user + `,"concurrency":2147483648}`, "invalid_value", "concurrency"},
		{"POST", "/keys", `{` + user + `,"ttl_seconds":9223372036}`, "invalid_value", "ttl_seconds"},
		{"POST", "/keys", `{` + user + `,"ttl_seconds":"1h"}`, "invalid_value", "ttl_seconds"},
		{"POST", "/keys", `{` + user + `,"expires_at":"2020-01-01T00:00:00Z"}`, "invalid_value", "expires_at"},
		{"POST", "/keys", `{` + user + `,"expires_at":"9999-12-31T23:59:59Z"}`, "invalid_value", "expires_at"},
		{"POST", "/keys", `{` + user + `,"expires_at":"tomorrow"}`, "invalid_value", "expires_at"},
		{"POST", "/keys", `{` + user + `,"expires_at":1}`, "invalid_value", "expires_at"},
		{"POST", "/keys", `{` + user + `,"expires_at":"2099-01-01T00:00:00Z","ttl_seconds":5}`, "invalid_value", "expires_at"},
		{"PATCH", "/keys/" + string(h.keyID()), `{"scopes":[]}`, "invalid_value", "scopes"},
		{"PATCH", "/keys/" + string(h.keyID()), `{"scopes":["demo"]}`, "invalid_value", "scopes"},
		{"PATCH", "/keys/" + string(h.keyID()), `{"budget_cents":-1}`, "invalid_value", "budget_cents"},
		{"PATCH", "/keys/" + string(h.keyID()), `{"budget_cents":"none"}`, "invalid_value", "budget_cents"},
		{"PATCH", "/keys/" + string(h.keyID()), `{"concurrency":0}`, "invalid_value", "concurrency"},
		{"PATCH", "/keys/" + string(h.keyID()), `{"name":"ok","concurrency":0}`, "invalid_value", "concurrency"},
		{"PATCH", "/keys/" + string(h.keyID()), `{"tenant":"other"}`, "invalid_value", "tenant"},
		{"PATCH", "/keys/" + string(h.keyID()), `{"ttl_seconds":5}`, "invalid_value", "ttl_seconds"},
		{"PATCH", "/keys/" + h.key, `{"name":"x"}`, "not_found", ""},
		{"POST", "/keys/" + string(h.keyID()) + "/rotate", `{"overlap_seconds":-1}`, "invalid_value", "overlap_seconds"},
		{"POST", "/keys/" + string(h.keyID()) + "/rotate", `{"overlap_seconds":9223372036854775807}`, "invalid_value", "overlap_seconds"},
		{"POST", "/keys/" + string(h.keyID()) + "/rotate", `{"overlap_seconds":31536001}`, "invalid_value", "overlap_seconds"},
		{"POST", "/keys/" + string(h.keyID()) + "/rotate", `{"overlap":"1h"}`, "invalid_value", "overlap"},
		{"POST", "/keys/" + h.key + "/rotate", ``, "not_found", ""},
		{"PUT", "/prices", `{"model":"demo"}`, "invalid_value", "cents_per_1k_tokens"},
		{"PUT", "/prices", `{"model":"demo","cents_per_1k_tokens":null}`, "invalid_value", "cents_per_1k_tokens"},
		{"PUT", "/prices", `{"model":"demo","cents_per_1k_tokens":-0.5}`, "invalid_value", "cents_per_1k_tokens"},
		{"PUT", "/prices", `{"model":"demo","cents_per_1k_tokens":0.0000001}`, "invalid_value", "cents_per_1k_tokens"},
		{"PUT", "/prices", `{"model":"demo","cents_per_1k_tokens":"free"}`, "invalid_value", "cents_per_1k_tokens"},
		{"PUT", "/prices", `{"model":"demo","cents_per_1k_tokens":10000.000001}`, "invalid_value", "cents_per_1k_tokens"},
		{"PUT", "/prices", `{"model":"demo","cents_per_1k_tokens":1e400}`, "invalid_value", "cents_per_1k_tokens"},
		{"PUT", "/prices", `{"model":"","cents_per_1k_tokens":1}`, "invalid_value", "model"},
		{"PUT", "/prices", `{"model":"a\u0000","cents_per_1k_tokens":1}`, "invalid_value", "model"},
		{"PUT", "/prices", `{"model":"demo","tenant":"nobody","cents_per_1k_tokens":1}`, "not_found", ""},
		{"POST", "/prices", `{"model":"demo","cents_per_1k_tokens":1}`, "method_not_allowed", ""},
		{"POST", "/keys/key_x/revoke", ``, "not_found", ""},
		{"POST", "/keys/" + h.key + "/revoke", ``, "not_found", ""},
		{"GET", "/nothing", ``, "not_found", ""},
	} {
		resp, body := h.do(test.method, adminapi.Prefix+test.path, adminToken, test.body)
		if t.Run(test.method+" "+test.path+" "+test.body[:min(len(test.body), 40)], func(t *testing.T) {
			checkRefusal(t, resp, body, test.code, test.param)
			if strings.Contains(body, h.key) || strings.Contains(body, "adminapi") {
				t.Errorf("says too much: %s", body)
			}
			if len(body) > 2000 {
				t.Errorf("says too much: %d bytes", len(body))
			}
		}); test.method == "DELETE" && sorted(resp.Header.Get("Allow")) != "GET, HEAD, POST" {
			t.Errorf("Allow is %q", resp.Header.Get("Allow"))
		}
	}
	if after := h.written(); after != before {
		t.Errorf("requests that were refused have left something behind:\nbefore: %s\nafter:  %s", before, after)
	}
}

// keyID is the id of the first key.
func (h *house) keyID() schemas.KeyID {
	h.t.Helper()
	return must(h.store.LookupKey(context.Background(), must(apikey.FromSecret(h.key)).Hash())).Key
}

// written is all that an admin can have written.
func (h *house) written() string {
	h.t.Helper()
	ctx := context.Background()
	all := books.Page{Limit: 1000}
	tenants, _, err1 := h.store.ListTenants(ctx, all)
	users, _, err2 := h.store.ListUsers(ctx, "", all)
	keys, _, err3 := h.store.ListKeys(ctx, "", "", all)
	prices, _, err4 := h.store.ListPrices(ctx, "", all)
	entries, _, err5 := h.store.ListAudit(ctx, "", all)
	text, err6 := json.Marshal([]any{tenants, users, keys, prices, entries})
	if err := errors.Join(err1, err2, err3, err4, err5, err6); err != nil {
		h.t.Fatal(err)
	}
	return string(text)
}

// admin calls the admin API and decodes the answer.
func admin[T any](h *house, method, path, body string, headers ...string) (v T) {
	h.t.Helper()
	resp, text := h.do(method, adminapi.Prefix+path, adminToken, body, headers...)
	want := http.StatusOK
	if method == "POST" && (strings.Count(path, "/") == 1 || path == "/agents/pairings") {
		want = http.StatusCreated
	}
	if err := json.Unmarshal([]byte(text), &v); err != nil || resp.StatusCode != want {
		h.t.Fatalf("%s %s: %s %s", method, path, resp.Status, text)
	}
	return v
}

// Whatever an admin changes bites at once, and can be undone but for a revocation.
func TestAdminAPI(t *testing.T) {
	t.Parallel()
	h := build(t, plan{})
	tenant := admin[adminapi.Tenant](h, "POST", "/tenants", `{"slug":"acme"}`)
	user := admin[adminapi.User](h, "POST", "/users", `{"tenant":"acme","email":"ada@acme.example"}`)
	key := admin[adminapi.CreatedKey](h, "POST", "/keys", `{"tenant":"acme","user":"ada@acme.example","name":"n","scopes":["model:demo"]}`)
	if tenant.Slug != "acme" || user.Tenant != tenant.ID || key.User != user.ID || key.State != adminapi.KeyActive ||
		!strings.HasPrefix(key.Secret, "sk-ownllm-") || !strings.HasPrefix(key.Secret, key.Prefix) || len(key.Secret) != len("sk-ownllm-")+24 {
		t.Fatalf("made %+v, %+v, %+v", tenant, user, key)
	}
	becomes := func(want string) {
		t.Helper()
		within(t, noticed+slack, "the key to answer "+want, func() bool { return h.code("GET", "/v1/models", key.Secret, "").code == want })
	}
	becomes("agent_offline") // it has no agent; the key itself is good
	for _, change := range []struct{ path, state, code string }{
		{"/tenants/acme/suspend", "suspended", "tenant_disabled"},
		{"/tenants/acme/suspend", "suspended", "tenant_disabled"},
		{"/tenants/" + string(tenant.ID) + "/resume", "active", "agent_offline"},
		{"/users/" + string(user.ID) + "/deactivate", "deactivated", "user_deactivated"},
		{"/users/" + string(user.ID) + "/activate", "active", "agent_offline"},
		{"/keys/" + string(key.ID) + "/revoke", "revoked", "key_invalid"},
		{"/keys/" + string(key.ID) + "/revoke", "revoked", "key_invalid"},
	} {
		if got := admin[struct{ State string }](h, "POST", change.path, ""); got.State != change.state {
			t.Errorf("%s: state %s", change.path, got.State)
		}
		becomes(change.code)
	}
	keys := admin[adminapi.List[adminapi.Key]](h, "GET", "/keys?tenant=acme", "")
	if len(keys.Data) != 1 || keys.Data[0].State != adminapi.KeyRevoked || keys.Data[0].RevokedAt == nil {
		t.Errorf("keys: %+v", keys)
	}

	// Pages.
	for i := range 3 {
		admin[adminapi.Tenant](h, "POST", "/tenants", fmt.Sprintf(`{"slug":"t%d"}`, i))
	}
	var slugs []string
	for after := ""; ; {
		page := admin[adminapi.List[adminapi.Tenant]](h, "GET", "/tenants?limit=2&after="+after, "")
		for _, t := range page.Data {
			slugs = append(slugs, t.Slug)
		}
		if page.HasMore != (page.Next != "") || len(page.Data) > 2 {
			t.Fatalf("page %+v", page)
		}
		if after = page.Next; after == "" {
			break
		}
	}
	if got := strings.Join(slugs, " "); got != "local acme t0 t1 t2" {
		t.Errorf("tenants: %s", got)
	}

	status := admin[adminapi.Status](h, "GET", "/status", "")
	if !status.Ready || status.Version != "test" || status.Postgres != "ok" || status.NATS != "ok" || len(status.Agents) != 1 ||
		status.Agents[0].State != adminapi.AgentUp || status.Agents[0].TenantSlug != "local" || len(status.Agents[0].Models) != 1 || status.Agents[0].LastSeen == nil {
		t.Errorf("status: %+v", status)
	}
	models := admin[adminapi.List[adminapi.Model]](h, "GET", "/models?tenant=local", "")
	if len(models.Data) != 1 || models.Data[0].ID != "demo" || models.Data[0].State != schemas.ModelReady || len(models.Data[0].Agents) != 1 ||
		models.Data[0].TenantSlug != "local" || models.Data[0].CentsPer1kTokens != nil {
		t.Errorf("models: %+v", models)
	}
	if none := admin[adminapi.List[adminapi.Agent]](h, "GET", "/agents?tenant=acme", ""); len(none.Data) != 0 || none.Data == nil {
		t.Errorf("agents of a tenant that has none: %+v", none)
	}
}
