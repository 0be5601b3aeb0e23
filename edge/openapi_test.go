package edge_test

import (
	"bytes"
	"encoding/json"
	"net/http"
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
