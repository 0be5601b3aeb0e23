package books

import (
	"context"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/ownllm/ownllm/schemas"
)

const (
	// MaxLostRuns is how many runs of a submission may be lost before it ends with an
	// error: it may be what kills them.
	MaxLostRuns = 3
	// submissionLock is the advisory lock of whoever sweeps submissions: "submit" in ASCII.
	submissionLock int64 = 0x7375626d6974
	// submissionBatch bounds how many submissions one pass touches of each sort.
	submissionBatch = 500
)

// SubmissionSweep says what SweepSubmissions judges by.
type SubmissionSweep struct {
	// Keep is for how long a result can be fetched, KeepID for how long the id of a
	// submission that has ended is known. Both count from its end.
	Keep, KeepID time.Duration
}

// SweptSubmissions is what a sweep has done.
type SweptSubmissions struct {
	// Ended are the submissions that it has ended.
	Ended []Submission
	// Returned counts those that wait again, because their owners are gone.
	Returned int
	// Forgotten counts the results and ids that are forgotten.
	Forgotten int
	// More says that it was cut short by its bounds.
	More bool
}

// SweepSubmissions lets the submissions of dead owners wait again, ends those that were lost
// too often, that have waited past their deadline, or whose key isn't valid any more, and
// forgets what is old. Any number of processes may call it: one sweeps, the others return at
// once.
func (s *Store) SweepSubmissions(ctx context.Context, o SubmissionSweep) (out SweptSubmissions, err error) {
	err = s.once(ctx, "sweep the submissions", func(ctx context.Context) error {
		return pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) (err error) {
			out, err = s.sweepSubmissions(ctx, tx, o)
			return err
		})
	})
	if err != nil {
		return SweptSubmissions{}, err
	}
	return out, nil
}

func (s *Store) sweepSubmissions(ctx context.Context, tx pgx.Tx, o SubmissionSweep) (out SweptSubmissions, err error) {
	var mine bool
	var now time.Time
	err = tx.QueryRow(ctx, `SELECT pg_try_advisory_xact_lock($1), coalesce($2, now())`, submissionLock, s.at()).Scan(&mine, &now)
	if err != nil || !mine {
		return out, err
	}
	// The planner must not judge by how small a table was.
	if _, err := tx.Exec(ctx, `SET LOCAL enable_seqscan = off`); err != nil {
		return out, err
	}
	pass := submissionPass{s: s, tx: tx, now: now, keep: o.Keep, out: &out}
	if err := pass.reclaim(ctx); err != nil {
		return out, err
	}
	if err := pass.endWaiting(ctx, pastDeadline, errPastDeadline, now); err != nil {
		return out, err
	}
	if err := pass.endWaiting(ctx, ofInvalidKeys, errOfKey, now); err != nil {
		return out, err
	}
	if err := pass.load(ctx); err != nil {
		return out, err
	}
	return out, pass.prune(ctx, o.KeepID)
}

// submissionPass is one sweep.
type submissionPass struct {
	s     *Store
	tx    pgx.Tx
	now   time.Time
	keep  time.Duration
	out   *SweptSubmissions
	ended []int64
}

// reclaim takes submissions from owners that are gone.
func (p *submissionPass) reclaim(ctx context.Context) error {
	rows, err := p.tx.Query(ctx, `
		SELECT q.id, q.key_id, q.owner_id, q.run, q.lost
		FROM submission_queue q LEFT JOIN owners o ON o.id = q.owner_id
		WHERE q.owner_id IS NOT NULL AND (o.id IS NULL OR q.epoch < o.epoch) ORDER BY q.key_id, q.id LIMIT $1`, submissionBatch)
	if err != nil {
		return err
	}
	type lostRun struct {
		ID    int64
		Key   schemas.KeyID
		Owner schemas.OwnerID
		Run   int64
		Lost  int
	}
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[lostRun])
	if err != nil {
		return err
	}
	p.full(len(list))
	for _, r := range list {
		if r.Lost+1 >= MaxLostRuns {
			ids, err := p.s.end(ctx, p.tx, &r.Owner, []int64{r.ID}, []int64{r.Run}, []*schemas.Error{ErrPoison()}, End{Keep: p.keep})
			if err != nil {
				return err
			}
			p.ended = append(p.ended, ids...)
			continue
		}
		var own bool
		err := p.tx.QueryRow(ctx, `SELECT submission_return($1, $2, $3, $4, 'none', '', 0, 0, true)`, p.s.at(), r.ID, r.Owner, r.Run).Scan(&own)
		if err != nil {
			return err
		}
		if own {
			p.out.Returned++
		}
	}
	if p.out.Returned > 0 {
		_, err = p.tx.Exec(ctx, `SELECT pg_notify($1, '')`, submissionChannel)
	}
	return err
}

// full notes that there may be more than a list of n.
func (p *submissionPass) full(n int) { p.out.More = p.out.More || n >= submissionBatch }

// ErrPoison is the error of a submission whose runs were lost too often.
func ErrPoison() *schemas.Error {
	return schemas.Errorf(schemas.CodeInternalError,
		"The request was begun %d times, and each time the server or the GPU machine that had it went away. It isn't tried again, since it may be what made them fail.", MaxLostRuns)
}

// waitingRow is a submission that waits and is to end.
type waitingRow struct {
	ID     int64
	Key    schemas.KeyID
	Reason string
}

const (
	// pastDeadline lists what has waited too long, and for what.
	pastDeadline = `
		SELECT q.id, q.key_id, coalesce(l.reason, '') FROM submission_queue q
		LEFT JOIN submission_lanes l ON l.key_id = q.key_id AND l.model = q.model
		WHERE q.owner_id IS NULL AND q.deadline <= $1 ORDER BY q.deadline LIMIT $2`
	// ofInvalidKeys lists what waits for keys that nobody may use any more, and why.
	ofInvalidKeys = `
		SELECT q.id, x.key_id, x.reason FROM (
			SELECT t.key_id, CASE
				WHEN k.revoked_at IS NOT NULL THEN 'key_invalid' WHEN k.expires_at <= $1 THEN 'key_expired'
				WHEN o.state <> 'active' THEN 'tenant_disabled' WHEN u.state <> 'active' THEN 'user_deactivated' END AS reason
			FROM submission_turns t JOIN api_keys k ON k.id = t.key_id JOIN users u ON u.id = k.user_id JOIN tenants o ON o.id = k.tenant_id
		) AS x CROSS JOIN LATERAL (
			SELECT id FROM submission_queue y WHERE y.key_id = x.key_id AND y.owner_id IS NULL LIMIT $2) AS q
		WHERE x.reason IS NOT NULL LIMIT $2`
)

func errPastDeadline(reason string) *schemas.Error {
	if reason == "" {
		return schemas.Errorf(schemas.CodeAgentTimeout, "The request waited until its deadline without being run.")
	}
	return schemas.Errorf(schemas.CodeAgentTimeout, "The request waited until its deadline without being run. The last refusal was %s.", reason)
}

func errOfKey(reason string) *schemas.Error {
	switch code := schemas.Code(reason); code {
	case schemas.CodeKeyExpired:
		return schemas.Errorf(code, "The API key expired before the request was run.")
	case schemas.CodeTenantDisabled:
		return schemas.Errorf(code, "The tenant of the API key was suspended before the request was run.")
	case schemas.CodeUserDeactivated:
		return schemas.Errorf(code, "The user who owns the API key was deactivated before the request was run.")
	}
	return schemas.Errorf(schemas.CodeKeyInvalid, "The API key was revoked before the request was run.")
}

// endWaiting ends what a query lists.
func (p *submissionPass) endWaiting(ctx context.Context, query string, judge func(string) *schemas.Error, now time.Time) error {
	rows, err := p.tx.Query(ctx, query, now, submissionBatch)
	if err != nil {
		return err
	}
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[waitingRow])
	if err != nil || len(list) == 0 {
		return err
	}
	p.full(len(list))
	var keys []string
	for _, r := range list {
		keys = append(keys, string(r.Key))
	}
	// Nobody claims what waits while its turn is locked.
	if _, err := p.tx.Exec(ctx, `SELECT FROM submission_turns WHERE key_id = ANY ($1) ORDER BY key_id FOR UPDATE`, unique(keys)); err != nil {
		return err
	}
	ids := make([]int64, 0, len(list))
	for _, r := range list {
		ids = append(ids, r.ID)
	}
	rows, err = p.tx.Query(ctx, `SELECT id, run FROM submission_queue WHERE id = ANY ($1) AND owner_id IS NULL`, ids)
	if err != nil {
		return err
	}
	runs := make(map[int64]int64, len(list))
	var id, run int64
	if _, err := pgx.ForEachRow(rows, []any{&id, &run}, func() error {
		runs[id] = run
		return nil
	}); err != nil {
		return err
	}
	list = slices.DeleteFunc(list, func(r waitingRow) bool {
		_, waits := runs[r.ID]
		return !waits
	})
	var ends struct {
		ids, runs []int64
		errs      []*schemas.Error
	}
	for _, r := range list {
		ends.ids, ends.runs, ends.errs = append(ends.ids, r.ID), append(ends.runs, runs[r.ID]), append(ends.errs, judge(r.Reason))
	}
	ended, err := p.s.end(ctx, p.tx, nil, ends.ids, ends.runs, ends.errs, End{Keep: p.keep})
	p.ended = append(p.ended, ended...)
	return err
}

// load reads what was ended.
func (p *submissionPass) load(ctx context.Context) error {
	if len(p.ended) == 0 {
		return nil
	}
	rows, err := p.tx.Query(ctx, `
		SELECT `+submissionColumns+` FROM submissions s
		LEFT JOIN submission_queue q ON q.id = s.id LEFT JOIN submission_texts t ON t.id = s.id WHERE s.id = ANY ($1)`, p.ended)
	if err != nil {
		return err
	}
	p.out.Ended, err = pgx.CollectRows(rows, scanSubmission)
	return err
}

// prune forgets old results, and the ids of what ended long ago.
func (p *submissionPass) prune(ctx context.Context, keepID time.Duration) error {
	results, err := p.tx.Exec(ctx, `
		DELETE FROM submission_texts WHERE id IN (
			SELECT id FROM submission_texts WHERE expires_at <= $1 ORDER BY expires_at LIMIT $2)`, p.now, submissionBatch)
	if err != nil {
		return err
	}
	// A result may be kept for longer than its id: then it keeps that.
	ids, err := p.tx.Exec(ctx, `
		DELETE FROM submissions WHERE id IN (
			SELECT id FROM submissions WHERE ended_at <= $1 AND expires_at <= $2 ORDER BY ended_at LIMIT $3)`, p.now.Add(-keepID), p.now, submissionBatch)
	if err != nil {
		return err
	}
	p.full(int(max(results.RowsAffected(), ids.RowsAffected())))
	p.out.Forgotten = int(results.RowsAffected() + ids.RowsAffected())
	return nil
}
