package books

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/ownllm/ownllm/schemas"
)

// Bounds of a submission.
const (
	// MaxSubmissionID is the longest id that a publisher may give, in bytes.
	MaxSubmissionID = 128
	// DefaultSubmissionWait is how long a submission waits for its run unless it says
	// otherwise, and MaxSubmissionWait how long it may.
	DefaultSubmissionWait = 24 * time.Hour
	MaxSubmissionWait     = 7 * 24 * time.Hour
)

// NewSubmission is a request that is to be run once, whenever that can be.
type NewSubmission struct {
	Key    schemas.KeyID
	Tenant schemas.TenantID
	// Client is the publisher's own id, unique for its key.
	Client string
	Model  string
	// Request is the body, and Digest what tells two requests apart that have one id.
	Request string
	Digest  [sha256.Size]byte
	// Wait is after how long it ends with an error if it wasn't run by then; 0 stands for
	// DefaultSubmissionWait.
	Wait time.Duration
}

// checked is a NewSubmission with its defaults, all of it valid.
func (n NewSubmission) checked() (NewSubmission, error) {
	if err := CheckSubmissionID(n.Client); err != nil {
		return NewSubmission{}, err
	}
	if n.Wait == 0 {
		n.Wait = DefaultSubmissionWait
	}
	if n.Wait < time.Second || n.Wait > MaxSubmissionWait {
		return NewSubmission{}, invalid("deadline_seconds", "deadline_seconds must be from 1 to %d.", int(MaxSubmissionWait/time.Second))
	}
	return n, nil
}

// CheckSubmissionID says what is wrong with a publisher's own id, as a *schemas.Error.
func CheckSubmissionID(id string) error {
	if id == "" || len(id) > MaxSubmissionID {
		return invalid("id", "id must have from 1 to %d characters.", MaxSubmissionID)
	}
	for i := range len(id) {
		if id[i] < ' ' || id[i] > '~' {
			return invalid("id", "id must be of printable ASCII characters.")
		}
	}
	return nil
}

// Submission is what is known of one.
type Submission struct {
	ID      int64
	Key     schemas.KeyID
	Client  string // the publisher's own id
	State   schemas.SubmissionState
	Created time.Time

	// The rest is of one that has ended, and zero otherwise.

	// Ended is when it did, and Expires when its result is forgotten.
	Ended, Expires time.Time
	// Request is the run that ended it; empty if none did.
	Request schemas.RequestID
	// Completion is the whole reply; empty if it ended with an error, or was forgotten.
	Completion string
	Usage      schemas.Usage
	Err        *schemas.Error
}

// Submit records a submission, or finds the one that the key has under this id: then
// duplicate is true, and nothing changes. It can be repeated. An id under which another
// request was submitted is an invalid_value *schemas.Error.
func (s *Store) Submit(ctx context.Context, n NewSubmission) (sub Submission, duplicate bool, err error) {
	if n, err = n.checked(); err != nil {
		return Submission{}, false, err
	}
	sub = Submission{Key: n.Key, Client: n.Client}
	var same bool
	err = s.read(ctx, "record a submission", func(ctx context.Context) error { // it can be run again
		return s.pool.QueryRow(ctx, `SELECT id, created, state, duplicate, same FROM submission_submit($1, $2, $3, $4, $5, $6, $7, $8)`,
			s.at(), n.Key, n.Client, n.Tenant, n.Model, n.Digest[:], n.Request, n.Wait.Milliseconds()).
			Scan(&sub.ID, &sub.Created, &sub.State, &duplicate, &same)
	})
	switch {
	case err != nil:
		return Submission{}, false, err
	case !same:
		return Submission{}, false, invalid("id", "The id %q was submitted with another request. Give each request an id of its own.", n.Client)
	}
	return sub, duplicate, nil
}

// submissionColumns are what scanSubmission reads, of a submission s, its text t and its
// row q in the queue.
const submissionColumns = `
	s.id, s.key_id, s.client_id, CASE WHEN s.outcome IS NOT NULL THEN s.outcome WHEN q.owner_id IS NULL THEN 'waiting' ELSE 'running' END,
	s.created_at, s.ended_at, s.expires_at, coalesce(s.request_id, ''), coalesce(t.completion, ''),
	coalesce(t.prompt_tokens, 0), coalesce(t.completion_tokens, 0), t.error`

func scanSubmission(row pgx.CollectableRow) (sub Submission, err error) {
	var ended, expires *time.Time
	var failure []byte
	err = row.Scan(&sub.ID, &sub.Key, &sub.Client, &sub.State, &sub.Created, &ended, &expires, &sub.Request, &sub.Completion,
		&sub.Usage.PromptTokens, &sub.Usage.CompletionTokens, &failure)
	if failure != nil && err == nil {
		sub.Err = new(schemas.Error)
		err = json.Unmarshal(failure, sub.Err)
	}
	if ended != nil && expires != nil {
		sub.Ended, sub.Expires = *ended, *expires
	}
	return sub, err
}

// FindSubmission returns the submission that a key has under the publisher's own id, and an
// invalid_value *schemas.Error if there is none. Whatever another key has isn't found.
func (s *Store) FindSubmission(ctx context.Context, key schemas.KeyID, client string) (sub Submission, err error) {
	if err := CheckSubmissionID(client); err != nil {
		return Submission{}, err
	}
	err = s.read(ctx, "find a submission", func(ctx context.Context) error {
		rows, err := s.pool.Query(ctx, `
			SELECT `+submissionColumns+` FROM submissions s
			LEFT JOIN submission_queue q ON q.id = s.id LEFT JOIN submission_texts t ON t.id = s.id
			WHERE s.key_id = $1 AND s.client_id = $2`, key, client)
		if err != nil {
			return err
		}
		sub, err = pgx.CollectExactlyOneRow(rows, scanSubmission)
		if errors.Is(err, pgx.ErrNoRows) {
			return invalid("id", "Nothing was submitted with this key under the id %q, or so long ago that it is forgotten.", client)
		}
		return err
	})
	return sub, err
}

// Claim is a submission that an owner is to run.
type Claim struct {
	ID     int64
	Key    schemas.KeyID
	Tenant schemas.TenantID
	Client string
	Model  string
	// Request is the body.
	Request string
	Created time.Time
	// Owner and Run fence the claim: once it was taken away, they are those of nobody.
	Owner schemas.OwnerID
	Run   int64
	// Lost is how many runs before this one nobody ended.
	Lost int
	// Tries is how often its model was refused to the key, one time after the other.
	Tries int
}

// ClaimSubmissions claims what is to run next, limit at the most: one of each key whose turn
// it is, the oldest, then another of each, as far as the key has slots. It returns nothing if
// the lease is another by now. What is claimed has to be ended or returned; if the lease
// lapses before that, SweepSubmissions lets it wait again.
//
// An error that wraps ErrUnavailable leaves it open whether anything was claimed; see
// OwnedSubmissions.
func (s *Store) ClaimSubmissions(ctx context.Context, lease Lease, limit int) (list []Claim, err error) {
	err = s.once(ctx, "claim submissions", func(ctx context.Context) error {
		rows, err := s.pool.Query(ctx, `
			SELECT id, key_id, tenant_id, client_id, model, request, created_at, owner_id, run, lost, tries FROM submission_claim($1, $2, $3, $4)`,
			s.at(), lease.Owner, lease.Epoch, limit)
		if err != nil {
			return err
		}
		list, err = pgx.CollectRows(rows, pgx.RowToStructByPos[Claim])
		return err
	})
	return list, err
}

// SubmissionBegun says that a claim whose model was refused before could be begun. Then the
// others that ask for that model may be claimed, too, and not only one in a while.
func (s *Store) SubmissionBegun(ctx context.Context, c *Claim) error {
	return s.once(ctx, "note that a submission has begun", func(ctx context.Context) error {
		_, err := s.pool.Exec(ctx, `SELECT submission_begun($1, $2, $3)`, s.at(), c.Key, c.Model)
		return err
	})
}

// WaitsFor is what a submission that is returned waits for.
type WaitsFor string

const (
	// WaitsForNothing is one that can be tried again at once.
	WaitsForNothing WaitsFor = "none"
	// WaitsForSlot and WaitsForMoney are lifted by a release; all of the key waits.
	WaitsForSlot  WaitsFor = "slot"
	WaitsForMoney WaitsFor = "money"
	// WaitsForTime has all of the key wait for the pause.
	WaitsForTime WaitsFor = "key"
	// WaitsForModel has what asks for the same model wait for the pause, and
	// WaitsForCapacity, too, or until a run of the model ends.
	WaitsForModel    WaitsFor = "lane"
	WaitsForCapacity WaitsFor = "busy"
)

// Return lets a submission that was claimed wait again.
type Return struct {
	Claim *Claim
	For   WaitsFor
	// Code is that of the refusal, or empty.
	Code schemas.Code
	// Pause is for how long it waits at the most.
	Pause time.Duration
	// Tries is how often its model was refused to the key, this time included.
	Tries int
	// Lost says that the run was begun, and that nobody ended it.
	Lost bool
}

// ReturnSubmission lets a submission wait again, in its old place. It reports whether it
// was still the claimant's.
func (s *Store) ReturnSubmission(ctx context.Context, r Return) (own bool, err error) {
	err = s.once(ctx, "return a submission", func(ctx context.Context) error {
		return s.pool.QueryRow(ctx, `SELECT submission_return($1, $2, $3, $4, $5, $6, $7, $8, $9)`,
			s.at(), r.Claim.ID, r.Claim.Owner, r.Claim.Run, r.For, r.Code, r.Pause.Milliseconds(), r.Tries, r.Lost).Scan(&own)
	})
	return own, err
}

// End is how a submission ends: with a completion, or with an error.
type End struct {
	// Request is the run; empty if there was none.
	Request    schemas.RequestID
	Completion string
	Usage      schemas.Usage
	Err        *schemas.Error
	// Keep is for how long the result can be fetched.
	Keep time.Duration
}

// EndSubmission records the result of a submission that was claimed. It reports whether it
// did: not if the claim was taken away before, and then whoever has it now ends it. It can be
// repeated: of the same run, again it is true.
func (s *Store) EndSubmission(ctx context.Context, c *Claim, e End) (recorded bool, err error) {
	err = s.once(ctx, "end a submission", func(ctx context.Context) error {
		n, err := s.end(ctx, s.pool, &c.Owner, []int64{c.ID}, []int64{c.Run}, []*schemas.Error{e.Err}, e)
		if recorded = len(n) == 1; recorded || err != nil || e.Request == "" {
			return err
		}
		return s.pool.QueryRow(ctx, `SELECT EXISTS (SELECT FROM submissions WHERE id = $1 AND request_id = $2)`, c.ID, e.Request).Scan(&recorded)
	})
	return recorded, err
}

// end ends submissions, and returns those that it has ended.
func (s *Store) end(ctx context.Context, q querier, owner *schemas.OwnerID, ids, runs []int64, errs []*schemas.Error, e End) ([]int64, error) {
	outcome, completion := schemas.SubmissionError, (*string)(nil)
	if e.Completion != "" {
		// A backend's text may be anything; PostgreSQL's may not.
		text := strings.ReplaceAll(strings.ToValidUTF8(e.Completion, "\ufffd"), "\x00", "")
		outcome, completion = schemas.SubmissionDone, &text
	}
	failures := make([]*string, len(ids))
	for i, failure := range errs {
		if failure == nil {
			continue
		}
		b, err := json.Marshal(failure)
		if err != nil {
			return nil, err
		}
		text := string(b)
		failures[i] = &text
	}
	var request *string
	if e.Request != "" {
		request = (*string)(&e.Request)
	}
	rows, err := q.Query(ctx, `SELECT * FROM submission_end($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)`,
		s.at(), owner, ids, runs, outcome, request, completion, failures, e.Usage.PromptTokens, e.Usage.CompletionTokens, e.Keep.Milliseconds())
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[int64])
}

// WaitingSubmissions returns how many submissions wait, and for how long the oldest has been
// there. It reads an entry of an index for each.
func (s *Store) WaitingSubmissions(ctx context.Context) (n int, oldest time.Duration, err error) {
	err = s.read(ctx, "count what waits", func(ctx context.Context) error {
		var seconds float64
		err := s.pool.QueryRow(ctx, `
			SELECT w.n, coalesce(extract(epoch FROM coalesce($1, now()) - s.created_at), 0)::double precision
			FROM (SELECT count(*) AS n, min(id) AS first FROM submission_queue WHERE owner_id IS NULL) AS w
			LEFT JOIN submissions s ON s.id = w.first`, s.at()).Scan(&n, &seconds)
		oldest = time.Duration(seconds * float64(time.Second))
		return err
	})
	return n, oldest, err
}

// OwnedSubmission is a submission that an owner has claimed, and neither ended nor returned.
type OwnedSubmission struct{ ID, Run int64 }

// OwnedSubmissions lists what an owner has claimed, so that it can return what it doesn't
// know of, because the answer to its claim got lost.
func (s *Store) OwnedSubmissions(ctx context.Context, owner schemas.OwnerID) (list []OwnedSubmission, err error) {
	err = s.read(ctx, "list claimed submissions", func(ctx context.Context) error {
		rows, err := s.pool.Query(ctx, `SELECT id, run FROM submission_queue WHERE owner_id = $1`, owner)
		if err != nil {
			return err
		}
		list, err = pgx.CollectRows(rows, pgx.RowToStructByPos[OwnedSubmission])
		return err
	})
	return list, err
}
