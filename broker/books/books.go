// Package books keeps the truth about tenants, users, API keys and agents, and about
// what they spend and hold, in PostgreSQL. It is the only place that speaks SQL.
//
// # Errors
//
// Input that breaks a rule, or that is a duplicate, gives an invalid_value
// *schemas.Error that names the field; an id that nobody has gives not_found. A
// database that can't be reached, or doesn't answer in time, gives an error that
// wraps ErrUnavailable. No error exposes a type or code of the database driver.
//
// # What caches may rely on
//
// Every transaction that changes a tenant, user or key raises a version, and lists
// what it changed under that version. The counter's row stays locked until the
// transaction commits, so versions become visible in their order: a reader who
// asked for the changes since v, and got the answer "now at w", has seen every
// change up to w, and will see every later one. LookupKey says, out of the same
// snapshot as the rest of its answer, at which version it looked. Old rows of the list
// are pruned, and a reader that is behind them is told to start afresh.
//
// # What admins may rely on
//
// A change and its entry in the audit are one transaction: neither is there without the
// other, and what changes nothing has no entry. Entries are numbered while the counter's
// row is locked, so their ids are in the order of commits, and who follows them misses
// none. A create or rotation that was given a name (WithIdempotency) is made once, however
// often and wherever it is asked for: the name is claimed first of all in its transaction,
// and whoever claims the same name meanwhile waits for that to end. New limits hold for the
// next admission, which reads them itself.
//
// # What is promised about money and slots
//
// A request is admitted by a reservation, which holds one of its key's slots and the
// most that the request can cost. It ends by being settled, or it expires. At every
// moment, what a key has spent and holds in a month isn't more than its budget (unless
// that was lowered meanwhile), and no more of its requests are in flight than may be. The
// ledger has at most one row for each request, and it is charged to the month in which it
// was admitted.
//
// Safety comes from one lock for each key, its row in key_accounts: whoever admits,
// alters, settles, sweeps or heals holds it until the commit, so all decisions about one
// key are made one after the other, each knowing all before. A request is charged what it
// burnt, but never more than it held, and that was taken from what was free. A settlement
// acts only on an open reservation, and closes it in the same transaction; so of several
// (the owner's, one sent again, the worker's report, the sweeper's) the first counts, and
// the others change nothing. Locks are taken in one order, so nobody waits in a circle,
// and a batch of requests is one transaction.
//
// Liveness comes from leases and deadlines. Slots of an owner that died come back when
// its lease has lapsed and somebody sweeps; its money comes back when the worker reports
// what it burnt, or when worker and owner are both known to be gone, or at the latest at
// the request's deadline, for the price of its prompt. How many slots and how much money
// are held is noted beside the reservations, to be read fast; Heal derives both afresh.
//
// Time is that of the database. An owner's epoch never comes back, even if the owner was
// forgotten, so what was taken from it stays taken.
package books

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"
)

const (
	defaultMaxConns = 8
	// minConns lets a migration hold its lock on one connection and work on another.
	minConns       = 2
	defaultTimeout = 5 * time.Second
	// keptChanges is how many versions of the change list stay: at four looks a
	// second nobody who is alive falls that far behind.
	keptChanges = 10_000
)

// Config says how to reach the database.
type Config struct {
	// URL is postgres://user:password@host:port/database, or a DSN.
	URL string
	// MaxConns bounds the connections of this process; 0 stands for 8.
	MaxConns int
	// Timeout bounds every call, however patient its context is; 0 stands for 5 s.
	// Migrate is exempt, and Usage may take six times as long.
	Timeout time.Duration
}

// Store is the books. It is safe for concurrent use.
type Store struct {
	pool    *pgxpool.Pool
	timeout time.Duration
	kept    int64            // versions of the change list that are kept
	clock   func() time.Time // the time in the books; nil: the database's own
}

// Open connects to the database and makes sure that it answers. The schema is
// Migrate's affair. The store must be closed.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	pc, err := pgxpool.ParseConfig(cfg.URL) // its error hides the password
	if err != nil {
		return nil, fmt.Errorf("open the books: %w", err)
	}
	pc.MaxConns = defaultMaxConns
	if cfg.MaxConns > 0 {
		pc.MaxConns = int32(max(cfg.MaxConns, minConns))
	}
	timeout := cfg.Timeout
	if timeout <= 0 {
		timeout = defaultTimeout
	}
	if pc.ConnConfig.ConnectTimeout <= 0 || pc.ConnConfig.ConnectTimeout > timeout {
		pc.ConnConfig.ConnectTimeout = timeout
	}
	if pc.ConnConfig.RuntimeParams["application_name"] == "" {
		pc.ConnConfig.RuntimeParams["application_name"] = "ownllm"
	}
	pc.ConnConfig.OnNotice = heed
	pc.AfterConnect = func(_ context.Context, c *pgx.Conn) error {
		c.TypeMap().RegisterType(&pgtype.Type{
			Name: "timestamptz", OID: pgtype.TimestamptzOID,
			Codec: &pgtype.TimestamptzCodec{ScanLocation: time.UTC},
		})
		return nil
	}
	pool, err := pgxpool.NewWithConfig(ctx, pc)
	if err != nil {
		return nil, fmt.Errorf("open the books: %w", err)
	}
	s := &Store{pool: pool, timeout: timeout, kept: keptChanges}
	if err := s.Ping(ctx); err != nil {
		pool.Close()
		return nil, fmt.Errorf("open the books: %w", err)
	}
	return s, nil
}

// Close waits for calls in progress and closes all connections.
func (s *Store) Close() { s.pool.Close() }

// Ping reports whether the database answers.
func (s *Store) Ping(ctx context.Context) error {
	return s.read(ctx, "ping the books", s.pool.Ping)
}

// read runs a query that changes nothing, so it can be run again: after a restart of
// the database the pool is full of dead connections, and the first call to find one
// replaces them all.
func (s *Store) read(ctx context.Context, what string, query func(context.Context) error) error {
	return s.readFor(ctx, s.timeout, what, query)
}

// readFor is read with a timeout of its own.
func (s *Store) readFor(ctx context.Context, timeout time.Duration, what string, query func(context.Context) error) error {
	bounded, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	err := query(bounded)
	if bounded.Err() == nil && unreachable(err) {
		s.pool.Reset()
		err = query(bounded)
	}
	return translate(ctx, what, err)
}

// once runs something that must not be run again without the caller's knowing.
func (s *Store) once(ctx context.Context, what string, work func(context.Context) error) error {
	bounded, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	err := work(bounded)
	if bounded.Err() == nil && unreachable(err) {
		s.pool.Reset()
	}
	return translate(ctx, what, err)
}

// at is the time in the books as an argument of a query; nil stands for now().
func (s *Store) at() *time.Time {
	if s.clock == nil {
		return nil
	}
	now := s.clock()
	return &now
}

// write runs a transaction. What it reports as done gets the next version, and an entry
// in the audit.
func (s *Store) write(ctx context.Context, what string, work func(context.Context, pgx.Tx) ([]deed, error)) error {
	return s.once(ctx, what, func(ctx context.Context) error {
		return pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
			deeds, err := work(ctx, tx)
			if err != nil || len(deeds) == 0 {
				return err
			}
			// Last of all, because it makes every other writer wait.
			if err := s.record(ctx, tx, deeds); err != nil {
				return err
			}
			return audit(ctx, tx, deeds)
		})
	})
}
