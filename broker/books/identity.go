package books

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/schemas"
)

// Identity is who a key stands for, and what it may do. Its slice is shared: don't
// change it.
type Identity struct {
	Key         schemas.KeyID
	Tenant      schemas.TenantID
	Slug        string // of the tenant
	User        schemas.UserID
	Name        string // of the key
	Prefix      string // the part of the secret that may be seen
	Scopes      []string
	BudgetCents *int64 // for a month; nil: no bound
	Concurrency int    // requests of the key in flight
	QPS         int    // requests of the tenant each second

	Revoked bool
	// ExpiresAt is when the key or this secret of it ends, whichever is earlier; nil: never.
	ExpiresAt   *time.Time
	TenantState TenantState
	UserState   UserState

	// AsOf is the database's clock when it answered, and so what ExpiresAt is to be
	// held against, whatever the clock of this machine says.
	AsOf time.Time
	// Version is the version of the books that the answer comes from, see Changes.
	Version int64
}

// Allows reports whether the scopes hold the model.
func (id Identity) Allows(model string) bool {
	for _, s := range id.Scopes {
		if s == ScopeAll || len(s) == len(scopeModel)+len(model) && s[:len(scopeModel)] == scopeModel && s[len(scopeModel):] == model {
			return true
		}
	}
	return false
}

// LookupKey returns whom the key with a secret stands for, even if it isn't valid any
// more: that is for the caller to judge. A secret that no key has or had is a key_invalid
// *schemas.Error.
func (s *Store) LookupKey(ctx context.Context, hash apikey.Hash) (Identity, error) {
	var id Identity
	err := s.read(ctx, "look up a key", func(ctx context.Context) error {
		id = Identity{}
		err := s.pool.QueryRow(ctx, `
			SELECT k.id, k.tenant_id, t.slug, k.user_id, k.name, s.prefix, k.scopes, k.budget_cents, k.concurrency, t.qps,
				k.revoked_at IS NOT NULL, least(k.expires_at, s.expires_at), t.state, u.state, now(), c.version
			FROM key_secrets s
			JOIN api_keys k ON k.id = s.key_id
			JOIN tenants t ON t.id = k.tenant_id
			JOIN users u ON u.id = k.user_id
			CROSS JOIN change_counter c
			WHERE s.hash = $1`, hash[:]).
			Scan(&id.Key, &id.Tenant, &id.Slug, &id.User, &id.Name, &id.Prefix, &id.Scopes, &id.BudgetCents, &id.Concurrency, &id.QPS,
				&id.Revoked, &id.ExpiresAt, &id.TenantState, &id.UserState, &id.AsOf, &id.Version)
		if errors.Is(err, pgx.ErrNoRows) {
			return schemas.Errorf(schemas.CodeKeyInvalid, "The API key doesn't exist or has been revoked.")
		}
		return err
	})
	if err != nil {
		return Identity{}, err
	}
	return id, nil
}
