// Package keyring says who a key or an agent's credential stands for and whether it is
// valid now. It keeps what it has looked up in memory, so that a request costs no query.
//
// # What it promises
//
// A change in the books takes effect within a second: revocation, expiry, a
// suspended tenant, a deactivated user, a removed agent.
//
// That comes from a poll. Run asks the books for changes four times a second, and
// throws out of memory whatever they touch before it notes that the poll succeeded.
// An entry may be used only while the last successful poll was begun less than a
// second ago, by the monotonic clock; so what it says was true less than a second
// ago. When polls fail, and before the first, every request asks the books, and if
// they can't be reached it is refused.
//
// An answer that was read before a change and comes in after it was polled must not
// stay: each answer carries the version of the books that it was read at, and one
// that is older than the last poll is used once and not kept. Requests for the same key
// share a lookup only while that is young. Expiry is held against the clock of the
// database, which every poll and every lookup bring along.
package keyring

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/credential"
	"github.com/ownllm/ownllm/schemas"
)

const (
	// maxStale bounds how old the last successful poll may be for memory to be used.
	maxStale = time.Second
	// pollEvery leaves room for a poll or two to fail within maxStale.
	pollEvery   = 250 * time.Millisecond
	pollTimeout = time.Second

	// lookupTimeout bounds how long a request waits for the books.
	lookupTimeout = 2 * time.Second
	// shareFor is how old a lookup may be for another request to wait for its answer.
	shareFor = 250 * time.Millisecond
	// missingFor is how long an unknown key is known to be unknown.
	missingFor = 500 * time.Millisecond

	// maxEntries and maxMissing bound the memory, in keys. Only keys that exist get
	// among the entries.
	maxEntries = 65_536
	maxMissing = 4_096
)

// Store is what the keyring needs of the books.
type Store interface {
	LookupKey(ctx context.Context, hash apikey.Hash) (books.Identity, error)
	LookupKeyID(ctx context.Context, key schemas.KeyID) (books.Identity, error)
	LookupAgent(ctx context.Context, hash credential.Hash) (books.AgentIdentity, error)
	Changes(ctx context.Context, since int64) (books.Changes, error)
}

// Keyring is safe for concurrent use.
type Keyring struct {
	store Store
	log   *slog.Logger
	max   int // entries

	// polled is the last successful poll; nil: none yet.
	polled atomic.Pointer[poll]

	// mu guards what follows. Whoever throws entries out raises the version with them.
	mu      sync.RWMutex
	hooks   []func(books.Kind, string)
	version int64 // of the books, up to which the entries are true; -1: never polled
	entries map[apikey.Hash]*books.Identity
	agents  map[apikey.Hash]*books.AgentIdentity
	missing map[apikey.Hash]time.Time // keys and credentials that don't exist, until when that holds
	flights map[apikey.Hash]*flight

	suspected chan struct{} // holds one token: somebody is suspect

	guardMu    sync.Mutex
	guards     map[*guard]int64 // since which version, plus one, its key may be invalid; 0: it is valid
	suspicious bool             // one of them may be
}

// poll is one successful poll.
type poll struct {
	began time.Time
	asOf  time.Time // the database's clock
}

// flight is a lookup that is under way.
type flight struct {
	began time.Time
	done  chan struct{}
	// What it found; read after done.
	identity *books.Identity
	err      error
}

// New returns an empty keyring.
func New(store Store, log *slog.Logger) *Keyring {
	return &Keyring{
		store:   store,
		log:     log,
		max:     maxEntries,
		version: -1,
		entries: map[apikey.Hash]*books.Identity{},
		agents:  map[apikey.Hash]*books.AgentIdentity{},
		missing: map[apikey.Hash]time.Time{},
		flights: map[apikey.Hash]*flight{},

		suspected: make(chan struct{}, 1),
		guards:    map[*guard]int64{},
	}
}

// OnChange makes Run call hook for every tenant, user, key and agent that was made or changed,
// in order, after the keyring itself has heeded it. An empty kind and id mean that
// anything may have changed. The hook must not block.
func (k *Keyring) OnChange(hook func(kind books.Kind, id string)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.hooks = append(k.hooks, hook)
}

// Run keeps the keyring true until ctx ends. It returns nil.
func (k *Keyring) Run(ctx context.Context) error {
	enforced := make(chan struct{})
	go func() {
		defer close(enforced)
		k.enforce(ctx)
	}()
	defer func() { <-enforced }()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	away := false
	for {
		err := k.poll(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && !away:
			k.log.Warn("key changes can't be read; until they can, every request looks its key up", "error", err)
		case err == nil && away:
			k.log.Info("key changes can be read again")
		}
		away = err != nil
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// poll reads and heeds the changes since the last one.
func (k *Keyring) poll(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, pollTimeout)
	defer cancel()
	began := time.Now()
	k.mu.RLock()
	since, hooks := k.version, k.hooks
	k.mu.RUnlock()
	changes, err := k.store.Changes(ctx, since)
	if err != nil {
		return err
	}
	if changes.Reset || len(changes.Changes) > 0 || changes.Version != since {
		k.forget(changes)
	}
	// Only now, when nothing that is stale is left.
	k.polled.Store(&poll{began: began, asOf: changes.AsOf})
	k.suspect(changes)
	for _, hook := range hooks {
		if changes.Reset && since >= 0 {
			hook("", "")
		}
		for _, c := range changes.Changes {
			hook(c.Kind, c.ID)
		}
	}
	return nil
}

// forget throws out what the changes touch, unless it was read after them: whoever uses a key
// right after it was made doesn't have it looked up once more, or refused where nothing may be.
func (k *Keyring) forget(changes books.Changes) {
	changed := setOf(changes)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.version = changes.Version
	clear(k.missing) // one of them may exist by now
	if changes.Reset {
		clear(k.entries)
		clear(k.agents)
		return
	}
	for hash, id := range k.agents {
		if id.Version < changes.Version && changed[books.Change{Kind: books.KindAgent, ID: string(id.Agent)}] {
			delete(k.agents, hash)
		}
	}
	for hash, id := range k.entries {
		if id.Version < changes.Version && changed.touch(id) {
			delete(k.entries, hash)
		}
	}
}

// changeSet is what has changed.
type changeSet map[books.Change]bool

func setOf(changes books.Changes) changeSet {
	set := make(changeSet, len(changes.Changes))
	for _, c := range changes.Changes {
		set[c] = true
	}
	return set
}

// touch reports whether the identity may be another now: its key, user or tenant changed.
func (s changeSet) touch(id *books.Identity) bool {
	return s[books.Change{Kind: books.KindKey, ID: string(id.Key)}] ||
		s[books.Change{Kind: books.KindUser, ID: string(id.User)}] ||
		s[books.Change{Kind: books.KindTenant, ID: string(id.Tenant)}]
}

// Authenticate returns who the key stands for, if it is valid. slug is the tenant that
// the request's host names, or empty if it names none.
//
// The error is, in this order: key_invalid for a key that doesn't exist, is revoked or
// belongs to another tenant than the host's; key_expired; tenant_disabled;
// user_deactivated. If the books can't be asked it wraps an internal_error
// *schemas.Error for the client, and the cause for the log.
func (k *Keyring) Authenticate(ctx context.Context, key apikey.Key, slug string) (books.Identity, error) {
	return k.Recognize(ctx, key.Hash(), slug)
}

// Recognize is Authenticate for somebody who has shown the secret elsewhere, of which only
// the hash is known.
func (k *Keyring) Recognize(ctx context.Context, hash apikey.Hash, slug string) (books.Identity, error) {
	return k.identify(ctx, hash, slug, func(ctx context.Context) (books.Identity, error) { return k.store.LookupKey(ctx, hash) })
}

// Identify is Authenticate for somebody who has shown a secret of the key elsewhere, say to
// the bus, and is known by the id of the key. When a secret ends that others follow, that
// ends nothing here: whoever let it in sees to it.
func (k *Keyring) Identify(ctx context.Context, key schemas.KeyID) (books.Identity, error) {
	return k.identify(ctx, idHash(key), "", func(ctx context.Context) (books.Identity, error) { return k.store.LookupKeyID(ctx, key) })
}

// idHash is under what an identity that was looked up by the id of its key is kept in
// memory. No secret has this hash, since each begins with apikey.Begin.
func idHash(key schemas.KeyID) apikey.Hash { return sha256.Sum256([]byte("id:" + key)) }

// lookup asks the books.
type lookup func(context.Context) (books.Identity, error)

func (k *Keyring) identify(ctx context.Context, hash apikey.Hash, slug string, ask lookup) (books.Identity, error) {
	id, clock := k.recall(hash)
	if id == nil {
		var err error
		if id, err = k.lookUp(ctx, hash, ask); err != nil {
			return books.Identity{}, err
		}
		clock = id.AsOf
	}
	if e := judge(id, slug, clock); e != nil {
		return books.Identity{}, e
	}
	return *id, nil
}

// Cached returns who the key stands for if Authenticate would now accept it from
// memory. It never asks the books.
func (k *Keyring) Cached(key apikey.Key, slug string) (books.Identity, bool) {
	id, clock := k.recall(key.Hash())
	if id == nil || judge(id, slug, clock) != nil {
		return books.Identity{}, false
	}
	return *id, true
}

// The refusals. They are shared: nobody changes a *schemas.Error.
var (
	errInvalid     = schemas.Errorf(schemas.CodeKeyInvalid, "The API key doesn't exist or has been revoked. Check the key, or ask an admin for a new one.")
	errExpired     = schemas.Errorf(schemas.CodeKeyExpired, "The API key has expired. Ask an admin for a new one.")
	errTenant      = schemas.Errorf(schemas.CodeTenantDisabled, "The tenant of this API key is suspended. Ask its admin to have it resumed.")
	errUser        = schemas.Errorf(schemas.CodeUserDeactivated, "The user who owns this API key was deactivated. Ask an admin to activate the user, or use another key.")
	errUnavailable = schemas.Errorf(schemas.CodeInternalError, "The API key can't be checked right now. Try again in a moment.").WithRetryAfter(time.Second)
)

// judge says what is wrong with a key, if anything. now is the database's clock.
func judge(id *books.Identity, slug string, now time.Time) *schemas.Error {
	switch {
	case id.Revoked, slug != "" && slug != id.Slug:
		return errInvalid
	case id.ExpiresAt != nil && !now.Before(*id.ExpiresAt):
		return errExpired
	case id.TenantState != books.TenantActive:
		return errTenant
	case id.UserState != books.UserActive:
		return errUser
	}
	return nil
}

// recall returns what memory holds of a key, and the database's clock; nil if it holds
// nothing that may still be used.
func (k *Keyring) recall(hash apikey.Hash) (*books.Identity, time.Time) {
	p := k.polled.Load() // before the entry: what is thrown out later is as fresh as p
	if p == nil {
		return nil, time.Time{}
	}
	age := time.Since(p.began)
	if age >= maxStale {
		return nil, time.Time{}
	}
	k.mu.RLock()
	id := k.entries[hash]
	k.mu.RUnlock()
	return id, p.asOf.Add(age)
}

// lookUp asks the books, or waits for another request that asks them already.
func (k *Keyring) lookUp(ctx context.Context, hash apikey.Hash, ask lookup) (*books.Identity, error) {
	now := time.Now()
	k.mu.Lock()
	if until, ok := k.missing[hash]; ok && now.Before(until) {
		k.mu.Unlock()
		return nil, errInvalid
	}
	if f := k.flights[hash]; f != nil && now.Sub(f.began) < shareFor {
		k.mu.Unlock()
		select {
		case <-f.done:
			return f.identity, f.err
		case <-ctx.Done():
			return nil, fmt.Errorf("look up a key: %w", context.Cause(ctx))
		}
	}
	f := &flight{began: now, done: make(chan struct{}), err: errUnavailable}
	k.flights[hash] = f
	k.mu.Unlock()

	// The others wait for the answer too, so one who leaves must not take it along.
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), lookupTimeout)
	defer cancel()
	defer close(f.done)
	id, err := ask(bounded)
	k.land(hash, f, &id, err)
	return f.identity, f.err
}

// land notes what a lookup found.
func (k *Keyring) land(hash apikey.Hash, f *flight, id *books.Identity, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.flights[hash] == f {
		delete(k.flights, hash)
	}
	switch {
	case err == nil:
		f.identity, f.err = id, nil
		if id.Version >= k.version {
			if len(k.entries) >= k.max {
				evict(k.entries)
			}
			k.entries[hash] = id
		}
	case errors.Is(err, errInvalid):
		f.err = errInvalid
		if len(k.missing) >= maxMissing {
			evict(k.missing)
		}
		k.missing[hash] = f.began.Add(missingFor)
	default:
		f.err = fmt.Errorf("%w: %w", errUnavailable, err)
	}
}

// evict makes room by dropping any one entry.
func evict[V any](m map[apikey.Hash]V) {
	for hash := range m {
		delete(m, hash)
		return
	}
}
