package books

import (
	"context"
	"fmt"
	"slices"
	"strings"
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
	// Prefix is the part of the current secret that may be seen.
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
	TTL         *time.Duration // from now on; nil: it doesn't expire
	ExpiresAt   *time.Time     // instead of a TTL
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
	if err := checkBudget(n.BudgetCents); err != nil {
		return NewKey{}, err
	}
	concurrency, err := checkRate("concurrency", n.Concurrency, defaultConcurrency)
	if err != nil {
		return NewKey{}, err
	}
	n.Concurrency = &concurrency
	if n.TTL != nil && (*n.TTL <= 0 || *n.TTL > maxTTL) {
		return NewKey{}, invalid("ttl_seconds", "A key's lifetime must be more than 0 and at most 100 years.")
	}
	if n.TTL != nil && n.ExpiresAt != nil {
		return NewKey{}, invalid("expires_at", "A key can't have both a lifetime and an expires_at.")
	}
	if n.Secret.IsZero() {
		n.Secret = apikey.New()
	}
	return n, nil
}

// content says all of what is asked for, but for the secret itself, of which it has the
// hash.
func (n NewKey) content(given apikey.Key) any {
	var expires string
	if n.ExpiresAt != nil {
		expires = n.ExpiresAt.UTC().Format(time.RFC3339Nano)
	}
	return []any{n.Tenant, n.User, n.Name, n.Scopes, n.BudgetCents, n.Concurrency, n.TTL, expires, hashText(given)}
}

const keyColumns = `id, tenant_id, (SELECT slug FROM tenants WHERE tenants.id = api_keys.tenant_id),
	user_id, (SELECT email FROM users WHERE users.id = api_keys.user_id), name,
	coalesce((SELECT prefix FROM key_secrets WHERE key_secrets.key_id = api_keys.id AND key_secrets.expires_at IS NULL), ''),
	scopes, budget_cents, concurrency, expires_at, revoked_at, created_at`

func scanKey(row pgx.CollectableRow) (Key, error) {
	var k Key
	err := row.Scan(&k.ID, &k.Tenant, &k.Slug, &k.User, &k.Email, &k.Name, &k.Prefix, &k.Scopes, &k.BudgetCents, &k.Concurrency,
		&k.ExpiresAt, &k.RevokedAt, &k.CreatedAt)
	return k, err
}

// CreateKey makes a key, and returns its secret, which can't be had again. See
// WithIdempotency.
func (s *Store) CreateKey(ctx context.Context, n NewKey) (k Key, secret apikey.Key, err error) {
	given := n.Secret
	n, err = n.checked()
	if err != nil {
		return Key{}, apikey.Key{}, err
	}
	err = s.write(ctx, "create a key", func(ctx context.Context, tx pgx.Tx) ([]deed, error) {
		id := schemas.NewKeyID()
		made, err := claim(ctx, tx, "key.create", n.content(given), string(id))
		if err != nil {
			return nil, err
		}
		if made != "" {
			secret = given
			k, err = getKey(ctx, tx, schemas.KeyID(made))
			return nil, err
		}
		t, err := getTenant(ctx, tx, n.Tenant)
		if err != nil {
			return nil, err
		}
		u, err := getUser(ctx, tx, t.ID, n.User)
		if err != nil {
			return nil, err
		}
		var d deed
		k, d, err = createKey(ctx, tx, id, u, n)
		secret = n.Secret
		return []deed{d}, err
	})
	if err != nil {
		return Key{}, apikey.Key{}, err
	}
	return k, secret, nil
}

func createKey(ctx context.Context, tx pgx.Tx, id schemas.KeyID, u User, n NewKey) (Key, deed, error) {
	if err := checkExpiry(ctx, tx, n.ExpiresAt); err != nil {
		return Key{}, deed{}, err
	}
	_, err := tx.Exec(ctx, `
		INSERT INTO api_keys (id, tenant_id, user_id, name, scopes, budget_cents, concurrency, expires_at)
		VALUES ($1, $2, $3, $4, $5, $6, $7, coalesce($8, now() + $9::interval))`,
		id, u.Tenant, u.ID, n.Name, n.Scopes, n.BudgetCents, *n.Concurrency, n.ExpiresAt, n.TTL)
	if err != nil {
		return Key{}, deed{}, err
	}
	if err := addSecret(ctx, tx, id, n.Secret); err != nil {
		return Key{}, deed{}, err
	}
	k, err := getKey(ctx, tx, id)
	return k, deed{Change{KindKey, string(id)}, "key.create", u.Tenant, map[string]any{
		"user_id": k.User, "name": k.Name, "prefix": k.Prefix, "scopes": k.Scopes,
		"budget_cents": k.BudgetCents, "concurrency": k.Concurrency, "expires_at": k.ExpiresAt,
	}}, err
}

// checkExpiry holds the end of a new key against the database's clock.
func checkExpiry(ctx context.Context, tx pgx.Tx, at *time.Time) error {
	if at == nil {
		return nil
	}
	var now time.Time
	if err := tx.QueryRow(ctx, `SELECT now()`).Scan(&now); err != nil {
		return err
	}
	if !at.After(now) || at.After(now.Add(maxTTL)) {
		return invalid("expires_at", "expires_at must lie in the future, by at most 100 years.")
	}
	return nil
}

// addSecret gives a key its current secret.
func addSecret(ctx context.Context, tx pgx.Tx, id schemas.KeyID, secret apikey.Key) error {
	hash := secret.Hash()
	_, err := tx.Exec(ctx, `INSERT INTO key_secrets (hash, key_id, prefix) VALUES ($1, $2, $3)`, hash[:], id, secret.Prefix())
	return err
}

func getKey(ctx context.Context, q querier, id schemas.KeyID) (Key, error) {
	if schemas.ValidateID(string(id), "key_") != nil {
		return Key{}, notFound("key", "") // it may be a secret, pasted into the wrong place
	}
	rows, err := q.Query(ctx, `SELECT `+keyColumns+` FROM api_keys WHERE id = $1`, id)
	if err != nil {
		return Key{}, err
	}
	k, err := pgx.CollectExactlyOneRow(rows, scanKey)
	return k, orNotFound(err, "key", string(id))
}

// lockKey is getKey for whoever is going to change the key. The lock comes first, in a
// statement of its own, because what the next one sees of other tables is as old as
// itself.
func lockKey(ctx context.Context, tx pgx.Tx, id schemas.KeyID) (Key, error) {
	if _, err := tx.Exec(ctx, `SELECT FROM api_keys WHERE id = $1 FOR NO KEY UPDATE`, string(id)); err != nil {
		return Key{}, err
	}
	return getKey(ctx, tx, id)
}

// ListKeys returns a page of the keys of the tenant with the given id or slug, or of all
// tenants if that is empty, and the cursor of the next page. user, an id or, with a
// tenant, e-mail address, cuts it down to one user's if it isn't empty.
func (s *Store) ListKeys(ctx context.Context, tenant, user string, page Page) (list []Key, next string, err error) {
	limit, err := page.check("key_")
	if err != nil {
		return nil, "", err
	}
	err = s.read(ctx, "list the keys", func(ctx context.Context) error {
		var w where
		w.and(`id > %s`, page.After)
		var id schemas.TenantID
		if tenant != "" {
			t, err := getTenant(ctx, s.pool, tenant)
			if err != nil {
				return err
			}
			id = t.ID
			w.and(`tenant_id = %s`, id)
		}
		if user != "" {
			u, err := userNamed(ctx, s.pool, id, user)
			if err != nil {
				return err
			}
			w.and(`user_id = %s`, u.ID)
		}
		w.args = append(w.args, limit)
		query := `SELECT ` + keyColumns + ` FROM api_keys WHERE ` + strings.Join(w.conditions, " AND ")
		rows, err := s.pool.Query(ctx, query+fmt.Sprintf(` ORDER BY id LIMIT $%d`, len(w.args)), w.args...)
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

// RevokeKey ends a key for good, with all its secrets. Again, it changes nothing.
func (s *Store) RevokeKey(ctx context.Context, id schemas.KeyID) (k Key, err error) {
	if schemas.ValidateID(string(id), "key_") != nil {
		return Key{}, notFound("key", "")
	}
	err = s.write(ctx, "revoke a key", func(ctx context.Context, tx pgx.Tx) ([]deed, error) {
		if k, err = lockKey(ctx, tx, id); err != nil || k.RevokedAt != nil {
			return nil, err
		}
		err = tx.QueryRow(ctx, `UPDATE api_keys SET revoked_at = now() WHERE id = $1 RETURNING revoked_at`, id).Scan(&k.RevokedAt)
		return []deed{{Change{KindKey, string(id)}, "key.revoke", k.Tenant, differences{}}}, err
	})
	if err != nil {
		return Key{}, err
	}
	return k, nil
}

// KeyChange is what to change of a key; what is nil stays.
type KeyChange struct {
	Name        *string
	Scopes      []string // if it isn't nil, at least one
	BudgetCents *int64
	NoBudget    bool // takes the bound away
	Concurrency *int
}

// checked is a KeyChange that is valid.
func (c KeyChange) checked() (_ KeyChange, err error) {
	if c.Name != nil {
		if err := checkName(*c.Name); err != nil {
			return KeyChange{}, err
		}
	}
	if c.Scopes != nil {
		if len(c.Scopes) == 0 {
			return KeyChange{}, invalid("scopes", "scopes must be at least one; %s opens every model.", ScopeAll)
		}
		if c.Scopes, err = checkScopes(c.Scopes); err != nil {
			return KeyChange{}, err
		}
	}
	if c.NoBudget && c.BudgetCents != nil {
		return KeyChange{}, invalid("budget_cents", "budget_cents can't be both a number and none.")
	}
	if err := checkBudget(c.BudgetCents); err != nil {
		return KeyChange{}, err
	}
	_, err = checkRate("concurrency", c.Concurrency, defaultConcurrency)
	return c, err
}

// SetKey changes a key. New limits hold for the next request: what is in flight or spent
// beyond them stays so, and lets nothing more in.
func (s *Store) SetKey(ctx context.Context, id schemas.KeyID, c KeyChange) (k Key, err error) {
	if c, err = c.checked(); err != nil {
		return Key{}, err
	}
	if schemas.ValidateID(string(id), "key_") != nil {
		return Key{}, notFound("key", "")
	}
	err = s.write(ctx, "change a key", func(ctx context.Context, tx pgx.Tx) ([]deed, error) {
		if k, err = lockKey(ctx, tx, id); err != nil {
			return nil, err
		}
		changed := k.apply(c)
		if len(changed) == 0 {
			return nil, nil
		}
		_, err := tx.Exec(ctx, `UPDATE api_keys SET name = $2, scopes = $3, budget_cents = $4, concurrency = $5 WHERE id = $1`,
			id, k.Name, k.Scopes, k.BudgetCents, k.Concurrency)
		return []deed{{Change{KindKey, string(id)}, "key.set", k.Tenant, changed}}, err
	})
	if err != nil {
		return Key{}, err
	}
	return k, nil
}

// apply changes the key, and returns what is different now.
func (k *Key) apply(c KeyChange) differences {
	changed := differences{}
	if c.Name != nil {
		note(changed, "name", k.Name, *c.Name)
		k.Name = *c.Name
	}
	if c.Scopes != nil && !slices.Equal(k.Scopes, c.Scopes) {
		changed["scopes"] = difference{k.Scopes, c.Scopes}
		k.Scopes = c.Scopes
	}
	if c.Concurrency != nil {
		note(changed, "concurrency", k.Concurrency, *c.Concurrency)
		k.Concurrency = *c.Concurrency
	}
	if c.NoBudget || c.BudgetCents != nil {
		before, after := k.BudgetCents, c.BudgetCents
		if (before == nil) != (after == nil) || before != nil && *before != *after {
			changed["budget_cents"] = difference{before, after}
		}
		k.BudgetCents = after
	}
	return changed
}
