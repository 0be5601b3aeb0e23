package books_test

import (
	"math/big"
	"slices"
	"time"

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
	user   schemas.UserID // who has all its keys
	away   books.Reason   // why no key of it is accepted; empty: they are
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

	revoked bool
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

// left is what of the month's cap is neither spent nor held. It is less than nothing only
// after the cap was lowered.
func (m *model) left(k *modelKey) int64 {
	return k.cap() - k.spent[m.month()] - m.reserved(k, m.month())
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
	switch {
	case k.revoked:
		return books.ReasonKeyInvalid, 0
	case k.tenant.away != "":
		return k.tenant.away, 0
	case !o.held || o.epoch != epoch:
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
