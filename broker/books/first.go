package books

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/schemas"
)

// The tenant and user that a first run makes.
const (
	FirstTenant = "local"
	FirstEmail  = "local@localhost"
)

// firstLock is the advisory lock of whoever makes them: "first" in ASCII.
const firstLock int64 = 0x6669727374

// EnsureFirst makes, of the first tenant, its user and a key of theirs with the given
// secret, whatever isn't there yet, and returns all three. What is there is left as it
// is: the tenant may be suspended, the key revoked.
func (s *Store) EnsureFirst(ctx context.Context, secret apikey.Key) (t Tenant, u User, k Key, err error) {
	n, err := NewKey{Name: "first key", Secret: secret}.checked()
	if err != nil {
		return Tenant{}, User{}, Key{}, err
	}
	err = s.write(ctx, "make the first key", func(ctx context.Context, tx pgx.Tx) (made []deed, err error) {
		// Two processes may be here at once: the second finds what the first has made.
		if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock($1)`, firstLock); err != nil {
			return nil, err
		}
		var d deed
		if t, err = getTenant(ctx, tx, FirstTenant); isNotFound(err) {
			t, d, err = createTenant(ctx, tx, schemas.NewTenantID(), NewTenant{Slug: FirstTenant, Name: FirstTenant, QPS: new(defaultQPS)})
			made = append(made, d)
		}
		if err != nil {
			return nil, err
		}
		if u, err = getUser(ctx, tx, t.ID, FirstEmail); isNotFound(err) {
			u, d, err = createUser(ctx, tx, schemas.NewUserID(), t.ID, FirstEmail)
			made = append(made, d)
		}
		if err != nil {
			return nil, err
		}
		hash := n.Secret.Hash()
		rows, err := tx.Query(ctx, `
			SELECT `+keyColumns+` FROM api_keys WHERE tenant_id = $1 AND id = (SELECT key_id FROM key_secrets WHERE hash = $2)`, t.ID, hash[:])
		if err != nil {
			return nil, err
		}
		if k, err = pgx.CollectExactlyOneRow(rows, scanKey); errors.Is(err, pgx.ErrNoRows) {
			k, d, err = createKey(ctx, tx, schemas.NewKeyID(), u, n)
			made = append(made, d)
		}
		return made, err
	})
	if err != nil {
		return Tenant{}, User{}, Key{}, err
	}
	return t, u, k, nil
}

func isNotFound(err error) bool {
	var e *schemas.Error
	return errors.As(err, &e) && e.Code == schemas.CodeNotFound
}
