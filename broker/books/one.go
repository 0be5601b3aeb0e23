package books

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// What a turn does for a single settlement or request costs the database less by functions of
// their own, and least of all if the whole turn is of one key. TestOneIsAsMany holds them
// against those for many.

// isOfOne reports whether a turn settles one request at the most, admits another one at the most, and
// touches one key.
func isOfOne(l locks, s settleColumns, alter alterColumns, a admitColumns) bool {
	if len(s.ids) == 1 && len(a.ids) == 1 && s.ids[0] == a.ids[0] {
		return false
	}
	return len(l.keys) == 1 && len(s.ids) <= 1 && len(alter.ids) == 0 && len(a.ids) <= 1
}

const (
	settleInTurnOfOne = `SELECT settled FROM ` + turnOfOne
	admitInTurnOfOne  = `SELECT coalesce(settled, ''), ` + decisionColumns + ` FROM ` + turnOfOne
	turnOfOne         = `books_turn_one($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)`
)

// turnOfOneArgs are the arguments of books_turn_one.
func (s *Store) turnOfOneArgs(turn Turn, key string, settle settleColumns, admit admitColumns) []any {
	args := make([]any, 17)
	args[0], args[1] = s.at(), key
	if len(settle.ids) > 0 {
		args[2], args[3], args[4], args[5] = settle.ids[0], settle.prompts[0], settle.completions[0], settle.outcomes[0]
	}
	if len(admit.ids) > 0 {
		x := &turn.Admit[0]
		args[6], args[7], args[8] = turn.Lease.Owner, turn.Lease.Epoch, turn.openTokens()
		args[9], args[10], args[11] = x.Tenant, x.Model, x.Request
		args[12], args[13], args[14], args[15] = admit.prompts[0], admit.limits[0], admit.agents[0], admit.timeouts[0]
	}
	args[16] = turn.Foreseen != nil
	return args
}

// queueTurnOfOne is queueTurn for a turn for which isOfOne holds, in one statement.
func (s *Store) queueTurnOfOne(batch *pgx.Batch, turn Turn, key string, settle settleColumns, admit admitColumns, out *Outcomes) {
	args := s.turnOfOneArgs(turn, key, settle, admit)
	if len(admit.ids) == 0 {
		batch.Queue(settleInTurnOfOne, args...).QueryRow(func(row pgx.Row) error {
			var state State
			err := row.Scan(&state)
			out.Settled = append(out.Settled, state)
			return err
		})
		return
	}
	batch.Queue(admitInTurnOfOne, args...).QueryRow(func(row pgx.Row) error { return out.takeTurnOfOne(row, settle, admit) })
}

// takeTurnOfOne reads the answer to admitInTurnOfOne.
func (out *Outcomes) takeTurnOfOne(row pgx.Row, settle settleColumns, admit admitColumns) error {
	var state State
	d, err := scanDecision(row, &state)
	if len(settle.ids) > 0 {
		out.Settled = append(out.Settled, state)
	}
	for range admit.rows {
		out.Admit = append(out.Admit, d)
	}
	return err
}

// foreseeTurnOfOne takes a turn of one that admits a request, and tells turn.Foreseen of the
// decision before anything is written: books_turn_one sends it on ahead, as a notice.
func (s *Store) foreseeTurnOfOne(ctx context.Context, turn Turn, key string, settle settleColumns, admit admitColumns, out *Outcomes) error {
	return s.pool.AcquireFunc(ctx, func(c *pgxpool.Conn) error {
		data := c.Conn().PgConn().CustomData()
		data[foreseenKey] = turn.Foreseen
		defer delete(data, foreseenKey)
		return out.takeTurnOfOne(c.QueryRow(ctx, admitInTurnOfOne, s.turnOfOneArgs(turn, key, settle, admit)...), settle, admit)
	})
}

// foreseenKey is under what a connection has the Turn.Foreseen of the turn that it takes.
const foreseenKey = "ownllm.foreseen"

// heed takes what the database says meanwhile.
func heed(c *pgconn.PgConn, n *pgconn.Notice) {
	foreseen, ok := c.CustomData()[foreseenKey].(func(Decision))
	if !ok || n.SeverityUnlocalized != "INFO" {
		return
	}
	if d, err := parseForeseen(n.Message); err == nil {
		foreseen(d)
	}
}

// parseForeseen reads what books_turn_one tells ahead.
func parseForeseen(text string) (d Decision, err error) {
	var day int64
	var budget string
	if _, err := fmt.Sscan(text, &d.Limit, &d.Amount, &d.Price, &day, &d.Slots, &d.SlotsFree, &budget, &d.BudgetFree); err != nil {
		return d, err
	}
	d.Month = time.Unix(0, 0).UTC().AddDate(0, 0, int(day))
	if budget != "-" {
		v, err := strconv.ParseInt(budget, 10, 64)
		if err != nil {
			return d, err
		}
		d.Budget = &v
	}
	return d, nil
}

// queueSettleOne is queueSettle for one settlement.
func (s *Store) queueSettleOne(batch *pgx.Batch, c settleColumns, out *[]State) {
	batch.Queue(`SELECT books_settle_one($1, $2, $3, $4, $5, $6)`, s.at(), c.ids[0], c.keys[0], c.prompts[0], c.completions[0], c.outcomes[0]).
		QueryRow(func(row pgx.Row) error {
			var state State
			err := row.Scan(&state)
			*out = append(*out, state)
			return err
		})
}

// queueAdmitOne is queueAdmit for a turn that asks for one request, be it several times.
func (s *Store) queueAdmitOne(batch *pgx.Batch, turn Turn, c admitColumns, out *[]Decision) {
	x := &turn.Admit[0]
	batch.Queue(`SELECT `+decisionColumns+` FROM books_admit_one($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)`,
		s.at(), turn.Lease.Owner, turn.Lease.Epoch, turn.openTokens(), x.Tenant, x.Key, x.Model, x.Request,
		c.prompts[0], c.limits[0], c.agents[0], c.timeouts[0]).
		Query(c.decisions(out))
}
