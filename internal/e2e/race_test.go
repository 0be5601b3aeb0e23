package e2e

import (
	"context"
	"math/rand/v2"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// raceTime bounds each of the races: a reply that never comes is a failure, and not the
// end of all tests.
const raceTime = 3 * time.Minute

// TestLimitsOverThreeEdges has many clients of one key, or of one tenant, race for what
// it may have, at three edges in three processes.
func TestLimitsOverThreeEdges(t *testing.T) {
	c := startThreeEdges(t)
	c.ledger.notePeaks()
	setPrice(t, c.Cluster, demo.ModelID, tabPrice)
	for _, test := range []struct {
		name string
		run  func(*testing.T, *threeEdges)
	}{
		{"a budget, with max_tokens", raceForBudget},
		{"a budget, without max_tokens", raceForOpenBudget},
		{"a budget for one client", aloneWithBudget},
		{"slots", raceForSlots},
		{"a tenant's bucket", raceForBucket},
		{"one slot for one client", aloneWithSlot},
	} {
		t.Run(test.name, func(t *testing.T) {
			began := time.Now()
			test.run(t, c)
			t.Logf("took %s", time.Since(began).Round(100*time.Millisecond))
		})
	}
}

// raceForBudget: a budget of a hundred requests admits a hundred, which use all of what
// was reserved for them.
func raceForBudget(t *testing.T, c *threeEdges) {
	const clients, covered, budget = 1000, 100, 100 // cents, one for each request
	ctx, cancel := context.WithTimeout(t.Context(), raceTime)
	defer cancel()
	bound := promptBound(t)
	tokens := tab - bound
	key, secret := newKey(t, c.Cluster, books.NewKey{BudgetCents: new(int64(budget)), Concurrency: new(clients)})
	edges := clientsOf(t, c.edges, secret)
	before := c.backend.Stats()
	over, full := 0, false
	stop := c.ledger.sample(key, func(h holding) {
		if h.Spent+h.Reserved > budget*books.MicroCents {
			over++
		}
		full = full || h.Reserved > 0 && h.Spent+h.Reserved == budget*books.MicroCents
	})
	fields := limited(priced(t, tokens, map[string]any{"tokens_per_second": 200}), tokens)
	replies := together(clients, func(i int) reply { return edges[i%3].chat(ctx, i%2 == 0, fields) })
	samples := stop()

	whole := make(map[string]bool)
	refused := make(map[string]int)
	for _, r := range replies {
		if r.status == http.StatusOK {
			wantWhole(t, r)
			whole[r.request()] = true
			if got := tokensOf(r.text); got != tokens || r.finish != "stop" {
				t.Errorf("a reply has %d tokens and ends with %q, want %d", got, r.finish, tokens)
			}
			continue
		}
		refused[r.code()]++
		if r.code() == string(schemas.CodeBudgetExceeded) {
			want429(t, r, schemas.CodeBudgetExceeded)
		} else {
			want429(t, r, schemas.CodeConcurrencyLimit)
		}
	}
	if len(whole) != covered {
		t.Errorf("%d requests were admitted, want %d", len(whole), covered)
	}
	entries := c.ledger.wantClosed(key, 30*time.Second)
	for id, e := range entries {
		if !whole[id] || e.Prompt != int64(bound) || e.Completion != int64(tokens) || e.Cost != books.MicroCents || e.Outcome != "done" {
			t.Errorf("ledger has %+v, of a whole reply: %v", e, whole[id])
		}
	}
	if len(entries) != covered {
		t.Errorf("the ledger has %d requests, want %d", len(entries), covered)
	}
	if h := c.ledger.holding(key); h.Spent != budget*books.MicroCents {
		t.Errorf("spent %d of the budget", h.Spent)
	}
	if n := c.backend.Stats().Started - before.Started; n != covered {
		t.Errorf("the backend began %d requests, want %d", n, covered)
	}
	peak, _ := c.ledger.peaks(key)
	if over > 0 || peak != budget*books.MicroCents {
		t.Errorf("spent and reserved came to %d at the most, of %d; above in %d of %d samples", peak, int64(budget*books.MicroCents), over, samples)
	}
	if samples == 0 { // on busy cores there are few; the peak misses nothing
		t.Error("no samples")
	}
	want429(t, edges[0].chat(ctx, true, fields), schemas.CodeBudgetExceeded)
	t.Logf("%d admitted; refused: %v; %d samples, all of the budget held in some: %v", len(whole), refused, samples, full)
}

// raceForOpenBudget: clients that give no limit, and come again when they are told to, end
// up with all that the budget pays for, each reply whole.
func raceForOpenBudget(t *testing.T, c *threeEdges) {
	const covered, budget = 100, 100
	ctx, cancel := context.WithTimeout(t.Context(), raceTime)
	defer cancel()
	tokens := tab - promptBound(t)
	key, secret := newKey(t, c.Cluster, books.NewKey{BudgetCents: new(int64(budget))})
	edges := clientsOf(t, c.edges, secret)
	fields := priced(t, tokens, nil)
	replies := together(count(200, 1000), func(i int) reply { return edges[i%3].obedient(ctx, i%4 != 0, fields) })

	whole := 0
	for _, r := range replies {
		if r.status != http.StatusOK {
			want429(t, r, schemas.CodeBudgetExceeded)
			continue
		}
		whole++
		wantWhole(t, r)
		if got := tokensOf(r.text); got != tokens || r.finish != "stop" {
			t.Errorf("a reply has %d tokens and ends with %q, want %d", got, r.finish, tokens)
		}
	}
	entries := c.ledger.wantClosed(key, 30*time.Second)
	peak, slots := c.ledger.peaks(key)
	if whole != covered || len(entries) != covered || c.ledger.holding(key).Spent != budget*books.MicroCents {
		t.Errorf("%d whole replies, %d requests in the ledger, %d spent, want %d", whole, len(entries), c.ledger.holding(key).Spent, covered)
	}
	if peak > budget*books.MicroCents {
		t.Errorf("spent and reserved came to %d, above the budget", peak)
	}
	t.Logf("%d whole replies; at most %d in flight", whole, slots)
}

// aloneWithBudget: who sends one request after the other never hears that others hold the
// money, and gets all that the budget pays for.
func aloneWithBudget(t *testing.T, c *threeEdges) {
	const covered, budget = 100, 100
	ctx, cancel := context.WithTimeout(t.Context(), raceTime)
	defer cancel()
	tokens := tab - promptBound(t)
	key, secret := newKey(t, c.Cluster, books.NewKey{BudgetCents: new(int64(budget))})
	edges := clientsOf(t, c.edges, secret)
	fields := priced(t, tokens, nil)
	for i := range covered {
		r := edges[i%3].chat(ctx, i%2 == 0, fields)
		wantWhole(t, r)
		if got := tokensOf(r.text); got != tokens || r.finish != "stop" {
			t.Fatalf("reply %d has %d tokens and ends with %q, want %d", i, got, r.finish, tokens)
		}
	}
	for i := range 6 {
		r := edges[i%3].chat(ctx, i%2 == 0, fields)
		want429(t, r, schemas.CodeBudgetExceeded)
		if r.header.Get("X-RateLimit-Remaining-Tokens-Monthly") != "0" {
			t.Errorf("headers %v", r.header)
		}
	}
	if entries := c.ledger.wantClosed(key, 30*time.Second); len(entries) != covered {
		t.Errorf("the ledger has %d requests, want %d", len(entries), covered)
	}
}

// raceForSlots: of a key's 32 slots none is given out twice, and none gets lost, whatever
// ends the requests.
func raceForSlots(t *testing.T, c *threeEdges) {
	const slots = 32 // by default
	ctx, cancel := context.WithTimeout(t.Context(), raceTime)
	defer cancel()
	key, secret := newKey(t, c.Cluster, books.NewKey{})
	edges := clientsOf(t, c.edges, secret)
	c.backend.Reset()
	over := 0
	stop := c.ledger.sample(key, func(h holding) {
		if h.InFlight > slots {
			over++
		}
	})
	each := count(2, 10)
	var refused atomic.Int64
	together(64, func(i int) reply {
		for n := range each {
			r := edges[(i+n)%3].obedient(ctx, (i+n)%2 == 0, priced(t, 20, map[string]any{"tokens_per_second": 100}))
			wantWhole(t, r)
		}
		return reply{}
	})
	if peak := c.backend.Stats().Peak; peak > slots {
		t.Errorf("the backend had %d requests at once", peak)
	}

	// However a request ends: its client leaves, its backend fails.
	together(64, func(i int) reply {
		for n := range each * 2 {
			leaving, leave := context.WithTimeout(ctx, rand.N(150*time.Millisecond))
			fault := []map[string]any{{"tokens_per_second": 50}, {"die_after": 3}, {"status": 503}, {"first_token_ms": 1000}}[(i+n)%4]
			if r := edges[(i+n)%3].chat(leaving, n%2 == 0, priced(t, 100, fault)); r.status == http.StatusTooManyRequests {
				want429(t, r, schemas.CodeConcurrencyLimit)
				refused.Add(1)
			}
			leave()
		}
		return reply{}
	})
	samples := stop()
	c.ledger.wantClosed(key, 30*time.Second)
	if _, peak := c.ledger.peaks(key); peak != slots || over > 0 {
		t.Errorf("at most %d were in flight, want %d; more in %d of %d samples", peak, slots, over, samples)
	}
	t.Logf("%d refused, %d samples", refused.Load(), samples)

	// All of them are there.
	for _, r := range together(slots, func(i int) reply {
		return edges[i%3].chat(ctx, i%2 == 0, priced(t, 20, map[string]any{"first_token_ms": 1000}))
	}) {
		wantWhole(t, r)
	}
}

// raceForBucket: over no stretch of time does a tenant get more requests than its rate
// gives in it, and a second's worth on top.
func raceForBucket(t *testing.T, c *threeEdges) {
	const qps, clients, hurry = 20, 12, 4 * time.Second
	tenant, user := newTenant(t, c.Cluster, "bucket", qps)
	c.StartWorkerOf(tenant.ID, c.backend.URL)
	key, secret := newKey(t, c.Cluster, books.NewKey{Tenant: tenant.Slug, User: string(user.ID), Concurrency: new(1000)})
	awaitModel(t, c.edges, secret, demo.ModelID)
	edges := clientsOf(t, c.edges, secret)
	began := time.Now()
	var granted, refused atomic.Int64
	together(clients, func(i int) reply {
		for n := 0; time.Since(began) < hurry; n++ {
			r := edges[(i+n)%3].chat(t.Context(), n%2 == 0, priced(t, 3, nil))
			if r.status == http.StatusOK {
				wantWhole(t, r)
				granted.Add(1)
				continue
			}
			want429(t, r, schemas.CodeTenantQPSLimit)
			refused.Add(1)
			time.Sleep(10 * time.Millisecond) // else they have the processors to themselves
		}
		return reply{}
	})
	moments := c.ledger.admitted(tenant.ID)
	if len(moments) != int(granted.Load()) {
		t.Errorf("%d requests were admitted, and %d answered", len(moments), granted.Load())
	}
	for i, first := range moments {
		for j, last := range moments[i:] {
			if most := qps + last.Sub(first).Seconds()*qps; float64(j+1) > most+1e-3 {
				t.Fatalf("%d requests were admitted within %s, at most %.1f may be", j+1, last.Sub(first), most)
			}
		}
	}
	if refused.Load() == 0 || granted.Load() <= qps {
		t.Errorf("%d granted, %d refused: the bucket wasn't emptied, or not filled again", granted.Load(), refused.Load())
	}
	c.ledger.wantClosed(key, 30*time.Second)
	t.Logf("%d granted and %d refused in %s at %d/s", granted.Load(), refused.Load(), time.Since(began), qps)
}

// aloneWithSlot: a client that has heard the end of a reply gets the next one, at whatever
// edge, however the last one ended.
func aloneWithSlot(t *testing.T, c *threeEdges) {
	ctx, cancel := context.WithTimeout(t.Context(), raceTime)
	defer cancel()
	key, secret := newKey(t, c.Cluster, books.NewKey{Concurrency: new(1)})
	edges := clientsOf(t, c.edges, secret)
	requests := count(210, 1000)
	for i := range requests {
		fault, code, stream := map[string]any(nil), "", i%2 == 0
		switch i % 7 {
		case 3:
			fault, code = map[string]any{"error_after": 2}, "backend_error"
		case 5:
			fault, code = map[string]any{"status": 500}, "backend_error"
		}
		r := edges[i%3].chat(ctx, stream, priced(t, 5, fault))
		if code == "" {
			wantWhole(t, r)
		}
		if r.code() != code || r.broken != nil {
			t.Fatalf("request %d: status %d, error %+v, broken %v, want %q", i, r.status, r.err, r.broken, code)
		}
	}
	if entries := c.ledger.wantClosed(key, 30*time.Second); len(entries) != requests {
		t.Errorf("the ledger has %d requests, want %d", len(entries), requests)
	}
	if _, peak := c.ledger.peaks(key); peak != 1 {
		t.Errorf("%d were in flight at once", peak)
	}
}

// TestRepliesAreCutByTheBudget has replies without a limit race for a budget that doesn't
// pay for all of them. They get what there is, bit by bit, and end with "length" where there
// is no more; the budget isn't overspent, and all of it is spent.
func TestRepliesAreCutByTheBudget(t *testing.T) {
	const cents, tokens = 20, 300 // of 4,000 tokens in all, about ten replies with their prompts
	c := startThreeEdges(t, stack.Flag("open-tokens", 16))
	c.ledger.notePeaks()
	setPrice(t, c.Cluster, demo.ModelID, tabPrice)
	key, secret := newKey(t, c.Cluster, books.NewKey{BudgetCents: new(int64(cents))})
	ctx, cancel := context.WithTimeout(t.Context(), raceTime)
	defer cancel()
	edges := clientsOf(t, c.edges, secret)
	fields := priced(t, tokens, map[string]any{"tokens_per_second": 200})
	replies := together(40, func(i int) reply { return edges[i%3].obedient(ctx, i%5 != 0, fields) })
	entries := c.ledger.wantClosed(key, 30*time.Second)
	ends := make(map[string]int)
	for _, r := range replies {
		if r.status != http.StatusOK {
			want429(t, r, schemas.CodeBudgetExceeded)
			ends[r.code()]++
			continue
		}
		wantWhole(t, r)
		ends[r.finish]++
		got, e := tokensOf(r.text), entries[r.request()]
		if got > tokens || r.finish == "stop" && got != tokens || r.finish != "stop" && r.finish != "length" ||
			int64(got) != e.Completion || e.Outcome != "done" {
			t.Errorf("a reply has %d of %d tokens and ends with %q; the ledger has %+v", got, tokens, r.finish, e)
		}
	}
	peak, _ := c.ledger.peaks(key)
	// What is left pays for no prompt with a token of reply.
	left := cents*books.MicroCents - c.ledger.holding(key).Spent
	if peak > cents*books.MicroCents || left < 0 || left >= int64(promptBound(t)+1)*tabPrice/1000 {
		t.Errorf("at most %d of %d were spent and reserved, and %d are left", peak, int64(cents*books.MicroCents), left)
	}
	if ends["length"] == 0 || ends["length"]+ends["stop"] != len(entries) {
		t.Errorf("replies ended with %v, and the ledger has %d", ends, len(entries))
	}
	t.Logf("replies ended with %v, %d micro-cents are left", ends, left)
}
