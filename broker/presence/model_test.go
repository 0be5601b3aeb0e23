package presence

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/ownllm/ownllm/schemas"
)

// TestTableAgainstModel drives a Table with random events and compares all that it
// says, after each, with a naive model of it. The model keeps a flat list, knows
// nothing of what the table tells through OnGone while it changes, and derives that
// from the states before and after.
func TestTableAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := &machine{now: t0, table: NewTable()}
		m.table.OnGone(func(g Gone) { m.told = append(m.told, g) })
		t.Repeat(rapid.StateMachineActions(m))
	})
}

var (
	someTenants = rapid.SampledFrom([]schemas.TenantID{tenant, other})
	someAgents  = rapid.SampledFrom([]schemas.AgentID{"a", "b", "c", "d", "e", "f", "g"})
	someModels  = rapid.SampledFrom([]string{"m", "n"})
	someRuns    = rapid.SampledFrom([]schemas.Incarnation{"inc_1", "inc_2", "inc_3"})
	someHashes  = rapid.SampledFrom([]string{"h1", "h2"})
	someStates  = rapid.SampledFrom([]schemas.AgentState{schemas.AgentUp, schemas.AgentUp, schemas.AgentUp, schemas.AgentDraining, schemas.AgentBye})
	someLoads   = rapid.IntRange(0, 4)
	someStocks  = rapid.Custom(func(t *rapid.T) *schemas.Inventory {
		inv := &schemas.Inventory{}
		for _, id := range rapid.SliceOfN(someModels, 0, 3).Draw(t, "models") { // one may be there twice
			state := rapid.SampledFrom([]schemas.ModelState{schemas.ModelReady, schemas.ModelCold, schemas.ModelLoading, schemas.ModelFailed}).Draw(t, "state")
			inv.Models = append(inv.Models, schemas.Model{ID: id, State: state, Slots: rapid.Int().Draw(t, "distinguishes")})
		}
		return inv
	})
)

type modelAgent struct {
	tenant   schemas.TenantID
	id       schemas.AgentID
	name     string
	run      schemas.Incarnation
	state    schemas.AgentState
	finished bool // run has said bye
	seen     time.Time
	aside    time.Time // heard of over HTTPS
	hash     string
	stock    []schemas.Model
	load     load
	given    map[string]int
}

func (a *modelAgent) here() bool { return a.state != "" }

func (a *modelAgent) tunnelDown() bool { return !a.here() && !a.aside.IsZero() }

func (a *modelAgent) model(id string) *schemas.Model {
	if i := slices.IndexFunc(a.stock, func(m schemas.Model) bool { return m.ID == id }); i >= 0 {
		return &a.stock[i]
	}
	return nil
}

type machine struct {
	now    time.Time
	table  *Table
	told   []Gone
	agents []*modelAgent
}

func (m *machine) find(tenant schemas.TenantID, id schemas.AgentID) *modelAgent {
	for _, a := range m.agents {
		if a.tenant == tenant && a.id == id {
			return a
		}
	}
	return nil
}

func (m *machine) add(tenant schemas.TenantID, id schemas.AgentID) *modelAgent {
	a := m.find(tenant, id)
	if a == nil {
		a = &modelAgent{tenant: tenant, id: id, given: map[string]int{}}
		m.agents = append(m.agents, a)
	}
	return a
}

// change runs an event on both sides and compares what was told.
func (m *machine) change(t *rapid.T, act, model func()) {
	type past struct {
		a     *modelAgent
		run   schemas.Incarnation
		state schemas.AgentState
	}
	before := map[*modelAgent]past{}
	for _, a := range m.agents {
		before[a] = past{a, a.run, a.state}
	}
	m.told = nil
	act()
	model()
	var want []Gone
	for _, a := range m.agents {
		old := before[a]
		same := old.run == a.run
		if old.state != "" && (!same || !a.here()) {
			want = append(want, Gone{Agent: a.id, Incarnation: old.run})
		}
		if a.state == schemas.AgentDraining && !(same && old.state == schemas.AgentDraining) {
			want = append(want, Gone{Agent: a.id, Incarnation: a.run, Draining: true})
		}
	}
	order := func(a, b Gone) int { return cmp.Compare(fmt.Sprint(a), fmt.Sprint(b)) }
	if diff := gocmp.Diff(want, m.told, cmpopts.SortSlices(func(a, b Gone) bool { return order(a, b) < 0 })); diff != "" {
		t.Fatalf("told (-want +got):\n%s", diff)
	}
}

func (m *machine) Heartbeat(t *rapid.T) {
	tenant, id := someTenants.Draw(t, "tenant"), someAgents.Draw(t, "agent")
	hb := &schemas.Heartbeat{
		Version: schemas.ProtocolVersion, Incarnation: someRuns.Draw(t, "run"), State: someStates.Draw(t, "state"), Hash: someHashes.Draw(t, "hash"),
		Running: someLoads.Draw(t, "running"), Waiting: someLoads.Draw(t, "waiting"), Slots: someLoads.Draw(t, "slots"),
	}
	if rapid.Bool().Draw(t, "has inventory") {
		hb.Inventory = someStocks.Draw(t, "inventory")
	}
	var ask, wantAsk bool
	m.change(t, func() { ask = m.table.Observe(tenant, id, hb, m.now) }, func() {
		a := m.add(tenant, id)
		if m.zombie(a, hb) {
			return
		}
		a.aside = time.Time{}
		a.run, a.seen, a.load = hb.Incarnation, m.now, load{hb.Running, hb.Waiting, hb.Slots}
		if a.finished = hb.State == schemas.AgentBye; a.finished {
			a.state = ""
			return
		}
		a.state = hb.State
		if hb.Inventory != nil {
			a.stock, a.hash = hb.Inventory.Models, hb.Hash
		}
		wantAsk = a.hash != hb.Hash
	})
	if ask != wantAsk {
		t.Fatalf("Observe asks: %v, want %v", ask, wantAsk)
	}
}

// zombie reports whether a heartbeat is of a run that is over.
func (m *machine) zombie(a *modelAgent, hb *schemas.Heartbeat) bool {
	older := hb.Incarnation < a.run && (a.here() || m.now.Before(a.seen.Add(10*time.Second)))
	return older || hb.Incarnation == a.run && a.finished
}

func (m *machine) Aside(t *rapid.T) {
	tenant, id := someTenants.Draw(t, "tenant"), someAgents.Draw(t, "agent")
	hb := &schemas.Heartbeat{Incarnation: someRuns.Draw(t, "run"), State: someStates.Draw(t, "state"), Hash: someHashes.Draw(t, "hash")}
	if rapid.Bool().Draw(t, "has inventory") {
		hb.Inventory = someStocks.Draw(t, "inventory")
	}
	m.change(t, func() { m.table.ObserveAside(tenant, id, hb, m.now) }, func() {
		a := m.add(tenant, id)
		if m.zombie(a, hb) {
			return
		}
		if a.aside = m.now; hb.State == schemas.AgentBye {
			a.aside = time.Time{}
		}
		if !a.here() && hb.Inventory != nil {
			a.stock, a.hash = hb.Inventory.Models, ""
		}
	})
}

func (m *machine) Lost(t *rapid.T) {
	tenant, id := someTenants.Draw(t, "tenant"), someAgents.Draw(t, "agent")
	run := rapid.OneOf(rapid.Just(schemas.Incarnation("")), someRuns).Draw(t, "run")
	m.change(t, func() { m.table.Lost(tenant, id, run) }, func() {
		if a := m.find(tenant, id); a != nil && (run == "" || run == a.run) {
			a.state = ""
		}
	})
}

func (m *machine) TimePasses(t *rapid.T) {
	m.now = m.now.Add(time.Duration(rapid.IntRange(1, 5000).Draw(t, "ms")) * time.Millisecond)
}

func (m *machine) Expire(t *rapid.T) {
	m.change(t, func() { m.table.Expire(m.now) }, func() {
		for _, a := range m.agents {
			if m.now.After(a.seen.Add(StaleAfter)) {
				a.state = ""
			}
			if m.now.After(a.aside.Add(StaleAfter)) {
				a.aside = time.Time{}
			}
		}
	})
}

func (m *machine) Excuse(t *rapid.T) {
	m.change(t, func() { m.table.Excuse(m.now) }, func() {
		for _, a := range m.agents {
			if a.here() {
				a.seen = m.now
			}
		}
	})
}

func (m *machine) Restore(t *rapid.T) {
	k := Known{
		Tenant: someTenants.Draw(t, "tenant"), Agent: someAgents.Draw(t, "agent"), Name: rapid.SampledFrom([]string{"", "gpu"}).Draw(t, "name"),
		LastSeen: m.now.Add(-time.Duration(rapid.IntRange(0, 10).Draw(t, "s")) * time.Second), Inventory: *someStocks.Draw(t, "inventory"),
	}
	m.change(t, func() { m.table.Restore(k) }, func() {
		a := m.add(k.Tenant, k.Agent)
		a.name = cmp.Or(k.Name, a.name)
		if !a.here() {
			a.stock, a.hash = k.Inventory.Models, ""
			a.seen = slices.MaxFunc([]time.Time{a.seen, k.LastSeen}, time.Time.Compare)
		}
	})
}

func (m *machine) Forget(t *rapid.T) {
	tenant, id := someTenants.Draw(t, "tenant"), someAgents.Draw(t, "agent")
	m.table.Forget(tenant, id)
	m.agents = slices.DeleteFunc(m.agents, func(a *modelAgent) bool { return a.tenant == tenant && a.id == id })
}

func (m *machine) Release(t *rapid.T) {
	tenant, id, model := someTenants.Draw(t, "tenant"), someAgents.Draw(t, "agent"), someModels.Draw(t, "model")
	m.table.Release(tenant, id, model)
	if a := m.find(tenant, id); a != nil {
		a.given[model] = max(a.given[model]-1, 0)
	}
}

var rank = []schemas.ModelState{schemas.ModelReady, schemas.ModelCold, schemas.ModelLoading, schemas.ModelFailed}

// fuller compares the loads of two agents, in whole numbers.
func fuller(a, b *modelAgent) int {
	jobs := func(a *modelAgent) int {
		given := 0
		for _, n := range a.given {
			given += n
		}
		return max(a.load.running+a.load.waiting, given)
	}
	return cmp.Compare(jobs(a)*max(b.load.slots, 1), jobs(b)*max(a.load.slots, 1))
}

func (m *machine) Route(t *rapid.T) {
	tenant, model := someTenants.Draw(t, "tenant"), someModels.Draw(t, "model")
	exclude := map[schemas.AgentID]bool{}
	for _, id := range rapid.SliceOfDistinct(someAgents, rapid.ID).Draw(t, "exclude") {
		exclude[id] = true
	}
	var able []*modelAgent
	known, failed, draining, aside := false, false, false, false
	for _, a := range m.agents {
		have := a.model(model)
		if a.tenant != tenant || have == nil {
			continue
		}
		known = true
		aside = aside || a.tunnelDown()
		draining = draining || !exclude[a.id] && a.state == schemas.AgentDraining
		if exclude[a.id] || a.state != schemas.AgentUp {
			continue
		}
		if have.State == schemas.ModelFailed {
			failed = true
		} else {
			able = append(able, a)
		}
	}
	got, err := m.table.Route(tenant, model, exclude)
	if len(able) > 0 {
		best := slices.MinFunc(able, func(a, b *modelAgent) int {
			return cmp.Or(
				cmp.Compare(slices.Index(rank, a.model(model).State), slices.Index(rank, b.model(model).State)),
				fuller(a, b), cmp.Compare(a.id, b.id))
		})
		want := Choice{Agent: best.id, Incarnation: best.run, Model: *best.model(model), Protocol: schemas.ProtocolVersion}
		if diff := gocmp.Diff(want, got); err != nil || diff != "" {
			t.Fatalf("choice: %v (-want +got):\n%s", err, diff)
		}
		best.given[model]++
		return
	}
	want := schemas.CodeAgentOffline
	switch {
	case !known:
		want = schemas.CodeModelNotFound
	case failed:
		want = schemas.CodeBackendError
	case draining:
	case aside:
		want = schemas.CodeTunnelDown
	}
	if !errors.Is(err, &schemas.Error{Code: want}) {
		t.Fatalf("Route is %+v, %v, want %s", got, err, want)
	}
}

// Check compares all that can be read without changing anything.
func (m *machine) Check(t *rapid.T) {
	var want []AgentStatus
	for _, a := range m.agents {
		s := AgentStatus{a.tenant, a.id, a.name, a.run, a.state, a.tunnelDown(), a.seen, a.load.running, a.load.waiting, a.load.slots, a.stock}
		if !a.here() {
			s.Running, s.Waiting = 0, 0
		}
		want = append(want, s)
	}
	slices.SortFunc(want, func(a, b AgentStatus) int {
		return cmp.Or(cmp.Compare(a.Tenant, b.Tenant), cmp.Compare(a.Agent, b.Agent))
	})
	if diff := gocmp.Diff(want, m.table.Agents(""), cmpopts.EquateEmpty()); diff != "" {
		t.Fatalf("agents (-want +got):\n%s", diff)
	}
	m.checkShelves(t)
	for _, tenant := range []schemas.TenantID{tenant, other} {
		m.checkTenant(t, tenant)
	}
	var suspects []Suspect
	for _, s := range want {
		if s.State != "" && m.now.Sub(s.LastSeen) > time.Second {
			suspects = append(suspects, Suspect{s.Tenant, s.Agent, s.Incarnation})
		}
	}
	less := func(a, b Suspect) bool { return fmt.Sprint(a) < fmt.Sprint(b) }
	if diff := gocmp.Diff(suspects, m.table.Suspects(m.now, time.Second), cmpopts.SortSlices(less)); diff != "" {
		t.Fatalf("suspects (-want +got):\n%s", diff)
	}
}

func (m *machine) checkTenant(t *rapid.T, tenant schemas.TenantID) {
	best := func(id string, here bool) *schemas.Model {
		var list []*modelAgent
		for _, a := range m.agents {
			if a.tenant == tenant && a.here() == here && a.model(id) != nil {
				list = append(list, a)
			}
		}
		if len(list) == 0 {
			return nil
		}
		return slices.MinFunc(list, func(a, b *modelAgent) int {
			return cmp.Or(cmp.Compare(slices.Index(rank, a.model(id).State), slices.Index(rank, b.model(id).State)), cmp.Compare(a.id, b.id))
		}).model(id)
	}
	down := func(model string) bool {
		return slices.ContainsFunc(m.agents, func(a *modelAgent) bool {
			return a.tenant == tenant && a.tunnelDown() && (model == "" || a.model(model) != nil)
		})
	}
	for _, id := range []string{"", "m"} {
		want := schemas.CodeAgentOffline
		if down(id) {
			want = schemas.CodeTunnelDown
		}
		if err := m.table.Away(tenant, id); err.Code != want || err.RetryAfter == 0 || strings.Contains(err.Message, `""`) {
			t.Fatalf("Away(%s, %q) is %v, want %s", tenant, id, err, want)
		}
	}
	wantReachable := slices.ContainsFunc(m.agents, func(a *modelAgent) bool { return a.tenant == tenant && a.here() })
	var wantModels []schemas.Model
	for _, id := range []string{"m", "n"} {
		found := best(id, true)
		if found != nil {
			wantModels = append(wantModels, *found)
		} else {
			found = best(id, false)
		}
		m.checkCapacity(t, tenant, id)
		got, ok := m.table.Find(tenant, id)
		if ok != (found != nil) || ok && got != *found {
			t.Fatalf("Find(%s, %s) is %+v, %v, want %+v", tenant, id, got, ok, found)
		}
	}
	models, reachable := m.table.Models(tenant)
	if diff := gocmp.Diff(wantModels, models, cmpopts.EquateEmpty()); diff != "" || reachable != wantReachable {
		t.Fatalf("models of %s, reachable %v, want %v (-want +got):\n%s", tenant, reachable, wantReachable, diff)
	}
}

func (m *machine) checkCapacity(t *rapid.T, tenant schemas.TenantID, model string) {
	wantSlots, wantAssigned := 0, 0
	for _, a := range m.agents {
		have := a.model(model)
		if a.tenant != tenant || a.state != schemas.AgentUp || have == nil || have.State == schemas.ModelFailed {
			continue
		}
		wantSlots += max(a.load.slots, 1)
		for _, n := range a.given {
			wantAssigned += n
		}
	}
	if slots, assigned := m.table.Capacity(tenant, model); slots != wantSlots || assigned != wantAssigned {
		t.Fatalf("Capacity(%s, %s) is %d, %d, want %d, %d", tenant, model, slots, assigned, wantSlots, wantAssigned)
	}
}

// checkShelves compares the order in which requests go to agents with one that is made anew.
func (m *machine) checkShelves(t *rapid.T) {
	for key, s := range m.table.shelves {
		if len(s.places) == 0 {
			t.Fatalf("the shelf %v is empty", key)
		}
		for i, p := range s.places {
			if p.index != i || p.shelf != s {
				t.Fatalf("the place of %s on %v is %d, and says %d", p.agent.id, key, i, p.index)
			}
			if i > 0 && p.before(s.places[(i-1)/2]) {
				t.Fatalf("on %v, %s is before %s", key, p.agent.id, s.places[(i-1)/2].agent.id)
			}
		}
	}
}
