package keyring

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/credential"
	"github.com/ownllm/ownllm/schemas"
)

var errAgentInvalid = schemas.Errorf(schemas.CodeKeyInvalid,
	"The agent's credential is unknown, or the agent was removed. Pair the machine again: `ownllm worker --pair … --server …`.")

// AuthenticateAgent returns which agent a credential stands for. One that is unknown, or
// whose agent was removed, is a key_invalid *schemas.Error. If the books can't be asked,
// the error wraps an internal_error *schemas.Error for the client, and the cause for the
// log. A removal takes effect within a second.
func (k *Keyring) AuthenticateAgent(ctx context.Context, secret credential.Secret) (books.AgentIdentity, error) {
	if id, ok := k.CachedAgent(secret); ok {
		return id, nil
	}
	hash, began := secret.Hash(), time.Now()
	if k.isMissing(hash, began) {
		return books.AgentIdentity{}, errAgentInvalid
	}
	// No lookup is shared: an agent speaks for itself, and once a second.
	lookup, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	id, err := k.store.LookupAgent(lookup, hash)
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case err == nil:
		if id.Version >= k.version {
			if len(k.agents) >= k.max {
				evict(k.agents)
			}
			k.agents[hash] = &id
		}
		return id, nil
	case errors.Is(err, errAgentInvalid):
		if len(k.missing) >= maxMissing {
			evict(k.missing)
		}
		k.missing[hash] = began.Add(missingFor)
		return books.AgentIdentity{}, errAgentInvalid
	}
	return books.AgentIdentity{}, fmt.Errorf("%w: %w", errAgentUnavailable, err)
}

var errAgentUnavailable = schemas.Errorf(schemas.CodeInternalError, "The agent's credential can't be checked right now. Try again in a moment.").WithRetryAfter(time.Second)

// CachedAgent returns which agent a credential stands for, if AuthenticateAgent would now
// accept it from memory. It never asks the books.
func (k *Keyring) CachedAgent(secret credential.Secret) (books.AgentIdentity, bool) {
	p := k.polled.Load() // before the entry, see recall
	if p == nil || time.Since(p.began) >= maxStale {
		return books.AgentIdentity{}, false
	}
	k.mu.RLock()
	id := k.agents[secret.Hash()]
	k.mu.RUnlock()
	if id == nil {
		return books.AgentIdentity{}, false
	}
	return *id, true
}

func (k *Keyring) isMissing(hash apikey.Hash, now time.Time) bool {
	k.mu.RLock()
	defer k.mu.RUnlock()
	until, ok := k.missing[hash]
	return ok && now.Before(until)
}
