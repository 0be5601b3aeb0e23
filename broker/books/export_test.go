package books

import (
	"context"
	"time"

	"github.com/pressly/goose/v3"
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
