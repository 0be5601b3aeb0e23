package bus

import (
	"log/slog"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

// Sideline is a connection for what is seldom and must not delay the rest. An open
// connection costs its server a ping and an answer a second even if nobody uses it, and there
// may be thousands: so this one is opened when it is needed, shared by all who need it at the
// same time, and closed once nobody has needed it for a while.
type Sideline struct {
	cfg  Config
	rest time.Duration
	log  *slog.Logger

	mu     sync.Mutex
	nc     *nats.Conn  // nil: it isn't open
	users  int         // who use nc
	idle   *time.Timer // ends the rest of nc; nil: it hasn't had one
	closed bool        // for good
}

// NewSideline returns a connection that isn't open yet, and closes whenever it has been idle
// for rest. The caller closes it for good.
func NewSideline(cfg Config, rest time.Duration, log *slog.Logger) *Sideline {
	cfg.Patient = true
	return &Sideline{cfg: cfg, rest: rest, log: log}
}

// Use calls f with the connection, which is open for as long as f runs, and returns its error.
// A bus that can't be reached makes f fail with an error that Down knows, as on any other
// connection; it is tried again in the background. Opening blocks for as long as the client
// library gives each server, which is two seconds.
func (s *Sideline) Use(f func(nc *nats.Conn) error) error {
	nc, err := s.take()
	if err != nil {
		return err
	}
	defer s.leave()
	return f(nc)
}

// take opens the connection unless it is open. Others who need it wait for that: since it is
// tried again in the background, they don't each try in vain.
func (s *Sideline) take() (*nats.Conn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, nats.ErrConnectionClosed
	}
	if s.nc == nil || s.nc.IsClosed() { // the client library gives up after some errors of the server
		nc, err := Connect(s.cfg, s.log)
		if err != nil {
			return nil, err
		}
		s.nc = nc
	}
	s.users++
	if s.idle != nil {
		s.idle.Stop()
	}
	return s.nc, nil
}

func (s *Sideline) leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.users--
	switch {
	case s.users > 0 || s.closed:
	case s.idle == nil:
		s.idle = time.AfterFunc(s.rest, s.rested)
	default:
		s.idle.Reset(s.rest)
	}
}

// rested closes the connection, unless somebody has taken it at the last moment.
func (s *Sideline) rested() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.users == 0 {
		s.hangUp()
	}
}

// hangUp closes the connection if it is open. The lock has to be held.
func (s *Sideline) hangUp() {
	if s.nc != nil {
		s.nc.Close()
		s.nc = nil
	}
}

// Close closes the connection for good, whoever uses it.
func (s *Sideline) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	if s.idle != nil {
		s.idle.Stop()
	}
	s.hangUp()
}
