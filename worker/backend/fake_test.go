package backend

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/ownllm/ownllm/schemas"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fake is an inference server: answers by "METHOD /path", which a test may change
// while it runs.
type fake struct {
	*httptest.Server

	mu      sync.Mutex
	answers map[string]http.HandlerFunc
	asked   map[string]int
	bodies  map[string][]string
}

func newFake(t *testing.T, answers map[string]http.HandlerFunc) *fake {
	t.Helper()
	f := &fake{answers: map[string]http.HandlerFunc{}, asked: map[string]int{}, bodies: map[string][]string{}}
	for route, answer := range answers {
		f.answers[route] = answer
	}
	f.Server = httptest.NewServer(f)
	t.Cleanup(f.Close)
	return f
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	route := r.Method + " " + r.URL.Path
	f.mu.Lock()
	answer := f.answers[route]
	f.asked[route]++
	f.bodies[route] = append(f.bodies[route], string(body))
	f.mu.Unlock()
	if answer == nil {
		http.Error(w, `{"error":{"code":404,"message":"File Not Found","type":"not_found_error"}}`, http.StatusNotFound)
		return
	}
	answer(w, r)
}

func (f *fake) set(route string, answer http.HandlerFunc) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answers[route] = answer
}

func (f *fake) count(route string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.asked[route]
}

// last is the body of the last request to the route.
func (f *fake) last(route string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := f.bodies[route]
	if len(all) == 0 {
		return ""
	}
	return all[len(all)-1]
}

func says(status int, format string, args ...any) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_, _ = fmt.Fprintf(w, format, args...)
	}
}

// streams sends a stream as it is.
func streams(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream; charset=utf-8")
		_, _ = io.WriteString(w, text)
	}
}

const (
	ollamaTagsJSON = `{"models":[` +
		`{"name":"llama3.2:latest","model":"llama3.2:latest","modified_at":"2026-10-01T10:00:00.5+02:00","size":2019393189,"digest":"a80c","details":{"family":"llama","families":["llama"]}},` +
		`{"name":"nomic-embed-text:latest","model":"nomic-embed-text:latest","modified_at":"2026-09-01T10:00:00Z","size":274302450,"digest":"0a10","details":{"family":"nomic-bert"}},` +
		`{"name":"qwen/qwen2.5:32b","model":"qwen/qwen2.5:32b","modified_at":"2026-09-02T10:00:00Z","size":19851349856,"digest":"9f13","capabilities":["completion","tools","thinking"],"details":{"context_length":32768}}]}`
	ollamaShowLlama = `{"capabilities":["completion","tools","vision"],"parameters":"stop \"<|eot|>\"\nnum_ctx                        8192","model_info":{"general.architecture":"llama","llama.context_length":131072},"details":{"family":"llama"},"template":"x"}`
)

// newOllama is an Ollama with three models of which none is loaded; ps tells which
// are.
func newOllama(t *testing.T) *fake {
	f := newFake(t, map[string]http.HandlerFunc{
		"GET /":            func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "Ollama is running") },
		"GET /api/version": says(200, `{"version":"0.13.0"}`),
		"GET /api/tags":    says(200, ollamaTagsJSON),
		"GET /api/ps":      says(200, `{"models":[]}`),
		"GET /v1/models":   says(200, `{"object":"list","data":[{"id":"llama3.2:latest","object":"model","created":1,"owned_by":"library"}]}`),
	})
	f.set("POST /api/show", func(w http.ResponseWriter, r *http.Request) {
		switch body := f.last("POST /api/show"); {
		case strings.Contains(body, "llama3.2"):
			says(200, ollamaShowLlama)(w, r)
		case strings.Contains(body, "nomic"):
			says(200, `{"details":{"family":"nomic-bert"},"model_info":{"general.architecture":"nomic-bert","nomic-bert.context_length":2048}}`)(w, r)
		default:
			says(200, `{"model_info":{}}`)(w, r)
		}
	})
	return f
}

const (
	llamaPropsJSON = `{"default_generation_settings":{"n_ctx":4096,"params":{}},"total_slots":4,"model_path":"/m/smol.gguf","modalities":{"vision":true,"audio":false},"chat_template":"{{ messages }}","chat_template_caps":{"supports_tools":true,"supports_tool_calls":true},"build_info":"b7000"}`
	llamaListJSON  = `{"models":[{"name":"smol"}],"object":"list","data":[{"id":"smol","object":"model","created":%d,"owned_by":"llamacpp","meta":{"n_ctx_train":8192,"size":145000000}}]}`
	llamaLoading   = `{"error":{"code":503,"message":"Loading model","type":"unavailable_error"}}`
)

func newLlama(t *testing.T) *fake {
	var asked int
	return newFake(t, map[string]http.HandlerFunc{
		"GET /":       says(200, `<html>`),
		"GET /health": says(200, `{"status":"ok"}`),
		"GET /props":  says(200, llamaPropsJSON),
		"GET /v1/models": func(w http.ResponseWriter, r *http.Request) {
			asked++ // as the real one, it takes the time of the question for that of the model
			says(200, llamaListJSON, 1700000000+asked)(w, r)
		},
	})
}

func newVLLM(t *testing.T) *fake {
	return newFake(t, map[string]http.HandlerFunc{
		"GET /health": says(200, ``),
		"GET /v1/models": says(200, `{"object":"list","data":[`+
			`{"id":"base","object":"model","created":1732285000,"owned_by":"vllm","root":"base","parent":null,"max_model_len":32768,"permission":[]},`+
			`{"id":"adapter","object":"model","created":1732285000,"owned_by":"vllm","root":"/lora","parent":"base","max_model_len":null,"permission":[]}]}`),
		"POST /v1/chat/completions": says(200, `{"choices":[]}`),
	})
}

func probe(t *testing.T, c Config) *Backend {
	t.Helper()
	b, err := Probe(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	return b
}

func models(t *testing.T, b *Backend) map[string]schemas.Model {
	t.Helper()
	list, err := b.Models(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	byID := map[string]schemas.Model{}
	for _, m := range list {
		byID[m.ID] = m
	}
	return byID
}
