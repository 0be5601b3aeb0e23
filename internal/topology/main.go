// Command topology runs docker-compose.yml without Docker: the same programs with the same
// arguments, variables, configuration files and certificates, as plain processes on this
// machine. Only addresses and folders differ, and what watches (the collector, Prometheus,
// Grafana) isn't there.
//
//	go run ./internal/topology
//
// It builds what it runs, starts it in the order of depends_on, waits by the health checks,
// and writes topology.json into its folder once all is up. An interrupt ends everything, in
// the opposite order; so does a process that ends by itself.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
)

// options are the flags.
type options struct {
	file, dir, otlp             string
	ownllm, natsServer, haproxy string
}

// Topology is what topology.json holds. It has secrets, so its mode is 0600.
type Topology struct {
	PID int `json:"pid"`
	// Edges are the base URLs of the edges, and Balancer that of what is in front of them,
	// empty if there is no HAProxy.
	Edges    []string `json:"edges"`
	Balancer string   `json:"balancer,omitempty"`
	// Ops are the operations ports of the roles, by service.
	Ops         map[string]string `json:"ops"`
	NATSURLs    []string          `json:"nats_urls"`
	CAFile      string            `json:"ca_file"`
	DatabaseURL string            `json:"database_url"`
	APIKey      string            `json:"api_key"`
	AdminToken  string            `json:"admin_token"`
	NATSToken   string            `json:"nats_token"`
}

func main() {
	var o options
	flag.StringVar(&o.file, "file", "docker-compose.yml", "what to run")
	flag.StringVar(&o.dir, "dir", "", "folder for data, logs and topology.json; empty: a temporary one, which is removed at the end")
	flag.StringVar(&o.otlp, "otlp", "", "address of an OpenTelemetry collector, http://127.0.0.1:4318 say; empty: traces stay where they are")
	flag.StringVar(&o.ownllm, "ownllm", "", "the program; empty: it is built")
	flag.StringVar(&o.natsServer, "nats-server", "", "nats-server; empty: it is built")
	flag.StringVar(&o.haproxy, "haproxy", "", "HAProxy; empty: the one in PATH, or none")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, o)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "topology:", err)
		os.Exit(1)
	}
}

// run starts everything, and stops it when ctx ends.
func run(ctx context.Context, o options) (err error) {
	if o.dir == "" {
		if o.dir, err = os.MkdirTemp("", "ownllm-topology-"); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(o.dir)) }()
	}
	if o.dir, err = filepath.Abs(o.dir); err != nil {
		return err
	}
	// PostgreSQL, which may run as another user, reads its key here.
	if err := os.MkdirAll(filepath.Join(o.dir, "bin"), 0o755); err != nil {
		return err
	}
	if err := os.Chmod(o.dir, 0o755); err != nil {
		return err
	}
	if err := o.build(ctx); err != nil {
		return err
	}
	file, err := readCompose(o.file)
	if err != nil {
		return err
	}
	s := newSite(o, file)
	defer func() { err = errors.Join(err, s.stop()) }()
	if err := s.startAll(ctx); err != nil {
		return err
	}
	t, err := s.describe()
	if err != nil {
		return err
	}
	b, err := json.MarshalIndent(t, "", " ")
	if err != nil {
		return err
	}
	path := filepath.Join(o.dir, "topology.json")
	if err := os.WriteFile(path+".part", b, 0o600); err != nil {
		return err
	}
	if err := os.Rename(path+".part", path); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(path)) }()
	fmt.Printf("All is up.\n\n  base URLs  %v %s\n  API key    %s\n  more       %s\n", t.Edges, t.Balancer, t.APIKey, path)
	return s.wait(ctx)
}

// build puts the programs into the folder bin.
func (o *options) build(ctx context.Context) error {
	for _, p := range []struct{ given, name, pkg string }{
		{o.ownllm, "ownllm", "github.com/ownllm/ownllm"},
		{o.natsServer, "nats-server", "github.com/nats-io/nats-server/v2"},
	} {
		path := filepath.Join(o.dir, "bin", p.name)
		if p.given == "" {
			if out, err := exec.CommandContext(ctx, "go", "build", "-o", path, p.pkg).CombinedOutput(); err != nil {
				return fmt.Errorf("build %s: %w\n%s", p.name, err, out)
			}
			continue
		}
		_ = os.Remove(path)
		if err := os.Symlink(p.given, path); err != nil {
			return err
		}
	}
	if o.haproxy == "" {
		o.haproxy, _ = exec.LookPath("haproxy") // without it there is none
	}
	return nil
}
