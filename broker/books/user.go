package books

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/ownllm/ownllm/schemas"
)

// UserState is whether a user's keys are accepted.
type UserState string

const (
	// UserActive is the normal state.
	UserActive UserState = "active"
	// UserDeactivated turns every key of the user away.
	UserDeactivated UserState = "deactivated"
)

// User is a person, or a machine account, of one tenant.
type User struct {
	ID     schemas.UserID   `json:"id"`
	Tenant schemas.TenantID `json:"tenant_id"`
	Slug   string           `json:"tenant_slug"`
	// Email is unique within the tenant, whatever its case.
	Email     string    `json:"email"`
	State     UserState `json:"state"`
	CreatedAt time.Time `json:"created_at"`
	UpdatedAt time.Time `json:"updated_at"`
}

// NewUser is what a user is made of.
type NewUser struct {
	Tenant string // id or slug
	Email  string
}

const userColumns = `id, tenant_id, (SELECT slug FROM tenants WHERE tenants.id = users.tenant_id), email, state, created_at, updated_at`

func scanUser(row pgx.CollectableRow) (User, error) {
	var u User
	err := row.Scan(&u.ID, &u.Tenant, &u.Slug, &u.Email, &u.State, &u.CreatedAt, &u.UpdatedAt)
	return u, err
}

// CreateUser makes a user.
func (s *Store) CreateUser(ctx context.Context, n NewUser) (u User, err error) {
	if err := checkEmail(n.Email); err != nil {
		return User{}, err
	}
	err = s.write(ctx, "create a user", func(ctx context.Context, tx pgx.Tx) ([]Change, error) {
		t, err := getTenant(ctx, tx, n.Tenant)
		if err != nil {
			return nil, err
		}
		u, err = createUser(ctx, tx, t.ID, n.Email)
		return []Change{{KindUser, string(u.ID)}}, err
	})
	if err != nil {
		return User{}, err
	}
	return u, nil
}

func createUser(ctx context.Context, tx pgx.Tx, tenant schemas.TenantID, email string) (User, error) {
	rows, err := tx.Query(ctx, `INSERT INTO users (id, tenant_id, email) VALUES ($1, $2, $3) RETURNING `+userColumns,
		schemas.NewUserID(), tenant, email)
	if err != nil {
		return User{}, err
	}
	return pgx.CollectExactlyOneRow(rows, scanUser)
}

// getUser finds a user of the tenant by id or e-mail address; an id can't be an
// address, for it has no @.
func getUser(ctx context.Context, q querier, tenant schemas.TenantID, ref string) (User, error) {
	if !printable(ref) {
		return User{}, notFound("user", "")
	}
	rows, err := q.Query(ctx, `SELECT `+userColumns+` FROM users WHERE tenant_id = $1 AND (id = $2 OR lower(email) = lower($2))`, tenant, ref)
	if err != nil {
		return User{}, err
	}
	u, err := pgx.CollectExactlyOneRow(rows, scanUser)
	return u, orNotFound(err, "user", ref)
}

// GetUser returns the user with the given id or e-mail address, of the tenant with
// the given id or slug.
func (s *Store) GetUser(ctx context.Context, tenant, ref string) (u User, err error) {
	err = s.read(ctx, "get a user", func(ctx context.Context) error {
		t, err := getTenant(ctx, s.pool, tenant)
		if err != nil {
			return err
		}
		u, err = getUser(ctx, s.pool, t.ID, ref)
		return err
	})
	return u, err
}

// ListUsers returns a page of the users of the tenant with the given id or slug, and
// the cursor of the next page.
func (s *Store) ListUsers(ctx context.Context, tenant string, page Page) (list []User, next string, err error) {
	limit, err := page.check("usr_")
	if err != nil {
		return nil, "", err
	}
	err = s.read(ctx, "list the users", func(ctx context.Context) error {
		t, err := getTenant(ctx, s.pool, tenant)
		if err != nil {
			return err
		}
		rows, err := s.pool.Query(ctx, `SELECT `+userColumns+` FROM users WHERE tenant_id = $1 AND id > $2 ORDER BY id LIMIT $3`,
			t.ID, page.After, limit)
		if err != nil {
			return err
		}
		list, err = pgx.CollectRows(rows, scanUser)
		return err
	})
	if err != nil {
		return nil, "", err
	}
	list, next = cut(list, limit, func(u User) string { return string(u.ID) })
	return list, next, nil
}

// SetUserState deactivates or activates a user.
func (s *Store) SetUserState(ctx context.Context, id schemas.UserID, state UserState) (u User, err error) {
	if state != UserActive && state != UserDeactivated {
		return User{}, invalid("state", "state must be %s or %s.", UserActive, UserDeactivated)
	}
	if schemas.ValidateID(string(id), "usr_") != nil {
		return User{}, notFound("user", string(id))
	}
	err = s.write(ctx, "set the state of a user", func(ctx context.Context, tx pgx.Tx) ([]Change, error) {
		rows, err := tx.Query(ctx, `UPDATE users SET state = $2, updated_at = now() WHERE id = $1 RETURNING `+userColumns, id, state)
		if err != nil {
			return nil, err
		}
		u, err = pgx.CollectExactlyOneRow(rows, scanUser)
		return []Change{{KindUser, string(id)}}, orNotFound(err, "user", string(id))
	})
	if err != nil {
		return User{}, err
	}
	return u, nil
}
