package command

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/access"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/ingress"
	"github.com/ownllm/ownllm/broker/orphan"
	"github.com/ownllm/ownllm/broker/quota"
	"github.com/ownllm/ownllm/broker/registry"
)

// brokerCommand is `ownllm broker`.
type brokerCommand struct {
	ConfigOptions
	BusOptions
	DatabaseOptions
	DeadlineOptions
	OpenOptions
	QueueOptions
	SubmissionOptions
	OpsOptions
	LogOptions
	ReportOptions
}

// QueueOptions shape the queue of jobs.
type QueueOptions struct {
	QueueBound    int64         `default:"256" placeholder:"N" help:"Jobs that one model of one agent may have, waiting and running together; more get queue_full. Default: 256."`
	QueueMaxAge   time.Duration `default:"1h" placeholder:"DURATION" help:"How long a job may lie in the queue at the most; longer than any --total-timeout. Default: 1h."`
	QueueReplicas int           `default:"1" placeholder:"N" help:"Copies of the queue in a NATS cluster: 1, 3 or 5. Default: 1."`
}

func (o QueueOptions) check(p *problems) {
	if o.QueueBound < 1 {
		p.add("--queue-bound: %d is less than 1", o.QueueBound)
	}
	if o.QueueMaxAge < time.Minute {
		p.add("--queue-max-age: %s is less than a minute", o.QueueMaxAge)
	}
	if o.QueueReplicas != 1 && o.QueueReplicas != 3 && o.QueueReplicas != 5 {
		p.add("--queue-replicas: %d isn't 1, 3 or 5", o.QueueReplicas)
	}
}

// Help shows examples.
func (brokerCommand) Help() string {
	return `Makes the queues, answers the workers and the publishers on NATS, and settles what dead
owners left behind. Run two, against the same NATS and Postgres.

Examples:

    export OWNLLM_DATABASE_URL=postgres://ownllm:…@db/ownllm OWNLLM_NATS_TOKEN=…
    ownllm broker --nats-url nats://nats:4222`
}

// amiss reports what is wrong with the secrets, which have no flag.
func (c *brokerCommand) amiss(env *Environment) error {
	return errors.Join(c.lacking(env), c.wrong(env))
}

// Validate reports all problems of the flags at once.
func (c *brokerCommand) Validate() error {
	var p problems
	c.BusOptions.check(&p)
	c.DatabaseOptions.check(&p, true)
	c.DeadlineOptions.check(&p)
	c.OpenOptions.check(&p)
	c.QueueOptions.check(&p)
	c.SubmissionOptions.check(&p)
	c.OpsOptions.check(&p)
	return p.err()
}

// Run serves until ctx ends.
func (c *brokerCommand) Run(ctx context.Context, env *Environment) error {
	log, err := c.logger(env)
	if err != nil {
		return err
	}
	log, flush, err := c.reporting(env, "ownllm-broker", log)
	if err != nil {
		return err
	}
	defer flush()
	natsConfig, err := c.BusOptions.config(env)
	if err != nil {
		return err
	}
	tel, err := startTelemetry(ctx, "ownllm-broker", log)
	if err != nil {
		return err
	}
	defer tel.stop(log)
	store, err := openBooks(ctx, c.DatabaseURL.Reveal(), c.DatabaseConns)
	if err != nil {
		return err
	}
	defer store.Close()
	own, err := newOwner(ctx, natsConfig, "ownllm-broker", store, tel, c.DeadlineOptions, c.OpenOptions, log)
	if err != nil {
		return err
	}
	defer own.close()
	office, err := newBackOffice(ctx, natsConfig, c.QueueOptions, store, own, log)
	if err != nil {
		return err
	}
	defer office.conns.close()
	scheduler, line, err := newScheduler(own, natsConfig, store, tel, c.SubmissionOptions, c.DrainTimeout, log)
	if err != nil {
		return err
	}
	defer line.close()
	door, err := newIngress(own, natsConfig, tel, scheduler, ingress.Config{Drain: c.DrainTimeout}, log)
	if err != nil {
		return err
	}
	defer door.close()
	callout, err := access.NewCallout(office.system, identities{store}, natsConfig.Password, log)
	if err != nil {
		return err
	}
	ops, err := listen("--ops-listen", c.OpsListen)
	if err != nil {
		return err
	}
	log.Info("broker is up", "operations", ops.Addr().String())
	parts := append([]part{opsPart(ops, tel, nil), {"callout", callout.Run}}, office.parts...)
	parts = append(parts, own.parts()...)
	return ended(log, runParts(ctx, append(parts, together(part{"submissions", scheduler.Run}, part{"ingress", door.Run}))...))
}

// backOffice is what a broker does: it serves the workers, and settles what dead owners
// have left behind.
type backOffice struct {
	conns
	system *nats.Conn // one of them
	parts  []part
}

// newBackOffice provisions the queue, and shares the table of agents with the owner.
func newBackOffice(ctx context.Context, natsConfig bus.Config, o QueueOptions, store *books.Store, own *owner, log *slog.Logger) (*backOffice, error) {
	c, err := connect(log,
		natsConfig.As(bus.UserCore, "ownllm-office"),
		natsConfig.As(bus.UserAgents, "ownllm-office-agents"),
		natsConfig.As(bus.UserSystem, "ownllm-office-system"))
	if err != nil {
		return nil, err
	}
	core, nc, system := c[0], c[1], c[2]
	queue, err := bus.NewQueue(core)
	if err == nil {
		err = queue.Provision(ctx, bus.QueueConfig{PerModel: o.QueueBound, MaxAge: o.QueueMaxAge, Replicas: o.QueueReplicas})
	}
	if err != nil {
		c.close()
		return nil, err
	}
	return &backOffice{conns: c, system: system, parts: []part{
		{"removals", (&removal{store: store, system: system, log: log}).run},
		{"registry", registry.New(nc, queue, store, own.agents, log).Run},
		{"sweeper", quota.NewSweeper(store, 0, log).Run},
		{"orphans", orphan.New(queue, store, own.agents, own.feed, log).Run},
	}}, nil
}
