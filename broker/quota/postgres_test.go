package quota_test

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/quota"
	"github.com/ownllm/ownllm/internal/faultproxy"
	"github.com/ownllm/ownllm/internal/pgtest"
	"github.com/ownllm/ownllm/schemas"
)

// house is a key in real books.
type house struct {
	t       testing.TB
	address string
	s       *books.Store
	tenant  schemas.TenantID
	user    schemas.UserID
	key     schemas.KeyID
}

// newHouse makes a key; 1,000 tokens of the model "m" cost a cent.
func newHouse(t testing.TB, cents *int64, concurrency, qps int) *house {
	t.Helper()
	h := &house{t: t, address: pgtest.New(t)}
	h.s = h.open(h.address)
	tenant, err := h.s.CreateTenant(t.Context(), books.NewTenant{Slug: "acme", QPS: &qps})
	h.must(err)
	user, err := h.s.CreateUser(t.Context(), books.NewUser{Tenant: "acme", Email: "a@b"})
	h.must(err)
	h.tenant, h.user = tenant.ID, user.ID
	h.key = h.newKey(cents, concurrency)
	_, err = h.s.SetPrice(t.Context(), "", "m", books.MicroCents)
	h.must(err)
	return h
}

func (h *house) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

func (h *house) newKey(cents *int64, concurrency int) schemas.KeyID {
	h.t.Helper()
	k, _, err := h.s.CreateKey(h.t.Context(), books.NewKey{Tenant: "acme", User: "a@b", BudgetCents: cents, Concurrency: &concurrency})
	h.must(err)
	return k.ID
}

func (h *house) open(address string) *books.Store {
	h.t.Helper()
	s, err := books.Open(h.t.Context(), books.Config{URL: address, MaxConns: 4, Timeout: 2 * time.Second})
	h.must(err)
	h.t.Cleanup(s.Close)
	return s
}

func (h *house) ask(prompt, limit int64) quota.Ask {
	return quota.Ask{Request: schemas.NewRequestID(), Tenant: h.tenant, Key: h.key, Model: "m", Prompt: prompt, Limit: limit, Timeout: time.Minute}
}

func (h *house) account() books.Account {
	h.t.Helper()
	a, err := h.s.Account(h.t.Context(), h.key)
	h.must(err)
	return a
}

// watch looks at the key's account all the time, and fails the test if it is ever over
// its bounds. The function that it returns ends it, and says how often it has looked.
func (h *house) watch(money int64, slots int) (stop func() int) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan int)
	s := h.open(h.address)
	go func() {
		n := 0
		for ; ctx.Err() == nil; n++ {
			a, err := s.Account(ctx, h.key)
			if err == nil && (a.Spent+a.Reserved > money || a.InFlight > slots) {
				h.t.Errorf("out of bounds: %+v", a)
			}
		}
		done <- n
	}()
	return func() int {
		cancel()
		return <-done
	}
}

func retryable(err error) bool {
	var e *schemas.Error
	return errors.As(err, &e) && (e.Code == schemas.CodeConcurrencyLimit || e.Code == schemas.CodeTenantQPSLimit)
}

// Many clients, three processes, one key whose budget covers 100 requests.
func TestRaceForBudget(t *testing.T) {
	h := newHouse(t, new(int64(10)), 1000, 1_000_000) // 10,000 tokens
	stop := h.watch(10*books.MicroCents, 1000)
	var admitted, refused atomic.Int64
	var wg sync.WaitGroup
	for range 3 {
		g, _ := start(t, h.open(h.address), quota.Config{})
		for range 300 {
			wg.Go(func() {
				for {
					grant, err := g.Admit(t.Context(), h.ask(40, 60))
					switch {
					case err == nil:
						admitted.Add(1)
						<-g.Settle(&grant, new(int64(40)), 60, books.OutcomeDone, nil)
					case retryable(err):
						continue
					case errors.Is(err, &schemas.Error{Code: schemas.CodeBudgetExceeded}):
						refused.Add(1)
					default:
						t.Error(err)
					}
					return
				}
			})
		}
	}
	wg.Wait()
	if n := stop(); n < 5 {
		t.Errorf("looked %d times", n)
	}
	if admitted.Load() != 100 || refused.Load() != 800 {
		t.Errorf("%d admitted, %d refused", admitted.Load(), refused.Load())
	}
	if a := h.account(); a != (books.Account{Spent: 10 * books.MicroCents}) {
		t.Errorf("%+v", a)
	}
}

// Without a limit, whoever comes again gets a whole reply as long as there is money for
// one.
func TestRaceForOpenEnds(t *testing.T) {
	h := newHouse(t, new(int64(10)), 1000, 1_000_000) // 10,000 tokens, so 100 replies of 100
	stop := h.watch(10*books.MicroCents, 1000)
	var whole, cut atomic.Int64
	var wg sync.WaitGroup
	for range 3 {
		g, _ := start(t, h.open(h.address), quota.Config{})
		for range 50 {
			wg.Go(func() {
				for {
					grant, err := g.Admit(t.Context(), h.ask(40, 0))
					if retryable(err) {
						time.Sleep(time.Duration(rand.IntN(20)) * time.Millisecond)
						continue
					}
					if err != nil {
						if !errors.Is(err, &schemas.Error{Code: schemas.CodeBudgetExceeded}) {
							t.Error(err)
						}
						return
					}
					if grant.Limit >= 60 {
						whole.Add(1)
					} else {
						cut.Add(1)
					}
					g.Settle(&grant, new(int64(40)), min(60, grant.Limit), books.OutcomeDone, nil)
				}
			})
		}
	}
	wg.Wait()
	stop()
	if whole.Load() != 100 || cut.Load() != 0 {
		t.Errorf("%d whole replies, %d cut", whole.Load(), cut.Load())
	}
}

// Never a 33rd in flight, and no slot is lost, whatever the clients do.
func TestRaceForSlots(t *testing.T) {
	h := newHouse(t, nil, 32, 1_000_000)
	stop := h.watch(1<<62, 32)
	var flying, most atomic.Int64
	var wg sync.WaitGroup
	var gates []*quota.Gate
	for range 3 {
		g, _ := start(t, h.open(h.address), quota.Config{})
		gates = append(gates, g)
		for range 40 {
			wg.Go(func() {
				for n := range 15 {
					wait := time.Duration(1+rand.IntN(60)) * time.Millisecond
					if n%3 == 0 {
						wait = time.Minute // so that, on a busy machine too, many are let in
					}
					ctx, cancel := context.WithTimeout(t.Context(), wait)
					grant, err := g.Admit(ctx, h.ask(1, 1))
					if err == nil {
						n := flying.Add(1)
						for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
						}
						time.Sleep(time.Duration(rand.IntN(10)) * time.Millisecond)
						flying.Add(-1)
						g.Settle(&grant, nil, 1, books.OutcomeDone, nil)
					} else if ctx.Err() == nil && !retryable(err) {
						t.Error(err)
					}
					cancel()
				}
			})
		}
	}
	wg.Wait()
	stop()
	if most.Load() > 32 || most.Load() < 16 {
		t.Errorf("%d were in flight at most", most.Load())
	}
	for _, g := range gates {
		for g.Unsettled() > 0 {
			time.Sleep(time.Millisecond)
		}
	}
	for range 32 { // all of them are there
		if _, err := gates[0].Admit(t.Context(), h.ask(1, 1)); err != nil {
			t.Error(err)
		}
	}
	if _, err := gates[1].Admit(t.Context(), h.ask(1, 1)); !errors.Is(err, &schemas.Error{Code: schemas.CodeConcurrencyLimit}) {
		t.Errorf("a 33rd: %v", err)
	}
}

// A client that sends one request after the other, to one process after the other, is
// never refused, though its key has one slot only.
func TestSequentialClient(t *testing.T) {
	h := newHouse(t, nil, 1, 1_000_000)
	var gates []*quota.Gate
	for range 2 {
		g, _ := start(t, h.open(h.address), quota.Config{})
		gates = append(gates, g)
	}
	for i := range 100 {
		g := gates[i%2]
		grant, err := g.Admit(t.Context(), h.ask(1, 1))
		if err != nil {
			t.Fatal(i, err)
		}
		if grant.Rate.Requests != 1 || grant.Rate.RequestsLeft != 0 {
			t.Errorf("%+v", grant.Rate)
		}
		<-g.Settle(&grant, nil, 1, books.OutcomeDone, nil)
	}
}

// The bucket holds one second's worth of requests, and refills at that rate.
func TestRaceForBucket(t *testing.T) {
	const qps = 50
	h := newHouse(t, nil, 1_000_000, qps)
	var admitted atomic.Int64
	var wg sync.WaitGroup
	var gates []*quota.Gate
	var keys []schemas.KeyID
	for range 3 {
		g, _ := start(t, h.open(h.address), quota.Config{})
		gates = append(gates, g)
		for range 20 {
			keys = append(keys, h.newKey(nil, 1_000_000)) // of its own, so that they meet at the bucket only
		}
	}
	begun := time.Now()
	for i, g := range gates {
		for _, key := range keys[20*i : 20*(i+1)] {
			wg.Go(func() {
				for time.Since(begun) < 2*time.Second {
					a := h.ask(1, 1)
					a.Key = key
					_, err := g.Admit(t.Context(), a)
					if err == nil {
						admitted.Add(1)
						continue
					}
					var e *schemas.Error
					if !errors.As(err, &e) || e.Code != schemas.CodeTenantQPSLimit || e.RetryAfter <= 0 || e.RetryAfter > time.Second {
						t.Error(err)
					}
					time.Sleep(5 * time.Millisecond)
				}
			})
		}
	}
	wg.Wait()
	took := time.Since(begun)
	most := int64(qps + took.Seconds()*qps + 1)
	if n := admitted.Load(); n > most || n < 2*qps {
		t.Errorf("%d admitted in %v, at most %d may be", n, took, most)
	}
}

// cutOff is books that a test can take away from one process, which then looks dead.
type cutOff struct {
	quota.Books
	dead atomic.Bool
}

func (c *cutOff) RenewLease(ctx context.Context, owner schemas.OwnerID, ttl time.Duration) (books.Lease, error) {
	if c.dead.Load() {
		return books.Lease{}, errUnavailable
	}
	return c.Books.RenewLease(ctx, owner, ttl)
}

func (c *cutOff) Turn(ctx context.Context, turn books.Turn) (books.Outcomes, error) {
	if c.dead.Load() {
		return books.Outcomes{}, errUnavailable
	}
	return c.Books.Turn(ctx, turn)
}

func (c *cutOff) EndLease(ctx context.Context, lease books.Lease) error {
	if c.dead.Load() {
		return errUnavailable
	}
	return c.Books.EndLease(ctx, lease)
}

// An owner dies: its slots are back after a lease and a half, and its money once its
// worker reports. One that comes back finds its requests over.
func TestOwnerDies(t *testing.T) {
	const lease = 2 * time.Second
	h := newHouse(t, new(int64(1)), 3, 1000)
	b := &cutOff{Books: h.s}
	g, _ := start(t, b, quota.Config{Lease: lease})
	sweeping(t, h.open(h.address), lease)
	sweeping(t, h.open(h.address), lease)
	other, _ := start(t, h.open(h.address), quota.Config{Lease: lease})
	agent := schemas.NewAgentID()
	var grants []quota.Grant
	for range 3 {
		a := h.ask(10, 290)
		a.Agent = agent
		grant, err := g.Admit(t.Context(), a)
		h.must(err)
		grants = append(grants, grant)
	}
	time.Sleep(2 * lease) // it lives
	if a := h.account(); a.InFlight != 3 {
		t.Fatalf("%+v", a)
	}
	b.dead.Store(true)
	begun := time.Now()
	for h.account().InFlight > 0 {
		if time.Since(begun) > 3*lease/2+3*time.Second {
			t.Fatal("the slots don't come back")
		}
		time.Sleep(10 * time.Millisecond)
	}
	if took := time.Since(begun); took < lease/2 {
		t.Errorf("the slots were back after %v", took)
	}
	if a := h.account(); a.Reserved != 900*1000 {
		t.Errorf("%+v", a)
	}
	if _, err := other.Admit(t.Context(), h.ask(0, 101)); !errors.Is(err, &schemas.Error{Code: schemas.CodeConcurrencyLimit}) {
		t.Error(err)
	}
	got, err := h.s.SettleOrphan(t.Context(), h.tenant, agent, &schemas.UsageReport{Request: grants[0].Request, Usage: schemas.Usage{PromptTokens: 5, CompletionTokens: 95}})
	if err != nil || got != books.OrphanSettled {
		t.Errorf("%s, %v", got, err)
	}
	if grant, err := other.Admit(t.Context(), h.ask(0, 101)); err != nil {
		t.Error(err)
	} else {
		<-other.Settle(&grant, nil, 1, books.OutcomeVoid, nil)
	}
	b.dead.Store(false)
	select {
	case <-grants[0].Lapsed():
	case <-time.After(30 * time.Second):
		t.Fatal("it doesn't notice that its lease lapsed")
	}
	// Of what nobody has settled so far, its own count is taken.
	for i := range grants {
		<-g.Settle(&grants[i], new(int64(10)), 10, books.OutcomeError, nil)
	}
	if a := h.account(); a != (books.Account{Spent: (100 + 20 + 20) * 1000}) {
		t.Errorf("%+v", a)
	}
}

func sweeping(t *testing.T, s *books.Store, lease time.Duration) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := quota.NewSweeper(s, lease, slog.New(slog.DiscardHandler)).Run(ctx); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
}

// The database goes away under load, for longer than a lease, and comes back: nothing is
// lost or charged twice, and what was in flight is settled.
func TestPostgresAway(t *testing.T) {
	const lease = 2 * time.Second
	h := newHouse(t, new(int64(1_000_000)), 1000, 1_000_000)
	proxy := faultproxy.New(t, h.address)
	g, _ := start(t, h.open(proxy.URL()), quota.Config{Lease: lease, Wait: time.Second})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var settled, expired atomic.Int64
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			for ctx.Err() == nil {
				grant, err := g.Admit(t.Context(), h.ask(1, 99))
				if err != nil {
					if !errors.Is(err, &schemas.Error{Code: schemas.CodeInternalError}) {
						t.Error(err)
					}
					time.Sleep(10 * time.Millisecond)
					continue
				}
				time.Sleep(time.Duration(rand.IntN(20)) * time.Millisecond)
				if grant.Expired() {
					expired.Add(1)
				}
				g.Settle(&grant, new(int64(1)), 9, books.OutcomeDone, nil)
				settled.Add(1)
			}
		})
	}
	for _, fail := range []func(){proxy.Cut, proxy.Stall, proxy.Cut} {
		time.Sleep(300 * time.Millisecond)
		fail()
		time.Sleep(3 * lease / 2)
		if _, err := g.Admit(t.Context(), h.ask(1, 1)); !errors.Is(err, &schemas.Error{Code: schemas.CodeInternalError}) {
			t.Errorf("while the database was away: %v", err)
		}
		proxy.Restore()
	}
	for begun := time.Now(); !g.Ready(); {
		if time.Since(begun) > 30*time.Second {
			t.Fatal("doesn't come back")
		}
		time.Sleep(time.Millisecond)
	}
	time.Sleep(500 * time.Millisecond)
	cancel()
	wg.Wait()
	for begun := time.Now(); g.Unsettled() > 0; {
		if time.Since(begun) > 30*time.Second {
			t.Fatalf("%d aren't settled", g.Unsettled())
		}
		time.Sleep(time.Millisecond)
	}
	if n := expired.Load(); n > 0 {
		t.Errorf("%d expired", n)
	}
	if a := h.account(); a != (books.Account{Spent: settled.Load() * 10 * 1000}) || settled.Load() < 100 {
		t.Errorf("%+v after %d", a, settled.Load())
	}
}
