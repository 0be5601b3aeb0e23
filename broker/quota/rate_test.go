package quota_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/quota"
	"github.com/ownllm/ownllm/schemas"
)

// standing is books that count how often they are asked where a key stands.
type standing struct {
	*fake
	asked int
	s     books.Standing
}

func (s *standing) Standing(ctx context.Context, key schemas.KeyID, model string) (books.Standing, error) {
	s.asked++
	_, err := s.fake.Standing(ctx, key, model)
	return s.s, err
}

func TestRate(t *testing.T) {
	in(t, func(t *testing.T) {
		b := &standing{fake: &fake{}, s: books.Standing{Slots: 4, SlotsFree: 3, Budget: new(int64(10_000)), BudgetFree: 2_500, Price: 2_000}}
		g, _ := start(t, b, quota.Config{})
		want := quota.Rate{Known: true, Requests: 4, RequestsLeft: 3, HasBudget: true, Tokens: 5_000, TokensLeft: 1_250}
		for range 3 {
			if got := g.Rate(t.Context(), "k", "m"); got != want {
				t.Errorf("the rate is %+v, want %+v", got, want)
			}
		}
		if b.asked != 1 {
			t.Errorf("the books were asked %d times within a second", b.asked)
		}
		// What is free draws on no budget, and another model is another question.
		b.s.Price = 0
		if got := g.Rate(t.Context(), "k", "free"); got != (quota.Rate{Known: true, Requests: 4, RequestsLeft: 3}) {
			t.Errorf("of a free model the rate is %+v", got)
		}
		time.Sleep(2 * time.Second)
		b.fake.set(func() { b.fake.err = errors.New("away") })
		if got := g.Rate(t.Context(), "k", "m"); got.Known {
			t.Errorf("without books the rate is %+v", got)
		}
	})
}
