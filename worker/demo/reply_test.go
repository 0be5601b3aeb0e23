package demo

import (
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/tidwall/gjson"
	"pgregory.net/rapid"
)

func TestSplit(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := rapid.String().Draw(t, "text")
		tokens := split(s)
		if got := strings.Join(tokens, ""); got != s {
			t.Fatalf("split(%q) joins to %q", s, got)
		}
		for _, token := range tokens {
			if token == "" || len(token) > 16 || !utf8.ValidString(token) {
				t.Fatalf("split(%q) has the token %q", s, token)
			}
		}
	})
}

// Wherever a reply is cut, what continues it is the rest.
func TestResumeAnywhere(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		f := NoFaults()
		f.Numbered = rapid.Bool().Draw(t, "numbered")
		f.Tokens = rapid.IntRange(0, 200).Draw(t, "tokens")
		f.Text = rapid.SampledFrom([]string{"", "", "aaaa aaaa aaaa aa", "x"}).Draw(t, "text")
		f.ReasoningTokens = rapid.IntRange(0, 3).Draw(t, "reasoning")
		info := DefaultModel()
		text := func(prefix string) string {
			q := &request{n: 1, prompt: []message{{"user", "hi"}}, continues: prefix != "", prefix: prefix}
			p, err := plan(q, &f, &info)
			if err != nil {
				t.Fatal(err)
			}
			var b strings.Builder
			for i := max(p.start, p.reasoning); i < p.end; i++ {
				b.WriteString(p.token(i, 0))
			}
			return b.String()
		}
		whole := text("")
		if whole == "" {
			return
		}
		at := rapid.IntRange(1, len(whole)).Draw(t, "cut")
		if got := whole[:at] + text(whole[:at]); got != whole {
			t.Fatalf("cut at %d: %q, want %q", at, got, whole)
		}
	})
}

func TestInstanceFitsItsSchema(t *testing.T) {
	for _, schema := range []string{
		`{}`,
		`{"type":"string"}`,
		`{"type":"string","minLength":11,"maxLength":12}`,
		`{"type":"string","maxLength":2}`,
		`{"type":"string","enum":["b","a"]}`,
		`{"const":{"a":[1]}}`,
		`{"type":"integer","minimum":4}`,
		`{"type":"integer","exclusiveMinimum":4,"maximum":9}`,
		`{"type":"number","maximum":-3.5}`,
		`{"type":"number","exclusiveMaximum":0}`,
		`{"type":"boolean"}`,
		`{"type":"null"}`,
		`{"type":["string","null"]}`,
		`{"type":"array","items":{"type":"integer"}}`,
		`{"type":"array","items":{"type":"integer"},"minItems":3}`,
		`{"anyOf":[{"type":"integer"},{"type":"string"}]}`,
		`{"type":"object","additionalProperties":false,"required":["b","a"],"properties":{"a":{"type":"object","required":["x.y"],"properties":{"x.y":{"type":"boolean"}}},"b":{"type":"array","minItems":1,"items":{"enum":[7]}}}}`,
		`{"$defs":{"node":{"type":"object","required":["next"],"properties":{"next":{"anyOf":[{"type":"null"},{"$ref":"#/$defs/node"}]}}}},"$ref":"#/$defs/node"}`,
		`{"definitions":{"a/b":{"type":"integer"}},"type":"object","required":["v"],"properties":{"v":{"$ref":"#/definitions/a~1b"}}}`,
	} {
		t.Run(schema, func(t *testing.T) {
			parsed := gjson.Parse(schema)
			n := instancer{budget: maxSchemaBytes}
			instance := n.instance(parsed)
			doc, err := jsonschema.UnmarshalJSON(strings.NewReader(schema))
			if err != nil {
				t.Fatal(err)
			}
			compiler := jsonschema.NewCompiler()
			if err := compiler.AddResource("schema.json", doc); err != nil {
				t.Fatal(err)
			}
			compiled, err := compiler.Compile("schema.json")
			if err != nil {
				t.Fatal(err)
			}
			value, err := jsonschema.UnmarshalJSON(strings.NewReader(instance))
			if err != nil {
				t.Fatalf("instance %s: %v", instance, err)
			}
			if err := compiled.Validate(value); err != nil {
				t.Errorf("instance %s: %v", instance, err)
			}
		})
	}
}

// A schema that never ends still gets an answer.
func TestInstanceOfEndlessSchema(t *testing.T) {
	for _, schema := range []string{
		`{"$ref":"#"}`,
		`{"type":"object","required":["a"],"properties":{"a":{"$ref":"#"}}}`,
		`{"$ref":"#/nowhere"}`, `{"$ref":"http://x"}`, `{"type":7}`, `[]`, `"x"`,
	} {
		n := instancer{budget: maxSchemaBytes}
		if instance := n.instance(gjson.Parse(schema)); !json.Valid([]byte(instance)) {
			t.Errorf("%s: %s", schema, instance)
		}
	}
}

// A small request must not buy a lot of work: the first of these took a second, for
// each tool call, when only the depth had a bound.
func TestInstanceOfCostlySchema(t *testing.T) {
	slow := `{"type":"array","minItems":64,"x":"` + strings.Repeat("y", 100_000) + `","items":{"$ref":"#"}}`
	n := instancer{budget: maxSchemaBytes}
	n.instance(gjson.Parse(slow))
	if n.budget < -len(slow)-64 {
		t.Errorf("%d bytes of schema were read, the bound is %d", maxSchemaBytes-n.budget, maxSchemaBytes)
	}
	n = instancer{budget: maxSchemaBytes}
	long := n.instance(gjson.Parse(`{"type":"array","minItems":64,"items":{"type":"array","minItems":64,"items":{"type":"string","minLength":4096}}}`))
	if len(long) > 100_000 || !json.Valid([]byte(long)) {
		t.Errorf("the instance has %d bytes", len(long))
	}
}

// FuzzParseRequest looks for a request that can't be planned.
func FuzzParseRequest(f *testing.F) {
	for _, seed := range []string{
		ask(""), `{`, `{"messages":[1,{"content":[2,{"type":"image_url","image_url":{}}]}]}`,
		ask(`"tools":[{"function":{"name":"f","parameters":{"type":"object","required":[1]}}}],"tool_choice":"required","demo":{"tokens":3,"tool_calls":2}`),
		ask(`"response_format":{"type":"json_schema","json_schema":{"schema":{"type":"array","items":{},"minItems":2}}},"n":2,"seed":-1`),
		`{"model":"demo","messages":[{"role":"user","content":"é"},{"role":"assistant","content":"This"}],"max_tokens":3}`,
	} {
		f.Add(seed)
	}
	info := DefaultModel()
	f.Fuzz(func(t *testing.T, body string) {
		q, err := parseRequest([]byte(body))
		if err != nil {
			return
		}
		faults := NoFaults()
		if q.demo.Exists() && faults.overlay([]byte(q.demo.Raw)) != nil || q.check(&info) != nil {
			return
		}
		p, err := plan(q, &faults, &info)
		if err != nil {
			return
		}
		if p.start < 0 || p.start > p.end {
			t.Fatalf("%q: from %d to %d", body, p.start, p.end)
		}
		r := &run{q: q, f: &faults, p: p}
		for pos := p.start; pos < p.end; {
			next := p.stretch(pos, max(1, faults.TokensPerChunk))
			if next <= pos {
				t.Fatalf("%q: stuck at %d", body, pos)
			}
			if b := r.appendChunk([]byte(`{"choices":[`), pos, next, 0); !json.Valid(b) {
				t.Fatalf("%q: chunk %s", body, b)
			}
			pos = next
		}
	})
}
