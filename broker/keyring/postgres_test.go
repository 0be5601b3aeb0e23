package keyring

import (
	"errors"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/faultproxy"
	"github.com/ownllm/ownllm/internal/pgtest"
	"github.com/ownllm/ownllm/schemas"
)

func open(t *testing.T, address string) *books.Store {
	t.Helper()
	s, err := books.Open(t.Context(), books.Config{URL: address, MaxConns: 3})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// slack is what busy cores may add to a promised time.
const slack = 2 * time.Second

// What an admin does at one place takes effect at every other within a second, by the
// real clock.
func TestEffectWithinASecond(t *testing.T) {
	address := pgtest.New(t)
	admin := open(t, address)
	_, user, row, err := admin.EnsureFirst(t.Context(), apikey.New())
	if err != nil {
		t.Fatal(err)
	}
	var keys []apikey.Key
	for range 2 {
		_, secret, err := admin.CreateKey(t.Context(), books.NewKey{Tenant: books.FirstTenant, User: books.FirstEmail})
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, secret)
	}
	k := New(open(t, address), quiet)
	heard := make(chan books.Change, 100)
	k.OnChange(func(kind books.Kind, id string) { heard <- books.Change{Kind: kind, ID: id} })
	running(t, k, func() {
		// until the key is refused with the code, or accepted if there is none
		await := func(key apikey.Key, want schemas.Code) {
			t.Helper()
			start := time.Now()
			for {
				_, err := k.Authenticate(t.Context(), key, books.FirstTenant)
				if want == "" && err == nil || err != nil && schemas.AsError(err).Code == want {
					break
				}
				if time.Since(start) > time.Second+slack {
					t.Fatalf("after %v: %v, want %q", time.Since(start), err, want)
				}
				time.Sleep(5 * time.Millisecond) // there is no signal: this is what a client sees
			}
			t.Logf("%q after %v", want, time.Since(start))
		}
		cached := func(key apikey.Key) {
			t.Helper()
			await(key, "")
			for start := time.Now(); ; {
				if _, ok := k.Cached(key, ""); ok {
					return
				}
				if time.Since(start) > 30*time.Second {
					t.Fatal("never in memory")
				}
				await(key, "")
			}
		}
		for _, key := range keys {
			cached(key)
		}
		do := func(_ any, err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		do(admin.SetTenantState(t.Context(), books.FirstTenant, books.TenantSuspended))
		await(keys[0], schemas.CodeTenantDisabled)
		do(admin.SetTenantState(t.Context(), books.FirstTenant, books.TenantActive))
		await(keys[0], "")
		do(admin.SetUserState(t.Context(), user.ID, books.UserDeactivated))
		await(keys[0], schemas.CodeUserDeactivated)
		do(admin.SetUserState(t.Context(), user.ID, books.UserActive))
		await(keys[0], "")
		cached(keys[0])
		id, err := k.Authenticate(t.Context(), keys[0], "")
		if err != nil {
			t.Fatal(err)
		}
		do(admin.RevokeKey(t.Context(), id.Key))
		await(keys[0], schemas.CodeKeyInvalid)
		if _, err := k.Authenticate(t.Context(), keys[1], ""); err != nil {
			t.Errorf("the other key: %v", err)
		}
		for c := range heard {
			if c == (books.Change{Kind: books.KindKey, ID: string(id.Key)}) {
				break
			}
		}
		if id.Key == row.ID {
			t.Error("the wrong key")
		}
	})
}

// With the books away a key works for at most a second more, and then again as soon as
// they are back.
func TestBooksAway(t *testing.T) {
	address := pgtest.New(t)
	proxy := faultproxy.New(t, address)
	secret := apikey.New()
	if _, _, _, err := open(t, address).EnsureFirst(t.Context(), secret); err != nil {
		t.Fatal(err)
	}
	k := New(open(t, proxy.URL()), quiet)
	running(t, k, func() {
		until := func(limit time.Duration, done func(error) bool) {
			t.Helper()
			start := time.Now()
			for {
				_, err := k.Authenticate(t.Context(), secret, "")
				if done(err) {
					t.Logf("after %v: %v", time.Since(start), err)
					return
				}
				if time.Since(start) > limit {
					t.Fatalf("after %v: %v", time.Since(start), err)
				}
				time.Sleep(5 * time.Millisecond)
			}
		}
		works := func(err error) bool { return err == nil }
		refused := func(err error) bool {
			return errors.Is(err, books.ErrUnavailable) && schemas.AsError(err).Code == schemas.CodeInternalError
		}
		until(30*time.Second, works)
		for _, fail := range []func(){proxy.Cut, proxy.Stall} {
			fail()
			until(maxStale+lookupTimeout+slack, refused)
			proxy.Restore()
			until(30*time.Second, works)
		}
	})
}

// A rotation, and new limits, hold at every edge within a second, and an old secret ends
// when its overlap does.
func TestRotationAndLimits(t *testing.T) {
	address := pgtest.New(t)
	admin := open(t, address)
	first := apikey.New()
	_, _, row, err := admin.EnsureFirst(t.Context(), first)
	if err != nil {
		t.Fatal(err)
	}
	edges := []*Keyring{New(open(t, address), quiet), New(open(t, address), quiet)}
	running(t, edges[0], func() {
		running(t, edges[1], func() {
			// await waits until every edge says of the secret what done wants.
			await := func(what string, secret apikey.Key, limit time.Duration, done func(books.Identity, error) bool) {
				t.Helper()
				start := time.Now()
				for i, k := range edges {
					for {
						id, err := k.Authenticate(t.Context(), secret, books.FirstTenant)
						if done(id, err) {
							break
						}
						if time.Since(start) > limit {
							t.Fatalf("%s: edge %d says %+v, %v after %v", what, i, id, err, time.Since(start))
						}
						time.Sleep(5 * time.Millisecond) // there is no signal: this is what a client sees
					}
				}
				t.Logf("%s after %v", what, time.Since(start))
			}
			accepted := func(id books.Identity, err error) bool { return err == nil && id.Key == row.ID }
			expired := func(_ books.Identity, err error) bool {
				return err != nil && schemas.AsError(err).Code == schemas.CodeKeyExpired
			}
			invalid := func(_ books.Identity, err error) bool {
				return err != nil && schemas.AsError(err).Code == schemas.CodeKeyInvalid
			}
			cached := func(secret apikey.Key) {
				t.Helper()
				for _, k := range edges {
					for start := time.Now(); ; {
						if _, ok := k.Cached(secret, ""); ok {
							break
						}
						if time.Since(start) > 30*time.Second {
							t.Fatal("never in memory")
						}
						if _, err := k.Authenticate(t.Context(), secret, ""); err != nil {
							t.Fatal(err)
						}
					}
				}
			}
			rotate := func(overlap time.Duration) apikey.Key {
				t.Helper()
				_, secret, err := admin.RotateKey(t.Context(), row.ID, books.Rotation{Overlap: overlap})
				if err != nil {
					t.Fatal(err)
				}
				return secret
			}
			cached(first)
			const overlap = 5 * time.Second
			began := time.Now()
			second := rotate(overlap)
			await("the new secret is accepted", second, time.Second+slack, accepted)
			cached(first)
			cached(second)
			await("the old secret has ended", first, overlap+time.Second+slack, expired)
			if lived := time.Since(began); lived < overlap-500*time.Millisecond {
				t.Errorf("the old secret lived for %v", lived)
			}
			await("the new secret goes on", second, time.Second+slack, accepted)
			third := rotate(0)
			await("the second secret has ended", second, time.Second+slack, expired)
			await("the third secret is accepted", third, time.Second+slack, accepted)

			cached(third)
			if _, err := admin.SetKey(t.Context(), row.ID, books.KeyChange{Concurrency: new(7), BudgetCents: new(int64(3)), Scopes: []string{"model:a"}}); err != nil {
				t.Fatal(err)
			}
			await("the key's limits hold", third, time.Second+slack, func(id books.Identity, err error) bool {
				return err == nil && id.Concurrency == 7 && id.BudgetCents != nil && *id.BudgetCents == 3 && !id.Allows("b")
			})
			cached(third)
			if _, err := admin.SetTenant(t.Context(), books.FirstTenant, books.TenantChange{QPS: new(9)}); err != nil {
				t.Fatal(err)
			}
			await("the tenant's limit holds", third, time.Second+slack, func(id books.Identity, err error) bool { return err == nil && id.QPS == 9 })

			fourth := rotate(time.Hour)
			await("the fourth secret is accepted", fourth, time.Second+slack, accepted)
			cached(third)
			cached(fourth)
			if _, err := admin.RevokeKey(t.Context(), row.ID); err != nil {
				t.Fatal(err)
			}
			await("the fourth secret is revoked", fourth, time.Second+slack, invalid)
			await("the third secret is revoked", third, 100*time.Millisecond+slack, invalid)
		})
	})
}
