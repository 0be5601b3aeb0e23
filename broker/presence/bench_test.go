package presence

import (
	"fmt"
	"testing"

	"github.com/ownllm/ownllm/schemas"
)

// BenchmarkRoute does what a request asks of the table, with so many agents that have its
// model: it is looked up, sent to one of them, and taken back.
func BenchmarkRoute(b *testing.B) {
	for _, agents := range []int{10, 1_000} {
		b.Run(fmt.Sprintf("agents=%d", agents), func(b *testing.B) {
			table := NewTable()
			for i := range agents {
				table.Observe(tenant, schemas.AgentID(fmt.Sprint("agt_", i)), &schemas.Heartbeat{
					Incarnation: "inc_1", State: schemas.AgentUp, Slots: 4,
					Inventory: &schemas.Inventory{Models: []schemas.Model{{ID: "m", State: schemas.ModelReady}, {ID: "n", State: schemas.ModelCold}}},
				}, t0)
			}
			var busy [64]schemas.AgentID // of as many requests under way
			for n := 0; b.Loop(); n++ {
				if _, ok := table.Find(tenant, "m"); !ok {
					b.Fatal("the model isn't there")
				}
				c, err := table.Route(tenant, "m", nil)
				if err != nil {
					b.Fatal(err)
				}
				i := n % len(busy)
				table.Release(tenant, busy[i], "m")
				busy[i] = c.Agent
			}
		})
	}
}
