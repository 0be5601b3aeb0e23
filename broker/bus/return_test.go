package bus_test

import (
	"context"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/internal/natstest"
)

// A job that comes while the queue's connection is on its way back waits for it.
func TestPublishWaitsForTheConnection(t *testing.T) {
	server := natstest.Start(t)
	nc, q := server.Queue(10)
	before := nc.Stats().Reconnects
	if err := nc.ForceReconnect(); err != nil {
		t.Fatal(err)
	}
	// It may have left already, or not yet; whichever: none is refused.
	for n := 1; n == 1 || nc.Stats().Reconnects == before; n++ {
		if _, err := q.Publish(t.Context(), agentA, job("req_1", n), "{}", map[string][]string{}); err != nil {
			t.Errorf("job %d: %v", n, err)
		}
		if n > 9 {
			break // the queue is full
		}
	}
	server.Restart(func() {
		for nc.IsConnected() {
			time.Sleep(time.Millisecond)
		}
		began := time.Now()
		_, err := q.Publish(t.Context(), agentA, job("req_2", 1), "{}", map[string][]string{})
		if took := time.Since(began); !bus.Down(err) || took < bus.ReturnWait/2 || took > 8*bus.ReturnWait {
			t.Errorf("without a bus: %v after %s", err, took)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		began = time.Now()
		if _, err := q.Publish(ctx, agentA, job("req_2", 2), "{}", map[string][]string{}); err == nil || time.Since(began) >= bus.ReturnWait {
			t.Errorf("nobody waits: %v after %s", err, time.Since(began))
		}
	})
	// Longer than it waits, since the server is ready before its streams are.
	var err error
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		if _, err = q.Publish(t.Context(), agentA, job("req_3", 1), "{}", map[string][]string{}); err == nil {
			break
		}
	}
	if err != nil {
		t.Errorf("after a restart: %v", err)
	}
}
