package sdk

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// target is a running stack for the checks of the SDKs. The same values reach the
// Python and Node checks by environment; scripts/README.md describes them.
type target struct {
	BaseURL    string // of the API, with /v1
	APIKey     string
	Model      string // a demo model with all capabilities
	TextModel  string // a demo model without tools and vision
	SlashModel string // a demo model whose id has a slash and a colon
	BackendURL string // of the demo backend, for its /demo/stats
	RealModel  string // served by scripts/realmodel; empty: those checks don't run
	Cases      []errorCase
}

// errorCase is one way to provoke an error, and how an SDK must show it.
type errorCase struct {
	Name    string `json:"name"`
	Key     string `json:"key"`
	BaseURL string `json:"base_url,omitempty"` // the target's if empty
	// Call is what to do: "chat", "stream", "models" (list), "model" (retrieve), or empty
	// for chat and stream, which must fail alike.
	Call  string `json:"call,omitempty"`
	Model string `json:"model,omitempty"`
	// Body is laid over the body that the check sends, Omit takes fields out of it.
	Body map[string]any `json:"body,omitempty"`
	Omit []string       `json:"omit,omitempty"`
	// Retries is how often an SDK tries again that may do so as often, or once if that is
	// 0; nil: it may try only once.
	Retries *int     `json:"retries,omitempty"`
	Expect  expected `json:"expect"`
}

type expected struct {
	// Status is the HTTP status; 200 stands for an error inside the stream.
	Status int    `json:"status"`
	Type   string `json:"type"`
	Code   string `json:"code"`
	Param  string `json:"param,omitempty"`
	// Message is a part of the message.
	Message string `json:"message,omitempty"`
	// Headers are regular expressions by header name.
	Headers map[string]string `json:"headers,omitempty"`
}

// environ is the environment of a check of the target.
func (to target) environ(t *testing.T) []string {
	t.Helper()
	cases, err := json.Marshal(to.Cases)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "cases.json")
	if err := os.WriteFile(file, cases, 0o600); err != nil {
		t.Fatal(err)
	}
	return append(os.Environ(),
		"OWNLLM_BASE_URL="+to.BaseURL,
		"OWNLLM_API_KEY="+to.APIKey,
		"OWNLLM_MODEL="+to.Model,
		"OWNLLM_TEXT_MODEL="+to.TextModel,
		"OWNLLM_SLASH_MODEL="+to.SlashModel,
		"OWNLLM_BACKEND_URL="+to.BackendURL,
		"OWNLLM_REAL_MODEL="+to.RealModel,
		"OWNLLM_CASES="+file,
		"PYTHONDONTWRITEBYTECODE=1",
	)
}

// targetFromEnv reads what environ writes.
func targetFromEnv(t *testing.T) target {
	t.Helper()
	to := target{
		BaseURL:    os.Getenv("OWNLLM_BASE_URL"),
		APIKey:     os.Getenv("OWNLLM_API_KEY"),
		Model:      os.Getenv("OWNLLM_MODEL"),
		TextModel:  os.Getenv("OWNLLM_TEXT_MODEL"),
		SlashModel: os.Getenv("OWNLLM_SLASH_MODEL"),
		BackendURL: os.Getenv("OWNLLM_BACKEND_URL"),
		RealModel:  os.Getenv("OWNLLM_REAL_MODEL"),
	}
	cases := []byte(os.Getenv("OWNLLM_CASES"))
	if len(cases) == 0 {
		return to
	}
	if cases[0] != '[' {
		var err error
		if cases, err = os.ReadFile(string(cases)); err != nil {
			t.Fatal(err)
		}
	}
	if err := json.Unmarshal(cases, &to.Cases); err != nil {
		t.Fatalf("OWNLLM_CASES: %v", err)
	}
	return to
}

// needScripts makes sure that the programs are there which the checks run. What scripts/setup
// installs is needed, except in a short run.
func needScripts(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("not in a short run: it needs what scripts/setup installs")
	}
	for _, path := range []string{".venv/complete", "sdk/node/node_modules"} {
		if _, err := os.Stat(filepath.Join(scripts, path)); err != nil {
			t.Fatalf("%v: run scripts/setup first", err)
		}
	}
}

const scripts = "../../../scripts"

// program runs a program of scripts/.venv against the target, in the folder scripts/sdk.
func (to target) program(t *testing.T, name string, args ...string) {
	t.Helper()
	path, err := filepath.Abs(filepath.Join(scripts, ".venv/bin", name))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), path, args...)
	cmd.Dir = filepath.Join(scripts, "sdk")
	cmd.Env = to.environ(t)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
}

func (to target) python(t *testing.T, args ...string) {
	to.program(t, "python", append([]string{"-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5"}, args...)...)
}

func (to target) node(t *testing.T, pattern string) {
	to.program(t, "node", "--test", "--test-concurrency=1", "--test-reporter=tap", pattern)
}

// check runs the checks of all three SDKs, one after the other: they count what the
// backend aborts. Those of the real model are among them if there is one.
func (to target) check(t *testing.T) {
	pattern, ignore := "node/*.test.mjs", "--ignore=none"
	if to.RealModel == "" {
		pattern, ignore = "node/!(real-model).test.mjs", "--ignore=python/test_real_model.py"
	}
	t.Run("python", func(t *testing.T) { to.python(t, ignore, "python") })
	t.Run("node", func(t *testing.T) { to.node(t, pattern) })
	t.Run("go", func(t *testing.T) { checkGoSDK(t, to) })
}

// checkRealModel runs those of the real model.
func (to target) checkRealModel(t *testing.T) {
	t.Run("python", func(t *testing.T) { to.python(t, "python/test_real_model.py") })
	t.Run("node", func(t *testing.T) { to.node(t, "node/real-model.test.mjs") })
	t.Run("go", func(t *testing.T) { newGoSDK(to).realModel(t) })
}
