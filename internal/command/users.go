package command

import (
	"cmp"
	"context"
	"io"

	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/schemas"
)

// usersCommand is `ownllm users`.
type usersCommand struct {
	Create     usersCreate     `cmd:"" help:"Create a user of a tenant."`
	List       usersList       `cmd:"" help:"List the users."`
	Deactivate usersDeactivate `cmd:"" help:"Deactivate a user: their keys stop working within a second."`
	Activate   usersActivate   `cmd:"" help:"Activate a user again."`
}

// Help shows examples.
func (usersCommand) Help() string {
	return "Every key belongs to a user.\n\nExample:\n\n    ownllm users create --tenant acme --email ada@example.com"
}

type usersCreate struct {
	Tenant string `required:"" placeholder:"TENANT" help:"Slug or id of the tenant."`
	Email  string `required:"" placeholder:"EMAIL" help:"Address of the user; unique within the tenant."`
	AdminOptions
	Output
}

// Help shows examples.
func (usersCreate) Help() string {
	return "Example:\n\n    ownllm users create --tenant acme --email ada@example.com"
}

// Run creates the user.
func (c *usersCreate) Run(ctx context.Context, env *Environment) error {
	return one(env, c.AdminOptions, c.Output, func(api *adminapi.Client) (adminapi.User, error) {
		return api.CreateUser(ctx, adminapi.CreateUser{Tenant: c.Tenant, Email: c.Email})
	}, userTable)
}

type usersList struct {
	Tenant string `placeholder:"TENANT" help:"Only those of this tenant, named by slug or id."`
	AdminOptions
	Output
}

// Help shows examples.
func (usersList) Help() string {
	return "Examples:\n\n    ownllm users list\n    ownllm users list --tenant acme --json"
}

// Run lists the users.
func (c *usersList) Run(ctx context.Context, env *Environment) error {
	return many(env, c.AdminOptions, c.Output, func(api *adminapi.Client) ([]adminapi.User, error) {
		return api.Users(ctx, c.Tenant)
	}, userTable)
}

type usersDeactivate struct {
	ID schemas.UserID `arg:"" help:"Id of the user, usr_…; see ownllm users list."`
	AdminOptions
	Output
}

// Help shows examples.
func (usersDeactivate) Help() string {
	return "Requests with the user's keys get 403 user_deactivated until they are activated again.\n\n" +
		"Example:\n\n    ownllm users deactivate usr_01KAMPZ6V9J3M8R5T2W7X4Y0QB"
}

// Validate checks the id.
func (c *usersDeactivate) Validate() error { return checkID(string(c.ID), "usr_") }

// Run deactivates the user.
func (c *usersDeactivate) Run(ctx context.Context, env *Environment) error {
	return one(env, c.AdminOptions, c.Output, func(api *adminapi.Client) (adminapi.User, error) {
		return api.DeactivateUser(ctx, c.ID)
	}, userTable)
}

type usersActivate struct {
	ID schemas.UserID `arg:"" help:"Id of the user, usr_…; see ownllm users list."`
	AdminOptions
	Output
}

// Help shows examples.
func (usersActivate) Help() string {
	return "Example:\n\n    ownllm users activate usr_01KAMPZ6V9J3M8R5T2W7X4Y0QB"
}

// Validate checks the id.
func (c *usersActivate) Validate() error { return checkID(string(c.ID), "usr_") }

// Run activates the user.
func (c *usersActivate) Run(ctx context.Context, env *Environment) error {
	return one(env, c.AdminOptions, c.Output, func(api *adminapi.Client) (adminapi.User, error) {
		return api.ActivateUser(ctx, c.ID)
	}, userTable)
}

func userTable(w io.Writer, users ...adminapi.User) error {
	rows := make([][]string, len(users))
	for i, u := range users {
		rows[i] = []string{u.Email, string(u.ID), cmp.Or(u.TenantSlug, string(u.Tenant)), u.State, date(&u.CreatedAt, "")}
	}
	return table(w, []string{"EMAIL", "ID", "TENANT", "STATE", "CREATED"}, rows)
}
