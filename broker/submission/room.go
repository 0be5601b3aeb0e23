package submission

import (
	"maps"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/schemas"
)

// place is a model of a tenant.
type place struct {
	tenant schemas.TenantID
	model  string
}

// room is who is at a place. Once it is empty it is forgotten: whoever comes then finds room.
type room struct {
	runs int
	// turns is when each key last entered, counted in entries, of those that did lately.
	turns   map[schemas.KeyID]uint64
	entries uint64
}

// mostTurns bounds for how many keys a room knows when they entered: one that is never empty
// would come to know all there are. Half of them are kept; the turns of others are so long
// ago that it is as if they had had none.
const mostTurns = 1024

func (r *room) note(key schemas.KeyID) {
	r.runs++
	r.entries++
	r.turns[key] = r.entries
	if len(r.turns) > mostTurns {
		maps.DeleteFunc(r.turns, func(_ schemas.KeyID, at uint64) bool { return at+mostTurns/2 <= r.entries })
	}
}

// enter decides which of the claims go to their models, and reports that in their order. A
// little more goes there than can run, so that no slot waits for us. If nobody has the model
// now, whoever starts the request will say why. Where there isn't room for all, the key
// enters whose last turn was longest ago, and of its claims the first.
func (s *Scheduler) enter(list []books.Claim) []bool {
	entered := make([]bool, len(list))
	left := make(map[place]int) // that may still enter
	s.mu.Lock()
	defer s.mu.Unlock()
	for range list {
		next := -1
		for i := range list {
			p := place{list[i].Tenant, list[i].Model}
			if _, known := left[p]; !known {
				left[p] = s.vacant(p, len(list))
			}
			if !entered[i] && left[p] > 0 && (next < 0 || s.lastTurn(&list[i]) < s.lastTurn(&list[next])) {
				next = i
			}
		}
		if next < 0 {
			break
		}
		entered[next] = true
		p := place{list[next].Tenant, list[next].Model}
		left[p]--
		r := s.rooms[p]
		if r == nil {
			r = &room{turns: make(map[schemas.KeyID]uint64)}
			s.rooms[p] = r
		}
		r.note(list[next].Key)
	}
	return entered
}

// vacant is how many more than now may be at a place, and most if it has no slots. It is
// called with s.mu held, like lastTurn.
func (s *Scheduler) vacant(p place, most int) int {
	slots, assigned := s.Agents.Capacity(p.tenant, p.model)
	if slots == 0 {
		return most
	}
	if r := s.rooms[p]; r != nil {
		assigned = max(assigned, r.runs)
	}
	return slots + max(slots/4, 1) - assigned
}

func (s *Scheduler) lastTurn(c *books.Claim) uint64 {
	if r := s.rooms[place{c.Tenant, c.Model}]; r != nil {
		return r.turns[c.Key]
	}
	return 0
}

// leave notes that a run which entered is over.
func (s *Scheduler) leave(c *books.Claim) {
	p := place{c.Tenant, c.Model}
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.rooms[p]; r.runs > 1 {
		r.runs--
	} else {
		delete(s.rooms, p)
	}
}
