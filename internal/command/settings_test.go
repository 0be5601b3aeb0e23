package command

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// parseCommand parses a command line with a file and an environment.
func parseCommand(t *testing.T, file string, env map[string]string, args ...string) (*cli, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ownllm.yaml")
	if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
		t.Fatal(err)
	}
	for i, arg := range args {
		args[i] = strings.ReplaceAll(arg, "FILE", path)
	}
	for name, value := range env {
		env[name] = strings.ReplaceAll(value, "FILE", path)
	}
	c := &cli{}
	parser, err := newParser(t.Context(), c, &Environment{Getenv: func(name string) string { return env[name] }})
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = parse(parser, args)
	return c, err
}

const wholeFile = `
# one file for all roles
nats-url: nats://file:4222
database-url: postgres://file/db
listen: :1
idle-timeout: 7s
body-limit: 1MB
trusted-proxy: [10.0.0.0/8, "fd00::/8"]
queue-replicas: 3
cors-origin: "*"
capability: ["a:tools", "b:tools|vision"]
`

// Flags go before the environment, and that before the file.
func TestConfigFile(t *testing.T) {
	token := map[string]string{"OWNLLM_NATS_TOKEN": "secret"}
	c, err := parseCommand(t, wholeFile, map[string]string{
		"OWNLLM_NATS_TOKEN": "secret", "OWNLLM_NATS_URL": "nats://env:4222", "OWNLLM_LISTEN": ":2", "OWNLLM_CONFIG": "FILE",
	}, "edge", "--listen", ":3")
	if err != nil {
		t.Fatal(err)
	}
	e := c.Edge
	if e.Listen != ":3" || e.NATSURL != "nats://env:4222" || e.DatabaseURL != "postgres://file/db" || e.IdleTimeout != 7*time.Second ||
		e.BodyLimit != 1<<20 || len(e.TrustedProxy) != 2 || len(e.CORSOrigin) != 1 || e.TotalTimeout != 10*time.Minute {
		t.Errorf("the edge has %+v", e)
	}
	if c, err = parseCommand(t, wholeFile, token, "broker", "--config", "FILE"); err != nil || c.Broker.QueueReplicas != 3 || c.Broker.NATSURL != "nats://file:4222" {
		t.Errorf("the broker has %+v, %v", c.Broker, err)
	}
	if c, err = parseCommand(t, wholeFile, nil, "worker", "--config=FILE"); err != nil || len(c.Worker.Capability) != 2 || c.Worker.Capability[1].Model != "b" {
		t.Errorf("the worker has %+v, %v", c.Worker, err)
	}
	if _, err = parseCommand(t, "", token, "broker", "--config=FILE", "--nats-url=nats://n", "--database-url=postgres://p/d"); err != nil {
		t.Errorf("an empty file: %v", err)
	}
}

// Whatever is wrong is said at once: with the file, the environment, the flags, and the
// secrets.
func TestAllSourcesAtOnce(t *testing.T) {
	_, err := parseCommand(t, `
nats-url: http://wrong
idle-timeout: soon
lisen: :1
json: true
config: other.yaml
database-conns: {most: 3}
ops-listen: [":1", ":2"]
trusted-proxy: [10.0.0.0/8, moon]
log-format: xml
total-timeout: 1s
`, map[string]string{"OWNLLM_BODY_LIMIT": "much", "OWNLLM_CONFIG": "FILE", "SENTRY_DSN": "https://canary"}, "edge", "--open-tokens", "0")
	if err == nil {
		t.Fatal("there is no problem")
	}
	for _, want := range []string{
		"--nats-url: an address doesn't look like",
		"ownllm.yaml, idle-timeout: ", `"soon"`,
		`ownllm.yaml, line 4: there is no flag "lisen"`,
		`line 5: there is no flag "json"`, // of other commands
		`line 6: there is no flag "config"`,
		"line 7: database-conns is neither a value nor a list of values",
		"ownllm.yaml, ops-listen: there can be only one",
		"ownllm.yaml, trusted-proxy: ", "moon",
		`ownllm.yaml, log-format: "xml" is none of text,json`,
		"--total-timeout: 1s is shorter than",
		`$OWNLLM_BODY_LIMIT: "much" isn't a size`,
		"--open-tokens: 0 isn't from 1",
		"--database-url is needed",
		"the shared secret of NATS is needed",
		"the DSN of Sentry doesn't look like",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q isn't said", want)
		}
	}
	if strings.Contains(err.Error(), "canary") {
		t.Error("a secret is said")
	}
	if t.Failed() {
		t.Log(err)
	}
	for file, want := range map[string]string{
		"- a\n- b\n":               "isn't a list of flags",
		"listen: :1\nlisten: :2\n": "isn't a list of flags",
		"listen:\n":                "line 1: listen is neither",
	} {
		if _, err := parseCommand(t, file, nil, "up", "--config=FILE"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", file, err, want)
		}
	}
	if _, err := parseCommand(t, "", nil, "up", "--config=none.yaml"); err == nil || !strings.Contains(err.Error(), "--config: open none.yaml") {
		t.Errorf("without the file: %v", err)
	}
	if _, err := parseCommand(t, "", nil, "status", "--config=FILE"); err == nil {
		t.Error("a command that isn't a role takes a file")
	}
}
