package keyring

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/schemas"
)

// guarded has guards on a few keys, and says which of them were ended, and why.
type guarded struct {
	k     *Keyring
	ended map[string]schemas.Code
}

func (g *guarded) guard(name string, key apikey.Key, id books.Identity) (release func()) {
	return g.k.Guard(key, "", id, func(err *schemas.Error) {
		if g.ended[name] != "" {
			panic("ended twice")
		}
		g.ended[name] = err.Code
	})
}

func TestGuard(t *testing.T) {
	for _, c := range []struct {
		code  schemas.Code
		kind  books.Kind
		apply func(*books.Identity)
	}{
		{schemas.CodeKeyInvalid, books.KindKey, func(id *books.Identity) { id.Revoked = true }},
		{schemas.CodeTenantDisabled, books.KindTenant, func(id *books.Identity) { id.TenantState = books.TenantSuspended }},
		{schemas.CodeUserDeactivated, books.KindUser, func(id *books.Identity) { id.UserState = books.UserDeactivated }},
		{"", books.KindKey, func(id *books.Identity) { id.Concurrency = 1 }}, // a change that ends nothing
		{"", books.KindTenant, func(id *books.Identity) { id.QPS = 1 }},
	} {
		synctest.Test(t, func(t *testing.T) {
			store := newFake()
			k := New(store, quiet)
			g := &guarded{k, map[string]schemas.Code{}}
			key, other := apikey.New(), apikey.New()
			id, bystander := valid(), valid()
			store.put(key, id, books.KindKey)
			store.put(other, bystander, books.KindKey)
			running(t, k, func() {
				time.Sleep(time.Second)
				defer g.guard("one", key, id)()
				defer g.guard("two", key, id)()
				g.guard("released", key, id)()
				defer g.guard("other", other, bystander)()
				c.apply(&id)
				store.put(key, id, c.kind)
				time.Sleep(time.Second)
				synctest.Wait()
			})
			want := map[string]schemas.Code{}
			if c.code != "" {
				want = map[string]schemas.Code{"one": c.code, "two": c.code}
			}
			if len(g.ended) != len(want) || g.ended["one"] != want["one"] || g.ended["two"] != want["two"] {
				t.Errorf("ended %v, want %v", g.ended, want)
			}
		})
	}
}

// What can't be looked at while the books are away is looked at when they are back, and a
// change that comes while it is looked at isn't missed.
func TestGuardIsPersistent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newFake()
		slow := &slowLookups{fake: store}
		k := New(slow, quiet)
		g := &guarded{k, map[string]schemas.Code{}}
		key, id := apikey.New(), valid()
		store.put(key, id, books.KindKey)
		running(t, k, func() {
			time.Sleep(time.Second)
			defer g.guard("one", key, id)()
			looks := store.count()
			store.set(true)
			id.Concurrency = 2
			store.put(key, id, books.KindKey)
			time.Sleep(5 * time.Second)
			store.set(false)
			time.Sleep(time.Second)
			if store.count() == looks || len(g.ended) != 0 {
				t.Errorf("%d looks, ended %v", store.count()-looks, g.ended)
			}
			// The lookup that follows the first change is slow, and sees the key as it was.
			id.Concurrency = 3
			seen, release := make(chan struct{}), make(chan struct{})
			slow.hold(func() {
				close(seen)
				<-release
			})
			store.put(key, id, books.KindKey)
			<-seen
			revoked := id
			revoked.Revoked = true
			store.put(key, revoked, books.KindKey)
			time.Sleep(500 * time.Millisecond)
			close(release)
			time.Sleep(time.Second)
			synctest.Wait()
			if g.ended["one"] != schemas.CodeKeyInvalid {
				t.Errorf("ended %v", g.ended)
			}
		})
	})
}

// slowLookups is a store whose next lookup is held up, after it has looked.
type slowLookups struct {
	*fake
	next atomic.Pointer[func()]
}

func (s *slowLookups) hold(f func()) { s.next.Store(&f) }

func (s *slowLookups) LookupKey(ctx context.Context, hash apikey.Hash) (books.Identity, error) {
	id, err := s.fake.LookupKey(ctx, hash)
	if f := s.next.Swap(nil); f != nil {
		(*f)()
	}
	return id, err
}
