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

// checked is a NewTenant with its defaults, all of it valid.
func (n NewTenant) checked() (NewTenant, error) {
	if err := checkSlug(n.Slug); err != nil {
		return NewTenant{}, err
	}
	if err := checkName(n.Name); err != nil {
		return NewTenant{}, err
	}
	qps, err := checkRate("qps", n.QPS, defaultQPS)
	if err != nil {
		return NewTenant{}, err
	}
	n.QPS = &qps
	if n.Name == "" {
		n.Name = n.Slug
	}
	return n, nil
}

// CreateTenant makes a tenant. See WithIdempotency.
func (s *Store) CreateTenant(ctx context.Context, n NewTenant) (t Tenant, err error) {
	n, err = n.checked()
	if err != nil {
		return Tenant{}, err
	}
	err = s.write(ctx, "create a tenant", func(ctx context.Context, tx pgx.Tx) ([]deed, error) {
		id := schemas.NewTenantID()
		made, err := claim(ctx, tx, "tenant.create", n, string(id))
		if err != nil {
			return nil, err
		}
		if made != "" {
			t, err = getTenant(ctx, tx, made)
			return nil, err
		}
		var d deed
		t, d, err = createTenant(ctx, tx, id, n)
		return []deed{d}, err
	})
	if err != nil {
		return Tenant{}, err
	}
	return t, nil
}

func createTenant(ctx context.Context, tx pgx.Tx, id schemas.TenantID, n NewTenant) (Tenant, deed, error) {
	rows, err := tx.Query(ctx, `
		INSERT INTO tenants (id, slug, name, qps) VALUES ($1, $2, $3, $4) RETURNING `+tenantColumns, id, n.Slug, n.Name, n.QPS)
	if err != nil {
		return Tenant{}, deed{}, err
	}
	t, err := pgx.CollectExactlyOneRow(rows, scanTenant)
	return t, deed{
		Change{KindTenant, string(id)}, "tenant.create", id, map[string]any{"slug": t.Slug, "name": t.Name, "qps": t.QPS},
	}, err
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

// SetTenantState suspends or resumes the tenant with the given id or slug. One that is in
// that state already stays as it is.
func (s *Store) SetTenantState(ctx context.Context, ref string, state TenantState) (Tenant, error) {
	action := map[TenantState]string{TenantActive: "tenant.resume", TenantSuspended: "tenant.suspend"}[state]
	if action == "" {
		return Tenant{}, invalid("state", "state must be %s or %s.", TenantActive, TenantSuspended)
	}
	return s.editTenant(ctx, ref, action, func(t *Tenant) { t.State = state })
}

// TenantChange is what to change of a tenant; what is nil stays.
type TenantChange struct {
	Name *string // empty: the slug
	QPS  *int
}

// SetTenant changes the tenant with the given id or slug. The new limit holds for the
// next request.
func (s *Store) SetTenant(ctx context.Context, ref string, c TenantChange) (Tenant, error) {
	if c.Name != nil {
		if err := checkName(*c.Name); err != nil {
			return Tenant{}, err
		}
	}
	if _, err := checkRate("qps", c.QPS, defaultQPS); err != nil {
		return Tenant{}, err
	}
	return s.editTenant(ctx, ref, "tenant.set", func(t *Tenant) {
		if c.Name != nil {
			t.Name = *c.Name
		}
		if t.Name == "" {
			t.Name = t.Slug
		}
		if c.QPS != nil {
			t.QPS = *c.QPS
		}
	})
}

// editTenant stores what edit makes of a tenant's name, state and limit.
func (s *Store) editTenant(ctx context.Context, ref, action string, edit func(*Tenant)) (t Tenant, err error) {
	if !printable(ref) {
		return Tenant{}, notFound("tenant", "")
	}
	err = s.write(ctx, "change a tenant", func(ctx context.Context, tx pgx.Tx) ([]deed, error) {
		rows, err := tx.Query(ctx, `SELECT `+tenantColumns+` FROM tenants WHERE id = $1 OR slug = $1 FOR NO KEY UPDATE`, ref)
		if err != nil {
			return nil, err
		}
		if t, err = pgx.CollectExactlyOneRow(rows, scanTenant); err != nil {
			return nil, orNotFound(err, "tenant", ref)
		}
		before, changed := t, differences{}
		edit(&t)
		note(changed, "name", before.Name, t.Name)
		note(changed, "state", before.State, t.State)
		note(changed, "qps", before.QPS, t.QPS)
		if len(changed) == 0 {
			return nil, nil
		}
		err = tx.QueryRow(ctx, `UPDATE tenants SET name = $2, state = $3, qps = $4, updated_at = now() WHERE id = $1 RETURNING updated_at`,
			t.ID, t.Name, t.State, t.QPS).Scan(&t.UpdatedAt)
		return []deed{{Change{KindTenant, string(t.ID)}, action, t.ID, changed}}, err
	})
	if err != nil {
		return Tenant{}, err
	}
	return t, nil
}
