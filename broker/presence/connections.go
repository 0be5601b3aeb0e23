package presence

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"golang.org/x/sync/errgroup"

	"github.com/ownllm/ownllm/schemas"
)

const (
	// returnWait is how long a worker that lost its connection is given to come back: it
	// tries after 100 to 200 ms.
	returnWait = 400 * time.Millisecond
	// returnAgain is how long after that it is asked for once more, since a link that fails
	// once may fail again.
	returnAgain = 150 * time.Millisecond
	// closedAsk bounds the question whether it is there.
	closedAsk = 500 * time.Millisecond
	// closedParallel is how many connections are looked after at once. Beyond that, as when
	// a server goes down, a missed beat tells.
	closedParallel = 64
)

// WatchConnections hears from the bus of connections that close, until ctx ends, so that
// the end of a worker shows before it misses a beat. system is a connection to the bus's
// own account.
//
// A connection that closes says nothing of the worker: a worker that lost its link comes
// back, and goes on with what it runs. So it is given a moment, and then its control
// subject is asked; if nobody is there, its run is over.
func (f *Feed) WatchConnections(ctx context.Context, system *nats.Conn) error {
	closed := make(chan *nats.Msg, 4096)
	sub, err := system.ChanSubscribe("$SYS.ACCOUNT.AGENTS.DISCONNECT", closed)
	if err != nil {
		return fmt.Errorf("listen to connections that close: %w", err)
	}
	defer sub.Unsubscribe()
	var group errgroup.Group
	group.SetLimit(closedParallel)
	defer func() { _ = group.Wait() }()
	for {
		select {
		case <-ctx.Done():
			return nil
		case m := <-closed:
			var event struct {
				Client struct {
					User string `json:"user"`
					Name string `json:"name"`
				} `json:"client"`
			}
			if err := json.Unmarshal(m.Data, &event); err != nil {
				f.log.Warn("word of a closed connection dropped", "error", err)
				continue
			}
			tenant, incarnation, ok := schemas.ParseConnectionName(event.Client.Name)
			if !ok {
				continue // not one that matters, of a worker or of somebody else
			}
			// The user is who the bus knows it to be. The name is the worker's own word, and
			// by that it can end no run but its own.
			agent := schemas.AgentID(event.Client.User)
			group.TryGo(func() error {
				f.lookFor(ctx, tenant, agent, incarnation)
				return nil
			})
		}
	}
}

// lookFor ends the run of an agent unless somebody is there for the agent after a moment.
func (f *Feed) lookFor(ctx context.Context, tenant schemas.TenantID, agent schemas.AgentID, incarnation schemas.Incarnation) {
	for _, wait := range []time.Duration{returnWait, returnAgain} {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		askCtx, cancel := context.WithTimeout(ctx, closedAsk)
		question := schemas.Control{Operation: schemas.ControlInventory}.Encode()
		_, err := f.nc.RequestWithContext(askCtx, schemas.ControlSubject(agent), question)
		cancel()
		if !errors.Is(err, nats.ErrNoResponders) {
			return // it is there, or the feed finds out by missed beats
		}
	}
	f.table.Lost(tenant, agent, incarnation)
}
