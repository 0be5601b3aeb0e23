package command

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/ownllm/ownllm/internal/secret"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker"
	"github.com/ownllm/ownllm/worker/backend"
	"github.com/ownllm/ownllm/worker/demo"
)

// workerCommand is `ownllm worker`.
type workerCommand struct {
	BackendOptions
	NATSOptions
	DataOptions
	DrainOptions
	OpsOptions
	Tenant string `placeholder:"ID" help:"Id of the tenant that the machine serves, ten_…; see ownllm tenants list."`
	LogOptions
}

// Help shows examples.
func (workerCommand) Help() string {
	return `Serves the models of this machine. It only dials out. Without --backend the usual
local ports are probed; if nothing answers there, the demo model serves.

Examples:

    export OWNLLM_NATS_TOKEN=…
    ownllm worker --nats-url nats://broker.example.com:4222 --tenant ten_01K…
    ownllm worker --nats-url … --tenant … --backend http://127.0.0.1:11434 --model llama3.3=llama-3.3-70b`
}

// Validate reports all problems of the flags at once.
func (c *workerCommand) Validate() error {
	var p problems
	c.BackendOptions.check(&p)
	c.NATSOptions.check(&p)
	if err := schemas.ValidateID(c.Tenant, "ten_"); err != nil {
		p.add("--tenant: %w", err)
	}
	c.DrainOptions.check(&p)
	c.OpsOptions.check(&p)
	return p.err()
}

// Run serves until ctx ends, and then drains.
func (c *workerCommand) Run(ctx context.Context, env *Environment) error {
	log, err := c.logger(env)
	if err != nil {
		return err
	}
	dir, err := c.dir(env)
	if err != nil {
		return err
	}
	natsConfig, err := c.NATSOptions.config(env)
	if err != nil {
		return err
	}
	tel, err := startTelemetry(ctx, "ownllm-worker", log)
	if err != nil {
		return err
	}
	defer tel.stop(log)
	agent, err := agentID(dir)
	if err != nil {
		return err
	}
	backends, parts, err := c.BackendOptions.open(ctx, env, log)
	if err != nil {
		return err
	}
	tokens, bulk, err := connect(natsConfig, "worker", log)
	if err != nil {
		return err
	}
	defer tokens.Close()
	defer bulk.Close()
	ops, err := listen("--ops-listen", c.OpsListen)
	if err != nil {
		return err
	}
	w := worker.New(tokens, bulk, workerConfig(schemas.TenantID(c.Tenant), agent, backends, c.DrainTimeout, tel), log)
	log.Info("worker is up", "agent", agent, "operations", ops.Addr().String())
	return runParts(ctx, append(parts, opsPart(ops, tel, nil), part{"worker", w.Run})...)
}

func workerConfig(tenant schemas.TenantID, agent schemas.AgentID, backends []backend.Config, drain time.Duration, tel *tele) worker.Config {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	return worker.Config{
		Tenant: tenant, Agent: agent, Host: host, Software: Version(),
		Backends: backends, Drain: drain, Metrics: tel.metrics, Tracer: tel.tracer,
	}
}

// agentID is the id of this machine, made on its first run and kept in dir.
func agentID(dir string) (schemas.AgentID, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("--data-dir: %w", err)
	}
	path := filepath.Join(dir, "agent.id")
	if b, err := os.ReadFile(path); err == nil {
		id := strings.TrimSpace(string(b))
		if err := schemas.ValidateID(id, "agt_"); err != nil {
			return "", fmt.Errorf("%s: %w. Remove the file to get a new one", path, err)
		}
		return schemas.AgentID(id), nil
	} else if !os.IsNotExist(err) {
		return "", err
	}
	id := schemas.NewAgentID()
	return id, writeFile(path, string(id))
}

// demoName is the backend that stands for the built-in demo model.
const demoName = "demo"

// open finds the backends. The demo model needs a server of its own, which is
// returned as a part to run.
func (o BackendOptions) open(ctx context.Context, env *Environment, log *slog.Logger) ([]backend.Config, []part, error) {
	key, err := o.key(env)
	if err != nil {
		return nil, nil, err
	}
	common := o.config(key)
	names := o.Backend
	if len(names) == 0 {
		for _, b := range backend.Discover(ctx, common) {
			names = append(names, b.URL())
			b.Close()
		}
		if len(names) == 0 {
			log.Info("no inference server found on the usual ports (11434, 8000, 8080, 1234, 30000), the demo model serves")
			names = []string{demoName}
		}
	}
	var configs []backend.Config
	var parts []part
	for _, name := range names {
		cfg := common
		cfg.URL = name
		if name == demoName {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return nil, nil, fmt.Errorf("demo model: %w", err)
			}
			cfg.URL, cfg.Key = "http://"+l.Addr().String(), ""
			parts = append(parts, part{"demo", func(ctx context.Context) error { return demo.Serve(ctx, l, demo.Options{}) }})
		}
		configs = append(configs, cfg)
	}
	return configs, parts, nil
}

// config is what all backends have in common.
func (o BackendOptions) config(key secret.String) backend.Config {
	cfg := backend.Config{Key: key, Slots: o.Slots}
	if len(o.Model) > 0 {
		cfg.Models = make(map[string]string, len(o.Model))
		for _, m := range o.Model {
			cfg.Models[m.ID] = m.Alias
		}
	}
	if len(o.Capability) > 0 {
		cfg.Capabilities = make(map[string][]string, len(o.Capability))
		for _, c := range o.Capability {
			cfg.Capabilities[c.Model] = append(cfg.Capabilities[c.Model], c.Names...)
		}
	}
	return cfg
}
