package books

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// What a turn does for a single settlement or request costs the database less by functions of
// their own, and least of all if the whole turn is of one key. TestOneIsAsMany holds them
// against those for many.

// isOfOne reports whether a turn settles one request at the most, admits one at the most, and
// touches one key.
func isOfOne(l locks, s settleColumns, alter alterColumns, a admitColumns) bool {
	return len(l.keys) == 1 && len(s.ids) <= 1 && len(alter.ids) == 0 && len(a.ids) <= 1
}

const (
	settleInTurnOfOne = `SELECT settled FROM ` + turnOfOne
	admitInTurnOfOne  = `SELECT coalesce(settled, ''), ` + decisionColumns + ` FROM ` + turnOfOne
	turnOfOne         = `books_turn_one($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)`
)

// turnOfOneArgs are the arguments of books_turn_one.
func (s *Store) turnOfOneArgs(turn Turn, key string, settle settleColumns, admit admitColumns) []any {
	args := make([]any, 16)
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
// decision before it is committed: the database is asked to send what it has (Flush in its
// protocol) between the statement and the end of the transaction (Sync), which takes as long
// as the disk does.
func (s *Store) foreseeTurnOfOne(ctx context.Context, turn Turn, key string, settle settleColumns, admit admitColumns, out *Outcomes) error {
	return s.pool.AcquireFunc(ctx, func(c *pgxpool.Conn) (err error) {
		conn := c.Conn()
		defer func() {
			if err != nil {
				// Its prepared statement may be what is wrong, after a change of the schema.
				_ = conn.Close(ctx)
			}
		}()
		statement, err := conn.Prepare(ctx, admitInTurnOfOne, admitInTurnOfOne)
		if err != nil {
			return err
		}
		var args pgx.ExtendedQueryBuilder
		if err := args.Build(conn.TypeMap(), statement, s.turnOfOneArgs(turn, key, settle, admit)); err != nil {
			return err
		}
		p := conn.PgConn().StartPipeline(ctx)
		defer p.Close() //nolint:errcheck // what goes wrong is told before
		p.SendQueryPrepared(statement.Name, args.ParamValues, args.ParamFormats, args.ResultFormats)
		p.SendFlushRequest()
		if err := p.Sync(); err != nil {
			return err
		}
		answer, err := p.GetResults()
		if err != nil {
			return err
		}
		reader, ok := answer.(*pgconn.ResultReader)
		if !ok {
			return fmt.Errorf("the database answers with a %T", answer)
		}
		rows := pgx.RowsFromResultReader(conn.TypeMap(), reader)
		for rows.Next() {
			if err := out.takeTurnOfOne(rows, settle, admit); err != nil {
				return err
			}
		}
		if rows.Err() != nil || len(out.Admit) == 0 {
			return rows.Err() // the caller counts
		}
		turn.Foreseen(out.Admit[0])
		_, err = p.GetResults() // of the commit
		return err
	})
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
