package edge_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"mime"
	"net/http"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/edge"
	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/schemas"
)

// description is the OpenAPI document.
type description struct {
	Paths      map[string]map[string]*operation
	Components struct {
		Schemas    map[string]*schema
		Responses  map[string]response
		Parameters map[string]parameter
		Headers    map[string]any
	}
}

type operation struct {
	OperationID string
	Tags        []string
	Summary     string
	Security    []map[string][]string
	Parameters  []parameter
	RequestBody *struct{ Content map[string]media }
	Responses   map[string]response
}

type parameter struct {
	Ref      string `json:"$ref"`
	Name, In string
}

type response struct {
	Ref         string `json:"$ref"`
	Description string
	Headers     map[string]any
	Content     map[string]media
}

type media struct{ Schema schema }

type schema struct {
	Ref                  string `json:"$ref"`
	Type                 any
	Properties           map[string]*schema
	Required             []string
	Enum                 []string
	Items                *schema
	OneOf                []schema
	AdditionalProperties *bool
	Description          string
}

func describe(t testing.TB) description {
	t.Helper()
	var d description
	if err := json.Unmarshal(schemas.OpenAPI, &d); err != nil {
		t.Fatal(err)
	}
	return d
}

const openAPIBase = "https://ownllm.app/openapi.json"

// compiled returns the schema at a JSON pointer of the document.
func compiled(t testing.TB, pointer string) *jsonschema.Schema {
	t.Helper()
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(schemas.OpenAPI))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	c.UseLoader(jsonschema.SchemeURLLoader{}) // nothing comes from elsewhere
	c.AssertFormat()
	if err := c.AddResource(openAPIBase, doc); err != nil {
		t.Fatal(err)
	}
	s, err := c.Compile(openAPIBase + "#" + pointer)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// The document has the routes that there are, and no others.
func TestOpenAPIHasEveryRoute(t *testing.T) {
	t.Parallel()
	param := regexp.MustCompile(`:(\w+)`)
	var served, described []string
	for _, r := range edge.New(edge.Config{BodyLimit: 1}, edge.Parts{}).Routes() {
		if r[0] != http.MethodHead { // every GET has one
			path := strings.Replace(param.ReplaceAllString(r[1], "{$1}"), "/v1/models/*", "/v1/models/{model}", 1)
			served = append(served, r[0]+" "+path)
		}
	}
	d := describe(t)
	ids := map[string]bool{}
	for path, operations := range d.Paths {
		for method, o := range operations {
			route := strings.ToUpper(method) + " " + path
			described = append(described, route)
			if o.OperationID == "" || ids[o.OperationID] || o.Summary == "" || len(o.Tags) != 1 {
				t.Errorf("%s lacks a name of its own, a summary or a tag: %+v", route, o)
			}
			ids[o.OperationID] = true
			security := "apiKey"
			switch {
			case path == adminapi.Prefix+adminapi.PairPath: // what it takes is in the body
				security = ""
			case path == adminapi.Prefix+adminapi.HeartbeatPath:
				security = "agentCredential"
			case strings.HasPrefix(path, adminapi.Prefix):
				security = "adminToken"
			case !strings.HasPrefix(path, "/v1/"):
				security = ""
			}
			if len(o.Security) == 1 && o.Security[0][security] == nil || len(o.Security) != 1 && security != "" {
				t.Errorf("%s: security %v, want %s", route, o.Security, security)
			}
			var inPath []string
			for _, p := range o.Parameters {
				if p.In == "path" {
					inPath = append(inPath, "{"+p.Name+"}")
				}
			}
			if want := regexp.MustCompile(`{\w+}`).FindAllString(path, -1); !slices.Equal(want, inPath) {
				t.Errorf("%s: parameters of the path are %v", route, inPath)
			}
		}
	}
	slices.Sort(served)
	slices.Sort(described)
	if diff := cmp.Diff(served, described); diff != "" {
		t.Errorf("-served +described:\n%s", diff)
	}
}

// wireTypes are the Go types that the schemas describe.
var wireTypes = map[string]reflect.Type{
	"Tenant": reflect.TypeFor[adminapi.Tenant](), "CreateTenant": reflect.TypeFor[adminapi.CreateTenant](), "ChangeTenant": reflect.TypeFor[adminapi.ChangeTenant](),
	"User": reflect.TypeFor[adminapi.User](), "CreateUser": reflect.TypeFor[adminapi.CreateUser](),
	"Key": reflect.TypeFor[adminapi.Key](), "CreatedKey": reflect.TypeFor[adminapi.CreatedKey](), "CreateKey": reflect.TypeFor[adminapi.CreateKey](),
	"ChangeKey": reflect.TypeFor[adminapi.ChangeKey](), "RotateKey": reflect.TypeFor[adminapi.RotateKey](),
	"Agent": reflect.TypeFor[adminapi.Agent](), "AgentModel": reflect.TypeFor[adminapi.AgentModel](), "Model": reflect.TypeFor[adminapi.Model](),
	"Machine": reflect.TypeFor[adminapi.Machine](), "CreatePairing": reflect.TypeFor[adminapi.CreatePairing](), "Pairing": reflect.TypeFor[adminapi.Pairing](),
	"PairAgent": reflect.TypeFor[adminapi.PairAgent](), "PairedAgent": reflect.TypeFor[adminapi.PairedAgent](),
	"Heartbeat": reflect.TypeFor[schemas.Heartbeat](), "HeartbeatReply": reflect.TypeFor[adminapi.HeartbeatReply](),
	"Price": reflect.TypeFor[adminapi.Price](), "SetPrice": reflect.TypeFor[adminapi.SetPrice](),
	"Usage": reflect.TypeFor[adminapi.Usage](), "AuditEntry": reflect.TypeFor[adminapi.AuditEntry](), "Status": reflect.TypeFor[adminapi.Status](),
	"TenantPage": reflect.TypeFor[adminapi.List[adminapi.Tenant]](), "UserPage": reflect.TypeFor[adminapi.List[adminapi.User]](),
	"KeyPage": reflect.TypeFor[adminapi.List[adminapi.Key]](), "AgentPage": reflect.TypeFor[adminapi.List[adminapi.Agent]](),
	"ModelPage": reflect.TypeFor[adminapi.List[adminapi.Model]](), "PricePage": reflect.TypeFor[adminapi.List[adminapi.Price]](),
	"UsagePage": reflect.TypeFor[adminapi.List[adminapi.Usage]](), "AuditEntryPage": reflect.TypeFor[adminapi.List[adminapi.AuditEntry]](),
	"Capabilities": reflect.TypeFor[schemas.Capabilities](), "Readiness": reflect.TypeFor[edge.Readiness](), "ModelEntry": reflect.TypeFor[schemas.ModelEntry](),
}

// foreign are the schemas of what is OpenAI's: real answers are held against them.
var foreign = []string{
	"Error", "ChatRequest", "ChatMessage", "ChatCompletion", "ChatChunk", "ChatUsage", "ModelList", "TenantID", "UserID", "KeyID", "AgentID", "PairingID",
}

// The schemas have the fields of the wire types, and no others.
func TestOpenAPIHasEveryField(t *testing.T) {
	t.Parallel()
	d := describe(t)
	for name, s := range d.Components.Schemas {
		typ, ours := wireTypes[name]
		if !ours {
			if !slices.Contains(foreign, name) {
				t.Errorf("%s is the schema of nothing", name)
			}
			continue
		}
		want, required := map[string]string{}, []string{}
		for _, f := range reflect.VisibleFields(typ) {
			field, options, _ := strings.Cut(f.Tag.Get("json"), ",")
			if f.Anonymous {
				continue
			}
			want[field] = jsonType(f.Type)
			if !strings.HasPrefix(options, "omit") {
				required = append(required, field)
			}
		}
		got := map[string]string{}
		for field, p := range s.Properties {
			got[field] = d.typeOf(p)
			if d.describes(p) == "" {
				t.Errorf("%s.%s isn't described", name, field)
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s, -type +schema:\n%s", name, diff)
		}
		slices.Sort(required)
		slices.Sort(s.Required)
		if !slices.Equal(required, s.Required) {
			t.Errorf("%s: required are %v, want %v", name, s.Required, required)
		}
		asks := regexp.MustCompile("^(Create|Change|Set|Rotate)[A-Z]").MatchString(name)
		if closed := s.AdditionalProperties != nil && !*s.AdditionalProperties; closed != asks {
			t.Errorf("%s is closed: %v", name, closed)
		}
	}
	for name := range wireTypes {
		if d.Components.Schemas[name] == nil {
			t.Errorf("%s has no schema", name)
		}
	}
}

// jsonType is the type of a Go type in JSON; that of a pointer has "null" too.
func jsonType(t reflect.Type) string {
	switch t {
	case reflect.TypeFor[time.Time]():
		return "string"
	case reflect.TypeFor[adminapi.Cents]():
		return "number"
	case reflect.TypeFor[adminapi.Budget]():
		return "integer"
	case reflect.TypeFor[json.RawMessage]():
		return "object"
	}
	switch t.Kind() {
	case reflect.Pointer:
		return jsonType(t.Elem())
	case reflect.Slice:
		return "array of " + jsonType(t.Elem())
	case reflect.Struct:
		return "object"
	case reflect.Bool:
		return "boolean"
	case reflect.Int, reflect.Int64:
		return "integer"
	}
	return t.Kind().String()
}

func (d description) resolve(s *schema) *schema {
	if name, ok := strings.CutPrefix(s.Ref, "#/components/schemas/"); ok {
		return d.Components.Schemas[name]
	}
	return s
}

func (d description) describes(s *schema) string { return s.Description + d.resolve(s).Description }

// typeOf is the type of a schema, as jsonType writes it.
func (d description) typeOf(s *schema) string {
	s = d.resolve(s)
	if len(s.OneOf) > 0 {
		return d.typeOf(&s.OneOf[0])
	}
	name, _ := s.Type.(string)
	if list, ok := s.Type.([]any); ok {
		name, _ = list[0].(string)
	}
	if name == "array" {
		return "array of " + d.typeOf(s.Items)
	}
	return name
}

// Whatever is referred to is there, and what is there is referred to.
func TestOpenAPIReferences(t *testing.T) {
	t.Parallel()
	var doc map[string]any
	if err := json.Unmarshal(schemas.OpenAPI, &doc); err != nil {
		t.Fatal(err)
	}
	referred := map[string]bool{}
	var walk func(v any)
	walk = func(v any) {
		switch v := v.(type) {
		case map[string]any:
			if ref, ok := v["$ref"].(string); ok {
				referred[ref] = true
			}
			for _, w := range v {
				walk(w)
			}
		case []any:
			for _, w := range v {
				walk(w)
			}
		}
	}
	walk(doc)
	there := map[string]bool{}
	for kind, components := range doc["components"].(map[string]any) {
		for name := range components.(map[string]any) {
			if kind != "securitySchemes" {
				there["#/components/"+kind+"/"+name] = true
			}
		}
	}
	there["#/components/schemas/ChatChunk"] = false // it comes in events, which OpenAPI has no word for
	for ref := range referred {
		if !there[ref] {
			t.Errorf("%s isn't there", ref)
		}
	}
	for ref, want := range there {
		if want && !referred[ref] {
			t.Errorf("nothing refers to %s", ref)
		}
	}
}

func TestOpenAPIEnumsAreTheConstants(t *testing.T) {
	t.Parallel()
	d := describe(t)
	for at, want := range map[string][]string{
		"Tenant.state":     {adminapi.TenantActive, adminapi.TenantSuspended},
		"User.state":       {adminapi.UserActive, adminapi.UserDeactivated},
		"Key.state":        {adminapi.KeyActive, adminapi.KeyExpired, adminapi.KeyRevoked},
		"Agent.state":      {adminapi.AgentUp, adminapi.AgentDraining, adminapi.AgentStale, adminapi.AgentOffline},
		"Model.state":      {string(schemas.ModelReady), string(schemas.ModelCold), string(schemas.ModelLoading), string(schemas.ModelFailed)},
		"AgentModel.state": {string(schemas.ModelReady), string(schemas.ModelCold), string(schemas.ModelLoading), string(schemas.ModelFailed)},
		"AuditEntry.kind":  {string(books.KindTenant), string(books.KindUser), string(books.KindKey), string(books.KindAgent), string(books.KindPairing), string(books.KindPrice)},
		"Heartbeat.state":  {string(schemas.AgentUp), string(schemas.AgentDraining), string(schemas.AgentBye)},
	} {
		name, field, _ := strings.Cut(at, ".")
		if got := d.Components.Schemas[name].Properties[field].Enum; !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", at, got, want)
		}
	}
	// The envelope is the one of the schemas of the bus, whose codes have a test.
	var here, there map[string]any
	if err := json.Unmarshal(schemas.OpenAPI, &here); err != nil {
		t.Fatal(err)
	}
	b, err := schemas.JSON.ReadFile("json/error.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &there); err != nil {
		t.Fatal(err)
	}
	envelope := here["components"].(map[string]any)["schemas"].(map[string]any)["Error"].(map[string]any)
	if diff := cmp.Diff(there["properties"], envelope["properties"]); diff != "" {
		t.Errorf("-error.json +openapi.json:\n%s", diff)
	}
}

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
