package keyring

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/credential"
	"github.com/ownllm/ownllm/internal/pgtest"
	"github.com/ownllm/ownllm/schemas"
)

// A credential costs no query while nothing changes, and is dead a second after its agent
// was removed.
func TestAgents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newFake()
		secret, other := credential.NewAgent(), credential.NewAgent()
		id := books.AgentIdentity{Agent: schemas.NewAgentID(), Tenant: schemas.NewTenantID(), Name: "rig"}
		store.setAgent(secret, id.Agent, &id)
		k := New(store, quiet)
		if got, err := k.AuthenticateAgent(t.Context(), secret); err != nil || got.Agent != id.Agent || got.Tenant != id.Tenant {
			t.Errorf("before the first poll: %+v, %v", got, err)
		}
		if _, ok := k.CachedAgent(secret); ok {
			t.Error("used from memory before the first poll")
		}
		running(t, k, func() {
			synctest.Wait()
			for range 3 {
				if _, err := k.AuthenticateAgent(t.Context(), secret); err != nil {
					t.Error(err)
				}
			}
			asked := store.count()
			for range 10 {
				time.Sleep(500 * time.Millisecond)
				if got, ok := k.CachedAgent(secret); !ok || got.Agent != id.Agent {
					t.Errorf("%+v, %v", got, ok)
				}
			}
			// A change of another agent, or a pairing, leaves it.
			store.setAgent(other, schemas.NewAgentID(), &books.AgentIdentity{Agent: schemas.NewAgentID()})
			time.Sleep(500 * time.Millisecond)
			if _, ok := k.CachedAgent(secret); !ok || store.count() != asked {
				t.Error("asked for an agent that hasn't changed")
			}

			store.setAgent(secret, id.Agent, nil)
			time.Sleep(300 * time.Millisecond)
			_, err := k.AuthenticateAgent(t.Context(), secret)
			wantCode(t, err, schemas.CodeKeyInvalid)
			asked = store.count()
			for range 10 {
				_, err := k.AuthenticateAgent(t.Context(), secret)
				wantCode(t, err, schemas.CodeKeyInvalid)
			}
			if store.count() != asked {
				t.Error("each try of an unknown credential asks the books")
			}

			store.set(true)
			if _, err := k.AuthenticateAgent(t.Context(), other); err == nil || schemas.AsError(err).Code != schemas.CodeInternalError {
				t.Errorf("books away: %v", err)
			}
		})
	})
}

// What is looked up right behind a change is kept by the poll that brings the change: it is true.
func TestAnswerOutlivesTheChangeBeforeIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newFake()
		k := New(store, quiet)
		running(t, k, func() {
			synctest.Wait()
			secret, key := credential.NewAgent(), apikey.New()
			id := books.AgentIdentity{Agent: schemas.NewAgentID(), Tenant: schemas.NewTenantID()}
			store.setAgent(secret, id.Agent, &id)
			store.put(key, books.Identity{Key: schemas.NewKeyID(), TenantState: books.TenantActive, UserState: books.UserActive}, books.KindKey)
			if _, err := k.AuthenticateAgent(t.Context(), secret); err != nil {
				t.Error(err)
			}
			if _, err := k.Authenticate(t.Context(), key, ""); err != nil {
				t.Error(err)
			}
			time.Sleep(2 * maxStale)
			if _, ok := k.CachedAgent(secret); !ok {
				t.Error("the agent has to be looked up once more")
			}
			if _, ok := k.Cached(key, ""); !ok {
				t.Error("the key has to be looked up once more")
			}
			store.setAgent(secret, id.Agent, nil)
			time.Sleep(2 * pollEvery)
			if _, ok := k.CachedAgent(secret); ok {
				t.Error("a later change doesn't throw it out")
			}
		})
	})
}

// An answer that is older than the last poll is used once, and not kept.
func TestLateAnswerOfAnAgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newFake()
		secret := credential.NewAgent()
		id := books.AgentIdentity{Agent: schemas.NewAgentID(), Tenant: schemas.NewTenantID()}
		store.setAgent(secret, id.Agent, &id)
		late := &slowAgents{fake: store, release: make(chan struct{})}
		k := New(late, quiet)
		running(t, k, func() {
			synctest.Wait()
			answered := make(chan error, 1)
			go func() {
				_, err := k.AuthenticateAgent(t.Context(), secret)
				answered <- err
			}()
			synctest.Wait()
			store.setAgent(secret, id.Agent, nil)
			time.Sleep(500 * time.Millisecond)
			close(late.release)
			if err := <-answered; err != nil {
				t.Error(err)
			}
			_, err := k.AuthenticateAgent(t.Context(), secret)
			wantCode(t, err, schemas.CodeKeyInvalid)
		})
	})
}

// slowAgents is a store whose lookups of agents wait after they have looked.
type slowAgents struct {
	*fake
	release chan struct{}
}

func (s *slowAgents) LookupAgent(ctx context.Context, hash credential.Hash) (books.AgentIdentity, error) {
	id, err := s.fake.LookupAgent(ctx, hash)
	<-s.release
	return id, err
}

// By the real clock and the real books, a removed agent is out within a second.
func TestRemovalWithinASecond(t *testing.T) {
	address := pgtest.New(t)
	admin := open(t, address)
	if _, _, _, err := admin.EnsureFirst(t.Context(), apikey.New()); err != nil {
		t.Fatal(err)
	}
	secret := credential.NewAgent()
	a, err := admin.AddAgent(t.Context(), books.FirstTenant, schemas.NewAgentID(), "rig", secret)
	if err != nil {
		t.Fatal(err)
	}
	k := New(open(t, address), quiet)
	running(t, k, func() {
		for cached := false; !cached; _, cached = k.CachedAgent(secret) {
			if got, err := k.AuthenticateAgent(t.Context(), secret); err != nil || got.Agent != a.ID {
				t.Fatalf("%+v, %v", got, err)
			}
		}
		if _, err := admin.RemoveAgent(t.Context(), a.ID); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		for {
			_, err := k.AuthenticateAgent(t.Context(), secret)
			if err != nil {
				wantCode(t, err, schemas.CodeKeyInvalid)
				t.Logf("out after %v", time.Since(start))
				break
			}
			if took := time.Since(start); took > time.Second+slack {
				t.Fatalf("still in after %s", took)
			}
			time.Sleep(5 * time.Millisecond) // there is no signal: this is what an agent sees
		}
	})
}
