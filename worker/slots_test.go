package worker

import (
	"context"
	"errors"
	"testing"

	"go.uber.org/goleak"
	"pgregory.net/rapid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// waiter is somebody who has asked for a slot.
type waiter struct {
	cancel context.CancelCauseFunc
	got    chan error
}

var errLeft = errors.New("left")

// The semaphore against a model of it: who waits longest is served first, never more
// than size hold a slot of those that were given out at that size, and whoever gives up
// leaves no trace.
func TestSlots(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var s slots
		size, used := 0, 0
		var waiting []*waiter
		admitted := func() {
			for used < size && len(waiting) > 0 {
				if err := <-waiting[0].got; err != nil {
					t.Fatalf("the first in the queue got %v", err)
				}
				waiting = waiting[1:]
				used++
			}
		}
		defer func() {
			for _, w := range waiting {
				w.cancel(errLeft)
				if err := <-w.got; err != nil && !errors.Is(err, errLeft) {
					t.Errorf("a waiter that left got %v", err)
				}
			}
		}()
		t.Repeat(map[string]func(*rapid.T){
			"acquire": func(t *rapid.T) {
				ctx, cancel := context.WithCancelCause(context.Background())
				w := &waiter{cancel: cancel, got: make(chan error, 1)}
				if used < size && len(waiting) == 0 {
					if err := s.acquire(ctx); err != nil {
						t.Fatalf("a free slot wasn't given: %v", err)
					}
					used++
					return
				}
				go func() { w.got <- s.acquire(ctx) }()
				for s.queued() != len(waiting)+1 {
				}
				waiting = append(waiting, w)
			},
			"release": func(t *rapid.T) {
				if used == 0 {
					t.Skip("nobody has one")
				}
				used--
				s.release()
				admitted()
			},
			"resize": func(t *rapid.T) {
				size = rapid.IntRange(0, 4).Draw(t, "size")
				s.resize(size)
				admitted()
			},
			"give up": func(t *rapid.T) {
				if len(waiting) == 0 {
					t.Skip("nobody waits")
				}
				i := rapid.IntRange(0, len(waiting)-1).Draw(t, "who")
				waiting[i].cancel(errLeft)
				if err := <-waiting[i].got; !errors.Is(err, errLeft) {
					t.Fatalf("who gave up got %v", err)
				}
				waiting = append(waiting[:i], waiting[i+1:]...)
			},
			"": func(t *rapid.T) {
				s.mu.Lock()
				defer s.mu.Unlock()
				if s.used != used || s.size != size || s.waiting.Len() != len(waiting) {
					t.Fatalf("%d of %d used and %d waiting, want %d of %d and %d", s.used, s.size, s.waiting.Len(), used, size, len(waiting))
				}
			},
		})
	})
}

// queued counts those who wait.
func (s *slots) queued() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.waiting.Len()
}

// A slot that is given to somebody who gives up at that moment isn't lost.
func TestSlotGivenToOneWhoLeaves(t *testing.T) {
	var s slots
	s.resize(1)
	for range 500 {
		if err := s.acquire(t.Context()); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		got := make(chan error, 1)
		go func() { got <- s.acquire(ctx) }()
		go cancel(errLeft)
		s.release()
		if err := <-got; err == nil {
			s.release()
		} else if !errors.Is(err, errLeft) {
			t.Fatal(err)
		}
		if s.used != 0 || s.queued() != 0 {
			t.Fatalf("%d slots are used, %d wait", s.used, s.queued())
		}
	}
}
