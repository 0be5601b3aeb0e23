package books

import (
	"context"
	"encoding/json"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/ownllm/ownllm/schemas"
)

// AuditEntry says that somebody has changed something. Each change by an admin has one,
// written in the same transaction; what changes nothing has none.
type AuditEntry struct {
	// ID rises in the order in which changes took effect.
	ID    int64     `json:"id"`
	At    time.Time `json:"at"`
	Actor Actor     `json:"actor"`
	// Action is what was done: "tenant.create", "key.rotate".
	Action string `json:"action"`
	Kind   Kind   `json:"kind"`
	// Object is the id of a tenant, user, key, agent or pairing key, or the model of a price.
	Object string `json:"object"`
	// Tenant is whose object it is; empty for a price that is everybody's.
	Tenant schemas.TenantID `json:"tenant_id,omitempty"`
	// Detail is a JSON object of what was set. What was something else before has "old"
	// and "new". It never holds a secret.
	Detail json.RawMessage `json:"detail"`
}

// deed is a change that was made in a transaction: for the list of changes, if caches
// know of its kind, and for the audit.
type deed struct {
	Change
	action string
	tenant schemas.TenantID
	detail any // as JSON an object
}

// differences are what was changed of an object, by name.
type differences map[string]difference

type difference struct {
	Old any `json:"old"`
	New any `json:"new"`
}

// note notes a value that was changed.
func note[T comparable](d differences, name string, before, after T) {
	if before != after {
		d[name] = difference{before, after}
	}
}

// audit writes the entries of a transaction that has raised the version, and therefore
// gets their numbers in the order of commits.
func audit(ctx context.Context, tx pgx.Tx, deeds []deed) error {
	actor := actorOf(ctx)
	for _, d := range deeds {
		detail, err := json.Marshal(d.detail)
		if err != nil {
			return err
		}
		_, err = tx.Exec(ctx, `
			INSERT INTO audit (at, actor, request, address, action, kind, object, tenant_id, detail)
			VALUES (clock_timestamp(), $1, $2, $3, $4, $5, $6, $7, $8::jsonb)`,
			actor.Name, actor.Request, actor.Address, d.action, d.Kind, d.ID, d.tenant, string(detail))
		if err != nil {
			return err
		}
	}
	return nil
}

// ListAudit returns a page of the audit, oldest first, and the cursor of the next page:
// of the tenant with the given id or slug, or all of it if that is empty. Who goes on
// from the last entry later misses none.
func (s *Store) ListAudit(ctx context.Context, tenant string, page Page) (list []AuditEntry, next string, err error) {
	limit, err := page.limit()
	if err != nil {
		return nil, "", err
	}
	var after int64
	if page.After != "" {
		if after, err = strconv.ParseInt(page.After, 10, 64); err != nil || after < 0 {
			return nil, "", invalid("after", "after must be the id of the last entry of the page before.")
		}
	}
	err = s.read(ctx, "list the audit", func(ctx context.Context) error {
		query, args := `
			SELECT id, at, actor, request, address, action, kind, object, tenant_id, detail
			FROM audit WHERE id > $1`, []any{after, limit}
		if tenant != "" {
			t, err := getTenant(ctx, s.pool, tenant)
			if err != nil {
				return err
			}
			query, args = query+` AND tenant_id = $3`, append(args, t.ID)
		}
		rows, err := s.pool.Query(ctx, query+` ORDER BY id LIMIT $2`, args...)
		if err != nil {
			return err
		}
		list, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (AuditEntry, error) {
			var e AuditEntry
			err := row.Scan(&e.ID, &e.At, &e.Actor.Name, &e.Actor.Request, &e.Actor.Address, &e.Action, &e.Kind, &e.Object, &e.Tenant, &e.Detail)
			return e, err
		})
		return err
	})
	if err != nil {
		return nil, "", err
	}
	list, next = cut(list, limit, func(e AuditEntry) string { return strconv.FormatInt(e.ID, 10) })
	return list, next, nil
}
