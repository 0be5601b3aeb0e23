package books

import (
	"context"

	"github.com/jackc/pgx/v5"

	"github.com/ownllm/ownllm/schemas"
)

// Standing is what a key may and what it holds just now.
type Standing struct {
	// Slots is how many requests of the key may be in flight, and SlotsFree how many
	// more.
	Slots, SlotsFree int
	// Budget is that of the month in micro-cents, nil if the key has none, and
	// BudgetFree what is neither spent nor held of it.
	Budget     *int64
	BudgetFree int64
	// Price is that of 1,000 tokens of the model, in micro-cents.
	Price int64
}

// Standing tells what a key may and holds just now. A key that doesn't exist has
// nothing.
func (s *Store) Standing(ctx context.Context, key schemas.KeyID, model string) (st Standing, err error) {
	err = s.read(ctx, "read a key's standing", func(ctx context.Context) error {
		rows, err := s.pool.Query(ctx, `
			SELECT k.concurrency, greatest(0, k.concurrency - coalesce(a.in_flight, 0)), k.budget_cents * $4::bigint,
				greatest(0, coalesce(k.budget_cents * $4::bigint - coalesce(b.spent + b.reserved, 0), 0)),
				coalesce((SELECT p.price FROM model_prices p WHERE p.model = $2 AND p.tenant_id IN ('', k.tenant_id) ORDER BY p.tenant_id DESC LIMIT 1), 0)
			FROM api_keys k
			LEFT JOIN key_accounts a ON a.key_id = k.id
			LEFT JOIN budgets b ON b.key_id = k.id AND b.month = date_trunc('month', coalesce($3, now()) AT TIME ZONE 'UTC')::date
			WHERE k.id = $1`, key, model, s.at(), int64(MicroCents))
		if err != nil {
			return err
		}
		st = Standing{}
		_, err = pgx.ForEachRow(rows, []any{&st.Slots, &st.SlotsFree, &st.Budget, &st.BudgetFree, &st.Price}, func() error { return nil })
		return err
	})
	return st, err
}
