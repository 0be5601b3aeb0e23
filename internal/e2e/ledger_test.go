package e2e

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
)

// ledger looks into the database, past everything that might make it look better than
// it is. Its methods may be called from any goroutine, unless they say otherwise.
type ledger struct {
	t    *testing.T
	pool *pgxpool.Pool
}

func openLedger(t *testing.T, url string) *ledger {
	t.Helper()
	pool, err := pgxpool.New(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return &ledger{t, pool}
}

func (l *ledger) exec(statement string, args ...any) {
	l.t.Helper()
	if _, err := l.pool.Exec(l.t.Context(), statement, args...); err != nil {
		l.t.Fatal(err)
	}
}

// entry is a row of the ledger.
type entry struct {
	Request, Agent, Outcome  string
	Prompt, Completion, Cost int64
}

// entries are the rows of a key, by request.
func (l *ledger) entries(key schemas.KeyID) map[string]entry {
	l.t.Helper()
	rows, err := l.pool.Query(l.t.Context(), `
		SELECT request_id, coalesce(agent_id, ''), outcome, prompt_tokens, completion_tokens, cost FROM ledger WHERE key_id = $1`, key)
	if err != nil {
		l.t.Error(err)
		return nil
	}
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[entry])
	if err != nil {
		l.t.Error(err)
	}
	found := make(map[string]entry, len(list))
	for _, e := range list {
		found[e.Request] = e
	}
	return found
}

// holding is what a key has spent and holds.
type holding struct {
	Spent, Reserved int64
	// InFlight is how many slots are taken, and Open how many requests aren't settled.
	InFlight, Open int
}

// look reads what a key holds. It may be called while the database is away.
func (l *ledger) look(ctx context.Context, key schemas.KeyID) (h holding, err error) {
	err = l.pool.QueryRow(ctx, `
		SELECT coalesce((SELECT sum(spent) FROM budgets WHERE key_id = $1), 0)::bigint, coalesce((SELECT sum(reserved) FROM budgets WHERE key_id = $1), 0)::bigint,
			coalesce((SELECT in_flight FROM key_accounts WHERE key_id = $1), 0),
			(SELECT count(*)::integer FROM reservations WHERE key_id = $1 AND state = 'open')`, key).
		Scan(&h.Spent, &h.Reserved, &h.InFlight, &h.Open)
	return h, err
}

func (l *ledger) holding(key schemas.KeyID) holding {
	l.t.Helper()
	h, err := l.look(l.t.Context(), key)
	if err != nil {
		l.t.Error(err)
	}
	return h
}

// wantClosed waits until the key holds nothing any more, and compares what it has spent
// with its rows in the ledger, which it returns.
func (l *ledger) wantClosed(key schemas.KeyID, within time.Duration) map[string]entry {
	l.t.Helper()
	var h holding
	deadline := time.Now().Add(within)
	for h = l.holding(key); h.Reserved != 0 || h.InFlight != 0 || h.Open != 0; h = l.holding(key) {
		if time.Now().After(deadline) {
			l.t.Errorf("after %s the key still holds %+v", within, h)
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	entries := l.entries(key)
	var cost int64
	for _, e := range entries {
		cost += e.Cost
	}
	if cost != h.Spent {
		l.t.Errorf("the key has spent %d, and the ledger has %d", h.Spent, cost)
	}
	return entries
}

// notePeaks, for the goroutine of the test, has the database itself note the most that any key ever had, from inside of
// every transaction: unlike a look from outside, it misses nothing.
func (l *ledger) notePeaks() {
	l.t.Helper()
	l.exec(`
		CREATE TABLE peaks (key_id text PRIMARY KEY, money bigint NOT NULL DEFAULT 0, slots integer NOT NULL DEFAULT 0);
		CREATE FUNCTION note_money() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			INSERT INTO peaks (key_id, money) VALUES (NEW.key_id, NEW.spent + NEW.reserved)
			ON CONFLICT (key_id) DO UPDATE SET money = greatest(peaks.money, excluded.money);
			RETURN NULL;
		END $$;
		CREATE TRIGGER note_money AFTER INSERT OR UPDATE ON budgets FOR EACH ROW EXECUTE FUNCTION note_money();
		CREATE FUNCTION note_slots() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			INSERT INTO peaks (key_id, slots) VALUES (NEW.key_id, NEW.in_flight)
			ON CONFLICT (key_id) DO UPDATE SET slots = greatest(peaks.slots, excluded.slots);
			RETURN NULL;
		END $$;
		CREATE TRIGGER note_slots AFTER INSERT OR UPDATE ON key_accounts FOR EACH ROW EXECUTE FUNCTION note_slots()`)
}

// peaks are the most that a key ever had spent and reserved, and in flight.
func (l *ledger) peaks(key schemas.KeyID) (money int64, slots int) {
	l.t.Helper()
	if err := l.pool.QueryRow(l.t.Context(), `SELECT money, slots FROM peaks WHERE key_id = $1`, key).Scan(&money, &slots); err != nil {
		l.t.Fatal(err)
	}
	return money, slots
}

// sample looks at a key again and again until the returned function is called, which
// returns how often that was.
func (l *ledger) sample(key schemas.KeyID, check func(holding)) (stop func() int) {
	ctx, cancel := context.WithCancel(l.t.Context())
	var sampler sync.WaitGroup
	n := 0
	sampler.Go(func() {
		for ctx.Err() == nil {
			h, err := l.look(ctx, key)
			if err != nil {
				if ctx.Err() == nil {
					l.t.Error(err)
				}
				return
			}
			n++
			check(h)
			time.Sleep(time.Millisecond) // leave the two processors to those that are watched
		}
	})
	return func() int {
		cancel()
		sampler.Wait()
		return n
	}
}

// admitted are the moments at which requests of a tenant were admitted, in their order.
func (l *ledger) admitted(tenant schemas.TenantID) []time.Time {
	l.t.Helper()
	rows, err := l.pool.Query(l.t.Context(), `SELECT created_at FROM reservations WHERE tenant_id = $1 ORDER BY created_at`, tenant)
	if err != nil {
		l.t.Fatal(err)
	}
	list, err := pgx.CollectRows(rows, pgx.RowTo[time.Time])
	if err != nil {
		l.t.Fatal(err)
	}
	return list
}

// until is stack.Until for what the database says.
func (l *ledger) until(within time.Duration, what string, key schemas.KeyID, ok func(holding) bool) time.Time {
	l.t.Helper()
	stack.Until(l.t, within, what, func() bool { return ok(l.holding(key)) })
	return time.Now()
}
