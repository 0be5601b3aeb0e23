package bus_test

import (
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/internal/natstest"
)

func newSideline(t *testing.T, server *natstest.Server, rest time.Duration) *bus.Sideline {
	t.Helper()
	s := bus.NewSideline(server.Config("sideline"), rest, natstest.Log)
	t.Cleanup(s.Close)
	return s
}

// flush shows that the connection works, and returns it.
func flush(t *testing.T, s *bus.Sideline) (nc *nats.Conn) {
	t.Helper()
	if err := s.Use(func(c *nats.Conn) error { nc = c; return c.FlushTimeout(patience) }); err != nil {
		t.Fatal(err)
	}
	return nc
}

func awaitClosed(t *testing.T, nc *nats.Conn) {
	t.Helper()
	for deadline := time.Now().Add(patience); !nc.IsClosed(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it is never closed")
		}
	}
}

// It is the same connection for as long as it is needed, another one after a rest, and none at
// the end.
func TestSideline(t *testing.T) {
	server := natstest.Start(t)
	s := newSideline(t, server, time.Hour)
	first := flush(t, s)
	if flush(t, s) != first || first.IsClosed() {
		t.Error("a connection is opened where one was")
	}
	failure := errors.New("some failure")
	if err := s.Use(func(*nats.Conn) error { return failure }); !errors.Is(err, failure) {
		t.Errorf("an error comes back as %v", err)
	}
	first.Close()
	second := flush(t, s)
	s.Close()
	awaitClosed(t, second)
	if err := s.Use(func(*nats.Conn) error { t.Error("it is still used"); return nil }); !bus.Down(err) {
		t.Errorf("after its end: %v", err)
	}

	s = newSideline(t, server, time.Millisecond)
	for range 3 {
		awaitClosed(t, flush(t, s))
	}
	s.Close()
	s.Close()
}

// It isn't closed under the hands of somebody who needs it, though others have come and gone
// since.
func TestSidelineInUse(t *testing.T) {
	const rest = time.Millisecond
	s := newSideline(t, natstest.Start(t), rest)
	var used *nats.Conn
	if err := s.Use(func(nc *nats.Conn) error {
		used = nc
		for until := time.Now().Add(30 * rest); time.Now().Before(until); {
			if flush(t, s) != nc {
				t.Error("there are two")
			}
		}
		return nc.FlushTimeout(patience)
	}); err != nil {
		t.Error(err)
	}
	awaitClosed(t, used)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 50 {
				if err := s.Use(func(nc *nats.Conn) error { return nc.FlushTimeout(patience) }); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
}

// A bus that isn't there is waited for in the background.
func TestSidelineWithoutABus(t *testing.T) {
	server := natstest.Start(t)
	s := newSideline(t, server, time.Hour)
	ask := func() error {
		return s.Use(func(nc *nats.Conn) error {
			_, err := nc.Request("nobody", nil, patience)
			return err
		})
	}
	server.Restart(func() {
		if err := ask(); !bus.Down(err) || errors.Is(err, nats.ErrNoResponders) {
			t.Errorf("without a bus: %v", err)
		}
	})
	for deadline := time.Now().Add(patience); !errors.Is(ask(), nats.ErrNoResponders); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it doesn't come back")
		}
	}
}
