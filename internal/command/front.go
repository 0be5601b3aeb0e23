package command

import (
	"context"
	"log/slog"
	"net"

	"github.com/nats-io/nats.go"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/broker/keyring"
	"github.com/ownllm/ownllm/broker/presence"
	"github.com/ownllm/ownllm/broker/quota"
	"github.com/ownllm/ownllm/edge"
	"github.com/ownllm/ownllm/internal/secret"
	"github.com/ownllm/ownllm/schemas"
)

// front is an edge with all that it stands on, but the books.
type front struct {
	conns
	tokens, bulk *nats.Conn // two of them
	core, system *nats.Conn // and two more
	agents       *presence.Table
	feed         *presence.Feed
	gate         *quota.Gate
	dispatcher   *dispatch.Dispatcher
	keys         *keyring.Keyring
	edge         *edge.Edge
}

type frontOptions struct {
	http       HTTPOptions
	deadlines  DeadlineOptions
	limits     LimitOptions
	adminToken secret.String
	// agentNATSURL is the address of NATS that machines are told; without one it is that of
	// this edge, with natsPort, if that isn't empty.
	agentNATSURL, natsPort string
}

func newFront(ctx context.Context, natsConfig bus.Config, store *books.Store, tel *tele, o frontOptions, log *slog.Logger) (*front, error) {
	c, err := connect(log,
		natsConfig.As(bus.UserAgents, "ownllm-edge"),
		natsConfig.As(bus.UserAgents, "ownllm-edge-bulk"),
		natsConfig.As(bus.UserCore, "ownllm-edge-queue"),
		natsConfig.As(bus.UserSystem, "ownllm-edge-system"))
	if err != nil {
		return nil, err
	}
	f := &front{conns: c, tokens: c[0], bulk: c[1], core: c[2], system: c[3], agents: presence.NewTable()}
	if err := f.assemble(ctx, store, tel, o, log); err != nil {
		f.close()
		return nil, err
	}
	return f, nil
}

func (f *front) assemble(ctx context.Context, store *books.Store, tel *tele, o frontOptions, log *slog.Logger) error {
	if err := restore(ctx, store, f.agents); err != nil {
		return err
	}
	queue, err := bus.NewQueue(f.core)
	if err != nil {
		return err
	}
	f.feed = presence.NewFeed(f.tokens, f.agents, log)
	cfg := dispatch.DefaultConfig()
	cfg.ColdWait, cfg.FirstToken = o.deadlines.ColdWait, o.deadlines.FirstTokenTimeout
	cfg.Idle, cfg.Total = o.deadlines.IdleTimeout, o.deadlines.TotalTimeout
	f.gate = quota.New(store, quota.Config{OpenTokens: o.limits.OpenTokens}, log)
	f.dispatcher = dispatch.New(dispatch.Parts{
		Tokens: f.tokens, Bulk: f.bulk, Queue: queue, Agents: f.agents, Feed: f.feed, Gate: f.gate,
		Metrics: tel.metrics, Tracer: tel.tracer, Log: log,
	}, cfg)
	f.keys = keyring.New(store, log)
	f.edge = edge.New(edge.Config{
		CertFile: o.http.TLSCert, KeyFile: o.http.TLSKey, TrustedProxies: o.http.TrustedProxy,
		BaseDomain: o.http.BaseDomain, CORSOrigins: o.http.CORSOrigin, BodyLimit: int(o.http.BodyLimit),
		FailureRate: o.limits.FailureRate, FailureBurst: o.limits.FailureBurst,
		AgentNATSURL: o.agentNATSURL, NATSPort: o.natsPort,
		AdminToken: o.adminToken.Reveal(), Drain: o.deadlines.DrainTimeout, Version: Version(),
	}, edge.Parts{
		Keys: f.keys, Agents: f.agents, Feed: f.feed, Aside: f.feed, Dispatcher: f.dispatcher, Gate: f.gate, Books: store, Queue: queue,
		Metrics: tel.metrics, Tracer: tel.tracer, Log: log,
	})
	return nil
}

// parts are what has to run before the edge can serve.
func (f *front) parts() []part {
	return []part{
		{"keyring", f.keys.Run},
		{"gate", f.gate.Run},
		{"dispatcher", f.dispatcher.Run},
		{"presence", f.feed.Run},
		{"connections", watchConnections(f.feed, f.system)},
	}
}

func (f *front) serve(l net.Listener) part {
	return part{"edge", func(ctx context.Context) error { return f.edge.Serve(ctx, l) }}
}

// watchConnections is a part that tells the feed of agents whose connections close.
func watchConnections(feed *presence.Feed, system *nats.Conn) func(context.Context) error {
	return func(ctx context.Context) error { return feed.WatchConnections(ctx, system) }
}

// restore tells the table of the agents that the books know.
func restore(ctx context.Context, store *books.Store, table *presence.Table) error {
	for cursor := ""; ; {
		list, next, err := store.ListAgents(ctx, "", books.Page{After: cursor})
		if err != nil {
			return unavailable(err)
		}
		for _, a := range list {
			table.Restore(presence.Known{Tenant: a.Tenant, Agent: a.ID, Name: a.Name, LastSeen: a.LastSeen, Inventory: a.Inventory})
		}
		if cursor = next; cursor == "" {
			return nil
		}
	}
}

// models are the ids that the agents of a tenant offer right now.
func (f *front) models(tenant string) []string {
	models, _ := f.agents.Models(schemas.TenantID(tenant))
	ids := make([]string, 0, len(models))
	for _, m := range models {
		ids = append(ids, m.ID)
	}
	return ids
}
