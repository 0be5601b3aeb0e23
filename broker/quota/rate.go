package quota

import (
	"context"
	"sync"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/schemas"
)

// Rate is what the X-RateLimit headers tell.
type Rate struct {
	// Known says whether the rest is: not if the books didn't answer.
	Known bool
	// Requests is how many requests of the key may be in flight, and RequestsLeft how
	// many more.
	Requests, RequestsLeft int
	// HasBudget says whether the key has one that the model draws on. Tokens is what it
	// pays for in a month at the price of the model, and TokensLeft what of that is
	// neither spent nor held.
	HasBudget          bool
	Tokens, TokensLeft int64
}

func rate(s books.Standing) Rate {
	r := Rate{Known: true, Requests: s.Slots, RequestsLeft: s.SlotsFree, HasBudget: s.Budget != nil && s.Price > 0}
	if r.HasBudget {
		r.Tokens, r.TokensLeft = tokens(*s.Budget, s.Price), tokens(s.BudgetFree, s.Price)
	}
	return r
}

// tokens is how many tokens an amount pays for.
func tokens(amount, price int64) int64 {
	// Budgets may be 10^18, so the thousand goes in after the division.
	return amount/price*1000 + amount%price*1000/price
}

const (
	// rateFor is how long a rate is told again, and maxRates how many are kept.
	rateFor  = time.Second
	maxRates = 4096
	// rateWait bounds the question: what is being answered needs no database.
	rateWait = 250 * time.Millisecond
)

// rates are those that were told lately.
type rates struct {
	mu   sync.Mutex
	told map[rateKey]toldRate
}

type rateKey struct {
	key   schemas.KeyID
	model string
}

type toldRate struct {
	rate Rate
	at   time.Time
}

// Rate tells where a key stands, for an answer to something that isn't admitted: as it
// was a second ago at most. If the books don't answer at once, it isn't known. The model
// may be empty; then nothing is said of the budget.
func (g *Gate) Rate(ctx context.Context, key schemas.KeyID, model string) Rate {
	k, now := rateKey{key, model}, time.Now()
	g.rates.mu.Lock()
	last, ok := g.rates.told[k]
	g.rates.mu.Unlock()
	if ok && now.Sub(last.at) < rateFor {
		return last.rate
	}
	bounded, cancel := context.WithTimeout(ctx, rateWait)
	defer cancel()
	r := toldRate{at: now} // one that isn't known is kept, too: the books may be away
	if s, err := g.books.Standing(bounded, key, model); err == nil {
		r.rate = rate(s)
	}
	g.rates.mu.Lock()
	defer g.rates.mu.Unlock()
	if len(g.rates.told) >= maxRates {
		clear(g.rates.told)
	}
	g.rates.told[k] = r
	return r.rate
}
