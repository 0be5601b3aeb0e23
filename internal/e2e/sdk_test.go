package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// sdkTarget is a running stack for the checks of the official SDKs. The same values
// reach the Python and Node checks by environment; scripts/README.md describes them.
type sdkTarget struct {
	BaseURL    string // of the API, with /v1
	APIKey     string
	Model      string // a demo model with all capabilities
	TextModel  string // a demo model without tools and vision
	SlashModel string // a demo model whose id has a slash and a colon
	BackendURL string // of the demo backend, for its /demo/stats
	RealModel  string // served by scripts/realmodel; empty: those checks don't run
	Cases      []sdkCase
}

// sdkCase is one way to provoke an error, and how an SDK must show it.
type sdkCase struct {
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
	// Retry says whether an SDK that may try twice does so; nil: it may try once.
	Retry  *bool     `json:"retry,omitempty"`
	Expect sdkExpect `json:"expect"`
}

type sdkExpect struct {
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

func (s sdkTarget) environ(t *testing.T) []string {
	t.Helper()
	cases, err := json.Marshal(s.Cases)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "cases.json")
	if err := os.WriteFile(file, cases, 0o600); err != nil {
		t.Fatal(err)
	}
	return append(os.Environ(),
		"OWNLLM_BASE_URL="+s.BaseURL,
		"OWNLLM_API_KEY="+s.APIKey,
		"OWNLLM_MODEL="+s.Model,
		"OWNLLM_TEXT_MODEL="+s.TextModel,
		"OWNLLM_SLASH_MODEL="+s.SlashModel,
		"OWNLLM_BACKEND_URL="+s.BackendURL,
		"OWNLLM_REAL_MODEL="+s.RealModel,
		"OWNLLM_CASES="+file,
		"PYTHONDONTWRITEBYTECODE=1",
	)
}

// sdkTargetFromEnv reads what environ writes.
func sdkTargetFromEnv(t *testing.T) sdkTarget {
	t.Helper()
	s := sdkTarget{
		BaseURL:    os.Getenv("OWNLLM_BASE_URL"),
		APIKey:     os.Getenv("OWNLLM_API_KEY"),
		Model:      os.Getenv("OWNLLM_MODEL"),
		TextModel:  os.Getenv("OWNLLM_TEXT_MODEL"),
		SlashModel: os.Getenv("OWNLLM_SLASH_MODEL"),
		BackendURL: os.Getenv("OWNLLM_BACKEND_URL"),
		RealModel:  os.Getenv("OWNLLM_REAL_MODEL"),
	}
	if file := os.Getenv("OWNLLM_CASES"); file != "" {
		cases, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(cases, &s.Cases); err != nil {
			t.Fatalf("cases of %s: %v", file, err)
		}
	}
	return s
}

// checkSDKs runs the checks of all three SDKs, one after the other: they count what the
// backend aborts.
func checkSDKs(t *testing.T, target sdkTarget) {
	scripts, err := filepath.Abs("../../scripts")
	if err != nil {
		t.Fatal(err)
	}
	run := func(t *testing.T, program string, args ...string) {
		t.Helper()
		program = filepath.Join(scripts, ".venv/bin", program)
		if _, err := os.Stat(program); err != nil {
			t.Fatalf("%v: run scripts/setup first", err)
		}
		cmd := exec.CommandContext(t.Context(), program, args...)
		cmd.Dir = filepath.Join(scripts, "sdk")
		cmd.Env = target.environ(t)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		t.Logf("%s", out)
	}
	t.Run("python", func(t *testing.T) { run(t, "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "python") })
	t.Run("node", func(t *testing.T) {
		run(t, "node", "--test", "--test-concurrency=1", "--test-reporter=tap", "node/*.test.mjs")
	})
	t.Run("go", func(t *testing.T) { checkGoSDK(t, target) })
}

// TestSDKsOfRunningStack checks a stack that somebody else started, the one that the
// environment names.
func TestSDKsOfRunningStack(t *testing.T) {
	target := sdkTargetFromEnv(t)
	if target.BaseURL == "" {
		t.Skip("OWNLLM_BASE_URL is not set")
	}
	checkSDKs(t, target)
}
