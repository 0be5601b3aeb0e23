package books

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
)

// Kind says what sort of thing has changed.
type Kind string

const (
	// KindTenant is a tenant; the id is a schemas.TenantID.
	KindTenant Kind = "tenant"
	// KindUser is a user; the id is a schemas.UserID.
	KindUser Kind = "user"
	// KindKey is an API key; the id is a schemas.KeyID.
	KindKey Kind = "key"
	// KindAgent is an agent; the id is a schemas.AgentID. It is made, paired or removed; what
	// it says of itself is no change.
	KindAgent Kind = "agent"
	// KindPairing is a pairing key, which only the audit speaks of; the id is a
	// schemas.PairingID.
	KindPairing Kind = "pairing"
	// KindPrice is the price of a model, which only the audit speaks of.
	KindPrice Kind = "price"
)

// Change says that something was made or changed.
type Change struct {
	Kind Kind
	ID   string
}

// Changes is what has changed since some version.
type Changes struct {
	// Version is the version of the answer: ask for the changes since it next time.
	Version int64
	// Reset says that the list doesn't reach back that far: anything may have changed.
	Reset bool
	// Changes is what has changed, oldest first, if Reset is false.
	Changes []Change
	// AsOf is the database's clock when it answered.
	AsOf time.Time
}

// Changes returns what has changed since a version. Before the first call, that is
// -1, which gives Reset and the current version.
func (s *Store) Changes(ctx context.Context, since int64) (Changes, error) {
	var out Changes
	err := s.read(ctx, "read the changes of the books", func(ctx context.Context) error {
		out = Changes{}
		// A version above the current one is of another database, or of a later state of
		// this one, before a backup was put back.
		rows, err := s.pool.Query(ctx, `
			SELECT now(), c.version, $1 < c.pruned OR $1 > c.version OR $1 < 0, l.kind, l.id
			FROM change_counter c
			LEFT JOIN changes l ON l.version > $1 AND $1 >= c.pruned AND $1 >= 0
			ORDER BY l.version, l.kind, l.id`, since)
		if err != nil {
			return err
		}
		var kind, id *string
		_, err = pgx.ForEachRow(rows, []any{&out.AsOf, &out.Version, &out.Reset, &kind, &id}, func() error {
			if kind != nil {
				out.Changes = append(out.Changes, Change{Kind(*kind), *id})
			}
			return nil
		})
		return err
	})
	if err != nil {
		return Changes{}, err
	}
	return out, nil
}

// record gives what was done in a transaction the next version, lists what caches know
// of, and prunes old versions.
func (s *Store) record(ctx context.Context, tx pgx.Tx, deeds []deed) error {
	var kinds, ids []string
	for _, d := range deeds {
		if d.Kind != KindPrice && d.Kind != KindPairing {
			kinds, ids = append(kinds, string(d.Kind)), append(ids, d.ID)
		}
	}
	_, err := tx.Exec(ctx, `
		WITH counter AS (
			UPDATE change_counter
			SET version = version + 1, pruned = greatest(pruned, version + 1 - $3)
			RETURNING version, pruned
		), old AS (
			DELETE FROM changes USING counter WHERE changes.version <= counter.pruned
		)
		INSERT INTO changes (version, kind, id)
		SELECT DISTINCT counter.version, c.kind, c.id
		FROM counter, unnest($1::text[], $2::text[]) AS c (kind, id)`, kinds, ids, s.kept)
	return err
}
