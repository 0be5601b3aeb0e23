package stack

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/pgtest"
	"github.com/ownllm/ownllm/schemas"
)

// Cluster is OwnLLM with each role in a process of its own.
type Cluster struct {
	t           testing.TB
	dir         string
	natsAddr    string
	token       string
	DatabaseURL string
	Books       *books.Store
	Tenant      books.Tenant
	User        books.User
	// Key opens every model of the tenant.
	Key    apikey.Key
	NATS   *Process
	Broker *Process
	agents int
}

// AdminToken opens the admin API of every edge of a Cluster.
const AdminToken = "admin-token-of-the-test"

// StartCluster starts nats-server and a broker on a fresh database. Edges and workers
// come on top.
func StartCluster(t testing.TB, brokerArgs ...string) *Cluster {
	t.Helper()
	c := &Cluster{t: t, dir: t.TempDir(), natsAddr: FreeAddr(t), token: "bus-secret-of-the-test", DatabaseURL: pgtest.New(t)}
	var err error
	if c.Books, err = books.Open(t.Context(), books.Config{URL: c.DatabaseURL}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Books.Close)
	c.Key = apikey.New()
	c.Tenant, c.User, _ = lift(t, c.Books, c.Key)
	c.StartNATS()
	c.StartBroker(brokerArgs...)
	return c
}

// StartNATS starts the nats-server, on the same port and with the same data each time.
func (c *Cluster) StartNATS() {
	c.t.Helper()
	host, port, _ := strings.Cut(c.natsAddr, ":")
	c.NATS = Run(c.t, "nats-server", nil, Binary(c.t, "github.com/nats-io/nats-server/v2"),
		"-a", host, "-p", port, "-js", "-sd", filepath.Join(c.dir, "nats"), "--auth", c.token)
	Until(c.t, startWait, "nats-server", func() bool {
		for _, line := range c.NATS.Log() {
			if strings.Contains(line, "Server is ready") {
				return true
			}
		}
		return false
	})
}

// NATSURL is the address of the nats-server, and Token the secret that opens it.
func (c *Cluster) NATSURL() string { return "nats://" + c.natsAddr }

// Token is the shared secret of the bus.
func (c *Cluster) Token() string { return c.token }

func (c *Cluster) env() []string {
	return []string{
		"OWNLLM_DATABASE_URL=" + c.DatabaseURL, "OWNLLM_NATS_TOKEN=" + c.token,
		"OWNLLM_NATS_URL=" + c.NATSURL(), "OWNLLM_ADMIN_TOKEN=" + AdminToken,
	}
}

// role starts one role, and waits until its operations port answers.
func (c *Cluster) role(name string, args ...string) *Process {
	c.t.Helper()
	ops := FreeAddr(c.t)
	args = append([]string{name, "--ops-listen", ops}, args...)
	p := Run(c.t, name, c.env(), Binary(c.t, OwnLLM), args...)
	check := "/healthz"
	if name == "edge" {
		check = "/readyz"
	}
	Until(c.t, startWait, name+" to be up", func() bool {
		if !p.Alive() {
			c.t.Fatalf("ownllm %s has ended: %v", name, p.Err())
		}
		return Answers("http://" + ops + check)
	})
	return p
}

// StartBroker starts the broker.
func (c *Cluster) StartBroker(args ...string) {
	c.t.Helper()
	c.Broker = c.role("broker", args...)
}

// Edge is an edge of a Cluster.
type Edge struct {
	*Process
	Addr    string
	BaseURL string
}

// StartEdge starts an edge on a free port.
func (c *Cluster) StartEdge(args ...string) *Edge {
	c.t.Helper()
	addr := FreeAddr(c.t)
	p := c.role("edge", append([]string{"--listen", addr}, args...)...)
	return &Edge{p, addr, "http://" + addr + "/v1"}
}

// Worker is a worker of a Cluster.
type Worker struct {
	*Process
	Dir string
}

// StartWorker starts a worker of a new agent in front of a backend.
func (c *Cluster) StartWorker(backendURL string, args ...string) *Worker {
	c.t.Helper()
	c.agents++
	return c.RestartWorker(filepath.Join(c.dir, "agent", schemas.EncodeToken(string(rune('a'+c.agents-1)))), backendURL, args...)
}

// Serving waits until the worker pulls jobs. An edge knows of it by then, but for what
// the bus takes to bring it the heartbeat.
func (w *Worker) Serving() *Worker {
	w.t.Helper()
	Until(w.t, startWait, "the worker to serve a model", func() bool {
		return slices.ContainsFunc(w.Log(), func(line string) bool { return strings.Contains(line, "serving model") })
	})
	return w
}

// RestartWorker starts the worker of the agent that lives in dir.
func (c *Cluster) RestartWorker(dir, backendURL string, args ...string) *Worker {
	c.t.Helper()
	p := c.role("worker", append([]string{"--data-dir", dir, "--tenant", string(c.Tenant.ID), "--backend", backendURL}, args...)...)
	return &Worker{p, dir}
}
