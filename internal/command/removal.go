package command

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/nats-io/nats.go"
	"golang.org/x/sync/errgroup"

	"github.com/ownllm/ownllm/broker/access"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/schemas"
)

const (
	// removalEvery is how often the books are asked which agents were removed.
	removalEvery = 250 * time.Millisecond
	// removalAgain is when a removed agent is cut off once more: it may have been let in at
	// the moment of its removal.
	removalAgain = access.AuthTimeout + time.Second
	// removalParallel is how many agents are looked after at once.
	removalParallel = 16
)

// cutRemoved closes the connections of agents that are removed, until ctx ends. At first, and
// whenever the list of changes doesn't reach back far enough, it looks at all agents that are
// connected: one may have been removed while no broker ran. system is a connection of
// bus.UserSystem.
func cutRemoved(ctx context.Context, store *books.Store, system *nats.Conn, log *slog.Logger) error {
	var cuts errgroup.Group
	cuts.SetLimit(removalParallel)
	defer func() { _ = cuts.Wait() }()
	tick := time.NewTicker(removalEvery)
	defer tick.Stop()
	since := int64(-1)
	for {
		changes, err := store.Changes(ctx, since)
		if err == nil && changes.Reset {
			var connected []schemas.AgentID
			connected, err = access.Connected(ctx, system)
			for _, agent := range connected {
				cuts.Go(func() error {
					cutIfRemoved(ctx, store, system, agent, log)
					return nil
				})
			}
			if err != nil && !bus.Down(err) && ctx.Err() == nil {
				log.WarnContext(ctx, "connected agents not compared with the books", "error", err)
			}
		}
		if err == nil {
			since = changes.Version
		} // else others complain, and nothing is missed
		for _, c := range changes.Changes {
			if c.Kind == books.KindAgent {
				cuts.Go(func() error {
					cutIfRemoved(ctx, store, system, schemas.AgentID(c.ID), log)
					return nil
				})
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// cutIfRemoved cuts an agent off, unless the books have it. It asks until they answer.
func cutIfRemoved(ctx context.Context, store *books.Store, system *nats.Conn, agent schemas.AgentID, log *slog.Logger) {
	for {
		_, err := store.GetAgent(ctx, agent)
		var refused *schemas.Error
		switch {
		case err == nil:
			return
		case errors.As(err, &refused) && refused.Code == schemas.CodeNotFound:
			cut(ctx, system, agent, log)
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(removalEvery):
		}
	}
}

// cut closes the connections of an agent, now and once more a little later.
func cut(ctx context.Context, system *nats.Conn, agent schemas.AgentID, log *slog.Logger) {
	log.InfoContext(ctx, "agent was removed, its connections are closed", "agent", agent)
	for _, wait := range []time.Duration{0, removalAgain} {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		if err := access.Cut(ctx, system, agent); err != nil && ctx.Err() == nil {
			log.WarnContext(ctx, "agent not cut off", "agent", agent, "error", err)
		}
	}
}
