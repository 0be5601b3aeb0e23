package dispatch

import (
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/ownllm/ownllm/schemas"
)

func chunkOf(choice string) string {
	return `{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[` + choice + `],"usage":null}` + "\n"
}

func TestSaid(t *testing.T) {
	content := func(s string) string {
		return chunkOf(`{"index":0,"delta":{"content":` + s + `},"finish_reason":null}`)
	}
	const role = `{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}`
	for _, test := range []struct {
		name, lines, text string
		ended, more       bool
	}{
		{name: "nothing"},
		{name: "role", lines: chunkOf(role)},
		{name: "text", lines: chunkOf(role) + content(`"Hello"`) + content(`" world"`), text: "Hello world"},
		{name: "null content", lines: chunkOf(`{"index":0,"delta":{"role":"assistant","content":null}}`)},
		{name: "escapes", lines: content(`"\"\\\/\b\f\n\r\tA\u00e9\u6771\ud83d\ude80é東🚀"`), text: "\"\\/\b\f\n\r\tAé東🚀é東🚀"},
		{name: "white space", lines: "{ \"choices\" : [ { \"delta\" : { \"content\" : \"x\" } , \"index\" : 0 } ] } \n", text: "x"},
		{name: "ended", lines: content(`"x"`) + chunkOf(`{"index":0,"delta":{},"finish_reason":"stop"}`), text: "x", ended: true},
		{name: "usage", lines: content(`"x"`) + chunkOf("") + `{"choices":null,"usage":{"prompt_tokens":1,"x":[1,-2.5e+3,true,false,null,{}]}}`, text: "x"},
		{name: "more fields", lines: chunkOf(`{"index":0,"delta":{"content":"x","reasoning_content":null,"tool_calls":[],"refusal":"","audio":{}},"logprobs":null,"stop_reason":7}`), text: "x"},

		{name: "reasoning", lines: chunkOf(`{"index":0,"delta":{"reasoning_content":"x"}}`), more: true},
		{name: "tool call", lines: content(`"x"`) + chunkOf(`{"index":0,"delta":{"tool_calls":[{"index":0}]}}`), more: true},
		{name: "refusal", lines: chunkOf(`{"index":0,"delta":{"refusal":"no"}}`), more: true},
		{name: "flag", lines: chunkOf(`{"index":0,"delta":{"x":false}}`), more: true},
		{name: "another choice", lines: chunkOf(`{"index":1,"delta":{"content":"x"}}`), more: true},
		{name: "two choices", lines: chunkOf(`{"index":0,"delta":{}},{"index":0,"delta":{}}`), more: true},
		{name: "content twice", lines: chunkOf(`{"index":0,"delta":{"content":"x","content":"y"}}`), more: true},
		{name: "delta twice", lines: chunkOf(`{"index":0,"delta":{"content":"x"},"delta":{}}`), more: true},
		{name: "escaped key", lines: chunkOf(`{"index":0,"delta":{"c\u006fntent":"x"}}`), more: true},
		{name: "content in parts", lines: content(`["x"]`), more: true},
		{name: "half a pair", lines: content(`"\ud83d"`), more: true},
		{name: "the other half", lines: content(`"\ude80"`), more: true},
		{name: "pair of one kind", lines: content(`"\ud83d\ud83d"`), more: true},
		{name: "invalid UTF-8", lines: content("\"\xff\""), more: true},
		{name: "not JSON", lines: "hello\n", more: true},
		{name: "empty line", lines: "\n", more: true},
		{name: "cut", lines: content(`"x"`)[:60], more: true},
		{name: "two values", lines: `{"choices":[]}{}`, more: true},
		{name: "trailing comma", lines: `{"choices":[],}`, more: true},
		{name: "index 00", lines: chunkOf(`{"index":00,"delta":{}}`), more: true},
		{name: "too deep", lines: `{"x":` + strings.Repeat("[", 200) + strings.Repeat("]", 200) + `}`, more: true},
		{name: "longest", lines: content(`"` + strings.Repeat("x", schemas.MaxContinued) + `"`), text: strings.Repeat("x", schemas.MaxContinued)},
		{name: "too long", lines: content(`"`+strings.Repeat("x", schemas.MaxContinued)+`"`) + content(`"x"`), more: true},
	} {
		var s said
		s.take([]byte(test.lines))
		if s.more != test.more || string(s.text) != test.text || !test.more && s.ended != test.ended {
			t.Errorf("%s: got %.80q, ended %v, more %v", test.name, s.text, s.ended, s.more)
		}
	}
}

// FuzzSaid holds the reading against encoding/json: what it takes for text is what
// encoding/json reads, and nothing that this finds beside the text is passed over.
func FuzzSaid(f *testing.F) {
	for _, choice := range []string{
		``, `{"index":0,"delta":{"role":"assistant","content":"a\n\u00e9\ud83d\ude80"},"finish_reason":null}`,
		`{"index":0,"delta":{"content":null,"tool_calls":[]},"finish_reason":"stop","x":[1,{"y":-0.5E+7},true,false]}`,
		`{"delta":{"reasoning_content":"x"}}`, `{"index":1,"delta":{}}`, `{"delta":{"content":"\\\"\/\b"}}`,
	} {
		f.Add([]byte(chunkOf(choice)))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		if i := strings.IndexByte(string(line), '\n'); i >= 0 {
			line = line[:i]
		}
		var s said
		s.line(line)
		if s.more {
			return
		}
		var chunk struct{ Choices []map[string]json.RawMessage }
		var top map[string]json.RawMessage
		if err := json.Unmarshal(line, &top); err != nil {
			t.Fatalf("%q was taken: %v", line, err)
		}
		if raw, ok := top["choices"]; ok {
			if err := json.Unmarshal(raw, &chunk.Choices); err != nil {
				t.Fatalf("%q was taken: %v", line, err)
			}
		}
		text, ended := "", false
		for i, choice := range chunk.Choices {
			if index := string(choice["index"]); i > 0 || index != "" && index != "0" {
				t.Fatalf("%q was taken", line)
			}
			var delta map[string]any
			if raw, ok := choice["delta"]; ok {
				if err := json.Unmarshal(raw, &delta); err != nil {
					t.Fatalf("%q was taken: %v", line, err)
				}
			}
			for key, value := range delta {
				switch v := value.(type) {
				case string:
					if key == "content" {
						text = v
					} else if v != "" && key != "role" {
						t.Fatalf("%q was taken", line)
					}
				case nil:
				case []any:
					if key == "content" || len(v) > 0 && key != "role" {
						t.Fatalf("%q was taken", line)
					}
				case map[string]any:
					if key == "content" || len(v) > 0 && key != "role" {
						t.Fatalf("%q was taken", line)
					}
				default:
					if key != "role" {
						t.Fatalf("%q was taken", line)
					}
				}
			}
			var finish *string
			if raw, ok := choice["finish_reason"]; ok {
				if err := json.Unmarshal(raw, &finish); err != nil {
					t.Fatalf("%q was taken: %v", line, err)
				}
			}
			ended = finish != nil && *finish != ""
		}
		if string(s.text) != text || s.ended != ended || !utf8.Valid(s.text) {
			t.Fatalf("%q: got %q, %v, want %q, %v", line, s.text, s.ended, text, ended)
		}
	})
}

// FuzzSaidAgain shows that a line says the same whether it is known by its likeness to the last
// one or walked over.
func FuzzSaidAgain(f *testing.F) {
	like := func(text string) string {
		return chunkOf(`{"index":0,"delta":{"content":"` + text + `"},"finish_reason":null}`)
	}
	f.Add([]byte(like("a") + like("é") + like("") + like(`\n`) + like("b") + like("\xff")))
	f.Add([]byte(like("a") + like(`x","content":"y`) + like("a")))
	f.Add([]byte(like("a") + like(`a"}]}`) + like("\x01")))
	f.Add([]byte(like("a") + chunkOf(`{"index":0,"delta":{"content":"a"},"finish_reason":"stop"}`) + like("c")))
	f.Add([]byte(`{"choices":[{"delta":{"content":"` + "\n"))
	f.Fuzz(func(t *testing.T, lines []byte) {
		var fast, slow said
		for line := range strings.Lines(string(lines)) {
			slow.before = nil
			slow.take([]byte(line))
			fast.take([]byte(line))
			if string(fast.text) != string(slow.text) || fast.ended != slow.ended || fast.more != slow.more {
				t.Fatalf("%q: got %q, %v, %v, want %q, %v, %v", line, fast.text, fast.ended, fast.more, slow.text, slow.ended, slow.more)
			}
		}
	})
}

func BenchmarkSaid(b *testing.B) {
	line := []byte(chunkOf(`{"index":0,"delta":{"content":" token"},"finish_reason":null}`))
	s := said{text: make([]byte, 0, schemas.MaxContinued)}
	b.ReportAllocs()
	for b.Loop() {
		s.text = s.text[:0]
		s.take(line)
	}
}
