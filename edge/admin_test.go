package edge_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"

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
		{"POST", "/tenants/nobody/suspend", ``, "not_found", ""},
		{"POST", "/tenants/nobody/delete", ``, "not_found", ""},
		{"DELETE", "/tenants", ``, "method_not_allowed", ""},
		{"POST", "/users", `{"tenant":"nobody","email":"a@b"}`, "not_found", ""},
		{"POST", "/users", `{"tenant":"local","email":"what"}`, "invalid_value", "email"},
		{"POST", "/users/nobody/deactivate", ``, "not_found", ""},
		{"GET", "/users?tenant=nobody", ``, "not_found", ""},
		{"GET", "/tenants?limit=0", ``, "invalid_value", "limit"},
		{"GET", "/tenants?limit=x", ``, "invalid_value", "limit"},
		{"GET", "/tenants?limit=501", ``, "invalid_value", "limit"},
		{"GET", "/agents?tenant=nobody", ``, "not_found", ""},
		{"GET", "/models?tenant=nobody", ``, "not_found", ""},
		{"POST", "/keys", `{"tenant":"nobody","user":"x"}`, "not_found", ""},
		{"POST", "/keys", `{"tenant":"local","user":"nobody"}`, "not_found", ""},
		{"POST", "/keys", `{` + user + `,"scopes":["demo"]}`, "invalid_value", "scopes"},
		{"POST", "/keys", `{` + user + `,"scopes":"model:*"}`, "invalid_value", "scopes"},
		{"POST", "/keys", `{` + user + `,"ttl_seconds":-1}`, "invalid_value", "ttl_seconds"},
		{"POST", "/keys", `{` + user + `,"ttl_seconds":9223372036854775807}`, "invalid_value", "ttl_seconds"},
		{"POST", "/keys", `{` + user + `,"ttl_seconds":1.5}`, "invalid_value", "ttl_seconds"},
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
		}); test.code == "method_not_allowed" && sorted(resp.Header.Get("Allow")) != "GET, HEAD, POST" {
			t.Errorf("Allow is %q", resp.Header.Get("Allow"))
		}
	}
}

// admin calls the admin API and decodes the answer.
func admin[T any](h *house, method, path, body string) (v T) {
	h.t.Helper()
	resp, text := h.do(method, adminapi.Prefix+path, adminToken, body)
	want := http.StatusOK
	if body != "" {
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
		status.Agents[0].State != adminapi.AgentUp || len(status.Agents[0].Models) != 1 || status.Agents[0].LastSeen == nil {
		t.Errorf("status: %+v", status)
	}
	models := admin[adminapi.List[adminapi.Model]](h, "GET", "/models?tenant=local", "")
	if len(models.Data) != 1 || models.Data[0].ID != "demo" || models.Data[0].State != schemas.ModelReady || len(models.Data[0].Agents) != 1 {
		t.Errorf("models: %+v", models)
	}
	if none := admin[adminapi.List[adminapi.Agent]](h, "GET", "/agents?tenant=acme", ""); len(none.Data) != 0 || none.Data == nil {
		t.Errorf("agents of a tenant that has none: %+v", none)
	}
}
