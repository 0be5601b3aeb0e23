package submission

import (
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/quota"
	"github.com/ownllm/ownllm/schemas"
)

// Judge is judge.
func Judge(err *schemas.Error, begun bool, rate quota.Rate) (waits books.WaitsFor, pause time.Duration, lost bool) {
	v := judge(err, begun, rate)
	return v.waits, v.pause, v.lost
}

// Backoff is backoff.
func Backoff(tries int) time.Duration { return backoff(tries) }

// Enter is enter, and Leave leave.
func (s *Scheduler) Enter(list []books.Claim) []bool { return s.enter(list) }

func (s *Scheduler) Leave(c *books.Claim) { s.leave(c) }

// Turns counts the keys of which it is known when they last had a turn, and MostTurns bounds them.
func (s *Scheduler) Turns() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.rooms {
		n += len(r.turns)
	}
	return n
}

const MostTurns = mostTurns

// Waiting counts those who wait for a result.
func (s *Scheduler) Waiting() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.waiting)
}
