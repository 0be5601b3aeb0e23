package edge

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/gofiber/fiber/v2"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/schemas"
)

// adminRoutes serves the admin API; package adminapi describes it.
func (e *Edge) adminRoutes() {
	api := e.app.Group(adminapi.Prefix, e.admin)
	api.Post("/tenants", e.createTenant)
	api.Get("/tenants", e.listTenants)
	api.Post("/tenants/:tenant/suspend", e.setTenantState(books.TenantSuspended))
	api.Post("/tenants/:tenant/resume", e.setTenantState(books.TenantActive))
	api.Post("/users", e.createUser)
	api.Get("/users", e.listUsers)
	api.Post("/users/:user/deactivate", e.setUserState(books.UserDeactivated))
	api.Post("/users/:user/activate", e.setUserState(books.UserActive))
	api.Post("/keys", e.createKey)
	api.Get("/keys", e.listKeys)
	api.Post("/keys/:key/revoke", e.revokeKey)
	api.Get("/agents", e.listAgents)
	api.Get("/models", e.listAllModels)
	api.Get("/status", e.status)
}

// admin lets only the admin token through. The comparison takes the same time for
// any wrong token, whatever its length.
func (e *Edge) admin(c *fiber.Ctx) error {
	scheme, token, _ := strings.Cut(c.Get(fiber.HeaderAuthorization), " ")
	given, want := sha256.Sum256([]byte(strings.TrimSpace(token))), sha256.Sum256([]byte(e.cfg.AdminToken))
	if e.cfg.AdminToken == "" || !strings.EqualFold(scheme, "Bearer") || subtle.ConstantTimeCompare(given[:], want[:]) != 1 {
		return schemas.Errorf(schemas.CodeKeyInvalid, "The admin token is missing or wrong.")
	}
	return c.Next()
}

// adminBodyLimit bounds the body of an admin request, in bytes.
const adminBodyLimit = 1 << 20

// read decodes the body of an admin request. A field that isn't known is refused: it
// may be a misspelt limit.
func (e *Edge) read(c *fiber.Ctx, v any) error {
	var body io.Reader = strings.NewReader(string(c.Request().Body()))
	if stream := c.Context().RequestBodyStream(); stream != nil {
		body = stream
	}
	bounded := &io.LimitedReader{R: body, N: adminBodyLimit + 1}
	d := json.NewDecoder(bounded)
	d.DisallowUnknownFields()
	err := d.Decode(v)
	if err == nil {
		if _, more := d.Token(); !errors.Is(more, io.EOF) {
			err = errors.New("more than one value")
		}
	}
	var wrongType *json.UnmarshalTypeError
	switch {
	case bounded.N == 0:
		return schemas.Errorf(schemas.CodeRequestTooLarge, "The body is larger than the %d bytes that an admin request may have.", adminBodyLimit)
	case err == nil:
		return nil
	case errors.As(err, &wrongType) && wrongType.Field != "":
		return schemas.Errorf(schemas.CodeInvalidValue, "%s can't be a JSON %s.", wrongType.Field, wrongType.Value).WithParam(wrongType.Field)
	case strings.HasPrefix(err.Error(), "json: unknown field "):
		name := strings.Trim(strings.TrimPrefix(err.Error(), "json: unknown field "), `"`)
		return schemas.Errorf(schemas.CodeInvalidValue, "There is no field %q.", name).WithParam(name)
	}
	return schemas.Errorf(schemas.CodeInvalidJSON, "The body isn't a JSON object.")
}

func page(c *fiber.Ctx) (books.Page, error) {
	p := books.Page{Limit: adminapi.DefaultLimit, After: c.Query("after")}
	if limit := c.Query("limit"); limit != "" {
		n, err := strconv.Atoi(limit)
		if err != nil || n < 1 || n > adminapi.MaxLimit {
			return p, schemas.Errorf(schemas.CodeInvalidValue, "limit has to be a number from 1 to %d.", adminapi.MaxLimit).WithParam("limit")
		}
		p.Limit = n
	}
	return p, nil
}

// sendList sends a page of a list.
func sendList[T, U any](c *fiber.Ctx, list []T, next string, err error, wire func(T) U) error {
	if err != nil {
		return err
	}
	out := adminapi.List[U]{Data: make([]U, 0, len(list)), HasMore: next != "", Next: next}
	for _, v := range list {
		out.Data = append(out.Data, wire(v))
	}
	return c.JSON(out)
}

func sendOne[T, U any](c *fiber.Ctx, status int, v T, err error, wire func(T) U) error {
	if err != nil {
		return err
	}
	return c.Status(status).JSON(wire(v))
}

func wireTenant(t books.Tenant) adminapi.Tenant {
	return adminapi.Tenant{ID: t.ID, Slug: t.Slug, State: string(t.State), CreatedAt: t.CreatedAt}
}

func wireUser(u books.User) adminapi.User {
	return adminapi.User{
		ID: u.ID, Tenant: u.Tenant, TenantSlug: u.Slug, Email: u.Email, State: string(u.State), CreatedAt: u.CreatedAt,
	}
}

func wireKey(k books.Key) adminapi.Key {
	state := adminapi.KeyActive
	switch {
	case k.RevokedAt != nil:
		state = adminapi.KeyRevoked
	case k.ExpiresAt != nil && k.ExpiresAt.Before(time.Now()):
		state = adminapi.KeyExpired
	}
	return adminapi.Key{
		ID: k.ID, Tenant: k.Tenant, TenantSlug: k.Slug, User: k.User, Email: k.Email, Name: k.Name,
		Prefix: k.Prefix, Scopes: k.Scopes, State: state,
		CreatedAt: k.CreatedAt, ExpiresAt: k.ExpiresAt, RevokedAt: k.RevokedAt,
	}
}

func (e *Edge) createTenant(c *fiber.Ctx) error {
	var in adminapi.CreateTenant
	if err := e.read(c, &in); err != nil {
		return err
	}
	t, err := e.Books.CreateTenant(c.UserContext(), books.NewTenant{Slug: in.Slug})
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

func (e *Edge) setTenantState(state books.TenantState) fiber.Handler {
	return func(c *fiber.Ctx) error {
		t, err := e.Books.SetTenantState(c.UserContext(), c.Params("tenant"), state)
		return sendOne(c, fiber.StatusOK, t, err, wireTenant)
	}
}

func (e *Edge) createUser(c *fiber.Ctx) error {
	var in adminapi.CreateUser
	if err := e.read(c, &in); err != nil {
		return err
	}
	u, err := e.Books.CreateUser(c.UserContext(), books.NewUser{Tenant: in.Tenant, Email: in.Email})
	return sendOne(c, fiber.StatusCreated, u, err, wireUser)
}

func (e *Edge) listUsers(c *fiber.Ctx) error {
	p, err := page(c)
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

func (e *Edge) createKey(c *fiber.Ctx) error {
	var in adminapi.CreateKey
	if err := e.read(c, &in); err != nil {
		return err
	}
	n := books.NewKey{Tenant: in.Tenant, User: in.User, Name: in.Name, Scopes: in.Scopes}
	if in.TTLSeconds != 0 {
		ttl := time.Duration(in.TTLSeconds) * time.Second
		if in.TTLSeconds < 0 || ttl/time.Second != time.Duration(in.TTLSeconds) {
			return schemas.Errorf(schemas.CodeInvalidValue, "ttl_seconds has to be a number of seconds from now.").WithParam("ttl_seconds")
		}
		n.TTL = &ttl
	}
	k, secret, err := e.Books.CreateKey(c.UserContext(), n)
	return sendOne(c, fiber.StatusCreated, k, err, func(k books.Key) adminapi.CreatedKey {
		return adminapi.CreatedKey{Key: wireKey(k), Secret: secret.Reveal()}
	})
}

func (e *Edge) listKeys(c *fiber.Ctx) error {
	p, err := page(c)
	if err != nil {
		return err
	}
	list, next, err := e.Books.ListKeys(c.UserContext(), c.Query("tenant"), c.Query("user"), p)
	return sendList(c, list, next, err, wireKey)
}

func (e *Edge) revokeKey(c *fiber.Ctx) error {
	k, err := e.Books.RevokeKey(c.UserContext(), schemas.KeyID(c.Params("key")))
	return sendOne(c, fiber.StatusOK, k, err, wireKey)
}
