package books

import (
	"context"
	"encoding/hex"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/schemas"
)

// Rotation is how a key gets a new secret.
type Rotation struct {
	// Overlap is for how long the secret before lives on, at most a year; 0: it ends now.
	Overlap time.Duration
	// Secret is the new one; if it is zero, one is made.
	Secret apikey.Key
}

// RotateKey gives a key a new secret, and returns it; it can't be had again. The key's
// id, limits, end and what it has spent stay. Every older secret ends when the overlap is
// over, or earlier if it was to. A key that is revoked or has expired stays so: that is an
// invalid_value *schemas.Error. See WithIdempotency.
func (s *Store) RotateKey(ctx context.Context, id schemas.KeyID, r Rotation) (k Key, secret apikey.Key, err error) {
	given := r.Secret
	switch {
	case schemas.ValidateID(string(id), "key_") != nil:
		return Key{}, apikey.Key{}, notFound("key", "")
	case r.Overlap < 0 || r.Overlap > maxOverlap:
		return Key{}, apikey.Key{}, invalid("overlap_seconds", "The overlap must be from 0 to a year.")
	case given.IsZero():
		r.Secret = apikey.New()
	}
	err = s.write(ctx, "rotate a key", func(ctx context.Context, tx pgx.Tx) ([]deed, error) {
		made, err := claim(ctx, tx, "key.rotate", []any{id, r.Overlap, hashText(given)}, string(id))
		if err != nil {
			return nil, err
		}
		if made != "" {
			secret = given
			k, err = getKey(ctx, tx, id)
			return nil, err
		}
		var d deed
		k, d, err = rotateKey(ctx, tx, id, r)
		secret = r.Secret
		return []deed{d}, err
	})
	if err != nil {
		return Key{}, apikey.Key{}, err
	}
	return k, secret, nil
}

func rotateKey(ctx context.Context, tx pgx.Tx, id schemas.KeyID, r Rotation) (Key, deed, error) {
	k, err := lockKey(ctx, tx, id)
	if err != nil {
		return Key{}, deed{}, err
	}
	var expired bool
	if err := tx.QueryRow(ctx, `SELECT coalesce($1 <= now(), false)`, k.ExpiresAt).Scan(&expired); err != nil {
		return Key{}, deed{}, err
	}
	switch {
	case k.RevokedAt != nil:
		return Key{}, deed{}, invalid("key", "The key was revoked, so it can't be rotated. Create a new one.")
	case expired:
		return Key{}, deed{}, invalid("key", "The key has expired, so it can't be rotated. Create a new one.")
	}
	_, err = tx.Exec(ctx, `UPDATE key_secrets SET expires_at = least(expires_at, now() + $2::interval) WHERE key_id = $1`, id, r.Overlap)
	if err != nil {
		return Key{}, deed{}, err
	}
	if err := addSecret(ctx, tx, id, r.Secret); err != nil {
		return Key{}, deed{}, err
	}
	prefix := difference{k.Prefix, r.Secret.Prefix()}
	k.Prefix = r.Secret.Prefix()
	return k, deed{Change{KindKey, string(id)}, "key.rotate", k.Tenant, map[string]any{
		"prefix": prefix, "overlap_seconds": r.Overlap.Seconds(),
	}}, nil
}

// hashText is a secret as the content of a name may have it; empty for none.
func hashText(secret apikey.Key) string {
	if secret.IsZero() {
		return ""
	}
	sum := secret.Hash()
	return hex.EncodeToString(sum[:])
}
