// Package natstest gives a test a real nats-server of its own.
package natstest

import (
	"log/slog"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/natsd"
)

// Log discards what is written to it.
var Log = slog.New(slog.DiscardHandler)

// Server is a nats-server with JetStream that ends with the test.
type Server struct {
	t      testing.TB
	cfg    natsd.Config
	server *natsd.Server
}

// Start starts a server on a free port.
func Start(t testing.TB) *Server {
	t.Helper()
	s := &Server{t: t, cfg: natsd.Config{
		Listen: "127.0.0.1:0", StoreDir: t.TempDir(), Token: "secret", Log: Log,
	}}
	s.start()
	t.Cleanup(func() { s.server.Stop() })
	return s
}

func (s *Server) start() {
	s.t.Helper()
	server, err := natsd.Start(s.t.Context(), s.cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	s.server = server
	s.cfg.Listen = server.Addr()
}

// Restart stops the server, calls between, and starts it again with the same data on
// the same port.
func (s *Server) Restart(between func()) {
	s.t.Helper()
	s.server.Stop()
	if between != nil {
		between()
	}
	s.start()
}

// Config returns what a part needs to connect.
func (s *Server) Config(name string) bus.Config {
	return bus.Config{URL: s.server.URL(), Name: name, Token: s.cfg.Token}
}

// Connect opens a connection that ends with the test.
func (s *Server) Connect(name string) *nats.Conn {
	s.t.Helper()
	nc, err := bus.Connect(s.Config(name), Log)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(nc.Close)
	return nc
}

// Queue opens a connection with a provisioned queue.
func (s *Server) Queue(perModel int64) (*nats.Conn, *bus.Queue) {
	s.t.Helper()
	nc := s.Connect("queue")
	q, err := bus.NewQueue(nc)
	if err != nil {
		s.t.Fatal(err)
	}
	cfg := bus.QueueConfig{PerModel: perModel, MaxAge: time.Hour, Replicas: 1}
	if err := q.Provision(s.t.Context(), cfg); err != nil {
		s.t.Fatal(err)
	}
	return nc, q
}
