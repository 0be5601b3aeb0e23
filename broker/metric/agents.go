package metric

import (
	"context"

	otelmetric "go.opentelemetry.io/otel/metric"

	"github.com/ownllm/ownllm/schemas"
)

// The states of agents that no heartbeat has.
const (
	// StateAside is of an agent that is heard of over HTTPS alone.
	StateAside schemas.AgentState = "aside"
	// StateAway is of an agent that isn't heard of.
	StateAway schemas.AgentState = "away"
)

// states are all that NameAgents counts, so that none is missing when it is empty.
var states = []schemas.AgentState{schemas.AgentUp, schemas.AgentDraining, StateAside, StateAway}

// WatchAgents measures NameAgents, as count has it whenever somebody asks.
func WatchAgents(provider otelmetric.MeterProvider, count func() map[schemas.AgentState]int64) error {
	_, err := provider.Meter(Scope).Int64ObservableGauge(NameAgents,
		otelmetric.WithUnit("{agent}"), otelmetric.WithDescription("Agents that this process knows of, by state."),
		otelmetric.WithInt64Callback(func(_ context.Context, o otelmetric.Int64Observer) error {
			counted := count()
			for _, state := range states {
				o.Observe(counted[state], otelmetric.WithAttributes(attrState.String(string(state))))
			}
			return nil
		}))
	return err
}
