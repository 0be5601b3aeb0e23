package books_test

import (
	"slices"
	"sync"
	"testing"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/pgtest"
	"github.com/ownllm/ownllm/schemas"
)

func changes(t *testing.T, s *books.Store, since int64) books.Changes {
	t.Helper()
	c, err := s.Changes(t.Context(), since)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestChanges(t *testing.T) {
	s := open(t)
	if c := changes(t, s, -1); !c.Reset || c.Version != 0 || len(c.Changes) != 0 {
		t.Errorf("at first: %+v", c)
	}
	if c := changes(t, s, 0); c.Reset || c.Version != 0 || len(c.Changes) != 0 {
		t.Errorf("nothing yet: %+v", c)
	}
	tenant, user := household(t, s, "acme")
	key, _, err := s.CreateKey(t.Context(), books.NewKey{Tenant: "acme", User: user.Email})
	if err != nil {
		t.Fatal(err)
	}
	made := []books.Change{{Kind: books.KindTenant, ID: string(tenant.ID)}, {Kind: books.KindUser, ID: string(user.ID)}, {Kind: books.KindKey, ID: string(key.ID)}}
	if c := changes(t, s, 0); c.Reset || c.Version != 3 || !slices.Equal(c.Changes, made) {
		t.Errorf("all: %+v", c)
	}
	if c := changes(t, s, 2); c.Version != 3 || !slices.Equal(c.Changes, made[2:]) {
		t.Errorf("the last: %+v", c)
	}
	// What fails raises nothing.
	_, err = s.CreateTenant(t.Context(), books.NewTenant{Slug: "acme"})
	wantError(t, err, schemas.CodeInvalidValue, "slug")
	if c := changes(t, s, 3); c.Reset || c.Version != 3 || len(c.Changes) != 0 {
		t.Errorf("after a failure: %+v", c)
	}
	// A version that never was: a backup was put back.
	if c := changes(t, s, 4); !c.Reset || c.Version != 3 {
		t.Errorf("from the future: %+v", c)
	}
	for _, work := range []func() error{
		func() error { _, err := s.SetTenantState(t.Context(), "acme", books.TenantSuspended); return err },
		func() error { _, err := s.SetUserState(t.Context(), user.ID, books.UserDeactivated); return err },
		func() error { _, err := s.RevokeKey(t.Context(), key.ID); return err },
	} {
		if err := work(); err != nil {
			t.Fatal(err)
		}
	}
	if c := changes(t, s, 3); c.Version != 6 || !slices.Equal(c.Changes, made) {
		t.Errorf("changed: %+v", c)
	}
	// Caches know nothing of prices.
	if _, err := s.SetPrice(t.Context(), "acme", "m", 1); err != nil {
		t.Fatal(err)
	}
	if c := changes(t, s, 6); c.Reset || len(c.Changes) != 0 {
		t.Errorf("a price: %+v", c)
	}
}

func TestChangesArePruned(t *testing.T) {
	s := open(t)
	s.KeepChanges(5)
	household(t, s, "acme")
	for i := range 20 {
		if _, err := s.SetTenant(t.Context(), "acme", books.TenantChange{QPS: new(100 + i)}); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := books.Query[int](t.Context(), s, `SELECT count(*) FROM changes`); err != nil || n != 5 {
		t.Errorf("%d rows, %v", n, err)
	}
	for since := int64(0); since <= 22; since++ {
		c := changes(t, s, since)
		if c.Version != 22 || c.Reset != (since < 17) {
			t.Errorf("since %d: %+v", since, c)
		}
		if !c.Reset && int64(len(c.Changes)) != 22-since {
			t.Errorf("since %d: %d changes", since, len(c.Changes))
		}
	}
	// Who keeps more, a later version say, doesn't bring the pruned back.
	s.KeepChanges(1000)
	if _, err := s.SetTenantState(t.Context(), "acme", books.TenantSuspended); err != nil {
		t.Fatal(err)
	}
	if c := changes(t, s, 16); !c.Reset {
		t.Errorf("since 16: %+v", c)
	}
}

// Versions are in the order of commits: who follows them misses nothing, however many
// write at once.
func TestChangesMissNothing(t *testing.T) {
	address := pgtest.New(t)
	const writers, each = 6, 25
	var wg sync.WaitGroup
	var mu sync.Mutex
	written := map[string]int{}
	s := openAt(t, books.Config{URL: address})
	polled := make(chan struct{}) // closed once the reader has read twice, so that all write while it reads
	for range writers {
		s := openAt(t, books.Config{URL: address, MaxConns: 2})
		wg.Go(func() {
			for i := range each {
				if i == each/2 {
					select {
					case <-polled:
					case <-t.Context().Done():
					}
				}
				tenant, err := s.CreateTenant(t.Context(), books.NewTenant{Slug: slug()})
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				written[string(tenant.ID)]++
				mu.Unlock()
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	var since int64
	seen := map[string]int{}
	polls := 0
	for last := false; ; polls++ {
		c := changes(t, s, since)
		if c.Reset || c.Version < since {
			t.Fatalf("since %d: %+v", since, c)
		}
		if int64(len(c.Changes)) != c.Version-since {
			t.Fatalf("from %d to %d there were %d changes", since, c.Version, len(c.Changes))
		}
		for _, x := range c.Changes {
			seen[x.ID]++
		}
		since = c.Version
		if last {
			break
		}
		if polls == 1 {
			close(polled)
		}
		select {
		case <-done:
			last = true
		default:
		}
	}
	if len(seen) != writers*each || since != writers*each {
		t.Errorf("saw %d of %d in %d polls, version %d", len(seen), writers*each, polls, since)
	}
	for id, n := range seen {
		if n != 1 || written[id] != 1 {
			t.Errorf("%s was seen %d times and written %d times", id, n, written[id])
		}
	}
}
