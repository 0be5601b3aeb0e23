package sdk

import (
	"slices"
	"strings"
	"testing"

	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// checkCodes makes sure that the cases cover the error table.
func checkCodes(t *testing.T, cases []errorCase) {
	t.Helper()
	for _, info := range schemas.Codes {
		if !slices.ContainsFunc(cases, func(c errorCase) bool { return c.Expect.Code == string(info.Code) }) {
			t.Errorf("%s has no case", info.Code)
		}
	}
}

// newCase is a case of a code, with the status and type that the table has for it.
func newCase(name string, code schemas.Code, c errorCase) errorCase {
	info := code.Info()
	c.Name, c.Expect.Type, c.Expect.Code = name, info.Type, string(code)
	if c.Expect.Status == 0 {
		c.Expect.Status = info.Status
	}
	if info.Status == 429 || info.Status == 503 {
		c.Expect.Headers = map[string]string{"retry-after": "^([1-9]|10)$"}
	}
	if info.Status < 429 {
		c.Retries = new(0)
	}
	return c
}

// again is a case whose SDK tries again so often, each time after the pause that it was
// told.
func again(c errorCase, retries int) errorCase {
	c.Name, c.Call, c.Retries = c.Name+" again", "chat", &retries
	return c
}

type object = map[string]any

// asked is a body that asks the demo model for something.
func asked(field string, value any) object {
	return object{"demo": object{"tokens": 8, field: value}}
}

// cases are the ways to every code of the contract.
func (h *household) cases() []errorCase {
	cases := slices.Concat(h.keyCases(), h.limitCases(), h.requestCases(), h.modelCases(), h.backendCases())
	for i := range cases {
		c := &cases[i]
		if c.Key == "" {
			c.Key = h.APIKey
		}
		if c.Model == "" {
			c.Model = demo.ModelID
		}
	}
	return cases
}

// keyCases are those of 401 and 403, and what a key can have to do with.
func (h *household) keyCases() []errorCase {
	h.t.Helper()
	ctx := h.t.Context()
	first := func(users []adminapi.User, err error) adminapi.User {
		if err != nil {
			h.t.Fatal(err)
		}
		return users[0]
	}
	tenants, err := h.admin.Tenants(ctx)
	if err != nil {
		h.t.Fatal(err)
	}
	user := first(h.admin.Users(ctx, tenants[0].Slug))

	revoked := h.newKey(user, nil)
	scoped := h.newKey(user, func(in *adminapi.CreateKey) { in.Scopes = []string{"model:" + textModel} })
	expired := h.newKey(user, func(in *adminapi.CreateKey) { in.TTLSeconds = 1 })
	gone := h.newUser(string(user.Tenant), "gone@example.com")
	orphan := h.newKey(gone, nil)
	suspended := h.newKey(h.newTenant("suspended"), nil)
	// Each is seen to open the door before it no longer does.
	for _, k := range []adminapi.CreatedKey{revoked, scoped, orphan, suspended} {
		if status := h.get(h.BaseURL+"/models", k.Secret); status != 200 && status != 503 {
			h.t.Errorf("key %s gets status %d", k.Prefix, status)
		}
	}
	if _, err := h.admin.RevokeKey(ctx, revoked.ID); err != nil {
		h.t.Fatal(err)
	}
	if _, err := h.admin.DeactivateUser(ctx, gone.ID); err != nil {
		h.t.Fatal(err)
	}
	if _, err := h.admin.SuspendTenant(ctx, "suspended"); err != nil {
		h.t.Fatal(err)
	}
	for _, k := range []adminapi.CreatedKey{revoked, expired, orphan, suspended} {
		stack.Until(h.t, wait, "key to be refused", func() bool {
			status := h.get(h.BaseURL+"/models", k.Secret)
			return status == 401 || status == 403
		})
	}

	var cases []errorCase
	add := func(name string, code schemas.Code, c errorCase) { cases = append(cases, newCase(name, code, c)) }
	add("key of nobody", schemas.CodeKeyInvalid, errorCase{Key: unknownKey()})
	add("revoked key", schemas.CodeKeyInvalid, errorCase{Key: revoked.Secret})
	add("key of another tenant", schemas.CodeKeyInvalid, errorCase{BaseURL: h.tenantURL})
	add("expired key", schemas.CodeKeyExpired, errorCase{Key: expired.Secret})
	add("key of another product", schemas.CodeKeyMalformed, errorCase{Key: "sk-proj-1234567890abcdefghij"})
	add("suspended tenant", schemas.CodeTenantDisabled, errorCase{Key: suspended.Secret})
	add("deactivated user", schemas.CodeUserDeactivated, errorCase{Key: orphan.Secret})
	for _, call := range []string{"models", "model"} {
		add("key of nobody", schemas.CodeKeyInvalid, errorCase{Key: unknownKey(), Call: call})
		add("suspended tenant", schemas.CodeTenantDisabled, errorCase{Key: suspended.Secret, Call: call})
	}
	scope := expected{Param: "model", Message: "model:" + demo.ModelID}
	add("model out of scope", schemas.CodeScopeRequired, errorCase{Key: scoped.Secret, Expect: scope})
	add("model out of scope", schemas.CodeScopeRequired, errorCase{Key: scoped.Secret, Call: "model", Expect: scope})
	add("address of many bad requests", schemas.CodeTooManyFailures, errorCase{Key: unknownKey(), BaseURL: h.strict})
	lost := newCase("edge without its database", schemas.CodeInternalError, errorCase{BaseURL: h.cut})
	return append(cases, lost, again(lost, 1))
}

// limitCases are those of what a key or a tenant may have. An SDK tries again twice, as it
// does if nobody tells it otherwise, unless the money is spent.
func (h *household) limitCases() []errorCase {
	spent := newCase("key whose money is spent", schemas.CodeBudgetExceeded, errorCase{Key: h.spent, Model: pricedModel})
	spent.Retries = new(0)
	spent.Expect.Headers = map[string]string{"retry-after": "^[1-9][0-9]*$", "x-should-retry": "^false$"}
	full := newCase("key with a request in flight", schemas.CodeConcurrencyLimit, errorCase{Key: h.busy})
	hurried := newCase("tenant that is too fast", schemas.CodeTenantQPSLimit, errorCase{Key: h.hurried})
	full.Expect.Headers["retry-after"] = "^1$"
	hurried.Expect.Headers["retry-after"] = "^[12]$"
	return []errorCase{spent, full, again(full, 2), hurried, again(hurried, 2)}
}

// requestCases are those of requests that are wrong.
func (h *household) requestCases() []errorCase {
	picture := []object{{"role": "user", "content": []object{
		{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": object{"url": pixel}},
	}}}
	tool := []object{{"type": "function", "function": object{"name": "f", "parameters": object{"type": "object"}}}}
	long := []object{{"role": "user", "content": strings.Repeat("word ", window)}}
	var deep any = "bottom"
	for range 600 {
		deep = []any{deep}
	}

	var cases []errorCase
	add := func(name string, code schemas.Code, param string, c errorCase) {
		c.Expect.Param = param
		cases = append(cases, newCase(name, code, c))
	}
	add("no model", schemas.CodeModelRequired, "model", errorCase{Omit: []string{"model"}})
	add("no messages", schemas.CodeMessagesRequired, "messages", errorCase{Omit: []string{"messages"}})
	add("empty messages", schemas.CodeMessagesRequired, "messages", errorCase{Body: object{"messages": []object{}}})
	add("tools for a model without", schemas.CodeModelDoesNotSupportTools, "tools",
		errorCase{Model: textModel, Body: object{"tools": tool}})
	add("image for a model that can't see", schemas.CodeModelDoesNotSupportVision, "messages",
		errorCase{Model: textModel, Body: object{"messages": picture}})
	add("more than the window by far", schemas.CodeContextLengthExceeded, "max_tokens",
		errorCase{Model: smallModel, Body: object{"max_tokens": window + 1}})
	add("a token more than the window", schemas.CodeContextLengthExceeded, "messages",
		errorCase{Model: smallModel, Body: object{"messages": long}})
	add("unknown response_format", schemas.CodeInvalidResponseFormat, "response_format.type",
		errorCase{Body: object{"response_format": object{"type": "xml"}}})
	add("json_schema without a schema", schemas.CodeInvalidResponseFormat, "response_format.json_schema",
		errorCase{Body: object{"response_format": object{"type": "json_schema"}}})
	add("body that nests too deep", schemas.CodeInvalidJSON, "", errorCase{Body: object{"deep": deep}})
	add("temperature out of range", schemas.CodeInvalidValue, "temperature", errorCase{Body: object{"temperature": 3}})
	add("role of nobody", schemas.CodeInvalidValue, "messages[0].role",
		errorCase{Body: object{"messages": []object{{"role": "robot", "content": "Hi"}}}})
	add("body over the limit", schemas.CodeRequestTooLarge, "", errorCase{Body: object{"padding": strings.Repeat("x", 1<<20)}})
	add("wrong version", schemas.CodeNotFound, "", errorCase{BaseURL: strings.TrimSuffix(h.BaseURL, "1") + "2"})
	add("wrong version", schemas.CodeNotFound, "", errorCase{BaseURL: strings.TrimSuffix(h.BaseURL, "1") + "2", Call: "models"})
	add("wrong method", schemas.CodeMethodNotAllowed, "", errorCase{BaseURL: h.BaseURL + "/models"})
	return cases
}

// modelCases are those of models and agents that can't answer now, or ever.
func (h *household) modelCases() []errorCase {
	tenantKey := h.newKey(h.newUser(h.tenant, "second@example.com"), nil).Secret

	var cases []errorCase
	add := func(name string, code schemas.Code, c errorCase) { cases = append(cases, newCase(name, code, c)) }
	add("model of nobody", schemas.CodeModelNotFound, errorCase{Model: missing, Expect: expected{Param: "model"}})
	add("model of nobody", schemas.CodeModelNotFound, errorCase{Model: missing, Call: "model", Expect: expected{Param: "model"}})
	add("model of another tenant", schemas.CodeModelNotFound,
		errorCase{Key: tenantKey, BaseURL: h.tenantURL, Expect: expected{Param: "model"}})
	for _, call := range []string{"", "models", "model"} {
		add("agent that has left", schemas.CodeAgentOffline,
			errorCase{Key: tenantKey, BaseURL: h.tenantURL, Model: awayModel, Call: call})
	}
	add("agent that has lost its bus", schemas.CodeTunnelDown, errorCase{Model: mutedModel})
	loading := newCase("model that loads", schemas.CodeModelLoading, errorCase{Model: coldModel})
	full := newCase("queue that is full", schemas.CodeQueueFull, errorCase{Model: busyModel})
	cases = append(cases, loading, again(loading, 1), full, again(full, 1))
	add("model that can't be loaded", schemas.CodeBackendError, errorCase{Model: failModel})
	return cases
}

// backendCases are those of backends that fail while they answer.
func (h *household) backendCases() []errorCase {
	var cases []errorCase
	add := func(name string, code schemas.Code, c errorCase) { cases = append(cases, newCase(name, code, c)) }
	add("backend that refuses", schemas.CodeInvalidValue, errorCase{Body: asked("status", 400)})
	for _, status := range []int{401, 429, 500, 503} {
		add("backend that fails", schemas.CodeBackendError, errorCase{Body: asked("status", status)})
	}
	for _, fault := range []string{"die_after", "error_after", "end_after", "garbage_after"} {
		if fault != "end_after" {
			add(fault+" of a reply", schemas.CodeBackendError, errorCase{Call: "chat", Body: asked(fault, 3)})
		}
		add(fault+" at once", schemas.CodeBackendError, errorCase{Call: "stream", Body: asked(fault, 0)})
		add(fault+" within", schemas.CodeBackendError, errorCase{Call: "stream", Body: asked(fault, 3), Expect: expected{Status: 200}})
	}
	add("backend that never begins", schemas.CodeAgentTimeout, errorCase{BaseURL: h.hasty, Body: asked("stall_after", 0)})
	add("backend that stalls", schemas.CodeAgentTimeout,
		errorCase{BaseURL: h.hasty, Call: "stream", Body: asked("stall_after", 3), Expect: expected{Status: 200}})
	return cases
}
