package sdk

import (
	"bufio"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/internal/secret"
	"github.com/ownllm/ownllm/internal/stack"
)

// TestSDKs runs all checks, with every error of the contract.
func TestSDKs(t *testing.T) {
	needScripts(t)
	if to := targetFromEnv(t); to.BaseURL != "" {
		to.check(t)
		return
	}
	to := newHousehold(t).target()
	checkCodes(t, to.Cases)
	to.check(t)
}

// TestRealModel runs those of a real model behind a real llama.cpp server.
func TestRealModel(t *testing.T) {
	needScripts(t)
	url, model := startRealModel(t)
	up := stack.StartUp(t, t.TempDir(), "--backend", url)
	if !slices.Contains(up.Models, model) {
		t.Fatalf("the models are %q, not %q", up.Models, model)
	}
	admin, err := adminapi.NewClient(up.AdminURL, secret.String(up.AdminToken))
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close()
	agents, err := admin.Agents(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if len(agents) != 1 || len(agents[0].Models) != 1 || agents[0].Models[0].Backend != "llamacpp" {
		t.Errorf("the agents are %+v", agents)
	}
	target{BaseURL: up.BaseURL, APIKey: up.APIKey, RealModel: model}.checkRealModel(t)
}

// startRealModel starts the server of scripts/realmodel, which ends with the test.
func startRealModel(t *testing.T) (url, model string) {
	t.Helper()
	cmd := exec.Command(filepath.Join(scripts, ".venv/bin/python"), filepath.Join(scripts, "realmodel/serve.py"), "--stdin")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = stdin.Close()
		_ = cmd.Wait() // it exits at once, whatever it does
		if b, err := os.ReadFile(log.Name()); t.Failed() && err == nil {
			t.Logf("--- output of the real model:\n%s", b)
		}
	})
	var ready struct{ URL, Model string }
	line, err := bufio.NewReader(stdout).ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &ready)
	}
	if err != nil {
		t.Fatalf("the real model isn't up: %q: %v", line, err)
	}
	return ready.URL, ready.Model
}
