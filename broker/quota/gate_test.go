package quota_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/quota"
	"github.com/ownllm/ownllm/schemas"
)

var errUnavailable = fmt.Errorf("test: %w", books.ErrUnavailable)

// in runs a test in a bubble, where time is its own.
func in(t *testing.T, test func(t *testing.T)) { synctest.Test(t, test) }

func wantCode(t *testing.T, err error, code schemas.Code, wait time.Duration) {
	t.Helper()
	var e *schemas.Error
	if !errors.As(err, &e) || e.Code != code || e.RetryAfter != wait {
		t.Errorf("error %#v, want code %s and to wait %v", err, code, wait)
	}
}

// What comes in while a turn is under way goes into the next one together.
func TestGroupCommit(t *testing.T) {
	in(t, func(t *testing.T) {
		f := &fake{}
		gate := make(chan struct{})
		f.take = func(turn books.Turn) (books.Outcomes, error) {
			<-gate
			return yes(turn), nil
		}
		g, _ := start(t, f, quota.Config{Shards: 1})
		var wg sync.WaitGroup
		admit := func() {
			wg.Go(func() {
				if _, err := g.Admit(t.Context(), ask("k")); err != nil {
					t.Error(err)
				}
			})
		}
		admit()
		synctest.Wait()
		for range 99 {
			admit()
		}
		synctest.Wait()
		close(gate)
		wg.Wait()
		turns := f.seen()
		if len(turns) != 2 || len(turns[0].Admit) != 1 || len(turns[1].Admit) != 99 {
			t.Errorf("%d turns", len(turns))
		}
	})
}

// A turn is bounded, and nobody is forgotten.
func TestTurnsAreBounded(t *testing.T) {
	in(t, func(t *testing.T) {
		f := &fake{}
		g, _ := start(t, f, quota.Config{Shards: 3})
		var wg sync.WaitGroup
		for i := range 3000 {
			wg.Go(func() {
				grant, err := g.Admit(t.Context(), ask(schemas.KeyID(fmt.Sprint(i%7))))
				if err != nil {
					t.Error(err)
				}
				<-g.Settle(&grant, nil, 1, books.OutcomeDone, nil)
			})
		}
		wg.Wait()
		for _, turn := range f.seen() {
			if len(turn.Admit) > 512 || len(turn.Settle) > 512 {
				t.Errorf("a turn of %d and %d", len(turn.Admit), len(turn.Settle))
			}
		}
		if n := g.Unsettled(); n != 0 {
			t.Errorf("%d unsettled", n)
		}
	})
}

func TestRefusals(t *testing.T) {
	in(t, func(t *testing.T) {
		f := &fake{}
		g, _ := start(t, f, quota.Config{})
		budget := int64(5_000_000)
		for _, c := range []struct {
			reason books.Reason
			code   schemas.Code
			wait   time.Duration
			looks  int
		}{
			{books.ReasonKeyInvalid, schemas.CodeKeyInvalid, 0, 1},
			{books.ReasonKeyExpired, schemas.CodeKeyExpired, 0, 1},
			{books.ReasonTenantDisabled, schemas.CodeTenantDisabled, 0, 1},
			{books.ReasonUserDeactivated, schemas.CodeUserDeactivated, 0, 1},
			{books.ReasonBudget, schemas.CodeBudgetExceeded, time.Hour, 1},
			{books.ReasonTenantQPS, schemas.CodeTenantQPSLimit, time.Hour, 1},
			{books.ReasonNoSlot, schemas.CodeConcurrencyLimit, time.Second, 2},
			{books.ReasonMoneyHeld, schemas.CodeConcurrencyLimit, time.Second, 2},
			{books.ReasonLease, schemas.CodeInternalError, time.Second, 1},
			{books.ReasonEnded, schemas.CodeInternalError, time.Second, 1},
		} {
			f.set(func() {
				f.turns = nil
				f.take = func(books.Turn) (books.Outcomes, error) {
					return books.Outcomes{Admit: []books.Decision{{
						Reason: c.reason, Wait: time.Hour, Slots: 3, SlotsFree: 1, Price: 1_000_000, Budget: &budget, BudgetFree: 2_500_000,
					}}}, nil
				}
			})
			grant, err := g.Admit(t.Context(), ask("k"))
			wantCode(t, err, c.code, c.wait)
			want := quota.Rate{Known: true, Requests: 3, RequestsLeft: 1, HasBudget: true, Tokens: 5000, TokensLeft: 2500}
			if grant.Rate != want || !grant.Expired() {
				t.Errorf("%s: %+v", c.reason, grant)
			}
			if n := len(f.seen()); n != c.looks {
				t.Errorf("%s: %d looks", c.reason, n)
			}
		}
	})
}

// A slot that comes free within moments is found by the second look.
func TestSecondLook(t *testing.T) {
	in(t, func(t *testing.T) {
		f := &fake{}
		g, _ := start(t, f, quota.Config{})
		f.take = func(turn books.Turn) (books.Outcomes, error) {
			if len(f.seen()) == 1 {
				return books.Outcomes{Admit: []books.Decision{{Reason: books.ReasonNoSlot}}}, nil
			}
			return yes(turn), nil
		}
		begun := time.Now()
		if _, err := g.Admit(t.Context(), ask("k")); err != nil || time.Since(begun) != 10*time.Millisecond {
			t.Errorf("%v after %v", err, time.Since(begun))
		}
	})
}

// Whoever gives up holds nothing, whether it still waited or was under way.
func TestGivingUp(t *testing.T) {
	in(t, func(t *testing.T) {
		f := &fake{}
		gate := make(chan struct{})
		f.take = func(turn books.Turn) (books.Outcomes, error) {
			<-gate
			return yes(turn), nil
		}
		g, stop := start(t, f, quota.Config{Shards: 1})
		ctx, cancel := context.WithCancel(t.Context())
		first, second := ask("k"), ask("k")
		var wg sync.WaitGroup
		for _, a := range []quota.Ask{first, second} {
			wg.Go(func() {
				if _, err := g.Admit(ctx, a); !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
			})
			synctest.Wait() // the second waits while the first is under way
		}
		cancel()
		wg.Wait()
		close(gate)
		synctest.Wait()
		stop()
		turns := f.seen()
		if len(turns) != 2 || len(turns[1].Admit) != 0 || len(turns[1].Settle) != 1 {
			t.Fatalf("%+v", turns)
		}
		if x := turns[1].Settle[0]; x.Request != first.Request || x.Outcome != books.OutcomeVoid {
			t.Errorf("%+v", x)
		}
	})
}

// An admission whose answer got lost is asked for again, and if that doesn't help, it is
// voided as soon as the books are back.
func TestLostAnswer(t *testing.T) {
	in(t, func(t *testing.T) {
		f := &fake{}
		g, _ := start(t, f, quota.Config{Shards: 1})
		var n atomic.Int32
		f.set(func() {
			f.take = func(turn books.Turn) (books.Outcomes, error) {
				if n.Add(1) == 1 {
					return books.Outcomes{}, errUnavailable
				}
				return yes(turn), nil
			}
		})
		if _, err := g.Admit(t.Context(), ask("k")); err != nil {
			t.Error("a connection was dead: ", err)
		}
		f.set(func() { f.turns, f.err = nil, errUnavailable })
		lost := ask("k")
		_, err := g.Admit(t.Context(), lost)
		wantCode(t, err, schemas.CodeInternalError, 2*time.Second)
		// For a moment the books are left alone.
		_, err = g.Admit(t.Context(), ask("k"))
		wantCode(t, err, schemas.CodeInternalError, 2*time.Second)
		if n := len(f.seen()); n != 2 {
			t.Errorf("%d turns", n)
		}
		f.set(func() { f.turns, f.err = nil, nil })
		time.Sleep(time.Second)
		turns := f.seen()
		if len(turns) != 1 || len(turns[0].Settle) != 1 || turns[0].Settle[0].Request != lost.Request || turns[0].Settle[0].Outcome != books.OutcomeVoid {
			t.Errorf("%+v", turns)
		}
		// Refused the second time, it may still have been let in the first time.
		n.Store(0)
		f.set(func() {
			f.turns = nil
			f.take = func(turn books.Turn) (books.Outcomes, error) {
				if n.Add(1) == 1 {
					return books.Outcomes{}, errUnavailable
				}
				if len(turn.Admit) == 0 {
					return yes(turn), nil
				}
				return books.Outcomes{Admit: []books.Decision{{Reason: books.ReasonNoSlot}}}, nil
			}
		})
		_, err = g.Admit(t.Context(), lost)
		wantCode(t, err, schemas.CodeConcurrencyLimit, time.Second)
		time.Sleep(time.Second)
		if turns := f.seen(); len(turns) != 3 || len(turns[2].Settle) != 1 {
			t.Errorf("%+v", turns)
		}
	})
}

// What is foreseen is what is granted, and is told once: a second try may decide otherwise.
func TestAdmitForeseen(t *testing.T) {
	in(t, func(t *testing.T) {
		f := &fake{}
		g, _ := start(t, f, quota.Config{Shards: 1})
		for name, test := range map[string]struct{ decided, again books.Reason }{
			"let in": {}, "refused": {decided: books.ReasonBudget}, "lost, and refused": {again: books.ReasonNoSlot},
		} {
			tries := 0
			f.set(func() {
				f.take = func(turn books.Turn) (books.Outcomes, error) {
					out := yes(turn)
					if len(turn.Admit) == 0 {
						return out, nil
					}
					if tries++; tries > 1 && test.again != "" {
						out.Admit[0] = books.Decision{Reason: test.again}
					} else {
						out.Admit[0].Reason = test.decided
					}
					if turn.Foreseen != nil && test.decided == books.Admitted {
						turn.Foreseen(out.Admit[0])
					}
					if tries == 1 && test.again != "" {
						return books.Outcomes{}, errUnavailable
					}
					return out, nil
				}
			})
			var foreseen []quota.Grant
			grant, err := g.AdmitForeseen(t.Context(), ask("k"), func(g quota.Grant) { foreseen = append(foreseen, g) })
			want := 1
			if test.decided != "" {
				want = 0
			}
			if len(foreseen) != want || (err == nil) != (test.decided == "" && test.again == "") {
				t.Errorf("%s: foreseen %+v, and then %v", name, foreseen, err)
			}
			if err == nil && foreseen[0] != grant {
				t.Errorf("%s: foreseen %+v, granted %+v", name, foreseen[0], grant)
			}
		}
	})
}

// A settlement that nobody waits for lies a moment and shares its turn; one by which the
// next request of its key may be let in doesn't, and takes the others along.
func TestScarceSettlesAtOnce(t *testing.T) {
	in(t, func(t *testing.T) {
		f := &fake{}
		g, _ := start(t, f, quota.Config{Shards: 1})
		var grants []quota.Grant
		admit := func(d books.Decision) {
			t.Helper()
			f.set(func() {
				f.take = func(turn books.Turn) (books.Outcomes, error) {
					out := yes(turn)
					for i := range out.Admit {
						out.Admit[i] = d
					}
					return out, nil
				}
			})
			grant, err := g.Admit(t.Context(), ask("k"))
			if err != nil {
				t.Fatal(err)
			}
			grants = append(grants, grant)
		}
		budget := int64(1000)
		for range 4 {
			admit(books.Decision{Slots: 32, SlotsFree: 31, Budget: &budget, BudgetFree: 900, Amount: 10})
		}
		admit(books.Decision{Slots: 1, SlotsFree: 0})
		admit(books.Decision{Slots: 32, SlotsFree: 31, Budget: &budget, BudgetFree: 100, Amount: 10})
		f.set(func() { f.turns = nil })
		settle := func(i int) <-chan struct{} {
			return g.Settle(&grants[i], nil, 1, books.OutcomeDone, nil)
		}
		begun := time.Now()
		first, second := settle(0), settle(1)
		<-first
		<-second
		if took := time.Since(begun); took == 0 || took > 10*time.Millisecond {
			t.Errorf("two that nobody waits for took %s", took)
		}
		for i, scarce := range []int{4, 5} {
			begun = time.Now()
			relaxed := settle(2 + i)
			<-settle(scarce)
			<-relaxed
			if took := time.Since(begun); took != 0 {
				t.Errorf("scarce: took %s", took)
			}
		}
		if turns := f.seen(); len(turns) != 3 {
			t.Errorf("%d turns for 3 pairs: %+v", len(turns), turns)
		}
	})
}

// Settlements wait until the books are back, and none is lost, not even at the end.
func TestSettleIsKept(t *testing.T) {
	in(t, func(t *testing.T) {
		f := &fake{}
		g, stop := start(t, f, quota.Config{Shards: 1})
		grant, err := g.Admit(t.Context(), ask("k"))
		if err != nil {
			t.Fatal(err)
		}
		f.set(func() { f.err = errUnavailable })
		done := g.Settle(&grant, new(int64(3)), 4, books.OutcomeDone, nil)
		time.Sleep(time.Minute)
		select {
		case <-done:
			t.Error("settled while the books were away")
		default:
		}
		if g.Unsettled() != 1 || g.Ready() {
			t.Errorf("%d unsettled, ready: %t", g.Unsettled(), g.Ready())
		}
		f.set(func() { f.err, f.turns = nil, nil })
		<-done
		if x := f.seen()[0].Settle[0]; x.Request != grant.Request || *x.Prompt != 3 || x.Completion != 4 || x.Outcome != books.OutcomeDone {
			t.Errorf("%+v", x)
		}
		f.set(func() { f.err = errUnavailable })
		done = g.Settle(&grant, nil, 4, books.OutcomeDone, nil)
		go func() {
			time.Sleep(time.Second)
			f.set(func() { f.err = nil })
		}()
		stop()
		<-done
		if f.held != -1 {
			t.Error("the lease wasn't given back")
		}
		_, err = g.Admit(t.Context(), ask("k"))
		wantCode(t, err, schemas.CodeInternalError, 2*time.Second)
	})
}

// One request that the books choke on doesn't spoil the others of its turn.
func TestPoison(t *testing.T) {
	in(t, func(t *testing.T) {
		f := &fake{}
		gate := make(chan struct{})
		bad := ask("k")
		f.take = func(turn books.Turn) (books.Outcomes, error) {
			<-gate
			for _, a := range turn.Admit {
				if a.Request == bad.Request {
					return books.Outcomes{}, errors.New("poison")
				}
			}
			return yes(turn), nil
		}
		g, _ := start(t, f, quota.Config{Shards: 1})
		var wg sync.WaitGroup
		for i := range 10 {
			a := ask("k")
			if i == 5 {
				a = bad
			}
			wg.Go(func() {
				_, err := g.Admit(t.Context(), a)
				if (err == nil) == (a.Request == bad.Request) {
					t.Errorf("%d: %v", i, err)
				}
			})
		}
		synctest.Wait()
		close(gate)
		wg.Wait()
	})
}

// The lease lapsed: what was admitted under it is over, at once and for good.
func TestLapse(t *testing.T) {
	in(t, func(t *testing.T) {
		f := &fake{}
		g, _ := start(t, f, quota.Config{})
		old, err := g.Admit(t.Context(), ask("k"))
		if err != nil || old.Expired() {
			t.Fatal(err)
		}
		f.set(func() { f.lease.Epoch++ })
		f.take = func(turn books.Turn) (books.Outcomes, error) {
			if turn.Lease.Epoch == 0 {
				return books.Outcomes{Admit: []books.Decision{{Reason: books.ReasonLease}}}, nil
			}
			return yes(turn), nil
		}
		_, err = g.Admit(t.Context(), ask("k"))
		wantCode(t, err, schemas.CodeInternalError, time.Second)
		<-old.Lapsed() // at once, because of the refusal
		if !old.Expired() {
			t.Error("not expired")
		}
		young, err := g.Admit(t.Context(), ask("k"))
		if err != nil || young.Expired() {
			t.Error(err)
		}
	})
}

// While the books are away nothing is admitted, but what is in flight goes on, however
// long it takes.
func TestAway(t *testing.T) {
	in(t, func(t *testing.T) {
		f := &fake{}
		g, _ := start(t, f, quota.Config{})
		grant, err := g.Admit(t.Context(), ask("k"))
		if err != nil {
			t.Fatal(err)
		}
		f.set(func() { f.err = errUnavailable })
		for range 300 {
			time.Sleep(100 * time.Millisecond)
			if grant.Expired() {
				t.Fatal("expired")
			}
		}
		_, err = g.Admit(t.Context(), ask("k"))
		wantCode(t, err, schemas.CodeInternalError, 2*time.Second)
		f.set(func() { f.err = nil })
		time.Sleep(time.Second)
		if _, err = g.Admit(t.Context(), ask("k")); err != nil || grant.Expired() {
			t.Error(err)
		}
	})
}

// The process was stopped for longer than its lease. Until it knows better, nothing may
// be delivered, even if it then finds that the books are away.
func TestStopped(t *testing.T) {
	for _, c := range []struct {
		name   string
		epoch  int64 // after the stop
		err    error
		expire bool
	}{
		{"and nobody took the lease", 0, nil, false},
		{"and the lease was taken", 1, nil, true},
		{"and the books are away", 0, errUnavailable, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			in(t, func(t *testing.T) {
				f := &fake{}
				g, _ := start(t, f, quota.Config{})
				grant, err := g.Admit(t.Context(), ask("k"))
				if err != nil {
					t.Fatal(err)
				}
				hang := make(chan struct{}) // a renewal hangs, as if nothing ran
				f.set(func() { f.hang = hang })
				time.Sleep(9 * time.Second)
				if grant.Expired() {
					t.Error("expired within its lease")
				}
				time.Sleep(time.Minute)
				if !grant.Expired() {
					t.Error("not expired after the stop")
				}
				f.set(func() { f.lease.Epoch, f.err, f.hang = c.epoch, c.err, nil })
				close(hang)
				synctest.Wait()
				time.Sleep(5 * time.Second)
				if grant.Expired() != c.expire {
					t.Errorf("expired: %t", !c.expire)
				}
				f.set(func() { f.err = nil })
			})
		})
	}
}

func TestExtend(t *testing.T) {
	in(t, func(t *testing.T) {
		f := &fake{}
		g, _ := start(t, f, quota.Config{})
		a := ask("k")
		a.Limit = 0
		grant, err := g.Admit(t.Context(), a)
		if err != nil || !grant.Open || grant.Limit != 7 {
			t.Fatalf("%+v, %v", grant, err)
		}
		answer := func(list ...books.Altered) {
			synctest.Wait() // for what was given up
			f.set(func() {
				f.take = func(turn books.Turn) (out books.Outcomes, err error) {
					for range turn.Alter {
						out.Altered = append(out.Altered, list[0])
						if len(list) > 1 {
							list = list[1:]
						}
					}
					return out, nil
				}
			})
		}
		extend := func(want int64, wait time.Duration) {
			t.Helper()
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			defer cancel()
			begun := time.Now()
			got, err := g.Extend(ctx, &grant, 7, 14)
			if err != nil || got != want || time.Since(begun) != wait {
				t.Errorf("%d, %v after %v; want %d after %v", got, err, time.Since(begun), want, wait)
			}
		}
		answer(books.Altered{State: books.StateOpen, Limit: 14})
		extend(14, 0)
		answer(books.Altered{State: books.StateOpen, Limit: 9, Others: 5})
		extend(9, 0)
		answer(books.Altered{State: books.StateOpen, Limit: 7})
		extend(7, 0)
		answer(books.Altered{State: books.StateOpen, Limit: 7, Others: 5})
		extend(7, 3*time.Second)
		held := books.Altered{State: books.StateOpen, Limit: 7, Others: 5}
		answer(held, held, books.Altered{State: books.StateOpen, Limit: 10, Others: 2})
		extend(10, 200*time.Millisecond)
		answer(books.Altered{State: books.StateSettled})
		_, err = g.Extend(t.Context(), &grant, 7, 14)
		wantCode(t, err, schemas.CodeInternalError, time.Second)
		_, err = g.Claimed(t.Context(), &grant, "agt_1", new(int64(3)))
		wantCode(t, err, schemas.CodeInternalError, time.Second)
	})
}
