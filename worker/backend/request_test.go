package backend

import (
	"encoding/json"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ownllm/ownllm/schemas"
)

func TestRequestBody(t *testing.T) {
	tests := []struct {
		name   string
		kind   Kind
		stream bool
		in     string
		want   string
	}{
		{"the model and nothing else", VLLM, false, ` { "model" : "m" , "x": 1.50e+2, "messages":[ ] } `, ` { "model" : "up" , "x": 1.50e+2, "messages":[ ] } `},
		{"unknown fields, order, escapes and numbers stay", LlamaCPP, true,
			`{"temperature":0.70,"model":"m","chat_template_kwargs":{"b":[1, 2]},"stream":true,"stream_options":{"include_usage":true},"s":"\u00e9\/ž","big":12345678901234567890}`,
			`{"temperature":0.70,"model":"up","chat_template_kwargs":{"b":[1, 2]},"stream":true,"stream_options":{"include_usage":true},"s":"\u00e9\/ž","big":12345678901234567890}`},
		{"usage is always asked for", OpenAI, true, `{"model":"m","stream":true}`, `{"stream_options":{"include_usage":true},"model":"up","stream":true}`},
		{"and of vLLM all the time", VLLM, true, `{"model":"m","stream":true}`, `{"stream_options":{"include_usage":true,"continuous_usage_stats":true},"model":"up","stream":true}`},
		{"other stream options stay", OpenAI, true, `{"model":"m","stream":true,"stream_options":{"include_obfuscation": false,"include_usage":false}}`,
			`{"model":"up","stream":true,"stream_options":{"include_obfuscation": false,"include_usage":true}}`},
		{"empty stream options", VLLM, true, `{"model":"m","stream":true,"stream_options":{ }}`,
			`{"model":"up","stream":true,"stream_options":{"include_usage":true,"continuous_usage_stats":true }}`},
		{"null stream options", OpenAI, true, `{"model":"m","stream":true,"stream_options":null}`, `{"model":"up","stream":true,"stream_options":{"include_usage":true}}`},
		{"stream is what was asked for", OpenAI, false, `{"model":"m","stream":null}`, `{"model":"up","stream":false}`},
		{"Ollama's name of the token limit", Ollama, false, `{"model":"m", "max_completion_tokens" : 5 }`, `{"model":"up", "max_tokens" : 5 }`},
		{"null is no limit", Ollama, false, `{"model":"m","max_completion_tokens":null}`, `{"model":"up","max_completion_tokens":null}`},
		{"the newer name wins", Ollama, false, `{"max_tokens":9,"model":"m","max_completion_tokens":5}`, `{"max_tokens":5,"model":"up","max_completion_tokens":5}`},
		{"others know it", VLLM, false, `{"model":"m","max_completion_tokens":5}`, `{"model":"up","max_completion_tokens":5}`},
		{"keys in disguise, and twice", Ollama, false, `{"\u006dodel":"m","model":"n","max\u005fcompletion_tokens":5}`, `{"\u006dodel":"up","model":"up","max_tokens":5}`},
		{"only top-level keys count", Ollama, false, `{"model":"m","metadata":{"model":"m","max_completion_tokens":1}}`, `{"model":"up","metadata":{"model":"m","max_completion_tokens":1}}`},
		{"nothing at all", OpenAI, true, `{}`, `{"model":"up","stream":true,"stream_options":{"include_usage":true}}`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			in := []byte(tt.in)
			got, _, err := tt.kind.requestBody(&Call{Body: in, Stream: tt.stream}, "up", 0, 0)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, string(got)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if string(in) != tt.in {
				t.Error("the client's body was changed")
			}
		})
	}
}

func TestRequestBodyRefuses(t *testing.T) {
	for _, in := range []string{``, `[]`, `{`, `{"model":}`, `{} {}`, `null`} {
		_, _, err := VLLM.requestBody(&Call{Body: []byte(in)}, "up", 0, 0)
		if !errors.Is(err, &schemas.Error{Code: schemas.CodeInvalidJSON}) {
			t.Errorf("%q: %v", in, err)
		}
	}
}

func FuzzRequestBody(f *testing.F) {
	f.Add([]byte(`{"model":"m","stream":true,"stream_options":{"include_usage":false},"max_completion_tokens":4,"x":[1]}`))
	f.Add([]byte(` {"stream_options":3,"\u006dodel":null,"max_tokens":null} `))
	f.Fuzz(func(t *testing.T, in []byte) {
		for _, kind := range []Kind{Ollama, VLLM} {
			out, _, err := kind.requestBody(&Call{Body: in, Stream: true}, `u"p`, 0, 0)
			var before, after map[string]json.RawMessage
			isObject := json.Unmarshal(in, &before) == nil && before != nil
			if err != nil {
				if isObject {
					t.Fatalf("%q refused: %v", in, err)
				}
				return
			}
			if err := json.Unmarshal(out, &after); err != nil {
				t.Fatalf("%q became %q: %v", in, out, err)
			}
			var options map[string]any
			if err := json.Unmarshal(after["stream_options"], &options); err != nil || options["include_usage"] != true {
				t.Fatalf("%q became %q", in, out)
			}
			if string(after["model"]) != `"u\"p"` || string(after["stream"]) != "true" {
				t.Fatalf("%q became %q", in, out)
			}
			for key, value := range before {
				switch key {
				case "model", "stream", "stream_options", "max_tokens", "max_completion_tokens":
				default:
					if string(after[key]) != string(value) {
						t.Fatalf("%q: %s became %s", key, value, after[key])
					}
				}
			}
		}
	})
}
