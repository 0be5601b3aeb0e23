package backend

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/ownllm/ownllm/schemas"
)

func TestOllamaLoad(t *testing.T) {
	f := newOllama(t)
	b := probe(t, Config{URL: f.URL})
	models(t, b)
	arrived, release := make(chan struct{}), make(chan struct{})
	f.set("POST /api/generate", func(w http.ResponseWriter, r *http.Request) {
		close(arrived)
		<-release
		f.set("GET /api/ps", says(200, `{"models":[{"name":"llama3.2:latest","model":"llama3.2:latest","context_length":8192}]}`))
		says(200, `{"model":"llama3.2:latest","response":"","done":true,"done_reason":"load"}`)(w, r)
	})
	first, second := make(chan error, 1), make(chan error, 1)
	go func() { first <- b.Load(t.Context(), "llama3.2:latest") }()
	<-arrived
	go func() { second <- b.Load(t.Context(), "llama3.2:latest") }()
	if m := models(t, b)["llama3.2:latest"]; m.State != schemas.ModelLoading || m.LoadMS < 1000 || m.LoadMS > 7000 {
		t.Errorf("while it loads: %+v", m)
	}
	impatient, cancel := context.WithCancelCause(t.Context())
	cancel(errClientGone)
	if err := b.Load(impatient, "llama3.2:latest"); !errors.Is(err, errClientGone) {
		t.Errorf("a caller that doesn't wait: %v", err)
	}
	close(release)
	if err := errors.Join(<-first, <-second); err != nil {
		t.Error(err)
	}
	if n := f.count("POST /api/generate"); n < 1 || n > 2 {
		t.Errorf("%d loads", n)
	}
	if body := f.last("POST /api/generate"); !strings.Contains(body, `"model":"llama3.2:latest"`) || strings.Contains(body, "prompt") {
		t.Errorf("asked with %s", body)
	}
	if m := models(t, b)["llama3.2:latest"]; m.State != schemas.ModelReady || m.LoadMS != 0 {
		t.Errorf("afterwards: %+v", m)
	}
}

func TestLoadFails(t *testing.T) {
	f := newOllama(t)
	b := probe(t, Config{URL: f.URL})
	models(t, b)
	f.set("POST /api/generate", says(500, `{"error":"model requires more system memory (9.1 GiB) than is available (2.0 GiB)"}`))
	err := b.Load(t.Context(), "llama3.2:latest")
	var e *schemas.Error
	if !errors.As(err, &e) || e.Code != schemas.CodeBackendError || !strings.Contains(e.Message, "more memory") {
		t.Errorf("error %v", err)
	}
	if m := models(t, b)["llama3.2:latest"]; m.State != schemas.ModelFailed || !strings.Contains(m.Detail, "more memory") {
		t.Errorf("lately failed: %+v", m)
	}
	b.mu.Lock()
	b.loads["llama3.2:latest"].ended = time.Now().Add(-failureMemory)
	b.mu.Unlock()
	if m := models(t, b)["llama3.2:latest"]; m.State != schemas.ModelCold || m.Detail != "" {
		t.Errorf("some time later: %+v", m)
	}
	f.set("POST /api/generate", says(404, `{"error":"model 'llama3.2:latest' not found"}`))
	if err := b.Load(t.Context(), "llama3.2:latest"); !errors.Is(err, &schemas.Error{Code: schemas.CodeModelNotFound}) {
		t.Errorf("removed meanwhile: %v", err)
	}
}

// TestLoadIsTakenOver shows that a load whose caller goes away is begun again by
// another one that waits for it, and isn't held against the model.
func TestLoadIsTakenOver(t *testing.T) {
	f := newOllama(t)
	b := probe(t, Config{URL: f.URL})
	models(t, b)
	arrived := make(chan struct{}, 2)
	f.set("POST /api/generate", func(w http.ResponseWriter, r *http.Request) {
		arrived <- struct{}{}
		if f.count("POST /api/generate") == 1 {
			<-r.Context().Done()
			return
		}
		says(200, `{"done_reason":"load"}`)(w, r)
	})
	ctx, cancel := context.WithCancelCause(t.Context())
	first, second := make(chan error, 1), make(chan error, 1)
	go func() { first <- b.Load(ctx, "llama3.2:latest") }()
	<-arrived
	go func() { second <- b.Load(t.Context(), "llama3.2:latest") }()
	cancel(errClientGone)
	if err := <-first; !errors.Is(err, errClientGone) {
		t.Errorf("first: %v", err)
	}
	if err := <-second; err != nil {
		t.Errorf("second: %v", err)
	}
	if m := models(t, b)["llama3.2:latest"]; m.State != schemas.ModelCold {
		t.Errorf("%+v", m)
	}
}

func TestLlamaLoad(t *testing.T) {
	t.Run("router", func(t *testing.T) {
		f := newRouter(t)
		b := probe(t, Config{URL: f.URL})
		models(t, b)
		f.set("POST /models/load", func(w http.ResponseWriter, r *http.Request) {
			f.set("GET /models", says(200, "%s", strings.Replace(routerList, `"unloaded","args":["llama-server","-c"`, `"loaded","args":["llama-server","-c"`, 1)))
			says(200, `{"success":true}`)(w, r)
		})
		if err := b.Load(t.Context(), "b"); err != nil {
			t.Error(err)
		}
		f.set("POST /models/load", says(400, `{"error":{"code":400,"message":"model is already running","type":"invalid_request_error"}}`))
		if err := b.Load(t.Context(), "a"); err != nil {
			t.Errorf("already loaded: %v", err)
		}
		if err := b.Load(t.Context(), "d"); !errors.Is(err, &schemas.Error{Code: schemas.CodeBackendError}) {
			t.Errorf("a model that fails: %v", err)
		}
		f.set("POST /models/load", says(404, `{"error":{"code":404,"message":"model is not found","type":"not_found_error"}}`))
		if err := b.Load(t.Context(), "x"); !errors.Is(err, &schemas.Error{Code: schemas.CodeModelNotFound}) {
			t.Errorf("an unknown model: %v", err)
		}
	})
	t.Run("one model", func(t *testing.T) {
		f := newLlama(t)
		asked := 0
		f.set("GET /props", func(w http.ResponseWriter, r *http.Request) {
			if asked++; asked < 4 {
				says(503, llamaLoading)(w, r)
				return
			}
			says(200, llamaPropsJSON)(w, r)
		})
		b := probe(t, Config{URL: f.URL})
		models(t, b)
		if err := b.Load(t.Context(), "smol"); err != nil {
			t.Error(err)
		}
		if m := models(t, b)["smol"]; m.State != schemas.ModelReady {
			t.Errorf("afterwards: %+v", m)
		}
	})
	t.Run("asleep", func(t *testing.T) {
		f := newLlama(t)
		f.set("GET /props", says(200, "%s", strings.Replace(llamaPropsJSON, "{", `{"is_sleeping":true,`, 1)))
		f.set("POST /v1/chat/completions", says(200, `{"choices":[]}`))
		b := probe(t, Config{URL: f.URL})
		models(t, b)
		if err := b.Load(t.Context(), "smol"); err != nil {
			t.Error(err)
		}
		if body := f.last("POST /v1/chat/completions"); !strings.Contains(body, `"max_tokens":1`) {
			t.Errorf("woken with %s", body)
		}
	})
}

func TestLoadWaitsForAServerThatStarts(t *testing.T) {
	f := newVLLM(t)
	b := probe(t, Config{URL: f.URL})
	models(t, b)
	list := f.answers["GET /v1/models"]
	f.set("GET /v1/models", func(w http.ResponseWriter, r *http.Request) {
		f.set("GET /v1/models", list)
		panic(http.ErrAbortHandler)
	})
	if err := b.Load(t.Context(), "base"); err != nil {
		t.Error(err)
	}
	if err := b.Load(t.Context(), "absent"); !errors.Is(err, &schemas.Error{Code: schemas.CodeModelNotFound}) {
		t.Errorf("a model that it doesn't have: %v", err)
	}
	f.set("GET /v1/models", says(503, ``))
	ctx, cancel := context.WithTimeoutCause(t.Context(), 3*loadPoll, errClientGone)
	defer cancel()
	if err := b.Load(ctx, "base"); !errors.Is(err, errClientGone) {
		t.Errorf("it never comes: %v", err)
	}
}
