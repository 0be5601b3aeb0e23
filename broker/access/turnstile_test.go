package access_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/access"
	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/internal/natstest"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
)

// running runs a turnstile until the end of the test.
func running(t *testing.T, s *access.Turnstile, system *nats.Conn) {
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx, system) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// eachTurnstile runs a test against the embedded server, and an external one with two brokers,
// each with a turnstile.
func eachTurnstile(t *testing.T, limit int, test func(*testing.T, site)) {
	t.Run("embedded", func(t *testing.T) {
		var turnstile *access.Turnstile
		server := natstest.StartBehind(t, func(d access.Directory) access.Directory {
			turnstile = access.NewTurnstile(d, limit, natstest.Log)
			return turnstile
		})
		running(t, turnstile, server.System())
		test(t, server)
	})
	t.Run("external", func(t *testing.T) {
		server := startExternalBehind(t, func(d access.Directory, system *nats.Conn) access.Directory {
			turnstile := access.NewTurnstile(d, limit, natstest.Log)
			running(t, turnstile, system)
			return turnstile
		})
		test(t, server)
	})
}

// TestThousandConnections: a key that connects a thousand times has as many connections as it
// may, and another one gets in and stays meanwhile.
func TestThousandConnections(t *testing.T) {
	const limit, many, parallel = 16, 1000, 50
	eachTurnstile(t, limit, func(t *testing.T, server site) {
		key, others, system := apikey.New(), apikey.New(), server.System()
		server.Agents().Issue(ourKey, key, 0)
		server.Agents().Issue(theirKey, others, 0)
		var lost atomic.Int32 // connections of the others
		their := func() {
			for deadline := time.Now().Add(patience); ; {
				nc, err := nats.Connect(server.Config("").URL, nats.Token(others.Reveal()), nats.NoReconnect(), nats.Timeout(patience),
					nats.DisconnectErrHandler(func(*nats.Conn, error) { lost.Add(1) }))
				if err == nil {
					t.Cleanup(func() {
						nc.SetDisconnectErrHandler(nil)
						nc.Close()
					})
					return
				}
				// A server that is busy pings before it has answered, which the client doesn't like.
				if errors.Is(err, nats.ErrAuthorization) || time.Now().After(deadline) {
					t.Errorf("another key isn't let in: %v", err)
					return
				}
			}
		}
		their()

		var mu sync.Mutex
		var ours []*nats.Conn
		var work sync.WaitGroup
		work.Go(func() { // while it goes on
			for range limit - 2 {
				their()
			}
		})
		for range parallel {
			work.Go(func() {
				for range many / parallel {
					nc, err := nats.Connect(server.Config("").URL, nats.Token(key.Reveal()), nats.NoReconnect())
					if err == nil {
						mu.Lock()
						ours = append(ours, nc)
						mu.Unlock()
					}
				}
			})
		}
		work.Wait()
		t.Cleanup(func() {
			for _, nc := range ours {
				nc.Close()
			}
		})
		count := func(key schemas.KeyID) (n int) {
			for _, user := range connected(t, system) {
				if strings.HasPrefix(user, string(key)+".") {
					n++
				}
			}
			return n
		}
		stack.Until(t, patience, "the key to have as many connections as it may", func() bool { return count(ourKey) == limit })
		t.Logf("%d of %d were let in, %d are there", len(ours), many, limit)
		if n := len(ours); n > 4*limit {
			t.Errorf("%d connections were let in, if only for a moment", n)
		}
		if n := count(theirKey); n != limit-1 || lost.Load() != 0 {
			t.Errorf("the others have %d connections, and lost %d", n, lost.Load())
		}
		for _, nc := range ours {
			nc.Close()
		}
		stack.Until(t, patience, "the key to get in again", func() bool {
			nc, err := nats.Connect(server.Config("").URL, nats.Token(key.Reveal()), nats.NoReconnect())
			if err == nil {
				nc.Close()
			}
			return err == nil
		})
	})
}

// Connections that are there before a broker runs are counted, and those that end with their
// server aren't for long.
func TestTurnstileCountsAnew(t *testing.T) {
	const limit = 4
	var late []func()
	server := startExternalBehind(t, func(d access.Directory, system *nats.Conn) access.Directory {
		turnstile := access.NewTurnstile(d, limit, natstest.Log)
		late = append(late, func() { running(t, turnstile, system) })
		return turnstile
	})
	key, system := apikey.New(), server.System()
	server.Agents().Issue(ourKey, key, 0)
	var open []*nats.Conn
	connect := func() error {
		nc, err := nats.Connect(server.Config("").URL, nats.Token(key.Reveal()), nats.NoReconnect(), nats.Timeout(patience))
		if err == nil {
			open = append(open, nc)
			t.Cleanup(nc.Close)
		}
		return err
	}
	// As many as each of the two lets in that hear of nothing.
	for len(open) <= limit {
		if err := connect(); err != nil && !errors.Is(err, nats.ErrAuthorization) {
			t.Fatal(err)
		}
	}
	for _, run := range late {
		run()
	}
	stack.Until(t, patience, "the newest to be closed", func() bool { return len(connected(t, system)) == limit })
	for i, nc := range open[:limit] {
		if !nc.IsConnected() {
			t.Errorf("connection %d is closed", i)
		}
	}
	if err := connect(); !errors.Is(err, nats.ErrAuthorization) {
		t.Errorf("one more: %v", err)
	}
	stack.Until(t, patience, "the server to say why", func() bool {
		return strings.Contains(strings.Join(server.Log(), "\n"), "too many connections")
	})

	server.Kill()
	server.start()
	began := time.Now()
	stack.Until(t, patience, "the key to get in", func() bool { return connect() == nil })
	t.Logf("%s after its server died with its connections the key was let in", time.Since(began).Round(time.Millisecond))
}
