package access_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/access"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/internal/natstest"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
)

// eachSite runs a test against the embedded server, and against an external one that asks
// two brokers.
func eachSite(t *testing.T, test func(*testing.T, site)) {
	t.Run("embedded", func(t *testing.T) { test(t, natstest.Start(t)) })
	t.Run("external", func(t *testing.T) { test(t, startExternal(t)) })
}

// external is a nats-server in a process of its own.
type external struct {
	t      *testing.T
	cfg    bus.Config
	agents *natstest.Agents
	args   []string
	*stack.Process
}

// start starts the server, or another in its place.
func (x *external) start() {
	x.t.Helper()
	x.Process = stack.Run(x.t, "nats-server", nil, stack.Binary(x.t, "github.com/nats-io/nats-server/v2"), x.args...)
	stack.Until(x.t, patience, "nats-server", func() bool { return strings.Contains(strings.Join(x.Log(), "\n"), "Server is ready") })
}

// startExternal starts it, with more in its configuration.
func startExternal(t *testing.T, more ...string) *external {
	t.Helper()
	return startExternalBehind(t, func(d access.Directory, _ *nats.Conn) access.Directory { return d }, more...)
}

// startExternalBehind is startExternal with something before the directory of each broker.
func startExternalBehind(t *testing.T, door func(access.Directory, *nats.Conn) access.Directory, more ...string) *external {
	t.Helper()
	// A token may hold anything.
	const token = `the "secret" $HOME \ of # the test`
	addr, dir := stack.FreeAddr(t), t.TempDir()
	text, err := access.ServerConfig(token, false)
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(dir, "nats.conf")
	if err := os.WriteFile(config, []byte(text+strings.Join(more, "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	host, port, _ := strings.Cut(addr, ":")
	x := &external{t: t, cfg: bus.Config{URL: "nats://" + addr, Password: token}, agents: natstest.NewAgents()}
	x.args = []string{"-c", config, "-a", host, "-p", port, "-sd", dir}
	x.start()
	for range 2 {
		system := x.System()
		callout, err := access.NewCallout(system, door(x.agents, system), token, natstest.Log)
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() { ended <- callout.Run(ctx) }()
		t.Cleanup(func() {
			stop()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		})
	}
	return x
}

func (x *external) Open(cfg bus.Config) *nats.Conn {
	x.t.Helper()
	nc, err := bus.Connect(cfg, natstest.Log)
	if err != nil {
		x.t.Fatal(err)
	}
	x.t.Cleanup(nc.Close)
	return nc
}

func (x *external) Connect(name string) *nats.Conn { return x.Open(x.cfg.As(bus.UserAgents, name)) }
func (x *external) Ingress(name string) *nats.Conn { return x.Open(x.cfg.As(bus.UserIngress, name)) }
func (x *external) Config(name string) bus.Config  { return x.cfg.As(bus.UserAgents, name) }
func (x *external) System() *nats.Conn             { return x.Open(x.cfg.As(bus.UserSystem, "system")) }
func (x *external) Agents() *natstest.Agents       { return x.agents }

func (x *external) Queue(perModel int64) (*nats.Conn, *bus.Queue) {
	x.t.Helper()
	return natstest.Provision(x.t, x.Open(x.cfg.As(bus.UserCore, "queue")), perModel)
}

func (x *external) AgentConfig(tenant schemas.TenantID, id schemas.AgentID, models ...string) bus.Config {
	return x.agents.Config(x.cfg, tenant, id, models...)
}

func (x *external) Agent(tenant schemas.TenantID, id schemas.AgentID, models ...string) *nats.Conn {
	x.t.Helper()
	return x.Open(x.AgentConfig(tenant, id, models...))
}
