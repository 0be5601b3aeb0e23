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
