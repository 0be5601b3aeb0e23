package schemas

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/santhosh-tekuri/jsonschema/v6"
)

const schemaBase = "https://ownllm.app/schemas/v1/"

// wire says which Go type each schema describes, with a value that has every field
// set and one that has as little as the type can have.
var wire = map[string]struct{ full, minimal any }{
	"job-head": {
		&Job{
			Version: ProtocolVersion, Request: NewRequestID(), Attempt: 1, Nonce: NewNonce(), Owner: NewOwnerID(), Tenant: NewTenantID(),
			Key: NewKeyID(), Operation: "chat", Model: "qwen/qwen2.5:32b", Deadline: 1, ColdWait: 1, Stream: true, IncludeUsage: true,
			Completion: NewRequestID().CompletionID(), Created: 1, ReplyModel: "m", Limit: 1, More: true, Count: true, CountLate: true, Hold: true, Bundle: true, BodySize: 1,
			Continue: &Continuation{Text: "t", Tokens: 1, PromptTokens: 1},
		},
		&Job{
			Version: ProtocolVersion, Request: NewRequestID(), Attempt: 1, Nonce: NewNonce(), Owner: NewOwnerID(), Tenant: NewTenantID(),
			Operation: "chat", Model: "m", Completion: NewRequestID().CompletionID(), ReplyModel: "m",
		},
	},
	"frame-head": {
		&Frame{
			Run: string(NewNonce()), Seq: 1, Kind: FrameError, Tokens: 1, PromptTokens: 1, Loading: true, Usage: &Usage{1, 1},
			Error: fullError, Payload: []byte("not a part of the head"),
		},
		&Frame{Run: "r", Kind: FrameClaim},
	},
	"bundle-head":  {BundleHead{NewNonce(), 1}, BundleHead{NewNonce(), 0}},
	"bus-error":    {fullError, &Error{Code: CodeInternalError}},
	"verdict":      {Verdict{Go: true, Reason: "r", Seq: 1, Next: 1, Limit: 1, More: true}, Verdict{Reason: ReasonFinished}},
	"inventory":    {Inventory{[]Model{fullModel}, true}, Inventory{}},
	"heartbeat":    {Heartbeat{ProtocolVersion, NewIncarnation(), AgentUp, "h", &Inventory{[]Model{fullModel}, true}, "gpu-1", 1, 1, 1, true}, Heartbeat{Version: ProtocolVersion, Incarnation: NewIncarnation(), State: AgentBye, Hash: "h"}},
	"hello":        {Hello{ProtocolVersion, OldestProtocol, NewIncarnation(), "s", "h", Inventory{[]Model{fullModel}, true}}, Hello{Version: ProtocolVersion, Incarnation: NewIncarnation()}},
	"welcome":      {Welcome{ProtocolVersion, JobStream("agt_2"), map[string]string{"m": "c"}, fullError}, Welcome{Stream: JobStream("agt_2")}},
	"control":      {Control{ControlLimit, NewNonce(), ReasonCancelled, NewIncarnation(), 1, true}, Control{Operation: ControlInventory}},
	"body-request": {BodyRequest{1}, BodyRequest{}},
	"ingress-answer": {
		&Answer{
			Seq: 1, Kind: FrameError, Request: NewRequestID(), Chunk: json.RawMessage(`{}`), Usage: &TotalUsage{1, 1, 2}, Completion: json.RawMessage(`{}`),
			Error: fullError.Client(), RetryAfter: 1,
		},
		&Answer{Seq: 1, Kind: FrameProgress, Request: NewRequestID()},
	},
	"ingress-models": {
		ModelsAnswer{KindModels, "list", []ModelEntry{{"m", "model", 1, "ownllm", Capabilities{true, true, true, true, true}, 1, 1, "auto"}}},
		ModelsAnswer{KindModels, "list", []ModelEntry{}},
	},
	"ingress-whoami": {
		Whoami{KindWhoami, NewKeyID(), "n", "sk-ownllm-ab12", NewTenantID(), "acme", NewUserID(), []string{"model:*"}, new(int64(1)), 1, 1, 1},
		Whoami{Kind: KindWhoami, Key: NewKeyID(), Tenant: NewTenantID(), Slug: "acme", User: NewUserID(), Scopes: []string{}},
	},
	"ingress-cancel":    {CancelRequest{NewRequestID()}, CancelRequest{NewRequestID()}},
	"ingress-cancelled": {Cancelled{KindCancelled, NewRequestID()}, Cancelled{KindCancelled, NewRequestID()}},
	"ingress-submit": {
		SubmitRequest{"a", json.RawMessage(`{}`), new(3600)}, SubmitRequest{ID: "a", Request: json.RawMessage(`{}`)},
	},
	"ingress-accepted":       {Accepted{KindAccepted, "a", SubmissionDone, true}, Accepted{Kind: KindAccepted, ID: "a", State: SubmissionWaiting}},
	"ingress-result-request": {ResultRequest{"a", 1}, ResultRequest{ID: "a"}},
	"ingress-result": {
		&Result{KindResult, "a", SubmissionDone, NewRequestID(), json.RawMessage(`{}`), &TotalUsage{1, 1, 2}, fullError.Client(), 1, 2, 3},
		&Result{Kind: KindResult, ID: "a", State: SubmissionWaiting, Created: 1},
	},
	"usage-report": {UsageReport{ProtocolVersion, NewRequestID(), 1, Usage{1, 1}}, UsageReport{Version: ProtocolVersion, Request: NewRequestID(), Attempt: 1}},
}

var fullError = &Error{Code: CodeModelLoading, Message: "m", Param: "p", RetryAfter: time.Second}

var fullModel = Model{
	ID: "m", Capabilities: Capabilities{true, true, true, true, true}, ContextWindow: 1, SizeMB: 1, RuntimeProfile: "auto", Created: 1,
	State: ModelLoading, Detail: "d", LoadMS: 1, LoadPercent: 1, Backend: "demo", Slots: 1, Continues: true,
}

// The schemas that aren't of wire types. The bytes of clientErrorSchema are written by
// Error.AppendJSON; chatSchema is of what clients send.
const (
	clientErrorSchema = "error"
	chatSchema        = "ingress-chat"
)

// schemaDocuments returns the schemas as plain JSON, by name.
func schemaDocuments(t testing.TB) map[string]map[string]any {
	t.Helper()
	files, err := fs.Glob(JSON, "json/*.json")
	if err != nil {
		t.Fatal(err)
	}
	docs := map[string]map[string]any{}
	for _, file := range files {
		b, err := JSON.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		docs[strings.TrimSuffix(path.Base(file), ".json")] = doc.(map[string]any)
	}
	return docs
}

// compile returns the compiled schemas by name. Nothing is loaded from anywhere: a
// reference that leads out of the folder fails.
func compile(t testing.TB) map[string]*jsonschema.Schema {
	t.Helper()
	docs := schemaDocuments(t)
	c := jsonschema.NewCompiler()
	c.UseLoader(jsonschema.SchemeURLLoader{})
	for name, doc := range docs {
		if err := c.AddResource(schemaBase+name+".json", doc); err != nil {
			t.Fatal(err)
		}
	}
	compiled := map[string]*jsonschema.Schema{}
	for name := range docs {
		s, err := c.Compile(schemaBase + name + ".json")
		if err != nil {
			t.Fatal(err)
		}
		compiled[name] = s
	}
	return compiled
}

func instance(t testing.TB, b []byte) any {
	t.Helper()
	v, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
	if err != nil {
		t.Fatalf("%s: %v", b, err)
	}
	return v
}

func marshal(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestSchemaForEveryWireType(t *testing.T) {
	docs := schemaDocuments(t)
	for name := range docs {
		if _, ok := wire[name]; !ok && name != clientErrorSchema && name != chatSchema {
			t.Errorf("%s.json describes nothing", name)
		}
	}
	for name := range wire {
		if _, ok := docs[name]; !ok {
			t.Errorf("%s.json is missing", name)
		}
	}
}

func TestWireTypesValidate(t *testing.T) {
	schemas := compile(t)
	for name, values := range wire {
		requireFull(t, name, reflect.ValueOf(values.full))
		for about, v := range map[string]any{"full": values.full, "minimal": values.minimal} {
			b := marshal(t, v)
			if err := schemas[name].Validate(instance(t, b)); err != nil {
				t.Errorf("%s %s %s: %v", about, name, b, err)
			}
		}
	}
	// The head that is written by hand, too.
	b, err := AppendFrame(nil, &Frame{Run: "r", Seq: 1, Kind: FrameChunk, Tokens: 1, Payload: []byte("p")})
	if err != nil {
		t.Fatal(err)
	}
	head, _, _ := bytes.Cut(b, []byte{'\n'})
	if err := schemas["frame-head"].Validate(instance(t, head)); err != nil {
		t.Errorf("chunk head %s: %v", head, err)
	}
}

// requireFull fails the test if a field of v, at any depth, is zero: such a field would
// not be tried.
func requireFull(t *testing.T, at string, v reflect.Value) {
	t.Helper()
	switch {
	case v.IsZero() || v.Kind() == reflect.Slice && v.Len() == 0:
		t.Errorf("%s isn't set", at)
	case v.Kind() == reflect.Pointer:
		requireFull(t, at, v.Elem())
	case v.Kind() == reflect.Slice:
		requireFull(t, at+"[0]", v.Index(0))
	case v.Kind() == reflect.Struct:
		for i := range v.NumField() {
			requireFull(t, at+"."+v.Type().Field(i).Name, v.Field(i))
		}
	}
}

func TestEveryFrameKindValidates(t *testing.T) {
	s := compile(t)["frame-head"]
	for _, kind := range constants(t, "FrameKind", "") {
		f := Frame{Run: "r", Seq: 1, Kind: FrameKind(kind), Error: fullError}
		if err := s.Validate(instance(t, marshal(t, &f))); err != nil {
			t.Errorf("%s frame: %v", kind, err)
		}
	}
}

func TestEveryErrorValidates(t *testing.T) {
	s := compile(t)[clientErrorSchema]
	types := map[string]bool{}
	for _, info := range Codes {
		types[info.Type] = true
		for _, param := range []string{"", "model"} {
			b := (&Error{Code: info.Code, Message: "m", Param: param}).AppendJSON(nil)
			if err := s.Validate(instance(t, b)); err != nil {
				t.Errorf("%s: %v", b, err)
			}
		}
		for _, other := range Codes {
			b := (&Error{Code: info.Code}).AppendJSON(nil)
			b = bytes.Replace(b, []byte(`"type":"`+info.Type), []byte(`"type":"`+other.Type), 1)
			if err := s.Validate(instance(t, b)); (err == nil) != (info.Type == other.Type) {
				t.Errorf("%s: %v", b, err)
			}
		}
	}
	doc := schemaDocuments(t)[clientErrorSchema]
	var listed []string
	for _, one := range dig(t, doc, "properties", "error", "oneOf").([]any) {
		listed = append(listed, texts(dig(t, one, "properties", "code", "enum"))...)
	}
	var codes []string
	for _, info := range Codes {
		codes = append(codes, string(info.Code))
	}
	sameSet(t, "codes of error.json", listed, codes)
	sameSet(t, "types of error.json", texts(dig(t, doc, "properties", "error", "properties", "type", "enum")), keys(types))
}

func TestEnumsAreTheConstants(t *testing.T) {
	docs := schemaDocuments(t)
	for _, c := range []struct {
		doc, typ, prefix string
		path             []string
	}{
		{"frame-head", "FrameKind", "", []string{"properties", "kind", "enum"}},
		{"heartbeat", "AgentState", "", []string{"properties", "state", "enum"}},
		{"inventory", "ModelState", "", []string{"$defs", "model", "properties", "state", "enum"}},
		{"control", "", "Control", []string{"properties", "operation", "enum"}},
		{"ingress-accepted", "SubmissionState", "", []string{"properties", "state", "enum"}},
		{"ingress-result", "SubmissionState", "", []string{"properties", "state", "enum"}},
		{"verdict", "", "Reason", []string{"properties", "reason", "examples"}},
	} {
		var want []string
		for _, value := range constants(t, c.typ, c.prefix) {
			want = append(want, value)
		}
		sameSet(t, c.doc, texts(dig(t, docs[c.doc], c.path...)), want)
	}
}

// The patterns of ids in the schemas and ValidateID say the same.
func TestIDPatterns(t *testing.T) {
	s := compile(t)["job-head"]
	job := wire["job-head"].full.(*Job)
	for id, want := range map[RequestID]bool{
		NewRequestID(): true, "req_01K9ZQ8V7M4T2X6B3C5D7E8F9G": true, "req_7ZZZZZZZZZZZZZZZZZZZZZZZZZ": true, "req_00000000000000000000000000": true,
		"": false, "req_": false, "01K9ZQ8V7M4T2X6B3C5D7E8F9G": false, "ten_01K9ZQ8V7M4T2X6B3C5D7E8F9G": false, "req_81K9ZQ8V7M4T2X6B3C5D7E8F9G": false,
		"req_01K9ZQ8V7M4T2X6B3C5D7E8F9I": false, "req_01K9ZQ8V7M4T2X6B3C5D7E8F9GG": false, "req_01K9ZQ8V7M4T2X6B3C5D7E8F9G\n": false,
	} {
		other := *job
		other.Request = id
		if err := s.Validate(instance(t, marshal(t, &other))); (err == nil) != want {
			t.Errorf("schema on request id %q: %v", id, err)
		}
		if err := ValidateID(string(id), "req_"); (err == nil) != want {
			t.Errorf("ValidateID on request id %q: %v", id, err)
		}
	}
}

// golden is a file of testdata/v<N>: examples of one schema in version N of the protocol. At is the JSON pointer to
// what is wrong with an invalid one.
type golden struct {
	Valid []struct {
		About string
		Value json.RawMessage
	}
	Invalid []struct {
		About, At string
		Value     json.RawMessage
	}
}

func goldens(t *testing.T, version int) map[string]golden {
	t.Helper()
	found := map[string]golden{}
	for name := range schemaDocuments(t) {
		b, err := os.ReadFile(fmt.Sprintf("testdata/v%d/%s.json", version, name))
		if os.IsNotExist(err) && version < Protocol.Newest {
			continue // a message that came later
		}
		if err != nil {
			t.Fatal(err)
		}
		d := json.NewDecoder(bytes.NewReader(b))
		d.DisallowUnknownFields()
		var g golden
		if err := d.Decode(&g); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if len(g.Valid) == 0 || len(g.Invalid) == 0 {
			t.Errorf("%s has no examples", name)
		}
		found[name] = g
	}
	if len(found) == 0 {
		t.Errorf("no golden message of version %d is kept", version)
	}
	return found
}

func TestGoldens(t *testing.T) {
	schemas := compile(t)
	for name, g := range goldens(t, Protocol.Newest) {
		for _, e := range g.Valid {
			if err := schemas[name].Validate(instance(t, e.Value)); err != nil {
				t.Errorf("%s, %s: %v", name, e.About, err)
			}
		}
		for _, e := range g.Invalid {
			err := schemas[name].Validate(instance(t, e.Value))
			var invalid *jsonschema.ValidationError
			if !errors.As(err, &invalid) {
				t.Errorf("%s, %s: is taken for valid", name, e.About)
			} else if places := blamed(invalid); !slices.Contains(places, e.At) {
				t.Errorf("%s, %s: wrong at %q, want %q", name, e.About, places, e.At)
			}
		}
	}
}

// blamed lists where a validation failed, as JSON pointers.
func blamed(e *jsonschema.ValidationError) []string {
	if len(e.Causes) == 0 {
		at := ""
		for _, token := range e.InstanceLocation {
			at += "/" + token
		}
		return []string{at}
	}
	var places []string
	for _, cause := range e.Causes {
		places = append(places, blamed(cause)...)
	}
	return places
}

// What the schemas call valid, this build reads, fields of a later version included, and
// so it does with the messages of each version that it says it understands.
func TestGoldensAreRead(t *testing.T) {
	for version := Protocol.Oldest; version <= Protocol.Newest; version++ {
		for name, g := range goldens(t, version) {
			for _, e := range g.Valid {
				var line bytes.Buffer
				if err := json.Compact(&line, e.Value); err != nil {
					t.Fatal(err)
				}
				if err := read(name, line.Bytes()); err != nil {
					t.Errorf("version %d, %s, %s: %v", version, name, e.About, err)
				}
			}
		}
	}
}

func read(name string, line []byte) error {
	switch name {
	case clientErrorSchema:
		var e decodedEnvelope
		return json.Unmarshal(line, &e)
	case chatSchema:
		var fields map[string]json.RawMessage
		return json.Unmarshal(line, &fields)
	case "ingress-answer":
		_, err := DecodeAnswer(line)
		return err
	case "ingress-cancel":
		_, err := DecodeCancelRequest(line)
		return err
	case "job-head":
		_, _, err := DecodeJob(append(line, '\n'))
		return err
	case "frame-head":
		_, err := DecodeFrame(append(line, '\n'))
		return err
	case "body-request":
		_, err := DecodeBodyRequest(line)
		return err
	case "ingress-submit":
		_, err := DecodeSubmitRequest(line)
		return err
	case "ingress-result-request":
		_, err := DecodeResultRequest(line)
		return err
	case "usage-report":
		_, err := DecodeUsageReport(line)
		return err
	}
	v := reflect.New(reflect.Indirect(reflect.ValueOf(wire[name].full)).Type())
	return json.Unmarshal(line, v.Interface())
}

// TestFieldsAreTheProperties holds the schemas to the Go types: the same names, the
// same types, and required is what is always sent.
func TestFieldsAreTheProperties(t *testing.T) {
	docs := schemaDocuments(t)
	for name, values := range wire {
		compareType(t, docs, name, docs[name], docs[name], reflect.TypeOf(values.full))
	}
	envelope := dig(t, docs[clientErrorSchema], "properties", "error").(map[string]any)
	compareType(t, docs, clientErrorSchema, docs[clientErrorSchema], envelope, reflect.TypeFor[struct {
		Message string  `json:"message"`
		Type    string  `json:"type"`
		Param   *string `json:"param"`
		Code    Code    `json:"code"`
	}]())
}

// What publishers send is what clients send over HTTP.
func TestChatSchemaIsThatOfHTTP(t *testing.T) {
	var api map[string]any
	if err := json.Unmarshal(OpenAPI, &api); err != nil {
		t.Fatal(err)
	}
	overHTTP := dig(t, api, "components", "schemas", "ChatRequest").(map[string]any)
	message := dig(t, api, "components", "schemas", "ChatMessage")
	dig(t, overHTTP, "properties", "messages").(map[string]any)["items"] = message
	var chat map[string]any
	b, err := JSON.ReadFile("json/" + chatSchema + ".json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &chat); err != nil {
		t.Fatal(err)
	}
	dig(t, chat, "properties", "messages").(map[string]any)["items"] = dig(t, chat, "$defs", "message")
	for _, part := range []string{"properties", "required"} {
		if diff := cmp.Diff(bare(overHTTP[part]), bare(chat[part])); diff != "" {
			t.Errorf("%s (-HTTP +NATS):\n%s", part, diff)
		}
	}
}

// bare is a schema without what is for people.
func bare(schema any) any {
	switch v := schema.(type) {
	case map[string]any:
		m := make(map[string]any, len(v))
		for key, value := range v {
			if _, text := value.(string); !text || key != "description" && key != "title" {
				m[key] = bare(value)
			}
		}
		return m
	case []any:
		list := make([]any, len(v))
		for i := range v {
			list[i] = bare(v[i])
		}
		return list
	}
	return schema
}

func compareType(t *testing.T, docs map[string]map[string]any, at string, root, schema map[string]any, typ reflect.Type) {
	t.Helper()
	nullable := false
	if typ.Kind() == reflect.Pointer {
		typ, nullable = typ.Elem(), true
	}
	if ref, ok := schema["$ref"].(string); ok {
		if local, ok := strings.CutPrefix(ref, "#/"); ok {
			compareType(t, docs, at, root, dig(t, root, strings.Split(local, "/")...).(map[string]any), typ)
			return
		}
		other := docs[strings.TrimSuffix(ref, ".json")]
		if other == nil {
			t.Errorf("%s: nothing at %q", at, ref)
			return
		}
		compareType(t, docs, at, other, other, typ)
		return
	}
	if typ == reflect.TypeFor[Error]() {
		typ = reflect.TypeFor[errorJSON]()
	}
	if typ == reflect.TypeFor[json.RawMessage]() {
		if schema["type"] != "object" {
			t.Errorf("%s: type %v, want object", at, schema["type"])
		}
		return
	}
	kinds, ok := schema["type"].([]any)
	if !ok {
		kinds = []any{schema["type"]}
	}
	want := ""
	switch typ.Kind() {
	case reflect.Struct:
		want = "object"
		compareFields(t, docs, at, root, schema, typ)
	case reflect.Map:
		want = "object"
		compareType(t, docs, at+".*", root, dig(t, schema, "additionalProperties").(map[string]any), typ.Elem())
	case reflect.Slice:
		want, nullable = "array", true
		compareType(t, docs, at+"[]", root, dig(t, schema, "items").(map[string]any), typ.Elem())
	case reflect.String:
		want = "string"
	case reflect.Bool:
		want = "boolean"
	case reflect.Int, reflect.Int64, reflect.Uint64:
		want = "integer"
	default:
		t.Fatalf("%s: a field of type %s", at, typ)
	}
	if kinds[0] != want || len(kinds) > 2 || len(kinds) == 2 && (kinds[1] != "null" || !nullable) {
		t.Errorf("%s: type %v, want %s", at, kinds, want)
	}
}

func compareFields(t *testing.T, docs map[string]map[string]any, at string, root, schema map[string]any, typ reflect.Type) {
	t.Helper()
	properties := dig(t, schema, "properties").(map[string]any)
	var names, always []string
	for _, field := range reflect.VisibleFields(typ) {
		if field.Anonymous {
			continue // its fields are listed beside it
		}
		name, options, _ := strings.Cut(field.Tag.Get("json"), ",")
		if name == "-" {
			continue
		}
		if name == "" {
			t.Fatalf("%s.%s has no name on the wire", at, field.Name)
		}
		names = append(names, name)
		if options == "" {
			always = append(always, name)
		}
		if property, ok := properties[name].(map[string]any); ok {
			compareType(t, docs, at+"."+name, root, property, field.Type)
		}
	}
	sameSet(t, "properties of "+at, keys(properties), names)
	sameSet(t, "required of "+at, texts(dig(t, schema, "required")), always)
}

func TestSchemasAreDocumentedAndOpen(t *testing.T) {
	for name, doc := range schemaDocuments(t) {
		if doc["$schema"] != "https://json-schema.org/draft/2020-12/schema" || doc["$id"] != schemaBase+name+".json" {
			t.Errorf("%s: $schema %v, $id %v", name, doc["$schema"], doc["$id"])
		}
		checkDocumented(t, name, doc, true)
	}
}

// checkDocumented walks the schema of an object.
func checkDocumented(t *testing.T, at string, schema map[string]any, titled bool) {
	t.Helper()
	if _, isRef := schema["$ref"]; titled && !isRef {
		if title, _ := schema["title"].(string); title == "" {
			t.Errorf("%s has no title", at)
		}
	}
	if text, _ := schema["description"].(string); !strings.HasSuffix(text, ".") && !strings.HasSuffix(text, "?") {
		t.Errorf("%s: description %q isn't a sentence", at, text)
	}
	for _, keyword := range []string{"additionalProperties", "unevaluatedProperties"} {
		if schema[keyword] == false {
			t.Errorf("%s is closed: a later version couldn't add a field", at)
		}
	}
	for _, group := range []string{"properties", "$defs"} {
		members, _ := schema[group].(map[string]any)
		for name, member := range members {
			m := member.(map[string]any)
			_, isObject := m["properties"]
			checkDocumented(t, at+"."+name, m, isObject)
		}
	}
}

// dig follows a path of keys.
func dig(t testing.TB, v any, path ...string) any {
	t.Helper()
	for _, key := range path {
		m, ok := v.(map[string]any)
		if !ok || m[key] == nil {
			t.Fatalf("nothing at %q of %q", key, path)
		}
		v = m[key]
	}
	return v
}

func texts(v any) []string {
	var list []string
	for _, item := range v.([]any) {
		list = append(list, item.(string))
	}
	return list
}

func keys[V any](m map[string]V) []string {
	var list []string
	for k := range m {
		list = append(list, k)
	}
	return list
}

func sameSet(t *testing.T, what string, got, want []string) {
	t.Helper()
	slices.Sort(got)
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-Go +schema):\n%s", what, diff)
	}
}
