package books_test

import (
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/pgtest"
	"github.com/ownllm/ownllm/schemas"
)

func TestRotateKey(t *testing.T) {
	c := newClient(t, open(t), limits{cents: 1, concurrency: 3, qps: 1000})
	spent, held := c.ask(100, 100), c.ask(100, 100)
	c.admit(spent, held)
	c.settle(spent, 100, 50, books.OutcomeDone)
	c.holds(1, 150, 200)

	look := func(secret apikey.Key) books.Identity {
		t.Helper()
		id, err := c.s.LookupKey(t.Context(), secret.Hash())
		c.must(err)
		// By its id the key is known as by its current secret.
		current, err := c.s.LookupKeyID(t.Context(), c.key.ID)
		c.must(err)
		if current.AsOf = id.AsOf; id.ExpiresAt == nil && !cmp.Equal(current, id) || current.ExpiresAt != nil {
			t.Errorf("by its id the key is %+v, by its secret %+v", current, id)
		}
		if id.Key != c.key.ID || id.Prefix != secret.Prefix() {
			t.Errorf("identity %+v", id)
		}
		return id
	}
	// lives checks for how long a secret does, from now on.
	lives := func(secret apikey.Key, want time.Duration) {
		t.Helper()
		id := look(secret)
		if id.ExpiresAt == nil {
			t.Fatalf("%v doesn't end", secret)
		}
		if got := id.ExpiresAt.Sub(id.AsOf); got > want || got < want-time.Minute {
			t.Errorf("%v lives for %v, want %v", secret, got, want)
		}
	}
	rotate := func(r books.Rotation) apikey.Key {
		t.Helper()
		k, secret, err := c.s.RotateKey(t.Context(), c.key.ID, r)
		c.must(err)
		want := c.key
		want.Prefix = secret.Prefix()
		if diff := cmp.Diff(want, k); diff != "" {
			t.Errorf("the key is another: %s", diff)
		}
		if id := look(secret); id.ExpiresAt != nil {
			t.Errorf("the new secret ends: %+v", id)
		}
		return secret
	}
	version := changes(t, c.s, -1).Version
	first := rotate(books.Rotation{Overlap: time.Hour})
	if got := changes(t, c.s, version); len(got.Changes) != 1 || got.Changes[0] != (books.Change{Kind: books.KindKey, ID: string(c.key.ID)}) {
		t.Errorf("changes %+v", got)
	}
	second := rotate(books.Rotation{Overlap: 10 * time.Hour})
	lives(first, 10*time.Hour)
	given := apikey.New()
	third := rotate(books.Rotation{Overlap: time.Minute, Secret: given})
	if third.Hash() != given.Hash() {
		t.Error("another secret than was given")
	}
	lives(first, time.Minute) // it is cut short
	lives(second, time.Minute)
	fourth := rotate(books.Rotation{Overlap: time.Hour})
	lives(first, time.Minute) // and never comes to live longer
	lives(second, time.Minute)
	lives(third, time.Hour)
	rotate(books.Rotation{})
	for _, old := range []apikey.Key{first, second, third, fourth} {
		if id := look(old); id.ExpiresAt == nil || id.ExpiresAt.After(id.AsOf) {
			t.Errorf("%v still lives: %+v", old, id)
		}
	}
	c.holds(1, 150, 200)
	if got := c.admit(c.ask(100, 551))[0]; got.Reason != books.ReasonMoneyHeld || got.Slots != 3 || got.SlotsFree != 2 {
		t.Errorf("%+v", got)
	}
	if list, _, err := c.s.ListKeys(t.Context(), c.tenant.Slug, "", books.Page{}); err != nil || len(list) != 1 {
		t.Errorf("%+v, %v", list, err)
	}

	_, err := c.s.RevokeKey(t.Context(), c.key.ID)
	c.must(err)
	if id := look(fourth); !id.Revoked {
		t.Error("an old secret isn't revoked")
	}
	_, _, err = c.s.RotateKey(t.Context(), c.key.ID, books.Rotation{})
	wantError(t, err, schemas.CodeInvalidValue, "key")
}

// The end of a secret is never after that of its key, and a key that has expired stays so.
func TestRotateKeyThatEnds(t *testing.T) {
	s := open(t)
	_, user := household(t, s, "acme")
	k, first, err := s.CreateKey(t.Context(), books.NewKey{Tenant: "acme", User: user.Email, ExpiresAt: new(time.Now().Add(time.Hour))})
	if err != nil {
		t.Fatal(err)
	}
	rotated, second, err := s.RotateKey(t.Context(), k.ID, books.Rotation{Overlap: 24 * time.Hour})
	if err != nil || !rotated.ExpiresAt.Equal(*k.ExpiresAt) {
		t.Fatalf("%+v, %v", rotated, err)
	}
	for _, secret := range []apikey.Key{first, second} {
		if id, err := s.LookupKey(t.Context(), secret.Hash()); err != nil || !id.ExpiresAt.Equal(*k.ExpiresAt) {
			t.Errorf("%+v, %v", id, err)
		}
	}
	if err := s.Exec(t.Context(), `UPDATE api_keys SET expires_at = now() WHERE id = $1`, k.ID); err != nil {
		t.Fatal(err)
	}
	before := everything(t, s)
	_, _, err = s.RotateKey(t.Context(), k.ID, books.Rotation{})
	wantError(t, err, schemas.CodeInvalidValue, "key")
	if after := everything(t, s); after != before {
		t.Errorf("something was written:\n%s", after)
	}
}

// However many rotate a key at once, it has one current secret, and all others end.
func TestRotateAtOnce(t *testing.T) {
	address := pgtest.New(t)
	s := openAt(t, books.Config{URL: address, MaxConns: 8})
	_, user := household(t, s, "acme")
	k, _, err := s.CreateKey(t.Context(), books.NewKey{Tenant: "acme", User: user.Email})
	if err != nil {
		t.Fatal(err)
	}
	const n = 12
	var wg sync.WaitGroup
	prefixes := make([]string, n)
	for i := range n {
		wg.Go(func() {
			got, secret, err := s.RotateKey(t.Context(), k.ID, books.Rotation{Overlap: time.Hour})
			if err != nil || got.Prefix != secret.Prefix() {
				t.Errorf("%+v, %v", got, err)
			}
			prefixes[i] = got.Prefix
		})
	}
	wg.Wait()
	total, err := books.Query[int](t.Context(), s, `SELECT count(*) FROM key_secrets WHERE key_id = $1`, k.ID)
	current, err2 := books.Query[string](t.Context(), s, `SELECT prefix FROM key_secrets WHERE key_id = $1 AND expires_at IS NULL`, k.ID)
	if err != nil || err2 != nil || total != n+1 {
		t.Fatalf("%d secrets, %v, %v", total, err, err2)
	}
	// Each rotation names as the old secret the one that the rotation before it made.
	before := k.Prefix
	for _, e := range audits(t, s, "acme") {
		if e.Action != "key.rotate" {
			continue
		}
		prefix := prefixChange(t, e)
		if prefix.Old != before {
			t.Errorf("from %s, and the last was %s", prefix.Old, before)
		}
		before = prefix.New
	}
	if before != current {
		t.Errorf("the current secret is %s, and the last rotation made %s", current, before)
	}
}
