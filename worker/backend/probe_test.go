package backend

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"time"
)

func TestProbeKinds(t *testing.T) {
	tests := []struct {
		name    string
		answers map[string]http.HandlerFunc
		want    Kind
	}{
		{"Ollama", nil, Ollama},
		{"Ollama behind a proxy", map[string]http.HandlerFunc{"GET /api/version": says(200, `{"version":"0.9"}`), "GET /api/tags": says(200, `{"models":[]}`)}, Ollama},
		{"llama.cpp", nil, LlamaCPP},
		{"llama.cpp while it loads", map[string]http.HandlerFunc{"GET /props": says(503, llamaLoading)}, LlamaCPP},
		{"llama.cpp router", map[string]http.HandlerFunc{"GET /props": says(200, `{"role":"router","default_generation_settings":{"n_ctx":0}}`)}, LlamaCPP},
		{"llama.cpp that keeps its props to itself", map[string]http.HandlerFunc{"GET /props": says(401, `{}`), "GET /v1/models": says(200, llamaListJSON, 1)}, LlamaCPP},
		{"vLLM", nil, VLLM},
		{"demo", map[string]http.HandlerFunc{"GET /api/demo": says(200, `{"demo":true}`)}, Demo},
		{"SGLang", map[string]http.HandlerFunc{"GET /v1/models": says(200, `{"object":"list","data":[{"id":"m","owned_by":"sglang","max_model_len":4096}]}`)}, OpenAI},
		{"any other", map[string]http.HandlerFunc{"GET /v1/models": says(200, `{"data":[]}`), "GET /": says(200, `"hello"`)}, OpenAI},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var f *fake
			switch {
			case tt.answers != nil:
				f = newFake(t, tt.answers)
			case tt.want == Ollama:
				f = newOllama(t)
			case tt.want == LlamaCPP:
				f = newLlama(t)
			default:
				f = newVLLM(t)
			}
			for _, suffix := range []string{"", "/", "/v1", "/v1/"} {
				b := probe(t, Config{URL: f.URL + suffix})
				if b.Kind() != tt.want || b.URL() != f.URL {
					t.Errorf("%q: %s at %s, want %s at %s", suffix, b.Kind(), b.URL(), tt.want, f.URL)
				}
			}
			b := probe(t, Config{URL: strings.TrimPrefix(f.URL, "http://")})
			if b.Kind() != tt.want {
				t.Errorf("without scheme: %s", b.Kind())
			}
		})
	}
}

func TestProbeFails(t *testing.T) {
	web := newFake(t, map[string]http.HandlerFunc{"GET /": says(200, `<html>`), "GET /v1/models": says(200, `<html>`)})
	locked := newFake(t, map[string]http.HandlerFunc{"GET /v1/models": says(401, `{}`)})
	gone := newFake(t, nil)
	gone.Close()
	tests := []struct {
		name string
		c    Config
		want string
	}{
		{"a web site", Config{URL: web.URL}, "GET /v1/models (200)"},
		{"a server with a key", Config{URL: locked.URL, Key: "sk-secret"}, "refuses the key"},
		{"nobody", Config{URL: gone.URL}, "refused"},
		{"no URL", Config{}, "empty"},
		{"a password", Config{URL: "http://u:sk-secret@h"}, "user or password"},
		{"not a URL", Config{URL: "http://u:sk-secret@h:x y"}, "can't be parsed"},
		{"another scheme", Config{URL: "ftp://h"}, "http or https"},
		{"no host", Config{URL: "http:///v1"}, "host is missing"},
		{"a query", Config{URL: "http://h?api_key=sk-secret"}, "no query"},
		{"negative slots", Config{URL: "h", Slots: -1}, "slots -1"},
		{"one alias for two", Config{URL: "h", Models: map[string]string{"a": "x", "b": "x"}}, `models "a" and "b"`},
		{"an empty alias", Config{URL: "h", Models: map[string]string{"a": ""}}, "empty"},
		{"an unknown capability", Config{URL: "h", Capabilities: map[string][]string{"a": {"fly"}}}, `"fly"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b, err := Probe(t.Context(), tt.c)
			if err == nil || b != nil {
				t.Fatalf("got %v, %v", b, err)
			}
			if !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "secret") {
				t.Errorf("error %q, want %q and no secret", err, tt.want)
			}
		})
	}
}

func TestProbeSendsTheKey(t *testing.T) {
	got := make(chan string, 20)
	f := newFake(t, map[string]http.HandlerFunc{"GET /api/demo": func(w http.ResponseWriter, r *http.Request) {
		got <- r.Header.Get("Authorization")
		says(200, `{"demo":true}`)(w, r)
	}})
	probe(t, Config{URL: f.URL, Key: "sk-1"})
	if key := <-got; key != "Bearer sk-1" {
		t.Errorf("Authorization %q", key)
	}
}

func TestSecretIsNeverPrinted(t *testing.T) {
	c := Config{URL: "http://h", Key: "sk-secret"}
	var log strings.Builder
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "config", c, "key", c.Key)
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "config", c, "key", c.Key)
	text, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{fmt.Sprint(c), fmt.Sprintf("%+v %#v %s %q", c, c, c.Key, c.Key), string(text), log.String()} {
		if strings.Contains(s, "secret") {
			t.Errorf("the key is printed: %s", s)
		}
	}
}

func TestDiscover(t *testing.T) {
	ollama, llama := newOllama(t), newLlama(t)
	dead := newFake(t, nil)
	dead.Close()
	release := make(chan struct{})
	stuck := newFake(t, map[string]http.HandlerFunc{"GET /api/demo": func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-release:
		case <-r.Context().Done():
		}
	}})
	defer close(release)
	began := time.Now()
	found := discover(t.Context(), Config{Slots: 3}, []string{dead.URL, llama.URL, stuck.URL, ollama.URL})
	if took := time.Since(began); took > discoverTimeout+2*time.Second {
		t.Errorf("took %v", took)
	}
	for _, b := range found {
		defer b.Close()
	}
	if len(found) != 2 || found[0].Kind() != LlamaCPP || found[1].Kind() != Ollama || found[0].Slots() != 3 {
		t.Errorf("found %v", found)
	}
}
