package presence

import (
	"fmt"
	"slices"
	"time"

	"github.com/ownllm/ownllm/schemas"
)

// Choice is the agent that is to run a request.
type Choice struct {
	Agent       schemas.AgentID
	Incarnation schemas.Incarnation
	Model       schemas.Model
	// Protocol is the version of the bus protocol to speak with the agent: the newest that it
	// and this build know.
	Protocol int
	// Holds says that the agent heeds Job.Hold.
	Holds bool
}

// Route picks the agent for a model: of those that are here and can run it, the ones
// with the model in memory come first, then the least loaded. The caller owes a
// Release for every Choice. Agents in exclude are passed over.
//
// A model that is loading can be picked: how long the request waits for it, and when it
// gets model_loading instead, its worker decides.
//
// When nobody can, the error says why, in this order: nobody has ever had the model
// (model_not_found), its backend is down on an agent that is here (backend_error), those
// who have it are on their way out (agent_offline), one of them is running, and only its
// link to the bus is down (tunnel_down), or they are away (agent_offline).
func (t *Table) Route(tenant schemas.TenantID, model string, exclude map[schemas.AgentID]bool) (Choice, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.shelves[shelfKey{tenant, model}]
	if s == nil {
		return Choice{}, NotFound(model)
	}
	if p := s.pick(0, exclude); p != nil {
		p.agent.assigned[model]++
		p.agent.underWay++
		t.moved(p.agent)
		return Choice{p.agent.id, p.agent.incarnation, *p.model, min(p.agent.protocol, schemas.ProtocolVersion), p.agent.holds}, nil
	}
	var failed *schemas.Model
	draining, aside := false, false
	for _, p := range s.places {
		a := p.agent
		aside = aside || a.state == "" && !a.aside.IsZero()
		switch {
		case exclude[a.id] || a.state == "":
		case a.state == schemas.AgentDraining:
			draining = true
		case p.model.State == schemas.ModelFailed:
			failed = p.model
		}
	}
	switch {
	case failed != nil:
		return Choice{}, failedError(failed)
	case draining:
		return Choice{}, schemas.Errorf(schemas.CodeAgentOffline,
			"The GPU machine that serves %q is shutting down. Try again in a few seconds, or look at `ownllm status`.", model).WithRetryAfter(5 * time.Second)
	}
	return Choice{}, away(model, aside)
}

// Away says why no agent of the tenant that has the model can be asked; an empty model
// stands for all.
func (t *Table) Away(tenant schemas.TenantID, model string) *schemas.Error {
	t.mu.Lock()
	defer t.mu.Unlock()
	aside := func(a *agent) bool { return a.state == "" && !a.aside.IsZero() }
	if model != "" {
		s := t.shelves[shelfKey{tenant, model}]
		return away(model, s != nil && slices.ContainsFunc(s.places, func(p *place) bool { return aside(p.agent) }))
	}
	for _, a := range t.tenants[tenant] {
		if aside(a) {
			return away("", true)
		}
	}
	return away("", false)
}

// NotFound is the error for a model that no agent of the tenant has.
func NotFound(model string) *schemas.Error {
	return schemas.Errorf(schemas.CodeModelNotFound,
		"The model %q doesn't exist on any of your GPU machines. GET /v1/models lists what there is.", model).WithParam("model")
}

// away is the error for a model whose agents are all away; an empty model stands for all
// models of the tenant. aside says that one of them is heard of over HTTPS.
func away(model string, aside bool) *schemas.Error {
	if aside {
		what := "A GPU machine of yours"
		if model != "" {
			what = fmt.Sprintf("The GPU machine that serves %q", model)
		}
		return schemas.Errorf(schemas.CodeTunnelDown,
			"%s is running and reaches this server over HTTPS, but its connection to the message bus is down. It keeps trying; if that lasts, look at the worker's log and at the way from there to NATS.", what).WithRetryAfter(5 * time.Second)
	}
	what := "No GPU machine of yours is connected"
	if model != "" {
		what = fmt.Sprintf("No GPU machine that serves %q is connected", model)
	}
	return schemas.Errorf(schemas.CodeAgentOffline,
		"%s. Check that it is switched on and that its worker runs; `ownllm status` shows when it was last seen.", what).WithRetryAfter(5 * time.Second)
}

func failedError(m *schemas.Model) *schemas.Error {
	detail := m.Detail
	if detail == "" {
		detail = "its inference backend isn't answering"
	}
	return schemas.Errorf(schemas.CodeBackendError, "The model %q can't answer: %s.", m.ID, detail).WithRetryAfter(5 * time.Second)
}

// better reports whether the model on agent a is to be preferred to the one on b.
func better(a *agent, m *schemas.Model, b *agent, n *schemas.Model) bool {
	if ra, rb := stateRank(m.State), stateRank(n.State); ra != rb {
		return ra < rb
	}
	la, lb := a.load(), b.load()
	if la != lb {
		return la < lb
	}
	return a.id < b.id
}

// load is how full the agent is, 1 meaning that all its slots are taken. The last
// heartbeat can be a second old, so what this process itself has sent counts at least.
func (a *agent) load() float64 {
	return float64(max(a.running+a.waiting, a.underWay)) / float64(max(a.slots, 1))
}

// standing is what decides about an agent's places on its shelves.
type standing struct {
	state schemas.AgentState
	load  float64
	slots int
}

func (a *agent) standing() standing { return standing{a.state, a.load(), a.slots} }

// Release takes back one Choice.
func (t *Table) Release(tenant schemas.TenantID, id schemas.AgentID, model string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	a := t.tenants[tenant][id]
	if a == nil || a.assigned[model] == 0 {
		return
	}
	if a.assigned[model]--; a.assigned[model] == 0 {
		delete(a.assigned, model)
	}
	a.underWay--
	t.moved(a)
}

// Capacity says how many requests the agents that can run the model now run at once, over
// all their models, and how many this process has under way at them. Both are 0 if there is
// none.
func (t *Table) Capacity(tenant schemas.TenantID, model string) (slots, assigned int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.shelves[shelfKey{tenant, model}]
	if s == nil {
		return 0, 0
	}
	return s.slots, s.assigned
}
