package books_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/pgtest"
	"github.com/ownllm/ownllm/schemas"
)

func (c *client) newSubmission(id string) books.NewSubmission {
	return books.NewSubmission{
		Key: c.key.ID, Tenant: c.tenant.ID, Client: id, Model: testModel,
		Request: "request of " + id, Digest: sha256.Sum256([]byte(id)),
	}
}

func (c *client) submit(ids ...string) {
	c.t.Helper()
	for _, id := range ids {
		_, _, err := c.s.Submit(c.t.Context(), c.newSubmission(id))
		c.must(err)
	}
}

func (c *client) claim(limit int) []books.Claim {
	c.t.Helper()
	list, err := c.s.ClaimSubmissions(c.t.Context(), c.lease, limit)
	c.must(err)
	return list
}

func (c *client) giveBack(r books.Return) bool {
	c.t.Helper()
	own, err := c.s.ReturnSubmission(c.t.Context(), r)
	c.must(err)
	return own
}

func (c *client) end(claim *books.Claim, e books.End) bool {
	c.t.Helper()
	if e.Keep == 0 {
		e.Keep = time.Hour
	}
	recorded, err := c.s.EndSubmission(c.t.Context(), claim, e)
	c.must(err)
	return recorded
}

func (c *client) find(id string) books.Submission {
	c.t.Helper()
	sub, err := c.s.FindSubmission(c.t.Context(), c.key.ID, id)
	c.must(err)
	return sub
}

func (c *client) sweepSubmissions() books.SweptSubmissions {
	c.t.Helper()
	swept, err := c.s.SweepSubmissions(c.t.Context(), books.SubmissionSweep{Keep: time.Hour, KeepID: 24 * time.Hour})
	c.must(err)
	return swept
}

func clients(list []books.Claim) []string {
	ids := make([]string, 0, len(list))
	for i := range list {
		ids = append(ids, list[i].Client)
	}
	return ids
}

func wantClaims(t *testing.T, list []books.Claim, want ...string) {
	t.Helper()
	if got := clients(list); !slices.Equal(got, want) {
		t.Fatalf("claimed %q, want %q", got, want)
	}
}

func TestSubmission(t *testing.T) {
	c := newClient(t, open(t), limits{concurrency: 9, qps: 1000})
	sub, duplicate, err := c.s.Submit(t.Context(), c.newSubmission("a"))
	c.must(err)
	if duplicate || sub.State != schemas.SubmissionWaiting || c.find("a").State != schemas.SubmissionWaiting {
		t.Errorf("%+v, %v", sub, duplicate)
	}
	list := c.claim(5)
	wantClaims(t, list, "a")
	a := &list[0]
	if a.Request != "request of a" || a.Tenant != c.tenant.ID || a.Model != testModel || a.Run != 1 || a.Lost != 0 {
		t.Errorf("%+v", a)
	}
	if sub, duplicate, err = c.s.Submit(t.Context(), c.newSubmission("a")); err != nil || !duplicate || sub.State != schemas.SubmissionRunning {
		t.Errorf("%+v, %v, %v", sub, duplicate, err)
	}
	wantClaims(t, c.claim(5))
	req := schemas.NewRequestID()
	e := books.End{Request: req, Completion: "{\"a\":\"\xff\x00\"}", Usage: schemas.Usage{PromptTokens: 3, CompletionTokens: 4}}
	for range 2 {
		if !c.end(a, e) {
			t.Error("the end wasn't recorded")
		}
	}
	if c.end(a, books.End{Request: schemas.NewRequestID(), Completion: "{}"}) {
		t.Error("another end was recorded")
	}
	if c.giveBack(books.Return{Claim: a, For: books.WaitsForNothing}) {
		t.Error("it was given back after its end")
	}
	got := c.find("a")
	if got.State != schemas.SubmissionDone || got.Request != req || got.Completion != "{\"a\":\"\ufffd\"}" || got.Usage.CompletionTokens != 4 || got.Err != nil ||
		got.Expires.Sub(got.Ended) != time.Hour {
		t.Errorf("%+v", got)
	}
	if sub, duplicate, err = c.s.Submit(t.Context(), c.newSubmission("a")); err != nil || !duplicate || sub.State != schemas.SubmissionDone {
		t.Errorf("%+v, %v, %v", sub, duplicate, err)
	}
	wantClaims(t, c.claim(5))
}

func TestSubmissionThatFails(t *testing.T) {
	c := newClient(t, open(t), limits{concurrency: 9, qps: 1000})
	c.submit("a")
	a := c.claim(1)[0]
	c.end(&a, books.End{Err: schemas.Errorf(schemas.CodeBackendError, "nul \x00").WithParam("p")})
	got := c.find("a")
	if got.State != schemas.SubmissionError || got.Err == nil || got.Err.Code != schemas.CodeBackendError || got.Err.Param != "p" || got.Request != "" {
		t.Errorf("%+v", got)
	}
}

func TestSubmissionRefusals(t *testing.T) {
	c := newClient(t, open(t), limits{concurrency: 9, qps: 1000})
	for _, id := range []string{"", strings.Repeat("x", 129), "a\nb", "é"} {
		_, _, err := c.s.Submit(t.Context(), c.newSubmission(id))
		wantError(t, err, schemas.CodeInvalidValue, "id")
		_, err = c.s.FindSubmission(t.Context(), c.key.ID, id)
		wantError(t, err, schemas.CodeInvalidValue, "id")
	}
	for _, wait := range []time.Duration{-1, time.Millisecond, books.MaxSubmissionWait + 1} {
		n := c.newSubmission("a")
		n.Wait = wait
		_, _, err := c.s.Submit(t.Context(), n)
		wantError(t, err, schemas.CodeInvalidValue, "deadline_seconds")
	}
	c.submit("a")
	n := c.newSubmission("a")
	n.Digest = sha256.Sum256([]byte("b"))
	_, _, err := c.s.Submit(t.Context(), n)
	wantError(t, err, schemas.CodeInvalidValue, "id")
	other := newClient(t, c.s, limits{concurrency: 9, qps: 1000})
	_, err = c.s.FindSubmission(t.Context(), other.key.ID, "a")
	wantError(t, err, schemas.CodeInvalidValue, "id")
	_, err = c.s.FindSubmission(t.Context(), c.key.ID, "b")
	wantError(t, err, schemas.CodeInvalidValue, "id")
}

// The same id from all sides at once is recorded once.
func TestSubmitAtOnce(t *testing.T) {
	c := newClient(t, open(t), limits{concurrency: 100, qps: 1000})
	var work sync.WaitGroup
	fresh := make(chan int64, 100)
	for range 20 {
		work.Go(func() {
			for i := range 10 {
				sub, duplicate, err := c.s.Submit(context.Background(), c.newSubmission(fmt.Sprint(i)))
				if err != nil {
					t.Error(err)
				} else if !duplicate {
					fresh <- sub.ID
				}
			}
		})
	}
	work.Wait()
	if len(fresh) != 10 {
		t.Errorf("%d are new, want 10", len(fresh))
	}
	if n := len(c.claim(100)); n != 10 {
		t.Errorf("%d were claimed, want 10", n)
	}
}

// Keys take turns, and within a key the oldest is first.
func TestFairClaims(t *testing.T) {
	s := open(t)
	a, b := newClient(t, s, limits{concurrency: 100, qps: 1000}), newClient(t, s, limits{concurrency: 100, qps: 1000})
	for i := range 50 {
		a.submit(fmt.Sprintf("a%d", i))
	}
	b.submit("b0", "b1")
	wantClaims(t, a.claim(1), "a0")
	wantClaims(t, a.claim(1), "b0")
	wantClaims(t, a.claim(1), "a1")
	wantClaims(t, a.claim(6), "b1", "a2", "a3", "a4", "a5", "a6")
}

// A key gets no more than it has slots, and a slot that comes free gives it its turn.
func TestClaimsWaitForSlots(t *testing.T) {
	c := newClient(t, open(t), limits{concurrency: 2, qps: 1000})
	woken := listen(t, c.s)
	c.submit("1", "2", "3", "4")
	first := c.claim(9)
	wantClaims(t, first, "1", "2")
	wantClaims(t, c.claim(9))
	// As it is in truth: a slot comes free, and then the submission ends.
	asks := []books.Ask{c.ask(1, 1), c.ask(1, 1)}
	if got := reasons(c.admit(asks...)); got[0]+got[1] != books.Admitted {
		t.Fatal(got)
	}
	drain(woken)
	c.settle(asks[0], 1, 1, books.OutcomeDone)
	wantClaims(t, c.claim(9))
	c.end(&first[0], books.End{Completion: "{}"})
	await(t, woken)
	third := c.claim(9)
	wantClaims(t, third, "3")
	// Others of the key have the slots.
	c.end(&first[1], books.End{Completion: "{}"})
	other := c.ask(1, 1)
	c.admit(other)
	wantClaims(t, c.claim(9))
	drain(woken)
	c.settle(other, 1, 1, books.OutcomeDone)
	await(t, woken)
	wantClaims(t, c.claim(9), "4")
}

// listen returns a channel that gets a token when the store is told of submissions.
func listen(t *testing.T, s *books.Store) chan struct{} {
	t.Helper()
	woken := make(chan struct{}, 100)
	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	work.Go(func() {
		err := s.ListenSubmissions(ctx, func() {
			select {
			case woken <- struct{}{}:
			default:
			}
		})
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	t.Cleanup(work.Wait)
	t.Cleanup(cancel)
	await(t, woken)
	return woken
}

func await(t *testing.T, woken chan struct{}) {
	t.Helper()
	select {
	case <-woken:
	case <-time.After(30 * time.Second):
		t.Fatal("nobody was told")
	}
}

func drain(woken chan struct{}) {
	for {
		select {
		case <-woken:
		default:
			return
		}
	}
}

// What is refused keeps its place, and holds up no more than it has to.
func TestReturns(t *testing.T) {
	const later = time.Hour
	for _, c := range []struct {
		waits books.WaitsFor
		// what can be claimed after the first one was returned: of the same model, of another
		// model of the key, of another key
		want []string
	}{
		{books.WaitsForNothing, []string{"other", "1", "2", "model"}},
		{books.WaitsForModel, []string{"other", "model"}},
		{books.WaitsForCapacity, []string{"other", "model"}},
		{books.WaitsForTime, []string{"other"}},
		{books.WaitsForMoney, []string{"other"}},
		{books.WaitsForSlot, []string{"other", "1", "2", "model"}}, // one is free by now
	} {
		t.Run(string(c.waits), func(t *testing.T) {
			cl := newClient(t, open(t), limits{concurrency: 9, qps: 1000})
			other := newClient(t, cl.s, limits{concurrency: 9, qps: 1000})
			cl.submit("1")
			first := cl.claim(1)
			cl.submit("2")
			n := cl.newSubmission("model")
			n.Model = "another"
			_, _, err := cl.s.Submit(t.Context(), n)
			cl.must(err)
			other.submit("other")
			if !cl.giveBack(books.Return{Claim: &first[0], For: c.waits, Code: "c", Pause: later}) {
				t.Fatal("the claim was somebody else's")
			}
			if cl.giveBack(books.Return{Claim: &first[0], For: c.waits, Pause: later}) || cl.end(&first[0], books.End{Completion: "{}"}) {
				t.Error("the claim was still there")
			}
			got := clients(cl.claim(9))
			slices.Sort(got)
			slices.Sort(c.want)
			if !slices.Equal(got, c.want) {
				t.Errorf("%q can be claimed, want %q", got, c.want)
			}
		})
	}
}

// After a refusal one goes ahead, and the others of its lane follow once it has begun.
func TestProbe(t *testing.T) {
	c := newClient(t, open(t), limits{concurrency: 9, qps: 1000})
	woken := listen(t, c.s)
	c.submit("1", "2", "3")
	first := c.claim(1)
	c.giveBack(books.Return{Claim: &first[0], For: books.WaitsForModel, Code: schemas.CodeAgentOffline, Tries: 1})
	probe := c.claim(9)
	wantClaims(t, probe, "1")
	if probe[0].Tries != 1 {
		t.Errorf("%+v", probe[0])
	}
	wantClaims(t, c.claim(9))
	drain(woken)
	c.must(c.s.SubmissionBegun(t.Context(), &probe[0]))
	await(t, woken)
	wantClaims(t, c.claim(9), "2", "3")
}

// A run that ends lets one go on that waited for the model's capacity.
func TestCapacityOpens(t *testing.T) {
	s := open(t)
	a, b := newClient(t, s, limits{concurrency: 9, qps: 1000}), newClient(t, s, limits{concurrency: 9, qps: 1000})
	b.tenant, b.key.Tenant = a.tenant, a.tenant.ID // the books don't ask here
	a.submit("a1", "a2", "a3")
	list := a.claim(3)
	b.submit("b1")
	first := b.claim(1)
	if !a.giveBack(books.Return{Claim: &list[2], For: books.WaitsForCapacity, Pause: time.Hour}) || !b.giveBack(books.Return{Claim: &first[0], For: books.WaitsForCapacity, Pause: time.Hour}) {
		t.Fatal("a claim was somebody else's")
	}
	wantClaims(t, a.claim(9))
	a.end(&list[0], books.End{Completion: "{}"})
	wantClaims(t, a.claim(9), "a3")
	a.end(&list[1], books.End{Completion: "{}"})
	wantClaims(t, a.claim(9), "b1")
}

// An owner whose lease lapsed ends nothing, whoever has the submission by then, and one that
// is lost too often is poison.
func TestLostRuns(t *testing.T) {
	c := newClient(t, open(t), limits{concurrency: 9, qps: 1000})
	c.submit("a", "b")
	var old []books.Claim
	for i := range books.MaxLostRuns {
		if got := c.sweepSubmissions(); got.Returned+len(got.Ended) != 0 {
			t.Fatalf("%+v", got)
		}
		list := c.claim(1)
		wantClaims(t, list, "a")
		if list[0].Lost != i || list[0].Run != int64(i+1) {
			t.Errorf("%+v", list[0])
		}
		old = append(old, list[0])
		c.must(c.s.EndLease(t.Context(), c.lease))
		if n := len(c.claim(9)); n != 0 {
			t.Errorf("%d were claimed without a lease", n)
		}
		swept := c.sweepSubmissions()
		if i == books.MaxLostRuns-1 {
			if len(swept.Ended) != 1 || swept.Ended[0].Client != "a" || swept.Ended[0].State != schemas.SubmissionError || swept.Ended[0].Err == nil {
				t.Errorf("%+v", swept)
			}
		} else if swept.Returned != 1 || len(swept.Ended) != 0 {
			t.Errorf("%+v", swept)
		}
		var err error
		c.lease, err = c.s.RenewLease(t.Context(), c.lease.Owner, time.Minute)
		c.must(err)
	}
	for i := range old {
		if c.end(&old[i], books.End{Request: schemas.NewRequestID(), Completion: "{}"}) {
			t.Errorf("run %d ended it", i+1)
		}
	}
	if got := c.find("a"); got.State != schemas.SubmissionError || got.Err.Code != schemas.CodeInternalError {
		t.Errorf("%+v", got)
	}
	wantClaims(t, c.claim(9), "b")
}

func TestWaitingEnds(t *testing.T) {
	for _, c := range []struct {
		name string
		end  func(c *client) error
		want schemas.Code
	}{
		{"deadline", func(c *client) error {
			now := time.Now().Add(books.DefaultSubmissionWait + time.Minute)
			c.s.SetClock(func() time.Time { return now })
			return nil
		}, schemas.CodeAgentTimeout},
		{"key revoked", func(c *client) error {
			_, err := c.s.RevokeKey(c.t.Context(), c.key.ID)
			return err
		}, schemas.CodeKeyInvalid},
		{"key expired", func(c *client) error {
			return c.s.Exec(c.t.Context(), `UPDATE api_keys SET expires_at = now() WHERE id = $1`, c.key.ID)
		}, schemas.CodeKeyExpired},
		{"tenant suspended", func(c *client) error {
			return c.s.Exec(c.t.Context(), `UPDATE tenants SET state = 'suspended' WHERE id = $1`, c.tenant.ID)
		}, schemas.CodeTenantDisabled},
		{"user deactivated", func(c *client) error {
			return c.s.Exec(c.t.Context(), `UPDATE users SET state = 'deactivated' WHERE id = $1`, c.user.ID)
		}, schemas.CodeUserDeactivated},
	} {
		t.Run(c.name, func(t *testing.T) {
			cl := newClient(t, open(t), limits{concurrency: 9, qps: 1000})
			cl.submit("runs", "1", "2")
			running := cl.claim(1)
			cl.must(c.end(cl))
			swept := cl.sweepSubmissions()
			if len(swept.Ended) != 2 {
				t.Fatalf("%+v", swept)
			}
			for _, sub := range swept.Ended {
				if sub.State != schemas.SubmissionError || sub.Err == nil || sub.Err.Code != c.want || sub.Client == "runs" || sub.Ended.IsZero() {
					t.Errorf("%+v", sub)
				}
			}
			wantClaims(t, cl.claim(9))
			if !cl.end(&running[0], books.End{Completion: "{}"}) {
				t.Error("what runs was ended, too")
			}
			if got := cl.sweepSubmissions(); len(got.Ended) != 0 {
				t.Errorf("%+v", got)
			}
		})
	}
}

func TestSubmissionsAreForgotten(t *testing.T) {
	c := newClient(t, open(t), limits{concurrency: 9, qps: 1000})
	now := time.Now()
	c.s.SetClock(func() time.Time { return now })
	c.submit("a")
	a := c.claim(1)[0]
	c.end(&a, books.End{Completion: "{}"})
	now = now.Add(59 * time.Minute)
	if got := c.sweepSubmissions(); got.Forgotten != 0 || c.find("a").Completion != "{}" {
		t.Errorf("%+v", got)
	}
	now = now.Add(2 * time.Minute)
	if got := c.sweepSubmissions(); got.Forgotten != 1 {
		t.Errorf("%+v", got)
	}
	if got := c.find("a"); got.State != schemas.SubmissionDone || got.Completion != "" {
		t.Errorf("%+v", got)
	}
	if _, duplicate, err := c.s.Submit(t.Context(), c.newSubmission("a")); err != nil || !duplicate {
		t.Errorf("%v, %v", duplicate, err)
	}
	now = now.Add(24 * time.Hour)
	c.sweepSubmissions()
	_, err := c.s.FindSubmission(t.Context(), c.key.ID, "a")
	wantError(t, err, schemas.CodeInvalidValue, "id")
}

func TestWaitingSubmissions(t *testing.T) {
	c := newClient(t, open(t), limits{concurrency: 9, qps: 1000})
	want := func(count int, least, most time.Duration) {
		t.Helper()
		n, oldest, err := c.s.WaitingSubmissions(t.Context())
		c.must(err)
		if n != count || oldest < least || oldest > most {
			t.Errorf("%d wait, the oldest for %s; want %d, %s to %s", n, oldest, count, least, most)
		}
	}
	want(0, 0, 0)
	c.submit("a", "b")
	wantClaims(t, c.claim(1), "a")
	want(1, 0, time.Minute)
	c.must(c.s.Exec(t.Context(), `UPDATE submissions SET created_at = created_at - interval '1 hour'`))
	want(1, time.Hour, time.Hour+time.Minute)
}

// What an owner claimed without hearing of it can be found.
func TestOwnedSubmissions(t *testing.T) {
	c := newClient(t, open(t), limits{concurrency: 9, qps: 1000})
	c.submit("a", "b")
	list := c.claim(1)
	owned, err := c.s.OwnedSubmissions(t.Context(), c.lease.Owner)
	if want := (books.OwnedSubmission{ID: list[0].ID, Run: 1}); err != nil || len(owned) != 1 || owned[0] != want {
		t.Errorf("%+v, %v", owned, err)
	}
}

// Several owners that claim, lose, return and end at the same time, while others release and
// sweep: each submission ends once, by the run that had it, and nobody waits in a circle.
func TestSubmissionsAtOnce(t *testing.T) {
	const keys, each, owners = 4, 60, 4
	address := pgtest.New(t)
	s := openAt(t, books.Config{URL: address})
	all := make([]*client, 0, keys)
	for range keys {
		all = append(all, newClient(t, s, limits{concurrency: 3, qps: 100_000}))
	}
	var mu sync.Mutex
	endedBy := map[int64][]schemas.RequestID{}
	var work sync.WaitGroup
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	ended := func() int {
		mu.Lock()
		defer mu.Unlock()
		return len(endedBy)
	}
	for _, c := range all {
		work.Go(func() {
			for i := range each {
				if _, _, err := c.s.Submit(ctx, c.newSubmission(fmt.Sprint(i))); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range owners {
		store := openAt(t, books.Config{URL: address})
		work.Go(func() {
			lease, err := store.RenewLease(ctx, schemas.NewOwnerID(), 5*time.Minute)
			if err != nil {
				t.Error(err)
			}
			for n := 0; ended() < keys*each && ctx.Err() == nil; n++ {
				list, err := store.ClaimSubmissions(ctx, lease, 4)
				if err != nil {
					t.Error(err)
				}
				for i := range list {
					c := &list[i]
					ask := books.Ask{Request: schemas.NewRequestID(), Tenant: c.Tenant, Key: c.Key, Model: c.Model, Prompt: 1, Limit: 1, Timeout: time.Minute}
					out, err := store.Turn(ctx, books.Turn{Admit: []books.Ask{ask}, Lease: lease})
					if err != nil {
						t.Error(err)
						continue
					}
					if out.Admit[0].Reason != books.Admitted {
						if _, err := store.ReturnSubmission(ctx, books.Return{Claim: c, For: books.WaitsForSlot, Pause: time.Second}); err != nil {
							t.Error(err)
						}
						continue
					}
					if _, err := store.Turn(ctx, books.Turn{Settle: []books.Settlement{{Request: ask.Request, Key: ask.Key, Outcome: books.OutcomeDone}}}); err != nil {
						t.Error(err)
					}
					if (n+i)%7 == 3 {
						_, err = store.ReturnSubmission(ctx, books.Return{Claim: c, For: books.WaitsForCapacity, Pause: 5 * time.Millisecond})
					} else {
						var recorded bool
						recorded, err = store.EndSubmission(ctx, c, books.End{Request: ask.Request, Completion: "{}", Keep: time.Hour})
						if recorded {
							mu.Lock()
							endedBy[c.ID] = append(endedBy[c.ID], ask.Request)
							mu.Unlock()
						}
					}
					if err != nil {
						t.Error(err)
					}
				}
				if _, err := store.SweepSubmissions(ctx, books.SubmissionSweep{Keep: time.Hour, KeepID: time.Hour}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	work.Wait()
	if len(endedBy) != keys*each {
		t.Errorf("%d have ended, want %d", len(endedBy), keys*each)
	}
	for id, by := range endedBy {
		request, err := books.Query[schemas.RequestID](t.Context(), s, `SELECT request_id FROM submissions WHERE id = $1`, id)
		if err != nil || len(by) != 1 || request != by[0] {
			t.Errorf("%d was ended by %v, and is recorded as ended by %s, %v", id, by, request, err)
		}
	}
	left, err := books.Query[string](t.Context(), s, `
		SELECT coalesce(string_agg(concat_ws(' ', q, l, t, a), E'\n'), '') FROM submission_queue q LEFT JOIN submission_lanes l USING (key_id) LEFT JOIN submission_turns t USING (key_id)
		LEFT JOIN key_accounts a USING (key_id)`)
	if err != nil || left != "" {
		t.Errorf("left in the queue, with lane, turn and account: %s, %v", left, err)
	}
}
