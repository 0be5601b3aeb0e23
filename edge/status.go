package edge

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/gofiber/fiber/v2"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/presence"
	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/schemas"
)

// listAgents answers with the agents as this edge sees them.
func (e *Edge) listAgents(c *fiber.Ctx) error {
	p, tenant, err := e.tenantPage(c)
	if err != nil {
		return err
	}
	list, next := cut(e.Agents.Agents(tenant), p, func(a presence.AgentStatus) string { return position(a.Tenant, string(a.Agent)) })
	agents := e.wireAgents(c.UserContext(), list)
	e.addMachines(c.UserContext(), agents)
	return sendList(c, agents, next, nil, func(a adminapi.Agent) adminapi.Agent { return a })
}

// tenantPage reads which page of a list of things of tenants is asked for, and of which
// tenant; empty: of all.
func (e *Edge) tenantPage(c *fiber.Ctx) (books.Page, schemas.TenantID, error) {
	p, err := page(c, "tenant")
	if err != nil {
		return p, "", err
	}
	if p.After != "" {
		tenant, _, ok := strings.Cut(p.After, "/")
		if !ok || schemas.ValidateID(tenant, "ten_") != nil {
			return p, "", refuse("after", "after must be the next of the page before of the same list.")
		}
	}
	ref := c.Query("tenant")
	if ref == "" {
		return p, "", nil
	}
	t, err := e.Books.GetTenant(c.UserContext(), ref)
	return p, t.ID, err
}

// position is the cursor of a thing of a tenant, in lists that are in the order of
// tenants. All their ids are of the same length, so it sorts as the two do.
func position(tenant schemas.TenantID, id string) string { return string(tenant) + "/" + id }

// lateAfter is when an agent that counts as here is shown as stale: it has missed a
// beat, and is being looked after.
const lateAfter = 2 * time.Second

func (e *Edge) wireAgents(ctx context.Context, agents []presence.AgentStatus) []adminapi.Agent {
	queued := e.queued(ctx, agents)
	slugs := slugsOf(ctx, e, agents, func(a presence.AgentStatus) schemas.TenantID { return a.Tenant })
	out := make([]adminapi.Agent, 0, len(agents))
	for _, a := range agents {
		w := adminapi.Agent{
			ID: a.Agent, Tenant: a.Tenant, TenantSlug: slugs[a.Tenant], Name: a.Name, State: agentState(a, time.Now()),
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
	of := make(map[schemas.TenantID][]schemas.AgentID)
	for _, a := range agents {
		of[a.Tenant] = append(of[a.Tenant], a.Agent)
	}
	for tenant, ids := range of {
		depths, err := e.Queue.Depths(ctx, tenant, ids...)
		if err != nil {
			if !bus.Down(err) {
				e.Log.WarnContext(ctx, "queue depths unknown", "tenant", tenant, "error", err)
			}
			return all
		}
		maps.Copy(all, depths)
	}
	return all
}

func agentState(a presence.AgentStatus, now time.Time) string {
	switch {
	case a.Aside:
		return adminapi.AgentTunnelDown
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
	p, tenant, err := e.tenantPage(c)
	if err != nil {
		return err
	}
	cursor := func(m adminapi.Model) string { return position(m.Tenant, m.ID) }
	list := e.allModels(tenant)
	slices.SortFunc(list, func(a, b adminapi.Model) int { return cmp.Compare(cursor(a), cursor(b)) })
	list, next := cut(list, p, cursor)
	if len(list) > 0 {
		err = e.addPrices(c.UserContext(), list)
	}
	return sendList(c, list, next, err, func(m adminapi.Model) adminapi.Model { return m })
}

// allModels are the models of a tenant, or of all, in no order.
func (e *Edge) allModels(tenant schemas.TenantID) []adminapi.Model {
	found := make(map[string]*adminapi.Model)
	for _, a := range e.Agents.Agents(tenant) {
		for _, m := range a.Models {
			k := position(a.Tenant, m.ID)
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
	list := make([]adminapi.Model, 0, len(found))
	for _, m := range found {
		list = append(list, *m)
	}
	return list
}

// addPrices completes models by their prices and the slugs of their tenants.
func (e *Edge) addPrices(ctx context.Context, models []adminapi.Model) error {
	slugs := slugsOf(ctx, e, models, func(m adminapi.Model) schemas.TenantID { return m.Tenant })
	prices := make(map[string]adminapi.Cents)
	for p := (books.Page{Limit: 1000}); ; {
		list, next, err := e.Books.ListPrices(ctx, "", p)
		if err != nil {
			return err
		}
		for _, price := range list {
			prices[position(price.Tenant, price.Model)] = adminapi.Cents(price.MicroCents)
		}
		if p.After = next; next == "" {
			break
		}
	}
	for i := range models {
		m := &models[i]
		m.TenantSlug = slugs[m.Tenant]
		price, ok := prices[position(m.Tenant, m.ID)]
		if !ok {
			price, ok = prices[position("", m.ID)] // everybody's
		}
		if ok {
			m.CentsPer1kTokens = &price
		}
	}
	return nil
}

// status answers with all that this edge can see.
func (e *Edge) status(c *fiber.Ctx) error {
	r := e.Readiness(c.UserContext())
	s := adminapi.Status{
		Version: e.cfg.Version, Ready: r.Ready, Postgres: r.Postgres, NATS: r.NATS,
		Agents: e.wireAgents(c.UserContext(), e.Agents.Agents("")),
	}
	if r.Postgres == adminapi.DependencyOK {
		e.addMachines(c.UserContext(), s.Agents)
	}
	return c.JSON(s)
}
