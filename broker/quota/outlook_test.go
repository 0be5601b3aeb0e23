package quota_test

import (
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/quota"
	"github.com/ownllm/ownllm/schemas"
)

// A key is believed in if it was let in the last time, with plenty left, and wasn't refused a
// short time ago.
func TestOutlook(t *testing.T) {
	in(t, func(t *testing.T) {
		f := &fake{}
		g, stop := start(t, f, quota.Config{})
		say := func(d books.Decision) {
			t.Helper()
			f.set(func() {
				f.take = func(books.Turn) (books.Outcomes, error) { return books.Outcomes{Admit: []books.Decision{d}}, nil }
			})
			if _, err := g.Admit(t.Context(), ask("k")); (err == nil) != (d.Reason == books.Admitted) {
				t.Fatal(err)
			}
		}
		want := func(good bool, why string) {
			t.Helper()
			if o, ok := g.Outlook("k", "m"); ok != good {
				t.Errorf("%s: %v", why, ok)
			} else if ok {
				if !o.Budget {
					t.Error("it has a budget")
				}
				o.Over()
			}
		}
		budget := int64(1_000_000)
		plenty := books.Decision{Slots: 32, SlotsFree: 31, Budget: &budget, BudgetFree: 900_000, Price: 1, Amount: 1}
		want(false, "an unknown key")
		say(plenty)
		want(true, "a key with plenty left")
		if _, ok := g.Outlook("k", "another"); ok {
			t.Error("another model")
		}
		few, poor := plenty, plenty
		few.SlotsFree, poor.BudgetFree = 3, 15
		say(few)
		want(false, "few slots left")
		say(plenty)
		want(true, "plenty again")
		say(poor)
		want(false, "little money left")
		say(plenty)
		refused := plenty
		refused.Reason = books.ReasonTenantQPS
		say(refused)
		want(false, "just refused")
		say(plenty)
		want(false, "refused a short time ago")
		time.Sleep(11 * time.Second)
		want(true, "refused a while ago")
		f.set(func() { f.err = errUnavailable })
		if _, err := g.Admit(t.Context(), ask("k")); err == nil {
			t.Fatal("let in without books")
		}
		f.set(func() { f.err = nil })
		want(false, "the books were away")
		time.Sleep(11 * time.Second)
		say(plenty)

		// A quarter of what is enough for, at the same time, and of all keys no more than two.
		tight := plenty
		tight.Slots, tight.SlotsFree = 8, 7
		say(tight)
		first, ok := g.Outlook("k", "m")
		if _, second := g.Outlook("k", "m"); !ok || second {
			t.Errorf("a key with seven slots left: %v, %v", ok, second)
		}
		first.Over()
		want(true, "the first one is over")
		say(plenty)
		if _, err := g.Admit(t.Context(), ask("other")); err != nil {
			t.Fatal(err)
		}
		first, ok = g.Outlook("k", "m")
		if _, second := g.Outlook("other", "m"); !ok || !second {
			t.Errorf("two keys: %v, %v", ok, second)
		}
		want(false, "two are under way")
		first.Over()
		want(true, "one of them is over")
		stop()
		if _, ok := g.Outlook("k", "m"); ok {
			t.Error("a gate that has stopped")
		}
	})
}

// What is remembered of keys has a bound.
func TestOutlooksAreBounded(t *testing.T) {
	g, _ := start(t, &fake{}, quota.Config{})
	a := ask("k")
	if _, err := g.Admit(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	kept, ok := g.Outlook("k", "m")
	for i := 0; ok && i < 2*4096; i++ {
		a.Request, a.Model = schemas.NewRequestID(), string(a.Request)
		if _, err := g.Admit(t.Context(), a); err != nil {
			t.Fatal(err)
		}
		if _, ok = g.Outlook("k", "m"); !ok {
			break
		}
	}
	if ok {
		t.Error("nothing is ever forgotten")
	}
	kept.Over()
}

// More than the first tokens is asked for together with the admission once the model is known
// to have a price.
func TestMost(t *testing.T) {
	in(t, func(t *testing.T) {
		f := &fake{}
		g, _ := start(t, f, quota.Config{})
		for i, c := range []struct {
			price, asked int64
			grown        bool
		}{{1, 0, false}, {1, 500, true}, {0, 500, true}, {0, 0, false}, {1, 0, false}} {
			f.set(func() {
				f.take = func(turn books.Turn) (books.Outcomes, error) {
					most := turn.Admit[0].Most
					if most != c.asked {
						t.Errorf("request %d asks for %d", i, most)
					}
					return books.Outcomes{Admit: []books.Decision{{Limit: max(most, 7), Price: c.price, Slots: 9, SlotsFree: 8, Grown: most > 0}}}, nil
				}
			})
			a := ask("k")
			a.Limit, a.Most = 0, 500
			grant, err := g.Admit(t.Context(), a)
			want := max(c.asked, 7)
			if c.price == 0 {
				want = books.MaxTokens
			}
			if err != nil || !grant.Open || grant.Grown != c.grown || grant.Limit != want {
				t.Errorf("request %d gets %+v, %v", i, grant, err)
			}
		}
	})
}
