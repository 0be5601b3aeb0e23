package access_test

import (
	"strings"
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/internal/natstest"
	"github.com/ownllm/ownllm/schemas"
)

// An agent that comes by WebSocket works like any other, and is bound like any other.
func TestWebSocket(t *testing.T) {
	server := natstest.Start(t)
	if url := server.WebSocketURL(); !strings.HasPrefix(url, "ws://127.0.0.1:") {
		t.Fatalf("the address is %q", url)
	}
	canWork(t, overWebSocket{server})
	fencedIn(t, overWebSocket{natstest.Start(t)})
}

// overWebSocket is a server whose agents come by WebSocket.
type overWebSocket struct{ *natstest.Server }

func (o overWebSocket) AgentConfig(tenant schemas.TenantID, id schemas.AgentID, models ...string) bus.Config {
	cfg := o.Server.AgentConfig(tenant, id, models...)
	cfg.URL = o.WebSocketURL()
	return cfg
}

func (o overWebSocket) Agent(tenant schemas.TenantID, id schemas.AgentID, models ...string) *nats.Conn {
	return o.Open(o.AgentConfig(tenant, id, models...))
}
