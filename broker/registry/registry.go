// Package registry answers workers that introduce themselves: it makes the consumers
// from which they pull their jobs, and stores what they offer, so that an edge that
// starts while they are away still knows their models.
//
// Every broker runs one; they share the hellos in a queue group. A hello is taken only if
// its reply subject is in the inbox of the agent that its subject names: the bus checks
// who may say hello for whom, but it publishes answers of its own to any subject. All that a hello does
// can be done again, so a worker that got no answer just asks once more.
package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/nats-io/nats.go"
	"golang.org/x/sync/errgroup"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/presence"
	"github.com/ownllm/ownllm/schemas"
)

// Store keeps what agents offer.
type Store interface {
	// UpsertAgent stores what an agent says of itself. A *schemas.Error is the agent's
	// fault.
	UpsertAgent(context.Context, books.AgentReport) error
	// TouchAgents notes that agents were heard of.
	TouchAgents(context.Context, []schemas.AgentID) error
}

// Registry answers hellos.
type Registry struct {
	nc     *nats.Conn
	queue  *bus.Queue
	store  Store
	agents *presence.Table
	log    *slog.Logger
}

// New returns a registry that isn't listening yet. Agents that the table has as here
// are noted as seen.
func New(nc *nats.Conn, queue *bus.Queue, store Store, agents *presence.Table, log *slog.Logger) *Registry {
	return &Registry{nc: nc, queue: queue, store: store, agents: agents, log: log}
}

const (
	// group is the queue group of all brokers.
	group = "broker"
	// parallel is how many hellos are answered at once: after a restart of the bus all
	// agents come at the same time.
	parallel = 16
	// backlog is how many hellos may wait. Beyond it they are dropped, and said again.
	backlog = 4096
	// answerWait bounds the work for one hello.
	answerWait = 10 * time.Second
	// touchEvery is how exact the stored time is at which an agent was last seen.
	touchEvery = 5 * time.Second
)

// Run answers hellos until ctx ends.
func (r *Registry) Run(ctx context.Context) error {
	hellos := make(chan *nats.Msg, backlog)
	sub, err := r.nc.ChanQueueSubscribe(schemas.HelloWildcard, group, hellos)
	if err != nil {
		return fmt.Errorf("listen to hellos: %w", err)
	}
	defer sub.Unsubscribe()
	work, workCtx := errgroup.WithContext(ctx)
	for range parallel {
		work.Go(func() error {
			for {
				select {
				case <-workCtx.Done():
					return nil
				case m := <-hellos:
					r.answer(workCtx, m)
				}
			}
		})
	}
	work.Go(func() error { return r.touch(workCtx) })
	return work.Wait()
}

// touch notes which agents are here.
func (r *Registry) touch(ctx context.Context) error {
	tick := time.NewTicker(touchEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		var here []schemas.AgentID
		for _, a := range r.agents.Agents("") {
			if a.State != "" {
				here = append(here, a.Agent)
			}
		}
		if err := r.store.TouchAgents(ctx, here); err != nil && ctx.Err() == nil {
			r.log.WarnContext(ctx, "agents not noted as seen", "error", err)
		}
	}
}

func (r *Registry) answer(ctx context.Context, m *nats.Msg) {
	if !schemas.AnswersTo(m.Subject, m.Reply) {
		r.log.WarnContext(ctx, "hello with a foreign reply subject dropped", "subject", m.Subject)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, answerWait)
	defer cancel()
	welcome, err := r.welcome(ctx, m)
	var refused *schemas.Error
	switch {
	case errors.As(err, &refused) && refused.Code != schemas.CodeInternalError:
		r.log.WarnContext(ctx, "worker refused", "subject", m.Subject, "code", refused.Code, "error", refused.Message)
		welcome = schemas.Welcome{Error: refused}
	case err != nil:
		// Not the worker's fault: no answer makes it ask again, maybe another broker.
		if ctx.Err() == nil || errors.Is(ctx.Err(), context.DeadlineExceeded) {
			r.log.ErrorContext(ctx, "hello not answered", "subject", m.Subject, "error", err)
		}
		return
	}
	if err := m.Respond(welcome.Encode()); err != nil && !bus.Down(err) {
		r.log.WarnContext(ctx, "welcome not sent", "subject", m.Subject, "error", err)
	}
}

func (r *Registry) welcome(ctx context.Context, m *nats.Msg) (schemas.Welcome, error) {
	tenant, agent, err := schemas.ParseAgentSubject(m.Subject)
	if err != nil {
		return schemas.Welcome{}, schemas.Errorf(schemas.CodeInvalidValue, "%v", err)
	}
	var hello schemas.Hello
	if err := json.Unmarshal(m.Data, &hello); err != nil {
		return schemas.Welcome{}, schemas.Errorf(schemas.CodeInvalidJSON, "The hello isn't valid JSON.")
	}
	version, ok := schemas.Protocol.Agree(hello.Versions())
	if !ok {
		return schemas.Welcome{}, schemas.Errorf(schemas.CodeInvalidValue, "%s", schemas.Protocol.Refusal(hello.Versions()))
	}
	if current := r.agents.Current(tenant, agent); current > hello.Incarnation {
		return schemas.Welcome{}, schemas.Errorf(schemas.CodeInvalidValue,
			"Another worker of this agent was started later and has taken over. Run one worker for each agent, or pair this machine as an agent of its own.")
	}
	report := books.AgentReport{
		ID: agent, Tenant: tenant, Name: hello.Host, Inventory: hello.Inventory, Incarnation: hello.Incarnation,
	}
	if err := r.store.UpsertAgent(ctx, report); err != nil {
		return schemas.Welcome{}, fmt.Errorf("store agent %s: %w", agent, err)
	}
	welcome := schemas.Welcome{Version: version, Stream: schemas.JobStream(agent), Consumers: make(map[string]string, len(hello.Inventory.Models))}
	for _, model := range hello.Inventory.Models {
		name, err := r.queue.EnsureConsumer(ctx, tenant, agent, model.ID)
		if err != nil {
			return schemas.Welcome{}, err
		}
		welcome.Consumers[model.ID] = name
	}
	// Older runs hear that they are replaced. If the word gets lost, their next hello is
	// refused.
	word := schemas.Control{Operation: schemas.ControlReplaced, Incarnation: hello.Incarnation}
	if err := r.nc.Publish(schemas.ControlSubject(agent), word.Encode()); err != nil && !bus.Down(err) {
		r.log.WarnContext(ctx, "older runs not told", "agent", agent, "error", err)
	}
	return welcome, nil
}
