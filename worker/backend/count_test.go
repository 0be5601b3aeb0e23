package backend

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/tidwall/gjson"

	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

func userBody(text string) []byte {
	b, err := json.Marshal(map[string]any{"model": "m", "messages": []any{map[string]any{"role": "user", "content": text}}})
	if err != nil {
		panic(err)
	}
	return b
}

func TestCountPrompt(t *testing.T) {
	t.Run("llama.cpp", func(t *testing.T) {
		f := newLlama(t)
		b := probe(t, Config{URL: f.URL, Models: map[string]string{"smol": "m"}})
		f.set("POST /v1/chat/completions/input_tokens", says(200, `{"object":"response.input_tokens","input_tokens":42}`))
		if n, err := b.CountPrompt(t.Context(), "m", userBody("hi")); n != 42 || err != nil {
			t.Errorf("%d, %v", n, err)
		}
		if body := f.last("POST /v1/chat/completions/input_tokens"); gjson.Get(body, "model").String() != "smol" {
			t.Errorf("asked with %s", body)
		}
	})
	t.Run("old llama.cpp", func(t *testing.T) {
		f := newLlama(t)
		b := probe(t, Config{URL: f.URL})
		f.set("POST /apply-template", says(200, `{"prompt":"<|user|>hi"}`))
		f.set("POST /tokenize", says(200, `{"tokens":[1,2,3,{"id":4,"piece":"x"}]}`))
		for range 2 {
			if n, err := b.CountPrompt(t.Context(), "m", userBody("hi")); n != 4 || err != nil {
				t.Errorf("%d, %v", n, err)
			}
		}
		if n := f.count("POST /v1/chat/completions/input_tokens"); n != 1 {
			t.Errorf("the missing route was asked for %d times", n)
		}
		if got := gjson.Get(f.last("POST /tokenize"), "content").String(); got != "<|user|>hi" {
			t.Errorf("tokenized %q", got)
		}
	})
	t.Run("vLLM", func(t *testing.T) {
		f := newVLLM(t)
		b := probe(t, Config{URL: f.URL})
		f.set("POST /tokenize", says(200, `{"count":17,"max_model_len":32768,"tokens":[1]}`))
		body := []byte(`{"model":"base","messages":[{"role":"user","content":"a"}],"tools":[{"x":1}],"temperature":1,"chat_template_kwargs":{"k":true}}`)
		if n, err := b.CountPrompt(t.Context(), "base", body); n != 17 || err != nil {
			t.Errorf("%d, %v", n, err)
		}
		want := `{"chat_template_kwargs":{"k":true},"messages":[{"role":"user","content":"a"}],"model":"base","tools":[{"x":1}]}`
		if got := f.last("POST /tokenize"); got != want {
			t.Errorf("asked with %s", got)
		}
		f.set("POST /tokenize", says(200, `{}`))
		if _, err := b.CountPrompt(t.Context(), "base", body); err == nil {
			t.Error("an answer without a count gives no error")
		}
	})
	t.Run("demo", func(t *testing.T) {
		s := httptest.NewServer(demo.New(demo.Options{}))
		defer s.Close()
		b := probe(t, Config{URL: s.URL})
		if n, err := b.CountPrompt(t.Context(), "demo", userBody("one two")); n != 5 || err != nil {
			t.Errorf("%d, %v", n, err)
		}
		body := []byte(`{"messages":[{"role":"user","content":"a"}],"demo":{"prompt_tokens":17}}`)
		if n, err := b.CountPrompt(t.Context(), "demo", body); n != 17 || err != nil {
			t.Errorf("stated: %d, %v", n, err)
		}
	})
	t.Run("unsupported", func(t *testing.T) {
		f := newOllama(t)
		b := probe(t, Config{URL: f.URL})
		if _, err := b.CountPrompt(t.Context(), "m", userBody("hi")); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("Ollama: %v", err)
		}
		b = probe(t, Config{URL: newVLLM(t).URL})
		image := []byte(`{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:x"}}]}]}`)
		if _, err := b.CountPrompt(t.Context(), "base", image); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("an image: %v", err)
		}
	})
}

func TestCheckContext(t *testing.T) {
	long := userBody(strings.Repeat("word ", 2000))
	t.Run("what fits in any case isn't counted", func(t *testing.T) {
		f := newLlama(t)
		b := probe(t, Config{URL: f.URL})
		models(t, b)
		if n, err := b.CheckContext(t.Context(), "smol", userBody(strings.Repeat("x", 2900)), false); n != 0 || err != nil {
			t.Errorf("%d, %v", n, err)
		}
		if f.count("POST /v1/chat/completions/input_tokens") != 0 {
			t.Error("it was counted")
		}
	})
	t.Run("unless it is to be", func(t *testing.T) {
		f := newLlama(t)
		b := probe(t, Config{URL: f.URL})
		short := userBody("hi")
		for _, window := range []bool{false, true} {
			if window {
				models(t, b)
			}
			f.set("POST /v1/chat/completions/input_tokens", says(200, `{"input_tokens":42}`))
			if n, err := b.CheckContext(t.Context(), "smol", short, true); n != 42 || err != nil {
				t.Errorf("window known: %t: %d, %v", window, n, err)
			}
			f.set("POST /v1/chat/completions/input_tokens", says(500, ``))
			if n, err := b.CheckContext(t.Context(), "smol", short, true); n != 0 || err != nil {
				t.Errorf("a count that fails is no error: %d, %v", n, err)
			}
		}
		image := []byte(`{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:x"}}]}]}`)
		if n, err := b.CheckContext(t.Context(), "smol", image, true); n != 0 || err != nil {
			t.Errorf("an image: %d, %v", n, err)
		}
		b = probe(t, Config{URL: newOllama(t).URL})
		if n, err := b.CheckContext(t.Context(), "llama3.2:latest", short, true); n != 0 || err != nil {
			t.Errorf("Ollama can't tell: %d, %v", n, err)
		}
	})
	t.Run("llama.cpp", func(t *testing.T) {
		f := newLlama(t)
		b := probe(t, Config{URL: f.URL, Models: map[string]string{"smol": "m"}})
		models(t, b)
		f.set("POST /v1/chat/completions/input_tokens", says(200, `{"input_tokens":4095}`))
		if n, err := b.CheckContext(t.Context(), "m", long, false); n != 4095 || err != nil {
			t.Errorf("it just fits: %d, %v", n, err)
		}
		f.set("POST /v1/chat/completions/input_tokens", says(200, `{"input_tokens":4096}`))
		n, err := b.CheckContext(t.Context(), "m", long, false)
		var e *schemas.Error
		if n != 4096 || !errors.As(err, &e) || e.Code != schemas.CodeContextLengthExceeded || e.Param != "messages" ||
			!strings.Contains(e.Message, `4096 tokens, and the context window of "m" is 4096`) {
			t.Errorf("it just doesn't: %d, %v", n, err)
		}
		f.set("POST /v1/chat/completions/input_tokens", says(500, ``))
		if n, err := b.CheckContext(t.Context(), "m", long, false); n != 0 || err != nil {
			t.Errorf("a count that fails is no verdict: %d, %v", n, err)
		}
	})
	t.Run("Ollama is told not to cut", func(t *testing.T) {
		f := newOllama(t)
		b := probe(t, Config{URL: f.URL})
		models(t, b)
		f.set("POST /api/chat", says(400, `{"error":"the input length exceeds the context length"}`))
		_, err := b.CheckContext(t.Context(), "llama3.2:latest", long, false)
		var e *schemas.Error
		if !errors.As(err, &e) || e.Code != schemas.CodeContextLengthExceeded || !strings.Contains(e.Message, `"llama3.2:latest"`) {
			t.Errorf("%v", err)
		}
		asked := gjson.Parse(f.last("POST /api/chat"))
		if asked.Get("truncate").Raw != "false" || asked.Get("stream").Raw != "false" || asked.Get("options.num_predict").Int() != 1 || asked.Get("messages.0.content").String() == "" {
			t.Errorf("asked with %.200s", asked.Raw)
		}
		f.set("POST /api/chat", says(200, `{"done":true,"prompt_eval_count":3000}`))
		if _, err := b.CheckContext(t.Context(), "llama3.2:latest", long, false); err != nil {
			t.Errorf("it fits: %v", err)
		}
		// A model whose window nobody told: the least that Ollama gives is the measure.
		before := f.count("POST /api/chat")
		if _, err := b.CheckContext(t.Context(), "nomic-embed-text:latest", userBody("short"), false); err != nil || f.count("POST /api/chat") != before {
			t.Errorf("short: %v", err)
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		f := newOllama(t)
		b := probe(t, Config{URL: f.URL})
		models(t, b)
		arrived := make(chan struct{})
		f.set("POST /api/chat", func(_ http.ResponseWriter, r *http.Request) {
			close(arrived)
			<-r.Context().Done()
		})
		ctx, cancel := context.WithCancelCause(t.Context())
		go func() {
			<-arrived
			cancel(errClientGone)
		}()
		if _, err := b.CheckContext(ctx, "llama3.2:latest", long, false); !errors.Is(err, errClientGone) {
			t.Errorf("%v", err)
		}
	})
}

func TestMostTokensIsABound(t *testing.T) {
	// The worst that a tokenizer can do is a token for each byte.
	for _, text := range []string{"", "a", strings.Repeat("🦙", 100), strings.Repeat("\n\"\\", 50), strings.Repeat("\x01", 20)} {
		if n := mostTokens(userBody(text)); n < len(text)+templateBytes {
			t.Errorf("%q: %d", text, n)
		}
	}
	with := []byte(`{"messages":[],"tools":[{"type":"function"}]}`)
	without := []byte(`{"messages":[]}`)
	if mostTokens(with) <= mostTokens(without)+templateBytes {
		t.Error("tools cost nothing")
	}
	for _, body := range []string{
		`{"messages":[]}`, `{"messages":[` + strings.Repeat("{},", 500) + `{}]}`, `{"messages":[` + strings.Repeat("1,", 500) + `1]}`,
		`{"messages":[],"tools":[` + strings.Repeat("1,", 500) + `1],"functions":[` + strings.Repeat("1,", 500) + `1]}`, string(with),
	} {
		if most := mostTokens([]byte(body)); most > mostTokensOf(len(body)) {
			t.Errorf("%.60s, of %d bytes: %d tokens, and %d at the most", body, len(body), most, mostTokensOf(len(body)))
		}
	}
}

func TestHasMedia(t *testing.T) {
	for body, want := range map[string]bool{
		`{}`: false,
		`{"messages":[{"role":"user","content":"\"image_url\""}],"tools":[{"enum":["image_url","file"]}]}`:                     false,
		`{"messages":[{"content":[{"type":"text","text":"a"},{"type":"refusal"}]}]}`:                                           false,
		`{"messages":[{"content":"a"},{"content":[{"type":"text","text":"a"},{"type":"image_url","image_url":{"url":"x"}}]}]}`: true,
		`{"messages":[{"content":[{"type":"input_audio"}]},{"content":"a"}]}`:                                                  true,
	} {
		if got := hasMedia([]byte(body)); got != want {
			t.Errorf("%s: %v", body, got)
		}
	}
}

func TestOllamaMessages(t *testing.T) {
	in := `[{"role":"system","content":"s"},
		{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]},
		{"role":"assistant","content":null,"tool_calls":[{"id":"c1","type":"function","function":{"name":"f","arguments":"{\"x\": 1}"}}]},
		{"role":"tool","tool_call_id":"c1","content":"r"},
		{"role":"tool","name":"g","content":"r2"}]`
	got, err := json.Marshal(ollamaMessages(gjson.Parse(in)))
	if err != nil {
		t.Fatal(err)
	}
	want := `[{"role":"system","content":"s"},{"role":"user","content":"a"},{"role":"user","content":"b"},` +
		`{"role":"assistant","content":"","tool_calls":[{"function":{"name":"f","arguments":{"x":1}}}]},` +
		`{"role":"tool","content":"r","tool_name":"f"},{"role":"tool","content":"r2","tool_name":"g"}]`
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
