package command

import (
	"context"
	"errors"

	"github.com/ownllm/ownllm/broker/books"
)

// edgeCommand is `ownllm edge`.
type edgeCommand struct {
	ConfigOptions
	ListenOptions
	HTTPOptions
	BusOptions
	AgentOptions
	DatabaseOptions
	DeadlineOptions
	OpenOptions
	LimitOptions
	AdminTokenFile string `placeholder:"FILE" help:"File with the admin token, - for standard input; or give the token itself in $$OWNLLM_ADMIN_TOKEN. Without one the admin API is closed."`
	LogOptions
	ReportOptions
}

// OpenOptions say what a request gets that states no limit itself.
type OpenOptions struct {
	OpenTokens int64 `default:"1024" placeholder:"N" help:"Tokens that are reserved at first for a reply whose client gave no limit; more are asked for as it goes on. Default: 1024."`
}

func (o OpenOptions) check(p *problems) {
	if o.OpenTokens < 1 || o.OpenTokens > books.MaxTokens {
		p.add("--open-tokens: %d isn't from 1 to %d", o.OpenTokens, int64(books.MaxTokens))
	}
}

// LimitOptions bound what one address may get wrong.
type LimitOptions struct {
	FailureRate  float64 `default:"20" placeholder:"N" help:"Bad requests that one address may make each second. Default: 20."`
	FailureBurst int     `default:"200" placeholder:"N" help:"Bad requests that one address may make at once. Default: 200."`
}

func (o LimitOptions) check(p *problems) {
	if o.FailureRate <= 0 {
		p.add("--failure-rate: %g isn't more than 0", o.FailureRate)
	}
	if o.FailureBurst < 1 {
		p.add("--failure-burst: %d is less than 1", o.FailureBurst)
	}
}

// Help shows examples.
func (edgeCommand) Help() string {
	return `Serves the OpenAI-compatible API, against a NATS and a Postgres that run already.

Examples:

    export OWNLLM_DATABASE_URL=postgres://ownllm:…@db/ownllm OWNLLM_NATS_TOKEN=…
    ownllm edge --nats-url nats://nats:4222 --listen :9191
    ownllm edge --nats-url tls://nats:4222 --tls-cert cert.pem --tls-key key.pem --base-domain ownllm.example.com`
}

// amiss reports what is wrong with the secrets, which have no flag.
func (c *edgeCommand) amiss(env *Environment) error { return errors.Join(c.lacking(env), c.wrong(env)) }

// Validate reports all problems of the flags at once.
func (c *edgeCommand) Validate() error {
	var p problems
	c.ListenOptions.check(&p)
	c.HTTPOptions.check(&p)
	c.BusOptions.check(&p)
	c.AgentOptions.check(&p)
	c.DatabaseOptions.check(&p, true)
	c.DeadlineOptions.check(&p)
	c.OpenOptions.check(&p)
	c.LimitOptions.check(&p)
	return p.err()
}

// Run serves until ctx ends.
func (c *edgeCommand) Run(ctx context.Context, env *Environment) error {
	log, err := c.logger(env)
	if err != nil {
		return err
	}
	log, flush, err := c.reporting(env, "ownllm-edge", log)
	if err != nil {
		return err
	}
	defer flush()
	token, err := env.secret("OWNLLM_ADMIN_TOKEN", c.AdminTokenFile)
	if err != nil {
		return err
	}
	natsConfig, err := c.BusOptions.config(env)
	if err != nil {
		return err
	}
	tel, err := startTelemetry(ctx, "ownllm-edge", log)
	if err != nil {
		return err
	}
	defer tel.stop(log)
	store, err := openBooks(ctx, c.DatabaseURL.Reveal(), c.DatabaseConns)
	if err != nil {
		return err
	}
	defer store.Close()
	own, err := newOwner(ctx, natsConfig, "ownllm-edge", store, tel, c.DeadlineOptions, c.OpenOptions, log)
	if err != nil {
		return err
	}
	defer own.close()
	door := newEdge(own, store, tel, frontOptions{
		http: c.HTTPOptions, deadlines: c.DeadlineOptions, limits: c.LimitOptions, adminToken: token, agentNATSURL: c.AgentNATSURL,
	}, log)
	api, ops, err := c.ListenOptions.open()
	if err != nil {
		return err
	}
	log.Info("edge is up", "address", api.Addr().String(), "operations", ops.Addr().String())
	return ended(log, runParts(ctx, append(own.parts(), opsPart(ops, tel, door), serveHTTP(door, api))...))
}
