package edge_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/edge"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// plainModel can only chat, and has a small window.
func plainModel(id string) schemas.Model {
	m := demo.DefaultModel()
	m.ID, m.ContextWindow = id, 64
	m.Capabilities = schemas.Capabilities{Completion: true}
	return m
}

// orderHouse has a model "plain", a model "away" whose agent is not there, and keys of
// every kind.
func orderHouse(t *testing.T) (h *house, keys map[string]string) {
	h = build(t, plan{models: []schemas.Model{demo.DefaultModel(), plainModel("plain"), plainModel("secret")}})
	ctx := context.Background()
	keys = map[string]string{
		"good":      h.key,
		"malformed": "sk-ownllm-short",
		"unknown":   "sk-ownllm-AAAAAAAAAAAAAAAAAAAAAAAA",
	}
	_, keys["scoped"] = h.newKey(books.NewKey{Scopes: []string{"model:demo", "model:plain", "model:away", "model:none"}})
	revoked, key := h.newKey(books.NewKey{})
	keys["revoked"] = key

	soon := time.Millisecond
	_, keys["expired"] = h.newKey(books.NewKey{TTL: &soon})
	off, _, offKey := h.newTenant("off")
	keys["of a suspended tenant"] = offKey
	_, keys["expired, of a suspended tenant"] = h.newKey(books.NewKey{Tenant: "off", User: "a@off", TTL: &soon})
	both, err := h.store.CreateUser(ctx, books.NewUser{Tenant: "off", Email: "b@off"})
	if err != nil {
		t.Fatal(err)
	}
	_, keys["of a deactivated user of a suspended tenant"] = h.newKey(books.NewKey{Tenant: "off", User: string(both.ID)})
	gone, err := h.store.CreateUser(ctx, books.NewUser{Tenant: string(h.tenant.ID), Email: "gone@h"})
	if err != nil {
		t.Fatal(err)
	}
	_, keys["of a deactivated user"] = h.newKey(books.NewKey{Tenant: string(h.tenant.ID), User: string(gone.ID)})
	expiredAndRevoked, key := h.newKey(books.NewKey{TTL: &soon})
	keys["revoked and expired"] = key

	for _, err := range []error{
		second(h.store.RevokeKey(ctx, revoked)), second(h.store.RevokeKey(ctx, expiredAndRevoked)),
		second(h.store.SetTenantState(ctx, string(off.ID), books.TenantSuspended)),
		second(h.store.SetUserState(ctx, gone.ID, books.UserDeactivated)),
		second(h.store.SetUserState(ctx, both.ID, books.UserDeactivated)),
		h.store.UpsertAgent(ctx, books.AgentReport{
			ID: schemas.NewAgentID(), Tenant: h.tenant.ID, Name: "away", Incarnation: schemas.NewIncarnation(),
			Inventory: schemas.Inventory{Models: []schemas.Model{plainModel("away")}},
		}),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	h.restore()
	return h, keys
}

func second[T any](_ T, err error) error { return err }

// TestOrderOfChecks sends requests that break several checks at once: the earliest one
// in the contract's order has to answer.
func TestOrderOfChecks(t *testing.T) {
	t.Parallel()
	h, keys := orderHouse(t)
	const chat = "/v1/chat/completions"
	tools := `"tools":[{"type":"function","function":{"name":"f"}}]`
	image := `"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:image/png;base64,AA=="}}]}]`
	format := `"response_format":{"type":"yaml"}`
	long := `"max_tokens":1000`
	hello := `"messages":[{"role":"user","content":"Hello"}]`
	object := func(members ...string) string { return "{" + strings.Join(members, ",") + "}" }
	for _, test := range []struct {
		name, method, path, key, body string
		want                          string
	}{
		{"route, key shape", "POST", "/v1/nothing", "malformed", object(), "not_found"},
		{"method, key shape", "PUT", chat, "malformed", object(), "method_not_allowed"},
		{"method, body", "DELETE", chat, "good", "{", "method_not_allowed"},
		{"key shape, body", "POST", chat, "malformed", "{", "key_malformed"},
		{"no key, body", "POST", chat, "", "{", "key_malformed"},
		{"key known, body", "POST", chat, "unknown", "{", "key_invalid"},
		{"revoked, body", "POST", chat, "revoked", "{", "key_invalid"},
		{"revoked, expiry", "POST", chat, "revoked and expired", "{", "key_invalid"},
		{"expiry, body", "POST", chat, "expired", "{", "key_expired"},
		{"expiry, tenant", "POST", chat, "expired, of a suspended tenant", "{", "key_expired"},
		{"tenant, user", "POST", chat, "of a deactivated user of a suspended tenant", "{", "tenant_disabled"},
		{"tenant, body", "POST", chat, "of a suspended tenant", "{", "tenant_disabled"},
		{"user, body", "POST", chat, "of a deactivated user", "{", "user_deactivated"},
		{"size, body", "POST", chat, "good", strings.Repeat("{", 1<<20+1), "request_too_large"},
		{"key known, size", "POST", chat, "unknown", strings.Repeat("{", 1<<20+1), "key_invalid"},
		{"body parses, required fields", "POST", chat, "good", `{"messages":[]`, "invalid_json"},
		{"model, messages", "POST", chat, "good", object(`"stream":1`), "model_required"},
		{"messages, types", "POST", chat, "good", object(`"model":"m"`, `"stream":1`), "messages_required"},
		{"required fields, scope", "POST", chat, "scoped", object(`"model":"secret"`), "messages_required"},
		{"types, scope", "POST", chat, "scoped", object(`"model":"secret"`, hello, `"stream":1`), "invalid_value"},
		{"scope, model exists", "POST", chat, "scoped", object(`"model":"nobody has it"`, hello), "scope_required"},
		{"scope, of a model that is there", "POST", chat, "scoped", object(`"model":"secret"`, hello), "scope_required"},
		{"scope, tools", "POST", chat, "scoped", object(`"model":"secret"`, hello, tools), "scope_required"},
		{"model exists, tools", "POST", chat, "scoped", object(`"model":"none"`, hello, tools, format), "model_not_found"},
		{"tools, vision", "POST", chat, "good", object(`"model":"plain"`, tools, image, format, long), "model_does_not_support_tools"},
		{"vision, response_format", "POST", chat, "good", object(`"model":"plain"`, image, format, long), "model_does_not_support_vision"},
		{"response_format, context length", "POST", chat, "good", object(`"model":"plain"`, hello, format, long), "invalid_response_format"},
		{"context length", "POST", chat, "good", object(`"model":"plain"`, hello, long), "context_length_exceeded"},
		{"tools, availability", "POST", chat, "good", object(`"model":"away"`, hello, tools), "model_does_not_support_tools"},
		{"vision, availability", "POST", chat, "good", object(`"model":"away"`, image), "model_does_not_support_vision"},
		{"response_format, availability", "POST", chat, "good", object(`"model":"away"`, hello, format), "invalid_response_format"},
		{"context length, availability", "POST", chat, "good", object(`"model":"away"`, hello, long), "context_length_exceeded"},
		{"availability", "POST", chat, "good", object(`"model":"away"`, hello), "agent_offline"},
		{"scope, availability", "GET", "/v1/models/secret", "scoped", "", "scope_required"},
		{"availability of a model", "GET", "/v1/models/none", "scoped", "", "model_not_found"},
	} {
		t.Run(test.name, func(t *testing.T) {
			key := test.key
			if key != "" {
				if key = keys[key]; key == "" {
					t.Fatalf("no key %q", test.key)
				}
			}
			got := h.code(test.method, test.path, key, test.body)
			if want := schemas.Code(test.want); got.code != test.want || got.status != want.Info().Status {
				t.Errorf("got %+v, want %s", got, test.want)
			}
		})
	}
}

// A key that isn't scoped for a model must not learn whether it exists.
func TestKeyLearnsNothingOfModelsBeyondItsScope(t *testing.T) {
	t.Parallel()
	h, keys := orderHouse(t)
	for _, request := range []struct{ method, path, body string }{
		{"GET", "/v1/models/%s", ""},
		{"POST", "/v1/chat/completions", `{"model":"%s","messages":[{"role":"user","content":"Hi"}],"tools":[{"type":"function"}]}`},
	} {
		var answers []string
		for _, model := range []string{"secret", "nobody", "demo2"} {
			fill := func(s string) string { return strings.Replace(s, "%s", model, 1) }
			resp, body := h.do(request.method, fill(request.path), keys["scoped"], fill(request.body))
			if resp.StatusCode != 403 {
				t.Errorf("%s of %s: status %d", request.method, model, resp.StatusCode)
			}
			answers = append(answers, strings.ReplaceAll(body, model, "…"))
		}
		if answers[0] != answers[1] || answers[1] != answers[2] {
			t.Errorf("the answers tell models apart: %q", answers)
		}
	}
	_, list := h.do("GET", "/v1/models", keys["scoped"], "")
	if strings.Contains(list, "secret") || !strings.Contains(list, `"id":"plain"`) || !strings.Contains(list, `"id":"demo"`) {
		t.Errorf("list of a scoped key: %s", list)
	}
	if _, list := h.do("GET", "/v1/models", keys["good"], ""); !strings.Contains(list, `"id":"secret"`) {
		t.Errorf("list of a key for all models: %s", list)
	}
}

// What is refused for its headers is refused before its body comes.
func TestKeyIsCheckedBeforeTheBodyIsRead(t *testing.T) {
	t.Parallel()
	h := build(t, plan{})
	_, fresh := h.newKey(books.NewKey{}) // in nobody's memory
	post := "POST /v1/chat/completions HTTP/1.1\nHost: h\n"
	for _, test := range []struct{ name, head, want string }{
		{"no key", post + "Content-Length: 30000000\n\n", "key_malformed"},
		{"malformed", post + "Authorization: Bearer nonsense\nContent-Length: 30000000\n\n", "key_malformed"},
		{"unknown", post + "Authorization: Bearer sk-ownllm-AAAAAAAAAAAAAAAAAAAAAAAA\nContent-Length: 30000000\n\n", "key_invalid"},
		{"unknown, small", post + "Authorization: Bearer sk-ownllm-AAAAAAAAAAAAAAAAAAAAAAAB\nContent-Length: 10\n\n", "key_invalid"},
		{"unknown, chunked", post + "Authorization: Bearer sk-ownllm-AAAAAAAAAAAAAAAAAAAAAAAC\nTransfer-Encoding: chunked\n\n", "key_invalid"},
		{"unknown, asks first", post + "Authorization: Bearer sk-ownllm-AAAAAAAAAAAAAAAAAAAAAAAD\nContent-Length: 30000000\nExpect: 100-continue\n\n", "key_invalid"},
		{"good, too large", post + "Authorization: Bearer " + h.key + "\nContent-Length: 30000000\n\n", "request_too_large"},
		{"good, too large, asks first", post + "Authorization: Bearer " + h.key + "\nContent-Length: 30000000\nExpect: 100-continue\n\n", "request_too_large"},
		{"good but new, too large", post + "Authorization: Bearer " + fresh + "\nContent-Length: 30000000\n\n", "request_too_large"},
		{"lies about being refused", post + "Authorization: Bearer " + h.key + "\nOwnllm-Refused: yes\nContent-Length: 2\nConnection: close\n\n{}", "model_required"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := h.dial()
			start := time.Now()
			c.send(test.head)
			resp, body := c.whole("POST")
			if took := time.Since(start); took > patience/4 { // the body never comes
				t.Errorf("the answer took %s", took)
			}
			if want := schemas.Code(test.want); codeIn(body) != test.want || resp.StatusCode != want.Info().Status || resp.ProtoMajor != 1 {
				t.Errorf("got %d %s, want %s", resp.StatusCode, body, test.want)
			}
			if resp.Header.Get("X-Request-Id") == "" || resp.Header.Get("Content-Type") != "application/json" {
				t.Errorf("headers: %v", resp.Header)
			}
			// Whatever is left of the body must not be taken for a request.
			if !resp.Close && !strings.Contains(test.head, "chunked") {
				t.Error("the connection is kept, with a body on the way")
			}
		})
	}

	t.Run("good, asks first", func(t *testing.T) {
		c := h.dial()
		c.send(post + "Authorization: Bearer " + h.key + "\nContent-Length: 2\nExpect: 100-continue\n\n")
		if resp := c.answer("POST"); resp.StatusCode != 100 {
			t.Fatalf("got %d before the body, want 100", resp.StatusCode)
		}
		c.send("{}")
		if _, body := c.whole("POST"); codeIn(body) != "model_required" {
			t.Errorf("got %s", body)
		}
	})
	t.Run("good but new, body late", func(t *testing.T) {
		_, key := h.newKey(books.NewKey{})
		c := h.dial()
		c.send(post + "Authorization: Bearer " + key + "\nContent-Length: 2\n\n")
		until(t, "the key to be looked up", func() bool { return h.known(key) })
		c.send("{}")
		if resp, body := c.whole("POST"); resp.StatusCode != 400 || codeIn(body) != "model_required" {
			t.Errorf("got %d %s", resp.StatusCode, body)
		}
	})
}

// A client that sends on while it is being refused has to get its refusal, and not a
// reset connection.
func TestRefusalReachesAClientThatStillSends(t *testing.T) {
	t.Parallel()
	h := build(t, plan{edge: edge.Config{BodyLimit: 1 << 20}})
	body := strings.Repeat("x", 24<<20)
	for range 5 {
		for _, test := range []struct{ key, want string }{{h.key, "request_too_large"}, {"sk-ownllm-AAAAAAAAAAAAAAAAAAAAAAAA", "key_invalid"}} {
			for _, chunked := range []bool{false, true} {
				got, err := h.upload(test.key, body, chunked)
				if err != nil || got != test.want {
					t.Errorf("%s, chunked %v: got %q, error %v", test.want, chunked, got, err)
				}
			}
		}
	}
}
