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
	err = s.write(ctx, "set a price", func(ctx context.Context, tx pgx.Tx) ([]deed, error) {
		p = Price{Model: model}
		if tenant != "" {
			t, err := getTenant(ctx, tx, tenant)
			if err != nil {
				return nil, err
			}
			p.Tenant = t.ID
		}
		// A row first, so that there is one to lock.
		tag, err := tx.Exec(ctx, `
			INSERT INTO model_prices (tenant_id, model, price) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING`, p.Tenant, model, microCents)
		if err != nil {
			return nil, err
		}
		var old *int64
		err = tx.QueryRow(ctx, `
			SELECT price, updated_at FROM model_prices WHERE tenant_id = $1 AND model = $2 FOR NO KEY UPDATE`, p.Tenant, model).
			Scan(&old, &p.UpdatedAt)
		if err != nil {
			return nil, err
		}
		p.MicroCents = microCents
		switch {
		case tag.RowsAffected() == 1:
			old = nil // it's our own
		case *old == microCents:
			return nil, nil
		default:
			err = tx.QueryRow(ctx, `
				UPDATE model_prices SET price = $3, updated_at = now() WHERE tenant_id = $1 AND model = $2 RETURNING updated_at`,
				p.Tenant, model, microCents).Scan(&p.UpdatedAt)
		}
		return []deed{{Change{KindPrice, model}, "price.set", p.Tenant, differences{"micro_cents_per_1k_tokens": {old, microCents}}}}, err
	})
	if err != nil {
		return Price{}, err
	}
	return p, nil
}

// ListPrices returns a page of all prices, or of those that hold for the tenant with the
// given id or slug, in the order of models, and the cursor of the next page.
func (s *Store) ListPrices(ctx context.Context, tenant string, page Page) (list []Price, next string, err error) {
	limit, err := page.limit()
	if err != nil {
		return nil, "", err
	}
	after, err := openCursor(page.After, 2)
	if err != nil {
		return nil, "", err
	}
	if after == nil {
		after = []string{"", ""} // before any model
	}
	err = s.read(ctx, "list the prices", func(ctx context.Context) error {
		query, args := `
			SELECT tenant_id, model, price, updated_at FROM model_prices WHERE (model, tenant_id) > ($1, $2)
			ORDER BY model, tenant_id LIMIT $3`, []any{after[0], after[1], limit}
		if tenant != "" {
			t, err := getTenant(ctx, s.pool, tenant)
			if err != nil {
				return err
			}
			query = `
				SELECT DISTINCT ON (model) tenant_id, model, price, updated_at FROM model_prices
				WHERE model > $1 AND tenant_id IN ('', $2) ORDER BY model, tenant_id DESC LIMIT $3`
			args = []any{after[0], t.ID, limit}
		}
		rows, err := s.pool.Query(ctx, query, args...)
		if err != nil {
			return err
		}
		list, err = pgx.CollectRows(rows, pgx.RowToStructByPos[Price])
		return err
	})
	if err != nil {
		return nil, "", err
	}
	list, next = cut(list, limit, func(p Price) string { return cursor(p.Model, string(p.Tenant)) })
	return list, next, nil
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
