package e2e

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/internal/pgtest"
	"github.com/ownllm/ownllm/internal/stack"
)

// TestUpAgain starts `ownllm up` on the data of an earlier run, which was stopped, or
// killed: the key is the same, and what was made is still there.
func TestUpAgain(t *testing.T) {
	dir := t.TempDir()
	first := stack.StartUp(t, dir, "--backend", "demo")
	ownllm := func(args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), stack.Binary(t, stack.OwnLLM), append(args, "--data-dir", dir)...)
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("ownllm %s: %v", strings.Join(args, " "), err)
		}
		return string(out)
	}
	var made adminapi.CreatedKey
	ownllm("users", "create", "--tenant", "local", "--email", "ann@example.com")
	if err := json.Unmarshal([]byte(ownllm("keys", "create", "--tenant", "local", "--user", "ann@example.com", "--json")), &made); err != nil {
		t.Fatal(err)
	}
	check := func(up *stack.Up) {
		t.Helper()
		for _, key := range []string{first.APIKey, made.Secret} {
			c := newClient(up.BaseURL, key)
			wantWhole(t, c.chat(t.Context(), true, nil))
			c.close()
		}
		if up.APIKey != first.APIKey || up.AdminToken != first.AdminToken {
			t.Error("the second run has other secrets than the first")
		}
	}
	check(first)
	if info, err := os.Stat(filepath.Join(dir, adminapi.ReadyFile)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("ready.json: %v, %v", info, err)
	}

	first.Kill()
	second := stack.StartUp(t, dir, "--backend", "demo")
	check(second)

	// A second one beside it is refused, and says why.
	out, err := exec.CommandContext(t.Context(), stack.Binary(t, stack.OwnLLM),
		append([]string{"up", "--data-dir", dir}, stack.FreePorts...)...).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "in use") {
		t.Errorf("a second ownllm up on the same data: %v\n%s", err, out)
	}
	check(second)

	if err := second.Stop(); err != nil {
		t.Errorf("stopped with %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, adminapi.ReadyFile)); !os.IsNotExist(err) {
		t.Errorf("ready.json is left behind: %v", err)
	}
	check(stack.StartUp(t, dir, "--backend", "demo"))
}

// TestUnreachable: a role whose dependency isn't there says so, and exits with 3.
func TestUnreachable(t *testing.T) {
	nowhere := stack.FreeAddr(t)
	database := pgtest.New(t)
	for _, c := range []struct {
		name, url, want string
	}{
		{"NATS", database, "NATS"},
		{"Postgres", "postgres://me@" + nowhere + "/x", "database"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), stack.Binary(t, stack.OwnLLM), "edge", "--nats-url", "nats://"+nowhere,
				"--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0")
			cmd.Env = append(os.Environ(), "OWNLLM_DATABASE_URL="+c.url, "OWNLLM_NATS_TOKEN=a-secret")
			out, err := cmd.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 3 || !strings.Contains(string(out), c.want) {
				t.Errorf("ended with %v:\n%s", err, out)
			}
		})
	}
}
