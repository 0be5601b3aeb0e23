package edge

import (
	"github.com/gofiber/fiber/v2"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/schemas"
)

func wireTenant(t books.Tenant) adminapi.Tenant {
	return adminapi.Tenant{ID: t.ID, Slug: t.Slug, Name: t.Name, State: string(t.State), QPS: t.QPS, CreatedAt: t.CreatedAt}
}

func (e *Edge) createTenant(c *fiber.Ctx) error {
	var in adminapi.CreateTenant
	if err := e.read(c, &in); err != nil {
		return err
	}
	t, err := e.Books.CreateTenant(named(c), books.NewTenant{Slug: in.Slug, Name: in.Name, QPS: in.QPS})
	return sendOne(c, fiber.StatusCreated, t, err, wireTenant)
}

func (e *Edge) listTenants(c *fiber.Ctx) error {
	p, err := page(c)
	if err != nil {
		return err
	}
	list, next, err := e.Books.ListTenants(c.UserContext(), p)
	return sendList(c, list, next, err, wireTenant)
}

func (e *Edge) changeTenant(c *fiber.Ctx) error {
	var in adminapi.ChangeTenant
	if err := e.read(c, &in); err != nil {
		return err
	}
	t, err := e.Books.SetTenant(c.UserContext(), c.Params("tenant"), books.TenantChange{Name: in.Name, QPS: in.QPS})
	return sendOne(c, fiber.StatusOK, t, err, wireTenant)
}

func (e *Edge) setTenantState(state books.TenantState) fiber.Handler {
	return func(c *fiber.Ctx) error {
		t, err := e.Books.SetTenantState(c.UserContext(), c.Params("tenant"), state)
		return sendOne(c, fiber.StatusOK, t, err, wireTenant)
	}
}

func wireUser(u books.User) adminapi.User {
	return adminapi.User{
		ID: u.ID, Tenant: u.Tenant, TenantSlug: u.Slug, Email: u.Email, State: string(u.State), CreatedAt: u.CreatedAt,
	}
}

func (e *Edge) createUser(c *fiber.Ctx) error {
	var in adminapi.CreateUser
	if err := e.read(c, &in); err != nil {
		return err
	}
	u, err := e.Books.CreateUser(named(c), books.NewUser{Tenant: in.Tenant, Email: in.Email})
	return sendOne(c, fiber.StatusCreated, u, err, wireUser)
}

func (e *Edge) listUsers(c *fiber.Ctx) error {
	p, err := page(c, "tenant")
	if err != nil {
		return err
	}
	list, next, err := e.Books.ListUsers(c.UserContext(), c.Query("tenant"), p)
	return sendList(c, list, next, err, wireUser)
}

func (e *Edge) setUserState(state books.UserState) fiber.Handler {
	return func(c *fiber.Ctx) error {
		u, err := e.Books.SetUserState(c.UserContext(), schemas.UserID(c.Params("user")), state)
		return sendOne(c, fiber.StatusOK, u, err, wireUser)
	}
}
