package backend

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func testCall(stream, includeUsage bool) *Call {
	return &Call{
		Model: "m", Stream: stream, IncludeUsage: includeUsage,
		Completion: "chatcmpl-1", Created: 7, ReplyModel: `al"ias`,
	}
}

const head = `{"id":"chatcmpl-1","object":"chat.completion.chunk","created":7,"model":"al\"ias"`

func TestChunk(t *testing.T) {
	const role = `{"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}`
	tests := []struct {
		name  string
		usage bool
		in    []string
		want  []string // the lines, without the head; "" for nothing
		count int
	}{
		{
			name: "ids are ours, all else stays as it was",
			in: []string{`{"id":"chatcmpl-99","object":"chat.completion.chunk","created":1714500000,"model":"up","system_fingerprint":"fp_1","service_tier":"x",` +
				`"choices":[{"index":0,"delta":{"role":"assistant","content":"a\u00e9\"b"},"logprobs":{"content":[{"token":"a","logprob":-0.10}]},"finish_reason":null}],"extra":{"n":1.50e+2}}`},
			want: []string{`,"system_fingerprint":"fp_1","service_tier":"x",` +
				`"choices":[{"index":0,"delta":{"role":"assistant","content":"a\u00e9\"b"},"logprobs":{"content":[{"token":"a","logprob":-0.10}]},"finish_reason":null}],"extra":{"n":1.50e+2}}`},
			count: 1,
		}, {
			name:  "a role is added to the first delta of each choice",
			in:    []string{`{"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null}]}`, `{"choices":[{"index":1,"delta":{},"finish_reason":null}]}`},
			want:  []string{`,"choices":[{"index":0,"delta":{"role":"assistant","content":"x"},"finish_reason":null}]}`, `,"choices":[{"index":1,"delta":{"role":"assistant"},"finish_reason":null}]}`},
			count: 1,
		}, {
			name:  "a role is dropped from later deltas, as Ollama repeats it",
			in:    []string{role, `{"choices":[{"index":0,"delta":{"role":"assistant","content":"x"},"finish_reason":null}]}`},
			want:  []string{`,"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}`, `,"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null}]}`},
			count: 1,
		}, {
			name: "a null role is replaced",
			in:   []string{`{"choices":[{"index":0,"delta":{"role":null,"content":null},"finish_reason":null}]}`},
			want: []string{`,"choices":[{"index":0,"delta":{"role":"assistant","content":null},"finish_reason":null}]}`},
		}, {
			name: "reasoning has one name",
			in: []string{
				role,
				`{"choices":[{"index":0,"delta":{"reasoning":"r"},"finish_reason":null}]}`,
				`{"choices":[{"index":0,"delta":{"thinking":"t"},"finish_reason":null}]}`,
				`{"choices":[{"index":0,"delta":{"reasoning_content":"same","reasoning":"other"},"finish_reason":null}]}`,
				`{"choices":[{"index":0,"delta":{"reasoning_content":null,"reasoning":"r"},"finish_reason":null}]}`,
				`{"choices":[{"index":0,"delta":{"content":"c","reasoning":null},"finish_reason":null}]}`,
				`{"choices":[{"index":0,"delta":{"reasoning":{"effort":"high"}},"finish_reason":null}]}`,
			},
			want: []string{
				`,"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}`,
				`,"choices":[{"index":0,"delta":{"reasoning_content":"r"},"finish_reason":null}]}`,
				`,"choices":[{"index":0,"delta":{"reasoning_content":"t"},"finish_reason":null}]}`,
				`,"choices":[{"index":0,"delta":{"reasoning_content":"same"},"finish_reason":null}]}`,
				`,"choices":[{"index":0,"delta":{"reasoning_content":"r"},"finish_reason":null}]}`,
				`,"choices":[{"index":0,"delta":{"content":"c","reasoning_content":null},"finish_reason":null}]}`,
				`,"choices":[{"index":0,"delta":{"reasoning":{"effort":"high"}},"finish_reason":null}]}`,
			},
			count: 6,
		}, {
			name: "an empty error goes, and keys in disguise are known",
			in:   []string{`{"error":null,"\u0069d":"theirs","choices":[{"index":0,"delta":{"role":"assistant"},"finish_reason":null}]}`, `{"choices":[],"error":{}}`},
			want: []string{`,"choices":[{"index":0,"delta":{"role":"assistant"},"finish_reason":null}]}`, `,"choices":[]}`},
		}, {
			name: "what a choice lacks is added",
			in:   []string{`{"choices":[{},{"delta":null,"finish_reason":""}]}`},
			want: []string{`,"choices":[{"index":0,"delta":{"role":"assistant"},"finish_reason":null},{"delta":{"role":"assistant"},"finish_reason":null,"index":1}]}`},
		}, {
			name: "white space becomes one line",
			in:   []string{"{\r\n \"choices\" : [ {\"index\":0,\n\"delta\":{\"role\":\"assistant\"} , \"finish_reason\":null}\n],\n\"x\":\n1}\n"},
			want: []string{`,"choices":[{"index":0, "delta":{"role":"assistant"} , "finish_reason":null}],"x": 1}`},
		}, {
			name: "usage is stripped",
			in:   []string{role, `{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":5}}`, `{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"usage":null}`},
			want: []string{`,"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}`, "", `,"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}`},
			// The figure is the backend's.
			count: 5,
		}, {
			name:  "usage is null until the last chunk",
			usage: true,
			in:    []string{role, `{"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"completion_tokens":2}}`},
			want:  []string{`,"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}],"usage":null}`, `,"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":"stop"}],"usage":null}`},
			count: 2,
		}, {
			name:  "tool calls, refusals and audio are output too",
			in:    []string{`{"choices":[{"index":0,"delta":{"role":"assistant","content":null,"tool_calls":[{"index":0,"id":"c","type":"function","function":{"name":"f","arguments":""}}]},"finish_reason":null}]}`, `{"choices":[{"index":0,"delta":{"refusal":"no"},"finish_reason":null}]}`},
			want:  []string{`,"choices":[{"index":0,"delta":{"role":"assistant","content":null,"tool_calls":[{"index":0,"id":"c","type":"function","function":{"name":"f","arguments":""}}]},"finish_reason":null}]}`, `,"choices":[{"index":0,"delta":{"refusal":"no"},"finish_reason":null}]}`},
			count: 2,
		}, {
			name:  "continuous usage is per choice",
			in:    []string{`{"choices":[{"index":0,"delta":{"role":"assistant","content":"abc"},"finish_reason":null}],"usage":{"prompt_tokens":9,"completion_tokens":3}}`, `{"choices":[{"index":1,"delta":{"role":"assistant","content":"de"},"finish_reason":null}],"usage":{"prompt_tokens":9,"completion_tokens":2}}`},
			want:  []string{`,"choices":[{"index":0,"delta":{"role":"assistant","content":"abc"},"finish_reason":null}]}`, `,"choices":[{"index":1,"delta":{"role":"assistant","content":"de"},"finish_reason":null}]}`},
			count: 5,
		}, {
			name:  "llama.cpp's timings tell the tokens",
			in:    []string{`{"choices":[{"index":0,"delta":{"role":"assistant"},"finish_reason":"stop"}],"timings":{"cache_n":4,"prompt_n":6,"predicted_n":8,"predicted_ms":1.5}}`},
			want:  []string{`,"choices":[{"index":0,"delta":{"role":"assistant"},"finish_reason":"stop"}],"timings":{"cache_n":4,"prompt_n":6,"predicted_n":8,"predicted_ms":1.5}}`},
			count: 8,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var w rewriter
			w.reset(VLLM, testCall(true, tt.usage))
			for i, in := range tt.in {
				got, err := w.chunk([]byte("before\n"), []byte(in))
				if err != nil {
					t.Fatalf("chunk %d: %v", i, err)
				}
				want := "before\n"
				if tt.want[i] != "" {
					want += head + tt.want[i] + "\n"
				}
				if diff := cmp.Diff(want, string(got)); diff != "" {
					t.Errorf("chunk %d (-want +got):\n%s", i, diff)
				}
			}
			if got := w.tokens(); got != tt.count {
				t.Errorf("tokens %d, want %d", got, tt.count)
			}
		})
	}
}

func TestChunkRefuses(t *testing.T) {
	tests := []struct {
		in   string
		want error
	}{
		{``, errNotJSON},
		{`{"choices":[`, errNotJSON},
		{`{"choices":[]} x`, errNotJSON},
		{`{"choices":[],}`, errNotJSON},
		{`{"choices":[{"index":0,"delta":{"content":"` + "\n" + `"}}]}`, errNotReply},
		{`{"choices":[],"x":01}`, errNotJSON},
		{`{"choices":[],"x":"\q"}`, errNotJSON},
		{`{"choices":[],"x":` + strings.Repeat("[", maxDepth+2) + strings.Repeat("]", maxDepth+2) + `}`, errNotJSON},
		{`[]`, errNotJSON},
		{`"text"`, errNotJSON},
		{`{}`, errNotReply},
		{`{"type":"ping"}`, errNotReply},
		{`{"choices":{}}`, errNotReply},
		{`{"choices":["x"]}`, errNotReply},
		{`{"choices":[{"index":-1}]}`, errNotReply},
		{`{"choices":[{"index":99999}]}`, errNotReply},
		{`{"choices":[{"index":0,"delta":"x"}]}`, errNotReply},
	}
	for _, tt := range tests {
		var w rewriter
		w.reset(VLLM, testCall(true, false))
		got, err := w.chunk([]byte("dst"), []byte(tt.in))
		if !errors.Is(err, tt.want) || string(got) != "dst" {
			t.Errorf("%.60s: %q, %v, want %v and dst untouched", tt.in, got, err, tt.want)
		}
	}
}

func TestUsageChunk(t *testing.T) {
	const first = `{"choices":[{"index":0,"delta":{"role":"assistant","content":"a"},"finish_reason":null}]}`
	const stop = `{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}`
	tests := []struct {
		name string
		in   []string
		want string
	}{
		{"the backend's own, with all that it says", []string{first, stop, `{"id":"x","choices":[],"system_fingerprint":"f","usage":{"prompt_tokens":4,"completion_tokens":6,"prompt_tokens_details":{"cached_tokens":1}}}`},
			`,"choices":[],"system_fingerprint":"f","usage":{"prompt_tokens":4,"completion_tokens":6,"prompt_tokens_details":{"cached_tokens":1}}}`},
		{"once, though it came twice", []string{first, stop, `{"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":6}}`, `{"usage":{"prompt_tokens":4,"completion_tokens":7}}`},
			`,"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":7}}`},
		{"it came with the last text", []string{first, `{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"usage":{"prompt_tokens":4,"completion_tokens":6,"x":1}}`},
			`,"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":6,"x":1}}`},
		{"it never came", []string{first, stop, `{"choices":[],"usage":null}`, `{"choices":[],"usage":{}}`},
			`,"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":1,"total_tokens":12}}`},
		{"it came per choice", []string{
			`{"choices":[{"index":0,"delta":{"role":"assistant"},"finish_reason":"stop"}],"usage":{"prompt_tokens":4,"completion_tokens":6}}`,
			`{"choices":[{"index":1,"delta":{"role":"assistant"},"finish_reason":"stop"}],"usage":{"prompt_tokens":4,"completion_tokens":5}}`},
			`,"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":11,"total_tokens":15}}`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var w rewriter
			w.reset(VLLM, testCall(true, true))
			for _, in := range tt.in {
				if _, err := w.chunk(nil, []byte(in)); err != nil {
					t.Fatal(err)
				}
			}
			if diff := cmp.Diff(head+tt.want+"\n", string(w.end(nil, 11))); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestWhole(t *testing.T) {
	const whole = `{"id":"chatcmpl-1","object":"chat.completion","created":7,"model":"al\"ias"`
	tests := []struct{ name, in, want string }{
		{"all fields stay", `{"id":"x","object":"chat.completion","created":1,"model":"up","choices":[{"index":0,"message":{"role":"assistant","content":"hi","annotations":[]},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3},"timings":{"x":1}}`,
			`,"choices":[{"index":0,"message":{"role":"assistant","content":"hi","annotations":[]},"logprobs":null,"finish_reason":"stop"}],"timings":{"x":1},"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}}`},
		{"reasoning is renamed", `{"choices":[{"index":0,"message":{"role":"assistant","content":"hi","reasoning":"hm"},"finish_reason":"stop"}],"usage":{"prompt_tokens":1,"completion_tokens":2}}`,
			`,"choices":[{"index":0,"message":{"role":"assistant","content":"hi","reasoning_content":"hm"},"finish_reason":"stop"}],"usage":{"prompt_tokens":1,"completion_tokens":2}}`},
		{"content may be null, but not missing", `{"choices":[{"index":0,"message":{"role":"assistant","tool_calls":[{"id":"c"}]},"finish_reason":"tool_calls"}],"usage":{"prompt_tokens":1,"completion_tokens":2}}`,
			`,"choices":[{"index":0,"message":{"role":"assistant","content":null,"tool_calls":[{"id":"c"}]},"finish_reason":"tool_calls"}],"usage":{"prompt_tokens":1,"completion_tokens":2}}`},
		{"usage is estimated where there is none", `{"choices":[{"index":0,"message":{"role":"assistant","content":"123456"},"finish_reason":"stop"}]}`,
			`,"choices":[{"index":0,"message":{"role":"assistant","content":"123456"},"finish_reason":"stop"}],"usage":{"prompt_tokens":11,"completion_tokens":2,"total_tokens":13}}`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var w rewriter
			w.reset(VLLM, testCall(false, false))
			got, err := w.whole(nil, []byte(tt.in), 11)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(whole+tt.want, string(got)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// TestPartialUsage is what llama.cpp was seen to do with n: 2.
func TestPartialUsage(t *testing.T) {
	var w rewriter
	w.reset(LlamaCPP, testCall(true, true))
	for _, in := range []string{
		`{"choices":[{"index":1,"delta":{"role":"assistant","content":"a"},"finish_reason":null}]}`,
		`{"choices":[{"index":0,"delta":{"role":"assistant","content":"b"},"finish_reason":null}]}`,
		`{"choices":[{"index":1,"delta":{},"finish_reason":"stop"}]}`,
		`{"choices":[],"usage":{"completion_tokens":3,"prompt_tokens":32,"total_tokens":35},"timings":{"predicted_n":3}}`,
		`{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}`,
		`{"choices":[],"usage":{"completion_tokens":4,"prompt_tokens":32,"total_tokens":36},"timings":{"predicted_n":4}}`,
	} {
		if _, err := w.chunk(nil, []byte(in)); err != nil {
			t.Fatal(err)
		}
	}
	want := head + `,"choices":[],"usage":{"prompt_tokens":32,"completion_tokens":7,"total_tokens":39}}` + "\n"
	if diff := cmp.Diff(want, string(w.end(nil, 0))); diff != "" || w.tokens() != 7 {
		t.Errorf("%d tokens (-want +got):\n%s", w.tokens(), diff)
	}

	w = rewriter{}
	w.reset(LlamaCPP, testCall(false, false))
	out, err := w.whole(nil, []byte(`{"choices":[{"index":0,"message":{"role":"assistant","content":"12345678901234"},"finish_reason":"stop"},`+
		`{"index":1,"message":{"role":"assistant","content":"123456"},"finish_reason":"stop"}],"usage":{"completion_tokens":10,"prompt_tokens":32,"total_tokens":42}}`), 0)
	if err != nil || w.tokens() != 15 || !strings.HasSuffix(string(out), `,"usage":{"prompt_tokens":32,"completion_tokens":15,"total_tokens":47}}`) {
		t.Errorf("%d tokens, %v: %s", w.tokens(), err, out)
	}
}

// chunkForm is what the SDKs require of a chunk.
type chunkForm struct {
	ID      string `json:"id"`
	Object  string `json:"object"`
	Created int64  `json:"created"`
	Model   string `json:"model"`
	Choices []struct {
		Index        *int                       `json:"index"`
		Delta        map[string]json.RawMessage `json:"delta"`
		FinishReason *string                    `json:"finish_reason"`
	} `json:"choices"`
}

func FuzzChunk(f *testing.F) {
	for _, s := range []string{
		`{"id":"x","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":"Hi"},"finish_reason":null}]}`,
		`{"choices":[{"index":1,"delta":{"reasoning":"r","reasoning_content":null},"finish_reason":"stop"}],"usage":{"prompt_tokens":1,"completion_tokens":2}}`,
		`{"choices":[],"usage":{"prompt_tokens":1}}`, `{"error":{"code":500}}`, `{"object":"error"}`, `{"choices":null,"usage":{}}`,
		"{\n\"choices\" : [{}],\t\"\\u0069d\":[1,{\"a\":-1.5e+3}],\"x\":\"\\ud83d\\ude00\"}",
	} {
		f.Add([]byte(s), true)
	}
	f.Fuzz(func(t *testing.T, data []byte, usage bool) {
		var w rewriter
		w.reset(VLLM, testCall(true, usage))
		out, err := w.chunk([]byte("p"), data)
		valid := json.Valid(data)
		switch {
		case err != nil:
			if string(out) != "p" {
				t.Fatalf("dst changed on error: %q", out)
			}
			return
		case !valid:
			t.Fatalf("took what isn't JSON: %q", data)
		}
		lines := append(out[1:], w.end(nil, 0)...)
		if !usage && len(out) == 1 {
			return // a usage chunk, which the client isn't to see
		}
		for line := range bytes.Lines(lines) {
			if !json.Valid(line) || bytes.ContainsAny(line[:len(line)-1], "\r\n") {
				t.Fatalf("%q became %q", data, line)
			}
			var form chunkForm
			var fields map[string]json.RawMessage
			if err := json.Unmarshal(line, &fields); err != nil {
				t.Fatal(err)
			}
			if _, ok := fields["error"]; ok {
				t.Fatalf("an error key got out: %s", line)
			}
			// Through the exact keys: encoding/json takes "ID" for "id" otherwise.
			exact, err := json.Marshal(map[string]json.RawMessage{
				"id": fields["id"], "object": fields["object"], "created": fields["created"], "model": fields["model"], "choices": fields["choices"]})
			if err != nil {
				t.Fatal(err)
			}
			_ = json.Unmarshal(exact, &form) // a choice may hold keys that differ in case only
			if form.ID != "chatcmpl-1" || form.Object != "chat.completion.chunk" || form.Created != 7 || form.Model != `al"ias` || fields["choices"][0] != '[' {
				t.Fatalf("%q became %q", data, line)
			}
		}
	})
}

func FuzzScanner(f *testing.F) {
	for _, s := range []string{`{"a":[1,-0.5e-7,true,false,null,"\u12aF\\"]}`, `[ ]`, `"`, `{"a"}`, "\"\x00\"", `-`, `1.`, `01`, ` 1 `, `{"a":1,}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		end := skipValue(data, skipSpace(data, 0), 0)
		ok := end >= 0 && skipSpace(data, end) == len(data)
		if ok != json.Valid(data) {
			t.Fatalf("%q: %v, encoding/json says %v", data, ok, !ok)
		}
	})
}

var benchChunks = map[string]string{
	"vllm":   `{"id":"chatcmpl-7d3f1c2ab5e94c0d8f6a","object":"chat.completion.chunk","created":1732285000,"model":"meta-llama/Llama-3.3-70B-Instruct","choices":[{"index":0,"delta":{"content":" world"},"logprobs":null,"finish_reason":null,"token_ids":null}],"usage":{"prompt_tokens":42,"total_tokens":59,"completion_tokens":17}}`,
	"llama":  `{"choices":[{"finish_reason":null,"index":0,"delta":{"content":" world"}}],"created":1732285000,"id":"chatcmpl-Hc8jXm1aWqvT2b","model":"model.gguf","system_fingerprint":"b7000-abcdef","object":"chat.completion.chunk"}`,
	"ollama": `{"id":"chatcmpl-123","object":"chat.completion.chunk","created":1732285000,"model":"llama3.2:latest","system_fingerprint":"fp_ollama","choices":[{"index":0,"delta":{"role":"assistant","content":" world"},"finish_reason":null}]}`,
}

func BenchmarkChunk(b *testing.B) {
	for name, in := range benchChunks {
		b.Run(name, func(b *testing.B) {
			var w rewriter
			w.reset(VLLM, testCall(true, false))
			data := []byte(in)
			var dst []byte
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				var err error
				if dst, err = w.chunk(dst[:0], data); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
