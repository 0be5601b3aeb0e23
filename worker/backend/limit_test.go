package backend

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/tidwall/gjson"

	"github.com/ownllm/ownllm/schemas"
)

func TestRequestBodyWithALimit(t *testing.T) {
	tests := []struct {
		name     string
		kind     Kind
		most     int64
		in, want string
	}{
		{"none", VLLM, 0, `{"model":"m","max_tokens":50}`, `{"model":"up","max_tokens":50}`},
		{"the client says nothing", VLLM, 10, `{"model":"m"}`, `{"max_tokens":10,"model":"up"}`},
		{"null says nothing", VLLM, 10, `{"model":"m","max_completion_tokens":null}`, `{"max_tokens":10,"model":"up","max_completion_tokens":null}`},
		{"null says nothing, by the old name", OpenAI, 10, `{"model":"m","max_tokens":null}`, `{"model":"up","max_tokens":10}`},
		{"the client says less", OpenAI, 10, `{"model":"m","max_tokens":9}`, `{"model":"up","max_tokens":9}`},
		{"the client says as much", Demo, 10, `{"model":"m","max_completion_tokens":10}`, `{"model":"up","max_completion_tokens":10}`},
		{"the client says more", OpenAI, 10, `{"model":"m","max_tokens":11}`, `{"model":"up","max_tokens":10}`},
		{"more by the newer name", VLLM, 10, `{"model":"m","max_completion_tokens":2000000000000}`, `{"model":"up","max_completion_tokens":10}`},
		{"both", VLLM, 10, `{"model":"m","max_tokens":12,"max_completion_tokens":4}`, `{"model":"up","max_tokens":10,"max_completion_tokens":4}`},
		{"what isn't a count", VLLM, 10, `{"model":"m","max_tokens":1e9}`, `{"model":"up","max_tokens":10}`},
		{"several choices", VLLM, 10, `{"model":"m","n":3}`, `{"max_tokens":3,"model":"up","n":3}`},
		{"more choices than tokens", VLLM, 2, `{"model":"m","n":3}`, `{"max_tokens":1,"model":"up","n":3}`},
		{"choices null", VLLM, 10, `{"model":"m","n":null}`, `{"max_tokens":10,"model":"up","n":null}`},
		{"Ollama: nothing", Ollama, 10, `{"model":"m"}`, `{"max_tokens":10,"model":"up"}`},
		{"Ollama: more by the newer name", Ollama, 10, `{"model":"m","max_completion_tokens":50}`, `{"model":"up","max_tokens":10}`},
		{"Ollama: less by the newer name", Ollama, 10, `{"model":"m","max_completion_tokens":5}`, `{"model":"up","max_tokens":5}`},
		{"Ollama: the newer name wins", Ollama, 10, `{"max_tokens":5,"model":"m","max_completion_tokens":50}`, `{"max_tokens":10,"model":"up","max_completion_tokens":10}`},
		{"Ollama: the same twice", Ollama, 10, `{"max_tokens":50,"model":"m","max_completion_tokens":50}`, `{"max_tokens":10,"model":"up","max_completion_tokens":10}`},
		{"llama.cpp: by the name that all builds know", LlamaCPP, 10, `{"model":"m","max_completion_tokens":50}`, `{"max_tokens":10,"model":"up","max_completion_tokens":10}`},
		{"llama.cpp: the name of its own", LlamaCPP, 10, `{"model":"m","n_predict":-1,"max_tokens":9}`, `{"model":"up","n_predict":10,"max_tokens":9}`},
		{"which means nothing to others", VLLM, 10, `{"model":"m","n_predict":-1,"max_tokens":9}`, `{"model":"up","n_predict":-1,"max_tokens":9}`},
		{"only top-level keys count", VLLM, 10, `{"model":"m","metadata":{"max_tokens":50,"n":4}}`, `{"max_tokens":10,"model":"up","metadata":{"max_tokens":50,"n":4}}`},
	}
	// A limit that the window keeps by itself isn't sent to a server that would refuse it.
	for kind, want := range map[Kind]string{VLLM: `{"model":"up"}`, Demo: `{"model":"up"}`, Ollama: `{"max_tokens":100,"model":"up"}`} {
		got, bounded, err := kind.requestBody(&Call{Body: []byte(`{"model":"m"}`)}, "up", 100, 100)
		if err != nil || string(got) != want || bounded != (kind == Ollama) {
			t.Errorf("%s with a limit as large as its window: %s, %t, %v", kind, got, bounded, err)
		}
		if got, bounded, err := kind.requestBody(&Call{Body: []byte(`{"model":"m"}`)}, "up", 99, 100); err != nil || !bounded {
			t.Errorf("%s with a limit below its window: %s, %t, %v", kind, got, bounded, err)
		}
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, bounded, err := tt.kind.requestBody(&Call{Body: []byte(tt.in)}, "up", tt.most, 0)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, string(got)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			plain, _, err := tt.kind.requestBody(&Call{Body: []byte(tt.in)}, "up", 0, 0)
			if err != nil {
				t.Fatal(err)
			}
			if bounded != (string(plain) != string(got)) {
				t.Errorf("bounded: %t", bounded)
			}
		})
	}
}

func FuzzRequestBodyWithALimit(f *testing.F) {
	f.Add([]byte(`{"model":"m","max_tokens":9,"n":2,"max_completion_tokens":4,"n_predict":-1}`), int64(5))
	f.Add([]byte(`{"max_tokens":null,"max\u005ftokens":1e99,"n":[]}`), int64(1))
	f.Fuzz(func(t *testing.T, in []byte, most int64) {
		if most < 1 || !json.Valid(in) {
			return
		}
		for _, kind := range []Kind{Ollama, VLLM, LlamaCPP, OpenAI} {
			out, _, err := kind.requestBody(&Call{Body: in}, "up", most, 0)
			if err != nil {
				return
			}
			var members map[string]json.RawMessage
			if err := json.Unmarshal(out, &members); err != nil {
				t.Fatalf("%q became %q: %v", in, out, err)
			}
			known := false
			for _, name := range []string{"max_tokens", "max_completion_tokens"} {
				raw := members[name]
				if len(raw) == 0 || string(raw) == "null" {
					continue
				}
				known = true
				var n int64
				if err := json.Unmarshal(raw, &n); err != nil || n > most {
					t.Fatalf("%s: %q became %q: %v", kind, in, out, err)
				}
			}
			if !known {
				t.Fatalf("%s: %q became %q, without a limit", kind, in, out)
			}
		}
	})
}

// vLLM refuses to be allowed more than its window has left; then the window is the bound.
func TestLimitThatIsLargerThanTheWindow(t *testing.T) {
	refusal := says(400, `{"error":{"message":"'max_tokens' or 'max_completion_tokens' is too large: 900. This model's maximum context length is 1000 tokens and your request has 200 input tokens (900 > 1000 - 200).","type":"BadRequestError","param":"max_tokens","code":400}}`)
	reply := says(200, `{"choices":[{"index":0,"message":{"role":"assistant","content":"hi"},"finish_reason":"stop"}],"usage":{"prompt_tokens":200,"completion_tokens":2}}`)
	const route = "POST /v1/chat/completions"
	for _, tt := range []struct {
		name, body string
		asked      int
		code       schemas.Code
	}{
		{"it is ours", `{"model":"base"}`, 2, ""},
		{"it is the client's", `{"model":"base","max_tokens":900}`, 1, schemas.CodeContextLengthExceeded},
		{"the client's is larger still", `{"model":"base","max_tokens":901}`, 2, schemas.CodeContextLengthExceeded},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newVLLM(t)
			b := probe(t, Config{URL: f.URL})
			f.set(route, func(w http.ResponseWriter, r *http.Request) {
				if gjson.Get(f.last(route), "max_tokens").Exists() {
					refusal(w, r)
				} else {
					reply(w, r)
				}
			})
			before := f.count(route)
			r, err := b.Chat(t.Context(), &Call{Model: "base", Body: []byte(tt.body), MaxTokens: 900})
			if n := f.count(route) - before; n != tt.asked {
				t.Errorf("the server was asked %d times, want %d", n, tt.asked)
			}
			if tt.code != "" {
				var e *schemas.Error
				if !errors.As(err, &e) || e.Code != tt.code {
					t.Errorf("%v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if _, err := r.Body(); err != nil {
				t.Error(err)
			}
		})
	}
}

// bounded is a stream of which so many tokens are allowed.
func bounded(t *testing.T, b *Backend, c *Call, allowed *int64) *Reply {
	t.Helper()
	c.Allowed = func() int64 { return *allowed }
	c.Stream = true
	r, err := b.Chat(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// hold reads until the reply is held, or at its end.
func hold(t *testing.T, r *Reply) (out string, err error) {
	t.Helper()
	var buf []byte
	for {
		buf, err = r.Next(buf[:0])
		out += string(buf)
		if err != nil {
			return out, err
		}
	}
}

// llama.cpp tells its own count, since the pieces of a tool call aren't tokens; the client
// doesn't see what it hasn't asked for.
func TestAllowedByTheServersCount(t *testing.T) {
	f := newLlama(t)
	b := probe(t, Config{URL: f.URL})
	var stream strings.Builder
	for i := range 6 {
		// Two pieces for each token, of which the second has the count.
		fmt.Fprintf(&stream, "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a%d\"},\"finish_reason\":null}]}\n\n", i)
		fmt.Fprintf(&stream, "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"b%d\"},\"finish_reason\":null}],\"timings\":{\"prompt_n\":3,\"cache_n\":4,\"predicted_n\":%d}}\n\n", i, i+1)
	}
	stream.WriteString("data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}],\"timings\":{\"prompt_n\":3,\"cache_n\":4,\"predicted_n\":6}}\n\ndata: [DONE]\n\n")
	f.set("POST /v1/chat/completions", streams(stream.String()))
	allowed := int64(3)
	r := bounded(t, b, &Call{Model: "smol", Body: []byte(`{"model":"smol"}`)}, &allowed)
	if got := f.last("POST /v1/chat/completions"); !gjson.Get(got, "timings_per_token").Bool() {
		t.Errorf("the server got %s", got)
	}
	out, err := hold(t, r)
	// The first half of the fourth token looks like a part of the third.
	if !errors.Is(err, ErrHeld) || !strings.Contains(out, "a3") || strings.Contains(out, "b3") || strings.Contains(out, "timings") {
		t.Errorf("%v after\n%s", err, out)
	}
	if r.Tokens() != 3 || r.Wanted() != 4 || r.Usage() != (schemas.Usage{PromptTokens: 7, CompletionTokens: 3}) {
		t.Errorf("%d tokens, %d wanted, usage %+v", r.Tokens(), r.Wanted(), r.Usage())
	}
	if again, err := r.Next(nil); len(again) != 0 || !errors.Is(err, ErrHeld) {
		t.Errorf("again: %q, %v", again, err)
	}
	allowed = 6
	out, err = hold(t, r)
	if !errors.Is(err, io.EOF) || strings.Count(out, "timings") != 1 || !strings.HasPrefix(gjson.Get(out, "choices.0.delta.content").Str, "b3") {
		t.Errorf("%v after\n%s", err, out)
	}
	if r.Tokens() != 6 {
		t.Errorf("%d tokens", r.Tokens())
	}
}

// Timings that the client has asked for are its own.
func TestTimingsThatAreAskedFor(t *testing.T) {
	f := newLlama(t)
	b := probe(t, Config{URL: f.URL})
	f.set("POST /v1/chat/completions", streams("data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"},\"finish_reason\":null}],\"timings\":{\"predicted_n\":1}}\n\n"+
		"data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n"))
	allowed := int64(3)
	r := bounded(t, b, &Call{Model: "smol", Body: []byte(`{"model":"smol","timings_per_token":true}`)}, &allowed)
	if out, err := hold(t, r); !errors.Is(err, io.EOF) || strings.Count(out, "timings") != 1 {
		t.Errorf("%v after\n%s", err, out)
	}
	if got := f.last("POST /v1/chat/completions"); strings.Count(got, "timings_per_token") != 1 {
		t.Errorf("the server got %s", got)
	}
}

// A cut ends what the client has seen the beginning of, and nothing twice.
func TestCut(t *testing.T) {
	f := newVLLM(t)
	b := probe(t, Config{URL: f.URL})
	chunk := func(choice int, text, finish string, tokens int) string {
		return fmt.Sprintf("data: {\"choices\":[{\"index\":%d,\"delta\":{\"content\":%q},\"finish_reason\":%s}],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":%d}}\n\n", choice, text, finish, tokens)
	}
	f.set("POST /v1/chat/completions", streams(chunk(0, "a", "null", 1)+chunk(0, "b", `"stop"`, 2)+chunk(1, "c", "null", 1)+chunk(1, "d", `"stop"`, 2)+chunk(2, "e", "null", 1)))
	for _, includes := range []bool{false, true} {
		allowed := int64(3)
		r := bounded(t, b, &Call{Model: "base", Body: []byte(`{"model":"base","n":4}`), IncludeUsage: includes, Completion: "chatcmpl-1", ReplyModel: "m"}, &allowed)
		out, err := hold(t, r)
		if !errors.Is(err, ErrHeld) || strings.Count(out, "\n") != 3 {
			t.Fatalf("%v after\n%s", err, out)
		}
		usage := ""
		want := ""
		if includes {
			usage = `,"usage":null`
		}
		for i, delta := range []string{1: `{}`, 2: `{"role":"assistant","content":""}`, 3: `{"role":"assistant","content":""}`} {
			if i > 0 {
				want += fmt.Sprintf(`{"id":"chatcmpl-1","object":"chat.completion.chunk","created":0,"model":"m","choices":[{"index":%d,"delta":%s,"finish_reason":"length"}]%s}`+"\n", i, delta, usage)
			}
		}
		if includes {
			want += `{"id":"chatcmpl-1","object":"chat.completion.chunk","created":0,"model":"m","choices":[],"usage":{"prompt_tokens":9,"completion_tokens":3,"total_tokens":12}}` + "\n"
		}
		if diff := cmp.Diff(want, string(r.Cut(nil))); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		if u := r.Usage(); u != (schemas.Usage{PromptTokens: 9, CompletionTokens: 3}) {
			t.Errorf("usage %+v", u)
		}
		if out, err := r.Next(nil); len(out) != 0 || errors.Is(err, ErrHeld) || err == nil {
			t.Errorf("after the cut: %q, %v", out, err)
		}
	}
}
