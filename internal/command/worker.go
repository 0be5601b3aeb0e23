package command

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"

	"github.com/ownllm/ownllm/internal/secret"
	"github.com/ownllm/ownllm/worker"
	"github.com/ownllm/ownllm/worker/backend"
	"github.com/ownllm/ownllm/worker/demo"
)

// workerCommand is `ownllm worker`.
type workerCommand struct {
	ConfigOptions
	BackendOptions
	PairOptions
	NATSOptions
	DataOptions
	DrainOptions
	OpsOptions
	LogOptions
	ReportOptions
}

// Help shows examples.
func (workerCommand) Help() string {
	return `Serves the models of this machine. It only dials out. Without --backend the usual
local ports are probed; if nothing answers there, the demo model serves.

The first run needs a pairing key, which an admin makes by ownllm agents pair. What it gets
for that is kept in the data directory, and does for every later run. If the agent is removed,
the worker ends with exit code 2, and has to be paired again.

Examples:

    ownllm worker --pair-file key.txt --server https://ownllm.example.com
    ownllm worker
    ownllm worker --nats-url wss://nats.example.com --backend http://127.0.0.1:11434 --model llama3.3=llama-3.3-70b`
}

// amiss reports what is wrong with a secret, which has no flag.
func (c *workerCommand) amiss(env *Environment) error { return c.wrong(env) }

// Validate reports all problems of the flags at once.
func (c *workerCommand) Validate() error {
	var p problems
	c.BackendOptions.check(&p)
	c.PairOptions.check(&p)
	c.NATSOptions.check(&p)
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
	log, flush, err := c.reporting(env, "ownllm-worker", log)
	if err != nil {
		return err
	}
	defer flush()
	dir, err := c.dir(env)
	if err != nil {
		return err
	}
	own, err := c.PairOptions.identity(ctx, env, dir, log)
	if err != nil {
		return err
	}
	natsConfig := c.NATSOptions.address()
	natsConfig.URL = cmp.Or(natsConfig.URL, own.natsURL())
	if natsConfig.URL == "" {
		return usageError{errors.New("--nats-url is needed: the address of NATS, nats://host:4222 say")}
	}
	tel, err := startTelemetry(ctx, "ownllm-worker", log)
	if err != nil {
		return err
	}
	defer tel.stop(log)
	backends, parts, err := c.BackendOptions.open(ctx, env, log)
	if err != nil {
		return err
	}
	beside, err := newAside(own)
	if err != nil {
		return err
	}
	defer beside.close()
	w, leave, err := newWorker(natsConfig, own, beside.or(), backends, c.DrainTimeout, tel, log)
	if err != nil {
		return err
	}
	defer leave()
	ops, err := listen("--ops-listen", c.OpsListen)
	if err != nil {
		return err
	}
	log.Info("worker is up", "agent", own.Agent, "operations", ops.Addr().String())
	err = runParts(ctx, append(parts, opsPart(ops, tel, nil), part{"worker", w.Run})...)
	if errors.Is(err, worker.ErrRemoved) {
		return usageError{fmt.Errorf("%w. Make a pairing key with `ownllm agents pair`, and start the worker with it once", worker.ErrRemoved)}
	}
	return ended(log, err)
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
