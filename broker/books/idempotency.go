package books

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"time"

	"github.com/jackc/pgx/v5"
)

const (
	// keptNames is how long the name of a create is remembered, at least.
	keptNames = 48 * time.Hour
	// maxIdempotency bounds such a name, in bytes.
	maxIdempotency = 255
	// nameBatch bounds how many old names one create forgets.
	nameBatch = 100
)

type idempotencyKey struct{}

// WithIdempotency gives the create or rotation that is made under the context a name. A
// later one of the same name with the same content makes nothing, and returns what the
// first has made, as it is by then; with other content it is an invalid_value
// *schemas.Error. Names are remembered for at least 24 hours, and only if what they stand
// for was made. An empty name is none.
//
// Secrets aren't stored, so a repeated create or rotation of a key returns the secret
// that it was itself given, and the zero apikey.Key if it was given none. A secret that
// is given is part of the content.
func WithIdempotency(ctx context.Context, name string) context.Context {
	return context.WithValue(ctx, idempotencyKey{}, name)
}

// claim takes the context's name for what is about to be made. If an earlier transaction
// has taken it for the same content, claim returns the id of what that has made, else an
// empty string; one that is about to do so is waited for. id is that of what is about to
// be made, content what can be encoded as JSON and says all of it.
//
// It is the first thing that a transaction does: whoever waits for a name holds nothing.
func claim(ctx context.Context, tx pgx.Tx, action string, content any, id string) (made string, err error) {
	name, _ := ctx.Value(idempotencyKey{}).(string)
	if name == "" {
		return "", nil
	}
	if len(name) > maxIdempotency || !printable(name) {
		return "", invalid("Idempotency-Key", "Idempotency-Key must have at most %d bytes, without control characters.", maxIdempotency)
	}
	text, err := json.Marshal(content)
	if err != nil {
		return "", err
	}
	digest := sha256.Sum256(text)
	tag, err := tx.Exec(ctx, `
		INSERT INTO idempotency (name, action, content, object) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING`,
		name, action, digest[:], id)
	if err != nil {
		return "", err
	}
	if tag.RowsAffected() == 1 {
		_, err = tx.Exec(ctx, `
			DELETE FROM idempotency WHERE name IN (
				SELECT name FROM idempotency WHERE created_at < now() - $1::interval
				ORDER BY created_at LIMIT $2 FOR UPDATE SKIP LOCKED)`, keptNames, nameBatch)
		return "", err
	}
	var same bool
	err = tx.QueryRow(ctx, `SELECT object, action = $2 AND content = $3 FROM idempotency WHERE name = $1`, name, action, digest[:]).Scan(&made, &same)
	if err == nil && !same {
		return "", invalid("Idempotency-Key", "This Idempotency-Key was used for another request. Use a new one for each.")
	}
	return made, err
}
