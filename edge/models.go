package edge

import (
	"net/url"
	"strings"

	"github.com/gofiber/fiber/v2"

	"github.com/ownllm/ownllm/schemas"
)

// listModels answers GET /v1/models with what the tenant's agents have, cut down to
// the scopes of the key.
func (e *Edge) listModels(c *fiber.Ctx) error {
	in := callOf(c)
	if err := e.authenticate(c.UserContext(), c, in); err != nil {
		return err
	}
	models, err := e.Desk.Models(in.identity)
	if err != nil {
		return err
	}
	return c.JSON(struct {
		Object string               `json:"object"`
		Data   []schemas.ModelEntry `json:"data"`
	}{"list", models})
}

// getModel answers GET /v1/models/{id}. Ids hold slashes and colons, which SDKs
// escape and people don't, so the path is taken as it was sent and unescaped once.
func (e *Edge) getModel(c *fiber.Ctx) error {
	in := callOf(c)
	if err := e.authenticate(c.UserContext(), c, in); err != nil {
		return err
	}
	raw := strings.TrimPrefix(string(c.Request().URI().PathOriginal()), "/v1/models/")
	name, err := url.PathUnescape(raw)
	if err != nil || name == "" {
		return schemas.Errorf(schemas.CodeInvalidValue, "The model id in the path isn't escaped correctly.").WithParam("model")
	}
	in.model = name
	m, err := e.Desk.Reachable(in.identity, name)
	if err != nil {
		return err
	}
	return c.JSON(m)
}
