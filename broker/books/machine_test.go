package books_test

import (
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/schemas"
)

// modelHouse is the model and the books, side by side.
type modelHouse struct {
	*model
	t *rapid.T
	s *books.Store
	// tb is for what outlives one run of the model.
	tb testing.TB
}

func TestModel(t *testing.T) {
	s := open(t)
	rapid.Check(t, func(rt *rapid.T) {
		h := &modelHouse{t: rt, s: s, tb: t, model: &model{
			now: time.Date(2041, 1, 31, 23, 58, 0, 0, time.UTC), prices: map[string]int64{}, reqs: map[schemas.RequestID]*modelRequest{},
		}}
		s.SetClock(func() time.Time { return h.now })
		h.found()
		rt.Repeat(map[string]func(*rapid.T){
			"admit":   h.doAdmit,
			"again":   h.doAgain,
			"alter":   h.doAlter,
			"settle":  h.doSettle,
			"both":    h.doBoth,
			"time":    h.doTime,
			"limits":  h.doLimits,
			"tight":   h.doTight,
			"away":    h.doAway,
			"renew":   h.doRenew,
			"sweep":   h.doSweep,
			"orphan":  h.doOrphan,
			"expire":  h.doExpire,
			"":        h.check,
			"settle2": h.doSettle, // more often, so that slots come free
		})
		h.now = h.now.Add(365 * 24 * time.Hour)
		h.doSweep(rt) // leave nothing to the next run
		h.check(rt)
	})
}

func (h *modelHouse) must(err error) {
	h.tb.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

// found makes two tenants with three keys, and two owners.
func (h *modelHouse) found() {
	ctx := h.tb.Context()
	for range 2 {
		qps := rapid.SampledFrom([]int{1, 3, 7, 1000, 1000}).Draw(h.t, "qps")
		t, err := h.s.CreateTenant(ctx, books.NewTenant{Slug: slug(), QPS: &qps})
		h.must(err)
		u, err := h.s.CreateUser(ctx, books.NewUser{Tenant: string(t.ID), Email: "a@b"})
		h.must(err)
		h.tenants = append(h.tenants, &modelTenant{id: t.ID, user: u.ID, qps: qps})
	}
	for i := range 3 {
		slots := rapid.IntRange(1, 4).Draw(h.t, "slots")
		n := books.NewKey{Tenant: string(h.tenants[i%2].id), User: "a@b", Concurrency: &slots, BudgetCents: cents(h.t)}
		k, _, err := h.s.CreateKey(ctx, n)
		h.must(err)
		h.keys = append(h.keys, &modelKey{id: k.ID, tenant: h.tenants[i%2], cents: n.BudgetCents, slots: slots, spent: map[time.Time]int64{}})
	}
	for range 2 {
		o := &modelOwner{id: schemas.NewOwnerID()}
		h.owners = append(h.owners, o)
		h.renew(o)
	}
	h.setPrice("", "a", 1_000_000)
	h.setPrice(h.tenants[0].id, "a", 777)
	h.setPrice("", "dear", books.MaxPrice)
}

func cents(t *rapid.T) *int64 {
	c := rapid.SampledFrom([]int64{-1, 0, 1, 2, 2, 3, 5, 1_000_000_000_000}).Draw(t, "cents")
	if c < 0 {
		return nil
	}
	return &c
}

func (h *modelHouse) setPrice(tenant schemas.TenantID, name string, price int64) {
	_, err := h.s.SetPrice(h.tb.Context(), string(tenant), name, price)
	h.must(err)
	h.prices[string(tenant)+"/"+name] = price
}

func (h *modelHouse) renew(o *modelOwner) {
	lease, err := h.s.RenewLease(h.tb.Context(), o.id, modelLease)
	h.must(err)
	if lease.Epoch < o.epoch || (lease.Epoch == o.epoch) != o.held {
		h.t.Fatalf("epoch %d after %d, which was held: %t", lease.Epoch, o.epoch, o.held)
	}
	*o = modelOwner{id: o.id, epoch: lease.Epoch, held: true, expires: h.now.Add(modelLease)}
}

func (h *modelHouse) drawTokens(t *rapid.T, name string) int64 {
	return rapid.SampledFrom([]int64{0, 0, 1, 10, 100, 100, 300, 300, 999, 1000, 2500, books.MaxTokens}).Draw(t, name)
}

func (h *modelHouse) drawAsks(t *rapid.T) (asks []books.Ask) {
	for range rapid.IntRange(1, 4).Draw(t, "asks") {
		k := rapid.SampledFrom(h.keys).Draw(t, "key")
		a := books.Ask{
			Request: schemas.NewRequestID(), Tenant: k.tenant.id, Key: k.id,
			Model:  rapid.SampledFrom([]string{"a", "a", "a", "a", "free", "dear"}).Draw(t, "model"),
			Prompt: h.drawTokens(t, "prompt"), Limit: h.drawTokens(t, "limit"), Timeout: rapid.SampledFrom([]time.Duration{3 * time.Second, 100 * time.Second, 10 * time.Minute}).Draw(t, "timeout"),
			Agent: rapid.SampledFrom([]schemas.AgentID{"", "agt_1", "agt_2"}).Draw(t, "agent"),
		}
		if price := h.price(a.Tenant, a.Model); price > 0 && k.cents != nil {
			// Often just what is free, or what would be if all that is held came back.
			room := map[string]int64{"free": h.left(k), "unspent": h.left(k) + h.reserved(k, h.month())}
			if fit := rapid.SampledFrom([]string{"", "free", "unspent"}).Draw(t, "fit"); fit != "" {
				limit := tokensFor(room[fit], price) - a.Prompt + int64(rapid.IntRange(-1, 1).Draw(t, "more"))
				a.Limit = min(books.MaxTokens, max(0, limit))
			}
		}
		asks = append(asks, a)
	}
	return asks
}

// turn takes a turn in both worlds and compares the answers.
func (h *modelHouse) turn(turn books.Turn, o *modelOwner) {
	left, flying := map[*modelKey]int64{}, map[*modelKey]int{}
	for _, k := range h.keys {
		left[k], flying[k] = h.left(k), h.flying(k)
	}
	out, err := h.s.Turn(h.tb.Context(), turn)
	h.must(err)
	for i, x := range turn.Settle {
		if want := h.settle(x.Request, x.Key, x.Prompt, x.Completion, string(x.Outcome)); out.Settled[i] != want {
			h.t.Fatalf("settled %+v: it was %s, want %s", x, out.Settled[i], want)
		}
	}
	for i, x := range turn.Alter {
		if diff := cmp.Diff(h.alter(x), out.Altered[i]); diff != "" {
			h.t.Fatalf("altered %+v: %s", x, diff)
		}
	}
	for i, x := range turn.Admit {
		reason, limit := h.admit(x, o, turn.Lease.Epoch)
		got := out.Admit[i]
		if got.Reason != reason || reason == "" && got.Limit != limit {
			h.t.Fatalf("admit %+v: %+v, want %q, limit %d", x, got, reason, limit)
		}
	}
	for _, k := range h.keys {
		// The promise itself, whatever the model says: nobody gets past a limit, and who
		// is past it because it was lowered gets no further.
		if now := h.left(k); now < min(0, left[k]) {
			h.t.Fatalf("key %s is over its cap by %d, and was by %d", k.id, -now, -left[k])
		}
		if now := h.flying(k); now > max(k.slots, flying[k]) {
			h.t.Fatalf("key %s has %d requests in flight of %d, and had %d", k.id, now, k.slots, flying[k])
		}
	}
}

func (h *modelHouse) doAdmit(t *rapid.T) {
	o := rapid.SampledFrom(h.owners).Draw(t, "owner")
	h.turn(books.Turn{Admit: h.drawAsks(t), Lease: books.Lease{Owner: o.id, Epoch: o.epoch}}, o)
}

func (h *modelHouse) drawRequest(t *rapid.T) *modelRequest {
	if len(h.order) == 0 {
		t.Skip("no request")
	}
	// Mostly a recent one.
	n := min(len(h.order), 8)
	return h.reqs[h.order[len(h.order)-1-rapid.IntRange(0, n-1).Draw(t, "request")]]
}

func (h *modelHouse) doAgain(t *rapid.T) {
	r := h.drawRequest(t)
	h.turn(books.Turn{Admit: []books.Ask{r.ask, r.ask}, Lease: books.Lease{Owner: r.owner.id, Epoch: r.epoch}}, r.owner)
}

func (h *modelHouse) drawAlter(t *rapid.T) books.Alter {
	r := h.drawRequest(t)
	a := books.Alter{Request: r.ask.Request, Key: r.ask.Key, Limit: h.drawTokens(t, "limit"), Agent: rapid.SampledFrom([]schemas.AgentID{"", "agt_1"}).Draw(t, "agent")}
	if rapid.Bool().Draw(t, "exact") {
		a.Prompt = new(h.drawTokens(t, "prompt"))
	}
	return a
}

func (h *modelHouse) doAlter(t *rapid.T) {
	h.turn(books.Turn{Alter: []books.Alter{h.drawAlter(t), h.drawAlter(t)}}, nil)
}

func (h *modelHouse) drawSettlement(t *rapid.T) books.Settlement {
	x := books.Settlement{
		Completion: h.drawTokens(t, "completion"),
		Outcome:    rapid.SampledFrom([]books.Outcome{books.OutcomeDone, books.OutcomeDone, books.OutcomeError, books.OutcomeCancelled, books.OutcomeVoid}).Draw(t, "outcome"),
	}
	if rapid.IntRange(0, 9).Draw(t, "unknown") == 0 {
		x.Request, x.Key = schemas.NewRequestID(), h.keys[0].id
	} else {
		r := h.drawRequest(t)
		x.Request, x.Key = r.ask.Request, r.ask.Key
	}
	if rapid.Bool().Draw(t, "exact") {
		x.Prompt = new(h.drawTokens(t, "prompt"))
	}
	return x
}

func (h *modelHouse) doSettle(t *rapid.T) {
	h.turn(books.Turn{Settle: []books.Settlement{h.drawSettlement(t), h.drawSettlement(t)}}, nil)
}

func (h *modelHouse) doBoth(t *rapid.T) {
	o := rapid.SampledFrom(h.owners).Draw(t, "owner")
	h.turn(books.Turn{
		Settle: []books.Settlement{h.drawSettlement(t)}, Alter: []books.Alter{h.drawAlter(t)},
		Admit: h.drawAsks(t), Lease: books.Lease{Owner: o.id, Epoch: o.epoch},
	}, o)
}

func (h *modelHouse) doTime(t *rapid.T) {
	d := rapid.SampledFrom([]time.Duration{
		time.Millisecond, 333 * time.Millisecond, 333 * time.Millisecond, time.Second, time.Second, time.Second, 5 * time.Second, 10 * time.Second, time.Minute, 2 * time.Minute, 40 * 24 * time.Hour,
	}).Draw(t, "pass")
	h.now = h.now.Add(d)
}

func (h *modelHouse) doLimits(t *rapid.T) {
	ctx := h.tb.Context()
	switch rapid.IntRange(0, 3).Draw(t, "what") {
	case 0:
		h.setKey(rapid.SampledFrom(h.keys).Draw(t, "key"), func(k *modelKey) { k.cents = cents(t) })
	case 1:
		h.setKey(rapid.SampledFrom(h.keys).Draw(t, "key"), func(k *modelKey) { k.slots = rapid.IntRange(1, 4).Draw(t, "slots") })
	case 2:
		x := rapid.SampledFrom(h.tenants).Draw(t, "tenant")
		x.qps = rapid.SampledFrom([]int{1, 3, 7, 1000}).Draw(t, "qps")
		_, err := h.s.SetTenant(ctx, string(x.id), books.TenantChange{QPS: &x.qps})
		h.must(err)
	case 3:
		tenant := rapid.SampledFrom([]schemas.TenantID{"", h.tenants[0].id, h.tenants[1].id}).Draw(t, "tenant")
		h.setPrice(tenant, "a", rapid.SampledFrom([]int64{0, 1, 777, 1_000_000, 3_333_333}).Draw(t, "price"))
	}
}

// setKey sets the limits of a key to what change makes of them.
func (h *modelHouse) setKey(k *modelKey, change func(*modelKey)) {
	change(k)
	got, err := h.s.SetKey(h.tb.Context(), k.id, books.KeyChange{BudgetCents: k.cents, NoBudget: k.cents == nil, Concurrency: &k.slots})
	h.must(err)
	if diff := cmp.Diff(k.cents, got.BudgetCents); diff != "" || got.Concurrency != k.slots {
		h.t.Fatalf("set %s to %d slots: %+v", k.id, k.slots, got)
	}
}

// doTight changes the limits of a key that is in use to just about what it has in flight,
// so that they are lowered below that, met, and raised by a little.
func (h *modelHouse) doTight(t *rapid.T) {
	k := h.drawRequest(t).key
	used := k.cap() - h.left(k)
	h.setKey(k, func(k *modelKey) {
		k.cents = new(max(0, used/books.MicroCents+int64(rapid.IntRange(-2, 2).Draw(t, "cents more"))))
		k.slots = max(1, h.flying(k)+rapid.IntRange(-1, 1).Draw(t, "slots more"))
	})
}

// doAway suspends or resumes a tenant, or deactivates or activates its user, or, rarely,
// revokes a key: that lets nothing in, and takes nothing from what is in flight.
func (h *modelHouse) doAway(t *rapid.T) {
	ctx := h.tb.Context()
	if rapid.IntRange(0, 99).Draw(t, "revoke") == 57 { // small numbers are drawn more often
		k := rapid.SampledFrom(h.keys).Draw(t, "key")
		_, err := h.s.RevokeKey(ctx, k.id)
		h.must(err)
		k.revoked = true
		return
	}
	x := rapid.SampledFrom(h.tenants).Draw(t, "tenant")
	x.away = rapid.SampledFrom([]books.Reason{"", "", "", "", books.ReasonTenantDisabled, books.ReasonUserDeactivated}).Draw(t, "away")
	tenant, user := books.TenantActive, books.UserActive
	switch x.away {
	case books.ReasonTenantDisabled:
		tenant = books.TenantSuspended
	case books.ReasonUserDeactivated:
		user = books.UserDeactivated
	default:
	}
	_, err := h.s.SetTenantState(ctx, string(x.id), tenant)
	h.must(err)
	_, err = h.s.SetUserState(ctx, x.user, user)
	h.must(err)
}

func (h *modelHouse) doRenew(t *rapid.T) { h.renew(rapid.SampledFrom(h.owners).Draw(t, "owner")) }

func (h *modelHouse) doSweep(*rapid.T) {
	_, err := h.s.Sweep(h.tb.Context())
	h.must(err)
	h.sweep()
	for id := range h.reqs { // those that are forgotten stay in the model
		if n, err := books.Query[int](h.tb.Context(), h.s, `SELECT count(*) FROM reservations WHERE id = $1`, id); err == nil && n == 0 {
			h.forget(id)
		}
	}
}

// forget takes a request that ended out of the choice of later steps.
func (h *modelHouse) forget(id schemas.RequestID) {
	if h.reqs[id].state == books.StateOpen {
		h.t.Fatalf("request %s is open, and was forgotten", id)
	}
	h.order = slices.DeleteFunc(h.order, func(x schemas.RequestID) bool { return x == id })
}

func (h *modelHouse) doOrphan(t *rapid.T) {
	r := h.drawRequest(t)
	agent := rapid.SampledFrom([]schemas.AgentID{"agt_1", "agt_2"}).Draw(t, "agent")
	want := books.OrphanSettled
	switch {
	case r.state != books.StateOpen:
		want = books.OrphanEnded
	case r.agent != agent:
		want = books.OrphanForeign
	case !r.orphaned():
		want = books.OrphanOwned
	}
	got, err := h.s.SettleOrphan(h.tb.Context(), r.key.tenant.id, agent, &schemas.UsageReport{Request: r.ask.Request, Usage: schemas.Usage{PromptTokens: 5, CompletionTokens: 50}})
	h.must(err)
	if got != want {
		t.Fatalf("orphan %+v: %s, want %s", r, got, want)
	}
	if want == books.OrphanSettled {
		h.settle(r.ask.Request, r.ask.Key, new(int64(5)), 50, "orphaned")
	}
}

func (h *modelHouse) doExpire(t *rapid.T) {
	orphans, err := h.s.Orphans(h.tb.Context())
	h.must(err)
	got := map[schemas.RequestID]schemas.AgentID{}
	for _, o := range orphans {
		got[o.Request] = o.Agent
	}
	want, ids := map[schemas.RequestID]schemas.AgentID{}, []schemas.RequestID{}
	for _, id := range slices.Sorted(maps.Keys(h.reqs)) {
		r := h.reqs[id]
		orphaned := r.state == books.StateOpen && r.orphaned()
		if orphaned {
			want[id] = r.agent
		}
		if rapid.Bool().Draw(t, "expire") {
			ids = append(ids, id)
			if orphaned {
				h.settle(id, r.ask.Key, nil, 0, "expired")
			}
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("orphans (-model +books):\n%s", diff)
	}
	_, err = h.s.ExpireOrphans(h.tb.Context(), ids)
	h.must(err)
}

// check compares all that is kept, month by month and request by request.
func (h *modelHouse) check(*rapid.T) {
	ctx := h.tb.Context()
	for _, k := range h.keys {
		want := map[string]string{"in flight": fmt.Sprint(h.flying(k))}
		months := maps.Clone(k.spent)
		for _, r := range h.reqs {
			if r.key == k && r.state == books.StateOpen {
				months[r.month] += 0
			}
		}
		for month := range months {
			if spent, held := k.spent[month], h.reserved(k, month); spent != 0 || held != 0 {
				want[month.Format("2006-01")] = fmt.Sprintf("%d+%d", spent, held)
			}
		}
		for _, r := range h.reqs {
			if r.key == k && r.outcome != "" {
				want[string(r.ask.Request)] = fmt.Sprintf("%s %d %s", r.outcome, r.cost, r.month.Format("2006-01"))
			}
		}
		got, err := books.Query[map[string]string](ctx, h.s, `
			SELECT coalesce(json_object_agg(name, value), '{}') FROM (
				SELECT 'in flight' AS name, coalesce((SELECT in_flight FROM key_accounts WHERE key_id = $1), 0)::text AS value
				UNION ALL SELECT to_char(month, 'YYYY-MM'), format('%s+%s', spent, reserved) FROM budgets
					WHERE key_id = $1 AND (spent <> 0 OR reserved <> 0)
				UNION ALL SELECT request_id, format('%s %s %s', outcome, cost, to_char(month, 'YYYY-MM')) FROM ledger WHERE key_id = $1
			) AS x`, k.id)
		h.must(err)
		if diff := cmp.Diff(want, got); diff != "" {
			h.t.Fatalf("key %s (-model +books):\n%s", k.id, diff)
		}
	}
}
