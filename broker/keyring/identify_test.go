package keyring

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/schemas"
)

// Somebody who is known by the id of a key is judged as by the secret, and as fast.
func TestIdentify(t *testing.T) {
	for _, c := range []struct {
		code  schemas.Code
		kind  books.Kind
		apply func(*books.Identity)
	}{
		{schemas.CodeKeyInvalid, books.KindKey, func(id *books.Identity) { id.Revoked = true }},
		{schemas.CodeKeyExpired, books.KindKey, func(id *books.Identity) { id.ExpiresAt = new(time.Now().Add(-time.Second)) }},
		{schemas.CodeTenantDisabled, books.KindTenant, func(id *books.Identity) { id.TenantState = books.TenantSuspended }},
		{schemas.CodeUserDeactivated, books.KindUser, func(id *books.Identity) { id.UserState = books.UserDeactivated }},
	} {
		synctest.Test(t, func(t *testing.T) {
			store := newFake()
			k := New(store, quiet)
			key, id := apikey.New(), valid()
			store.put(key, id, books.KindKey)
			running(t, k, func() {
				time.Sleep(time.Second)
				for range 3 {
					got, err := k.Identify(t.Context(), id.Key)
					if err != nil || got.Key != id.Key || got.Tenant != id.Tenant {
						t.Errorf("%+v, %v", got, err)
					}
				}
				if n := store.count(); n != 1 {
					t.Errorf("%d lookups for three questions", n)
				}
				if got, err := k.Recognize(t.Context(), key.Hash(), ""); err != nil || got.Key != id.Key {
					t.Errorf("by the secret: %+v, %v", got, err)
				}
				c.apply(&id)
				store.put(key, id, c.kind)
				time.Sleep(time.Second)
				_, err := k.Identify(t.Context(), id.Key)
				wantCode(t, err, c.code)
				_, err = k.Recognize(t.Context(), key.Hash(), "")
				wantCode(t, err, c.code)
			})
		})
	}
}

// An unknown id costs one lookup for a while, and so does a fingerprint of nothing.
func TestIdentifyNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newFake()
		k := New(store, quiet)
		running(t, k, func() {
			synctest.Wait()
			for range 3 {
				_, err := k.Identify(t.Context(), "key_nobody")
				wantCode(t, err, schemas.CodeKeyInvalid)
				_, err = k.Recognize(t.Context(), apikey.Hash{1}, "")
				wantCode(t, err, schemas.CodeKeyInvalid)
			}
			if n := store.count(); n != 2 {
				t.Errorf("%d lookups for two names", n)
			}
		})
	})
}

func TestGuardID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newFake()
		k := New(store, quiet)
		key, id := apikey.New(), valid()
		store.put(key, id, books.KindKey)
		running(t, k, func() {
			time.Sleep(time.Second)
			var ended, released *schemas.Error
			defer k.GuardID(id, func(err *schemas.Error) { ended = err })()
			k.GuardID(id, func(err *schemas.Error) { released = err })()
			id.Concurrency = 1
			store.put(key, id, books.KindKey)
			time.Sleep(time.Second)
			synctest.Wait()
			if ended != nil {
				t.Errorf("ended by a change that ends nothing: %v", ended)
			}
			id.Revoked = true
			store.put(key, id, books.KindKey)
			time.Sleep(time.Second)
			synctest.Wait()
			if ended == nil || ended.Code != schemas.CodeKeyInvalid || released != nil {
				t.Errorf("ended %v, released %v", ended, released)
			}
		})
	})
}
