package command

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// roles is a grammar of all the shared flags.
type roles struct {
	Edge   edgeFlags   `cmd:""`
	Worker workerFlags `cmd:""`
}

type edgeFlags struct {
	BusOptions
	DatabaseOptions
	ListenOptions
	HTTPOptions
	DeadlineOptions
	LogOptions
}

func (f *edgeFlags) Validate() error {
	var p problems
	f.BusOptions.check(&p)
	f.DatabaseOptions.check(&p, true)
	f.ListenOptions.check(&p)
	f.HTTPOptions.check(&p)
	f.DeadlineOptions.check(&p)
	return p.err()
}

type workerFlags struct {
	DataOptions
	NATSOptions
	DatabaseOptions
	BackendOptions
}

func (f *workerFlags) Validate() error {
	var p problems
	f.NATSOptions.check(&p)
	f.DatabaseOptions.check(&p, false)
	f.BackendOptions.check(&p)
	return p.err()
}

func parseRole(t *testing.T, env map[string]string, args ...string) (roles, error) {
	t.Helper()
	var r roles
	parser, err := newParser(t.Context(), &r, &Environment{Getenv: func(name string) string { return env[name] }})
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = parse(parser, args)
	return r, err
}

// The defaults of interface.md. Only addresses of others have none.
func TestDefaults(t *testing.T) {
	env := map[string]string{"OWNLLM_NATS_URL": "nats://n:4222", "OWNLLM_DATABASE_URL": "postgres://p/db"}
	r, err := parseRole(t, env, "edge")
	if err != nil {
		t.Fatal(err)
	}
	want := edgeFlags{
		BusOptions:      BusOptions{NATSOptions: NATSOptions{NATSURL: "nats://n:4222"}},
		DatabaseOptions: DatabaseOptions{"postgres://p/db", 8},
		ListenOptions:   ListenOptions{"127.0.0.1:9191", OpsOptions{"127.0.0.1:9192"}},
		HTTPOptions:     HTTPOptions{BodyLimit: 32 << 20},
		DeadlineOptions: DeadlineOptions{5 * time.Second, 120 * time.Second, 60 * time.Second, 10 * time.Minute, DrainOptions{30 * time.Second}},
		LogOptions:      LogOptions{slog.LevelInfo, "text"},
	}
	if diff := cmp.Diff(want, r.Edge, compare...); diff != "" {
		t.Errorf("edge, -want +got:\n%s", diff)
	}
	delete(env, "OWNLLM_DATABASE_URL")
	if r, err = parseRole(t, env, "worker"); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(workerFlags{DataOptions: DataOptions{"~/.ownllm"}, NATSOptions: want.NATSOptions, DatabaseOptions: DatabaseOptions{DatabaseConns: 8}}, r.Worker, compare...); diff != "" {
		t.Errorf("worker, -want +got:\n%s", diff)
	}
}

var compare = []cmp.Option{
	cmpopts.EquateEmpty(),
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
}

func TestFlags(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "f.pem")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := parseRole(t, map[string]string{"OWNLLM_LISTEN": ":1", "OWNLLM_IDLE_TIMEOUT": "7s", "OWNLLM_CORS_ORIGIN": "https://a.example,*"},
		"edge", "--nats-url", "nats://a:4222,tls://b:4222", "--nats-token-file", file, "--nats-tls-ca", file,
		"--nats-tls-cert", file, "--nats-tls-key", file, "--database-url", "postgresql://u:p@h/db",
		"--listen", "0.0.0.0:0", "--ops-listen", "[::1]:9192", "--tls-cert", file, "--tls-key", file,
		"--trusted-proxy", "10.0.0.0/8", "--trusted-proxy", "fd00::/8", "--base-domain", "ownllm.app",
		"--body-limit", "1GiB", "--drain-delay", "3s", "--cold-wait", "0s", "--log-level", "debug", "--log-format", "json")
	if err != nil {
		t.Fatal(err)
	}
	want := edgeFlags{
		BusOptions:      BusOptions{NATSOptions{"nats://a:4222,tls://b:4222", file, file, file}, TokenOptions{file}},
		DatabaseOptions: DatabaseOptions{"postgresql://u:p@h/db", 8},
		ListenOptions:   ListenOptions{"0.0.0.0:0", OpsOptions{"[::1]:9192"}},
		HTTPOptions: HTTPOptions{
			file, file, []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")},
			"ownllm.app", []string{"https://a.example", "*"}, 1 << 30, 3 * time.Second,
		},
		DeadlineOptions: DeadlineOptions{0, 120 * time.Second, 7 * time.Second, 10 * time.Minute, DrainOptions{30 * time.Second}},
		LogOptions:      LogOptions{slog.LevelDebug, "json"},
	}
	if diff := cmp.Diff(want, r.Edge, compare...); diff != "" {
		t.Errorf("edge, -want +got:\n%s", diff)
	}
	if out := fmt.Sprintf("%+v %#v", r.Edge, r.Edge); strings.Contains(out, "u:p@") {
		t.Errorf("the options print a password: %s", out)
	}

	r, err = parseRole(t, nil, "worker", "--nats-url", "nats://n", "--backend", "demo", "--backend", "http://127.0.0.1:8000",
		"--slots", "4", "--model", "qwen2.5:32b=qwen", "--model", "llama",
		"--capability", "qwen2.5:32b:tools|vision", "--capability", "llama:thinking")
	if err != nil {
		t.Fatal(err)
	}
	backends := BackendOptions{
		Backend: []string{"demo", "http://127.0.0.1:8000"}, Slots: 4,
		Model: []Offer{{"qwen2.5:32b", "qwen"}, {"llama", "llama"}},
		Capability: []Capability{
			{"qwen2.5:32b", []string{"tools", "vision"}},
			{"llama", []string{"thinking"}},
		},
	}
	if diff := cmp.Diff(backends, r.Worker.BackendOptions, compare...); diff != "" {
		t.Errorf("worker, -want +got:\n%s", diff)
	}
}

// All that is wrong is reported at once, and no password with it.
func TestAllProblemsAtOnce(t *testing.T) {
	for name, tc := range map[string]struct {
		args string
		want []string
	}{
		"edge": {
			"edge --nats-tls-ca /nonexistent/ca --nats-tls-cert /nonexistent/cert --tls-key /nonexistent/key " +
				"--listen 9191 --ops-listen :99999 --base-domain https://x --cors-origin x --body-limit 0 " +
				"--first-token-timeout 0s --idle-timeout=-1s --drain-timeout=-1s",
			[]string{
				"--nats-url is needed", "--nats-tls-cert and --nats-tls-key", "/nonexistent/ca", "/nonexistent/cert",
				"--database-url is needed", "--tls-cert and --tls-key", "/nonexistent/key", `--listen: "9191"`, `"99999" isn't a port`,
				"--base-domain", "--cors-origin", "--body-limit", "--first-token-timeout", "--idle-timeout: -1s", "--drain-timeout: -1s",
			},
		},
		"secret addresses": {
			"worker --nats-url http://u:canary@h --database-url mysql://u:canary@h/db",
			[]string{"--nats-url: an address doesn't look like", "--database-url: the address doesn't look like"},
		},
		"worker": {
			"worker --backend ftp://x --slots=-1 --model a=x --model b=x",
			[]string{`--backend: "ftp://x"`, "--slots: -1", `"x"`},
		},
		"more of the edge": {
			"edge --listen x/y:1 --total-timeout 1s --first-token-timeout 2s",
			[]string{`"x/y" isn't a host`, "--total-timeout: 1s is shorter"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := parseRole(t, nil, strings.Fields(tc.args)...)
			if err == nil {
				t.Fatal("no problems")
			}
			for _, part := range tc.want {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("no word of %q", part)
				}
			}
			if strings.Contains(err.Error(), "canary") {
				t.Errorf("a password is printed: %v", err)
			}
			if t.Failed() {
				t.Log(err)
			}
		})
	}
}

func TestValues(t *testing.T) {
	for text, want := range map[string]ByteSize{
		"0": 0, "17": 17, "17B": 17, "512KB": 512 << 10, "512kib": 512 << 10, "32MB": 32 << 20, "32 MiB": 32 << 20, "2GB": 2 << 30,
	} {
		var s ByteSize
		if err := s.UnmarshalText([]byte(text)); err != nil || s != want {
			t.Errorf("%q = %d, %v; want %d", text, s, err, want)
		}
	}
	for _, text := range []string{"", "MB", "-1", "1.5MB", "1TB", "9999999999GB", "x"} {
		var s ByteSize
		if err := s.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q is %d bytes", text, s)
		}
	}
	for _, text := range []string{"", "=x", "x="} {
		var o Offer
		if err := o.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q is the offer %v", text, o)
		}
	}
	for _, text := range []string{"", "model", ":tools", "model:", "model:tools|fly"} {
		var c Capability
		if err := c.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q is the capability %v", text, c)
		}
	}
}

func TestSecretsOfTheRoles(t *testing.T) {
	file := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(file, []byte(" of-file \n"), 0o600); err != nil {
		t.Fatal(err)
	}
	env := &Environment{Getenv: func(name string) string {
		return map[string]string{"OWNLLM_NATS_TOKEN": "nats", "OWNLLM_BACKEND_KEY": "backend"}[name]
	}}
	if s, err := (TokenOptions{}).token(env); err != nil || s.Reveal() != "nats" {
		t.Errorf("%q, %v", s.Reveal(), err)
	}
	if s, err := (BackendOptions{}).key(env); err != nil || s.Reveal() != "backend" {
		t.Errorf("%q, %v", s.Reveal(), err)
	}
	if s, err := (BackendOptions{BackendKeyFile: file}).key(env); err != nil || s.Reveal() != "of-file" {
		t.Errorf("%q, %v", s.Reveal(), err)
	}
}

func TestLogger(t *testing.T) {
	var out strings.Builder
	log, err := LogOptions{LogLevel: slog.LevelWarn, LogFormat: "json"}.logger(&Environment{Stderr: &out})
	if err != nil {
		t.Fatal(err)
	}
	log.Info("quiet")
	log.Warn("loud")
	if !strings.Contains(out.String(), `"msg":"loud"`) || strings.Contains(out.String(), "quiet") {
		t.Errorf("%s", out.String())
	}
}
