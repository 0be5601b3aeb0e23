package books_test

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/credential"
	"github.com/ownllm/ownllm/internal/pgtest"
	"github.com/ownllm/ownllm/schemas"
)

// A create or rotation that repeats one returns what that has made, and writes nothing.
func TestRepeatedCreates(t *testing.T) {
	s := open(t)
	_, user := household(t, s, "acme")
	k, _, err := s.CreateKey(t.Context(), books.NewKey{Tenant: "acme", User: user.Email})
	if err != nil {
		t.Fatal(err)
	}
	secret, rotated := apikey.New(), apikey.New()
	pairing, used, agent := credential.NewPairing(), credential.NewPairing(), credential.NewAgent()
	if _, _, err := s.CreatePairing(t.Context(), books.NewPairing{Tenant: "acme", Secret: used}); err != nil {
		t.Fatal(err)
	}
	end := time.Now().Add(time.Hour)
	for name, create := range map[string]func(context.Context) (any, error){
		"tenant": func(ctx context.Context) (any, error) {
			return s.CreateTenant(ctx, books.NewTenant{Slug: "b", QPS: new(3)})
		},
		"user": func(ctx context.Context) (any, error) {
			return s.CreateUser(ctx, books.NewUser{Tenant: "acme", Email: "bob@acme.example"})
		},
		"key": func(ctx context.Context) (any, error) {
			k, got, err := s.CreateKey(ctx, books.NewKey{Tenant: "acme", User: user.Email, BudgetCents: new(int64(5)), ExpiresAt: &end, Secret: secret})
			if err == nil && got.Hash() != secret.Hash() {
				t.Errorf("another secret: %v", got)
			}
			return k, err
		},
		"pairing key": func(ctx context.Context) (any, error) {
			p, got, err := s.CreatePairing(ctx, books.NewPairing{Tenant: "acme", Secret: pairing})
			if err == nil && got.Hash() != pairing.Hash() {
				t.Errorf("another secret: %v", got)
			}
			return p, err
		},
		"agent": func(ctx context.Context) (any, error) {
			a, got, err := s.PairAgent(ctx, books.PairRequest{Secret: used, MachineID: [32]byte{1}, Name: "rig", Credential: agent})
			if err == nil && got.Hash() != agent.Hash() {
				t.Errorf("another secret: %v", got)
			}
			return a, err
		},
		"rotation": func(ctx context.Context) (any, error) {
			k, got, err := s.RotateKey(ctx, k.ID, books.Rotation{Overlap: time.Hour, Secret: rotated})
			if err == nil && got.Hash() != rotated.Hash() {
				t.Errorf("another secret: %v", got)
			}
			return k, err
		},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := books.WithIdempotency(t.Context(), "the "+name)
			first, err := create(ctx)
			if err != nil {
				t.Fatal(err)
			}
			before := everything(t, s)
			for range 3 {
				again, err := create(ctx)
				if diff := cmp.Diff(first, again); diff != "" || err != nil {
					t.Errorf("again: %v, %s", err, diff)
				}
			}
			if after := everything(t, s); after != before {
				t.Errorf("it wrote: before\n%safter\n%s", before, after)
			}
			// Without the name, or with another, it isn't a repetition.
			if _, err := create(t.Context()); err == nil {
				t.Error("made twice without a name")
			}
			if _, err := create(books.WithIdempotency(t.Context(), "another "+name)); err == nil {
				t.Error("made twice under two names")
			}
		})
	}
}

// Under a name that was used, other content is refused, and nothing is made.
func TestRepeatedOtherwise(t *testing.T) {
	s := open(t)
	_, user := household(t, s, "acme")
	ctx := books.WithIdempotency(t.Context(), "n")
	base := books.NewKey{Tenant: "acme", User: user.Email, Name: "ci", BudgetCents: new(int64(5)), TTL: new(time.Hour), Secret: apikey.New()}
	k, _, err := s.CreateKey(ctx, base)
	if err != nil {
		t.Fatal(err)
	}
	before := everything(t, s)
	key := func(change func(*books.NewKey)) func() error {
		n := base
		change(&n)
		return func() error { _, _, err := s.CreateKey(ctx, n); return err }
	}
	for name, create := range map[string]func() error{
		"a tenant":            func() error { _, err := s.CreateTenant(ctx, books.NewTenant{Slug: "b"}); return err },
		"a user":              func() error { _, err := s.CreateUser(ctx, books.NewUser{Tenant: "acme", Email: "b@c"}); return err },
		"a rotation":          func() error { _, _, err := s.RotateKey(ctx, k.ID, books.Rotation{}); return err },
		"another name":        key(func(n *books.NewKey) { n.Name = "cd" }),
		"another budget":      key(func(n *books.NewKey) { n.BudgetCents = new(int64(6)) }),
		"no budget":           key(func(n *books.NewKey) { n.BudgetCents = nil }),
		"another concurrency": key(func(n *books.NewKey) { n.Concurrency = new(31) }),
		"another lifetime":    key(func(n *books.NewKey) { n.TTL = new(2 * time.Hour) }),
		"an end":              key(func(n *books.NewKey) { n.TTL, n.ExpiresAt = nil, new(time.Now().Add(time.Hour)) }),
		"other scopes":        key(func(n *books.NewKey) { n.Scopes = []string{"model:a"} }),
		"another secret":      key(func(n *books.NewKey) { n.Secret = apikey.New() }),
		"no secret":           key(func(n *books.NewKey) { n.Secret = apikey.Key{} }),
		"another user":        key(func(n *books.NewKey) { n.User = "b@c" }),
	} {
		err := create()
		if err == nil {
			t.Errorf("%s: no error", name)
		}
		wantError(t, err, schemas.CodeInvalidValue, "Idempotency-Key")
	}
	// What a default stands for is the same content.
	same := key(func(n *books.NewKey) { n.Concurrency, n.Scopes = new(32), []string{"model:*"} })
	if err := same(); err != nil {
		t.Error(err)
	}
	if after := everything(t, s); after != before {
		t.Errorf("it wrote: before\n%safter\n%s", before, after)
	}
}

// Of several creates with one name at once one makes something, and all return it.
func TestCreatesAtOnce(t *testing.T) {
	address := pgtest.New(t)
	const stores, each = 4, 4
	var list []*books.Store
	for range stores {
		list = append(list, openAt(t, books.Config{URL: address, MaxConns: each}))
	}
	_, user := household(t, list[0], "acme")
	key, _, err := list[0].CreateKey(t.Context(), books.NewKey{Tenant: "acme", User: user.Email})
	if err != nil {
		t.Fatal(err)
	}
	for round := range 10 {
		secret, rotated := apikey.New(), apikey.New()
		for name, create := range map[string]func(context.Context, *books.Store) (string, error){
			"tenant": func(ctx context.Context, s *books.Store) (string, error) {
				x, err := s.CreateTenant(ctx, books.NewTenant{Slug: fmt.Sprint("t", round)})
				return string(x.ID), err
			},
			"user": func(ctx context.Context, s *books.Store) (string, error) {
				x, err := s.CreateUser(ctx, books.NewUser{Tenant: "acme", Email: fmt.Sprint("u@", round)})
				return string(x.ID), err
			},
			"key": func(ctx context.Context, s *books.Store) (string, error) {
				x, got, err := s.CreateKey(ctx, books.NewKey{Tenant: "acme", User: user.Email, Secret: secret})
				return fmt.Sprint(x.ID, got), err
			},
			"rotation": func(ctx context.Context, s *books.Store) (string, error) {
				x, got, err := s.RotateKey(ctx, key.ID, books.Rotation{Secret: rotated})
				return fmt.Sprint(x.Prefix, got), err
			},
		} {
			ctx := books.WithIdempotency(t.Context(), fmt.Sprint(name, round))
			before := changes(t, list[0], -1).Version
			got := make([]string, stores*each)
			var wg sync.WaitGroup
			start := make(chan struct{})
			for i := range got {
				wg.Go(func() {
					<-start
					var err error
					if got[i], err = create(ctx, list[i%stores]); err != nil {
						t.Error(err)
					}
				})
			}
			close(start)
			wg.Wait()
			for i := range got {
				if got[i] != got[0] || got[i] == "" {
					t.Errorf("%s: %d got %q, 0 got %q", name, i, got[i], got[0])
				}
			}
			if after := changes(t, list[0], -1).Version; after != before+1 {
				t.Errorf("%s: %d versions", name, after-before)
			}
		}
	}
}

// A create that fails leaves its name free, for the same content once the reason is gone,
// or for other content; also for one that waits for it to end.
func TestNameOfAFailure(t *testing.T) {
	s := open(t)
	ctx := books.WithIdempotency(t.Context(), "n")
	_, err := s.CreateUser(ctx, books.NewUser{Tenant: "acme", Email: "a@b"})
	wantError(t, err, schemas.CodeNotFound, "")
	household(t, s, "acme")
	user, err := s.CreateUser(ctx, books.NewUser{Tenant: "acme", Email: "a@b"})
	if err != nil {
		t.Fatal(err)
	}
	if again, err := s.CreateUser(ctx, books.NewUser{Tenant: "acme", Email: "a@b"}); err != nil || again != user {
		t.Errorf("%+v, %v", again, err)
	}
	const n = 8
	var wg sync.WaitGroup
	var mu sync.Mutex
	made := map[schemas.TenantID]int{}
	ctx = books.WithIdempotency(t.Context(), "m")
	for i := range n {
		wg.Go(func() {
			// Half of them fail for their slug, whoever comes first.
			name := []string{"acme", "fresh"}[i%2]
			x, err := s.CreateTenant(ctx, books.NewTenant{Slug: name})
			if name == "fresh" {
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				made[x.ID]++
				mu.Unlock()
			} else if schemas.AsError(err).Code != schemas.CodeInvalidValue {
				t.Errorf("%+v, %v", x, err)
			}
		})
	}
	wg.Wait()
	if len(made) != 1 {
		t.Errorf("made %v", made)
	}
}

// What was made is returned as it is by then.
func TestRepeatedAfterAChange(t *testing.T) {
	s := open(t)
	_, user := household(t, s, "acme")
	ctx := books.WithIdempotency(t.Context(), "k")
	n := books.NewKey{Tenant: "acme", User: user.Email, Secret: apikey.New()}
	k, _, err := s.CreateKey(ctx, n)
	if err != nil {
		t.Fatal(err)
	}
	rotate := books.WithIdempotency(t.Context(), "r")
	turn := books.Rotation{Secret: apikey.New()}
	if _, _, err := s.RotateKey(rotate, k.ID, turn); err != nil {
		t.Fatal(err)
	}
	if _, err := s.RevokeKey(t.Context(), k.ID); err != nil {
		t.Fatal(err)
	}
	if again, _, err := s.CreateKey(ctx, n); err != nil || again.ID != k.ID || again.RevokedAt == nil {
		t.Errorf("%+v, %v", again, err)
	}
	if again, secret, err := s.RotateKey(rotate, k.ID, turn); err != nil || again.RevokedAt == nil || secret.Hash() != turn.Secret.Hash() {
		t.Errorf("%+v, %v", again, err)
	}
	// A secret that nobody gave is gone.
	ctx = books.WithIdempotency(t.Context(), "without")
	n.Secret = apikey.Key{}
	first, secret, err := s.CreateKey(ctx, n)
	if err != nil || secret.IsZero() {
		t.Fatal(err)
	}
	if again, secret, err := s.CreateKey(ctx, n); err != nil || again.ID != first.ID || !secret.IsZero() {
		t.Errorf("%+v, %v, %v", again, secret, err)
	}
}

// Names are remembered for a day, and not for ever.
func TestNamesAreForgotten(t *testing.T) {
	s := open(t)
	for i := range 150 {
		age := []time.Duration{47 * time.Hour, 49 * time.Hour}[i%2]
		if err := s.Exec(t.Context(), `
			INSERT INTO idempotency (name, action, content, object, created_at) VALUES ($1, 'x', decode(repeat('00', 32), 'hex'), 'x', now() - $2::interval)`,
			"old "+strconv.Itoa(i), age); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.CreateTenant(books.WithIdempotency(t.Context(), "new"), books.NewTenant{Slug: "a"}); err != nil {
		t.Fatal(err)
	}
	if left, err := books.Query[int](t.Context(), s, `SELECT count(*) FROM idempotency`); err != nil || left != 76 {
		t.Errorf("%d left, %v", left, err)
	}
	if young, err := books.Query[int](t.Context(), s, `SELECT count(*) FROM idempotency WHERE created_at > now() - interval '48 hours'`); err != nil || young != 76 {
		t.Errorf("%d young, %v", young, err)
	}
	// Under a name that is forgotten something else may be made.
	if _, err := s.CreateTenant(books.WithIdempotency(t.Context(), "old 1"), books.NewTenant{Slug: "b"}); err != nil {
		t.Error(err)
	}
	_, err := s.CreateTenant(books.WithIdempotency(t.Context(), "old 0"), books.NewTenant{Slug: "c"})
	wantError(t, err, schemas.CodeInvalidValue, "Idempotency-Key")
}
