// Package natstest gives a test a real nats-server of its own.
package natstest

import (
	"context"
	"crypto/sha256"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/access"
	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/credential"
	"github.com/ownllm/ownllm/broker/natsd"
	"github.com/ownllm/ownllm/internal/port"
	"github.com/ownllm/ownllm/schemas"
)

// Log discards what is written to it.
var Log = slog.New(slog.DiscardHandler)

// Server is a nats-server with JetStream that ends with the test.
type Server struct {
	t      testing.TB
	cfg    natsd.Config
	server *natsd.Server
	agents *Agents
}

// Start starts a server on a free port.
func Start(t testing.TB) *Server {
	t.Helper()
	// Not one that the system chooses: somebody else might have it when Restart needs it.
	address, release, err := port.Reserve()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(release)
	s := &Server{t: t, agents: NewAgents()}
	s.cfg = natsd.Config{
		Listen: address, WebSocket: "127.0.0.1:0", StoreDir: t.TempDir(), Token: "secret", Directory: s.agents, Log: Log,
	}
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
	if server.Addr() != s.cfg.Listen {
		s.t.Fatalf("nats-server listens on %s instead of %s", server.Addr(), s.cfg.Listen)
	}
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

// WebSocketURL is the address for clients that come by WebSocket.
func (s *Server) WebSocketURL() string { return s.server.WebSocketURL() }

// InProcessConn implements nats.InProcessConnProvider.
func (s *Server) InProcessConn() (net.Conn, error) { return s.server.InProcessConn() }

// Config returns what a part of the house needs to connect to the agents' account.
func (s *Server) Config(name string) bus.Config {
	return bus.Config{URL: s.server.URL(), Name: name, User: bus.UserAgents, Password: s.cfg.Token}
}

// Connect opens a connection to the agents' account, as edges and brokers have it, that
// ends with the test.
func (s *Server) Connect(name string) *nats.Conn {
	s.t.Helper()
	return s.Open(s.Config(name))
}

// Core opens a connection to the account of the queue.
func (s *Server) Core(name string) *nats.Conn {
	s.t.Helper()
	return s.Open(s.Config(name).As(bus.UserCore, name))
}

// System opens a connection to the system's account.
func (s *Server) System() *nats.Conn {
	s.t.Helper()
	return s.Open(s.Config("system").As(bus.UserSystem, "system"))
}

// Ingress opens a connection to the publishers' account, as brokers have it.
func (s *Server) Ingress(name string) *nats.Conn {
	s.t.Helper()
	return s.Open(s.Config(name).As(bus.UserIngress, name))
}

// Open opens a connection that ends with the test.
func (s *Server) Open(cfg bus.Config) *nats.Conn {
	s.t.Helper()
	nc, err := bus.Connect(cfg, Log)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(nc.Close)
	return nc
}

// Queue opens a connection to the account of the queue, and provisions it.
func (s *Server) Queue(perModel int64) (*nats.Conn, *bus.Queue) {
	s.t.Helper()
	return Provision(s.t, s.Core("queue"), perModel)
}

// Provision makes the queue by a connection to its account.
func Provision(t testing.TB, nc *nats.Conn, perModel int64) (*nats.Conn, *bus.Queue) {
	t.Helper()
	q, err := bus.NewQueue(nc)
	if err != nil {
		t.Fatal(err)
	}
	cfg := bus.QueueConfig{PerModel: perModel, MaxAge: time.Hour, Replicas: 1}
	if err := q.Provision(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	return nc, q
}

// AgentConfig makes an agent known with the models that it may pull, and returns what its
// worker needs to connect.
func (s *Server) AgentConfig(tenant schemas.TenantID, id schemas.AgentID, models ...string) bus.Config {
	return s.agents.Config(s.Config("worker"), tenant, id, models...)
}

// Agent opens a connection of a worker, which may do no more than any worker.
func (s *Server) Agent(tenant schemas.TenantID, id schemas.AgentID, models ...string) *nats.Conn {
	s.t.Helper()
	return s.Open(s.AgentConfig(tenant, id, models...))
}

// Agents are those that the server lets in.
func (s *Server) Agents() *Agents { return s.agents }

// Credential is that of an agent.
func Credential(id schemas.AgentID) credential.Secret {
	return credential.DeriveAgent(sha256.Sum256([]byte(id)))
}

// Publisher opens a connection of a client that shows a key as its password, and may do no
// more than any publisher. Its inbox is that of the key's id.
func (s *Server) Publisher(id schemas.KeyID, key apikey.Key) *nats.Conn {
	s.t.Helper()
	return s.Open(s.agents.PublisherConfig(s.Config("publisher"), id, key))
}

// Agents implements access.Directory, and stands for what the books know: of publishers, too.
type Agents struct {
	mu         sync.Mutex
	known      map[credential.Hash]access.Agent
	publishers map[apikey.Hash]access.Publisher
}

// NewAgents returns nobody.
func NewAgents() *Agents {
	return &Agents{known: make(map[credential.Hash]access.Agent), publishers: make(map[apikey.Hash]access.Publisher)}
}

// PublisherConfig makes a key known, and returns what its holder needs to connect to the
// server of the configuration.
func (a *Agents) PublisherConfig(cfg bus.Config, id schemas.KeyID, key apikey.Key) bus.Config {
	a.Issue(id, key, 0)
	cfg = cfg.As("anybody", "publisher")
	cfg.Password, cfg.InboxPrefix = key.Reveal(), schemas.PublisherInboxPrefix(id)
	return cfg
}

// Issue makes a key known for as long as remains; 0: for ever.
func (a *Agents) Issue(id schemas.KeyID, key apikey.Key, remaining time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.publishers[key.Hash()] = access.Publisher{Key: id, Secret: key.Hash(), Remaining: remaining}
}

// Revoke makes a key unknown.
func (a *Agents) Revoke(key apikey.Key) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.publishers, key.Hash())
}

// Publisher implements access.Directory.
func (a *Agents) Publisher(_ context.Context, hash apikey.Hash) (access.Publisher, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p, ok := a.publishers[hash]
	if !ok {
		return access.Publisher{}, access.ErrDenied
	}
	return p, nil
}

// Config makes an agent known with the models that it may pull, and returns what its
// worker needs to connect to the server of the configuration.
func (a *Agents) Config(cfg bus.Config, tenant schemas.TenantID, id schemas.AgentID, models ...string) bus.Config {
	a.Offer(tenant, id, models...)
	cfg = cfg.As(string(id), "worker")
	cfg.Password, cfg.InboxPrefix = Credential(id).Reveal(), schemas.AgentInboxPrefix(id)
	return cfg
}

// Offer makes an agent known with its models.
func (a *Agents) Offer(tenant schemas.TenantID, id schemas.AgentID, models ...string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.known[Credential(id).Hash()] = access.Agent{ID: id, Tenant: tenant, Models: models}
}

// Remove takes an agent's credential away.
func (a *Agents) Remove(id schemas.AgentID) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.known, Credential(id).Hash())
}

// Agent implements access.Directory.
func (a *Agents) Agent(_ context.Context, hash credential.Hash) (access.Agent, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	agent, ok := a.known[hash]
	if !ok {
		return access.Agent{}, access.ErrDenied
	}
	return agent, nil
}
