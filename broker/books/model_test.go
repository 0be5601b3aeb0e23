package books_test

import (
	"fmt"
	"maps"
	"math/big"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/schemas"
)

// The model is what the books promise, in memory: it keeps requests, and derives all
// sums from them.
type model struct {
	now     time.Time
	tenants []*modelTenant
	keys    []*modelKey
	prices  map[string]int64 // by tenant (may be empty) and model
	owners  []*modelOwner
	reqs    map[schemas.RequestID]*modelRequest
	order   []schemas.RequestID
}

type modelTenant struct {
	id     schemas.TenantID
	qps    int
	drawn  time.Duration // what is drawn from the bucket, in time that it takes to refill
	drawnN time.Time     // and when that was so
}

type modelKey struct {
	id     schemas.KeyID
	tenant *modelTenant
	cents  *int64
	slots  int
	spent  map[time.Time]int64
	// lowered says that the cap was lowered, so that less than nothing may be left.
	lowered bool
}

type modelOwner struct {
	id      schemas.OwnerID
	epoch   int64
	held    bool
	expires time.Time
}

type modelRequest struct {
	ask      books.Ask
	key      *modelKey
	owner    *modelOwner
	epoch    int64
	agent    schemas.AgentID
	month    time.Time
	price    int64
	prompt   int64
	limit    int64
	amount   int64
	state    books.State
	inFlight bool
	deadline time.Time
	cost     int64
	outcome  string // in the ledger; empty: no row
}

func (r *modelRequest) orphaned() bool { return r.epoch != r.owner.epoch || !r.owner.held }

const modelLease = 10 * time.Second

func cost(tokens, price int64) int64 {
	c := new(big.Int).Mul(big.NewInt(tokens), big.NewInt(price))
	c.Add(c, big.NewInt(999)).Div(c, big.NewInt(1000))
	return c.Int64()
}

func tokensFor(amount, price int64) int64 {
	c := new(big.Int).Mul(big.NewInt(max(amount, 0)), big.NewInt(1000))
	c.Div(c, big.NewInt(price))
	if !c.IsInt64() || c.Int64() > books.MaxTokens {
		return books.MaxTokens
	}
	return c.Int64()
}

func (m *model) month() time.Time {
	return time.Date(m.now.Year(), m.now.Month(), 1, 0, 0, 0, 0, time.UTC)
}

func (k *modelKey) cap() int64 {
	if k.cents == nil {
		return 4_000_000_000_000_000_000
	}
	return *k.cents * books.MicroCents
}

func (m *model) flying(k *modelKey) (n int) {
	for _, r := range m.reqs {
		if r.key == k && r.inFlight {
			n++
		}
	}
	return n
}

func (m *model) reserved(k *modelKey, month time.Time) (n int64) {
	for _, r := range m.reqs {
		if r.key == k && r.state == books.StateOpen && r.month.Equal(month) {
			n += r.amount
		}
	}
	return n
}

func (m *model) price(tenant schemas.TenantID, name string) int64 {
	if p, ok := m.prices[string(tenant)+"/"+name]; ok {
		return p
	}
	return m.prices["/"+name]
}

// refill lets time pass for the bucket.
func (t *modelTenant) refill(now time.Time) {
	t.drawn = max(0, t.drawn-now.Sub(t.drawnN))
	t.drawnN = now
}

func (m *model) admit(a books.Ask, o *modelOwner, epoch int64) (reason books.Reason, limit int64) {
	k := m.keys[slices.IndexFunc(m.keys, func(k *modelKey) bool { return k.id == a.Key })]
	if r := m.reqs[a.Request]; r != nil {
		if r.state == books.StateOpen {
			return books.Admitted, r.limit
		}
		return books.ReasonEnded, 0
	}
	if !o.held || o.epoch != epoch {
		return books.ReasonLease, 0
	}
	price, month := m.price(a.Tenant, a.Model), m.month()
	limit = a.Limit
	if limit == 0 {
		limit = books.DefaultOpenTokens
	}
	need, least := cost(a.Prompt+limit, price), cost(a.Prompt+limit, price)
	if a.Limit == 0 {
		least = cost(a.Prompt+1, price)
	}
	unspent := k.cap() - k.spent[month]
	held := m.reserved(k, month)
	step := time.Second / time.Duration(k.tenant.qps)
	k.tenant.refill(m.now)
	switch {
	case need > 0 && least > unspent:
		return books.ReasonBudget, 0
	case k.tenant.drawn+step > time.Second:
		return books.ReasonTenantQPS, 0
	case m.flying(k) >= k.slots:
		return books.ReasonNoSlot, 0
	case need > 0 && need > unspent-held:
		if a.Limit != 0 || least > unspent-held || m.flying(k) > 0 && held > 0 {
			return books.ReasonMoneyHeld, 0
		}
		limit = tokensFor(unspent-held, price) - a.Prompt
		need = cost(a.Prompt+limit, price)
	}
	k.tenant.drawn += step
	m.reqs[a.Request] = &modelRequest{
		ask: a, key: k, owner: o, epoch: epoch, agent: a.Agent, month: month, price: price, prompt: a.Prompt, limit: limit, amount: need,
		state: books.StateOpen, inFlight: true, deadline: m.now.Add(a.Timeout),
	}
	m.order = append(m.order, a.Request)
	return books.Admitted, limit
}

func (m *model) settle(id schemas.RequestID, key schemas.KeyID, prompt *int64, completion int64, outcome string) books.State {
	r := m.reqs[id]
	if r == nil {
		if outcome == string(books.OutcomeVoid) {
			m.reqs[id] = &modelRequest{state: books.StateSettled}
		}
		return books.StateUnknown
	}
	before := r.state
	if before != books.StateOpen {
		return before
	}
	p := r.prompt
	if prompt != nil {
		p = *prompt
	}
	r.state, r.inFlight = books.StateSettled, false
	if outcome == "expired" {
		r.state = books.StateExpired
	}
	if outcome != string(books.OutcomeVoid) {
		r.cost, r.outcome = min(r.amount, cost(p+completion, r.price)), outcome
		r.key.spent[r.month] += r.cost
	}
	return before
}

func (m *model) alter(a books.Alter) books.Altered {
	r := m.reqs[a.Request]
	if r == nil {
		return books.Altered{State: books.StateUnknown}
	}
	if r.state != books.StateOpen {
		return books.Altered{State: r.state}
	}
	prompt, limit := r.prompt, max(a.Limit, r.limit)
	if a.Prompt != nil {
		prompt = *a.Prompt
	}
	if a.Agent != "" {
		r.agent = a.Agent
	}
	held := m.reserved(r.key, r.month)
	need := cost(prompt+limit, r.price)
	available := max(0, r.key.cap()-r.key.spent[r.month]-held) + r.amount
	if r.price > 0 && need > available {
		limit = max(0, tokensFor(available, r.price)-prompt)
		need = min(cost(prompt+limit, r.price), available)
	}
	others := int64(0)
	if r.price > 0 {
		others = held - r.amount
	}
	r.prompt, r.limit, r.amount = prompt, limit, need
	return books.Altered{State: books.StateOpen, Limit: limit, Amount: need, Others: others}
}

func (m *model) sweep() {
	for _, o := range m.owners {
		if o.held && !o.expires.After(m.now) {
			o.held = false
		}
	}
	for id, r := range m.reqs {
		if r.state != books.StateOpen {
			continue
		}
		if r.orphaned() {
			r.inFlight = false
		}
		if !r.deadline.Add(books.ExpireGrace).After(m.now) {
			m.settle(id, r.key.id, nil, 0, "expired")
		}
	}
}

// house is the model and the books, side by side.
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
		qps := rapid.SampledFrom([]int{1, 3, 7, 1000}).Draw(h.t, "qps")
		t, err := h.s.CreateTenant(ctx, books.NewTenant{Slug: slug(), QPS: &qps})
		h.must(err)
		h.tenants = append(h.tenants, &modelTenant{id: t.ID, qps: qps})
		_, err = h.s.CreateUser(ctx, books.NewUser{Tenant: string(t.ID), Email: "a@b"})
		h.must(err)
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
	c := rapid.SampledFrom([]int64{-1, 0, 1, 2, 5, 1_000_000_000_000}).Draw(t, "cents")
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
	return rapid.SampledFrom([]int64{0, 1, 10, 300, 999, 1000, 2500, books.MaxTokens}).Draw(t, name)
}

func (h *modelHouse) drawAsks(t *rapid.T) (asks []books.Ask) {
	for range rapid.IntRange(1, 4).Draw(t, "asks") {
		k := rapid.SampledFrom(h.keys).Draw(t, "key")
		asks = append(asks, books.Ask{
			Request: schemas.NewRequestID(), Tenant: k.tenant.id, Key: k.id,
			Model:  rapid.SampledFrom([]string{"a", "a", "a", "free", "dear"}).Draw(t, "model"),
			Prompt: h.drawTokens(t, "prompt"), Limit: h.drawTokens(t, "limit"), Timeout: time.Duration(rapid.IntRange(1, 100).Draw(t, "timeout")) * time.Second,
			Agent: rapid.SampledFrom([]schemas.AgentID{"", "agt_1", "agt_2"}).Draw(t, "agent"),
		})
	}
	return asks
}

// turn takes a turn in both worlds and compares the answers.
func (h *modelHouse) turn(turn books.Turn, o *modelOwner) {
	before := map[*modelKey]int64{}
	for _, k := range h.keys {
		before[k] = h.reserved(k, h.month())
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
		// The promise itself, whatever the model says.
		held := h.reserved(k, h.month())
		if left := k.cap() - k.spent[h.month()] - held; left < 0 && !k.lowered {
			h.t.Fatalf("key %s is over its cap by %d", k.id, -left)
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
		time.Millisecond, 333 * time.Millisecond, time.Second, 5 * time.Second, 10 * time.Second, time.Minute, 2 * time.Minute, 40 * 24 * time.Hour,
	}).Draw(t, "pass")
	h.now = h.now.Add(d)
}

func (h *modelHouse) doLimits(t *rapid.T) {
	ctx := h.tb.Context()
	switch rapid.IntRange(0, 3).Draw(t, "what") {
	case 0:
		k := rapid.SampledFrom(h.keys).Draw(t, "key")
		before := k.cap()
		k.cents = cents(t)
		k.lowered = k.lowered || k.cap() < before
		h.must(h.s.Exec(ctx, `UPDATE api_keys SET budget_cents = $2 WHERE id = $1`, k.id, k.cents))
	case 1:
		k := rapid.SampledFrom(h.keys).Draw(t, "key")
		k.slots = rapid.IntRange(1, 4).Draw(t, "slots")
		h.must(h.s.Exec(ctx, `UPDATE api_keys SET concurrency = $2 WHERE id = $1`, k.id, k.slots))
	case 2:
		x := rapid.SampledFrom(h.tenants).Draw(t, "tenant")
		x.qps = rapid.SampledFrom([]int{1, 3, 7, 1000}).Draw(t, "qps")
		h.must(h.s.Exec(ctx, `UPDATE tenants SET qps = $2 WHERE id = $1`, x.id, x.qps))
	case 3:
		tenant := rapid.SampledFrom([]schemas.TenantID{"", h.tenants[0].id, h.tenants[1].id}).Draw(t, "tenant")
		h.setPrice(tenant, "a", rapid.SampledFrom([]int64{0, 1, 777, 1_000_000, 3_333_333}).Draw(t, "price"))
	}
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
	got, err := h.s.SettleOrphan(h.tb.Context(), r.ask.Request, agent, schemas.Usage{PromptTokens: 5, CompletionTokens: 50})
	h.must(err)
	if got != want {
		t.Fatalf("orphan %+v: %s, want %s", r, got, want)
	}
	if want == books.OrphanSettled {
		h.settle(r.ask.Request, r.ask.Key, new(int64(5)), 50, "orphaned")
	}
}

func (h *modelHouse) doExpire(t *rapid.T) {
	_, err := h.s.ExpireOrphans(h.tb.Context(), "agt_1", 5*time.Second)
	h.must(err)
	for id, r := range h.reqs {
		if r.state == books.StateOpen && r.agent == "agt_1" && r.orphaned() && !r.deadline.Add(-r.ask.Timeout).Add(5*time.Second).After(h.now) {
			h.settle(id, r.ask.Key, nil, 0, "expired")
		}
	}
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
