// Package presence knows which agents are there, what they offer, and why a model
// can't answer.
//
// The Table is plain data behind one mutex: it does no input or output and reads no
// clock, every moment is passed in, so its decisions test as pure functions. The
// Feed keeps it up to date from the bus.
package presence

import (
	"cmp"
	"slices"
	"sync"
	"time"

	"github.com/ownllm/ownllm/schemas"
)

// StaleAfter is how long an agent may be silent. A worker beats once a second, so
// three missed beats and some slack for a busy network.
const StaleAfter = 3500 * time.Millisecond

// Table holds the agents of all tenants, as one edge or broker sees them. It is safe
// for concurrent use.
type Table struct {
	mu      sync.Mutex
	tenants map[schemas.TenantID]map[schemas.AgentID]*agent
	shelves map[shelfKey]*shelf // none is empty
	onGone  []func(Gone)
}

// Gone says that a run of an agent has ended, so what was sent to it may be lost.
type Gone struct {
	Agent       schemas.AgentID
	Incarnation schemas.Incarnation
	// Draining says that the agent still finishes what it runs, and starts nothing new.
	Draining bool
}

type agent struct {
	tenant      schemas.TenantID
	id          schemas.AgentID
	name        string
	incarnation schemas.Incarnation
	state       schemas.AgentState // "" while the agent is away
	bye         bool               // the incarnation has said its last word
	protocol    int                // the newest that the incarnation speaks
	lastSeen    time.Time
	aside       time.Time // when it was last heard of over HTTPS; zero: not lately
	hash        string
	models      []schemas.Model
	partial     bool     // the inventory was, and models may stand for what isn't known yet
	places      []*place // one for each model
	running     int
	waiting     int
	slots       int
	idle        idleness
	holds       bool           // it heeds Job.Hold
	assigned    map[string]int // attempts that this process has under way, by model
	underWay    int            // their sum
}

// NewTable returns an empty table.
func NewTable() *Table {
	return &Table{tenants: make(map[schemas.TenantID]map[schemas.AgentID]*agent), shelves: make(map[shelfKey]*shelf)}
}

// OnGone registers a function that is called, without the table's lock, when a run of
// an agent ends or starts to drain. It has to be called before the table is used.
func (t *Table) OnGone(f func(Gone)) { t.onGone = append(t.onGone, f) }

// Known is an agent as Postgres remembers it.
type Known struct {
	Tenant    schemas.TenantID
	Agent     schemas.AgentID
	Name      string
	LastSeen  time.Time
	Inventory schemas.Inventory
}

// Restore makes known an agent that may be away, so that its models are told apart
// from models that nobody has. Of an agent that is here it adds what that itself can't tell
// yet, and changes nothing else.
func (t *Table) Restore(k Known) {
	t.mu.Lock()
	defer t.mu.Unlock()
	a := t.agent(k.Tenant, k.Agent)
	if k.Name != "" {
		a.name = k.Name
	}
	switch {
	case a.state == "":
		t.restock(a, k.Inventory.Models)
		a.partial, a.hash = k.Inventory.Partial, ""
		if k.LastSeen.After(a.lastSeen) {
			a.lastSeen = k.LastSeen
		}
	case a.partial:
		t.restock(a, schemas.Inventory{Models: a.models, Partial: true}.Keep(k.Inventory.Models).Models)
	}
}

// take takes in what the agent says that it has.
func (t *Table) take(a *agent, inv *schemas.Inventory, hash string) {
	t.restock(a, inv.Keep(a.models).Models)
	a.partial, a.hash = inv.Partial, hash
}

// Forget removes an agent for good.
func (t *Table) Forget(tenant schemas.TenantID, id schemas.AgentID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if a := t.tenants[tenant][id]; a != nil {
		t.restock(a, nil)
		delete(t.tenants[tenant], id)
	}
}

func (t *Table) agent(tenant schemas.TenantID, id schemas.AgentID) *agent {
	agents := t.tenants[tenant]
	if agents == nil {
		agents = make(map[schemas.AgentID]*agent)
		t.tenants[tenant] = agents
	}
	a := agents[id]
	if a == nil {
		a = &agent{tenant: tenant, id: id, assigned: make(map[string]int)}
		agents[id] = a
	}
	return a
}

// Observe takes in a heartbeat. It reports whether the inventory of the agent is
// unknown and has to be asked for. A heartbeat of a run that a newer one has
// replaced, or that said bye, changes nothing: incarnations sort by the time they were
// made. Nor does one
// of a run that has said bye: an answer to an earlier question can arrive after it.
func (t *Table) Observe(tenant schemas.TenantID, id schemas.AgentID, hb *schemas.Heartbeat, now time.Time) (ask bool) {
	t.mu.Lock()
	a := t.agent(tenant, id)
	if a.outdated(hb, now) {
		t.mu.Unlock()
		return false
	}
	var gone []Gone
	if a.state != "" && a.incarnation != hb.Incarnation {
		gone = append(gone, Gone{Agent: id, Incarnation: a.incarnation})
	}
	standing := a.standing()
	before := a.state
	if a.incarnation != hb.Incarnation {
		before = ""
	}
	a.incarnation, a.lastSeen, a.bye = hb.Incarnation, now, hb.State == schemas.AgentBye
	a.aside = time.Time{}
	a.protocol = hb.Version
	a.running, a.waiting, a.slots, a.holds = hb.Running, hb.Waiting, hb.Slots, hb.Holds
	a.idle.observe(hb, now)
	switch hb.State {
	case schemas.AgentBye:
		if before != "" {
			gone = append(gone, Gone{Agent: id, Incarnation: a.incarnation})
		}
		a.state = ""
	default:
		a.state = hb.State
		if hb.State == schemas.AgentDraining && before != schemas.AgentDraining {
			gone = append(gone, Gone{Agent: id, Incarnation: a.incarnation, Draining: true})
		}
		if hb.Inventory != nil {
			t.take(a, hb.Inventory, hb.Hash)
			if hb.Host != "" {
				a.name = hb.Host
			}
		}
		ask = a.hash != hb.Hash
	}
	if a.standing() != standing {
		t.moved(a)
	}
	t.mu.Unlock()
	t.tell(gone)
	return ask
}

// ObserveAside takes in a heartbeat that came over HTTPS, which a worker sends only while
// it has no link to the bus. It makes nobody here, but says why the agent isn't.
func (t *Table) ObserveAside(tenant schemas.TenantID, id schemas.AgentID, hb *schemas.Heartbeat, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	a := t.agent(tenant, id)
	if a.outdated(hb, now) {
		return
	}
	if a.aside = now; hb.State == schemas.AgentBye {
		a.aside = time.Time{}
	}
	if a.state == "" && hb.Inventory != nil {
		t.take(a, hb.Inventory, "")
	}
}

// forgetAfter is how long after its last word a run still stands above older ones. An
// older one that speaks later than that isn't a zombie, but a machine whose clock was
// set back.
const forgetAfter = 10 * time.Second

// outdated reports whether a heartbeat is of a run that has ended or was replaced.
func (a *agent) outdated(hb *schemas.Heartbeat, now time.Time) bool {
	if hb.Incarnation == a.incarnation {
		return a.bye
	}
	return hb.Incarnation < a.incarnation && (a.state != "" || now.Sub(a.lastSeen) < forgetAfter)
}

// Lost records that a run of an agent has ended, though it didn't say so: its
// connection closed, or nobody answers for it. An empty incarnation stands for the
// current one.
func (t *Table) Lost(tenant schemas.TenantID, id schemas.AgentID, incarnation schemas.Incarnation) {
	t.mu.Lock()
	a := t.tenants[tenant][id]
	if a == nil || a.state == "" || incarnation != "" && a.incarnation != incarnation {
		t.mu.Unlock()
		return
	}
	a.state = ""
	t.moved(a)
	gone := []Gone{{Agent: id, Incarnation: a.incarnation}}
	t.mu.Unlock()
	t.tell(gone)
}

// Expire ends the runs of all agents that have been silent for StaleAfter. Who was heard
// of over HTTPS counts as such for as long.
func (t *Table) Expire(now time.Time) {
	t.mu.Lock()
	var gone []Gone
	for _, agents := range t.tenants {
		for _, a := range agents {
			if a.state != "" && now.Sub(a.lastSeen) > StaleAfter {
				a.state = ""
				t.moved(a)
				gone = append(gone, Gone{Agent: a.id, Incarnation: a.incarnation})
			}
			if !a.aside.IsZero() && now.Sub(a.aside) > StaleAfter {
				a.aside = time.Time{}
			}
		}
	}
	t.mu.Unlock()
	t.tell(gone)
}

// Excuse gives every agent that is here a fresh start of its silence: nothing could
// be heard while this process itself was cut off from the bus.
func (t *Table) Excuse(now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, agents := range t.tenants {
		for _, a := range agents {
			if a.state != "" {
				a.lastSeen = now
			}
		}
	}
}

// Current is the run of an agent that is here; empty if it is away.
func (t *Table) Current(tenant schemas.TenantID, id schemas.AgentID) schemas.Incarnation {
	t.mu.Lock()
	defer t.mu.Unlock()
	a := t.tenants[tenant][id]
	if a == nil || a.state == "" {
		return ""
	}
	return a.incarnation
}

// Suspect is an agent that has missed a beat.
type Suspect struct {
	Tenant      schemas.TenantID
	Agent       schemas.AgentID
	Incarnation schemas.Incarnation
}

// Suspects lists the agents that are here and have been silent for longer than d.
func (t *Table) Suspects(now time.Time, d time.Duration) []Suspect {
	t.mu.Lock()
	defer t.mu.Unlock()
	var list []Suspect
	for _, agents := range t.tenants {
		for _, a := range agents {
			if a.state != "" && now.Sub(a.lastSeen) > d {
				list = append(list, Suspect{a.tenant, a.id, a.incarnation})
			}
		}
	}
	return list
}

func (t *Table) tell(gone []Gone) {
	for _, g := range gone {
		for _, f := range t.onGone {
			f(g)
		}
	}
}

// Models lists the models of the agents of a tenant that are here, sorted by id, each
// once, as the best of them has it. reachable reports whether any agent is here.
func (t *Table) Models(tenant schemas.TenantID) (models []schemas.Model, reachable bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	best := make(map[string]offer)
	for _, a := range t.tenants[tenant] {
		if a.state == "" {
			continue
		}
		reachable = true
		for _, p := range a.places {
			o := offer{a, p.model}
			if old, ok := best[o.model.ID]; !ok || o.before(old) {
				best[o.model.ID] = o
			}
		}
	}
	models = make([]schemas.Model, 0, len(best))
	for _, o := range best {
		models = append(models, *o.model)
	}
	slices.SortFunc(models, func(a, b schemas.Model) int { return cmp.Compare(a.ID, b.ID) })
	return models, reachable
}

// Find returns a model of the tenant, of an agent that is here if there is one, else
// as it was last known. Its capabilities and window are what a request is checked
// against before anybody asks who can run it.
func (t *Table) Find(tenant schemas.TenantID, model string) (schemas.Model, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.shelves[shelfKey{tenant, model}]
	if s == nil {
		return schemas.Model{}, false
	}
	return *s.find().model, true
}

// offer is a model as one agent has it.
type offer struct {
	agent *agent
	model *schemas.Model
}

// before puts agents that are here first, then the better state. The last word has the
// agent's id, so that the same question gets the same answer.
func (o offer) before(p offer) bool {
	if here := o.agent.state != ""; here != (p.agent.state != "") {
		return here
	}
	if a, b := stateRank(o.model.State), stateRank(p.model.State); a != b {
		return a < b
	}
	return o.agent.id < p.agent.id
}

func stateRank(s schemas.ModelState) int {
	switch s {
	case schemas.ModelReady:
		return 0
	case schemas.ModelCold:
		return 1
	case schemas.ModelLoading:
		return 2
	}
	return 3
}

// AgentStatus is an agent as an operator sees it.
type AgentStatus struct {
	Tenant      schemas.TenantID
	Agent       schemas.AgentID
	Name        string
	Incarnation schemas.Incarnation
	// State is the state of the last heartbeat, or empty for an agent that is away. Aside
	// says of such a one that it is heard of over HTTPS: only its link to the bus is down.
	State    schemas.AgentState
	Aside    bool
	LastSeen time.Time
	Running  int
	Waiting  int
	Slots    int
	Models   []schemas.Model
}

// Agents lists the agents of a tenant, or of all tenants for an empty one.
func (t *Table) Agents(tenant schemas.TenantID) []AgentStatus {
	t.mu.Lock()
	defer t.mu.Unlock()
	var list []AgentStatus
	for id, agents := range t.tenants {
		if tenant != "" && id != tenant {
			continue
		}
		for _, a := range agents {
			s := AgentStatus{a.tenant, a.id, a.name, a.incarnation, a.state, a.state == "" && !a.aside.IsZero(), a.lastSeen, a.running, a.waiting, a.slots, slices.Clone(a.models)}
			if a.state == "" {
				s.Running, s.Waiting = 0, 0
			}
			list = append(list, s)
		}
	}
	slices.SortFunc(list, func(a, b AgentStatus) int {
		return cmp.Or(cmp.Compare(a.Tenant, b.Tenant), cmp.Compare(a.Agent, b.Agent))
	})
	return list
}
