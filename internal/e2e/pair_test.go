package e2e

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// paired is what a worker keeps of its pairing.
type paired struct {
	Agent      schemas.AgentID `json:"agent_id"`
	Credential string          `json:"credential"`
}

// TestPairing makes agents of machines as people do it: by the command line, from the
// pairing key to the removal.
func TestPairing(t *testing.T) {
	up := stack.StartUp(t, t.TempDir(), "--backend", "demo")
	backend := stack.StartBackend(t, demo.Options{Models: []schemas.Model{model("rig-model", nil)}})
	server := strings.TrimSuffix(up.AdminURL, adminapi.Prefix)
	ownllm := func(into any, args ...string) {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), stack.Binary(t, stack.OwnLLM), append(args, "--data-dir", up.DataDir, "--json")...).Output()
		if err == nil {
			err = json.Unmarshal(out, into)
		}
		if err != nil {
			t.Fatalf("ownllm %s: %v", strings.Join(args, " "), err)
		}
	}
	var keys []string
	pairingKey := func(args ...string) string {
		t.Helper()
		var p adminapi.Pairing
		ownllm(&p, append([]string{"agents", "pair", "--tenant", "local"}, args...)...)
		keys = append(keys, p.Secret)
		return p.Secret
	}
	worker := func(dir, key string, args ...string) *stack.Process {
		t.Helper()
		var env []string
		if key != "" {
			env = []string{"OWNLLM_PAIR=" + key, "OWNLLM_SERVER=" + server}
		}
		args = append([]string{"worker", "--data-dir", dir, "--backend", backend.URL, "--ops-listen", "127.0.0.1:0"}, args...)
		return stack.Run(t, "worker", env, stack.Binary(t, stack.OwnLLM), args...)
	}
	agent := func(id schemas.AgentID) *adminapi.Agent {
		t.Helper()
		var list adminapi.List[adminapi.Agent]
		ownllm(&list, "agents", "list")
		for _, a := range list.Data {
			if a.ID == id {
				return &a
			}
		}
		return nil
	}
	identity := func(dir string) (id paired) {
		t.Helper()
		path := filepath.Join(dir, "worker.json")
		stack.Until(t, 30*time.Second, "the worker to keep who it is", func() bool { _, err := os.Stat(path); return err == nil })
		b, err := os.ReadFile(path)
		if err == nil {
			err = json.Unmarshal(b, &id)
		}
		if err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%v, %v", info, err)
		}
		return id
	}

	// Two workers race for one key.
	raced := pairingKey()
	dirs := []string{t.TempDir(), t.TempDir()}
	rivals := []*stack.Process{worker(dirs[0], raced, "--machine-id", "a"), worker(dirs[1], raced, "--machine-id", "b")}
	stack.Until(t, 30*time.Second, "one of two to be refused", func() bool { return !rivals[0].Alive() || !rivals[1].Alive() })
	won := 0
	if !rivals[0].Alive() {
		won = 1
	}
	loser, winner := rivals[1-won], rivals[won]
	if exitCode(loser) != 1 || !logged(loser, "already used") {
		t.Errorf("the loser ended with %v:\n%s", loser.Err(), strings.Join(loser.Log(), "\n"))
	}
	id := identity(dirs[won])
	stack.Until(t, 30*time.Second, "the agent to be up", func() bool {
		a := agent(id.Agent)
		return a != nil && a.State == adminapi.AgentUp && len(a.Models) == 1
	})
	if m := agent(id.Agent).Machine; m == nil || m.CPUCores == 0 || m.RAMMB == 0 || m.OS == "" {
		t.Errorf("machine %+v", m)
	}
	c := newClient(up.BaseURL, up.APIKey)
	defer c.close()
	wantWhole(t, c.chat(t.Context(), true, map[string]any{"model": "rig-model"}))

	// The next start needs no key, and one that was used does no harm.
	if err := winner.Stop(); err != nil {
		t.Error(err)
	}
	for _, key := range []string{"", raced} {
		again := worker(dirs[won], key)
		stack.Until(t, 30*time.Second, "the worker to serve again", func() bool { return logged(again, "serving model") })
		stack.Until(t, 30*time.Second, "the edge to hear of it", func() bool { return agent(id.Agent).State == adminapi.AgentUp })
		wantWhole(t, c.chat(t.Context(), true, map[string]any{"model": "rig-model"}))
		if now := identity(dirs[won]); now != id {
			t.Error("another identity")
		}
		if err := again.Stop(); err != nil {
			t.Error(err)
		}
	}

	// What else is refused says so.
	brief := pairingKey("--ttl", "1s")
	time.Sleep(1200 * time.Millisecond) // by the clock of the database
	for _, test := range []struct{ key, machine, says string }{
		{brief, "c", "has expired"},
		{"ownllm_pair_" + strings.Repeat("0", 32), "c", "no such key"},
		{pairingKey(), string(rune('a' + won)), "already paired"},
	} {
		p := worker(t.TempDir(), test.key, "--machine-id", test.machine)
		stack.Until(t, 30*time.Second, "a refusal", func() bool { return !p.Alive() })
		if exitCode(p) != 1 || !logged(p, test.says) {
			t.Errorf("%s: %v", test.says, p.Err())
		}
	}

	// Removed, it is cut off at once, and doesn't get in again.
	last := worker(dirs[won], "")
	stack.Until(t, 30*time.Second, "the worker to serve again", func() bool { return logged(last, "serving model") })
	var gone adminapi.Agent
	ownllm(&gone, "agents", "remove", string(id.Agent))
	removed := time.Now()
	stack.Until(t, time.Second+busyCores, "the worker to be cut off", func() bool { return logged(last, "bus connection lost") })
	t.Logf("cut off %s after the removal", time.Since(removed))
	stack.Until(t, time.Second+busyCores, "the agent to be gone", func() bool { return agent(id.Agent) == nil })
	stack.Until(t, 30*time.Second, "the worker to be turned away", func() bool { return logged(last, "turns this worker away") })
	r := c.chat(t.Context(), true, map[string]any{"model": "rig-model"})
	if r.code() != string(schemas.CodeModelNotFound) {
		t.Errorf("a model that only a removed agent had: %+v", r)
	}
	// Its machine can be paired anew.
	anew := worker(dirs[won], pairingKey(), "--machine-id", string(rune('a'+won)))
	stack.Until(t, 30*time.Second, "the worker to serve again", func() bool { return logged(anew, "serving model") })
	if identity(dirs[won]).Agent == id.Agent {
		t.Error("the same agent")
	}

	// The removed worker sees that, and ends so that no service manager starts it again.
	stack.Until(t, 60*time.Second, "the removed worker to end", func() bool { return !last.Alive() })
	if exitCode(last) != 2 || !logged(last, "ownllm agents pair") {
		t.Errorf("the removed worker ended with %v", last.Err())
	}
	if n := strings.Count(strings.Join(last.Log(), "\n"), "\n"); n > 20 {
		t.Errorf("the removed worker printed %d lines", n)
	}

	for _, secret := range append(keys, id.Credential, identity(dirs[won]).Credential) {
		for _, p := range []*stack.Process{up.Process, winner, loser, last, anew} {
			if strings.Contains(strings.Join(p.Log(), "\n"), secret) {
				t.Error("a secret is in the output")
			}
		}
		err := filepath.WalkDir(filepath.Join(up.DataDir, "nats"), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			if b, err := os.ReadFile(path); err == nil && strings.Contains(string(b), secret) {
				t.Errorf("a secret is in %s", path)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
}

// exitCode is with what a process ended that couldn't do what it was to do.
func exitCode(p *stack.Process) int {
	var exit *exec.ExitError
	if !errors.As(p.Err(), &exit) {
		return 0
	}
	return exit.ExitCode()
}

func logged(p *stack.Process, text string) bool {
	return strings.Contains(strings.Join(p.Log(), "\n"), text)
}
