package books

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/ownllm/ownllm/schemas"
)

const (
	// MicroCents is how many micro-cents make one cent.
	MicroCents = 1_000_000
	// MaxTokens bounds every count of tokens. More is cut to this: no model takes as
	// much, and no sum of money can overflow.
	MaxTokens = 100_000_000
	// DefaultOpenTokens is how many tokens of output are reserved at first for a
	// request that states no limit.
	DefaultOpenTokens = 1024
	// maxAskTime bounds how far away a deadline may be.
	maxAskTime = 24 * time.Hour
)

// Lease is what an owner acts under.
type Lease struct {
	Owner schemas.OwnerID
	// Epoch rises when the lease lapses and is taken away. Who admitted something under
	// an earlier one doesn't own it any more.
	Epoch int64
}

// Ask asks for the admission of a request.
type Ask struct {
	// Request names the request. Asking again for the same one gives the same answer
	// once it is admitted, and takes nothing more.
	Request schemas.RequestID
	Tenant  schemas.TenantID
	Key     schemas.KeyID
	Model   string
	// Prompt is the most tokens that the prompt can have.
	Prompt int64
	// Limit is the most tokens that the reply can have; 0 stands for an open end.
	Limit int64
	// Most is how many tokens an open end can use in all. Beyond what it gets anyway it is
	// granted as much of that as there is money for, as by an Alter; 0 asks for no more.
	Most int64
	// Agent is whom the job goes to; it may be empty and may be changed.
	Agent schemas.AgentID
	// Timeout is when, counted from the admission, the request is over whatever happens.
	Timeout time.Duration
}

// Reason is why a request wasn't admitted.
type Reason string

const (
	// Admitted is no reason.
	Admitted Reason = ""

	// ReasonKeyInvalid and the next three say what has become of the key.
	ReasonKeyInvalid      Reason = "key_invalid"
	ReasonKeyExpired      Reason = "key_expired"
	ReasonTenantDisabled  Reason = "tenant_disabled"
	ReasonUserDeactivated Reason = "user_deactivated"

	// ReasonBudget says that what is left of the budget isn't enough, whoever else
	// gives something back.
	ReasonBudget Reason = "budget_exceeded"
	// ReasonTenantQPS says that the tenant's bucket is empty.
	ReasonTenantQPS Reason = "tenant_qps_limit"
	// ReasonNoSlot says that as many requests of the key are in flight as may be.
	ReasonNoSlot Reason = "no_slot"
	// ReasonMoneyHeld says that the money is there, but that others in flight hold it.
	ReasonMoneyHeld Reason = "money_held"

	// ReasonEnded says that a request of this name was admitted before, and has ended.
	ReasonEnded Reason = "ended"
	// ReasonLease says that the owner's lease is another by now, or none.
	ReasonLease Reason = "lease_lapsed"
)

// Decision is the answer to an Ask.
type Decision struct {
	Reason Reason
	// Wait is how long it takes until the reason may have gone, for a budget and for a
	// tenant's rate.
	Wait time.Duration

	// Limit is the most tokens that the reply may have for now, and Amount what is held
	// for prompt and reply, in micro-cents. Amount and BudgetFree don't count what a Most
	// got beyond the rest.
	Limit, Amount int64
	// Grown says that the Most of an open end got what there is: more than the rest, or
	// nobody else holds any money.
	Grown bool
	// Price is that of 1,000 tokens, in micro-cents; it stays for this request.
	Price int64
	// Month is the first day of the month that the request is charged to.
	Month time.Time

	// Slots is how many requests of the key may be in flight, and SlotsFree how many
	// more.
	Slots, SlotsFree int
	// Budget is that of the month in micro-cents, nil if the key has none, and
	// BudgetFree what is neither spent nor held of it.
	Budget     *int64
	BudgetFree int64
}

// Alter changes what an admitted request holds. It can be repeated.
type Alter struct {
	Request schemas.RequestID
	Key     schemas.KeyID
	// Prompt is the exact number of tokens of the prompt; nil leaves it as it is.
	Prompt *int64
	// Limit is how many tokens the reply is to be allowed in all; one that isn't above
	// the present one leaves that as it is. As much is granted as there is money.
	Limit int64
	// Agent is whom the job goes to now; empty leaves that as it is.
	Agent schemas.AgentID
}

// Altered is the answer to an Alter.
type Altered struct {
	// State is what the reservation is; if it isn't StateOpen, nothing else counts.
	State State
	// Limit and Amount are those of a Decision, as they are now.
	Limit, Amount int64
	// Others is what other requests hold of the budget. If it isn't 0, more may become
	// free.
	Others int64
}

// State is how far a request has come.
type State string

const (
	// StateOpen is a request that holds what was reserved for it.
	StateOpen State = "open"
	// StateSettled is a request that was charged what it burnt, or voided.
	StateSettled State = "settled"
	// StateExpired is a request that nobody settled, and that was charged its prompt.
	StateExpired State = "expired"
	// StateUnknown is a request that never was, or long ago.
	StateUnknown State = "unknown"
)

// Outcome is how a request ended.
type Outcome string

const (
	// OutcomeDone is a whole reply.
	OutcomeDone Outcome = "done"
	// OutcomeError is a reply that ended with an error.
	OutcomeError Outcome = "error"
	// OutcomeCancelled is a request whose client went away.
	OutcomeCancelled Outcome = "cancelled"
	// OutcomeVoid is a request that wasn't begun: it costs nothing, isn't in the ledger,
	// and if it isn't known yet, it can't be admitted any more.
	OutcomeVoid Outcome = "void"

	// outcomeOrphaned is a request whose owner died: it was settled by its worker.
	outcomeOrphaned Outcome = "orphaned"
	// outcomeExpired is a request that nobody settled.
	outcomeExpired Outcome = "expired"
)

// Settlement ends a request. It can be repeated: the first one counts.
type Settlement struct {
	Request schemas.RequestID
	Key     schemas.KeyID
	// Prompt is the number of tokens of the prompt; nil stands for what was reserved.
	Prompt     *int64
	Completion int64
	Outcome    Outcome
}

// Turn is what is to be done in one transaction, in this order.
type Turn struct {
	Settle []Settlement
	Alter  []Alter
	// Admit is decided in its order, under Lease.
	Admit []Ask
	Lease Lease
	// OpenTokens is what an open end gets; 0 stands for DefaultOpenTokens.
	OpenTokens int64
	// Foreseen, unless it is nil, may be told that the turn admits its one request, before the
	// database has written anything down. Until Turn returns without an error, it may come to
	// nothing. It must not block.
	Foreseen func(Decision)
}

// Outcomes is what came of a Turn, each list in the order of the Turn's.
type Outcomes struct {
	// Settled says in which state each request was before: StateOpen is one that this
	// turn has settled.
	Settled []State
	Altered []Altered
	Admit   []Decision
}

// Turn settles, alters and admits requests, all or nothing, in one round trip. See
// the package comment for what it promises.
//
// An error that wraps ErrUnavailable leaves it open whether the turn was taken. It may be
// taken again, with the same requests.
func (s *Store) Turn(ctx context.Context, turn Turn) (Outcomes, error) {
	lock := lockArgs(turn)
	settle, alter, admit, grow := settleArgs(turn.Settle), alterArgs(turn.Alter), admitArgs(turn), growth(turn.Admit)
	var out Outcomes
	var grown []Altered
	err := s.once(ctx, "take a turn", func(ctx context.Context) error {
		out, grown = Outcomes{}, nil
		if turn.Foreseen != nil && isOfOne(lock, settle, alter, admit) && len(admit.ids) == 1 && len(grow) == 0 {
			return s.foreseeTurnOfOne(ctx, turn, lock.keys[0], settle, admit, &out)
		}
		batch := &pgx.Batch{}
		if isOfOne(lock, settle, alter, admit) {
			s.queueTurnOfOne(batch, turn, lock.keys[0], settle, admit, &out)
		} else {
			s.queueTurn(batch, turn, lock, settle, alter, admit, &out)
		}
		if len(grow) > 0 {
			queueAlter(batch, alterArgs(grow), &grown)
		}
		return s.pool.SendBatch(ctx, batch).Close()
	})
	if err != nil {
		return Outcomes{}, err
	}
	if len(out.Settled) != len(turn.Settle) || len(out.Altered) != len(turn.Alter) || len(out.Admit) != len(turn.Admit) || len(grown) != len(grow) {
		return Outcomes{}, fmt.Errorf("take a turn: %d, %d and %d answers to %d, %d and %d questions",
			len(out.Settled), len(out.Altered)+len(grown), len(out.Admit), len(turn.Settle), len(turn.Alter)+len(grow), len(turn.Admit))
	}
	for i := range turn.Admit {
		if turn.Admit[i].grows() {
			out.Admit[i].grow(grown[0])
			grown = grown[1:]
		}
	}
	return out, nil
}

// queueTurn queues all of a turn but what is grown.
func (s *Store) queueTurn(batch *pgx.Batch, turn Turn, lock locks, settle settleColumns, alter alterColumns, admit admitColumns, out *Outcomes) {
	batch.Queue(`SELECT books_lock($1, $2)`, lock.tenants, lock.keys)
	switch len(turn.Settle) {
	case 0:
	case 1:
		s.queueSettleOne(batch, settle, &out.Settled)
	default:
		s.queueSettle(batch, turn.Settle, settle, &out.Settled)
	}
	if len(turn.Alter) > 0 {
		queueAlter(batch, alter, &out.Altered)
	}
	switch len(admit.ids) {
	case 0:
	case 1:
		s.queueAdmitOne(batch, turn, admit, &out.Admit)
	default:
		s.queueAdmit(batch, turn, lock, admit, &out.Admit)
	}
}

// grows reports whether more than the first tokens of an open end is asked for.
func (a *Ask) grows() bool { return a.Limit <= 0 && a.Most > 0 }

// growth is what asks want beyond their admission, in their order. What isn't admitted has
// nothing to be altered.
func growth(asks []Ask) (list []Alter) {
	for i := range asks {
		if x := &asks[i]; x.grows() {
			list = append(list, Alter{Request: x.Request, Key: x.Key, Limit: x.Most})
		}
	}
	return list
}

// grow takes in what came of an Ask's Most.
func (d *Decision) grow(a Altered) {
	if d.Reason == Admitted && a.State == StateOpen {
		d.Grown = a.Limit > d.Limit || a.Others == 0
		d.Limit = max(d.Limit, a.Limit)
	}
}

// locks are the rows that a turn works on, without repetition, in their order.
type locks struct{ tenants, keys []string }

func lockArgs(turn Turn) locks {
	var l locks
	l.tenants = make([]string, 0, 1)
	for i := range turn.Admit {
		l.tenants = append(l.tenants, string(turn.Admit[i].Tenant))
		l.keys = append(l.keys, string(turn.Admit[i].Key))
	}
	for i := range turn.Settle {
		l.keys = append(l.keys, string(turn.Settle[i].Key))
	}
	for i := range turn.Alter {
		l.keys = append(l.keys, string(turn.Alter[i].Key))
	}
	l.tenants, l.keys = unique(l.tenants), unique(l.keys)
	return l
}

func unique(list []string) []string {
	slices.Sort(list)
	return slices.Compact(list)
}

// settleColumns are the arguments of books_settle.
type settleColumns struct {
	ids, keys, outcomes []string
	prompts             []*int64
	completions         []int64
}

func settleArgs(list []Settlement) (c settleColumns) {
	for i := range list {
		x := &list[i]
		c.ids, c.keys, c.outcomes = append(c.ids, string(x.Request)), append(c.keys, string(x.Key)), append(c.outcomes, string(x.Outcome))
		c.prompts, c.completions = append(c.prompts, clampOptional(x.Prompt)), append(c.completions, clamp(x.Completion))
	}
	return c
}

func (s *Store) queueSettle(batch *pgx.Batch, list []Settlement, c settleColumns, out *[]State) {
	batch.Queue(`SELECT id, state FROM books_settle($1, $2, $3, $4, $5, $6)`, s.at(), c.ids, c.keys, c.prompts, c.completions, c.outcomes).
		Query(func(rows pgx.Rows) error {
			was := make(map[schemas.RequestID]State, len(list))
			var id schemas.RequestID
			var state State
			_, err := pgx.ForEachRow(rows, []any{&id, &state}, func() error {
				was[id] = state
				return nil
			})
			if err != nil {
				return err
			}
			for i := range list {
				state := was[list[i].Request]
				*out = append(*out, state)
				if state == StateOpen {
					was[list[i].Request] = StateSettled // for whoever settles it twice in one turn
				}
			}
			return nil
		})
}

// alterColumns are the arguments of books_change.
type alterColumns struct {
	ids, keys       []string
	prompts, limits []*int64
	agents          []*string
}

func alterArgs(list []Alter) (c alterColumns) {
	for i := range list {
		x := &list[i]
		c.ids, c.keys = append(c.ids, string(x.Request)), append(c.keys, string(x.Key))
		c.prompts = append(c.prompts, clampOptional(x.Prompt))
		limit := clamp(x.Limit)
		c.limits = append(c.limits, &limit)
		var agent *string
		if x.Agent != "" {
			agent = (*string)(&x.Agent)
		}
		c.agents = append(c.agents, agent)
	}
	return c
}

func queueAlter(batch *pgx.Batch, c alterColumns, out *[]Altered) {
	batch.Queue(`SELECT state, limit_tokens, amount, others FROM books_change($1, $2, $3, $4, $5)`, c.ids, c.keys, c.prompts, c.limits, c.agents).
		Query(func(rows pgx.Rows) error {
			var a Altered
			_, err := pgx.ForEachRow(rows, []any{&a.State, &a.Limit, &a.Amount, &a.Others}, func() error {
				*out = append(*out, a)
				return nil
			})
			return err
		})
}

// admitColumns are the arguments of books_admit; see there for what points to what.
type admitColumns struct {
	keyTenants                []int32
	priceTenants, priceModels []string
	ids, agents               []string
	askKeys, askPrices        []int32
	prompts, timeouts         []int64
	limits                    []*int64
	rows                      []int // for each ask, its row of the answer
}

func admitArgs(turn Turn) (c admitColumns) {
	if len(turn.Admit) == 0 {
		return c
	}
	lock := lockArgs(turn)
	tenants, keys := positions(lock.tenants), positions(lock.keys)
	c.keyTenants = make([]int32, len(lock.keys))
	for i := range c.keyTenants {
		c.keyTenants[i] = 1 // a key that nobody asks for: no matter
	}
	type priced struct {
		tenant schemas.TenantID
		model  string
	}
	prices := make(map[priced]int32)
	seen := make(map[schemas.RequestID]int, len(turn.Admit))
	for i := range turn.Admit {
		x := &turn.Admit[i]
		row, again := seen[x.Request]
		if again {
			c.rows = append(c.rows, row)
			continue
		}
		row = len(c.ids)
		seen[x.Request] = row
		c.rows = append(c.rows, row)
		key := keys[string(x.Key)]
		c.keyTenants[key-1] = tenants[string(x.Tenant)]
		p := priced{x.Tenant, x.Model}
		if prices[p] == 0 {
			c.priceTenants, c.priceModels = append(c.priceTenants, string(x.Tenant)), append(c.priceModels, x.Model)
			prices[p] = int32(len(c.priceModels))
		}
		c.ids, c.askKeys, c.askPrices = append(c.ids, string(x.Request)), append(c.askKeys, key), append(c.askPrices, prices[p])
		c.prompts = append(c.prompts, clamp(x.Prompt))
		var limit *int64
		if x.Limit > 0 {
			v := clamp(x.Limit)
			limit = &v
		}
		c.limits, c.agents = append(c.limits, limit), append(c.agents, string(x.Agent))
		c.timeouts = append(c.timeouts, min(max(x.Timeout, 0), maxAskTime).Milliseconds())
	}
	return c
}

// positions numbers a list from 1, as arrays are in SQL.
func positions(list []string) map[string]int32 {
	m := make(map[string]int32, len(list))
	for i, s := range list {
		m[s] = int32(i + 1)
	}
	return m
}

// decisionColumns are what books_admit, books_admit_one and books_turn_one return.
const decisionColumns = `reason, granted, reserved_amount, token_price, charged_month, slots, slots_free, budget, budget_free, wait_ms`

func (s *Store) queueAdmit(batch *pgx.Batch, turn Turn, lock locks, c admitColumns, out *[]Decision) {
	batch.Queue(`SELECT `+decisionColumns+`
		FROM books_admit($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)`,
		s.at(), turn.Lease.Owner, turn.Lease.Epoch, turn.openTokens(), lock.tenants, lock.keys, c.keyTenants, c.priceTenants, c.priceModels,
		c.ids, c.askKeys, c.askPrices, c.prompts, c.limits, c.agents, c.timeouts).
		Query(c.decisions(out))
}

func (t *Turn) openTokens() int64 {
	if t.OpenTokens <= 0 {
		return DefaultOpenTokens
	}
	return clamp(t.OpenTokens)
}

// decisions reads the answers to all questions.
func (c *admitColumns) decisions(out *[]Decision) func(pgx.Rows) error {
	return func(rows pgx.Rows) error {
		list := make([]Decision, 0, len(c.ids))
		for rows.Next() {
			d, err := scanDecision(rows)
			if err != nil {
				return err
			}
			list = append(list, d)
		}
		if rows.Err() != nil || len(list) != len(c.ids) {
			return rows.Err() // the caller counts
		}
		for _, row := range c.rows {
			*out = append(*out, list[row])
		}
		return nil
	}
}

// scanDecision reads the decisionColumns, and before them what else there is.
func scanDecision(row pgx.Row, before ...any) (d Decision, err error) {
	var wait int64
	err = row.Scan(append(before, &d.Reason, &d.Limit, &d.Amount, &d.Price, &d.Month, &d.Slots, &d.SlotsFree, &d.Budget, &d.BudgetFree, &wait)...)
	d.Wait = time.Duration(wait) * time.Millisecond
	return d, err
}

func clamp(tokens int64) int64 { return min(max(tokens, 0), MaxTokens) }

func clampOptional(tokens *int64) *int64 {
	if tokens == nil {
		return nil
	}
	v := clamp(*tokens)
	return &v
}
