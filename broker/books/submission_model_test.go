package books_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/schemas"
)

// modelSubmission is what the books promise of one.
type modelSubmission struct {
	key     int
	name    string
	state   schemas.SubmissionState
	run     int64
	lost    int
	claim   *books.Claim // while it runs
	stale   []books.Claim
	request schemas.RequestID
}

// Whatever is done in whatever order, by an owner that loses its lease now and then, the books
// know of each submission what a simple model knows: it ends once, by the run that has it, and
// what is claimed of a key is the oldest that waits.
func TestSubmissionModel(t *testing.T) {
	s := open(t)
	rapid.Check(t, func(rt *rapid.T) {
		var keys []*client
		for range 2 {
			keys = append(keys, newClient(t, s, limits{concurrency: 100, qps: 1000}))
		}
		lease, err := s.RenewLease(t.Context(), schemas.NewOwnerID(), time.Minute)
		keys[0].must(err)
		var all []*modelSubmission
		of := func(states ...schemas.SubmissionState) (list []*modelSubmission) {
			for _, m := range all {
				if slices.Contains(states, m.state) {
					list = append(list, m)
				}
			}
			return list
		}
		pick := func(rt *rapid.T, list []*modelSubmission) *modelSubmission {
			if len(list) == 0 {
				rt.Skip("there is none")
			}
			return rapid.SampledFrom(list).Draw(rt, "submission")
		}
		rt.Repeat(map[string]func(*rapid.T){
			"submit": func(rt *rapid.T) {
				key, name := rapid.IntRange(0, 1).Draw(rt, "key"), fmt.Sprint(rapid.IntRange(0, 15).Draw(rt, "name"))
				sub, duplicate, err := s.Submit(t.Context(), keys[key].newSubmission(name))
				keys[0].must(err)
				i := slices.IndexFunc(all, func(m *modelSubmission) bool { return m.key == key && m.name == name })
				if duplicate != (i >= 0) {
					rt.Fatalf("duplicate %v", duplicate)
				}
				if i < 0 {
					all = append(all, &modelSubmission{key: key, name: name, state: schemas.SubmissionWaiting})
					i = len(all) - 1
				}
				if sub.State != all[i].state {
					rt.Fatalf("it is %s, want %s", sub.State, all[i].state)
				}
			},
			"claim": func(rt *rapid.T) {
				limit := rapid.IntRange(1, 5).Draw(rt, "limit")
				waiting := of(schemas.SubmissionWaiting)
				list, err := s.ClaimSubmissions(t.Context(), lease, limit)
				keys[0].must(err)
				if len(list) != min(limit, len(waiting)) {
					rt.Fatalf("%d of %d are claimed, want %d", len(list), len(waiting), limit)
				}
				for i := range list {
					c := &list[i]
					oldest := slices.IndexFunc(all, func(m *modelSubmission) bool {
						return m.state == schemas.SubmissionWaiting && keys[m.key].key.ID == c.Key
					})
					if oldest < 0 || all[oldest].name != c.Client || all[oldest].run+1 != c.Run || all[oldest].lost != c.Lost {
						rt.Fatalf("%+v is claimed", c)
					}
					m := all[oldest]
					m.state, m.run, m.claim = schemas.SubmissionRunning, c.Run, c
				}
			},
			"return": func(rt *rapid.T) {
				m := pick(rt, of(schemas.SubmissionRunning))
				if own, err := s.ReturnSubmission(t.Context(), books.Return{Claim: m.claim, For: books.WaitsForNothing}); err != nil || !own {
					rt.Fatal(own, err)
				}
				m.state, m.stale, m.claim = schemas.SubmissionWaiting, append(m.stale, *m.claim), nil
			},
			"end": func(rt *rapid.T) {
				m := pick(rt, of(schemas.SubmissionRunning))
				m.request = schemas.NewRequestID()
				recorded, err := s.EndSubmission(t.Context(), m.claim, books.End{Request: m.request, Completion: "{}", Keep: time.Hour})
				if err != nil || !recorded {
					rt.Fatal(recorded, err)
				}
				m.state, m.stale, m.claim = schemas.SubmissionDone, append(m.stale, *m.claim), nil
			},
			"end what is somebody else's": func(rt *rapid.T) {
				m := pick(rt, all)
				if len(m.stale) == 0 {
					rt.Skip("it had no run before")
				}
				c := rapid.SampledFrom(m.stale).Draw(rt, "claim")
				recorded, err := s.EndSubmission(t.Context(), &c, books.End{Request: schemas.NewRequestID(), Completion: "{}", Keep: time.Hour})
				if err != nil || recorded {
					rt.Fatal(recorded, err)
				}
			},
			"lose the lease": func(*rapid.T) {
				keys[0].must(s.EndLease(t.Context(), lease))
				_, err := s.SweepSubmissions(t.Context(), books.SubmissionSweep{Keep: time.Hour, KeepID: time.Hour})
				keys[0].must(err)
				lease, err = s.RenewLease(t.Context(), lease.Owner, time.Minute)
				keys[0].must(err)
				for _, m := range of(schemas.SubmissionRunning) {
					m.stale, m.claim = append(m.stale, *m.claim), nil
					m.state = schemas.SubmissionWaiting
					if m.lost++; m.lost >= books.MaxLostRuns {
						m.state = schemas.SubmissionError
					}
				}
			},
			"": func(rt *rapid.T) {
				for _, m := range all {
					got, err := s.FindSubmission(t.Context(), keys[m.key].key.ID, m.name)
					if err != nil || got.State != m.state || got.Request != m.request {
						rt.Fatalf("%+v, %v; want %+v", got, err, m)
					}
				}
			},
		})
		// So that nothing is left for the next round.
		keys[0].must(s.EndLease(t.Context(), lease))
		keys[0].must(s.Exec(t.Context(), `TRUNCATE submissions, submission_queue, submission_lanes, submission_turns, submission_texts`))
	})
}
