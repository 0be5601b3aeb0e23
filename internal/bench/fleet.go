package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker"
	"github.com/ownllm/ownllm/worker/backend"
)

// Fleet is many agents in one process, each a worker as it is, with connections, heartbeats
// and consumers of its own. They share a backend.
type Fleet struct {
	NATS    string     `json:"nats"`
	Backend string     `json:"backend"`
	Agents  []Enlisted `json:"agents"`
}

// Enlisted is one agent of a fleet.
type Enlisted struct {
	Tenant     schemas.TenantID `json:"tenant"`
	Agent      schemas.AgentID  `json:"agent"`
	Credential string           `json:"credential"`
}

const (
	// fleetDrain is how long the agents of a fleet finish what they run.
	fleetDrain = time.Second
	// boarding is how many agents come in at once.
	boarding = 16
)

// serveFleet runs the fleet that stdin describes until ctx ends.
func serveFleet(ctx context.Context, stdin io.Reader, stderr io.Writer) error {
	var f Fleet
	if err := json.NewDecoder(stdin).Decode(&f); err != nil {
		return fmt.Errorf("read the fleet: %w", err)
	}
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: slog.LevelError}))
	gangway := make(chan struct{}, boarding)
	group, ctx := errgroup.WithContext(ctx)
	for _, a := range f.Agents {
		gangway <- struct{}{}
		group.Go(func() error {
			w, leave, err := f.board(a, log)
			<-gangway
			if err != nil {
				return fmt.Errorf("agent %s: %w", a.Agent, err)
			}
			defer leave()
			return w.Run(ctx)
		})
	}
	return group.Wait()
}

// board connects the worker of an agent.
func (f *Fleet) board(a Enlisted, log *slog.Logger) (w *worker.Worker, leave func(), err error) {
	incarnation := schemas.NewIncarnation()
	address := bus.Config{URL: f.NATS, Password: a.Credential, InboxPrefix: schemas.AgentInboxPrefix(a.Agent), Patient: true}
	tokens, err := bus.Connect(address.As(string(a.Agent), schemas.ConnectionName(a.Tenant, incarnation)), log)
	if err != nil {
		return nil, nil, err
	}
	bulk := bus.NewSideline(address.As(string(a.Agent), "ownllm-worker-bulk"), worker.BulkRest, log)
	w = worker.New(tokens, bulk, worker.Config{
		Tenant: a.Tenant, Agent: a.Agent, Incarnation: incarnation, Host: "fleet", Software: "bench",
		Backends: []backend.Config{{URL: f.Backend}}, Drain: fleetDrain,
	}, log)
	return w, func() { tokens.Close(); bulk.Close() }, nil
}
