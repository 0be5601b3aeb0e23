package books

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/ownllm/ownllm/schemas"
)

// TenantState is whether a tenant's keys are accepted.
type TenantState string

const (
	// TenantActive is the normal state.
	TenantActive TenantState = "active"
	// TenantSuspended turns every key of the tenant away.
	TenantSuspended TenantState = "suspended"
)

// defaultQPS is how many requests a tenant may make each second.
const defaultQPS = 32

// Tenant is an organisation with its own users, keys and agents.
type Tenant struct {
	ID schemas.TenantID `json:"id"`
	// Slug is the tenant's label in host names. It is unique, and never changes.
	Slug  string      `json:"slug"`
	Name  string      `json:"name"`
	State TenantState `json:"state"`
	// QPS is how many requests all keys together may make each second.
	QPS       int       `json:"qps"`
	CreatedAt time.Time `json:"created_at"`
	UpdatedAt time.Time `json:"updated_at"`
}

// NewTenant is what a tenant is made of.
type NewTenant struct {
	Slug string
	Name string // empty: the slug
	QPS  *int   // nil: 32
}

const tenantColumns = `id, slug, name, state, qps, created_at, updated_at`

func scanTenant(row pgx.CollectableRow) (Tenant, error) {
	var t Tenant
	err := row.Scan(&t.ID, &t.Slug, &t.Name, &t.State, &t.QPS, &t.CreatedAt, &t.UpdatedAt)
	return t, err
}

// CreateTenant makes a tenant.
func (s *Store) CreateTenant(ctx context.Context, n NewTenant) (Tenant, error) {
	var t Tenant
	err := s.write(ctx, "create a tenant", func(ctx context.Context, tx pgx.Tx) (_ []Change, err error) {
		t, err = createTenant(ctx, tx, n)
		return []Change{{KindTenant, string(t.ID)}}, err
	})
	if err != nil {
		return Tenant{}, err
	}
	return t, nil
}

func createTenant(ctx context.Context, tx pgx.Tx, n NewTenant) (Tenant, error) {
	if err := checkSlug(n.Slug); err != nil {
		return Tenant{}, err
	}
	if err := checkName(n.Name); err != nil {
		return Tenant{}, err
	}
	qps, err := checkRate("qps", n.QPS, defaultQPS)
	if err != nil {
		return Tenant{}, err
	}
	if n.Name == "" {
		n.Name = n.Slug
	}
	rows, err := tx.Query(ctx, `
		INSERT INTO tenants (id, slug, name, qps) VALUES ($1, $2, $3, $4) RETURNING `+tenantColumns,
		schemas.NewTenantID(), n.Slug, n.Name, qps)
	if err != nil {
		return Tenant{}, err
	}
	return pgx.CollectExactlyOneRow(rows, scanTenant)
}

// querier is a transaction, or the pool.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

// getTenant finds a tenant by its id or slug; an id can't be a slug, for it has an
// underscore.
func getTenant(ctx context.Context, q querier, ref string) (Tenant, error) {
	if !printable(ref) {
		return Tenant{}, notFound("tenant", "")
	}
	rows, err := q.Query(ctx, `SELECT `+tenantColumns+` FROM tenants WHERE id = $1 OR slug = $1`, ref)
	if err != nil {
		return Tenant{}, err
	}
	t, err := pgx.CollectExactlyOneRow(rows, scanTenant)
	return t, orNotFound(err, "tenant", ref)
}

// GetTenant returns the tenant with the given id or slug.
func (s *Store) GetTenant(ctx context.Context, ref string) (t Tenant, err error) {
	err = s.read(ctx, "get a tenant", func(ctx context.Context) error {
		t, err = getTenant(ctx, s.pool, ref)
		return err
	})
	return t, err
}

// ListTenants returns a page of the tenants, and the cursor of the next page.
func (s *Store) ListTenants(ctx context.Context, page Page) (list []Tenant, next string, err error) {
	limit, err := page.check("ten_")
	if err != nil {
		return nil, "", err
	}
	err = s.read(ctx, "list the tenants", func(ctx context.Context) error {
		rows, err := s.pool.Query(ctx, `SELECT `+tenantColumns+` FROM tenants WHERE id > $1 ORDER BY id LIMIT $2`, page.After, limit)
		if err != nil {
			return err
		}
		list, err = pgx.CollectRows(rows, scanTenant)
		return err
	})
	if err != nil {
		return nil, "", err
	}
	list, next = cut(list, limit, func(t Tenant) string { return string(t.ID) })
	return list, next, nil
}

// SetTenantState suspends or resumes the tenant with the given id or slug.
func (s *Store) SetTenantState(ctx context.Context, ref string, state TenantState) (t Tenant, err error) {
	if state != TenantActive && state != TenantSuspended {
		return Tenant{}, invalid("state", "state must be %s or %s.", TenantActive, TenantSuspended)
	}
	if !printable(ref) {
		return Tenant{}, notFound("tenant", "")
	}
	err = s.write(ctx, "set the state of a tenant", func(ctx context.Context, tx pgx.Tx) ([]Change, error) {
		rows, err := tx.Query(ctx, `
			UPDATE tenants SET state = $2, updated_at = now() WHERE id = $1 OR slug = $1 RETURNING `+tenantColumns, ref, state)
		if err != nil {
			return nil, err
		}
		t, err = pgx.CollectExactlyOneRow(rows, scanTenant)
		return []Change{{KindTenant, string(t.ID)}}, orNotFound(err, "tenant", ref)
	})
	if err != nil {
		return Tenant{}, err
	}
	return t, nil
}
