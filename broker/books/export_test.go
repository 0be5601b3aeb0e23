package books

import (
	"context"
	"errors"
	"time"

	"github.com/pressly/goose/v3"

	"github.com/ownllm/ownllm/schemas"
)

// DownTo takes the schema back to a version.
func (s *Store) DownTo(ctx context.Context, version int64) error {
	return s.migrating(ctx, func(p *goose.Provider) error {
		_, err := p.DownTo(ctx, version)
		return err
	})
}

// UpTo takes the schema up to a version.
func (s *Store) UpTo(ctx context.Context, version int64) error {
	return s.migrating(ctx, func(p *goose.Provider) error {
		_, err := p.UpTo(ctx, version)
		return err
	})
}

// KeepChanges sets how many versions of the change list are kept.
func (s *Store) KeepChanges(n int64) { s.kept = n }

// Exec runs a statement behind the store's back.
func (s *Store) Exec(ctx context.Context, sql string, args ...any) error {
	_, err := s.pool.Exec(ctx, sql, args...)
	return err
}

// Query returns the one value of a query.
func Query[T any](ctx context.Context, s *Store, sql string, args ...any) (v T, err error) {
	err = s.pool.QueryRow(ctx, sql, args...).Scan(&v)
	return v, err
}

// SetClock makes the time in the books that of a test.
func (s *Store) SetClock(clock func() time.Time) { s.clock = clock }

// ExpireGrace is how long after its deadline a request may still be settled.
const ExpireGrace = expireGrace

// Meanwhile has work wait for the row that the statement lock has locked, changes the
// books by the statement change while it waits, and returns when both are done. $1 is id in
// both, and the other arguments of change begin with $2.
func (s *Store) Meanwhile(ctx context.Context, lock, id string, work func(), change string, args ...any) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second) // for work that doesn't wait
	defer cancel()
	tx, err := s.pool.Begin(ctx)
	if err != nil {
		return err
	}
	defer tx.Rollback(ctx) //nolint:errcheck // after a commit there is nothing left of it
	if _, err := tx.Exec(ctx, lock, id); err != nil {
		return err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		work()
	}()
	for waiting := false; !waiting; {
		err := s.pool.QueryRow(ctx, `
			SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`).Scan(&waiting)
		if err != nil {
			return err
		}
	}
	if _, err := tx.Exec(ctx, change, append([]any{id}, args...)...); err != nil {
		return err
	}
	if err := tx.Commit(ctx); err != nil {
		return err
	}
	<-done
	return nil
}

// SubmissionRows is how many rows of the tables of submissions each step reads, of one that is
// submitted, claimed, returned, claimed again and ended, with a sweep between.
func (s *Store) SubmissionRows(ctx context.Context, lease Lease, n NewSubmission, o SubmissionSweep) (map[string]int64, error) {
	tx, err := s.pool.Begin(ctx)
	if err != nil {
		return nil, err
	}
	defer tx.Rollback(ctx) //nolint:errcheck // nothing of it is to stay
	rows, before := map[string]int64{}, int64(0)
	note := func(step string) error {
		var now int64
		err := tx.QueryRow(ctx, `SELECT sum(coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0))::bigint FROM pg_stat_xact_user_tables WHERE relname LIKE 'submission%'`).Scan(&now)
		rows[step], before = now-before, now
		return err
	}
	var id, run int64
	for _, step := range []struct {
		name string
		work func() error
	}{
		{"submit", func() error {
			_, err := tx.Exec(ctx, `SELECT FROM submission_submit(NULL, $1, $2, $3, $4, $5, $6, 1000000)`, n.Key, n.Client, n.Tenant, n.Model, n.Digest[:], n.Request)
			return err
		}},
		{"claim", func() error {
			return tx.QueryRow(ctx, `SELECT id, run FROM submission_claim(NULL, $1, $2, 1)`, lease.Owner, lease.Epoch).Scan(&id, &run)
		}},
		{"return", func() error {
			_, err := tx.Exec(ctx, `SELECT submission_return(NULL, $1, $2, $3, 'slot', '', 0, 0, false)`, id, lease.Owner, run)
			return err
		}},
		{"claim again", func() error {
			return tx.QueryRow(ctx, `SELECT id, run FROM submission_claim(NULL, $1, $2, 1)`, lease.Owner, lease.Epoch).Scan(&id, &run)
		}},
		{"sweep", func() error {
			_, err := s.sweepSubmissions(ctx, tx, o)
			return err
		}},
		{"end", func() error {
			ended, err := s.end(ctx, tx, &lease.Owner, []int64{id}, []int64{run}, make([]*schemas.Error, 1), End{Completion: "{}"})
			if err == nil && len(ended) != 1 {
				err = errors.New("it wasn't ended")
			}
			return err
		}},
	} {
		if err := step.work(); err != nil {
			return nil, err
		}
		if err := note(step.name); err != nil {
			return nil, err
		}
	}
	return rows, nil
}
