package e2e

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/stack"
)

// TestConnectionsOfAKey: of a key's connections to NATS as many are let in as may be, whichever
// broker is asked, and a log says why no more are.
func TestConnectionsOfAKey(t *testing.T) {
	t.Parallel()
	const limit = 4
	flag := stack.Flag("key-connections", limit)
	c := stack.StartCluster(t, flag)
	c.StartBroker(flag)
	id, secret := newKey(t, c, books.NewKey{})
	newPublisher(t, c.NATSURL(), id, secret)
	var open []*nats.Conn
	defer func() {
		for _, nc := range open {
			nc.Close()
		}
	}()
	for range 5 * limit {
		if nc, err := nats.Connect(c.NATSURL(), nats.Token(secret), nats.NoReconnect(), nats.Timeout(20*time.Second)); err == nil {
			open = append(open, nc)
		}
	}
	stack.Until(t, 20*time.Second, "the key to have as many as it may", func() bool {
		there := 1 // the publisher
		for _, nc := range open {
			if nc.IsConnected() {
				there++
			}
		}
		return there == limit
	})
	stack.Until(t, 20*time.Second, "a log to say why", func() bool {
		return slices.ContainsFunc(c.Brokers, func(b *stack.Broker) bool {
			return strings.Contains(strings.Join(b.Log(), "\n"), string(id)+" has 4 connections")
		})
	})
}
