package books_test

import (
	"crypto/sha256"
	"fmt"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/schemas"
)

// fill makes a backlog of n submissions, of so many keys.
func fill(t testing.TB, s *books.Store, n, keys int) (list []*client) {
	t.Helper()
	for range keys {
		c := newClient(t, s, limits{concurrency: 100, qps: 1_000_000})
		list = append(list, c)
		c.must(s.Exec(t.Context(), `
			WITH made AS (
				INSERT INTO submissions (key_id, client_id, digest, created_at)
				SELECT $1, 'old' || i, '', now() FROM generate_series(1, $4::integer) AS i RETURNING id
			), texts AS (
				INSERT INTO submission_texts (id, request) SELECT id, repeat('x', 300) FROM made
			), queue AS (
				INSERT INTO submission_queue (id, key_id, tenant_id, model, deadline) SELECT id, $1, $2, $3, now() + interval '1 day' FROM made
			), lane AS (
				INSERT INTO submission_lanes (key_id, model, tenant_id, head, due_at) VALUES ($1, $3, $2, 0, now())
			)
			INSERT INTO submission_turns (key_id, due_at) VALUES ($1, now())`, c.key.ID, c.tenant.ID, testModel, n/keys))
	}
	c := list[0]
	c.must(s.Exec(t.Context(), `ANALYZE`))
	return list
}

// No step reads more rows because more are waiting.
func TestSubmissionsAreNotScanned(t *testing.T) {
	s := open(t)
	list := fill(t, s, 20_000, 4)
	c := list[0]
	rows, err := s.SubmissionRows(t.Context(), c.lease, c.newSubmission("new"), books.SubmissionSweep{Keep: time.Hour, KeepID: time.Hour})
	c.must(err)
	for step, n := range rows {
		if n > 60 {
			t.Errorf("%s read %d rows", step, n)
		}
	}
}

// BenchmarkSubmission runs submissions, one after the other, while so many wait: each is
// claimed, admitted, settled and ended, and another comes in its place. The times are those of
// a server that flushes every commit.
func BenchmarkSubmission(b *testing.B) {
	for _, waiting := range []int{1, 1_000, 100_000} {
		b.Run(fmt.Sprintf("waiting=%d", waiting), func(b *testing.B) {
			s := connect(b, durable(b), 0)
			defer s.Close()
			if err := s.Migrate(b.Context()); err != nil {
				b.Fatal(err)
			}
			keys := min(waiting, 50)
			list := fill(b, s, waiting, keys)
			lease := list[0].lease
			var submitting, claiming, ending time.Duration
			n := 0
			for b.Loop() {
				c := list[n%keys]
				id := fmt.Sprint("new", n)
				n++
				begun := time.Now()
				_, _, err := s.Submit(b.Context(), books.NewSubmission{
					Key: c.key.ID, Tenant: c.tenant.ID, Client: id, Model: testModel, Request: "{}", Digest: sha256.Sum256([]byte(id)),
				})
				c.must(err)
				submitted := time.Now()
				claims, err := s.ClaimSubmissions(b.Context(), lease, 1)
				c.must(err)
				claimed := time.Now()
				ask := books.Ask{
					Request: schemas.NewRequestID(), Tenant: claims[0].Tenant, Key: claims[0].Key, Model: testModel, Prompt: 1, Limit: 1, Timeout: time.Minute,
				}
				out, err := s.Turn(b.Context(), books.Turn{Admit: []books.Ask{ask}, Lease: lease})
				c.must(err)
				if out.Admit[0].Reason != books.Admitted {
					b.Fatal(out.Admit[0].Reason)
				}
				_, err = s.Turn(b.Context(), books.Turn{Settle: []books.Settlement{{Request: ask.Request, Key: ask.Key, Outcome: books.OutcomeDone}}})
				c.must(err)
				settled := time.Now()
				if recorded, err := s.EndSubmission(b.Context(), &claims[0], books.End{Request: ask.Request, Completion: "{}", Keep: time.Hour}); err != nil || !recorded {
					b.Fatal(recorded, err)
				}
				submitting += submitted.Sub(begun)
				claiming += claimed.Sub(submitted)
				ending += time.Since(settled)
			}
			per := func(d time.Duration) float64 { return float64(d.Microseconds()) / float64(n) }
			b.ReportMetric(per(submitting), "submit-us/op")
			b.ReportMetric(per(claiming), "claim-us/op")
			b.ReportMetric(per(ending), "end-us/op")
		})
	}
}
