package edge_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"mime"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/schemas"
)

// witness holds real answers against the document, and remembers what it has seen.
type witness struct {
	*house
	d    description
	seen map[string]bool // operations that have answered with success
}

// ask sends a request, and returns the body of the answer.
func (w *witness) ask(method, path, key, body string, status int, headers ...string) string {
	w.t.Helper()
	route := w.route(method, path)
	o := w.d.Paths[route][strings.ToLower(method)]
	w.checkRequest(o, route, method, path, body, status)
	resp, text := w.do(method, path, key, body, headers...)
	if resp.StatusCode != status {
		w.t.Fatalf("%s %s %s: %s %s", method, path, body, resp.Status, text)
	}
	name := fmt.Sprint(status)
	described, ok := o.Responses[name]
	if !ok {
		name, described = "default", o.Responses["default"]
		described = w.d.Components.Responses[strings.TrimPrefix(described.Ref, "#/components/responses/")]
	} else if status < 300 {
		w.seen[method+" "+route] = true
	}
	kind, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if _, ok := described.Content[kind]; !ok || err != nil {
		w.t.Errorf("%s %s: the answer is %q", method, path, resp.Header.Get("Content-Type"))
		return text
	}
	for header := range resp.Header {
		known := slices.ContainsFunc(slices.Collect(maps.Keys(described.Headers)), func(h string) bool { return strings.EqualFold(h, header) })
		if strings.HasPrefix(header, "X-") && !known {
			w.t.Errorf("%s %s: header %s isn't described", method, path, header)
		}
	}
	if kind != "application/json" {
		return text
	}
	pointer := "/paths/" + escape(route) + "/" + strings.ToLower(method) + "/responses/" + name
	if name == "default" {
		pointer = strings.TrimPrefix(o.Responses["default"].Ref, "#")
	}
	w.valid(pointer+"/content/application~1json/schema", text, method+" "+path)
	return text
}

// valid holds a text against the schema at a pointer.
func (w *witness) valid(pointer, text, about string) {
	w.t.Helper()
	v, err := jsonschema.UnmarshalJSON(strings.NewReader(text))
	if err == nil {
		err = compiled(w.t, pointer).Validate(v)
	}
	if err != nil {
		w.t.Errorf("%s: %s\n%v", about, text, err)
	}
}

// checkRequest holds a request that is answered with success against the document.
func (w *witness) checkRequest(o *operation, route, method, path, body string, status int) {
	w.t.Helper()
	if status >= 300 {
		return
	}
	if body != "" {
		w.valid("/paths/"+escape(route)+"/"+strings.ToLower(method)+"/requestBody/content/application~1json/schema", body, "request "+method+" "+path)
	}
	_, query, _ := strings.Cut(path, "?")
	values, err := url.ParseQuery(query)
	if err != nil {
		w.t.Fatal(err)
	}
	for name := range values {
		if !slices.ContainsFunc(o.Parameters, func(p parameter) bool {
			if p.Ref != "" {
				p = w.d.Components.Parameters[strings.TrimPrefix(p.Ref, "#/components/parameters/")]
			}
			return p.In == "query" && p.Name == name
		}) {
			w.t.Errorf("%s %s: %s isn't described", method, path, name)
		}
	}
}

func escape(path string) string {
	return strings.NewReplacer("~", "~0", "/", "~1", "{", "%7B", "}", "%7D").Replace(path)
}

// route finds the path of the document that a path is of.
func (w *witness) route(method, path string) string {
	w.t.Helper()
	path, _, _ = strings.Cut(path, "?")
	for p, operations := range w.d.Paths {
		form := regexp.MustCompile(`\\{\w+\\}`).ReplaceAllString(regexp.QuoteMeta(p), `[^/]+`)
		if regexp.MustCompile("^"+form+"$").MatchString(path) && operations[strings.ToLower(method)] != nil {
			return p
		}
	}
	w.t.Fatalf("%s %s isn't described", method, path)
	return ""
}

// Real answers of every operation, good ones and refusals, are as the document says.
func TestAnswersAreAsDescribed(t *testing.T) {
	t.Parallel()
	w := &witness{house: build(t, plan{}), d: describe(t), seen: map[string]bool{}}
	api := func(method, path, body string, status int, headers ...string) string {
		t.Helper()
		return w.ask(method, adminapi.Prefix+path, adminToken, body, status, headers...)
	}
	field := func(text, name string) string {
		t.Helper()
		var v map[string]any
		if err := json.Unmarshal([]byte(text), &v); err != nil {
			t.Fatal(err)
		}
		s, _ := v[name].(string)
		return s
	}
	api("POST", "/tenants", `{"slug":"acme","name":"Acme Inc.","qps":100}`, 201)
	api("POST", "/tenants", `{"slug":"other"}`, 201, "Idempotency-Key: one")
	api("POST", "/tenants", `{"slug":"other"}`, 201, "Idempotency-Key: one")
	api("POST", "/tenants", `{"slug":"Other"}`, 400)
	api("PATCH", "/tenants/acme", `{"qps":1000}`, 200)
	api("PATCH", "/tenants/nobody", `{}`, 404)
	user := field(api("POST", "/users", `{"tenant":"acme","email":"ada@example.com"}`, 201), "id")
	refused := api("POST", "/keys", `{"tenant":"acme","user":"ada@example.com","name":"n","scopes":["model:demo"],"budget_cents":5,"concurrency":4,"expires_at":"2999-12-31T00:00:00Z"}`, 400)
	if !strings.Contains(refused, "expires_at") {
		t.Errorf("a key for a thousand years: %s", refused)
	}
	end := time.Now().Add(time.Hour).UTC().Format(time.RFC3339)
	id := field(api("POST", "/keys", `{"tenant":"acme","user":"ada@example.com","name":"n","scopes":["model:demo"],"budget_cents":5,"concurrency":4,"expires_at":"`+end+`"}`, 201), "id")
	api("POST", "/keys", `{"tenant":"acme","user":"ada@example.com","ttl_seconds":60}`, 201)
	api("PATCH", "/keys/"+id, `{"budget_cents":null,"concurrency":1}`, 200)
	api("POST", "/keys/"+id+"/rotate", `{"overlap_seconds":60}`, 200)
	api("POST", "/keys/"+id+"/rotate", ``, 200)
	api("PUT", "/prices", `{"model":"demo","cents_per_1k_tokens":"0.25"}`, 200)
	api("PUT", "/prices", `{"model":"demo","tenant":"local","cents_per_1k_tokens":0.125}`, 200)
	api("PUT", "/prices", `{"model":"demo","cents_per_1k_tokens":-1}`, 400)
	api("GET", "/prices", "", 200)
	api("GET", "/prices?tenant=acme&limit=1", "", 200)

	pairing := field(api("POST", "/agents/pairings", `{"tenant":"acme","ttl_seconds":60}`, 201), "pairing_key")
	again := `{"tenant":"acme"}`
	if a, b := api("POST", "/agents/pairings", again, 201, "Idempotency-Key: pairing"), api("POST", "/agents/pairings", again, 201, "Idempotency-Key: pairing"); a != b {
		t.Errorf("%s and %s", a, b)
	}
	machine := `{"pairing_key":"` + pairing + `","machine_id_hash":"` + strings.Repeat("0a", 32) + `","name":"rig","vram_mb":1,"ram_mb":2,"cpu_cores":3,"gpu":"","os":"linux"}`
	paired := w.ask("POST", adminapi.Prefix+"/agents/pair", "", machine, 201)
	w.ask("POST", adminapi.Prefix+"/agents/pair", "", machine, 401)
	beat := string(schemas.Heartbeat{Version: schemas.ProtocolVersion, Incarnation: schemas.NewIncarnation(), State: schemas.AgentUp, Slots: 1}.Encode())
	w.ask("POST", adminapi.Prefix+"/agents/heartbeat", field(paired, "credential"), beat, 200)
	w.ask("POST", adminapi.Prefix+"/agents/heartbeat", pairing, beat, 401)
	until(t, "the agent in the list", func() bool { return strings.Contains(api("GET", "/agents", "", 200), `"vram_mb":1`) })
	api("DELETE", "/agents/"+field(paired, "agent_id"), "", 200)
	api("DELETE", "/agents/"+field(paired, "agent_id"), "", 404)

	for _, path := range []string{"/v1/models", "/v1/models/demo"} {
		w.ask("GET", path, w.key, "", 200)
		w.ask("GET", path, "x", "", 401)
	}
	budgeted := field(api("POST", "/keys", `{"tenant":"local","user":"local@localhost","budget_cents":100}`, 201), "key")
	w.ask("GET", "/v1/models/demo", budgeted, "", 200)
	w.ask("POST", "/v1/chat/completions", budgeted, ask(`"max_tokens":5`), 200)
	w.ask("POST", "/v1/chat/completions", budgeted, ask(`"n":0`), 400)
	events := w.ask("POST", "/v1/chat/completions", w.key, ask(`"stream":true,"stream_options":{"include_usage":true},"max_tokens":5`), 200)
	chunks := 0
	for line := range strings.Lines(events) {
		if data, ok := strings.CutPrefix(strings.TrimSpace(line), "data: "); ok && data != "[DONE]" {
			chunks++
			w.valid("/components/schemas/ChatChunk", data, "chunk")
		}
	}
	if chunks < 3 {
		t.Errorf("%d chunks in %s", chunks, events)
	}

	until(t, "both requests in the ledger", func() bool {
		return strings.Contains(api("GET", "/usage", "", 200), `"requests":2`)
	})
	api("GET", "/usage?by=tenant,user,key,model,day&tenant=local&user=local@localhost&model=demo&since=2026-01-01&limit=1", "", 200)
	api("GET", "/usage?format=csv&by=key", "", 200)
	api("GET", "/usage", "", 200, "Accept: text/csv")
	api("GET", "/usage?by=hour", "", 400)

	api("POST", "/users/"+user+"/deactivate", "", 200)
	api("POST", "/users/"+user+"/activate", "", 200)
	api("POST", "/tenants/acme/suspend", "", 200)
	api("POST", "/tenants/acme/resume", "", 200)
	api("POST", "/keys/"+id+"/revoke", "", 200)
	for _, path := range []string{"/tenants", "/users?tenant=acme", "/keys?tenant=acme&user=" + user, "/agents?tenant=local", "/models", "/audit?tenant=acme", "/audit", "/status"} {
		api("GET", path, "", 200)
	}
	for _, path := range []string{"/tenants?limit=1", "/agents?limit=0"} {
		api("GET", path, "", map[bool]int{true: 400, false: 200}[strings.HasSuffix(path, "0")])
	}
	if got := api("GET", "/openapi.json", "", 200); got != string(schemas.OpenAPI) {
		t.Errorf("the document is served as %.100s", got)
	}
	w.ask("GET", "/healthz", "", "", 200)
	w.ask("GET", "/readyz", "", "", 200)
	w.ask("GET", adminapi.Prefix+"/status", "x", "", 401)

	// The parameters of lists that are described are taken, and no others.
	for path, operations := range w.d.Paths {
		o := operations["get"]
		if o == nil || !slices.ContainsFunc(o.Parameters, func(p parameter) bool { return p.Ref != "" }) {
			continue
		}
		for _, p := range append(o.Parameters, parameter{Name: "other"}) {
			if p.Ref != "" {
				p = w.d.Components.Parameters[strings.TrimPrefix(p.Ref, "#/components/parameters/")]
			}
			_, text := w.do("GET", path+"?"+p.Name+"=", adminToken, "")
			if refused := strings.Contains(text, "There is no parameter"); refused != (p.Name == "other") {
				t.Errorf("%s, parameter %s: %s", path, p.Name, text)
			}
		}
	}
	for path, operations := range w.d.Paths {
		for method := range operations {
			if route := strings.ToUpper(method) + " " + path; !w.seen[route] {
				t.Errorf("%s wasn't tried", route)
			}
		}
	}
}

// Each field of a chat request that the document lists is one that the edge checks: it
// refuses a value of a wrong type, with the name of the field.
func TestDescribedFieldsOfAChatRequestAreChecked(t *testing.T) {
	t.Parallel()
	h := build(t, plan{empty: true})
	request := compiled(t, "/components/schemas/ChatRequest")
	for name, s := range describe(t).Components.Schemas["ChatRequest"].Properties {
		wrong := `{"wrong":true}`
		if strings.Contains(fmt.Sprint(s.Type), "object") {
			wrong = `7`
		}
		body := map[string]json.RawMessage{"model": []byte(`"demo"`), "messages": []byte(`[{"role":"user","content":"x"}]`)}
		body[name] = json.RawMessage(wrong)
		text, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		resp, answer := h.do("POST", "/v1/chat/completions", h.key, string(text))
		checkRefusal(t, resp, answer, "invalid_value", name)
		v, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
		if err != nil || request.Validate(v) == nil {
			t.Errorf("the document takes %s", text)
		}
	}
}
