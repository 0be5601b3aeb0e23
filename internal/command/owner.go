package command

import (
	"context"
	"log/slog"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/desk"
	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/broker/keyring"
	"github.com/ownllm/ownllm/broker/metric"
	"github.com/ownllm/ownllm/broker/presence"
	"github.com/ownllm/ownllm/broker/quota"
	"github.com/ownllm/ownllm/broker/roster"
	"github.com/ownllm/ownllm/schemas"
)

// owner is what a process needs that owns requests, whichever door they come in by, but the
// books.
type owner struct {
	conns
	tokens, bulk *nats.Conn // two of them
	core, system *nats.Conn // and two more
	queue        *bus.Queue
	agents       *presence.Table
	feed         *presence.Feed
	gate         *quota.Gate
	dispatcher   *dispatch.Dispatcher
	keys         *keyring.Keyring
	roster       *roster.Roster
	desk         *desk.Desk
}

// newOwner connects and assembles. The role begins the names of the connections.
func newOwner(ctx context.Context, natsConfig bus.Config, role string, store *books.Store, tel *tele, d DeadlineOptions, o OpenOptions, log *slog.Logger) (*owner, error) {
	c, err := connect(log,
		natsConfig.As(bus.UserAgents, role),
		natsConfig.As(bus.UserAgents, role+"-bulk"),
		natsConfig.As(bus.UserCore, role+"-queue"),
		natsConfig.As(bus.UserSystem, role+"-system"))
	if err != nil {
		return nil, err
	}
	w := &owner{conns: c, tokens: c[0], bulk: c[1], core: c[2], system: c[3], agents: presence.NewTable()}
	if err := w.assemble(ctx, store, tel, d, o, log); err != nil {
		w.close()
		return nil, err
	}
	return w, nil
}

func (w *owner) assemble(ctx context.Context, store *books.Store, tel *tele, d DeadlineOptions, o OpenOptions, log *slog.Logger) (err error) {
	w.roster = roster.New(store, w.agents)
	if err := w.roster.Restore(ctx); err != nil {
		return unavailable(err)
	}
	if w.queue, err = bus.NewQueue(w.core); err != nil {
		return err
	}
	w.feed = presence.NewFeed(w.tokens, w.agents, log)
	cfg := dispatch.DefaultConfig()
	cfg.ColdWait, cfg.FirstToken = d.ColdWait, d.FirstTokenTimeout
	cfg.Idle, cfg.Total = d.IdleTimeout, d.TotalTimeout
	w.gate = quota.New(store, quota.Config{OpenTokens: o.OpenTokens}, log)
	w.dispatcher = dispatch.New(dispatch.Parts{
		Tokens: w.tokens, Bulk: w.bulk, Queue: w.queue, Agents: w.agents, Feed: w.feed, Gate: w.gate,
		Metrics: tel.metrics, Tracer: tel.tracer, Log: log,
	}, cfg)
	w.keys = keyring.New(store, log)
	w.keys.OnChange(w.roster.Changed)
	w.desk = desk.New(w.agents, w.feed)
	return metric.WatchAgents(tel.MeterProvider(), w.countAgents)
}

// countAgents counts the agents of all tenants by their state.
func (w *owner) countAgents() map[schemas.AgentState]int64 {
	count := make(map[schemas.AgentState]int64)
	for _, a := range w.agents.Agents("") {
		switch {
		case a.State != "" && a.State != schemas.AgentBye:
			count[a.State]++
		case a.Aside:
			count[metric.StateAside]++
		default:
			count[metric.StateAway]++
		}
	}
	return count
}

// parts are what has to run before a door can open.
func (w *owner) parts() []part {
	return []part{
		{"keyring", w.keys.Run},
		{"roster", w.roster.Run},
		{"gate", w.gate.Run},
		{"dispatcher", w.dispatcher.Run},
		{"presence", w.feed.Run},
		{"connections", func(ctx context.Context) error { return w.feed.WatchConnections(ctx, w.system) }},
	}
}

// models are the ids that the agents of a tenant offer right now.
func (w *owner) models(tenant string) []string {
	models, _ := w.agents.Models(schemas.TenantID(tenant))
	ids := make([]string, 0, len(models))
	for _, m := range models {
		ids = append(ids, m.ID)
	}
	return ids
}
