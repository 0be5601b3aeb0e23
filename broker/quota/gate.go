package quota

import (
	"context"
	"errors"
	"hash/maphash"
	"log/slog"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/schemas"
)

// Grant is what an admitted request holds. One that comes with an error holds nothing;
// its Rate may be known all the same.
type Grant struct {
	Request schemas.RequestID
	Key     schemas.KeyID
	// Limit is the most tokens that the reply may have, for now if Open.
	Limit int64
	// Open says that the client gave no limit, and that more can be asked for, see
	// Gate.Extend.
	Open bool
	// Grown says that Limit has in it what there is of the Most that was asked for.
	Grown bool
	// Price is that of 1,000 tokens, in micro-cents.
	Price int64
	Rate  Rate
	// Scarce says that the next request of the key may have to wait for what this one
	// holds.
	Scarce bool

	lease *lease
	term  *term
}

// Expired reports whether the lease that the request was admitted under has lapsed, or
// may have while this process wasn't running. Then somebody else may have settled the
// request, and nothing more of it may be delivered. It is cheap: ask before each write.
func (g *Grant) Expired() bool {
	return g.term == nil || g.term.over() || g.lease.doubtful(time.Now())
}

// Lapsed is closed once the lease that the request was admitted under has lapsed.
func (g *Grant) Lapsed() <-chan struct{} { return g.term.ended }

// Gate admits and settles requests. It is safe for concurrent use.
type Gate struct {
	cfg       Config
	books     Books
	log       *slog.Logger
	seed      maphash.Seed
	shards    []*shard
	lease     *lease
	rates     rates
	prospects prospects
}

// New returns a gate. It lets nobody in before it runs.
func New(b Books, cfg Config, log *slog.Logger) *Gate {
	cfg = cfg.withDefaults()
	g := &Gate{cfg: cfg, books: b, log: log, seed: maphash.MakeSeed(), lease: newLease(b, cfg, log), rates: rates{told: make(map[rateKey]toldRate)},
		prospects: prospects{all: make(map[rateKey]*prospect)}}
	for range cfg.Shards {
		g.shards = append(g.shards, newShard(g))
	}
	return g
}

// Owner is the id under which requests are owned.
func (g *Gate) Owner() schemas.OwnerID { return g.cfg.Owner }

// Ready reports whether there is a lease, without which nothing is admitted.
func (g *Gate) Ready() bool { return g.lease.current(time.Now()) != nil }

// Lease is the lease under which requests are admitted now; false if there is none.
func (g *Gate) Lease() (books.Lease, bool) {
	if t := g.lease.current(time.Now()); t != nil {
		return t.lease, true
	}
	return books.Lease{}, false
}

// Run works until ctx ends. Then it lets nobody in any more, has the books take what was
// settled before, as far as they can be reached, and gives its lease back. Whoever owns
// requests ends them first.
func (g *Gate) Run(ctx context.Context) error {
	var work errgroup.Group
	// The lease outlives the shards, which may have to settle.
	leased, release := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan struct{})
	go func() {
		defer close(done)
		g.lease.run(leased)
	}()
	for _, s := range g.shards {
		work.Go(func() error {
			s.run(ctx)
			return nil
		})
	}
	_ = work.Wait() // they return nothing
	release()
	<-done
	g.lease.end(context.WithoutCancel(ctx))
	return nil
}

func (g *Gate) shard(key schemas.KeyID) *shard {
	return g.shards[maphash.String(g.seed, string(key))%uint64(len(g.shards))]
}

// Admit lets a request in, or says why not: the error is a *schemas.Error, or that of
// ctx if that has ended; then nothing is held. What was let in must be settled. An id is
// asked for once: a request that is tried again as a whole is another one.
func (g *Gate) Admit(ctx context.Context, ask Ask) (Grant, error) {
	return g.AdmitForeseen(ctx, ask, nil)
}

// AdmitForeseen is Admit, and tells, if it can and foreseen isn't nil, what the books have
// decided to grant before they have written it down. Until AdmitForeseen returns
// it, that may come to nothing, and whatever was begun on the strength of it has to be undone.
// foreseen is called from another goroutine, and must not block; if ctx ends, it may be called
// after AdmitForeseen has returned.
func (g *Gate) AdmitForeseen(ctx context.Context, ask Ask, foreseen func(Grant)) (Grant, error) {
	if !g.prospects.priced(ask.Key, ask.Model) {
		ask.Most = 0 // what is free has no bound, and the question isn't
	}
	bounded, cancel := context.WithTimeout(ctx, g.cfg.Wait)
	defer cancel()
	a, err := g.ask(bounded, ask, foreseen)
	if err == nil && mayPass(a.decision.Reason) && !a.uncertain {
		select {
		case <-time.After(g.cfg.SecondLook):
			a, err = g.ask(bounded, ask, foreseen)
		case <-bounded.Done():
		}
	}
	if err != nil {
		if ctx.Err() == nil && bounded.Err() != nil {
			err = errAway()
		}
		g.prospects.refused(ask.Key, ask.Model)
		return Grant{}, err
	}
	d := &a.decision
	if err := refusal(d); err != nil {
		g.prospects.refused(ask.Key, ask.Model)
		return Grant{Rate: standing(d)}, err
	}
	g.prospects.admitted(ask.Key, ask.Model, d)
	return g.grant(a, d), nil
}

// grant is what an admission holds by a decision that lets it in.
func (g *Gate) grant(a *admission, d *books.Decision) Grant {
	grant := Grant{
		Request: a.ask.Request, Key: a.ask.Key, Limit: d.Limit, Price: d.Price, Rate: standing(d), Scarce: scarce(d),
		lease: g.lease, term: a.term,
	}
	if a.ask.Limit <= 0 {
		grant.Open, grant.Grown = true, d.Grown
		if d.Price == 0 {
			grant.Limit = books.MaxTokens // what is free needs no reserve
		}
	}
	return grant
}

// standing is where a key stands by a decision.
func standing(d *books.Decision) Rate {
	return rate(books.Standing{Slots: d.Slots, SlotsFree: d.SlotsFree, Budget: d.Budget, BudgetFree: d.BudgetFree, Price: d.Price})
}

// scarce reports whether little was left when a request was admitted: less than half of
// the slots, or money for less than scarceBelow more like it.
func scarce(d *books.Decision) bool {
	return 2*d.SlotsFree < d.Slots || d.Budget != nil && d.BudgetFree/scarceBelow < d.Amount
}

const scarceBelow = 16

// ask asks the books once.
func (g *Gate) ask(ctx context.Context, ask Ask, foreseen func(Grant)) (*admission, error) {
	if !g.Ready() {
		return nil, errAway()
	}
	a := &admission{ask: ask, foreseen: foreseen, done: make(chan struct{})}
	s := g.shard(ask.Key)
	if !s.add(func() { s.asks = append(s.asks, a) }) {
		return nil, errAway()
	}
	select {
	case <-a.done:
	case <-ctx.Done():
		if s.abandon(a) {
			return nil, context.Cause(ctx)
		}
		<-a.done // just now
		if a.err == nil && a.decision.Reason == books.Admitted {
			s.void(ask)
			return nil, context.Cause(ctx)
		}
	}
	if a.err == nil && a.decision.Reason == books.ReasonLease {
		g.lease.doubt()
	}
	return a, a.err
}

// extendEvery is how often it is looked whether money has come free.
const extendEvery = 100 * time.Millisecond

// Extend asks that the reply to an open request may have that many tokens in all, and
// returns how many it may have now. If there isn't as much money, it returns as many as
// there is for; if there is for none more than have, but others hold some, it waits for
// theirs until ctx ends. So if it returns have, that is all. The error is a
// *schemas.Error.
func (g *Gate) Extend(ctx context.Context, grant *Grant, have, limit int64) (int64, error) {
	if grant.Price == 0 {
		return books.MaxTokens, nil
	}
	for {
		out, err := g.alter(ctx, books.Alter{Request: grant.Request, Key: grant.Key, Limit: limit})
		switch {
		case ctx.Err() != nil:
			return max(out.Limit, have), nil
		case err != nil || out.Limit > have || out.Others == 0:
			return max(out.Limit, have), err
		}
		select {
		case <-time.After(extendEvery):
		case <-ctx.Done():
			return have, nil
		}
	}
}

// Claimed notes which agent works on a request, and, unless nil, how many tokens its
// prompt has in truth. It returns how many the reply may have now; that is less than
// before only if the prompt is longer than was asked for. It must have returned before an
// agent other than the one that was asked for gets the job, since only the agent that is
// noted can report what it burnt.
func (g *Gate) Claimed(ctx context.Context, grant *Grant, agent schemas.AgentID, prompt *int64) (int64, error) {
	out, err := g.alter(ctx, books.Alter{Request: grant.Request, Key: grant.Key, Agent: agent, Prompt: prompt})
	if err == nil && grant.Price == 0 && grant.Open {
		return books.MaxTokens, nil
	}
	return out.Limit, err
}

func (g *Gate) alter(ctx context.Context, alter books.Alter) (books.Altered, error) {
	c := &change{alter: alter, done: make(chan struct{})}
	s := g.shard(alter.Key)
	if !s.add(func() { s.changes = append(s.changes, c) }) {
		return books.Altered{}, errAway()
	}
	select {
	case <-c.done:
	case <-ctx.Done():
		return books.Altered{}, context.Cause(ctx) // done or not, it changes nothing for others
	}
	if c.err == nil && c.out.State != books.StateOpen {
		return books.Altered{}, ErrEnded
	}
	return c.out, c.err
}

// Settle ends a request: it is charged for a prompt, nil standing for what was
// reserved, and for a completion of so many tokens. It doesn't wait. Once the books have
// taken it, which they will as long as the gate runs, then is called, unless it is nil,
// and the channel is closed. then must not block. What isn't scarce may take some
// milliseconds longer.
func (g *Gate) Settle(grant *Grant, prompt *int64, completion int64, outcome books.Outcome, then func()) <-chan struct{} {
	return g.shard(grant.Key).settle(books.Settlement{
		Request: grant.Request, Key: grant.Key, Prompt: prompt, Completion: completion, Outcome: outcome,
	}, grant.Scarce, then)
}

// Unsettled counts the settlements that the books haven't taken yet.
func (g *Gate) Unsettled() (n int) {
	for _, s := range g.shards {
		n += s.unsettled()
	}
	return n
}

// mayPass reports whether the reason may go away within moments.
func mayPass(r books.Reason) bool { return r == books.ReasonNoSlot || r == books.ReasonMoneyHeld }

func errAway() *schemas.Error {
	return schemas.Errorf(schemas.CodeInternalError,
		"This server can't reach its database just now, and without it admits no request. Try again in a few seconds.").WithRetryAfter(2 * time.Second)
}

// ErrEnded is what becomes of a request whose owner was taken for dead: others may have
// settled it, and nothing more of it may be delivered.
var ErrEnded = schemas.Errorf(schemas.CodeInternalError,
	"The server that had your request was out of touch for too long and was taken for dead, so the request was ended. Send it again.").WithRetryAfter(time.Second)

// IsEnded reports whether an error is ErrEnded. errors.Is would find every internal error
// to be it, since it compares codes.
func IsEnded(err error) bool { return err == error(ErrEnded) } //nolint:errorlint // this very one

// refusal says to a client why it wasn't let in; nil if it was.
func refusal(d *books.Decision) error {
	switch d.Reason {
	case books.Admitted:
		return nil
	case books.ReasonKeyInvalid:
		return schemas.Errorf(schemas.CodeKeyInvalid, "The API key doesn't exist or has been revoked.")
	case books.ReasonKeyExpired:
		return schemas.Errorf(schemas.CodeKeyExpired, "The API key has expired. Make a new one.")
	case books.ReasonTenantDisabled:
		return schemas.Errorf(schemas.CodeTenantDisabled, "The tenant of this API key is suspended.")
	case books.ReasonUserDeactivated:
		return schemas.Errorf(schemas.CodeUserDeactivated, "The user who owns this API key was deactivated.")
	case books.ReasonBudget:
		return schemas.Errorf(schemas.CodeBudgetExceeded,
			"What is left of the key's budget for this month doesn't pay for this request. Ask for fewer tokens, have the budget raised, or wait until the 1st (UTC).").WithRetryAfter(d.Wait)
	case books.ReasonTenantQPS:
		return schemas.Errorf(schemas.CodeTenantQPSLimit, "The tenant's requests come faster than its limit allows. Slow down.").WithRetryAfter(d.Wait)
	case books.ReasonNoSlot:
		return schemas.Errorf(schemas.CodeConcurrencyLimit,
			"As many requests of this key are in flight as may be: %d. Wait until one of them has ended.", d.Slots).WithRetryAfter(time.Second)
	case books.ReasonMoneyHeld:
		return schemas.Errorf(schemas.CodeConcurrencyLimit,
			"What is left of the key's budget is held by requests in flight. Wait until one of them has ended.").WithRetryAfter(time.Second)
	case books.ReasonLease:
		return schemas.Errorf(schemas.CodeInternalError, "This server has been out of touch with its database. Try again in a second.").WithRetryAfter(time.Second)
	case books.ReasonEnded:
		return ErrEnded
	}
	return schemas.AsError(errors.New("unknown reason"))
}
