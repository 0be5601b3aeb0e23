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

// identities selects identities, all but the condition on the secret s or the key k.
const identities = `
	SELECT k.id, k.tenant_id, t.slug, k.user_id, k.name, s.prefix, k.scopes, k.budget_cents, k.concurrency, t.qps,
		k.revoked_at IS NOT NULL, least(k.expires_at, s.expires_at), t.state, u.state, now(), c.version, s.hash
	FROM key_secrets s
	JOIN api_keys k ON k.id = s.key_id
	JOIN tenants t ON t.id = k.tenant_id
	JOIN users u ON u.id = k.user_id
	CROSS JOIN change_counter c
	WHERE `

// scanIdentity reads a row of identities, and the hash of the secret.
func scanIdentity(row pgx.Row) (id Identity, hash apikey.Hash, err error) {
	var secret []byte
	err = row.Scan(&id.Key, &id.Tenant, &id.Slug, &id.User, &id.Name, &id.Prefix, &id.Scopes, &id.BudgetCents, &id.Concurrency, &id.QPS,
		&id.Revoked, &id.ExpiresAt, &id.TenantState, &id.UserState, &id.AsOf, &id.Version, &secret)
	copy(hash[:], secret)
	return id, hash, err
}

// LookupKey returns whom the key with a secret stands for, even if it isn't valid any
// more: that is for the caller to judge. A secret that no key has or had is a key_invalid
// *schemas.Error.
func (s *Store) LookupKey(ctx context.Context, hash apikey.Hash) (Identity, error) {
	return s.lookup(ctx, `s.hash = $1`, hash[:])
}

// LookupKeyID is LookupKey for who isn't known by a secret: the identity is that of the
// key's current one.
func (s *Store) LookupKeyID(ctx context.Context, key schemas.KeyID) (Identity, error) {
	return s.lookup(ctx, `k.id = $1 AND s.expires_at IS NULL`, key)
}

func (s *Store) lookup(ctx context.Context, condition string, arg any) (id Identity, err error) {
	err = s.read(ctx, "look up a key", func(ctx context.Context) error {
		id, _, err = scanIdentity(s.pool.QueryRow(ctx, identities+condition, arg))
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

// LookupKeys is LookupKey for many secrets at once. Those that no key has or had are
// missing.
func (s *Store) LookupKeys(ctx context.Context, hashes []apikey.Hash) (found map[apikey.Hash]Identity, err error) {
	secrets := make([][]byte, len(hashes))
	for i := range hashes {
		secrets[i] = hashes[i][:]
	}
	err = s.read(ctx, "look up keys", func(ctx context.Context) error {
		rows, err := s.pool.Query(ctx, identities+`s.hash = ANY ($1)`, secrets)
		if err != nil {
			return err
		}
		defer rows.Close()
		found = make(map[apikey.Hash]Identity, len(hashes))
		for rows.Next() {
			id, hash, err := scanIdentity(rows)
			if err != nil {
				return err
			}
			found[hash] = id
		}
		return rows.Err()
	})
	if err != nil {
		return nil, err
	}
	return found, nil
}
