package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ownllm/ownllm/internal/load"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/worker/demo"
)

// TestBench load tests a running `ownllm up` as its users do.
func TestBench(t *testing.T) {
	backend := stack.StartBackend(t, demo.Options{})
	up := stack.StartUp(t, t.TempDir(), "--backend", backend.URL)
	bench := func(code int, args ...string) (r load.Report, stderr string) {
		t.Helper()
		var out, errs bytes.Buffer
		cmd := exec.CommandContext(t.Context(), stack.Binary(t, stack.OwnLLM), append([]string{"bench", "--data-dir", up.DataDir, "--json"}, args...)...)
		cmd.Stdout, cmd.Stderr = &out, &errs
		err := cmd.Run()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) || cmd.ProcessState.ExitCode() != code {
			t.Fatalf("bench %s: %v, want exit code %d\n%s%s", strings.Join(args, " "), err, code, &out, &errs)
		}
		if err := json.Unmarshal(out.Bytes(), &r); err != nil {
			t.Fatalf("bench %s: %v\n%s", strings.Join(args, " "), err, &out)
		}
		return r, errs.String()
	}

	t.Run("closed", func(t *testing.T) {
		page := filepath.Join(t.TempDir(), "report.html")
		before := backend.Stats().Finished
		r, _ := bench(0, "--clients", "1,4", "--requests", "40", "--warmup", "0s", "--max-tokens", "8..40", "--html", page)
		if len(r.Stages) != 2 || r.Target.Model != "demo" || !r.Settings.Verified {
			t.Fatalf("%+v", r)
		}
		for _, s := range r.Stages {
			if s.Requests != (load.Ended{Sent: 40, OK: 40}) || s.FirstToken.Count != 40 || s.RequestsPerSecond <= 0 || s.CompletionTokens < 40*8 {
				t.Errorf("%+v", s)
			}
		}
		if n := backend.Stats().Finished - before; n != 80 {
			t.Errorf("the backend finished %d requests, want 80", n)
		}
		if b, err := os.ReadFile(page); err != nil || !bytes.Contains(b, []byte("<svg")) {
			t.Errorf("the page: %v", err)
		}
	})
	t.Run("whole replies", func(t *testing.T) {
		r, _ := bench(0, "--requests", "20", "--warmup", "0s", "--no-stream")
		if s := r.Stages[0]; s.Requests.OK != 20 || s.FirstToken != nil || s.Whole.Count != 20 {
			t.Errorf("%+v", s)
		}
	})
	t.Run("open", func(t *testing.T) {
		r, _ := bench(0, "--rate", "20", "--duration", "2s", "--warmup", "100ms", "--slo", "e2e=1m")
		if s := r.Stages[0]; s.Requests.OK < 15 || s.Requests.Failed > 0 || s.Goodput.Share != 1 || s.Client.Launched == nil {
			t.Errorf("%+v", s)
		}
	})
	t.Run("a token is lost", func(t *testing.T) {
		r, stderr := bench(1, "--requests", "10", "--warmup", "0s", "--extra-body", `{"demo":{"lose_at":5}}`)
		if s := r.Stages[0]; s.Requests.Broken != 10 || s.Breaches[load.Lost] != 10 || !strings.Contains(stderr, "10 replies weren't whole") {
			t.Errorf("%+v\n%s", s, stderr)
		}
	})
	// The broker says what the backend did; so nothing is torn.
	t.Run("the backend fails in mid-stream", func(t *testing.T) {
		r, _ := bench(1, "--requests", "5", "--warmup", "0s", "--extra-body", `{"demo":{"error_after":5}}`)
		if s := r.Stages[0]; s.Requests.Failed != 5 || len(s.Failures) != 1 || s.Failures[0].Code != "backend_error" || s.Failures[0].Status != 200 {
			t.Errorf("%+v", s)
		}
	})
	t.Run("interrupted", func(t *testing.T) {
		active := backend.Stats().Started
		p := stack.Run(t, "bench", nil, stack.Binary(t, stack.OwnLLM), "bench", "--data-dir", up.DataDir, "--duration", "1h", "--warmup", "0s", "--max-tokens", "5")
		stack.Until(t, 30*time.Second, "requests", func() bool { return backend.Stats().Started > active+50 })
		p.Signal(syscall.SIGINT)
		stack.Until(t, 30*time.Second, "the end", func() bool { return !p.Alive() })
		var exit *exec.ExitError
		if err := p.Err(); !errors.As(err, &exit) || exit.ExitCode() != 1 {
			t.Errorf("ended with %v", err)
		}
		if out := strings.Join(p.Log(), "\n"); !strings.Contains(out, "Interrupted") || !strings.Contains(out, "first token") {
			t.Errorf("it said:\n%s", out)
		}
	})
}
