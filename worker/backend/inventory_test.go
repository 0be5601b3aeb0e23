package backend

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ownllm/ownllm/schemas"
)

func capable(names ...string) schemas.Capabilities {
	b := Backend{config: Config{Capabilities: map[string][]string{"m": names}}}
	return b.stated(schemas.Capabilities{}, "m", "m")
}

func TestOllamaInventory(t *testing.T) {
	f := newOllama(t)
	b := probe(t, Config{URL: f.URL})
	want := []schemas.Model{
		{ID: "llama3.2:latest", Capabilities: capable("completion", "tools", "vision"), ContextWindow: 8192, SizeMB: 2020, RuntimeProfile: "auto", Created: 1790841600, State: schemas.ModelCold, LoadMS: 7000, Backend: "ollama", Slots: 4},
		{ID: "nomic-embed-text:latest", Capabilities: capable("embedding"), SizeMB: 275, RuntimeProfile: "auto", Created: 1788256800, State: schemas.ModelCold, LoadMS: 3000, Backend: "ollama", Slots: 4},
		{ID: "qwen/qwen2.5:32b", Capabilities: capable("completion", "tools", "thinking"), SizeMB: 19852, RuntimeProfile: "auto", Created: 1788343200, State: schemas.ModelCold, LoadMS: 42000, Backend: "ollama", Slots: 4},
	}
	for range 3 {
		got, err := b.Models(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("(-want +got):\n%s", diff)
		}
	}
	if n := f.count("POST /api/show"); n != 3 {
		t.Errorf("asked %d times about 3 models", n)
	}

	// Loaded: the window is the one that Ollama gave it, and is remembered later on.
	f.set("GET /api/ps", says(200, `{"models":[{"name":"qwen/qwen2.5:32b","model":"qwen/qwen2.5:32b","context_length":16384}]}`))
	if m := models(t, b)["qwen/qwen2.5:32b"]; m.State != schemas.ModelReady || m.ContextWindow != 16384 || m.LoadMS != 0 {
		t.Errorf("loaded: %+v", m)
	}
	f.set("GET /api/ps", says(200, `{"models":[]}`))
	if m := models(t, b)["qwen/qwen2.5:32b"]; m.State != schemas.ModelCold || m.ContextWindow != 16384 {
		t.Errorf("unloaded: %+v", m)
	}

	// Pulled anew: another digest, so it is asked about again.
	f.set("GET /api/tags", says(200, "%s", strings.ReplaceAll(ollamaTagsJSON, "a80c", "ffff")))
	models(t, b)
	if n := f.count("POST /api/show"); n != 4 {
		t.Errorf("%d questions after one digest changed, want 4", n)
	}
}

func TestAliasesAndCapabilities(t *testing.T) {
	f := newOllama(t)
	b := probe(t, Config{
		URL:   f.URL,
		Slots: 2,
		// Without its tag, as people write it; and one that isn't there.
		Models:       map[string]string{"llama3.2": "small", "qwen/qwen2.5:32b": "qwen/qwen2.5:32b", "absent": "absent"},
		Capabilities: map[string][]string{"small": {"thinking"}, "qwen/qwen2.5:32b": {"embedding"}},
	})
	got := models(t, b)
	if len(got) != 2 {
		t.Fatalf("offers %v", got)
	}
	if m := got["small"]; m.Capabilities != capable("completion", "tools", "vision", "thinking") || m.Slots != 2 {
		t.Errorf("small: %+v", m)
	}
	if m := got["qwen/qwen2.5:32b"]; m.Capabilities != capable("tools", "thinking", "embedding") {
		t.Errorf("qwen: %+v", m)
	}
	if n := f.count("POST /api/show"); n != 2 {
		t.Errorf("asked about %d models, 2 are offered", n)
	}
	var e *schemas.Error
	if _, err := b.Chat(t.Context(), &Call{Model: "nomic-embed-text:latest", Body: []byte(`{}`)}); !errors.As(err, &e) || e.Code != schemas.CodeModelNotFound {
		t.Errorf("a model that isn't listed: %v", err)
	}
	if id, err := b.resolve("small"); err != nil || id != "llama3.2" {
		t.Errorf("small is %q, %v", id, err)
	}
}

func TestLlamaInventory(t *testing.T) {
	f := newLlama(t)
	f.set("GET /props", says(503, llamaLoading))
	f.set("GET /v1/models", says(503, llamaLoading))
	b := probe(t, Config{URL: f.URL})
	if got := models(t, b); len(got) != 0 {
		t.Errorf("an unknown model is offered: %v", got)
	}
	if b.Slots() != 1 {
		t.Errorf("%d slots before the server told", b.Slots())
	}
	f.set("GET /v1/models", says(200, `{"data":[{"id":"smol","created":1,"owned_by":"llamacpp","meta":null}]}`))
	if m := models(t, b)["smol"]; m.State != schemas.ModelLoading || m.Detail == "" {
		t.Errorf("while it loads: %+v", m)
	}
	f.set("GET /props", says(200, llamaPropsJSON))
	f.set("GET /v1/models", says(200, llamaListJSON, 1700000000))
	want := schemas.Model{ID: "smol", Capabilities: capable("completion", "tools", "vision"), ContextWindow: 4096, SizeMB: 145, RuntimeProfile: "auto",
		Created: 1, State: schemas.ModelReady, Backend: "llamacpp", Slots: 4}
	if diff := cmp.Diff(want, models(t, b)["smol"]); diff != "" {
		t.Errorf("ready (-want +got):\n%s", diff)
	}
	// It is restarted with nothing to say: what is known of the model stays.
	f.set("GET /props", says(503, llamaLoading))
	f.set("GET /v1/models", says(503, llamaLoading))
	if m := models(t, b)["smol"]; m.State != schemas.ModelLoading || m.ContextWindow != 4096 || !m.Capabilities.Vision {
		t.Errorf("while it loads again: %+v", m)
	}
	f.set("GET /props", says(200, "%s", strings.Replace(llamaPropsJSON, "{", `{"is_sleeping":true,`, 1)))
	f.set("GET /v1/models", says(200, llamaListJSON, 1))
	if m := models(t, b)["smol"]; m.State != schemas.ModelCold {
		t.Errorf("asleep: %+v", m)
	}
}

func TestInventoryIsStable(t *testing.T) {
	for name, f := range map[string]*fake{"ollama": newOllama(t), "llama": newLlama(t), "vllm": newVLLM(t)} {
		b := probe(t, Config{URL: f.URL})
		first, err := b.Models(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		second, err := b.Models(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(first, second); diff != "" {
			t.Errorf("%s changes by itself:\n%s", name, diff)
		}
	}
}

const routerList = `{"object":"list","data":[
	{"id":"a","object":"model","owned_by":"llamacpp","created":1,"status":{"value":"loaded","args":["llama-server","--ctx-size","999"]}},
	{"id":"b","object":"model","owned_by":"llamacpp","created":1,"status":{"value":"unloaded","args":["llama-server","-c","2048"]},"architecture":{"input_modalities":["text","image"]}},
	{"id":"c","object":"model","owned_by":"llamacpp","created":1,"status":{"value":"loading","args":[]}},
	{"id":"d","object":"model","owned_by":"llamacpp","created":1,"status":{"value":"unloaded","failed":true,"exit_code":1}}]}`

func newRouter(t *testing.T) *fake {
	f := newFake(t, map[string]http.HandlerFunc{"GET /models": says(200, routerList)})
	f.set("GET /props", func(w http.ResponseWriter, r *http.Request) {
		switch model := r.URL.Query().Get("model"); {
		case model == "":
			says(200, `{"role":"router","default_generation_settings":{"n_ctx":0}}`)(w, r)
		case r.URL.Query().Get("autoload") != "false":
			t.Errorf("a question about %s would load it", model)
		default:
			says(200, llamaPropsJSON)(w, r)
		}
	})
	return f
}

func TestRouterInventory(t *testing.T) {
	f := newRouter(t)
	b := probe(t, Config{URL: f.URL})
	before := f.count("GET /props")
	models(t, b)
	got := models(t, b)
	for id, want := range map[string]schemas.Model{
		"a": {State: schemas.ModelReady, ContextWindow: 4096, Capabilities: capable("completion", "tools", "vision")},
		"b": {State: schemas.ModelCold, ContextWindow: 2048, Capabilities: capable("completion", "vision")},
		"c": {State: schemas.ModelLoading, Detail: "llama.cpp is loading the model.", Capabilities: capable("completion")},
		"d": {State: schemas.ModelFailed, Detail: "llama.cpp couldn't load the model (exit code 1).", Capabilities: capable("completion")},
	} {
		want.ID, want.RuntimeProfile, want.Created, want.Backend, want.Slots = id, "auto", 1, "llamacpp", routerSlots
		if diff := cmp.Diff(want, got[id]); diff != "" {
			t.Errorf("%s (-want +got):\n%s", id, diff)
		}
	}
	// Twice the router's own, once those of the model that is loaded.
	if n := f.count("GET /props") - before; n != 3 {
		t.Errorf("%d questions for properties, want 3", n)
	}

	// A router that went away may come back with other settings.
	f.set("GET /models", says(500, ``))
	if _, err := b.Models(t.Context()); err == nil {
		t.Error("a router that fails gives no error")
	}
	f.set("GET /models", says(200, routerList))
	before = f.count("GET /props")
	models(t, b)
	if n := f.count("GET /props") - before; n != 2 {
		t.Errorf("%d questions after it came back, want 2", n)
	}
}

func TestVLLMInventory(t *testing.T) {
	f := newVLLM(t)
	b := probe(t, Config{URL: f.URL})
	got := models(t, b)
	want := schemas.Model{ID: "adapter", Capabilities: capable("completion", "tools"), ContextWindow: 32768, RuntimeProfile: "auto", Created: 1732285000, State: schemas.ModelReady, Backend: "vllm", Slots: 64}
	if diff := cmp.Diff(want, got["adapter"]); diff != "" {
		t.Errorf("an adapter has the window of its parent (-want +got):\n%s", diff)
	}
	models(t, b)
	if n := f.count("POST /v1/chat/completions"); n != 1 {
		t.Errorf("tried %d times with a tool, want once", n)
	}
	var trial map[string]any
	if err := json.Unmarshal([]byte(f.last("POST /v1/chat/completions")), &trial); err != nil || trial["max_tokens"] != 1.0 || trial["tool_choice"] != "auto" {
		t.Errorf("trial %v", trial)
	}

	// Gone and back without a parser for tools.
	f.set("GET /health", says(503, ``))
	lost, err := b.Models(t.Context())
	if err == nil || len(lost) != 2 || lost[0].State != schemas.ModelFailed || lost[0].Detail == "" {
		t.Errorf("with a dead engine: %v, %+v", err, lost)
	}
	f.set("GET /health", says(200, ``))
	f.set("POST /v1/chat/completions", says(400, `{"error":{"message":"\"auto\" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set","type":"BadRequestError","param":null,"code":400}}`))
	if m := models(t, b)["base"]; m.Capabilities != capable("completion") || m.State != schemas.ModelReady {
		t.Errorf("back without tools: %+v", m)
	}
	b = probe(t, Config{URL: f.URL, Capabilities: map[string][]string{"base": {"tools", "vision"}}})
	if m := models(t, b)["base"]; m.Capabilities != capable("completion", "tools", "vision") {
		t.Errorf("stated: %+v", m)
	}
}

func TestVLLMTrialIsRepeatedWhenItTellsNothing(t *testing.T) {
	f := newVLLM(t)
	f.set("POST /v1/chat/completions", says(500, `{}`))
	b := probe(t, Config{URL: f.URL})
	if m := models(t, b)["base"]; m.Capabilities != capable("completion") {
		t.Errorf("%+v", m)
	}
	models(t, b)
	if n := f.count("POST /v1/chat/completions"); n != 1 {
		t.Errorf("%d trials within the pause", n)
	}
	b.tools.at = b.tools.at.Add(-2 * trialPause)
	f.set("POST /v1/chat/completions", says(400, `{"error":{"message":"The model does not support Chat Completions API","code":400}}`))
	if m := models(t, b)["base"]; m.Capabilities.Completion || m.Capabilities.Tools {
		t.Errorf("an embedding model: %+v", m)
	}
}

func TestDemoAndOthers(t *testing.T) {
	tests := []struct {
		name    string
		answers map[string]http.HandlerFunc
		want    schemas.Model
		slots   int
	}{
		{"demo", map[string]http.HandlerFunc{
			"GET /api/demo":  says(200, `{"demo":true}`),
			"GET /v1/models": says(200, `{"data":[{"id":"m","created":5,"capabilities":{"completion":true,"vision":false,"tools":true,"thinking":true},"context_window":8192,"size_mb":3,"state":"loading","load_ms":1500,"slots":9}]}`),
		}, schemas.Model{Capabilities: capable("completion", "tools", "thinking"), ContextWindow: 8192, SizeMB: 3, Created: 5, State: schemas.ModelLoading, LoadMS: 1500, Backend: "demo", Slots: 9}, 9},
		{"SGLang", map[string]http.HandlerFunc{
			"GET /v1/models": says(200, `{"data":[{"id":"m","created":5,"owned_by":"sglang","max_model_len":4096}]}`),
		}, schemas.Model{Capabilities: capable("completion"), ContextWindow: 4096, Created: 5, State: schemas.ModelReady, Backend: "openai", Slots: 8}, 8},
		{"LM Studio", map[string]http.HandlerFunc{
			"GET /v1/models":     says(200, `{"data":[{"id":"m","object":"model","owned_by":"organization_owner"}]}`),
			"GET /api/v0/models": says(200, `{"object":"list","data":[{"id":"m","object":"model","type":"vlm","state":"not-loaded","max_context_length":32768,"capabilities":["tool_use"]}]}`),
		}, schemas.Model{Capabilities: capable("completion", "tools", "vision"), ContextWindow: 32768, State: schemas.ModelCold, Backend: "openai", Slots: 8}, 8},
		{"LM Studio, loaded", map[string]http.HandlerFunc{
			"GET /v1/models":     says(200, `{"data":[{"id":"m"}]}`),
			"GET /api/v0/models": says(200, `{"data":[{"id":"m","type":"embeddings","state":"loaded","max_context_length":32768,"loaded_context_length":2048}]}`),
		}, schemas.Model{Capabilities: capable("embedding"), ContextWindow: 2048, State: schemas.ModelReady, Backend: "openai", Slots: 8}, 8},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := probe(t, Config{URL: newFake(t, tt.answers).URL})
			tt.want.ID, tt.want.RuntimeProfile = "m", "auto"
			models(t, b) // the number of slots is known once the list was read
			got := models(t, b)["m"]
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if b.Slots() != tt.slots {
				t.Errorf("%d slots, want %d", b.Slots(), tt.slots)
			}
		})
	}
}

func TestModelsOfALostServer(t *testing.T) {
	f := newLlama(t)
	b := probe(t, Config{URL: f.URL})
	models(t, b)
	cause := errors.New("worker stops")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	if got, err := b.Models(ctx); !errors.Is(err, cause) || got != nil {
		t.Errorf("cancelled: %v, %v", got, err)
	}
	b.Close()
	f.Close()
	got, err := b.Models(t.Context())
	if err == nil || len(got) != 1 || got[0].State != schemas.ModelFailed || !strings.Contains(got[0].Detail, "isn't answering") {
		t.Errorf("%v, %+v", err, got)
	}
	if strings.Contains(got[0].Detail, "127.0.0.1") {
		t.Errorf("the address gets out: %s", got[0].Detail)
	}
}
