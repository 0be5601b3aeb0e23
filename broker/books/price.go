package books

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/ownllm/ownllm/schemas"
)

// MaxPrice is the highest price of 1,000 tokens, in micro-cents: 100 dollars.
const MaxPrice = 10_000 * MicroCents

// Price is what 1,000 tokens of a model cost.
type Price struct {
	// Tenant is whose price it is; empty: that of every tenant without one of its own.
	Tenant schemas.TenantID `json:"tenant_id,omitempty"`
	Model  string           `json:"model"`
	// MicroCents is for 1,000 tokens, of prompt and reply alike.
	MicroCents int64     `json:"micro_cents_per_1k_tokens"`
	UpdatedAt  time.Time `json:"updated_at"`
}

// SetPrice sets the price of a model, for the tenant with the given id or slug, or, if
// that is empty, for every tenant that has none of its own. Requests in flight keep the
// price that they were admitted at. A model that has no price is free.
func (s *Store) SetPrice(ctx context.Context, tenant, model string, microCents int64) (p Price, err error) {
	if !validModel(model) {
		return Price{}, invalid("model", "A model's id must have 1 to %d bytes, without control characters or spaces at its ends.", maxModel)
	}
	if microCents < 0 || microCents > MaxPrice {
		return Price{}, invalid("cents_per_1k_tokens", "The price of 1,000 tokens must be from 0 to %d cents.", MaxPrice/MicroCents)
	}
	err = s.write(ctx, "set a price", func(ctx context.Context, tx pgx.Tx) ([]Change, error) {
		p = Price{Model: model}
		if tenant != "" {
			t, err := getTenant(ctx, tx, tenant)
			if err != nil {
				return nil, err
			}
			p.Tenant = t.ID
		}
		return nil, tx.QueryRow(ctx, `
			INSERT INTO model_prices (tenant_id, model, price) VALUES ($1, $2, $3)
			ON CONFLICT (tenant_id, model) DO UPDATE SET price = excluded.price, updated_at = now()
			RETURNING price, updated_at`, p.Tenant, model, microCents).Scan(&p.MicroCents, &p.UpdatedAt)
	})
	if err != nil {
		return Price{}, err
	}
	return p, nil
}

// ListPrices returns all prices, or those that hold for the tenant with the given id
// or slug, in the order of models.
func (s *Store) ListPrices(ctx context.Context, tenant string) (list []Price, err error) {
	err = s.read(ctx, "list the prices", func(ctx context.Context) error {
		query, args := `SELECT tenant_id, model, price, updated_at FROM model_prices`, []any(nil)
		if tenant != "" {
			t, err := getTenant(ctx, s.pool, tenant)
			if err != nil {
				return err
			}
			query = `
				SELECT DISTINCT ON (model) tenant_id, model, price, updated_at FROM model_prices
				WHERE tenant_id IN ('', $1)`
			args = append(args, t.ID)
		}
		rows, err := s.pool.Query(ctx, query+` ORDER BY model, tenant_id DESC`, args...)
		if err != nil {
			return err
		}
		list, err = pgx.CollectRows(rows, pgx.RowToStructByPos[Price])
		return err
	})
	return list, err
}

// Account is what a key has spent and holds just now.
type Account struct {
	InFlight int `json:"in_flight"`
	// Spent and Reserved are of the present month, in micro-cents.
	Spent    int64 `json:"spent"`
	Reserved int64 `json:"reserved"`
}

// Account returns what a key has spent and holds just now; of a key that nobody has, or
// that was never used, nothing.
func (s *Store) Account(ctx context.Context, key schemas.KeyID) (a Account, err error) {
	err = s.read(ctx, "read an account", func(ctx context.Context) error {
		return s.pool.QueryRow(ctx, `
			SELECT coalesce((SELECT in_flight FROM key_accounts WHERE key_id = $1), 0), coalesce(sum(spent), 0)::bigint, coalesce(sum(reserved), 0)::bigint
			FROM budgets WHERE key_id = $1 AND month = date_trunc('month', coalesce($2, now()) AT TIME ZONE 'UTC')::date`,
			key, s.at()).Scan(&a.InFlight, &a.Spent, &a.Reserved)
	})
	return a, err
}
