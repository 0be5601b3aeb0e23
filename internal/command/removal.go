package command

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"golang.org/x/sync/errgroup"

	"github.com/ownllm/ownllm/broker/access"
	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/keyring"
	"github.com/ownllm/ownllm/schemas"
)

const (
	// removalEvery is how often the books are asked what has changed.
	removalEvery = 250 * time.Millisecond
	// removalAgain is when connections are looked at once more: somebody may have been let in
	// at the moment of the change.
	removalAgain = access.AuthTimeout + time.Second
	// removalParallel is how many looks there are at once. One takes a second, most of which
	// is waiting.
	removalParallel = 16
	// removalAgents is how many agents are looked for one by one; if more change at once, all
	// agents are looked at.
	removalAgents = 8
)

// removal closes the connections of agents that are removed and of publishers whose keys
// aren't valid any more. At its start it looks at all who are connected, since they may have
// lost that right while no broker ran; then at those whom a change may concern; and when a
// key ends.
type removal struct {
	store  *books.Store
	system *nats.Conn // of bus.UserSystem
	log    *slog.Logger

	mu sync.Mutex
	// agenda says when to look where, by the clock of the books.
	agenda []appointment
}

type appointment struct {
	scope access.Scope
	at    time.Time
}

// run looks until ctx ends.
func (r *removal) run(ctx context.Context) error {
	var looks errgroup.Group
	looks.SetLimit(removalParallel)
	defer func() { _ = looks.Wait() }()
	tick := time.NewTicker(removalEvery)
	defer tick.Stop()
	since := int64(-1)
	for {
		changes, err := r.store.Changes(ctx, since)
		if err == nil { // else others complain, and nothing is missed
			since = changes.Version
			for scope := range r.due(changes) {
				looks.Go(func() error {
					r.look(ctx, scope, changes.AsOf)
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

// due returns where to look now.
func (r *removal) due(changes books.Changes) map[access.Scope]bool {
	touched := make(map[access.Scope]bool)
	agents := make(map[access.Scope]bool)
	for _, c := range changes.Changes {
		switch c.Kind {
		case books.KindAgent:
			agents[access.Scope{Account: access.AccountAgents, User: c.ID}] = true
		case books.KindKey, books.KindUser, books.KindTenant:
			touched[access.Scope{Account: access.AccountIngress}] = true
		}
	}
	if changes.Reset {
		touched[access.Scope{Account: access.AccountIngress}] = true
	}
	if changes.Reset || len(agents) > removalAgents {
		touched[access.Scope{Account: access.AccountAgents}] = true
	} else {
		for scope := range agents {
			touched[scope] = true
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	due := make(map[access.Scope]bool)
	r.agenda = slices.DeleteFunc(r.agenda, func(a appointment) bool {
		if a.at.After(changes.AsOf) {
			return false
		}
		due[a.scope] = true
		return true
	})
	for scope := range touched {
		due[scope] = true
		r.agenda = append(r.agenda, appointment{scope, changes.AsOf.Add(removalAgain)})
	}
	return due
}

// note has a scope looked at, at a time by the clock of the books.
func (r *removal) note(scope access.Scope, at time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if a := (appointment{scope, at}); !slices.Contains(r.agenda, a) {
		r.agenda = append(r.agenda, a)
	}
}

// look closes the connections in a scope whose users may not be there any more, and notes
// when the next of the others may not be. What can't be done now is done a little later.
func (r *removal) look(ctx context.Context, scope access.Scope, asOf time.Time) {
	var next time.Time
	ended := r.endedAgents
	if scope.Account == access.AccountIngress {
		ended = func(ctx context.Context, users []string) ([]string, error) {
			list, end, err := r.endedPublishers(ctx, users)
			if !end.IsZero() && (next.IsZero() || end.Before(next)) {
				next = end
			}
			return list, err
		}
	}
	err := access.Sweep(ctx, r.system, scope, ended)
	if !next.IsZero() {
		r.note(scope, next)
	}
	if err == nil || ctx.Err() != nil {
		return
	}
	r.note(scope, asOf)
	if !bus.Down(err) {
		r.log.WarnContext(ctx, "connections not looked at, will try again", "account", scope.Account, "error", err)
	}
}

// endedAgents returns those of the agents that were removed.
func (r *removal) endedAgents(ctx context.Context, users []string) (ended []string, err error) {
	ids := make([]schemas.AgentID, len(users))
	for i, user := range users {
		ids[i] = schemas.AgentID(user)
	}
	present, err := r.store.PresentAgents(ctx, ids)
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		if !present[id] {
			r.log.InfoContext(ctx, "agent was removed, its connections are closed", "agent", id)
			ended = append(ended, string(id))
		}
	}
	return ended, nil
}

var errNoKey = errors.New("no key has this secret")

// endedPublishers returns those of the users whose keys aren't valid, and when the first of
// the other keys ends, if one does.
func (r *removal) endedPublishers(ctx context.Context, users []string) (ended []string, next time.Time, err error) {
	hashes := make([]apikey.Hash, len(users))
	for i, user := range users {
		_, hashes[i], _ = access.ParsePublisherUser(user)
	}
	known, err := r.store.LookupKeys(ctx, hashes)
	if err != nil {
		return nil, time.Time{}, err
	}
	for i, user := range users {
		id, ok := known[hashes[i]]
		err := errNoKey
		if ok {
			err = keyring.Judge(id)
		}
		switch {
		case err != nil:
			key, _, _ := access.ParsePublisherUser(user)
			r.log.InfoContext(ctx, "key is not valid any more, its connections are closed", "key", key, "error", err)
			ended = append(ended, user)
		case id.ExpiresAt != nil && (next.IsZero() || id.ExpiresAt.Before(next)):
			next = *id.ExpiresAt
		}
	}
	return ended, next, nil
}
