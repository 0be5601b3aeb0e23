package books

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"

	"github.com/ownllm/ownllm/schemas"
)

// migrationLock is the advisory lock of whoever migrates: "ownllm" in ASCII.
const migrationLock int64 = 0x6f776e6c6c6d

// Migrate brings the schema to the version that this build knows. Several processes
// may call it at once: one does the work, the others wait for it. A schema from the
// future is left alone: ErrNewerSchema.
func (s *Store) Migrate(ctx context.Context) error {
	err := s.migrating(ctx, func(p *goose.Provider) error {
		_, err := p.Up(ctx)
		return err
	})
	if errors.Is(err, ErrNewerSchema) {
		return err
	}
	return translate(ctx, "migrate the books", err)
}

// migrating runs work while no other process migrates.
func (s *Store) migrating(ctx context.Context, work func(*goose.Provider) error) (err error) {
	lock, err := s.pool.Acquire(ctx)
	if err != nil {
		return err
	}
	defer lock.Release()
	if err := waitForLock(ctx, lock); err != nil {
		return err
	}
	defer func() {
		unlock, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.timeout)
		defer cancel()
		if _, failed := lock.Exec(unlock, `SELECT pg_advisory_unlock($1)`, migrationLock); failed != nil {
			// The lock ends with its connection.
			err = errors.Join(err, lock.Conn().Close(unlock))
		}
	}()
	files, err := fs.Sub(schemas.Migrations, "migrations")
	if err != nil {
		return err
	}
	db := stdlib.OpenDBFromPool(s.pool)
	defer func() { err = errors.Join(err, db.Close()) }()
	provider, err := goose.NewProvider(goose.DialectPostgres, db, files, goose.WithDisableGlobalRegistry(true))
	if err != nil {
		return err
	}
	have, known, err := provider.GetVersions(ctx)
	if err != nil {
		return err
	}
	if have > known {
		return fmt.Errorf("migrate the books from version %d to %d: %w", have, known, ErrNewerSchema)
	}
	return work(provider)
}

// waitForLock asks again and again rather than wait in the server: a statement that
// waits holds a snapshot, for which a migration of the lock's holder may have to wait.
func waitForLock(ctx context.Context, conn *pgxpool.Conn) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		var got bool
		err := conn.QueryRow(ctx, `SELECT pg_try_advisory_lock($1)`, migrationLock).Scan(&got)
		if err != nil || got {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
}
