package edge

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"slices"
	"strconv"
	"strings"

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
	api.Patch("/tenants/:tenant", e.changeTenant)
	api.Post("/tenants/:tenant/suspend", e.setTenantState(books.TenantSuspended))
	api.Post("/tenants/:tenant/resume", e.setTenantState(books.TenantActive))
	api.Post("/users", e.createUser)
	api.Get("/users", e.listUsers)
	api.Post("/users/:user/deactivate", e.setUserState(books.UserDeactivated))
	api.Post("/users/:user/activate", e.setUserState(books.UserActive))
	api.Post("/keys", e.createKey)
	api.Get("/keys", e.listKeys)
	api.Patch("/keys/:key", e.changeKey)
	api.Post("/keys/:key/rotate", e.rotateKey)
	api.Post("/keys/:key/revoke", e.revokeKey)
	api.Get("/agents", e.listAgents)
	api.Post("/agents/pairings", e.createPairing)
	api.Delete("/agents/:agent", e.removeAgent)
	api.Get("/models", e.listAllModels)
	api.Put("/prices", e.setPrice)
	api.Get("/prices", e.listPrices)
	api.Get("/usage", e.usage)
	api.Get("/audit", e.listAudit)
	api.Get("/status", e.status)
	api.Get("/openapi.json", openAPI)
}

// admin lets only the admin token through. The comparison takes the same time for
// any wrong token, whatever its length.
func (e *Edge) admin(c *fiber.Ctx) error {
	scheme, token, _ := strings.Cut(c.Get(fiber.HeaderAuthorization), " ")
	given, want := sha256.Sum256([]byte(strings.TrimSpace(token))), sha256.Sum256([]byte(e.cfg.AdminToken))
	if e.cfg.AdminToken == "" || !strings.EqualFold(scheme, "Bearer") || subtle.ConstantTimeCompare(given[:], want[:]) != 1 {
		return schemas.Errorf(schemas.CodeKeyInvalid, "The admin token is missing or wrong.")
	}
	in := callOf(c)
	c.SetUserContext(books.WithActor(c.UserContext(), books.Actor{Name: "admin", Request: string(in.id), Address: in.addr.String()}))
	return c.Next()
}

// openAPI answers with the description of all routes.
func openAPI(c *fiber.Ctx) error {
	c.Set(fiber.HeaderContentType, fiber.MIMEApplicationJSON)
	return c.Send(schemas.OpenAPI)
}

// named is the context for what makes something: it has the request's Idempotency-Key.
func named(c *fiber.Ctx) context.Context {
	return books.WithIdempotency(c.UserContext(), c.Get(adminapi.IdempotencyHeader))
}

// refuse says what is wrong with a field, a query parameter or a header.
func refuse(param, format string, args ...any) *schemas.Error {
	return schemas.Errorf(schemas.CodeInvalidValue, format, args...).WithParam(param)
}

// query checks that an address has no parameters but those that are known, each once: a
// misspelt filter would be one that lets everything through.
func query(c *fiber.Ctx, known ...string) error {
	seen := make(map[string]bool)
	for name := range c.Context().QueryArgs().All() {
		switch name := string(name); {
		case !slices.Contains(known, name):
			name = clip(name)
			return refuse(name, "There is no parameter %q here; there are: %s.", name, strings.Join(known, ", "))
		case seen[name]:
			return refuse(name, "%s is given twice.", name)
		default:
			seen[name] = true
		}
	}
	return nil
}

// page reads which page of a list is asked for. filters are the parameters that the list
// has besides.
func page(c *fiber.Ctx, filters ...string) (books.Page, error) {
	p := books.Page{Limit: adminapi.DefaultLimit, After: c.Query("after")}
	if err := query(c, append(filters, "limit", "after")...); err != nil {
		return p, err
	}
	if limit := c.Query("limit"); limit != "" {
		n, err := strconv.Atoi(limit)
		if err != nil || n < 1 || n > adminapi.MaxLimit {
			return p, refuse("limit", "limit has to be a number from 1 to %d.", adminapi.MaxLimit)
		}
		p.Limit = n
	}
	return p, nil
}

// cut returns a page of a list that is here as a whole, and the cursor of the next one.
// The list is in the order of its cursors.
func cut[T any](list []T, p books.Page, cursor func(T) string) (page []T, next string) {
	for len(list) > 0 && cursor(list[0]) <= p.After {
		list = list[1:]
	}
	if len(list) > p.Limit {
		return list[:p.Limit], cursor(list[p.Limit-1])
	}
	return list, ""
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
