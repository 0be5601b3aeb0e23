package edge

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/gofiber/fiber/v2"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/presence"
	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/schemas"
)

// listAgents answers with the agents as this edge sees them.
func (e *Edge) listAgents(c *fiber.Ctx) error {
	tenant, err := e.tenantFilter(c)
	if err != nil {
		return err
	}
	return c.JSON(adminapi.List[adminapi.Agent]{Data: e.agents(c.UserContext(), tenant)})
}

// tenantFilter is the tenant that a list is cut down to, or empty.
func (e *Edge) tenantFilter(c *fiber.Ctx) (schemas.TenantID, error) {
	ref := c.Query("tenant")
	if ref == "" {
		return "", nil
	}
	t, err := e.Books.GetTenant(c.UserContext(), ref)
	return t.ID, err
}

// lateAfter is when an agent that counts as here is shown as stale: it has missed a
// beat, and is being looked after.
const lateAfter = 2 * time.Second

func (e *Edge) agents(ctx context.Context, tenant schemas.TenantID) []adminapi.Agent {
	agents := e.Agents.Agents(tenant)
	queued := e.queued(ctx, agents)
	out := make([]adminapi.Agent, 0, len(agents))
	for _, a := range agents {
		w := adminapi.Agent{
			ID: a.Agent, Tenant: a.Tenant, Name: a.Name, State: agentState(a, time.Now()),
			Running: a.Running, Waiting: a.Waiting, Slots: a.Slots, Models: []adminapi.AgentModel{},
		}
		if !a.LastSeen.IsZero() {
			seen := a.LastSeen.UTC().Round(time.Millisecond)
			w.LastSeen = &seen
		}
		for _, m := range a.Models {
			w.Models = append(w.Models, adminapi.AgentModel{
				ID: m.ID, State: m.State, Backend: m.Backend, Capabilities: m.Capabilities, Detail: m.Detail,
				ContextWindow: m.ContextWindow, SizeMB: m.SizeMB,
				Queued: int(queued[schemas.JobSubject(a.Tenant, a.Agent, m.ID)]),
			})
		}
		out = append(out, w)
	}
	return out
}

// depthWait bounds the question for the depths of queues: a status without them is
// better than none.
const depthWait = time.Second

// queued asks for the depths of the queues of some agents, by subject.
func (e *Edge) queued(ctx context.Context, agents []presence.AgentStatus) map[string]uint64 {
	ctx, cancel := context.WithTimeout(ctx, depthWait)
	defer cancel()
	all := make(map[string]uint64)
	asked := make(map[schemas.TenantID]bool)
	for _, a := range agents {
		if asked[a.Tenant] {
			continue
		}
		asked[a.Tenant] = true
		depths, err := e.Queue.Depths(ctx, a.Tenant)
		if err != nil {
			if !bus.Down(err) {
				e.Log.WarnContext(ctx, "queue depths unknown", "tenant", a.Tenant, "error", err)
			}
			return all
		}
		for subject, n := range depths {
			all[subject] = n
		}
	}
	return all
}

func agentState(a presence.AgentStatus, now time.Time) string {
	switch {
	case a.State == "":
		return adminapi.AgentOffline
	case a.State == schemas.AgentDraining:
		return adminapi.AgentDraining
	case now.Sub(a.LastSeen) > lateAfter:
		return adminapi.AgentStale
	}
	return adminapi.AgentUp
}

// listAllModels answers with the models of all agents, as an admin sees them.
func (e *Edge) listAllModels(c *fiber.Ctx) error {
	tenant, err := e.tenantFilter(c)
	if err != nil {
		return err
	}
	type key struct {
		tenant schemas.TenantID
		id     string
	}
	found := make(map[key]*adminapi.Model)
	for _, a := range e.Agents.Agents(tenant) {
		for _, m := range a.Models {
			k := key{a.Tenant, m.ID}
			if found[k] == nil {
				best, _ := e.Agents.Find(a.Tenant, m.ID)
				found[k] = &adminapi.Model{
					ID: m.ID, Tenant: a.Tenant, State: best.State, Capabilities: best.Capabilities,
					ContextWindow: best.ContextWindow, SizeMB: best.SizeMB,
				}
			}
			found[k].Agents = append(found[k].Agents, a.Agent)
		}
	}
	list := adminapi.List[adminapi.Model]{Data: make([]adminapi.Model, 0, len(found))}
	for _, m := range found {
		list.Data = append(list.Data, *m)
	}
	slices.SortFunc(list.Data, func(a, b adminapi.Model) int {
		return cmp.Or(cmp.Compare(a.Tenant, b.Tenant), cmp.Compare(a.ID, b.ID))
	})
	return c.JSON(list)
}

// status answers with all that this edge can see.
func (e *Edge) status(c *fiber.Ctx) error {
	r := e.Readiness(c.UserContext())
	s := adminapi.Status{
		Version: e.cfg.Version, Ready: r.Ready, Postgres: r.Postgres, NATS: r.NATS,
		Agents: e.agents(c.UserContext(), ""),
	}
	return c.JSON(s)
}
