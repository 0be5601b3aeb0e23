package e2e

import (
	"context"
	"io"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/internal/secret"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/worker/demo"
)

// code is the code with which an edge refuses a key, or "".
func code(t *testing.T, edge *stack.Edge, key string) string {
	t.Helper()
	client := newClient(edge.BaseURL, key)
	defer client.close()
	r := client.chat(t.Context(), false, map[string]any{"demo": map[string]any{"tokens": 1}})
	switch {
	case r.broken != nil:
		t.Fatal(r.broken)
	case r.err != nil:
		return r.err.Code
	}
	return ""
}

// TestChangesBiteOnEveryEdge changes keys, users and tenants at one edge, while another,
// which has them in memory, is asked all the time.
func TestChangesBiteOnEveryEdge(t *testing.T) {
	backend := stack.StartBackend(t, demo.Options{})
	c := stack.StartCluster(t)
	c.StartWorker(backend.URL)
	here, there := c.StartEdge(), c.StartEdge()
	awaitModel(t, []*stack.Edge{here, there}, c.Key.Reveal(), demo.ModelID)
	api, err := adminapi.NewClient("http://"+here.Addr+adminapi.Prefix, secret.String(stack.AdminToken))
	if err != nil {
		t.Fatal(err)
	}
	defer api.Close()
	ctx := t.Context()
	user, err := api.CreateUser(ctx, adminapi.CreateUser{Tenant: string(c.Tenant.ID), Email: "ada@example.com"})
	if err != nil {
		t.Fatal(err)
	}
	newKey := func(change func(*adminapi.CreateKey)) adminapi.CreatedKey {
		t.Helper()
		in := adminapi.CreateKey{Tenant: string(c.Tenant.ID), User: string(user.ID)}
		if change != nil {
			change(&in)
		}
		k, err := api.CreateKey(ctx, in)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	key := newKey(nil)
	const within = time.Second
	const slack = 1500 * time.Millisecond // for a busy machine
	// bites waits until the other edge gives the answer, and settled then wants nothing else.
	bites := func(what, key, want string, since time.Time) {
		t.Helper()
		for code(t, there, key) != want {
			if time.Since(since) > 10*time.Second {
				t.Fatalf("%s: never got %q", what, want)
			}
		}
		if took := time.Since(since); took > within+slack {
			t.Errorf("%s took %s", what, took)
		}
	}
	settled := func(what, key, want string, since time.Time) {
		t.Helper()
		bites(what, key, want, since)
		for range 20 {
			if got := code(t, there, key); got != want {
				t.Errorf("%s: after %q came %q", what, want, got)
			}
		}
	}
	settled("a new key", key.Secret, "", time.Now())
	for _, change := range []struct {
		name, code string
		do         func() error
	}{
		{"suspend", "tenant_disabled", func() error { _, err := api.SuspendTenant(ctx, "local"); return err }},
		{"resume", "", func() error { _, err := api.ResumeTenant(ctx, "local"); return err }},
		{"deactivate", "user_deactivated", func() error { _, err := api.DeactivateUser(ctx, user.ID); return err }},
		{"activate", "", func() error { _, err := api.ActivateUser(ctx, user.ID); return err }},
		{"revoke", "key_invalid", func() error { _, err := api.RevokeKey(ctx, key.ID); return err }},
	} {
		if err := change.do(); err != nil {
			t.Fatalf("%s: %v", change.name, err)
		}
		settled(change.name, key.Secret, change.code, time.Now())
	}
	// One that a request has asked for before it existed isn't remembered as missing.
	made := time.Now()
	short := newKey(func(in *adminapi.CreateKey) { in.TTLSeconds = 5 })
	bites("a key with a TTL", short.Secret, "", made)
	settled("its end", short.Secret, "key_expired", short.ExpiresAt.Add(0))
	// An edge counts from before it asked the database, so it can be early by one query.
	if time.Now().Before(short.ExpiresAt.Add(-slack)) {
		t.Error("the key has expired before its time")
	}
}

// TestEdgeStopsOnASignal sends SIGTERM to edges with streams running.
func TestEdgeStopsOnASignal(t *testing.T) {
	backend := stack.StartBackend(t, demo.Options{})
	c := stack.StartCluster(t)
	c.StartWorker(backend.URL)
	running := func(edge *stack.Edge, tokens int) chan reply {
		t.Helper()
		awaitModel(t, []*stack.Edge{edge}, c.Key.Reveal(), demo.ModelID)
		before := backend.Stats().Tokens
		ended := make(chan reply, 1)
		go func() {
			client := newClient(edge.BaseURL, c.Key.Reveal())
			defer client.close()
			ended <- client.chat(context.Background(), true, map[string]any{"demo": map[string]any{"numbered": true, "tokens": tokens, "tokens_per_second": 20}})
		}()
		stack.Until(t, 30*time.Second, "the stream to run", func() bool { return backend.Stats().Tokens > before+2 })
		return ended
	}

	calm := c.StartEdge("--drain-timeout", "20s")
	stream := running(calm, 40)
	calm.Signal(syscall.SIGTERM)
	r := <-stream
	wantWhole(t, r)
	if r.text != numbered(40) {
		t.Errorf("text %q", r.text)
	}
	stack.Until(t, 30*time.Second, "the edge to end", func() bool { return !calm.Alive() })
	if err := calm.Err(); err != nil {
		t.Errorf("the edge ended with %v", err)
	}

	hasty := c.StartEdge("--drain-timeout", "500ms")
	stream = running(hasty, 100_000)
	hasty.Signal(syscall.SIGTERM)
	if r := <-stream; r.broken != nil || r.err == nil || r.err.Code != "internal_error" || !strings.Contains(r.err.Message, "shutting down") || r.done {
		t.Errorf("stream beyond the drain ended with %+v", r)
	}
	stack.Until(t, 30*time.Second, "the edge to end", func() bool { return !hasty.Alive() })
	if err := hasty.Err(); err != nil {
		t.Errorf("the edge ended with %v", err)
	}
	stack.Until(t, 30*time.Second, "the backend to stop", func() bool { return backend.Stats().Active == 0 })
}

// TestNothingSecretIsLogged runs requests of all kinds with every role at its most
// talkative, and looks for what they held.
func TestNothingSecretIsLogged(t *testing.T) {
	const (
		prompt     = "CANARY-of-the-prompt"
		completion = "CANARY-of-the-completion"
		complaint  = "CANARY-of-the-backend"
		busSecret  = "bus-secret-of-the-test"
	)
	backend := stack.StartBackend(t, demo.Options{})
	debug := []string{"--log-level", "debug"}
	c := stack.StartCluster(t, debug...)
	worker := c.StartWorker(backend.URL, debug...)
	edge := c.StartEdge(append(debug, "--first-token-timeout", "500ms", "--body-limit", "1MB")...)
	awaitModel(t, []*stack.Edge{edge}, c.Key.Reveal(), demo.ModelID)
	client := newClient(edge.BaseURL, c.Key.Reveal())
	defer client.close()
	say := []map[string]string{{"role": "user", "content": prompt}}
	large := []map[string]string{{"role": "user", "content": prompt + strings.Repeat(" "+prompt, 30_000)}}
	for _, stream := range []bool{true, false} {
		for name, fields := range map[string]map[string]any{
			"reply":               {"demo": map[string]any{"text": completion}},
			"reasoning and tools": {"tools": []any{map[string]any{"type": "function", "function": map[string]any{"name": prompt}}}, "demo": map[string]any{"tool_calls": 1, "reasoning_tokens": 3}},
			"echo":                {"demo": map[string]any{"echo": true}},
			"large":               {"messages": large, "demo": map[string]any{"text": completion}},
			"backend fails":       {"demo": map[string]any{"status": 500, "error_body": `{"error":{"message":"` + complaint + `"}}`}},
			"backend refuses":     {"demo": map[string]any{"status": 400, "error_body": `{"error":{"message":"` + prompt + `"}}`}},
			"garbage":             {"demo": map[string]any{"text": completion, "garbage_after": 1}},
			"error inside":        {"demo": map[string]any{"text": completion, "error_after": 1}},
			"dies":                {"demo": map[string]any{"text": completion, "die_after": 1}},
			"stalls":              {"demo": map[string]any{"stall_after": 0}, "total": prompt},
			"wrong type":          {"stream": prompt},
			"wrong role":          {"messages": []map[string]string{{"role": prompt, "content": prompt}}},
			"unknown model":       {"model": prompt},
			"format":              {"response_format": map[string]any{"type": prompt}},
		} {
			if name == "stalls" && !stream {
				continue // would take the whole deadline
			}
			if fields["messages"] == nil {
				fields["messages"] = say
			}
			r := client.chat(t.Context(), stream, fields)
			if r.broken != nil && name != "echo" && name != "reasoning and tools" {
				t.Errorf("%s: %v", name, r.broken)
			}
		}
	}
	// Whoever leaves, isn't let in, or sends something else altogether.
	ctx, cancel := context.WithCancel(t.Context())
	before := backend.Stats().Started
	go func() {
		stack.Until(t, 30*time.Second, "the request to run", func() bool { return backend.Stats().Started > before })
		cancel()
	}()
	client.chat(ctx, true, map[string]any{"messages": say, "demo": map[string]any{"first_token_ms": 400}})
	badKey := "sk-ownllm-CANARYofTheBadKey00000"
	for _, request := range []struct{ method, path, authorization, body string }{
		{"POST", "/v1/chat/completions", "Bearer " + badKey, `{"prompt":"` + prompt + `"}`},
		{"POST", "/v1/chat/completions", "Bearer " + c.Key.Reveal(), `{"prompt":"` + prompt},
		{"POST", "/v1/chat/completions", "Bearer " + c.Key.Reveal(), `{"x":"` + prompt + strings.Repeat("x", 1<<20) + `"}`},
		{"POST", "/v1/chat/completions?" + prompt, "Basic " + c.Key.Reveal(), `{}`},
		{"GET", "/v1/models/" + c.Key.Reveal(), "Bearer " + c.Key.Reveal(), ""},
		{"GET", "/" + c.Key.Reveal(), "", ""},
		{"GET", "/api/v1/status", "Bearer " + stack.AdminToken, ""},
		{"GET", "/api/v1/status", "Bearer " + stack.AdminToken + "x", ""},
		{"POST", "/api/v1/keys/" + c.Key.Reveal() + "/revoke", "Bearer " + stack.AdminToken, ""},
		{"POST", "/api/v1/keys", "Bearer " + stack.AdminToken, `{"tenant":"local","user":"` + prompt + `"}`},
	} {
		req, err := http.NewRequestWithContext(t.Context(), request.method, "http://"+edge.Addr+request.path, strings.NewReader(request.body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", request.authorization)
		resp, err := client.http.Do(req)
		if err != nil {
			t.Fatalf("%s %s: %v", request.method, request.path, err)
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			t.Error(err)
		}
		_ = resp.Body.Close()
	}
	// Its loss makes everybody speak of the bus, and of the requests that hang on it.
	c.NATS.Kill()
	client.chat(t.Context(), true, map[string]any{"messages": say})
	c.StartNATS()
	stack.Until(t, 30*time.Second, "a reply again", func() bool {
		r := client.chat(t.Context(), false, map[string]any{"messages": say, "demo": map[string]any{"text": completion}})
		return r.err == nil && r.broken == nil
	})

	logs := map[string]*stack.Process{"edge": edge.Process, "worker": worker.Process, "broker": c.Broker, "nats-server": c.NATS}
	for name, p := range logs {
		if name != "nats-server" {
			if err := p.Stop(); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		text := strings.Join(p.Log(), "\n")
		for what, canary := range map[string]string{
			"a prompt": prompt, "a completion": completion, "a backend's words": complaint, "a key": c.Key.Reveal(),
			"a bad key": badKey, "the admin token": stack.AdminToken, "the bus secret": busSecret,
		} {
			if i := strings.Index(text, canary); i >= 0 {
				t.Errorf("the log of %s has %s: %q", name, what, text[max(0, i-200):i+len(canary)])
			}
		}
	}
	if text := strings.Join(edge.Log(), "\n"); !strings.Contains(text, "level=DEBUG") {
		t.Error("the edge isn't at its most talkative")
	}
}

// TestFilesOfUpAreTheOwners looks at what up leaves on disk.
func TestFilesOfUpAreTheOwners(t *testing.T) {
	dir := t.TempDir()
	up := stack.StartUp(t, dir, "--backend", "demo")
	for _, name := range []string{"ready.json", "admin.token", "nats.token", "first.key"} {
		info, err := os.Stat(dir + "/" + name)
		if err != nil {
			t.Error(err)
			continue
		}
		if mode := info.Mode().Perm(); mode != 0o600 {
			t.Errorf("%s has mode %o", name, mode)
		}
	}
	text := strings.Join(up.Log(), "\n")
	for what, canary := range map[string]string{"admin token": up.AdminToken, "database": up.DatabaseURL} {
		if strings.Contains(text, canary) {
			t.Errorf("what up prints has the %s", what)
		}
	}
}
