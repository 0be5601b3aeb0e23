package e2e

import (
	"testing"

	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/worker/demo"
)

func TestRolesInSeparateProcesses(t *testing.T) {
	backend := stack.StartBackend(t, demo.Options{})
	c := stack.StartCluster(t)
	c.StartWorker(backend.URL)
	edge := c.StartEdge()
	awaitModel(t, []*stack.Edge{edge}, c.Key.Reveal(), demo.ModelID)
	client := newClient(edge.BaseURL, c.Key.Reveal())
	defer client.close()
	for _, stream := range []bool{true, false} {
		r := client.chat(t.Context(), stream, map[string]any{"demo": map[string]any{"tokens": 50, "numbered": true}})
		wantWhole(t, r)
		t.Logf("%+v", r)
	}
}
