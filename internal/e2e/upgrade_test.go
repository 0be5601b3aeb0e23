package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/internal/pgtest"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
)

// mover is a publisher that leaves a nats-server which says that it is about to end, between
// two requests, as ARCHITECTURE.md asks of publishers.
type mover struct {
	publisher
	connect func() (*nats.Conn, error)
	lame    atomic.Bool // the server of the connection is about to end
	moves   int
}

func newMover(url string, key schemas.KeyID, secret string) *mover {
	m := &mover{publisher: publisher{key: key}}
	m.connect = func() (*nats.Conn, error) {
		m.lame.Store(false)
		return nats.Connect(url, nats.Token(secret), nats.CustomInboxPrefix(schemas.PublisherInboxPrefix(key)), nats.MaxReconnects(-1),
			nats.ReconnectBufSize(-1), nats.LameDuckModeHandler(func(*nats.Conn) { m.lame.Store(true) }))
	}
	return m
}

// move sees to it that there is a connection to a server that stays.
func (m *mover) move() error {
	if m.nc != nil && !m.lame.Load() {
		return nil
	}
	nc, err := m.connect()
	if err != nil {
		return err
	}
	if m.nc != nil {
		m.nc.Close()
	}
	m.nc = nc
	m.moves++
	return nil
}

// upgrade is a whole OwnLLM, two of each role and three nats-servers, under mixed load.
type upgrade struct {
	*chaosLoad
	lb     *balancer
	movers []*mover
}

// overBalancer sends a request as a client behind a load balancer.
func (u *upgrade) overBalancer(ctx context.Context, blind, stream bool) bool {
	fields, tokens := chaosAsk(stream)
	patient, cancel := patience(ctx)
	defer cancel()
	began := time.Now()
	r := u.lb.chat(patient, blind, stream, fields)
	failure := r.code()
	if r.broken != nil {
		failure = r.broken.Error()
	}
	if !r.done && failure == "" {
		failure = "silent end"
	}
	u.wantText(fmt.Sprintf("request %s, status %d", r.request(), r.status), r.text, tokens, r.done)
	return u.note(told{doorHTTP, r.request(), tokensOf(r.text), r.usage, r.done, time.Since(began)}, failure)
}

// load starts all clients.
func (u *upgrade) load(ctx context.Context) (stop func()) {
	turns := map[string]func(int) bool{doorDurable: func(int) bool { return u.submit() }}
	for i := range 8 {
		turns[fmt.Sprint(doorHTTP, i)] = func(n int) bool { return u.overBalancer(ctx, i%2 == 0, n%3 != 0) }
	}
	for i, m := range u.movers {
		turns[fmt.Sprint(doorNATS, i)] = func(n int) bool {
			if err := m.move(); err != nil {
				u.bad("a publisher can't move: %v", err)
				return false
			}
			return u.overNATS(ctx, &m.publisher, n%3 != 0)
		}
	}
	return u.loop(turns)
}

// leader is which of the nats-servers leads the most of the queues.
func leader(t *testing.T, c *stack.Cluster) int {
	t.Helper()
	nc, err := nats.Connect(c.NATSURL(), nats.UserInfo(bus.UserCore, c.Token()))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	leads := make([]int, len(c.Servers))
	for stream := range schemas.JobStreams() {
		stack.Until(t, 20*time.Second, "a leader of "+stream, func() bool {
			var info struct{ Cluster struct{ Leader string } }
			m, err := nc.Request("$JS.API.STREAM.INFO."+stream, nil, time.Second)
			if err != nil || json.Unmarshal(m.Data, &info) != nil {
				return false
			}
			var i int
			if _, err := fmt.Sscanf(info.Cluster.Leader, "nats-server-%d", &i); err != nil {
				return false
			}
			leads[i]++
			return true
		})
	}
	return slices.Index(leads, slices.Max(leads))
}

// TestRollingUpgrade replaces every process of a whole OwnLLM, one after the other and under
// load, as OPERATIONS.md says: brokers, edges and workers by a release with the next version
// of the bus protocol, and nats-servers, which are asked to send their clients away first. No
// client is told of it, whichever door it came by, and the books have all.
func TestRollingUpgrade(t *testing.T) {
	c := &chaos{t: t, backend: stack.StartBackend(t, longDemo())}
	next := stack.NextRelease(t)
	out, err := exec.CommandContext(t.Context(), next, "version", "--json").Output()
	var v struct {
		Version  string
		Protocol int
	}
	if err != nil || json.Unmarshal(out, &v) != nil || v.Version != stack.NextVersion || v.Protocol != schemas.ProtocolVersion+1 {
		t.Fatalf("the next release is %s: %v", out, err)
	}
	brokerArgs := []string{"--queue-replicas", "3"}
	c.Cluster = stack.NewRouted(t, pgtest.New(t))
	brokers := []*stack.Process{c.StartBroker(brokerArgs...), c.StartBroker(brokerArgs...)}
	c.edges = c.StartEdges(2)
	workers := []*stack.Worker{c.StartWorker(c.backend.URL).Serving(), c.StartWorker(c.backend.URL).Serving()}
	for _, edge := range c.edges {
		awaitAgents(t, edge, len(workers))
	}
	u := &upgrade{chaosLoad: newChaosLoad(t, c)}
	u.lb = &balancer{clients: clientsOf(t, c.edges, u.secret()), edges: c.edges}
	for range 3 {
		m := newMover(c.NATSURL(), u.keys[doorNATS], u.secrets[doorNATS])
		t.Cleanup(func() {
			if m.nc != nil {
				m.nc.Close()
			}
		})
		u.movers = append(u.movers, m)
	}
	stop := u.load(t.Context())
	began := time.Now()
	step := func(what string) {
		t.Helper()
		u.awaitGood(t, 40*time.Second, "after "+what)
		t.Logf("%s: %s, failures %v", time.Since(began).Round(100*time.Millisecond), what, u.failed())
	}
	step("the start")

	leaves := func(p *stack.Process) {
		t.Helper()
		if err := p.Stop(); err != nil {
			t.Errorf("a process that was to stop ended with %v", err)
		}
	}
	lead := leader(t, c.Cluster)
	for n := range count(1, len(c.Servers)) {
		i := (lead + n) % len(c.Servers)
		c.Servers[i].Signal(syscall.SIGUSR2)
		c.Servers[i].AwaitEnd(60 * time.Second)
		c.RestartServer(i)
		c.AwaitCurrent(i)
		step(fmt.Sprint("nats-server ", i))
	}
	c.Program = next
	for i, p := range brokers {
		leaves(p)
		brokers[i] = c.StartBroker(brokerArgs...)
		step(fmt.Sprint("broker ", i))
	}
	for i, edge := range c.edges {
		leaves(edge.Process)
		u.lb.replace(i, c.RestartEdge(edge))
		step(fmt.Sprint("edge ", i))
	}
	for i, w := range workers {
		leaves(w.Process)
		workers[i] = c.RestartWorker(w.Dir, c.backend.URL).Serving()
		step(fmt.Sprint("worker ", i))
	}
	stop()

	u.report(t)
	for failure, n := range u.failures {
		t.Errorf("%d times a client was told %s", n, failure)
	}
	u.wantSettled(t)
	moves := -len(u.movers)
	for _, m := range u.movers {
		moves += m.moves
	}
	t.Logf("%d requests weren't taken by the first edge, %d times a publisher moved; the backend was called %d times", u.lb.refused, moves, c.backend.Stats().Started)
	stack.Until(t, 20*time.Second, "the backend to be idle", func() bool { return c.backend.Stats().Active == 0 })
	stack.Until(t, 20*time.Second, "an empty queue", func() bool { return jobs(t, c.Cluster) == 0 })
	for _, p := range append(brokers, c.edges[0].Process, c.edges[1].Process, workers[0].Process, workers[1].Process) {
		if !p.Alive() {
			t.Errorf("a process has ended by itself: %v", p.Err())
		}
	}
}

// TestQueueLosesItsLeader kills the nats-server that leads the most queues. Until the others have
// chosen other leaders nothing can be queued there, and what comes meanwhile waits for that: no
// client over HTTP is told.
func TestQueueLosesItsLeader(t *testing.T) {
	c := &chaos{t: t, backend: stack.StartBackend(t, longDemo())}
	c.Cluster = stack.StartRouted(t, "--queue-replicas", "3")
	c.edges = c.StartEdges(2)
	for range 2 {
		c.StartWorker(c.backend.URL).Serving()
	}
	for _, edge := range c.edges {
		awaitAgents(t, edge, 2)
	}
	u := &upgrade{chaosLoad: newChaosLoad(t, c)}
	u.lb = &balancer{clients: clientsOf(t, c.edges, u.secret()), edges: c.edges}
	stop := u.load(t.Context())
	u.awaitGood(t, 40*time.Second, "at the start")
	for range count(1, 6) {
		i := leader(t, c.Cluster)
		c.Servers[i].Kill()
		u.awaitGood(t, 60*time.Second, "after the leader was killed")
		c.RestartServer(i)
		c.AwaitCurrent(i)
	}
	u.awaitGood(t, 60*time.Second, "after all are back")
	stop()
	u.report(t)
	if len(u.failures) > 0 {
		t.Errorf("clients were told %v", u.failures)
	}
	u.wantSettled(t)
}

// TestBrokerStartsWithoutLeader: a broker that starts while a nats-server of three is gone, and
// with it perhaps whoever leads JetStream, waits for the others to choose.
func TestBrokerStartsWithoutLeader(t *testing.T) {
	args := []string{"--queue-replicas", "3"}
	c := stack.StartRouted(t, args...)
	for i, server := range c.Servers {
		server.Kill()
		broker := c.StartBroker(args...)
		c.RestartServer(i)
		c.AwaitCurrent(i)
		if err := broker.Stop(); err != nil {
			t.Errorf("the broker that started without nats-server %d ended with %v", i, err)
		}
	}
}
