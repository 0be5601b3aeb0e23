package books_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/pgtest"
	"github.com/ownllm/ownllm/schemas"
)

// entry is a row of the ledger, and what is known of its names.
type entry struct {
	tenant                   books.Tenant
	user                     books.User
	key                      books.Key
	model                    string
	at                       time.Time
	prompt, completion, cost int64
}

var usageNames = []string{"tenant", "user", "key", "model", "day"}

// sum is Usage, worked out from the entries.
func sum(entries []entry, q books.UsageQuery) []books.UsageRow {
	rows := map[string]*books.UsageRow{}
	if len(q.By) == 0 {
		rows[""] = &books.UsageRow{}
	}
	for _, e := range entries {
		switch {
		case q.Tenant != "" && q.Tenant != e.tenant.Slug && q.Tenant != string(e.tenant.ID),
			q.User != "" && q.User != string(e.user.ID) && q.User != e.user.Email,
			q.Key != "" && q.Key != e.key.ID, q.Model != "" && q.Model != e.model,
			!q.Since.IsZero() && e.at.Before(q.Since), !q.Until.IsZero() && !e.at.Before(q.Until):
			continue
		}
		var at []string
		var row books.UsageRow
		for _, by := range q.By {
			switch by {
			case "tenant":
				row.Tenant, row.TenantSlug = e.tenant.ID, e.tenant.Slug
				at = append(at, string(e.tenant.ID))
			case "user":
				row.User, row.Email = e.user.ID, e.user.Email
				at = append(at, string(e.user.ID))
			case "key":
				row.Key, row.KeyName, row.KeyPrefix = e.key.ID, e.key.Name, e.key.Prefix
				at = append(at, string(e.key.ID))
			case "model":
				row.Model = e.model
				at = append(at, e.model)
			case "day":
				row.Day = e.at.UTC().Format("2006-01-02")
				at = append(at, row.Day)
			}
		}
		group := strings.Join(at, "\x00")
		if rows[group] == nil {
			rows[group] = &row
		}
		r := rows[group]
		r.Requests, r.PromptTokens, r.CompletionTokens, r.CostMicroCents = r.Requests+1, r.PromptTokens+e.prompt, r.CompletionTokens+e.completion, r.CostMicroCents+e.cost
	}
	var out []books.UsageRow
	for _, group := range slices.Sorted(maps.Keys(rows)) {
		out = append(out, *rows[group])
	}
	return out
}

// pages reads all of a usage.
func pages(t *testing.T, s *books.Store, q books.UsageQuery) (all []books.UsageRow) {
	t.Helper()
	for {
		list, next, err := s.Usage(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		if q.Page.Limit > 0 && len(list) > q.Page.Limit || len(list) == 0 && q.Page.After != "" {
			t.Fatalf("a page of %d, where %d were wanted", len(list), q.Page.Limit)
		}
		if all = append(all, list...); next == "" {
			return all
		}
		if next == q.Page.After {
			t.Fatal("the same page again")
		}
		q.Page.After = next
	}
}

// Whatever is asked for, the answer is the sum over the ledger, however long a page is
// and whatever zone the database's sessions are in.
func TestUsageIsTheLedger(t *testing.T) {
	address := pgtest.New(t)
	zoned := address + map[bool]string{true: "&", false: "?"}[strings.Contains(address, "?")] + "timezone=Pacific/Kiritimati"
	s := openAt(t, books.Config{URL: zoned})
	random := rand.New(rand.NewPCG(1, 2))
	var keys []entry
	for _, slug := range []string{"acme", "bolt", "idle"} {
		tenant, err := s.CreateTenant(t.Context(), books.NewTenant{Slug: slug})
		if err != nil {
			t.Fatal(err)
		}
		for _, email := range []string{"ada@" + slug, "bob@" + slug} {
			user, err := s.CreateUser(t.Context(), books.NewUser{Tenant: slug, Email: email})
			if err != nil {
				t.Fatal(err)
			}
			for i := range 2 {
				k, _, err := s.CreateKey(t.Context(), books.NewKey{Tenant: slug, User: email, Name: fmt.Sprint("key ", i)})
				if err == nil && i == 1 {
					k, _, err = s.RotateKey(t.Context(), k.ID, books.Rotation{Overlap: time.Hour}) // a second secret counts nothing twice
				}
				if err != nil {
					t.Fatal(err)
				}
				keys = append(keys, entry{tenant: tenant, user: user, key: k})
			}
		}
	}
	models := []string{"a", "B", "b", "é", "z/ß:1", "a' OR 'x'='x"}
	midnight := time.Date(2041, 3, 1, 0, 0, 0, 0, time.UTC)
	offsets := []time.Duration{-48 * time.Hour, -time.Microsecond, 0, time.Microsecond, 10 * time.Hour, 14 * time.Hour, 24*time.Hour - time.Microsecond, 24 * time.Hour, 31 * 24 * time.Hour}
	var ledger []entry
	for range 400 {
		e := keys[random.IntN(8)] // the third tenant uses nothing
		e.model, e.at = models[random.IntN(len(models))], midnight.Add(offsets[random.IntN(len(offsets))])
		e.prompt, e.completion, e.cost = random.Int64N(1000), random.Int64N(5000), random.Int64N(2e15)
		ledger = append(ledger, e)
		outcome := []string{"done", "error", "cancelled", "orphaned", "expired"}[random.IntN(5)]
		if err := s.Exec(t.Context(), `
			INSERT INTO ledger (request_id, tenant_id, user_id, key_id, model, month, prompt_tokens, completion_tokens, cost, outcome, at)
			VALUES ($1, $2, $3, $4, $5, '2041-01-01', $6, $7, $8, $9, $10)`,
			schemas.NewRequestID(), e.tenant.ID, e.user.ID, e.key.ID, e.model, e.prompt, e.completion, e.cost, outcome, e.at); err != nil {
			t.Fatal(err)
		}
	}
	pick := func(list ...string) string { return list[random.IntN(len(list))] }
	rows := 0
	for range 300 {
		var q books.UsageQuery
		for _, i := range random.Perm(len(usageNames))[:random.IntN(len(usageNames)+1)] {
			q.By = append(q.By, usageNames[i])
		}
		e := keys[random.IntN(len(keys))]
		q.Tenant = pick("", "", e.tenant.Slug, string(e.tenant.ID))
		if q.Tenant != "" {
			q.User = pick("", "", string(e.user.ID), e.user.Email)
		} else {
			q.User = pick("", "", string(e.user.ID))
		}
		q.Key = schemas.KeyID(pick("", "", "", string(e.key.ID)))
		q.Model = pick("", "", "", append(models, "unknown")[random.IntN(len(models)+1)])
		if random.IntN(2) == 0 {
			q.Since = midnight.Add(offsets[random.IntN(len(offsets))]).In(time.FixedZone("", 5*3600))
		}
		if random.IntN(2) == 0 {
			q.Until = midnight.Add(offsets[random.IntN(len(offsets))])
			if q.Until.Before(q.Since) {
				q.Until = q.Since
			}
		}
		q.Page.Limit = []int{0, 1, 2, 7, 1000}[random.IntN(5)]
		got := pages(t, s, q)
		if diff := cmp.Diff(sum(ledger, q), got); diff != "" {
			t.Fatalf("%+v (-want +got):\n%s", q, diff)
		}
		rows += len(got)
	}
	if rows < 3000 {
		t.Errorf("only %d rows in all", rows)
	}
}

// What requests were charged is what Usage tells, under the day on which they ended.
func TestUsageOfRequests(t *testing.T) {
	c := newClient(t, open(t), limits{concurrency: 10, qps: 100})
	now := time.Date(2041, 1, 31, 23, 59, 30, 0, time.UTC)
	c.s.SetClock(func() time.Time { return now })
	c.lease, _ = c.s.RenewLease(t.Context(), c.lease.Owner, time.Hour)
	done, void, over, late := c.ask(100, 100), c.ask(100, 100), c.ask(100, 100), c.ask(70, 100)
	late.Timeout = time.Minute
	c.admit(done, void, over, late)
	c.settle(done, 80, 20, books.OutcomeDone)
	c.settle(done, 80, 90, books.OutcomeDone) // again: it doesn't count
	c.settle(void, 80, 20, books.OutcomeVoid)
	now = now.Add(30 * time.Second)
	c.settle(over, 100, 300, books.OutcomeError) // more than it held
	now = now.Add(time.Hour)
	_, err := c.s.Sweep(t.Context())
	c.must(err)
	want := []books.UsageRow{
		{Day: "2041-01-31", Requests: 1, PromptTokens: 80, CompletionTokens: 20, CostMicroCents: 100 * perToken},
		{Day: "2041-02-01", Requests: 2, PromptTokens: 170, CompletionTokens: 300, CostMicroCents: 270 * perToken},
	}
	if diff := cmp.Diff(want, pages(t, c.s, books.UsageQuery{Key: c.key.ID, By: []string{"day"}})); diff != "" {
		t.Error(diff)
	}
	// The month that is charged is that of the admission, and the whole of it that of the ledger.
	spent, err := books.Query[int64](t.Context(), c.s, `SELECT spent FROM budgets WHERE key_id = $1 AND month = '2041-01-01'`, c.key.ID)
	if total := pages(t, c.s, books.UsageQuery{Tenant: c.tenant.Slug}); err != nil || len(total) != 1 || total[0].CostMicroCents != spent {
		t.Errorf("total %+v, spent %d, %v", total, spent, err)
	}
}

func TestUsageOfNothing(t *testing.T) {
	s := open(t)
	household(t, s, "acme")
	if got := pages(t, s, books.UsageQuery{Tenant: "acme"}); len(got) != 1 || got[0] != (books.UsageRow{}) {
		t.Errorf("%+v", got)
	}
	if got := pages(t, s, books.UsageQuery{Tenant: "acme", By: []string{"model"}}); len(got) != 0 {
		t.Errorf("%+v", got)
	}
}

// Sums that no bigint holds are the largest that one does, and no error.
func TestUsageOverflows(t *testing.T) {
	c := newClient(t, open(t), limits{concurrency: 1, qps: 1})
	for range 3 {
		c.must(c.s.Exec(t.Context(), `
			INSERT INTO ledger (request_id, tenant_id, user_id, key_id, model, month, prompt_tokens, completion_tokens, cost, outcome, at)
			VALUES ($1, $2, $3, $4, 'm', '2041-01-01', 1, 2, 4000000000000000000, 'done', now())`,
			schemas.NewRequestID(), c.tenant.ID, c.user.ID, c.key.ID))
	}
	want := []books.UsageRow{{Requests: 3, PromptTokens: 3, CompletionTokens: 6, CostMicroCents: 1<<63 - 1}}
	if diff := cmp.Diff(want, pages(t, c.s, books.UsageQuery{})); diff != "" {
		t.Error(diff)
	}
}

func TestPricePages(t *testing.T) {
	s := open(t)
	household(t, s, "acme")
	household(t, s, "other")
	models := []string{"B", "a", "b", "c'd", "é", "z"}
	for i, model := range models {
		for j, tenant := range []string{"", "acme", "other"} {
			if (i+j)%3 == 2 && j < 2 {
				continue // it has none of its own, or there is only its own
			}
			if _, err := s.SetPrice(t.Context(), tenant, model, int64(10*i+j)); err != nil {
				t.Fatal(err)
			}
		}
	}
	all := func(tenant string, limit int) (list []books.Price) {
		t.Helper()
		page := books.Page{Limit: limit}
		for {
			part, next, err := s.ListPrices(t.Context(), tenant, page)
			if err != nil || limit > 0 && len(part) > limit || len(part) == 0 {
				t.Fatalf("%d prices, %v", len(part), err)
			}
			if list = append(list, part...); next == "" {
				return list
			}
			page.After = next
		}
	}
	for _, tenant := range []string{"", "acme", "other"} {
		whole := all(tenant, 0)
		for _, limit := range []int{1, 2, 3, len(whole), 1000} {
			if diff := cmp.Diff(whole, all(tenant, limit)); diff != "" {
				t.Errorf("%q by %d: %s", tenant, limit, diff)
			}
		}
	}
	var got string
	for _, p := range all("acme", 2) {
		got += fmt.Sprint(p.Model, p.MicroCents, " ")
	}
	if want := "B1 a10 b21 c'd31 z51 é40 "; got != want {
		t.Errorf("prices of acme %s, want %s", got, want)
	}
}
