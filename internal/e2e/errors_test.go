package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/faultproxy"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

const (
	plainModel = "plain"  // can only chat, and has a small window
	coldModel  = "cold"   // loads for longer than anybody waits
	busyModel  = "busy"   // its queue is full
	awayModel  = "away"   // its agent has left
	mutedModel = "muted"  // its agent has lost its bus
	mortal     = "mortal" // its agent gets killed
	dearModel  = "dear"   // costs something
	window     = 64
	queueBound = 3
)

func model(id string, change func(*schemas.Model)) schemas.Model {
	m := demo.DefaultModel()
	m.ID = id
	if change != nil {
		change(&m)
	}
	return m
}

// refusals is a cluster with all that the errors of the contract come from.
type refusals struct {
	*stack.Cluster
	t       *testing.T
	backend *stack.Backend
	// main is an ordinary edge, hasty one that waits two seconds for tokens, strict one
	// that has had enough of bad requests, and cut one that has lost its database.
	main, hasty, strict, cut *stack.Edge
	keys                     map[string]string
	mortal                   *stack.Worker
	emptyQueue               func()
}

func newRefusals(t *testing.T, brokerArgs ...string) *refusals {
	backend := stack.StartBackend(t, demo.Options{Models: []schemas.Model{
		demo.DefaultModel(), model(busyModel, nil), model(coldModel, nil), model(dearModel, nil),
		model(plainModel, func(m *schemas.Model) {
			m.ContextWindow, m.Capabilities = window, schemas.Capabilities{Completion: true}
		}),
	}})
	load := demo.NoFaults()
	load.LoadMS = int(time.Hour.Milliseconds())
	if err := backend.SetFaults(coldModel, load); err != nil {
		t.Fatal(err)
	}
	other := func(id string) string {
		return stack.StartBackend(t, demo.Options{Models: []schemas.Model{model(id, nil)}}).URL
	}
	r := &refusals{t: t, backend: backend, Cluster: stack.StartCluster(t, append(brokerArgs, "--queue-bound", strconv.Itoa(queueBound))...)}
	many := []string{"--failure-rate", "10000", "--failure-burst", "10000", "--body-limit", "1MB"}
	r.StartWorker(backend.URL)
	leaving := r.StartWorker(other(awayModel))
	r.mortal = r.StartWorker(other(mortal))
	// What is held waits for as long as a test takes.
	r.main = r.StartEdge(append(many, "--cold-wait", "300ms", "--first-token-timeout", "1h", "--total-timeout", "1h")...)
	r.hasty = r.StartEdge(append(many, "--first-token-timeout", "2s", "--idle-timeout", "2s")...)
	r.strict = r.StartEdge("--failure-rate", "0.001", "--failure-burst", "1")
	direct := r.DatabaseURL
	proxy := faultproxy.New(t, direct)
	r.DatabaseURL = proxy.URL()
	r.cut = r.StartEdge(many...)
	r.DatabaseURL = direct
	proxy.Cut()

	for _, edge := range []*stack.Edge{r.main, r.hasty} {
		stack.Until(t, 30*time.Second, "all models", func() bool {
			_, body := r.get(edge.BaseURL+"/models", r.Key.Reveal())
			return !slices.ContainsFunc([]string{"demo", plainModel, coldModel, busyModel, awayModel, mortal}, func(id string) bool {
				return !strings.Contains(body, `"id":"`+id+`"`)
			})
		})
	}
	bus := faultproxy.New(t, r.NATSURL())
	bus.Cut()
	r.StartWorker(other(mutedModel), "--nats-url", bus.URL(), "--server", "http://"+r.main.Addr)
	awaitModel(t, []*stack.Edge{r.main}, r.Key.Reveal(), mutedModel)
	if err := leaving.Stop(); err != nil {
		t.Errorf("worker: %v", err)
	}
	r.get(r.strict.BaseURL+"/models", "not a key")
	r.makeKeys()
	r.useUp()
	r.fillQueue()
	return r
}

func (r *refusals) makeKeys() {
	ctx := r.t.Context()
	must := func(err error) {
		r.t.Helper()
		if err != nil {
			r.t.Fatal(err)
		}
	}
	key := func(n books.NewKey) (schemas.KeyID, string) {
		r.t.Helper()
		if n.Tenant == "" {
			n.Tenant = string(r.Tenant.ID)
		}
		if n.User == "" {
			n.User = string(r.User.ID)
		}
		k, secret, err := r.Books.CreateKey(ctx, n)
		must(err)
		return k.ID, secret.Reveal()
	}
	r.keys = map[string]string{"good": r.Key.Reveal(), "unknown": apikey.New().Reveal(), "malformed": "sk-ownllm-x"}
	soon := time.Millisecond
	_, r.keys["expired"] = key(books.NewKey{TTL: &soon})
	_, r.keys["scoped"] = key(books.NewKey{Scopes: []string{"model:" + plainModel}})
	revoked, secret := key(books.NewKey{})
	r.keys["revoked"] = secret
	_, err := r.Books.RevokeKey(ctx, revoked)
	must(err)
	user, err := r.Books.CreateUser(ctx, books.NewUser{Tenant: string(r.Tenant.ID), Email: "gone@example.com"})
	must(err)
	_, r.keys["of a deactivated user"] = key(books.NewKey{User: string(user.ID)})
	_, err = r.Books.SetUserState(ctx, user.ID, books.UserDeactivated)
	must(err)
	for slug, state := range map[string]books.TenantState{"held": books.TenantSuspended, "bare": books.TenantActive} {
		_, err := r.Books.CreateTenant(ctx, books.NewTenant{Slug: slug, QPS: new(1_000_000)})
		must(err)
		user, err := r.Books.CreateUser(ctx, books.NewUser{Tenant: slug, Email: "a@example.com"})
		must(err)
		_, r.keys["of the tenant "+slug] = key(books.NewKey{Tenant: slug, User: string(user.ID)})
		_, err = r.Books.SetTenantState(ctx, slug, state)
		must(err)
	}
}

// useUp makes the keys that have no more of something: money, slots (see fillQueue), their
// tenant's rate.
func (r *refusals) useUp() {
	setPrice(r.t, r.Cluster, dearModel, 1)
	_, r.keys["without money"] = newKey(r.t, r.Cluster, books.NewKey{BudgetCents: new(int64)})
	_, r.keys["without slots"] = newKey(r.t, r.Cluster, books.NewKey{Concurrency: new(1)})
	tenant, user := newTenant(r.t, r.Cluster, "drained", 1)
	r.StartWorkerOf(tenant.ID, r.backend.URL, "--model", demo.ModelID)
	_, r.keys["of the tenant drained"] = newKey(r.t, r.Cluster, books.NewKey{Tenant: tenant.Slug, User: string(user.ID)})
	awaitModel(r.t, []*stack.Edge{r.main}, r.keys["of the tenant drained"], demo.ModelID)
	r.drain(tenant.ID)
}

// drain keeps the bucket of a tenant as empty as if a dozen edges had let the same request in.
func (r *refusals) drain(tenant schemas.TenantID) {
	r.t.Helper()
	l := openLedger(r.t, r.DatabaseURL)
	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	r.t.Cleanup(work.Wait)
	r.t.Cleanup(cancel)
	empty := func() {
		// More than a minute ahead nobody believes.
		_, err := l.pool.Exec(ctx, `
			INSERT INTO tenant_buckets (tenant_id, full_at) VALUES ($1, (extract(epoch FROM now()) * 1000000000)::bigint + 50000000000)
			ON CONFLICT (tenant_id) DO UPDATE SET full_at = excluded.full_at`, tenant)
		if err != nil && ctx.Err() == nil {
			r.t.Errorf("drain the bucket: %v", err)
		}
	}
	empty()
	work.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-time.After(5 * time.Second):
				empty()
			}
		}
	})
}

// fillQueue keeps the queue of the busy model full, and the slot of the key that has but
// one, until emptyQueue is called.
func (r *refusals) fillQueue() {
	ctx, cancel := context.WithCancel(context.Background())
	var requests sync.WaitGroup
	r.emptyQueue = func() {
		cancel()
		requests.Wait()
		stack.Until(r.t, 30*time.Second, "the busy requests to end", func() bool { return r.backend.Stats().Aborted > queueBound })
	}
	r.t.Cleanup(cancel)
	hold := func(key, model string) {
		requests.Go(func() {
			client := newClient(r.main.BaseURL, r.keys[key])
			defer client.close()
			body := chatBody(false, map[string]any{"model": model, "demo": map[string]any{"first_token_ms": 3_600_000}})
			if resp, err := client.post(ctx, "/chat/completions", body); err == nil {
				_ = resp.Body.Close()
				if ctx.Err() == nil {
					r.t.Errorf("a request that was to wait got status %d", resp.StatusCode)
				}
			}
		})
	}
	for range queueBound {
		hold("good", busyModel)
	}
	hold("without slots", demo.ModelID)
	stack.Until(r.t, 30*time.Second, "a full queue", func() bool { return r.backend.Stats().Active == queueBound+1 })
}

// row is one way to a refusal.
type row struct {
	name, code, param string
	method, path      string // default: a chat completion
	key               string // default: "good"
	edge              *stack.Edge
	body              string // instead of members
	members           string // of a chat completion of the demo model, overriding its own
	retry             string // Retry-After, "a-b" for a range
	allow             string
	final             bool   // X-Should-Retry says no
	says              string // a part of the message
}

// TestEveryRefusal walks the table of errors: each comes from its real cause, and is the
// envelope byte for byte, with its headers.
func TestEveryRefusal(t *testing.T) {
	r := newRefusals(t)
	image := `"messages":[{"role":"user","content":[{"type":"text","text":"Look"},{"type":"image_url","image_url":{"url":"data:image/png;base64,iVBORw0KGgo="}}]}]`
	tools := `"tools":[{"type":"function","function":{"name":"f","parameters":{}}}]`
	plain := `"model":"` + plainModel + `"`
	rows := []row{
		{name: "no model", code: "model_required", param: "model", body: `{"messages":[{"role":"user","content":"Hi"}]}`},
		{name: "empty model", code: "model_required", param: "model", members: `"model":""`},
		{name: "no messages", code: "messages_required", param: "messages", body: `{"model":"demo"}`},
		{name: "empty messages", code: "messages_required", param: "messages", members: `"messages":[]`},
		{name: "tools", code: "model_does_not_support_tools", param: "tools", members: plain + "," + tools, says: "tools"},
		{name: "vision", code: "model_does_not_support_vision", param: "messages", members: plain + "," + image, says: "image"},
		{name: "more tokens than the window", code: "context_length_exceeded", param: "max_tokens", members: plain + `,"max_tokens":65`, says: "64"},
		{
			name: "a prompt that only the worker can count", code: "context_length_exceeded", param: "messages",
			members: plain + `,"messages":[{"role":"user","content":"` + strings.Repeat("word ", 100) + `"}]`, says: "64",
		},
		{name: "response_format", code: "invalid_response_format", param: "response_format.type", members: `"response_format":{"type":"yaml"}`},
		{name: "json_schema without a schema", code: "invalid_response_format", param: "response_format.json_schema", members: `"response_format":{"type":"json_schema"}`},

		{name: "unknown key", code: "key_invalid", key: "unknown"},
		{name: "revoked key", code: "key_invalid", key: "revoked"},
		{name: "expired key", code: "key_expired", key: "expired"},
		{name: "no key", code: "key_malformed", key: "-"},
		{name: "half a key", code: "key_malformed", key: "malformed"},
		{name: "unknown key, list", code: "key_invalid", key: "unknown", method: "GET", path: "/models"},
		{name: "unknown key, model", code: "key_invalid", key: "unknown", method: "GET", path: "/models/demo"},

		{name: "scope", code: "scope_required", param: "model", key: "scoped", says: "model:demo"},
		{name: "scope, model", code: "scope_required", param: "model", key: "scoped", method: "GET", path: "/models/demo"},
		{name: "suspended tenant", code: "tenant_disabled", key: "of the tenant held"},
		{name: "suspended tenant, list", code: "tenant_disabled", key: "of the tenant held", method: "GET", path: "/models"},
		{name: "deactivated user", code: "user_deactivated", key: "of a deactivated user"},

		{name: "money spent", code: "budget_exceeded", key: "without money", members: `"model":"` + dearModel + `"`, retry: "1-2678400", final: true, says: "budget"},
		{name: "slots taken", code: "concurrency_limit", key: "without slots", retry: "1", says: "1"},
		{name: "tenant too fast", code: "tenant_qps_limit", key: "of the tenant drained", retry: "1-51"},

		{name: "agent that left", code: "agent_offline", members: `"model":"` + awayModel + `"`, retry: "5", says: awayModel},
		{name: "no agent", code: "agent_offline", key: "of the tenant bare", method: "GET", path: "/models", retry: "5"},
		{name: "agent that lost its bus", code: "tunnel_down", members: `"model":"` + mutedModel + `"`, retry: "5", says: mutedModel},
		{name: "cold model", code: "model_loading", members: `"model":"` + coldModel + `"`, retry: "2-10", says: coldModel},

		{name: "database away", code: "internal_error", edge: r.cut, retry: "1"},
		{name: "database away, list", code: "internal_error", edge: r.cut, method: "GET", path: "/models", retry: "1"},

		{name: "not JSON", code: "invalid_json", body: `{"model":`},
		{name: "no body", code: "invalid_json", method: "POST", path: "/chat/completions"},
		{name: "not an object", code: "invalid_json", body: `[]`},
		{name: "wrong type", code: "invalid_value", param: "stream", members: `"stream":"yes"`, says: "boolean"},
		{name: "out of range", code: "invalid_value", param: "temperature", members: `"temperature":3`},
		{name: "nested", code: "invalid_value", param: "messages[0].role", members: `"messages":[{"role":"boss","content":"Hi"}]`},
		{name: "refused by the backend", code: "invalid_value", members: `"demo":{"status":400}`, says: "refused"},
		{name: "model that nobody has", code: "model_not_found", param: "model", members: `"model":"gpt-9"`, says: "gpt-9"},
		{name: "model that nobody has, model", code: "model_not_found", param: "model", method: "GET", path: "/models/gpt-9"},
		{name: "no such route", code: "not_found", method: "POST", path: "/completions"},
		{name: "no such method", code: "method_not_allowed", method: "GET", path: "/chat/completions", allow: "POST"},
		{name: "unknown method", code: "method_not_allowed", method: "BREW", path: "/models", allow: "GET, HEAD, POST, OPTIONS"},
		{name: "too large", code: "request_too_large", body: strings.Repeat(" ", 1<<20+1)},
		{name: "too many bad requests", code: "too_many_failures", edge: r.strict, key: "malformed", retry: "2"},
		{name: "full queue", code: "queue_full", members: `"model":"` + busyModel + `"`, retry: "2", says: busyModel},
		{name: "backend that stalls", code: "agent_timeout", edge: r.hasty, members: `"stream":true,"demo":{"stall_after":0}`, says: "2s"},
		{name: "backend that fails", code: "backend_error", members: `"demo":{"status":500}`},
		{name: "backend that is busy", code: "backend_error", members: `"demo":{"status":503,"retry_after":3}`, retry: "3"},
		{name: "backend that dies", code: "backend_error", members: `"demo":{"die_after":0}`},
		{name: "backend that talks nonsense", code: "backend_error", members: `"demo":{"garbage_after":0}`},
		{name: "backend that ends early", code: "backend_error", members: `"demo":{"end_after":0}`},
	}
	seen := map[string]bool{"internal_error": true}
	for _, row := range rows {
		seen[row.code] = true
		bodies := map[string]string{"": row.body}
		if row.body == "" && row.path == "" {
			bodies = map[string]string{"whole": chatWith(row.members), "stream": chatWith(row.members, `"stream":true`)}
			if strings.Contains(row.members, `"stream"`) {
				bodies = map[string]string{"": chatWith(row.members)}
			}
		}
		for name, body := range bodies {
			t.Run(strings.TrimSpace(row.name+" "+name), func(t *testing.T) { r.check(t, row, body) })
		}
	}
	t.Run("errors in a stream", r.inStream)
	t.Run("message bus away", func(t *testing.T) {
		r.emptyQueue()
		r.NATS.Kill()
		r.check(t, row{code: "internal_error", retry: "2", says: "message bus"}, chatWith(""))
		r.check(t, row{code: "internal_error", retry: "2", says: "message bus"}, chatWith("", `"stream":true`))
	})

	for _, info := range schemas.Codes {
		if !seen[string(info.Code)] {
			t.Errorf("nothing provokes %s", info.Code)
		}
	}
}

// chatWith is a chat completion of the demo model, with members that win over its own.
func chatWith(members ...string) string {
	var body map[string]json.RawMessage
	merge := func(object string) {
		if err := json.Unmarshal([]byte(object), &body); err != nil {
			panic(err)
		}
	}
	merge(`{"model":"demo","messages":[{"role":"user","content":"Hi"}]}`)
	for _, m := range members {
		merge("{" + m + "}")
	}
	b, err := json.Marshal(body)
	if err != nil {
		panic(err)
	}
	return string(b)
}

func (r *refusals) check(t *testing.T, row row, body string) {
	t.Helper()
	edge, key := row.edge, row.key
	if edge == nil {
		edge = r.main
	}
	if key == "" {
		key = "good"
	}
	if row.path == "" {
		row.method, row.path = "POST", "/chat/completions"
	}
	req, err := http.NewRequestWithContext(t.Context(), row.method, edge.BaseURL+row.path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if key != "-" {
		req.Header.Set("Authorization", "Bearer "+r.keys[key])
	}
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	resp, err := (&http.Client{Transport: transport, Timeout: 30 * time.Second}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	info := schemas.Code(row.code).Info()
	if resp.StatusCode != info.Status {
		t.Errorf("status %d, want %d", resp.StatusCode, info.Status)
	}
	checkEnvelope(t, string(got), info, row.param, row.says)
	if kind := resp.Header["Content-Type"]; len(kind) != 1 || kind[0] != "application/json" {
		t.Errorf("Content-Type %q", kind)
	}
	if id := resp.Header["X-Request-Id"]; len(id) != 1 || schemas.ValidateID(id[0], "req_") != nil {
		t.Errorf("X-Request-Id %q", id)
	}
	checkRetry(t, resp.Header.Get("Retry-After"), row.retry)
	if v := resp.Header.Get("X-Should-Retry"); v != map[bool]string{true: "false"}[row.final] {
		t.Errorf("X-Should-Retry %q", v)
	}
	if allow := resp.Header.Get("Allow"); allow != row.allow {
		t.Errorf("Allow %q, want %q", allow, row.allow)
	}
	if resp.ContentLength != int64(len(got)) {
		t.Errorf("Content-Length %d of %d bytes", resp.ContentLength, len(got))
	}
}

// checkEnvelope compares an answer with the envelope, byte for byte.
func checkEnvelope(t *testing.T, got string, info schemas.CodeInfo, param, says string) {
	t.Helper()
	var e struct{ Error apiError }
	if err := json.Unmarshal([]byte(got), &e); err != nil {
		t.Fatalf("answer %q: %v", got, err)
	}
	quoted := "null"
	if param != "" {
		quoted = strconv.Quote(param)
	}
	want := `{"error":{"message":` + string(schemas.AppendString(nil, e.Error.Message)) + `,"type":"` + info.Type + `","param":` + quoted + `,"code":"` + string(info.Code) + `"}}` + "\n"
	if got != want {
		t.Errorf("answer\n%s\nwant\n%s", got, want)
	}
	if len(e.Error.Message) < 20 || !strings.HasSuffix(e.Error.Message, ".") || !strings.Contains(e.Error.Message, says) {
		t.Errorf("message %q doesn't say %q in a sentence", e.Error.Message, says)
	}
}

func checkRetry(t *testing.T, got, want string) {
	t.Helper()
	low, high, isRange := strings.Cut(want, "-")
	if !isRange {
		if got != want {
			t.Errorf("Retry-After %q, want %q", got, want)
		}
		return
	}
	number := func(s string) int {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Errorf("Retry-After %q, want %s", got, want)
		}
		return n
	}
	if n := number(got); n < number(low) || n > number(high) {
		t.Errorf("Retry-After %q, want %s", got, want)
	}
}

// inStream checks the errors that come after the first token.
func (r *refusals) inStream(t *testing.T) {
	for _, test := range []struct {
		name, code, members string
		edge                *stack.Edge
		during              func()
	}{
		{"backend dies", "backend_error", `"demo":{"tokens":9,"numbered":true,"die_after":3}`, r.main, nil},
		{"backend says error", "backend_error", `"demo":{"tokens":9,"numbered":true,"error_after":3}`, r.main, nil},
		{"backend ends early", "backend_error", `"demo":{"tokens":9,"numbered":true,"end_after":3}`, r.main, nil},
		{"backend talks nonsense", "backend_error", `"demo":{"tokens":9,"numbered":true,"garbage_after":3}`, r.main, nil},
		{"backend stalls", "agent_timeout", `"demo":{"tokens":9,"numbered":true,"stall_after":3}`, r.hasty, nil},
		{"agent is killed", "agent_offline", `"model":"` + mortal + `","demo":{"tokens":9,"numbered":true,"stall_after":3}`, r.main, r.mortal.Kill},
	} {
		t.Run(test.name, func(t *testing.T) {
			client := newClient(test.edge.BaseURL, r.Key.Reveal())
			defer client.close()
			resp, err := client.post(t.Context(), "/chat/completions", []byte(chatWith(test.members, `"stream":true`)))
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if resp.StatusCode != 200 {
				t.Fatal(resp.Status)
			}
			lines := bufio.NewReader(resp.Body)
			var events []string
			for {
				line, err := lines.ReadString('\n')
				if err != nil {
					if err != io.EOF || line != "" {
						t.Fatalf("after %q: %v", line, err)
					}
					break
				}
				if line == "\n" || strings.HasPrefix(line, ":") {
					continue
				}
				data, ok := strings.CutPrefix(line, "data: ")
				if !ok {
					t.Fatalf("line %q", line)
				}
				events = append(events, data)
				if len(events) == 4 && test.during != nil { // the role and three tokens
					test.during()
				}
			}
			if len(events) != 5 {
				t.Fatalf("events %q", events)
			}
			for i, e := range events[1:4] {
				if !strings.Contains(e, `"content":" `+strconv.Itoa(i)+`"`) {
					t.Errorf("event %d: %s", i+1, e)
				}
			}
			checkEnvelope(t, events[4], schemas.Code(test.code).Info(), "", "")
		})
	}
}

func (r *refusals) get(url, key string) (int, string) {
	r.t.Helper()
	req, err := http.NewRequestWithContext(r.t.Context(), http.MethodGet, url, nil)
	if err != nil {
		r.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+key)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}
