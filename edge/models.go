package edge

import (
	"net/url"
	"strings"

	"github.com/gofiber/fiber/v2"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/presence"
	"github.com/ownllm/ownllm/schemas"
)

// modelEntry is a model as GET /v1/models shows it: OpenAI's fields and ours.
type modelEntry struct {
	ID             string               `json:"id"`
	Object         string               `json:"object"`
	Created        int64                `json:"created"`
	OwnedBy        string               `json:"owned_by"`
	Capabilities   schemas.Capabilities `json:"capabilities"`
	ContextWindow  int                  `json:"context_window"`
	SizeMB         int                  `json:"size_mb"`
	RuntimeProfile string               `json:"runtime_profile"`
}

func entry(m schemas.Model) modelEntry {
	return modelEntry{
		ID: m.ID, Object: "model", Created: m.Created, OwnedBy: "ownllm", Capabilities: m.Capabilities,
		ContextWindow: m.ContextWindow, SizeMB: m.SizeMB, RuntimeProfile: m.RuntimeProfile,
	}
}

// listModels answers GET /v1/models with what the tenant's agents have, cut down to
// the scopes of the key.
func (e *Edge) listModels(c *fiber.Ctx) error {
	in := callOf(c)
	if err := e.authenticate(c.UserContext(), c, in); err != nil {
		return err
	}
	id := in.identity
	models, reachable := e.Agents.Models(id.Tenant)
	if !reachable {
		return e.unreachable(id.Tenant, "")
	}
	list := struct {
		Object string       `json:"object"`
		Data   []modelEntry `json:"data"`
	}{"list", []modelEntry{}}
	for _, m := range models {
		if id.Allows(m.ID) {
			list.Data = append(list.Data, entry(m))
		}
	}
	return c.JSON(list)
}

// getModel answers GET /v1/models/{id}. Ids hold slashes and colons, which SDKs
// escape and people don't, so the path is taken as it was sent and unescaped once.
func (e *Edge) getModel(c *fiber.Ctx) error {
	in := callOf(c)
	if err := e.authenticate(c.UserContext(), c, in); err != nil {
		return err
	}
	id := in.identity
	raw := strings.TrimPrefix(string(c.Request().URI().PathOriginal()), "/v1/models/")
	name, err := url.PathUnescape(raw)
	if err != nil || name == "" {
		return schemas.Errorf(schemas.CodeInvalidValue, "The model id in the path isn't escaped correctly.").WithParam("model")
	}
	in.model = name
	m, err := e.findModel(id, name)
	if err != nil {
		return err
	}
	if _, reachable := e.Agents.Models(id.Tenant); !reachable {
		return e.unreachable(id.Tenant, name)
	}
	return c.JSON(entry(m))
}

// findModel returns a model that the key may see. A key that isn't scoped for a
// model hears the same whether the model exists or not.
func (e *Edge) findModel(id books.Identity, name string) (schemas.Model, error) {
	if !id.Allows(name) {
		return schemas.Model{}, schemas.Errorf(schemas.CodeScopeRequired,
			"Your key isn't scoped for the model %q. Ask for a key with the scope model:%s, or use another model.", name, name).WithParam("model")
	}
	m, ok := e.Agents.Find(id.Tenant, name)
	if ok {
		return m, nil
	}
	// Nobody can be said not to exist by an edge that has heard nobody yet.
	if !e.Feed.Ready() {
		return schemas.Model{}, e.unreachable(id.Tenant, name)
	}
	return schemas.Model{}, presence.NotFound(name)
}

// unreachable says why no agent can be asked: because all are away, or because this
// edge itself is cut off.
func (e *Edge) unreachable(tenant schemas.TenantID, model string) error {
	if !e.Feed.Connected() {
		return schemas.Errorf(schemas.CodeInternalError,
			"This server has lost its message bus and can't reach any GPU machine. Try again in a few seconds.").WithRetryAfter(learnWait)
	}
	if !e.Feed.Ready() {
		return schemas.Errorf(schemas.CodeInternalError,
			"This server has just started and doesn't know the GPU machines yet. Try again in a few seconds.").WithRetryAfter(learnWait)
	}
	return e.Agents.Away(tenant, model)
}
