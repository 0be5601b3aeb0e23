package presence

import (
	"container/heap"
	"slices"

	"github.com/ownllm/ownllm/schemas"
)

// shelf is what the agents of a tenant make of one model: a heap of places, the one that a
// request goes to first. So a request costs the same whether ten agents have the model or a
// thousand.
//
// Whatever changes an agent has to say so by Table.moved, or by Table.restock if it changes
// what the agent has. Else the heap is out of order.
type shelf struct {
	places []*place
	// slots and assigned are the sums over those that are able, see Capacity.
	slots, assigned int
	// best is the answer to Find, nil if it has to be looked for: it depends on less than the
	// order of the heap does, so it changes seldom.
	best *place
}

// place is a model as one agent has it. It belongs to the agent, and to the shelf of the
// model.
type place struct {
	agent *agent
	model *schemas.Model
	shelf *shelf
	index int // in the shelf
	// What the shelf has counted of the agent.
	slots, assigned int
	state           schemas.AgentState
}

// able reports whether requests can go there.
func (p *place) able() bool {
	return p.agent.state == schemas.AgentUp && p.model.State != schemas.ModelFailed
}

// before reports whether a request goes to p rather than to q.
func (p *place) before(q *place) bool {
	if able := p.able(); able != q.able() {
		return able
	}
	return better(p.agent, p.model, q.agent, q.model)
}

// Len implements heap.Interface.
func (s *shelf) Len() int { return len(s.places) }

// Less implements heap.Interface.
func (s *shelf) Less(i, j int) bool { return s.places[i].before(s.places[j]) }

// Swap implements heap.Interface.
func (s *shelf) Swap(i, j int) {
	s.places[i], s.places[j] = s.places[j], s.places[i]
	s.places[i].index, s.places[j].index = i, j
}

// Push implements heap.Interface.
func (s *shelf) Push(x any) {
	p := x.(*place)
	p.index = len(s.places)
	s.places = append(s.places, p)
}

// Pop implements heap.Interface.
func (s *shelf) Pop() any {
	last := len(s.places) - 1
	p := s.places[last]
	s.places[last] = nil
	s.places = s.places[:last]
	return p
}

// pick returns where a request goes first among the places from index i down, nil if it can
// go nowhere. It looks at two places more for each that is excluded.
func (s *shelf) pick(i int, exclude map[schemas.AgentID]bool) *place {
	if i >= len(s.places) || !s.places[i].able() {
		return nil // and none further down is
	}
	if !exclude[s.places[i].agent.id] {
		return s.places[i]
	}
	a, b := s.pick(2*i+1, exclude), s.pick(2*i+2, exclude)
	if a == nil || b != nil && b.before(a) {
		return b
	}
	return a
}

// find returns the model as the best agent has it: see Table.Find.
func (s *shelf) find() *place {
	if s.best == nil && len(s.places) > 0 {
		s.best = slices.MinFunc(s.places, func(p, q *place) int {
			if (offer{p.agent, p.model}).before(offer{q.agent, q.model}) {
				return -1
			}
			return 1
		})
	}
	return s.best
}

// count makes the sums true about a place after its agent has changed.
func (s *shelf) count(p *place) {
	s.slots, s.assigned = s.slots-p.slots, s.assigned-p.assigned
	p.slots, p.assigned = 0, 0
	if p.able() {
		p.slots, p.assigned = max(p.agent.slots, 1), p.agent.underWay
	}
	s.slots, s.assigned = s.slots+p.slots, s.assigned+p.assigned
	if p.state != p.agent.state {
		p.state, s.best = p.agent.state, nil
	}
}

// shelfKey names a shelf.
type shelfKey struct {
	tenant schemas.TenantID
	model  string
}

// moved puts an agent into its places again: its state, load or slots have changed.
func (t *Table) moved(a *agent) {
	for _, p := range a.places {
		p.shelf.count(p)
		heap.Fix(p.shelf, p.index)
	}
}

// restock gives an agent other models, none at its end. Of those with the same id the first
// one counts.
func (t *Table) restock(a *agent, models []schemas.Model) {
	for _, p := range a.places {
		s := p.shelf
		s.slots, s.assigned, s.best = s.slots-p.slots, s.assigned-p.assigned, nil
		heap.Remove(s, p.index)
		if len(s.places) == 0 {
			delete(t.shelves, shelfKey{a.tenant, p.model.ID})
		}
	}
	a.models, a.places = models, make([]*place, 0, len(models))
	seen := make(map[string]bool, len(models))
	for i := range models {
		if seen[models[i].ID] {
			continue
		}
		seen[models[i].ID] = true
		key := shelfKey{a.tenant, models[i].ID}
		s := t.shelves[key]
		if s == nil {
			s = &shelf{}
			t.shelves[key] = s
		}
		p := &place{agent: a, model: &models[i], shelf: s, state: a.state}
		heap.Push(s, p)
		s.best = nil
		s.count(p)
		a.places = append(a.places, p)
	}
}
