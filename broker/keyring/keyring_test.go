package keyring

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/credential"
	"github.com/ownllm/ownllm/internal/pgtest"
	"github.com/ownllm/ownllm/schemas"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

var quiet = slog.New(slog.DiscardHandler)

// fake is a Store that holds identities in memory, and fails and dawdles on demand.
type fake struct {
	// skew is how far the database's clock is off ours.
	skew time.Duration

	mu      sync.Mutex
	down    bool
	version int64
	log     []books.Change // log[i] made version i+1
	keys    map[apikey.Hash]books.Identity
	agents  map[apikey.Hash]books.AgentIdentity
	lookups int
	// before and after run in a call, on either side of the moment it looks.
	before, after func(ctx context.Context)
}

var errDown = fmt.Errorf("fake: %w", books.ErrUnavailable)

func newFake() *fake {
	return &fake{keys: map[apikey.Hash]books.Identity{}, agents: map[apikey.Hash]books.AgentIdentity{}}
}

// put stores an identity, and notes a change of the given kind.
func (f *fake) put(key apikey.Key, id books.Identity, kind books.Kind) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.keys[key.Hash()] = id
	ids := map[books.Kind]string{books.KindKey: string(id.Key), books.KindUser: string(id.User), books.KindTenant: string(id.Tenant)}
	f.log = append(f.log, books.Change{Kind: kind, ID: ids[kind]})
	f.version++
}

func (f *fake) set(down bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.down = down
}

func (f *fake) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.lookups
}

func (f *fake) call(ctx context.Context, look func() error) error {
	if f.before != nil {
		f.before(ctx)
	}
	f.mu.Lock()
	err := look()
	if f.down {
		err = errDown
	}
	f.mu.Unlock()
	if f.after != nil {
		f.after(ctx)
	}
	if ctx.Err() != nil {
		return errDown
	}
	return err
}

func (f *fake) LookupKey(ctx context.Context, hash apikey.Hash) (id books.Identity, err error) {
	err = f.call(ctx, func() error {
		f.lookups++
		var ok bool
		if id, ok = f.keys[hash]; !ok {
			return schemas.Errorf(schemas.CodeKeyInvalid, "unknown")
		}
		id.AsOf, id.Version = time.Now().Add(f.skew), f.version
		return nil
	})
	return id, err
}

// LookupKeyID finds a key by the id that it was put with.
func (f *fake) LookupKeyID(ctx context.Context, key schemas.KeyID) (id books.Identity, err error) {
	err = f.call(ctx, func() error {
		f.lookups++
		for _, known := range f.keys {
			if known.Key == key {
				id = known
				id.AsOf, id.Version = time.Now().Add(f.skew), f.version
				return nil
			}
		}
		return schemas.Errorf(schemas.CodeKeyInvalid, "unknown")
	})
	return id, err
}

func (f *fake) LookupAgent(ctx context.Context, hash credential.Hash) (id books.AgentIdentity, err error) {
	err = f.call(ctx, func() error {
		f.lookups++
		var ok bool
		if id, ok = f.agents[hash]; !ok {
			return schemas.Errorf(schemas.CodeKeyInvalid, "unknown")
		}
		id.Version = f.version
		return nil
	})
	return id, err
}

// setAgent makes or, without an id, removes an agent, and notes the change.
func (f *fake) setAgent(secret credential.Secret, agent schemas.AgentID, id *books.AgentIdentity) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if delete(f.agents, secret.Hash()); id != nil {
		f.agents[secret.Hash()] = *id
	}
	f.log = append(f.log, books.Change{Kind: books.KindAgent, ID: string(agent)})
	f.version++
}

func (f *fake) Changes(ctx context.Context, since int64) (c books.Changes, err error) {
	err = f.call(ctx, func() error {
		c = books.Changes{Version: f.version, Reset: since < 0 || since > f.version, AsOf: time.Now().Add(f.skew)}
		if !c.Reset {
			c.Changes = slices.Clone(f.log[since:])
		}
		return nil
	})
	return c, err
}

func valid() books.Identity {
	return books.Identity{
		Key: schemas.NewKeyID(), Tenant: schemas.NewTenantID(), Slug: "acme", User: schemas.NewUserID(),
		Scopes: []string{books.ScopeAll}, Concurrency: 32, QPS: 32, TenantState: books.TenantActive, UserState: books.UserActive,
	}
}

func wantCode(t *testing.T, err error, code schemas.Code) {
	t.Helper()
	var e *schemas.Error
	if !errors.As(err, &e) || e.Code != code {
		t.Errorf("error %v, want %s", err, code)
	}
}

// running runs the keyring while the body of the test runs.
func running(t *testing.T, k *Keyring, body func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := k.Run(ctx); err != nil {
			t.Error("Run: ", err)
		}
	})
	body()
	cancel()
	wg.Wait()
}

// Of several things that are wrong with a key, the contract's order says which is told.
func TestOrderOfRefusals(t *testing.T) {
	past := time.Now().Add(-time.Second)
	breaks := []struct {
		code  schemas.Code
		slug  string
		apply func(*books.Identity)
	}{
		{schemas.CodeKeyInvalid, "", func(id *books.Identity) { id.Revoked = true }},
		{schemas.CodeKeyInvalid, "other", func(*books.Identity) {}},
		{schemas.CodeKeyExpired, "", func(id *books.Identity) { id.ExpiresAt = &past }},
		{schemas.CodeTenantDisabled, "", func(id *books.Identity) { id.TenantState = books.TenantSuspended }},
		{schemas.CodeUserDeactivated, "", func(id *books.Identity) { id.UserState = books.UserDeactivated }},
	}
	for set := range 1 << len(breaks) {
		store := newFake()
		id, slug, want := valid(), "acme", schemas.Code("")
		for i, b := range breaks {
			if set&(1<<i) == 0 {
				continue
			}
			b.apply(&id)
			if b.slug != "" {
				slug = b.slug
			}
			if want == "" {
				want = b.code
			}
		}
		key := apikey.New()
		store.put(key, id, books.KindKey)
		k := New(store, quiet)
		// Cold, and from memory.
		for range 2 {
			got, err := k.Authenticate(t.Context(), key, slug)
			if want == "" {
				if err != nil || got.Key != id.Key {
					t.Errorf("%v, %v", got, err)
				}
			} else {
				wantCode(t, err, want)
			}
			if _, ok := k.Cached(key, slug); ok && want != "" {
				t.Errorf("set %b: known to be good", set)
			}
			if err := k.poll(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	k := New(newFake(), quiet)
	_, err := k.Authenticate(t.Context(), apikey.New(), "")
	wantCode(t, err, schemas.CodeKeyInvalid)
}

func TestMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newFake()
		key := apikey.New()
		store.put(key, valid(), books.KindKey)
		k := New(store, quiet)
		ask := func(want schemas.Code, lookups int) {
			t.Helper()
			before := store.count()
			_, err := k.Authenticate(t.Context(), key, "acme")
			if want == "" && err != nil {
				t.Errorf("refused: %v", err)
			} else if want != "" {
				wantCode(t, err, want)
			}
			if got := store.count() - before; got != lookups {
				t.Errorf("%d lookups, want %d", got, lookups)
			}
		}
		ask("", 1)
		ask("", 1) // nobody polls: memory is no use
		if _, ok := k.Cached(key, ""); ok {
			t.Error("known to be good, and nobody polls")
		}
		running(t, k, func() {
			synctest.Wait()
			ask("", 1) // the first poll threw out what was there
			ask("", 0)
			if _, ok := k.Cached(key, "acme"); !ok {
				t.Error("not known to be good")
			}
			time.Sleep(time.Hour)
			ask("", 0)

			store.set(true) // the last good poll is 0 to 250 ms old by now
			time.Sleep(maxStale - pollEvery - time.Millisecond)
			ask("", 0)
			time.Sleep(pollEvery + 2*time.Millisecond)
			ask(schemas.CodeInternalError, 1)
			if _, ok := k.Cached(key, "acme"); ok {
				t.Error("known to be good, and the books are away")
			}
			time.Sleep(time.Hour)
			ask(schemas.CodeInternalError, 1)
			store.set(false)
			time.Sleep(pollEvery)
			synctest.Wait()
			ask("", 0) // nothing has changed meanwhile, and that is known
		})
	})
}

func TestUnavailable(t *testing.T) {
	store := newFake()
	store.set(true)
	_, err := New(store, quiet).Authenticate(t.Context(), apikey.New(), "")
	e := schemas.AsError(err)
	if e.Code != schemas.CodeInternalError || e.RetryAfterSeconds() < 1 || !errors.Is(err, books.ErrUnavailable) {
		t.Errorf("error %v", err)
	}
}

func TestChangesAreHeeded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newFake()
		keys := make([]apikey.Key, 4)
		ids := make([]books.Identity, len(keys))
		for i := range keys {
			keys[i], ids[i] = apikey.New(), valid()
			store.put(keys[i], ids[i], books.KindKey)
		}
		k := New(store, quiet)
		var mu sync.Mutex
		var heard []books.Change
		k.OnChange(func(kind books.Kind, id string) {
			mu.Lock()
			defer mu.Unlock()
			heard = append(heard, books.Change{Kind: kind, ID: id})
		})
		running(t, k, func() {
			synctest.Wait()
			for i := range keys {
				if _, err := k.Authenticate(t.Context(), keys[i], ""); err != nil {
					t.Fatal(err)
				}
			}
			ids[0].Revoked = true
			store.put(keys[0], ids[0], books.KindKey)
			ids[1].UserState = books.UserDeactivated
			store.put(keys[1], ids[1], books.KindUser)
			ids[2].TenantState = books.TenantSuspended
			store.put(keys[2], ids[2], books.KindTenant)
			time.Sleep(pollEvery)
			synctest.Wait()
			before := store.count()
			for i, want := range []schemas.Code{schemas.CodeKeyInvalid, schemas.CodeUserDeactivated, schemas.CodeTenantDisabled} {
				_, err := k.Authenticate(t.Context(), keys[i], "")
				wantCode(t, err, want)
			}
			if _, err := k.Authenticate(t.Context(), keys[3], ""); err != nil || store.count() != before+3 {
				t.Errorf("the untouched key: %v, %d lookups", err, store.count()-before)
			}
			mu.Lock()
			want := []books.Change{{Kind: books.KindKey, ID: string(ids[0].Key)}, {Kind: books.KindUser, ID: string(ids[1].User)}, {Kind: books.KindTenant, ID: string(ids[2].Tenant)}}
			if !slices.Equal(heard, want) {
				t.Errorf("heard %v", heard)
			}
			heard = nil
			mu.Unlock()

			// The books went back in time: a backup.
			store.mu.Lock()
			store.version, store.log = 1, store.log[:1]
			ids[3].Revoked = true
			store.keys[keys[3].Hash()] = ids[3]
			store.mu.Unlock()
			time.Sleep(pollEvery)
			synctest.Wait()
			_, err := k.Authenticate(t.Context(), keys[3], "")
			wantCode(t, err, schemas.CodeKeyInvalid)
			mu.Lock()
			if !slices.Equal(heard, []books.Change{{}}) {
				t.Errorf("heard %v", heard)
			}
			mu.Unlock()
		})
	})
}

// A change of a key throws out what is known of all its secrets, and that its next secret
// isn't known.
func TestSecretsOfAKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newFake()
		old, current, next, other := apikey.New(), apikey.New(), apikey.New(), apikey.New()
		id := valid()
		ends := id
		ends.ExpiresAt = new(time.Now().Add(time.Minute))
		store.put(old, ends, books.KindKey)
		store.put(current, id, books.KindKey)
		store.put(other, valid(), books.KindKey)
		k := New(store, quiet)
		running(t, k, func() {
			synctest.Wait()
			ask := func(key apikey.Key, want schemas.Code, lookups int) {
				t.Helper()
				before := store.count()
				_, err := k.Authenticate(t.Context(), key, "")
				if want == "" && err != nil {
					t.Errorf("refused: %v", err)
				} else if want != "" {
					wantCode(t, err, want)
				}
				if got := store.count() - before; got != lookups {
					t.Errorf("%d lookups, want %d", got, lookups)
				}
			}
			for _, lookups := range []int{1, 0} {
				ask(old, "", lookups)
				ask(current, "", lookups)
				ask(other, "", lookups)
				ask(next, schemas.CodeKeyInvalid, lookups)
			}
			// Rotated: the current secret ends in ten seconds, the older one with it.
			ends.ExpiresAt = new(time.Now().Add(10 * time.Second))
			store.mu.Lock()
			store.keys[old.Hash()], store.keys[current.Hash()] = ends, ends
			store.mu.Unlock()
			store.put(next, id, books.KindKey)
			time.Sleep(pollEvery)
			synctest.Wait()
			ask(next, "", 1)
			ask(old, "", 1)
			ask(current, "", 1)
			ask(other, "", 0)
			time.Sleep(time.Until(*ends.ExpiresAt) - time.Millisecond)
			ask(old, "", 0)
			ask(current, "", 0)
			time.Sleep(time.Millisecond)
			ask(old, schemas.CodeKeyExpired, 0)
			ask(current, schemas.CodeKeyExpired, 0)
			ask(next, "", 0)
		})
	})
}

// An answer that was on its way while the key changed is used, and not kept.
func TestLateAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newFake()
		key, id := apikey.New(), valid()
		store.put(key, id, books.KindKey)
		k := New(store, quiet)
		if err := k.poll(t.Context()); err != nil {
			t.Fatal(err)
		}
		store.after = func(context.Context) {
			store.after = nil
			id.Revoked = true
			store.put(key, id, books.KindKey)
			if err := k.poll(t.Context()); err != nil {
				t.Error(err)
			}
		}
		if _, err := k.Authenticate(t.Context(), key, ""); err != nil {
			t.Errorf("valid when asked: %v", err)
		}
		_, err := k.Authenticate(t.Context(), key, "")
		wantCode(t, err, schemas.CodeKeyInvalid)
	})
}

func TestSharedLookup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newFake()
		key := apikey.New()
		store.put(key, valid(), books.KindKey)
		answer := make(chan struct{})
		store.before = func(context.Context) { <-answer }
		k := New(store, quiet)

		var wg sync.WaitGroup
		leader, leave := context.WithCancel(t.Context())
		impatient, give := context.WithCancel(t.Context())
		ask := func(ctx context.Context, want error) {
			wg.Go(func() {
				if _, err := k.Authenticate(ctx, key, ""); !errors.Is(err, want) {
					t.Errorf("got %v, want %v", err, want)
				}
			})
			synctest.Wait()
		}
		ask(leader, nil) // its answer is on the way, and others wait for it too
		for range 50 {
			ask(t.Context(), nil)
		}
		ask(impatient, context.Canceled)
		leave()
		give()
		time.Sleep(shareFor)
		ask(t.Context(), nil) // too late to share: what it hears must be young
		close(answer)
		wg.Wait()
		if store.count() != 2 {
			t.Errorf("%d lookups", store.count())
		}
	})
}

func TestUnknownKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newFake()
		key := apikey.New()
		k := New(store, quiet)
		for range 10 {
			_, err := k.Authenticate(t.Context(), key, "")
			wantCode(t, err, schemas.CodeKeyInvalid)
		}
		if store.count() != 1 {
			t.Errorf("%d lookups", store.count())
		}
		time.Sleep(missingFor)
		_, err := k.Authenticate(t.Context(), key, "")
		wantCode(t, err, schemas.CodeKeyInvalid)
		if store.count() != 2 {
			t.Errorf("%d lookups", store.count())
		}
		store.put(key, valid(), books.KindKey)
		if err := k.poll(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err = k.Authenticate(t.Context(), key, ""); err != nil {
			t.Errorf("made, polled, and still unknown: %v", err)
		}
	})
}

func TestBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newFake()
		k := New(store, quiet)
		k.max = 10
		for range 50 {
			key := apikey.New()
			store.put(key, valid(), books.KindKey)
			if _, err := k.Authenticate(t.Context(), key, ""); err != nil {
				t.Fatal(err)
			}
		}
		if len(k.entries) != 10 {
			t.Errorf("%d entries", len(k.entries))
		}
		for range maxMissing + 10 {
			_, err := k.Authenticate(t.Context(), apikey.New(), "")
			wantCode(t, err, schemas.CodeKeyInvalid)
		}
		if len(k.missing) != maxMissing || len(k.entries) != 10 || len(k.flights) != 0 {
			t.Errorf("%d missing, %d entries, %d flights", len(k.missing), len(k.entries), len(k.flights))
		}
	})
}

// A key expires by the database's clock, also while it is in memory, and also after
// this machine has slept.
func TestExpiry(t *testing.T) {
	for _, skew := range []time.Duration{0, 10 * time.Hour, -10 * time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			store := newFake()
			store.skew = skew
			key, id := apikey.New(), valid()
			id.ExpiresAt = new(time.Now().Add(skew).Add(time.Minute))
			store.put(key, id, books.KindKey)
			k := New(store, quiet)
			running(t, k, func() {
				synctest.Wait()
				time.Sleep(time.Minute - time.Millisecond)
				for range 2 {
					if _, err := k.Authenticate(t.Context(), key, ""); err != nil {
						t.Errorf("skew %v: %v", skew, err)
					}
				}
				before := store.count()
				time.Sleep(time.Millisecond)
				_, err := k.Authenticate(t.Context(), key, "")
				wantCode(t, err, schemas.CodeKeyExpired)
				if store.count() != before {
					t.Error("looked up again")
				}
			})
		})
	}
	synctest.Test(t, func(t *testing.T) {
		store := newFake()
		key, id := apikey.New(), valid()
		id.ExpiresAt = new(time.Now().Add(time.Hour))
		store.put(key, id, books.KindKey)
		k := New(store, quiet)
		running(t, k, func() {
			synctest.Wait()
			if _, err := k.Authenticate(t.Context(), key, ""); err != nil {
				t.Error(err)
			}
			store.mu.Lock()
			store.skew = 8 * time.Hour // our clock stood still for eight hours
			store.mu.Unlock()
			time.Sleep(pollEvery)
			synctest.Wait()
			_, err := k.Authenticate(t.Context(), key, "")
			wantCode(t, err, schemas.CodeKeyExpired)
		})
	})
}

func BenchmarkAuthenticate(b *testing.B) {
	store := newFake()
	key := apikey.New()
	store.put(key, valid(), books.KindKey)
	k := New(store, quiet)
	b.ReportAllocs()
	for b.Loop() {
		if p := k.polled.Load(); p == nil || time.Since(p.began) > maxStale/2 {
			if err := k.poll(b.Context()); err != nil {
				b.Fatal(err)
			}
		}
		if _, err := k.Authenticate(b.Context(), key, "acme"); err != nil {
			b.Fatal(err)
		}
	}
}
