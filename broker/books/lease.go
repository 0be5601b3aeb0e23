package books

import (
	"context"
	"crypto/rand"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/oklog/ulid/v2"

	"github.com/ownllm/ownllm/schemas"
)

const (
	// expireGrace is how long after its deadline a request may still be settled by its
	// owner.
	expireGrace = 10 * time.Second
	// keptEnded is how long it is remembered that a request has ended, so that what
	// comes late or twice is known as such.
	keptEnded = time.Hour

	// sweepLock is the advisory lock of whoever sweeps: "sweep" in ASCII.
	sweepLock int64 = 0x7377656570
	// sweepBatch bounds how many requests one pass touches, and so for how long it
	// locks their keys; pruneBatch how many rows it deletes.
	sweepBatch = 1000
	pruneBatch = 5000
)

// RenewLease gives an owner its lease for the time ttl from now, or extends it. If the
// epoch of the answer isn't that of the lease before, the lease lapsed in between, and what
// was admitted under it may have been taken away.
func (s *Store) RenewLease(ctx context.Context, owner schemas.OwnerID, ttl time.Duration) (Lease, error) {
	lease := Lease{Owner: owner}
	err := s.read(ctx, "renew a lease", func(ctx context.Context) error { // it can be run again
		return s.pool.QueryRow(ctx, `
			INSERT INTO owners (id, lease, expires_at) VALUES ($1, $2, coalesce($3, now()) + $2)
			ON CONFLICT (id) DO UPDATE SET held = true, lease = excluded.lease, expires_at = excluded.expires_at
			RETURNING epoch`, owner, ttl, s.at()).Scan(&lease.Epoch)
	})
	return lease, err
}

// EndLease gives a lease back: whatever its owner hasn't settled is up to the sweeper at
// once.
func (s *Store) EndLease(ctx context.Context, lease Lease) error {
	return s.read(ctx, "end a lease", func(ctx context.Context) error {
		_, err := s.pool.Exec(ctx, `UPDATE owners SET held = false, epoch = nextval('owner_epochs') WHERE id = $1 AND epoch = $2`, lease.Owner, lease.Epoch)
		return err
	})
}

// Swept is what a sweep has done.
type Swept struct {
	Leases  int // that had lapsed and were taken away
	Slots   int // that were returned
	Expired int // requests that were past their deadline, and were charged their prompts
}

// request is where a reservation is found.
type request struct {
	ID  schemas.RequestID
	Key schemas.KeyID
}

// requests runs a query for the ids and keys of requests.
func requests(ctx context.Context, tx pgx.Tx, query string, args ...any) ([]request, error) {
	rows, err := tx.Query(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowToStructByPos[request])
}

func lockKeys(ctx context.Context, tx pgx.Tx, lists ...[]request) error {
	var keys []string
	for _, list := range lists {
		for _, r := range list {
			keys = append(keys, string(r.Key))
		}
	}
	_, err := tx.Exec(ctx, `SELECT books_lock('{}', $1)`, unique(keys))
	return err
}

// settle settles requests whose keys are locked, and returns how many were open.
func (s *Store) settle(ctx context.Context, tx pgx.Tx, list []Settlement) (n int, err error) {
	c := settleArgs(list)
	err = tx.QueryRow(ctx, `SELECT count(*) FROM books_settle($1, $2, $3, $4, $5, $6) WHERE state = 'open'`,
		s.at(), c.ids, c.keys, c.prompts, c.completions, c.outcomes).Scan(&n)
	return n, err
}

// expire charges requests, whose keys are locked, their prompts, and nothing else.
func (s *Store) expire(ctx context.Context, tx pgx.Tx, list []request) (int, error) {
	settlements := make([]Settlement, len(list))
	for i, r := range list {
		settlements[i] = Settlement{Request: r.ID, Key: r.Key, Outcome: outcomeExpired}
	}
	return s.settle(ctx, tx, settlements)
}

// Sweep takes lapsed leases away, returns the slots of what was admitted under them, and
// expires requests that are past their deadline. Nothing lapses or expires before
// PostgreSQL has been up for as long as a lease, since nobody could renew or settle
// before. Any number of processes may call it: one sweeps, the others return at once.
func (s *Store) Sweep(ctx context.Context) (Swept, error) {
	var out Swept
	err := s.once(ctx, "sweep the books", func(ctx context.Context) error {
		return pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) (err error) {
			out, err = s.sweep(ctx, tx)
			return err
		})
	})
	if err != nil {
		return Swept{}, err
	}
	return out, nil
}

func (s *Store) sweep(ctx context.Context, tx pgx.Tx) (out Swept, err error) {
	var mine bool
	var now time.Time
	err = tx.QueryRow(ctx, `SELECT pg_try_advisory_xact_lock($1), coalesce($2, now())`, sweepLock, s.at()).Scan(&mine, &now)
	if err != nil || !mine {
		return out, err
	}
	tag, err := tx.Exec(ctx, `
		UPDATE owners SET epoch = nextval('owner_epochs'), held = false
		WHERE held AND expires_at <= $1 AND pg_postmaster_start_time() + lease <= $1`, now)
	if err != nil {
		return out, err
	}
	out.Leases = int(tag.RowsAffected())
	lost, err := requests(ctx, tx, `
		SELECT r.id, r.key_id FROM reservations r LEFT JOIN owners o ON o.id = r.owner_id
		WHERE r.state = 'open' AND r.in_flight AND (o.id IS NULL OR r.epoch < o.epoch) LIMIT $1`, sweepBatch)
	if err != nil {
		return out, err
	}
	late, err := requests(ctx, tx, `
		SELECT id, key_id FROM reservations
		WHERE state = 'open' AND deadline + $2::interval <= $1 AND pg_postmaster_start_time() + $2::interval <= $1 LIMIT $3`,
		now, expireGrace, sweepBatch)
	if err != nil {
		return out, err
	}
	if len(lost)+len(late) > 0 {
		if err := lockKeys(ctx, tx, lost, late); err != nil {
			return out, err
		}
		if out.Slots, err = returnSlots(ctx, tx, lost); err != nil {
			return out, err
		}
		if out.Expired, err = s.expire(ctx, tx, late); err != nil {
			return out, err
		}
	}
	return out, prune(ctx, tx, now)
}

// returnSlots returns the slots of requests whose keys are locked.
func returnSlots(ctx context.Context, tx pgx.Tx, list []request) (n int, err error) {
	ids := make([]string, len(list))
	for i, r := range list {
		ids[i] = string(r.ID)
	}
	err = tx.QueryRow(ctx, `
		WITH freed AS (
			UPDATE reservations SET in_flight = false WHERE id = ANY ($1) AND state = 'open' AND in_flight RETURNING key_id
		), returned AS (
			UPDATE key_accounts a SET in_flight = greatest(0, a.in_flight - f.n)
			FROM (SELECT key_id, count(*)::integer AS n FROM freed GROUP BY key_id) AS f WHERE a.key_id = f.key_id
		)
		SELECT count(*) FROM freed`, ids).Scan(&n)
	return n, err
}

// prune forgets requests that ended long ago, and owners that have nothing left.
func prune(ctx context.Context, tx pgx.Tx, now time.Time) error {
	// Ids are in the order of time, so the old ones are at the start of the index.
	horizon := now.Add(-keptEnded)
	oldest, err := ulid.New(ulid.Timestamp(horizon), rand.Reader)
	if err != nil {
		return err
	}
	_, err = tx.Exec(ctx, `
		DELETE FROM reservations WHERE id IN (
			SELECT id FROM reservations WHERE id < $1 AND state <> 'open' AND ended_at < $2 ORDER BY id LIMIT $3)`,
		"req_"+oldest.String(), horizon, pruneBatch)
	if err != nil {
		return err
	}
	_, err = tx.Exec(ctx, `
		DELETE FROM owners o WHERE NOT o.held AND o.expires_at < $1
		AND NOT EXISTS (SELECT FROM reservations r WHERE r.owner_id = o.id AND r.state = 'open')`, horizon)
	return err
}

// Orphan is what became of the report of a worker whose owner was gone.
type Orphan string

const (
	// OrphanSettled is a request that was settled by the worker's count.
	OrphanSettled Orphan = "settled"
	// OrphanEnded is one that was settled or had expired before.
	OrphanEnded Orphan = "ended"
	// OrphanOwned is one whose owner has a lease. It settles the request, or its lease
	// lapses: ask again later.
	OrphanOwned Orphan = "owned"
	// OrphanForeign is one that another agent has, or another tenant.
	OrphanForeign Orphan = "foreign"
	// OrphanUnknown is one that never was, or long ago.
	OrphanUnknown Orphan = "unknown"
)

// SettleOrphan settles a request by the count of the worker that ran it, if its owner
// is gone. A prompt of 0 tokens is one that the worker doesn't know: what was reserved for
// it is charged. It can be repeated.
func (s *Store) SettleOrphan(ctx context.Context, tenant schemas.TenantID, agent schemas.AgentID, report *schemas.UsageReport) (Orphan, error) {
	var out Orphan
	err := s.once(ctx, "settle an orphan", func(ctx context.Context) error {
		return pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) (err error) {
			out, err = s.settleOrphan(ctx, tx, tenant, agent, report)
			return err
		})
	})
	if err != nil {
		return "", err
	}
	return out, nil
}

func (s *Store) settleOrphan(ctx context.Context, tx pgx.Tx, tenant schemas.TenantID, agent schemas.AgentID, report *schemas.UsageReport) (Orphan, error) {
	found, err := requests(ctx, tx, `SELECT id, key_id FROM reservations WHERE id = $1`, report.Request)
	if err != nil || len(found) == 0 {
		return OrphanUnknown, err
	}
	if err := lockKeys(ctx, tx, found); err != nil {
		return "", err
	}
	var open, lost, own bool
	err = tx.QueryRow(ctx, `
		SELECT r.state = 'open', o.id IS NULL OR r.epoch < o.epoch, coalesce(r.agent_id = $2 AND r.tenant_id = $3, false)
		FROM reservations r LEFT JOIN owners o ON o.id = r.owner_id WHERE r.id = $1`, report.Request, agent, tenant).Scan(&open, &lost, &own)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return OrphanUnknown, nil
	case err != nil:
		return "", err
	case !open:
		return OrphanEnded, nil
	case !own:
		return OrphanForeign, nil
	case !lost:
		return OrphanOwned, nil
	}
	settlement := Settlement{Request: report.Request, Key: found[0].Key, Completion: int64(report.CompletionTokens), Outcome: outcomeOrphaned}
	if report.PromptTokens > 0 {
		prompt := int64(report.PromptTokens)
		settlement.Prompt = &prompt
	}
	_, err = s.settle(ctx, tx, []Settlement{settlement})
	return OrphanSettled, err
}

// ownerless is the condition for a reservation r whose owner o is gone. It stays so.
const ownerless = `r.state = 'open' AND (o.id IS NULL OR r.epoch < o.epoch)`

// Orphaned is an open request whose owner is gone.
type Orphaned struct {
	Request schemas.RequestID
	Agent   schemas.AgentID // that works on it, if any does
	Age     time.Duration   // since its admission
}

// Orphans lists the open requests whose owners are gone, the oldest first, up to a bound.
func (s *Store) Orphans(ctx context.Context) (list []Orphaned, err error) {
	err = s.read(ctx, "list orphans", func(ctx context.Context) error {
		rows, err := s.pool.Query(ctx, `
			SELECT r.id, coalesce(r.agent_id, ''), coalesce($1, now()) - r.created_at
			FROM reservations r LEFT JOIN owners o ON o.id = r.owner_id
			WHERE `+ownerless+` ORDER BY r.created_at LIMIT $2`, s.at(), sweepBatch)
		if err != nil {
			return err
		}
		list, err = pgx.CollectRows(rows, pgx.RowToStructByPos[Orphaned])
		return err
	})
	return list, err
}

// ExpireOrphans expires requests before their deadline, as far as their owners are gone.
// It is for those whose agent is gone, too, so that nobody will report what they burnt. It
// returns how many there were.
func (s *Store) ExpireOrphans(ctx context.Context, ids []schemas.RequestID) (n int, err error) {
	err = s.once(ctx, "expire orphans", func(ctx context.Context) error {
		return pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
			list, err := requests(ctx, tx, `
				SELECT r.id, r.key_id FROM reservations r LEFT JOIN owners o ON o.id = r.owner_id
				WHERE r.id = ANY ($1) AND `+ownerless, ids)
			if err != nil || len(list) == 0 {
				return err
			}
			if err := lockKeys(ctx, tx, list); err != nil {
				return err
			}
			n, err = s.expire(ctx, tx, list)
			return err
		})
	})
	return n, err
}

// Heal compares what keys and budgets say is held with the open requests, and puts
// right what differs. Nothing should: it returns how many keys there were.
func (s *Store) Heal(ctx context.Context) (n int, err error) {
	err = s.once(ctx, "heal the books", func(ctx context.Context) error {
		return pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
			// A first look without locks: what differs for a moment only is found right below.
			var keys []string
			if err := tx.QueryRow(ctx, `SELECT coalesce(array_agg(DISTINCT key_id), '{}') FROM (`+unequal+`) AS x`).Scan(&keys); err != nil || len(keys) == 0 {
				return err
			}
			if _, err := tx.Exec(ctx, `SELECT books_lock('{}', $1)`, unique(keys)); err != nil {
				return err
			}
			return tx.QueryRow(ctx, `
				WITH wrong AS MATERIALIZED (SELECT * FROM (`+unequal+`) AS x WHERE key_id = ANY ($1)),
				slots AS (
					UPDATE key_accounts a SET in_flight = w.n FROM wrong w WHERE w.month IS NULL AND a.key_id = w.key_id
				), money AS (
					UPDATE budgets b SET reserved = w.n FROM wrong w WHERE b.key_id = w.key_id AND b.month = w.month
				)
				SELECT count(DISTINCT key_id) FROM wrong`, keys).Scan(&n)
		})
	})
	return n, err
}

// unequal lists keys and months for which what is noted isn't the sum of the open
// requests; the month is null for slots.
const unequal = `
	SELECT a.key_id, NULL::date AS month, coalesce(r.n, 0) AS n
	FROM key_accounts a
	LEFT JOIN (SELECT key_id, count(*)::integer AS n FROM reservations WHERE state = 'open' AND in_flight GROUP BY key_id) AS r USING (key_id)
	WHERE a.in_flight <> coalesce(r.n, 0)
	UNION ALL
	SELECT b.key_id, b.month, coalesce(r.n, 0)
	FROM budgets b
	LEFT JOIN (SELECT key_id, month, sum(amount)::bigint AS n FROM reservations WHERE state = 'open' GROUP BY key_id, month) AS r USING (key_id, month)
	WHERE b.reserved <> coalesce(r.n, 0)`
