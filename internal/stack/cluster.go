package stack

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/access"
	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/credential"
	"github.com/ownllm/ownllm/internal/pgtest"
	"github.com/ownllm/ownllm/schemas"
)

// Cluster is OwnLLM with each role in a process of its own.
type Cluster struct {
	t           testing.TB
	dir         string
	store       string   // where the nats-servers have their data
	addrs       []string // of the nats-servers
	routed      []string // where these find each other; empty: there is one
	monitors    []string // where these tell how they are; as many as there are routes
	token       string
	DatabaseURL string
	Books       *books.Store
	Tenant      books.Tenant
	User        books.User
	// Key opens every model of the tenant.
	Key apikey.Key
	// NATS is the nats-server, and Servers are all of them.
	NATS    *Process
	Servers []*Process
	// Broker is the newest broker, and Brokers are all that were started.
	Broker  *Process
	Brokers []*Broker
	agents  int
	// Program is the binary of the roles that are started from now on; empty: the present one.
	Program string
}

// AdminToken opens the admin API of every edge of a Cluster.
const AdminToken = "admin-token-of-the-test"

// StartCluster starts nats-server and a broker on a fresh database. Edges and workers
// come on top.
func StartCluster(t testing.TB, brokerArgs ...string) *Cluster {
	t.Helper()
	return StartClusterOn(t, pgtest.New(t), brokerArgs...)
}

// StartClusterOn is StartCluster on a migrated database that is there already.
func StartClusterOn(t testing.TB, databaseURL string, brokerArgs ...string) *Cluster {
	t.Helper()
	c := newCluster(t, databaseURL, 1)
	c.StartNATS()
	c.StartBroker(brokerArgs...)
	return c
}

// StartClusterIn is StartCluster with the data of nats-server in a folder of the caller's.
func StartClusterIn(t testing.TB, store string, brokerArgs ...string) *Cluster {
	t.Helper()
	c := newCluster(t, pgtest.New(t), 1)
	c.store = store
	c.StartNATS()
	c.StartBroker(brokerArgs...)
	return c
}

// RestoreCluster starts nats-server and a broker for what was another cluster, on copies of its
// database and of the data of its nats-server.
func RestoreCluster(t testing.TB, of *Cluster, databaseURL, store string, brokerArgs ...string) *Cluster {
	t.Helper()
	c := newCluster(t, databaseURL, 1)
	c.store, c.token, c.Key = store, of.token, of.Key
	c.StartNATS()
	c.StartBroker(brokerArgs...)
	return c
}

// RestoreRouted starts three nats-servers that have nothing for what was another cluster, on a
// copy of its database.
func RestoreRouted(t testing.TB, of *Cluster, databaseURL string) *Cluster {
	t.Helper()
	c := newCluster(t, databaseURL, 3)
	c.token, c.Key = of.token, of.Key
	c.startRouted()
	return c
}

// StartRouted is StartCluster with three nats-servers in a cluster.
func StartRouted(t testing.TB, brokerArgs ...string) *Cluster {
	t.Helper()
	c := NewRouted(t, pgtest.New(t))
	c.StartBroker(brokerArgs...)
	return c
}

// NewRouted starts three nats-servers in a cluster, and nothing else, on a migrated database
// that is there already.
func NewRouted(t testing.TB, databaseURL string) *Cluster {
	t.Helper()
	c := newCluster(t, databaseURL, 3)
	c.startRouted()
	return c
}

func (c *Cluster) startRouted() {
	c.t.Helper()
	for range c.addrs {
		c.routed = append(c.routed, FreeAddr(c.t))
		c.monitors = append(c.monitors, FreeAddr(c.t))
	}
	c.StartNATS()
}

func newCluster(t testing.TB, databaseURL string, servers int) *Cluster {
	t.Helper()
	c := &Cluster{t: t, dir: t.TempDir(), store: t.TempDir(), token: "bus-secret-of-the-test", DatabaseURL: databaseURL}
	for range servers {
		c.addrs = append(c.addrs, FreeAddr(t))
	}
	var err error
	if c.Books, err = books.Open(t.Context(), books.Config{URL: c.DatabaseURL}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Books.Close)
	c.Key = apikey.New()
	c.Tenant, c.User, _ = lift(t, c.Books, c.Key)
	return c
}

// StartNATS starts the nats-servers, on the same ports and with the same data each time.
func (c *Cluster) StartNATS() {
	c.t.Helper()
	c.Servers = nil
	for i := range c.addrs {
		c.Servers = append(c.Servers, c.startServer(i))
	}
	c.NATS = c.Servers[0]
	for _, s := range c.Servers {
		s.awaitServer()
	}
	if len(c.routed) == 0 {
		return
	}
	core, err := nats.Connect(c.NATSURL(), nats.UserInfo(bus.UserCore, c.token))
	if err != nil {
		c.t.Fatal(err)
	}
	defer core.Close()
	Until(c.t, startWait, "JetStream to have a leader", func() bool {
		_, err := core.Request("$JS.API.STREAM.NAMES", nil, time.Second) // only a leader answers
		return err == nil
	})
}

// RestartServer starts one of the nats-servers that has ended, at its address and with its
// data.
func (c *Cluster) RestartServer(i int) *Process {
	c.t.Helper()
	c.Servers[i] = c.startServer(i)
	c.Servers[i].awaitServer()
	return c.Servers[i]
}

// AwaitCurrent waits until one of the nats-servers of a routed cluster has all copies that it
// should have, and these are up to date: until another one may be stopped.
func (c *Cluster) AwaitCurrent(i int) {
	c.t.Helper()
	Until(c.t, startWait, "nats-server to be current", func() bool { return Answers("http://" + c.monitors[i] + "/healthz") })
}

// AwaitEnd waits until a process that was asked to end has ended.
func (p *Process) AwaitEnd(wait time.Duration) {
	p.t.Helper()
	Until(p.t, wait, p.name+" to end", func() bool { return !p.Alive() })
}

// awaitServer waits until a nats-server takes connections.
func (p *Process) awaitServer() {
	p.t.Helper()
	Until(p.t, startWait, "nats-server", func() bool {
		return slices.ContainsFunc(p.Log(), func(line string) bool { return strings.Contains(line, "Server is ready") })
	})
}

func (c *Cluster) startServer(i int) *Process {
	c.t.Helper()
	host, port, _ := strings.Cut(c.addrs[i], ":")
	text, err := access.ServerConfig(c.token, false)
	if err != nil {
		c.t.Fatal(err)
	}
	name := "nats-server"
	if len(c.routed) > 0 {
		name += "-" + strconv.Itoa(i)
		const user, password = "route", "secret-of-the-routes"
		var routes []string
		for _, addr := range c.routed {
			routes = append(routes, strconv.Quote("nats://"+user+":"+password+"@"+addr))
		}
		// A server that is to be replaced lets its clients stay for as long as our replies take,
		// and sends one away every second after that.
		text += "lame_duck_grace_period: \"3s\"\nlame_duck_duration: \"30s\"\n"
		// Clients have all addresses. Those that servers tell would lead around a proxy.
		text += fmt.Sprintf("server_name: %s\nhttp: %q\ncluster { name: test, no_advertise: true, listen: %q, authorization { user: %s, password: %s }, routes: [%s] }\n",
			name, c.monitors[i], c.routed[i], user, password, strings.Join(routes, ", "))
	}
	config := filepath.Join(c.dir, name+".conf")
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		c.t.Fatal(err)
	}
	return Run(c.t, name, nil, Binary(c.t, "github.com/nats-io/nats-server/v2"),
		"-c", config, "-a", host, "-p", port, "-sd", filepath.Join(c.store, name))
}

// NATSURL are the addresses of the nats-servers, and Token the secret that opens them.
func (c *Cluster) NATSURL() string { return "nats://" + strings.Join(c.addrs, ",nats://") }

// ServerURL is the address of one of the nats-servers.
func (c *Cluster) ServerURL(i int) string { return "nats://" + c.addrs[i] }

// Token is the shared secret of the bus.
func (c *Cluster) Token() string { return c.token }

func (c *Cluster) env() []string {
	return []string{
		"OWNLLM_DATABASE_URL=" + c.DatabaseURL, "OWNLLM_NATS_TOKEN=" + c.token,
		"OWNLLM_NATS_URL=" + c.NATSURL(), "OWNLLM_ADMIN_TOKEN=" + AdminToken,
	}
}

// launched is a role that was started, and how to see that it is up.
type launched struct {
	*Process
	check string
}

// launch starts one role.
func (c *Cluster) launch(name string, args ...string) launched {
	c.t.Helper()
	ops := FreeAddr(c.t)
	args = append([]string{name, "--ops-listen", ops}, args...)
	program := c.Program
	if program == "" {
		program = Binary(c.t, OwnLLM)
	}
	p := launched{Run(c.t, name, c.env(), program, args...), "/healthz"}
	p.OpsURL = "http://" + ops
	if name == "edge" {
		p.check = "/readyz"
	}
	return p
}

// await waits until the operations port of a role answers.
func (p launched) await() {
	p.t.Helper()
	Until(p.t, startWait, p.name+" to be up", func() bool {
		if !p.Alive() {
			p.t.Fatalf("ownllm %s has ended: %v", p.name, p.Err())
		}
		return Answers(p.OpsURL + p.check)
	})
}

// role starts one role, and waits until it is up.
func (c *Cluster) role(name string, args ...string) *Process {
	c.t.Helper()
	p := c.launch(name, args...)
	p.await()
	return p.Process
}

// Broker is a broker of a Cluster.
type Broker struct {
	*Process
	OpsURL string
}

// StartBroker starts a broker, which is Broker from then on.
func (c *Cluster) StartBroker(args ...string) *Process {
	c.t.Helper()
	p := c.launch("broker", args...)
	p.await()
	c.Broker = p.Process
	c.Brokers = append(c.Brokers, &Broker{p.Process, p.OpsURL})
	return c.Broker
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
	return c.StartEdges(1, args...)[0]
}

// StartEdges starts several edges at once.
func (c *Cluster) StartEdges(n int, args ...string) []*Edge {
	c.t.Helper()
	addrs := make([]string, n)
	for i := range addrs {
		addrs[i] = FreeAddr(c.t)
	}
	return c.startEdges(addrs, args...)
}

// RestartEdge starts an edge at the address of one that has ended.
func (c *Cluster) RestartEdge(old *Edge, args ...string) *Edge {
	c.t.Helper()
	return c.startEdges([]string{old.Addr}, args...)[0]
}

func (c *Cluster) startEdges(addrs []string, args ...string) []*Edge {
	c.t.Helper()
	var edges []*Edge
	var starting []launched
	for _, addr := range addrs {
		p := c.launch("edge", append([]string{"--listen", addr}, args...)...)
		starting = append(starting, p)
		edges = append(edges, &Edge{p.Process, addr, "http://" + addr + "/v1"})
	}
	for _, p := range starting {
		p.await()
	}
	return edges
}

// Worker is a worker of a Cluster.
type Worker struct {
	*Process
	Dir string
}

// StartWorker starts a worker of a new agent in front of a backend.
func (c *Cluster) StartWorker(backendURL string, args ...string) *Worker {
	c.t.Helper()
	return c.StartWorkerOf(c.Tenant.ID, backendURL, args...)
}

// StartWorkerOf is StartWorker for a tenant.
func (c *Cluster) StartWorkerOf(tenant schemas.TenantID, backendURL string, args ...string) *Worker {
	c.t.Helper()
	c.agents++
	dir := filepath.Join(c.dir, "agent", strconv.Itoa(c.agents))
	c.Pair(tenant, dir)
	return c.worker(dir, backendURL, args...)
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
	return c.worker(dir, backendURL, args...)
}

// Pair makes a new agent of the tenant, whose worker lives in dir.
func (c *Cluster) Pair(tenant schemas.TenantID, dir string) schemas.AgentID {
	c.t.Helper()
	secret := credential.NewAgent()
	agent, err := c.Books.AddAgent(c.t.Context(), string(tenant), schemas.NewAgentID(), "test", secret)
	if err != nil {
		c.t.Fatal(err)
	}
	b, err := json.Marshal(map[string]any{"agent_id": agent.ID, "tenant_id": tenant, "credential": secret.Reveal()})
	if err == nil {
		err = os.MkdirAll(dir, 0o700)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "worker.json"), b, 0o600)
	}
	if err != nil {
		c.t.Fatal(err)
	}
	return agent.ID
}

func (c *Cluster) worker(dir, backendURL string, args ...string) *Worker {
	c.t.Helper()
	p := c.role("worker", append([]string{"--data-dir", dir, "--backend", backendURL}, args...)...)
	return &Worker{p, dir}
}
