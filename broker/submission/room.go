package submission

import (
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
	// turns is when each key last entered, counted in entries.
	turns   map[schemas.KeyID]uint64
	entries uint64
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
		r.runs++
		r.entries++
		r.turns[list[next].Key] = r.entries
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
