package worker

import (
	"container/list"
	"context"
	"sync"
)

// slots is a semaphore whose size can change while it is in use: a llama.cpp server
// tells how many slots it has only once its model is loaded. Who waits longest is
// served first.
type slots struct {
	mu      sync.Mutex
	size    int
	used    int
	waiting list.List // of chan struct{}, each closed when its turn has come
}

// resize sets how many may hold a slot. Those who hold one keep it.
func (s *slots) resize(size int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.size = size
	s.admit()
}

// count is how many may hold a slot.
func (s *slots) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.size
}

// acquire waits for a slot.
func (s *slots) acquire(ctx context.Context) error {
	s.mu.Lock()
	if s.used < s.size && s.waiting.Len() == 0 {
		s.used++
		s.mu.Unlock()
		return nil
	}
	turn := make(chan struct{})
	place := s.waiting.PushBack(turn)
	s.mu.Unlock()
	select {
	case <-turn:
		return nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-turn: // just now; somebody else may have it
		s.used--
		s.admit()
	default:
		s.waiting.Remove(place)
	}
	return context.Cause(ctx)
}

// release gives a slot back.
func (s *slots) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.used--
	s.admit()
}

// admit gives free slots to those who wait. s.mu is held.
func (s *slots) admit() {
	for s.used < s.size && s.waiting.Len() > 0 {
		first := s.waiting.Front()
		s.waiting.Remove(first)
		s.used++
		close(first.Value.(chan struct{})) // only acquire fills the list
	}
}
