package schemas

import (
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"slices"
	"strings"
	"testing"
)

// asyncSubjects are the subjects that the functions of subject.go make, each token named for
// what it stands for.
var asyncSubjects = map[string][]string{
	"JobSubject":        {strings.Replace(JobSubject("tenant", "agent", "model"), JobShard("agent"), "shard", 1)},
	"OutSubject":        {OutSubject("agent", "owner", "nonce")},
	"BundleSubject":     {BundleSubject("agent", "owner")},
	"BodySubject":       {BodySubject("agent", "owner", "nonce")},
	"ControlSubject":    {ControlSubject("agent")},
	"HeartbeatSubject":  {HeartbeatSubject("tenant", "agent")},
	"AsideSubject":      {AsideSubject("tenant", "agent")},
	"HelloSubject":      {HelloSubject("tenant", "agent")},
	"UsageSubject":      {UsageSubject("tenant", "agent")},
	"ProgressSubject":   {ProgressSubject("key", "owner", "request")},
	"ResultSubject":     {ResultSubject("key", "id")},
	"PeerCancelSubject": {PeerCancelSubject("key", "request")},
	"InSubject": {
		InSubject("key", OperationChat), InSubject("key", OperationModels), InSubject("key", OperationWhoami),
		InSubject("key", OperationCancel), InSubject("key", OperationSubmit), InSubject("key", OperationResult),
	},
}

// TestAsyncAPIHasAllSubjects holds the channels of the document to the functions that make
// subjects, and these to the table above.
func TestAsyncAPIHasAllSubjects(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "subject.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var functions, want []string
	for _, decl := range file.Decls {
		if f, ok := decl.(*ast.FuncDecl); ok && f.Name.IsExported() && strings.HasSuffix(f.Name.Name, "Subject") && !strings.HasPrefix(f.Name.Name, "Parse") {
			functions = append(functions, f.Name.Name)
		}
	}
	sameSet(t, "functions that make subjects", functions, keys(asyncSubjects))
	if operations := constants(t, "", "Operation"); len(operations) != len(asyncSubjects["InSubject"]) {
		t.Errorf("the operations are %v, and %d subjects are tried", operations, len(asyncSubjects["InSubject"]))
	}
	for _, subjects := range asyncSubjects {
		want = append(want, subjects...)
	}
	var addresses []string
	for name, channel := range asyncDocument(t)["channels"].(map[string]any) {
		address, ok := channel.(map[string]any)["address"].(string)
		if !ok {
			if !strings.HasSuffix(name, "Inbox") {
				t.Errorf("channel %s has no address", name)
			}
			continue
		}
		var named []string
		for _, part := range strings.Split(address, ".") {
			if inner, ok := strings.CutPrefix(part, "{"); ok {
				named = append(named, strings.TrimSuffix(inner, "}"))
			}
		}
		sameSet(t, "parameters of "+name, keys(dig(t, channel, "parameters").(map[string]any)), named)
		addresses = append(addresses, strings.NewReplacer("{", "", "}", "").Replace(address))
	}
	sameSet(t, "addresses of asyncapi.json", addresses, want)
}

// TestAsyncAPIHasAllMessages looks whether every schema is there, every message has its
// place, and every reference leads somewhere.
func TestAsyncAPIHasAllMessages(t *testing.T) {
	doc := asyncDocument(t)
	docs := schemaDocuments(t)
	sameSet(t, "schemas of asyncapi.json", keys(dig(t, doc, "components", "schemas").(map[string]any)), keys(docs))
	used := map[string]bool{}
	references(t, doc, doc, func(to string) {
		used[to] = true
		file, ok := strings.CutPrefix(to, "json/")
		if !ok && !strings.HasPrefix(to, "#/") || ok && docs[strings.TrimSuffix(file, ".json")] == nil {
			t.Errorf("nothing is at %q", to)
		}
	})
	for _, kind := range []string{"messages", "schemas", "parameters", "securitySchemes"} {
		for name := range dig(t, doc, "components", kind).(map[string]any) {
			// These are parts of other messages, and of HTTP.
			if parts := []string{"error", "inventory", "bus-error"}; !used["#/components/"+kind+"/"+name] && !slices.Contains(parts, name) {
				t.Errorf("%s %s isn't used", kind, name)
			}
		}
	}
	sent := map[string]bool{}
	for name, operation := range dig(t, doc, "operations").(map[string]any) {
		channel := dig(t, operation, "channel", "$ref").(string)
		sent[channel] = true
		withinChannel(t, name, channel, operation)
		if reply, ok := operation.(map[string]any)["reply"]; ok {
			to := dig(t, reply, "channel", "$ref").(string)
			sent[to] = true
			withinChannel(t, name, to, reply)
		}
	}
	for name := range dig(t, doc, "channels").(map[string]any) {
		if !sent["#/channels/"+name] {
			t.Errorf("nobody sends to channel %s", name)
		}
	}
}

func withinChannel(t *testing.T, operation, channel string, v any) {
	t.Helper()
	for _, m := range dig(t, v, "messages").([]any) {
		if to := dig(t, m, "$ref").(string); !strings.HasPrefix(to, channel+"/messages/") {
			t.Errorf("operation %s has a message %q that isn't of %s", operation, to, channel)
		}
	}
}

// references calls found for every reference in v, and follows those within the document.
func references(t *testing.T, doc, v any, found func(to string)) {
	t.Helper()
	switch v := v.(type) {
	case map[string]any:
		if to, ok := v["$ref"].(string); ok {
			found(to)
			if local, ok := strings.CutPrefix(to, "#/"); ok {
				dig(t, doc, strings.Split(local, "/")...)
			}
		}
		for _, member := range v {
			references(t, doc, member, found)
		}
	case []any:
		for _, member := range v {
			references(t, doc, member, found)
		}
	}
}

func asyncDocument(t *testing.T) map[string]any {
	t.Helper()
	var doc map[string]any
	if err := json.Unmarshal(AsyncAPI, &doc); err != nil {
		t.Fatal(err)
	}
	return doc
}
