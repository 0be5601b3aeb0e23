package keyring

import (
	"context"
	"errors"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/schemas"
)

// guard is something that goes on only as long as its key is valid.
type guard struct {
	look lookup
	id   books.Identity
	end  func(*schemas.Error)
}

// Guard calls end, once at the most, when a change has made the key invalid: when it is
// revoked or its secret is rotated away, its tenant suspended, or its user deactivated.
// That takes less than a second, as long as the books can be reached. A key that only
// expires ends nothing that goes on. end must not block. The caller owes a call of
// release, after which end isn't begun any more.
func (k *Keyring) Guard(key apikey.Key, slug string, id books.Identity, end func(*schemas.Error)) (release func()) {
	return k.guard(&guard{func(ctx context.Context) (books.Identity, error) { return k.Authenticate(ctx, key, slug) }, id, end})
}

// GuardID is Guard for an identity that Identify has returned: a rotation ends nothing.
func (k *Keyring) GuardID(id books.Identity, end func(*schemas.Error)) (release func()) {
	return k.guard(&guard{func(ctx context.Context) (books.Identity, error) { return k.Identify(ctx, id.Key) }, id, end})
}

func (k *Keyring) guard(g *guard) (release func()) {
	k.guardMu.Lock()
	k.guards[g] = 0
	k.guardMu.Unlock()
	return func() {
		k.guardMu.Lock()
		delete(k.guards, g)
		k.guardMu.Unlock()
	}
}

// suspect notes the guards that the changes may concern, and has all suspects looked at.
func (k *Keyring) suspect(changes books.Changes) {
	k.guardMu.Lock()
	defer k.guardMu.Unlock()
	if len(changes.Changes) == 0 && !changes.Reset && !k.suspicious {
		return
	}
	changed := setOf(changes)
	k.suspicious = false
	for g, since := range k.guards {
		if changes.Reset || changed.touch(&g.id) {
			since = changes.Version + 1
			k.guards[g] = since
		}
		k.suspicious = k.suspicious || since != 0
	}
	if !k.suspicious {
		return
	}
	select {
	case k.suspected <- struct{}{}:
	default:
	}
}

// enforce looks at guards again whose keys may have changed, until ctx ends. Whoever
// can't be looked at because the books are away stays suspect.
func (k *Keyring) enforce(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-k.suspected:
		}
		for g, since := range k.suspects() {
			_, err := g.look(ctx)
			var refusal *schemas.Error
			switch {
			case err == nil:
				k.clear(g, since)
			case errors.As(err, &refusal) && refusal.Code != schemas.CodeInternalError:
				k.dismiss(g, refusal)
			}
		}
	}
}

func (k *Keyring) suspects() map[*guard]int64 {
	k.guardMu.Lock()
	defer k.guardMu.Unlock()
	list := make(map[*guard]int64)
	for g, since := range k.guards {
		if since != 0 {
			list[g] = since
		}
	}
	return list
}

// clear notes that a guard's key is valid, unless there was another change meanwhile.
func (k *Keyring) clear(g *guard, since int64) {
	k.guardMu.Lock()
	defer k.guardMu.Unlock()
	if now, ok := k.guards[g]; ok && now == since {
		k.guards[g] = 0
	}
}

// dismiss ends what is guarded, unless it was released.
func (k *Keyring) dismiss(g *guard, why *schemas.Error) {
	k.guardMu.Lock()
	defer k.guardMu.Unlock()
	if _, ok := k.guards[g]; ok {
		delete(k.guards, g)
		g.end(why)
	}
}
