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

// CreateUser makes a user. See WithIdempotency.
func (s *Store) CreateUser(ctx context.Context, n NewUser) (u User, err error) {
	if err := checkEmail(n.Email); err != nil {
		return User{}, err
	}
	err = s.write(ctx, "create a user", func(ctx context.Context, tx pgx.Tx) ([]deed, error) {
		id := schemas.NewUserID()
		made, err := claim(ctx, tx, "user.create", n, string(id))
		if err != nil {
			return nil, err
		}
		if made != "" {
			u, err = findUser(ctx, tx, schemas.UserID(made))
			return nil, err
		}
		t, err := getTenant(ctx, tx, n.Tenant)
		if err != nil {
			return nil, err
		}
		var d deed
		u, d, err = createUser(ctx, tx, id, t.ID, n.Email)
		return []deed{d}, err
	})
	if err != nil {
		return User{}, err
	}
	return u, nil
}

func createUser(ctx context.Context, tx pgx.Tx, id schemas.UserID, tenant schemas.TenantID, email string) (User, deed, error) {
	rows, err := tx.Query(ctx, `INSERT INTO users (id, tenant_id, email) VALUES ($1, $2, $3) RETURNING `+userColumns, id, tenant, email)
	if err != nil {
		return User{}, deed{}, err
	}
	u, err := pgx.CollectExactlyOneRow(rows, scanUser)
	return u, deed{Change{KindUser, string(id)}, "user.create", tenant, map[string]any{"email": email}}, err
}

// findUser finds a user of any tenant by id.
func findUser(ctx context.Context, q querier, id schemas.UserID) (User, error) {
	rows, err := q.Query(ctx, `SELECT `+userColumns+` FROM users WHERE id = $1`, id)
	if err != nil {
		return User{}, err
	}
	u, err := pgx.CollectExactlyOneRow(rows, scanUser)
	return u, orNotFound(err, "user", string(id))
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

// userNamed finds a user for a filter: like getUser, or if no tenant is given, by the id
// alone.
func userNamed(ctx context.Context, q querier, tenant schemas.TenantID, ref string) (User, error) {
	if tenant != "" {
		return getUser(ctx, q, tenant, ref)
	}
	if schemas.ValidateID(ref, "usr_") != nil {
		return User{}, invalid("user", "user must be an id (usr_…), or an e-mail address together with a tenant.")
	}
	return findUser(ctx, q, schemas.UserID(ref))
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

// ListUsers returns a page of the users of the tenant with the given id or slug, or of
// all tenants if that is empty, and the cursor of the next page.
func (s *Store) ListUsers(ctx context.Context, tenant string, page Page) (list []User, next string, err error) {
	limit, err := page.check("usr_")
	if err != nil {
		return nil, "", err
	}
	err = s.read(ctx, "list the users", func(ctx context.Context) error {
		query, args := `SELECT `+userColumns+` FROM users WHERE id > $1`, []any{page.After, limit}
		if tenant != "" {
			t, err := getTenant(ctx, s.pool, tenant)
			if err != nil {
				return err
			}
			query, args = query+` AND tenant_id = $3`, append(args, t.ID)
		}
		rows, err := s.pool.Query(ctx, query+` ORDER BY id LIMIT $2`, args...)
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

// SetUserState deactivates or activates a user. One that is in that state already stays
// as it is.
func (s *Store) SetUserState(ctx context.Context, id schemas.UserID, state UserState) (u User, err error) {
	action := map[UserState]string{UserActive: "user.activate", UserDeactivated: "user.deactivate"}[state]
	if action == "" {
		return User{}, invalid("state", "state must be %s or %s.", UserActive, UserDeactivated)
	}
	if schemas.ValidateID(string(id), "usr_") != nil {
		return User{}, notFound("user", string(id))
	}
	err = s.write(ctx, "set the state of a user", func(ctx context.Context, tx pgx.Tx) ([]deed, error) {
		rows, err := tx.Query(ctx, `SELECT `+userColumns+` FROM users WHERE id = $1 FOR NO KEY UPDATE`, id)
		if err != nil {
			return nil, err
		}
		if u, err = pgx.CollectExactlyOneRow(rows, scanUser); err != nil {
			return nil, orNotFound(err, "user", string(id))
		}
		changed := differences{}
		note(changed, "state", u.State, state)
		if len(changed) == 0 {
			return nil, nil
		}
		u.State = state
		err = tx.QueryRow(ctx, `UPDATE users SET state = $2, updated_at = now() WHERE id = $1 RETURNING updated_at`, id, state).Scan(&u.UpdatedAt)
		return []deed{{Change{KindUser, string(id)}, action, u.Tenant, changed}}, err
	})
	if err != nil {
		return User{}, err
	}
	return u, nil
}
