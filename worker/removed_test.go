package worker_test

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/access"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/internal/logtest"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker"
	"github.com/ownllm/ownllm/worker/backend"
	"github.com/ownllm/ownllm/worker/demo"
)

// second is a further agent of a house, with its log.
type second struct {
	h       *house
	id      schemas.AgentID
	told    *aside
	journal *logtest.Book
	nc      *nats.Conn
	ended   chan error
	stop    context.CancelFunc
}

func newSecond(t *testing.T, h *house, giveUp time.Duration) *second {
	t.Helper()
	s := &second{h: h, id: "agt_2", told: &aside{}, journal: &logtest.Book{}, ended: make(chan error, 1)}
	log := slog.New(slog.NewTextHandler(s.journal, nil))
	cfg := h.nats.AgentConfig(tenant, s.id)
	bulk := bus.NewSideline(cfg, bulkRest, log)
	t.Cleanup(bulk.Close)
	var err error
	if s.nc, err = bus.Connect(cfg, log); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.nc.Close)
	w := worker.New(s.nc, bulk, worker.Config{
		Tenant: tenant, Agent: s.id, Aside: s.told, GiveUp: giveUp, Drain: patience,
		Backends: []backend.Config{{URL: newServer(t, demo.Options{Models: models("second")}).URL}},
	}, log)
	var ctx context.Context
	ctx, s.stop = context.WithCancel(context.Background())
	ran := make(chan struct{})
	go func() {
		defer close(ran)
		s.ended <- w.Run(ctx)
	}()
	t.Cleanup(func() {
		s.stop()
		<-ran
	})
	s.awaitUp(t)
	return s
}

func (s *second) awaitUp(t *testing.T) {
	t.Helper()
	until(t, "the second agent to answer", func() bool {
		reply, _, err := s.h.d.Start(context.Background(), request("second", true, numbered(1, 0)))
		if err != nil {
			return false
		}
		return (&chat{t: t, reply: reply}).end() == nil
	})
}

// remove takes the agent's credential, and its connections with it.
func (s *second) remove(t *testing.T) {
	t.Helper()
	s.h.nats.Agents().Remove(s.id)
	disconnect(t, s.h.nats.System(), s.id)
}

// disconnect has the bus close an agent's connections.
func disconnect(t *testing.T, system *nats.Conn, id schemas.AgentID) {
	t.Helper()
	all := func(_ context.Context, users []string) ([]string, error) { return users, nil }
	if err := access.Sweep(t.Context(), system, access.Scope{Account: access.AccountAgents, User: string(id)}, all); err != nil {
		t.Fatal(err)
	}
}

// A worker whose agent was removed says so once, and ends.
func TestRemovedWorkerEnds(t *testing.T) {
	t.Parallel()
	h, _ := one(t, demo.Options{}, 1)
	const giveUp = 3500 * time.Millisecond
	s := newSecond(t, h, giveUp)
	running := h.start(request("second", true, numbered(10_000, time.Hour))).begin()
	s.told.set(false, schemas.Errorf(schemas.CodeKeyInvalid, "The agent is unknown. Pair the machine again."))
	began := time.Now()
	s.remove(t)
	select {
	case err := <-s.ended:
		s.ended <- err
		if !errors.Is(err, worker.ErrRemoved) {
			t.Errorf("it ends with %v", err)
		}
	case <-time.After(patience):
		t.Fatal("it goes on")
	}
	if took := time.Since(began); took < giveUp {
		t.Errorf("it gives up after %s", took)
	}
	if n := len(s.told.list()); n < 3 {
		t.Errorf("it gives up after %d questions", n)
	}
	for _, line := range []string{"the bus refuses this connection", "Pair the machine again"} {
		if n := s.journal.Count(line); n != 1 {
			t.Errorf("%q is in the log %d times", line, n)
		}
	}
	if n := s.journal.Count("\n"); n > 12 {
		t.Errorf("the log has %d lines:\n%s", n, s.journal)
	}
	running.reply.Close()
}

// What may pass makes no worker give up: a bus that refuses because nobody can look into the
// books, a server that can't either or that isn't there, and a bus that is away.
func TestUnsureWorkerStays(t *testing.T) {
	t.Parallel()
	h, _ := one(t, demo.Options{}, 1)
	const giveUp = 600 * time.Millisecond
	s := newSecond(t, h, giveUp)
	invalid := schemas.Errorf(schemas.CodeKeyInvalid, "unknown")
	for _, test := range []struct {
		name string
		says []error // in turn, with each beat
		away bool    // the bus is, instead of refusing
	}{
		{"the server can't look", []error{schemas.Errorf(schemas.CodeInternalError, "not now")}, false},
		{"nobody there", []error{errors.New("connection refused")}, false},
		{"now and then", []error{invalid, errors.New("connection refused")}, false},
		{"a tenant that is suspended", []error{schemas.Errorf(schemas.CodeTenantDisabled, "suspended")}, false},
		{"no bus", []error{invalid}, true},
	} {
		before := len(s.told.list())
		beats := 4
		if test.name == "a tenant that is suspended" {
			beats = 1 // the next one comes much later
		}
		wait := func() {
			for i := range beats {
				s.told.set(false, test.says[i%len(test.says)])
				if i == 0 && !test.away {
					s.remove(t)
				}
				until(t, "a beat beside the bus", func() bool { return len(s.told.list()) > before+i })
			}
			time.Sleep(2 * giveUp)
		}
		if test.away {
			h.nats.Restart(wait)
		} else {
			wait()
		}
		s.told.set(false, nil)
		h.nats.Agents().Offer(tenant, s.id, "second")
		select {
		case err := <-s.ended:
			t.Fatalf("%s: it ends with %v", test.name, err)
		default:
		}
		s.awaitUp(t)
	}
}

// The first start of a worker, which has to renew its connection, looks like nothing else.
func TestFirstStartIsCalm(t *testing.T) {
	t.Parallel()
	h, _ := one(t, demo.Options{}, 1)
	s := newSecond(t, h, 0)
	if s.nc.Stats().Reconnects == 0 {
		t.Error("the connection wasn't renewed, so nothing was shown")
	}
	for _, word := range []string{"WARN", "ERROR", "lost", "is back"} {
		if s.journal.Count(word) > 0 {
			t.Errorf("the log has %q:\n%s", word, s.journal)
		}
	}
}
