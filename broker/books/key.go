package books

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/schemas"
)

// defaultConcurrency is how many requests of a key may be in flight.
const defaultConcurrency = 32

// Key is an API key, without its secret.
type Key struct {
	ID     schemas.KeyID    `json:"id"`
	Tenant schemas.TenantID `json:"tenant_id"`
	Slug   string           `json:"tenant_slug"`
	User   schemas.UserID   `json:"user_id"`
	Email  string           `json:"email"` // of the user
	Name   string           `json:"name"`
	// Prefix is the part of the secret that may be seen.
	Prefix string `json:"prefix"`
	// Scopes are "model:<id>" or "model:*"; there is at least one.
	Scopes []string `json:"scopes"`
	// BudgetCents is what the key may spend in a month; nil: no bound.
	BudgetCents *int64 `json:"budget_cents"`
	// Concurrency is how many requests may be in flight at once.
	Concurrency int        `json:"concurrency"`
	ExpiresAt   *time.Time `json:"expires_at"`
	RevokedAt   *time.Time `json:"revoked_at"`
	CreatedAt   time.Time  `json:"created_at"`
}

// NewKey is what a key is made of.
type NewKey struct {
	Tenant      string         // id or slug
	User        string         // id or e-mail address, of that tenant
	Name        string         // may be empty
	Scopes      []string       // none: all models
	BudgetCents *int64         // nil: no bound
	Concurrency *int           // nil: 32
	TTL         *time.Duration // nil: it doesn't expire
	// Secret is used if it isn't zero, else a new one is made.
	Secret apikey.Key
}

// checked is a NewKey with its defaults, all of it valid.
func (n NewKey) checked() (_ NewKey, err error) {
	if err := checkName(n.Name); err != nil {
		return NewKey{}, err
	}
	if n.Scopes, err = checkScopes(n.Scopes); err != nil {
		return NewKey{}, err
	}
	if n.BudgetCents != nil && (*n.BudgetCents < 0 || *n.BudgetCents > maxBudget) {
		return NewKey{}, invalid("budget_cents", "budget_cents must be from 0 to %d.", int64(maxBudget))
	}
	concurrency, err := checkRate("concurrency", n.Concurrency, defaultConcurrency)
	if err != nil {
		return NewKey{}, err
	}
	n.Concurrency = &concurrency
	if n.TTL != nil && (*n.TTL <= 0 || *n.TTL > maxTTL) {
		return NewKey{}, invalid("ttl", "ttl must be more than 0 and at most 100 years.")
	}
	if n.Secret.IsZero() {
		n.Secret = apikey.New()
	}
	return n, nil
}

const keyColumns = `id, tenant_id, (SELECT slug FROM tenants WHERE tenants.id = api_keys.tenant_id),
	user_id, (SELECT email FROM users WHERE users.id = api_keys.user_id), name, prefix, scopes, budget_cents, concurrency, expires_at, revoked_at, created_at`

func scanKey(row pgx.CollectableRow) (Key, error) {
	var k Key
	err := row.Scan(&k.ID, &k.Tenant, &k.Slug, &k.User, &k.Email, &k.Name, &k.Prefix, &k.Scopes, &k.BudgetCents, &k.Concurrency,
		&k.ExpiresAt, &k.RevokedAt, &k.CreatedAt)
	return k, err
}

// CreateKey makes a key, and returns its secret, which can't be had again.
func (s *Store) CreateKey(ctx context.Context, n NewKey) (k Key, secret apikey.Key, err error) {
	n, err = n.checked()
	if err != nil {
		return Key{}, apikey.Key{}, err
	}
	err = s.write(ctx, "create a key", func(ctx context.Context, tx pgx.Tx) ([]Change, error) {
		t, err := getTenant(ctx, tx, n.Tenant)
		if err != nil {
			return nil, err
		}
		u, err := getUser(ctx, tx, t.ID, n.User)
		if err != nil {
			return nil, err
		}
		k, err = createKey(ctx, tx, u, n)
		return []Change{{KindKey, string(k.ID)}}, err
	})
	if err != nil {
		return Key{}, apikey.Key{}, err
	}
	return k, n.Secret, nil
}

func createKey(ctx context.Context, tx pgx.Tx, u User, n NewKey) (Key, error) {
	hash := n.Secret.Hash()
	rows, err := tx.Query(ctx, `
		INSERT INTO api_keys (id, tenant_id, user_id, name, hash, prefix, scopes, budget_cents, concurrency, expires_at)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, now() + $10::interval) RETURNING `+keyColumns,
		schemas.NewKeyID(), u.Tenant, u.ID, n.Name, hash[:], n.Secret.Prefix(), n.Scopes, n.BudgetCents, *n.Concurrency, n.TTL)
	if err != nil {
		return Key{}, err
	}
	return pgx.CollectExactlyOneRow(rows, scanKey)
}

// ListKeys returns a page of the keys of the tenant with the given id or slug, and
// the cursor of the next page. user, an id or e-mail address, cuts it down to one
// user's if it isn't empty.
func (s *Store) ListKeys(ctx context.Context, tenant, user string, page Page) (list []Key, next string, err error) {
	limit, err := page.check("key_")
	if err != nil {
		return nil, "", err
	}
	err = s.read(ctx, "list the keys", func(ctx context.Context) error {
		t, err := getTenant(ctx, s.pool, tenant)
		if err != nil {
			return err
		}
		query, args := `SELECT `+keyColumns+` FROM api_keys WHERE tenant_id = $1 AND id > $2`, []any{t.ID, page.After, limit}
		if user != "" {
			u, err := getUser(ctx, s.pool, t.ID, user)
			if err != nil {
				return err
			}
			query, args = query+` AND user_id = $4`, append(args, u.ID)
		}
		rows, err := s.pool.Query(ctx, query+` ORDER BY id LIMIT $3`, args...)
		if err != nil {
			return err
		}
		list, err = pgx.CollectRows(rows, scanKey)
		return err
	})
	if err != nil {
		return nil, "", err
	}
	list, next = cut(list, limit, func(k Key) string { return string(k.ID) })
	return list, next, nil
}

// RevokeKey ends a key for good. Again, it changes nothing.
func (s *Store) RevokeKey(ctx context.Context, id schemas.KeyID) (k Key, err error) {
	if schemas.ValidateID(string(id), "key_") != nil {
		return Key{}, notFound("key", "") // it may be a secret, pasted into the wrong place
	}
	err = s.write(ctx, "revoke a key", func(ctx context.Context, tx pgx.Tx) ([]Change, error) {
		rows, err := tx.Query(ctx, `UPDATE api_keys SET revoked_at = coalesce(revoked_at, now()) WHERE id = $1 RETURNING `+keyColumns, id)
		if err != nil {
			return nil, err
		}
		k, err = pgx.CollectExactlyOneRow(rows, scanKey)
		return []Change{{KindKey, string(id)}}, orNotFound(err, "key", string(id))
	})
	if err != nil {
		return Key{}, err
	}
	return k, nil
}
