package command

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/internal/secret"
	"github.com/ownllm/ownllm/schemas"
)

const otherPairing = "ownllm_pair_decafdecafdecafdecafdecafdecafde"

func pairAnswer(natsURL string) map[string]any {
	return map[string]any{"POST /api/v1/agents/pair": adminapi.PairedAgent{
		Agent: agentID, Tenant: tenantID, Credential: testCredential, NATSURL: natsURL,
	}}
}

// What a pairing gives is kept, for its owner alone, and does for every later start; the
// same key again changes nothing, and another pairs anew.
func TestPairOnce(t *testing.T) {
	server := newAdmin(t, pairAnswer("wss://nats.example.com"))
	dir := filepath.Join(t.TempDir(), "new")
	var logged bytes.Buffer
	env := &Environment{Getenv: func(string) string { return "" }, Stdin: strings.NewReader(otherPairing + "\n")}
	start := func(o PairOptions) identity {
		t.Helper()
		id, err := o.identity(t.Context(), env, dir, slog.New(slog.NewTextHandler(&logged, nil)))
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	first := start(PairOptions{Pair: testPairing, Server: server.URL})
	if first.Agent != agentID || first.Tenant != tenantID || first.Credential != testCredential ||
		first.natsURL() != "wss://nats.example.com" || first.Server != server.URL {
		t.Errorf("%+v", first)
	}
	info, err := os.Stat(filepath.Join(dir, pairedFile))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	kept, err := os.ReadFile(filepath.Join(dir, pairedFile))
	if err != nil || bytes.Contains(kept, []byte(testPairing)) {
		t.Errorf("kept %s, %v", kept, err)
	}
	var asked adminapi.PairAgent
	_, body, _ := strings.Cut(server.asked()[0], "{")
	if err := json.Unmarshal([]byte("{"+body), &asked); err != nil || asked.PairingKey != testPairing ||
		len(asked.MachineIDHash) != 64 || asked.CPUCores < 1 || asked.OS == "" || asked.Name == "" {
		t.Errorf("asked %+v, %v", asked, err)
	}
	if id, err := os.ReadFile("/etc/machine-id"); err == nil && len(id) > 8 && strings.Contains(body, strings.TrimSpace(string(id))) {
		t.Error("the machine's id itself was told")
	}
	if server.bearers["Bearer "] || !server.bearers[""] {
		t.Errorf("authorization %v", server.bearers)
	}
	for _, o := range []PairOptions{{}, {Pair: testPairing, Server: server.URL}, {Server: server.URL}} {
		if again := start(o); again != first {
			t.Errorf("%+v", again)
		}
	}
	if n := len(server.asked()); n != 1 {
		t.Errorf("paired %d times", n)
	}
	if moved := start(PairOptions{Server: "https://elsewhere.example.com"}); moved.Server != "https://elsewhere.example.com" {
		t.Errorf("%+v", moved)
	}
	if again := start(PairOptions{PairFile: "-", Server: server.URL}); again.Pairing == first.Pairing || len(server.asked()) != 2 {
		t.Error("another pairing key wasn't used")
	}
	for _, text := range []string{testPairing, otherPairing, testCredential} {
		if strings.Contains(logged.String(), text) {
			t.Errorf("a secret is in the log: %s", &logged)
		}
	}
}

func TestPairingFails(t *testing.T) {
	refusal := func(e *schemas.Error) *admin { return newAdmin(t, map[string]any{"POST /api/v1/agents/pair": e}) }
	used := refusal(schemas.Errorf(schemas.CodeKeyInvalid, "The pairing key was already used.").WithParam("pairing_key"))
	paired := refusal(schemas.Errorf(schemas.CodeInvalidValue, "This machine is already paired.").WithParam("machine_id_hash"))
	nobody := nowhere(t)
	empty := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(empty, []byte("\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		env  map[string]string
		args string
		code int
		want []string
	}{
		"used":           {nil, "--pair " + testPairing + " --server " + used.URL, ExitFailed, []string{"wasn't paired", "already used", "(key_invalid)"}},
		"by environment": {map[string]string{"OWNLLM_PAIR": testPairing, "OWNLLM_SERVER": used.URL}, "", ExitFailed, []string{"already used"}},
		"machine":        {nil, "--pair " + testPairing + " --server " + paired.URL, ExitFailed, []string{"already paired", "--machine-id"}},
		"nobody there":   {nil, "--pair " + testPairing + " --server " + nobody, ExitUnreachable, []string{"can't reach the server at " + nobody, "connection refused"}},
		"no server":      {nil, "--pair " + testPairing, ExitUsage, []string{"--pair needs --server"}},
		"bad server":     {nil, "--pair " + testPairing + " --server localhost", ExitUsage, []string{"--server", `"localhost"`}},
		"not a key":      {nil, "--pair " + testCredential + " --server " + nobody, ExitUsage, []string{"--pair: the pairing key is invalid", "32 hexadecimal digits"}},
		"no such file":   {nil, "--pair-file /nonexistent --server " + nobody, ExitUsage, []string{"/nonexistent"}},
		"empty file":     {nil, "--pair-file " + empty + " --server " + nobody, ExitUsage, []string{"empty"}},
		"not paired":     {nil, "--server " + nobody, ExitUsage, []string{"isn't paired", "ownllm agents pair"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			got := run(t, tc.env, append([]string{"worker", "--data-dir", dir, "--ops-listen", "127.0.0.1:0"}, strings.Fields(tc.args)...)...)
			if got.code != tc.code || got.stdout != "" {
				t.Errorf("exit code %d, want %d; %s", got.code, tc.code, got.stdout)
			}
			for _, part := range tc.want {
				if !strings.Contains(got.stderr, part) {
					t.Errorf("stderr lacks %q:\n%s", part, got.stderr)
				}
			}
			if strings.Contains(got.stderr, "admin token") || strings.Contains(got.stderr, "c0ffee") || strings.Contains(got.stderr, "canary") {
				t.Errorf("stderr has too much:\n%s", got.stderr)
			}
			if _, err := os.Stat(filepath.Join(dir, pairedFile)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("something is kept: %v", err)
			}
		})
	}
}

func TestWhereTheBusIs(t *testing.T) {
	for _, tc := range []struct {
		id   identity
		want string
	}{
		{identity{}, ""},
		{identity{NATSURL: "wss://n", Server: "https://s"}, "wss://n"},
		{identity{Server: "http://10.0.0.7:9191"}, "nats://10.0.0.7:4222"},
		{identity{Server: "https://ownllm.example.com/api/v1"}, "tls://ownllm.example.com:4222"},
		{identity{Server: "http://[fd00::1]:9191"}, "nats://[fd00::1]:4222"},
	} {
		if got := tc.id.natsURL(); got != tc.want {
			t.Errorf("%+v: %q, want %q", tc.id, got, tc.want)
		}
	}
	for _, bad := range []string{"http://h", "nats://u:canary@h", "h:4222"} {
		var p problems
		if (AgentOptions{bad}).check(&p); p.err() == nil || strings.Contains(p.err().Error(), "canary") {
			t.Errorf("%q: %v", bad, p.err())
		}
	}
	var p problems
	AgentOptions{"wss://nats.example.com"}.check(&p)
	PairOptions{Pair: secret.String(testPairing), Server: "http://h"}.check(&p)
	if err := p.err(); err != nil {
		t.Error(err)
	}
}
