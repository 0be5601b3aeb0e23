package worker

import (
	"context"
	"encoding/json"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/schemas"
)

const (
	beatEvery    = time.Second
	refreshEvery = 2 * time.Second
)

// beat sends a heartbeat once a second.
func (w *Worker) beat(ctx context.Context) error {
	_, inventory := w.stock.inventory()
	w.say(w.currentState(), inventory)
	tick := time.NewTicker(beatEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			w.say(w.currentState(), nil)
		}
	}
}

func (w *Worker) currentState() schemas.AgentState {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.state
}

// watchStock asks the backends what they have. A change is told at once; a change
// in the set of models needs a hello too, since each has a queue of its own.
func (w *Worker) watchStock(ctx context.Context) error {
	tick := time.NewTicker(refreshEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-w.stock.loaded:
		}
		before, _ := w.stock.inventory()
		set := w.stock.refresh(ctx)
		if hash, inventory := w.stock.inventory(); hash != before {
			w.say(w.currentState(), inventory)
		}
		if set {
			signal(w.introduce)
		}
	}
}

func (w *Worker) heartbeat(state schemas.AgentState, inventory *schemas.Inventory) schemas.Heartbeat {
	hash, _ := w.stock.inventory()
	hb := schemas.Heartbeat{
		Version: schemas.ProtocolVersion, Incarnation: w.incarnation, State: state,
		Hash: hash, Inventory: inventory, Slots: w.stock.slotCount(), Holds: true,
	}
	if inventory != nil {
		hb.Host = w.cfg.Host
	}
	for _, r := range w.list() {
		if r.working.Load() {
			hb.Running++
		} else {
			hb.Waiting++
		}
	}
	return hb
}

// say publishes a heartbeat. A lost one is made up for by the next.
func (w *Worker) say(state schemas.AgentState, inventory *schemas.Inventory) {
	hb := w.heartbeat(state, inventory)
	err := w.tokens.Publish(schemas.HeartbeatSubject(w.cfg.Tenant, w.cfg.Agent), hb.Encode())
	if err != nil && !bus.Down(err) {
		w.log.Warn("heartbeat not sent", "error", err)
	}
}

// control answers requests to this agent.
func (w *Worker) control(m *nats.Msg) {
	var c schemas.Control
	if err := json.Unmarshal(m.Data, &c); err != nil {
		w.log.Warn("control request dropped", "error", err)
		return
	}
	w.mu.Lock()
	r := w.runs[c.Nonce]
	w.mu.Unlock()
	switch c.Operation {
	case schemas.ControlCancel:
		if r != nil {
			r.cancel(errCancelled)
		}
	case schemas.ControlLimit:
		if r != nil {
			r.allowance.set(c.Limit, c.More)
		}
	case schemas.ControlReplaced:
		if c.Incarnation > w.incarnation {
			w.log.Error("another worker of this agent was started later and has taken over; this one stops")
			signal(w.replaced)
		}
	case schemas.ControlInventory:
		_, inventory := w.stock.inventory()
		w.respond(m, w.heartbeat(w.currentState(), inventory).Encode())
	default:
		w.log.Warn("control request of unknown kind dropped", "operation", c.Operation)
	}
}

func (w *Worker) respond(m *nats.Msg, data []byte) {
	if m.Reply == "" {
		return
	}
	if err := w.tokens.Publish(m.Reply, data); err != nil && !bus.Down(err) {
		w.log.Warn("answer not sent", "error", err)
	}
}
