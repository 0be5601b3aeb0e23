package books_test

import (
	"testing"

	"github.com/ownllm/ownllm/broker/books"
)

// An open end that says how much it can use gets that at once, as far as there is money.
func TestMost(t *testing.T) {
	s := open(t)
	for name, c := range map[string]struct {
		cents       int64 // a cent pays for 1,000 tokens; 0: there is no budget
		held        int64 // by another request
		limit, most int64
		want        books.Decision
		reserved    int64
	}{
		"no budget":               {most: 30_000, want: books.Decision{Limit: 30_000, Grown: true}, reserved: 30_100},
		"enough":                  {cents: 100, most: 30_000, want: books.Decision{Limit: 30_000, Grown: true}, reserved: 30_100},
		"some":                    {cents: 10, held: 2_000, most: 30_000, want: books.Decision{Limit: 7_900, Grown: true}, reserved: 10_000},
		"the last":                {cents: 1, most: 30_000, want: books.Decision{Limit: 900, Grown: true}, reserved: 1_000},
		"others hold the rest":    {cents: 10, held: 8_876, most: 30_000, want: books.Decision{Limit: 1024}, reserved: 10_000},
		"others hold all":         {cents: 10, held: 9_500, most: 30_000, want: books.Decision{Reason: books.ReasonMoneyHeld}, reserved: 9_500},
		"spent":                   {cents: 1, held: 950, most: 30_000, want: books.Decision{Reason: books.ReasonMoneyHeld}, reserved: 950},
		"less than the first":     {cents: 100, most: 500, want: books.Decision{Limit: 1024, Grown: true}, reserved: 1_124},
		"a limit of the client's": {cents: 100, limit: 50, most: 30_000, want: books.Decision{Limit: 50}, reserved: 150},
	} {
		t.Run(name, func(t *testing.T) {
			cl := newClient(t, s, limits{cents: c.cents, concurrency: 9, qps: 1000})
			inFlight := 1
			if c.held > 0 {
				cl.admit(cl.ask(0, c.held))
				inFlight++
			}
			a := cl.ask(100, c.limit)
			a.Most = c.most
			// Twice in a turn, and once more, as if the answer had got lost.
			got := append(cl.admit(a, a), cl.admit(a)...)
			for _, d := range got[:2] {
				if d.Reason != c.want.Reason || d.Limit != c.want.Limit || d.Grown != c.want.Grown {
					t.Errorf("it gets %d tokens, grown %t, %q, want %d, %t, %q", d.Limit, d.Grown, d.Reason, c.want.Limit, c.want.Grown, c.want.Reason)
				}
			}
			if got[2].Reason != c.want.Reason || got[2].Limit != c.want.Limit {
				t.Errorf("asked again it gets %d tokens, %q", got[2].Limit, got[2].Reason)
			}
			if c.want.Reason != books.Admitted {
				inFlight--
			}
			cl.holds(inFlight, 0, c.reserved)
			if c.want.Reason == books.Admitted {
				if was := cl.settle(a, 100, 10, books.OutcomeDone); was != books.StateOpen {
					t.Errorf("it was %s", was)
				}
				cl.holds(inFlight-1, 110, c.held)
			}
		})
	}
}
