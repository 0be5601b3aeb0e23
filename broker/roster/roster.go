// Package roster keeps a table of agents true to the books: an agent that was paired is in it
// before its first heartbeat, and one that was removed isn't, whatever is still on its way.
package roster

import (
	"context"
	"errors"
	"maps"
	"sync"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/presence"
	"github.com/ownllm/ownllm/schemas"
)

// Roster is safe for concurrent use.
type Roster struct {
	store *books.Store
	table *presence.Table
	wake  chan struct{} // holds one token: there is something to do

	mu  sync.Mutex
	all bool // anything may have changed
	// due are the agents to look up.
	due map[schemas.AgentID]bool
	// removed are agents that were removed, until when they are kept out: a heartbeat may
	// be on its way, or the connection not cut yet.
	removed map[schemas.AgentID]time.Time
}

const (
	// lookEvery is how often a look at the books that failed is tried again, and removed
	// agents are thrown out again.
	lookEvery = 250 * time.Millisecond
	lookWait  = 5 * time.Second
	// keptOut is how long a removed agent is kept out. Its connection is cut within a
	// second.
	keptOut = 30 * time.Second
)

// New returns a roster that makes the table true to the books of the store.
func New(store *books.Store, table *presence.Table) *Roster {
	return &Roster{
		store: store, table: table,
		wake: make(chan struct{}, 1), due: make(map[schemas.AgentID]bool), removed: make(map[schemas.AgentID]time.Time),
	}
}

// Changed notes a change of the books; see keyring.OnChange.
func (r *Roster) Changed(kind books.Kind, id string) {
	if kind != books.KindAgent && kind != "" {
		return
	}
	r.mu.Lock()
	if kind == "" {
		r.all = true
	} else {
		r.due[schemas.AgentID(id)] = true
	}
	r.mu.Unlock()
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// take returns what is to be looked up.
func (r *Roster) take() (ids []schemas.AgentID, all bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id := range r.due {
		ids = append(ids, id)
	}
	all = r.all
	r.all = false
	clear(r.due)
	return ids, all
}

// Run works until ctx ends. It returns nil.
func (r *Roster) Run(ctx context.Context) error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		ids, all := r.take()
		for _, id := range ids {
			if err := r.look(ctx, id); err != nil {
				r.Changed(books.KindAgent, string(id))
			}
		}
		if all {
			if err := r.lookAtAll(ctx); err != nil {
				r.Changed("", "")
			}
		}
		r.keepOut(time.Now())
		wake := r.wake
		if len(ids) > 0 || all {
			wake = nil // what failed is tried again, but not at once
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-wake:
		}
	}
}

// Restore tells the table of every agent that the books know. It belongs before Run.
func (r *Roster) Restore(ctx context.Context) error {
	return r.each(ctx, func(books.Agent) {})
}

// each tells the table of every agent that the books know, and calls f with each.
func (r *Roster) each(ctx context.Context, f func(books.Agent)) error {
	for p := (books.Page{Limit: 1000}); ; {
		list, next, err := r.store.ListAgents(ctx, "", p)
		if err != nil {
			return err
		}
		for _, a := range list {
			f(a)
			r.table.Restore(knownAgent(a))
		}
		if p.After = next; next == "" {
			return nil
		}
	}
}

// look makes the table true about one agent.
func (r *Roster) look(ctx context.Context, id schemas.AgentID) error {
	ctx, cancel := context.WithTimeout(ctx, lookWait)
	defer cancel()
	a, err := r.store.GetAgent(ctx, id)
	var refused *schemas.Error
	switch {
	case errors.As(err, &refused) && refused.Code == schemas.CodeNotFound:
		r.mu.Lock()
		r.removed[id] = time.Now().Add(keptOut)
		r.mu.Unlock()
	case err != nil:
		return err
	default:
		r.table.Restore(knownAgent(a))
	}
	return nil
}

// lookAtAll makes the table true about every agent that was made or removed. One that is in
// the table and not yet in the books stays if it is heard of: it comes back.
func (r *Roster) lookAtAll(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, lookWait)
	defer cancel()
	before := r.table.Agents("")
	known := make(map[schemas.AgentID]bool)
	if err := r.each(ctx, func(a books.Agent) { known[a.ID] = true }); err != nil {
		return err
	}
	for _, a := range before {
		if !known[a.Agent] {
			r.Changed(books.KindAgent, string(a.Agent))
		}
	}
	return nil
}

func knownAgent(a books.Agent) presence.Known {
	return presence.Known{Tenant: a.Tenant, Agent: a.ID, Name: a.Name, LastSeen: a.LastSeen, Inventory: a.Inventory}
}

// keepOut throws removed agents out of the table. Whoever waits for one is told first that
// it is gone.
func (r *Roster) keepOut(now time.Time) {
	r.mu.Lock()
	maps.DeleteFunc(r.removed, func(_ schemas.AgentID, until time.Time) bool { return now.After(until) })
	removed := maps.Clone(r.removed)
	r.mu.Unlock()
	if len(removed) == 0 {
		return
	}
	for _, a := range r.table.Agents("") {
		if _, ok := removed[a.Agent]; ok {
			r.table.Lost(a.Tenant, a.Agent, "")
			r.table.Forget(a.Tenant, a.Agent)
		}
	}
}
