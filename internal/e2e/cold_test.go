package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/internal/secret"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// ollama stands for an Ollama with one model. As the real one, it says which models are in
// memory, loads by a request without a prompt or by any other, lets requests wait meanwhile,
// and gives up a load whose request is cut off.
type ollama struct {
	*httptest.Server

	mu      sync.Mutex
	takes   time.Duration // to load
	there   bool          // the model is in memory
	loading chan struct{} // closed when the load that runs is over; nil: none does
	loads   int
	present bool // the model is installed
}

const ollamaModel = "cold:8b"

func newOllama(t *testing.T, takes time.Duration) *ollama {
	t.Helper()
	o := &ollama{takes: takes, present: true}
	mux := http.NewServeMux()
	say := func(w http.ResponseWriter, format string, args ...any) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = fmt.Fprintf(w, format, args...)
	}
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "Ollama is running") })
	mux.HandleFunc("GET /api/version", func(w http.ResponseWriter, _ *http.Request) { say(w, `{"version":"0.13.0"}`) })
	mux.HandleFunc("GET /api/tags", func(w http.ResponseWriter, _ *http.Request) {
		o.mu.Lock()
		defer o.mu.Unlock()
		if !o.present {
			say(w, `{"models":[]}`)
			return
		}
		say(w, `{"models":[{"name":%q,"model":%q,"modified_at":"2026-10-01T10:00:00Z","size":1000000000,"digest":"a80c","capabilities":["completion"],"details":{"family":"llama","context_length":8192}}]}`, ollamaModel, ollamaModel)
	})
	mux.HandleFunc("GET /api/ps", func(w http.ResponseWriter, _ *http.Request) {
		o.mu.Lock()
		defer o.mu.Unlock()
		if !o.there {
			say(w, `{"models":[]}`)
			return
		}
		say(w, `{"models":[{"name":%q,"model":%q,"context_length":4096}]}`, ollamaModel, ollamaModel)
	})
	mux.HandleFunc("POST /api/show", func(w http.ResponseWriter, _ *http.Request) {
		say(w, `{"capabilities":["completion"],"model_info":{"general.architecture":"llama","llama.context_length":8192}}`)
	})
	mux.HandleFunc("POST /api/chat", func(w http.ResponseWriter, _ *http.Request) { say(w, `{}`) })
	mux.HandleFunc("POST /api/generate", func(w http.ResponseWriter, r *http.Request) {
		if o.load(r.Context()) {
			say(w, `{"model":%q,"response":"","done":true,"done_reason":"load"}`, ollamaModel)
		}
	})
	mux.HandleFunc("POST /v1/chat/completions", func(w http.ResponseWriter, r *http.Request) {
		var ask struct {
			Stream bool `json:"stream"`
		}
		if json.NewDecoder(r.Body).Decode(&ask) != nil || !o.load(r.Context()) {
			return
		}
		if !ask.Stream {
			say(w, `{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":%q,"choices":[{"index":0,"message":{"role":"assistant","content":"warm"},"finish_reason":"stop"}],"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}`, ollamaModel)
			return
		}
		w.Header().Set("Content-Type", "text/event-stream")
		const chunk = `data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[%s]%s}` + "\n\n"
		_, _ = fmt.Fprintf(w, chunk, `{"index":0,"delta":{"role":"assistant","content":"warm"},"finish_reason":null}`, "")
		_, _ = fmt.Fprintf(w, chunk, `{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":"stop"}`, "")
		_, _ = fmt.Fprintf(w, chunk, "", `,"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}`)
		_, _ = io.WriteString(w, "data: [DONE]\n\n")
	})
	o.Server = httptest.NewServer(mux)
	t.Cleanup(o.Close)
	return o
}

// load returns once the model is in memory, or false if nobody waits for that any more.
func (o *ollama) load(ctx context.Context) bool {
	for {
		o.mu.Lock()
		if o.there {
			o.mu.Unlock()
			return true
		}
		mine, takes := o.loading == nil, o.takes
		if mine {
			o.loading = make(chan struct{})
			o.loads++
		}
		over := o.loading
		o.mu.Unlock()
		if !mine {
			select {
			case <-over:
				continue
			case <-ctx.Done():
				return false
			}
		}
		select {
		case <-time.After(takes):
		case <-ctx.Done():
		}
		o.mu.Lock()
		o.there = ctx.Err() == nil
		o.loading = nil
		close(over)
		o.mu.Unlock()
		if ctx.Err() != nil {
			return false
		}
	}
}

// unload takes the model out of memory, and sets how long the next load takes.
func (o *ollama) unload(takes time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.there, o.takes, o.loads = false, takes, 0
}

func (o *ollama) loadsSoFar() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.loads
}

func (o *ollama) install(present bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.present = present
}

// TestColdOllama: the first request for a model that isn't in memory loads it, and is answered.
// Others wait, for as long as they say or five seconds, or hear that it is being loaded, and
// when to come back: who comes back then is answered.
func TestColdOllama(t *testing.T) {
	t.Parallel()
	o := newOllama(t, 2*time.Second)
	up := stack.StartUp(t, t.TempDir(), "--backend", o.URL)
	admin, err := adminapi.NewClient(strings.TrimSuffix(up.AdminURL, adminapi.Prefix), secret.String(up.AdminToken))
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close()
	state := func() schemas.ModelState {
		agents, err := admin.Agents(t.Context(), "")
		if err != nil || len(agents) != 1 || len(agents[0].Models) != 1 {
			return ""
		}
		return agents[0].Models[0].State
	}
	awaitState := func(want schemas.ModelState) {
		t.Helper()
		stack.Until(t, 30*time.Second, "the model to be "+string(want), func() bool { return state() == want })
	}
	ask := func(stream bool, wait string) reply {
		c := newClient(up.BaseURL, up.APIKey)
		defer c.close()
		if wait != "" {
			c.header = http.Header{"X-Ownllm-Wait": {wait}}
		}
		return c.chat(t.Context(), stream, map[string]any{"model": ollamaModel})
	}
	answered := func(r reply) {
		t.Helper()
		wantWhole(t, r)
		if r.text != "warm" {
			t.Errorf("the reply is %q", r.text)
		}
	}
	// told checks a refusal, and returns when to come back.
	told := func(r reply) time.Duration {
		t.Helper()
		after, err := strconv.Atoi(r.header.Get("Retry-After"))
		if r.status != http.StatusServiceUnavailable || r.code() != string(schemas.CodeModelLoading) || err != nil || after < 2 || after > 10 {
			t.Errorf("status %d, error %+v, broken %v, Retry-After %q, want model_loading", r.status, r.err, r.broken, r.header.Get("Retry-After"))
		}
		return time.Duration(after) * time.Second
	}

	awaitState(schemas.ModelCold)
	began := time.Now()
	for _, r := range together(8, func(i int) reply { return ask(i%2 == 0, "") }) {
		answered(r)
	}
	if took, n := time.Since(began), o.loadsSoFar(); n != 1 || took < 2*time.Second {
		t.Errorf("%d loads for the first requests, which took %s", n, took)
	}
	awaitState(schemas.ModelReady)

	// A load that is like the last one.
	o.unload(2 * time.Second)
	awaitState(schemas.ModelCold)
	began = time.Now()
	r := ask(true, "0")
	wait := told(r)
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("who doesn't wait is told after %s", took)
	}
	if wait > 4*time.Second {
		t.Errorf("the last load took 2 s, and the client is to wait for %s", wait)
	}
	time.Sleep(wait) // as the client is told to
	answered(ask(true, "1"))
	if n := o.loadsSoFar(); n != 1 {
		t.Errorf("%d loads for one who didn't wait and came back", n)
	}
	awaitState(schemas.ModelReady)

	// One that was unloaded a moment ago, so that the worker doesn't know yet.
	o.unload(3 * time.Second)
	began = time.Now()
	var hasty sync.WaitGroup
	hasty.Go(func() {
		wait := told(ask(true, "0"))
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("who doesn't wait for a model that was just unloaded is told after %s", took)
		}
		time.Sleep(wait)
		answered(ask(false, ""))
	})
	hasty.Go(func() { answered(ask(true, "30s")) })
	hasty.Go(func() { answered(ask(false, "30s")) })
	hasty.Wait()
	awaitState(schemas.ModelReady)

	// One that takes much longer than any before.
	const long = 24 * time.Second
	o.unload(long)
	awaitState(schemas.ModelCold)
	began = time.Now()
	var waiting sync.WaitGroup
	waiting.Go(func() {
		kept, status := keepAlives(t, up, "40s")
		t.Logf("the status came after %s, and %d keep-alives", status, kept)
		if kept < 1 || status < 18*time.Second || status > 23*time.Second {
			t.Errorf("the status came after %s, and %d keep-alives", status, kept)
		}
	})
	waiting.Go(func() { answered(ask(false, "40s")) })
	waiting.Go(func() { // with patience, as an SDK has
		refused := 0
		for {
			from := time.Now()
			r := ask(true, "")
			if r.status == http.StatusOK {
				answered(r)
				break
			}
			if took := time.Since(from); took < 4500*time.Millisecond || took > 8*time.Second {
				t.Errorf("refused after %s instead of 5 s", took)
			}
			wait := told(r)
			if refused++; refused > 4 || t.Failed() {
				t.Errorf("refused %d times", refused)
				break
			}
			time.Sleep(wait)
		}
		t.Logf("refused %d times, answered after %s", refused, time.Since(began))
	})
	waiting.Wait()
	if n := o.loadsSoFar(); n != 1 {
		t.Errorf("%d loads", n)
	}

	// What is removed or pulled on the machine shows within five seconds.
	for _, present := range []bool{false, true} {
		o.install(present)
		stack.Until(t, 5*time.Second+busyCores, fmt.Sprintf("the model to be listed: %v", present), func() bool { return lists(t, up, ollamaModel) == present })
		want := ""
		if !present {
			want = string(schemas.CodeModelNotFound)
		}
		if r := ask(true, ""); r.code() != want {
			t.Errorf("installed %v: status %d, error %+v", present, r.status, r.err)
		}
	}
}

// keepAlives sends a streaming request that waits, and returns how many comments came before
// the reply, and after how long the status.
func keepAlives(t *testing.T, up *stack.Up, wait string) (kept int, status time.Duration) {
	began := time.Now()
	c := newClient(up.BaseURL, up.APIKey)
	defer c.close()
	c.header = http.Header{"X-Ownllm-Wait": {wait}}
	resp, err := c.post(t.Context(), "/chat/completions", chatBody(true, map[string]any{"model": ollamaModel}))
	if err != nil {
		t.Error(err)
		return 0, 0
	}
	defer resp.Body.Close()
	status = time.Since(began)
	if resp.StatusCode != http.StatusOK {
		t.Errorf("a stream that waits gets the status %d", resp.StatusCode)
	}
	var lines []string
	for s := bufio.NewScanner(resp.Body); s.Scan(); {
		if strings.HasPrefix(s.Text(), ":") && !slices.ContainsFunc(lines, func(l string) bool { return l != "" }) {
			kept++
			continue
		}
		lines = append(lines, s.Text())
	}
	if text := strings.Join(lines, "\n"); !strings.Contains(text, `"content":"warm"`) || !strings.HasSuffix(strings.TrimSpace(text), "data: [DONE]") {
		t.Errorf("a stream that waits ends in %q", text)
	}
	return kept, status
}

// lists reports whether GET /v1/models lists the model.
func lists(t *testing.T, up *stack.Up, model string) bool {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, up.BaseURL+"/models", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+up.APIKey)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Error(err)
		return false
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return err == nil && strings.Contains(string(b), strconv.Quote(model))
}

// TestRemovedWhileNoBrokerRuns: an agent that is removed while no broker runs is cut off by the
// next one that starts, and no other is.
func TestRemovedWhileNoBrokerRuns(t *testing.T) {
	t.Parallel()
	backend := stack.StartBackend(t, demo.Options{})
	c := stack.StartCluster(t)
	removed := c.StartWorker(backend.URL).Serving()
	bystander := c.StartWorker(backend.URL).Serving()
	c.Broker.Kill()
	var id paired
	b, err := os.ReadFile(filepath.Join(removed.Dir, "worker.json"))
	if err == nil {
		err = json.Unmarshal(b, &id)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Books.RemoveAgent(t.Context(), id.Agent); err != nil {
		t.Fatal(err)
	}
	if logged(removed.Process, "bus connection lost") {
		t.Fatal("it was cut off by nobody, so that nothing is shown")
	}
	c.StartBroker()
	began := time.Now()
	stack.Until(t, 30*time.Second, "the agent to be cut off", func() bool { return logged(removed.Process, "bus connection lost") })
	t.Logf("cut off %s after the start of a broker", time.Since(began))
	stack.Until(t, 30*time.Second, "the agent to be refused", func() bool { return logged(removed.Process, "the bus refuses this connection") })
	if logged(bystander.Process, "bus connection lost") {
		t.Error("another agent was cut off")
	}
}

// TestSeveralAgents: an agent whose backend fails gets no work within five seconds, and gets
// some again when it is back; an edge that starts while all agents are away knows their models.
func TestSeveralAgents(t *testing.T) {
	t.Parallel()
	sound := stack.StartBackend(t, demo.Options{})
	inner := demo.New(demo.Options{})
	var down atomic.Bool
	ill := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if down.Load() {
			panic(http.ErrAbortHandler)
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(ill.Close)
	c := stack.StartCluster(t)
	workers := []*stack.Worker{c.StartWorker(sound.URL).Serving(), c.StartWorker(ill.URL).Serving()}
	edge := c.StartEdge()
	// Both have work to do.
	ask := func(n int) (failed int) {
		client := newClient(edge.BaseURL, c.Key.Reveal())
		defer client.close()
		for _, r := range together(n, func(i int) reply {
			return client.chat(t.Context(), i%2 == 0, map[string]any{"demo": map[string]any{"tokens": 5, "tokens_per_second": 50}})
		}) {
			if r.status != http.StatusOK || !r.done {
				failed++
			}
		}
		return failed
	}
	shared := func() bool {
		before := inner.Stats().Started
		return ask(8) == 0 && inner.Stats().Started > before
	}
	stack.Until(t, 30*time.Second, "both agents to work", shared)
	down.Store(true)
	since := time.Now()
	stack.Until(t, 5*time.Second+busyCores, "the agent to get no work", func() bool {
		return logged(workers[1].Process, "backend isn't answering") && ask(8) == 0
	})
	t.Logf("it gets no work %s after its backend failed", time.Since(since))
	for range 3 {
		if n := ask(8); n != 0 {
			t.Errorf("%d requests went to an agent whose backend is down", n)
		}
	}
	down.Store(false)
	stack.Until(t, 30*time.Second, "both agents to work again", shared)

	for _, w := range workers {
		if err := w.Stop(); err != nil {
			t.Error(err)
		}
	}
	for _, e := range []*stack.Edge{edge, c.StartEdge()} {
		client := newClient(e.BaseURL, c.Key.Reveal())
		if r := client.chat(t.Context(), true, nil); r.code() != string(schemas.CodeAgentOffline) {
			t.Errorf("a model whose agents are away: status %d, error %+v", r.status, r.err)
		}
		if r := client.chat(t.Context(), true, map[string]any{"model": "nobody-has-it"}); r.code() != string(schemas.CodeModelNotFound) {
			t.Errorf("a model that nobody has: status %d, error %+v", r.status, r.err)
		}
		client.close()
	}
}
