package access_test

import (
	"fmt"
	"slices"
	"testing"

	"github.com/ownllm/ownllm/broker/access"
	"github.com/ownllm/ownllm/schemas"
)

// Who is connected is told whole, once for each agent, and without edges and brokers.
func TestConnected(t *testing.T) { eachSite(t, whoIsConnected) }

func whoIsConnected(t *testing.T, server site) {
	system := server.System()
	server.Connect("house")
	if got, err := access.Connected(t.Context(), system); err != nil || len(got) != 0 {
		t.Errorf("nobody: %v, %v", got, err)
	}
	var want []schemas.AgentID
	for i := range 5 {
		id := schemas.AgentID(fmt.Sprintf("agt_%d", i))
		want = append(want, id)
		for range 2 {
			server.Agent(tenant, id, model)
		}
	}
	gone := server.Agent(tenant, "agt_gone", model)
	gone.Close()
	for _, page := range []int{1, 3, 100} {
		got, err := access.ConnectedByPages(t.Context(), system, page)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("pages of %d: %v, %v, want %v", page, got, err, want)
		}
	}
}
