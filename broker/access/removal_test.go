package access_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/access"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/internal/natstest"
)

// An agent that is removed loses all its connections at once and can't come back, and
// nobody else loses any.
func TestRemovalCuts(t *testing.T) { eachSite(t, removalCuts) }

func removalCuts(t *testing.T, server site) {
	system := server.System()
	lost := make(chan string, 16)
	var cut []*nats.Conn
	for _, name := range []string{"tokens", "bulk"} {
		nc := server.Agent(tenant, mallory, model)
		nc.SetDisconnectErrHandler(func(*nats.Conn, error) { lost <- name })
		cut = append(cut, nc)
	}
	bystander := server.Agent(other, victim, model)
	bystander.SetDisconnectErrHandler(func(*nats.Conn, error) { lost <- "the victim" })
	server.Agents().Remove(mallory)
	ended := make(chan error, 1)
	began := time.Now()
	go func() {
		ended <- access.Sweep(t.Context(), system, access.Scope{Account: access.AccountAgents, User: string(mallory)},
			func(_ context.Context, users []string) ([]string, error) { return users, nil })
	}()
	for range 2 {
		select {
		case name := <-lost:
			if name == "the victim" {
				t.Error("another agent was cut off")
			}
		case <-time.After(patience):
			t.Fatal("a connection is still there")
		}
	}
	t.Logf("cut after %s", time.Since(began))
	if err := <-ended; err != nil {
		t.Error(err)
	}
	cfg := server.AgentConfig(tenant, mallory, model)
	server.Agents().Remove(mallory)
	if nc, err := bus.Connect(cfg, natstest.Log); !errors.Is(err, nats.ErrAuthorization) {
		if err == nil {
			nc.Close()
		}
		t.Errorf("an agent that was removed gets %v", err)
	}
	for _, nc := range cut {
		if nc.IsConnected() {
			t.Error("it came back")
		}
	}
	if !bystander.IsConnected() {
		t.Error("another agent was cut off")
	}
}
