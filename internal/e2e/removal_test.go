package e2e

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// TestRemovalCutsAtOnce removes an agent while its worker streams, with a nats-server of its
// own, whose brokers say who comes in: its connections close, its reply ends, its model is
// gone at every edge, and with the credential that it has it doesn't come back.
func TestRemovalCutsAtOnce(t *testing.T) {
	const model = "doomed"
	backend := stack.StartMortalBackend(t, demo.ModelID, model)
	c := stack.StartCluster(t)
	edges := c.StartEdges(2)
	c.StartWorker(backend.URL, "--model", demo.ModelID).Serving() // another agent, who stays
	dir := t.TempDir()
	agent := c.Pair(c.Tenant.ID, dir)
	worker := c.RestartWorker(dir, backend.URL, "--model", model).Serving()
	clients := clientsOf(t, edges, c.Key.Reveal())
	awaitModel(t, edges, c.Key.Reveal(), model)
	ctx, cancel := context.WithTimeout(t.Context(), raceTime)
	defer cancel()
	doomed := &cause{cut: schemas.CodeAgentOffline, code: schemas.CodeModelNotFound, also: schemas.CodeAgentOffline}
	runs := []*running{doomed.run(ctx, t, clients[0], model), doomed.run(ctx, t, clients[1], model)}
	for _, r := range runs {
		<-r.began
	}

	if _, err := adminOf(t, edges[0]).RemoveAgent(ctx, agent); err != nil {
		t.Fatal(err)
	}
	removed := time.Now()
	for i, client := range clients {
		if _, took := doomed.await(ctx, t, client, model, removed); took > time.Second+busyCores {
			t.Errorf("edge %d has told after %s", i+1, took)
		}
	}
	stack.Until(t, time.Second+busyCores, "the connections to close", func() bool { return logged(worker.Process, "bus connection lost") })
	t.Logf("cut off %s after the removal; replies ended with %s", time.Since(removed).Round(time.Millisecond), doomed.checkRunning(t, runs, removed))
	worker.Kill()

	refusals := func() (n int) {
		for _, line := range c.NATS.Log() {
			if strings.Contains(line, "authentication error") && strings.Contains(line, string(agent)) {
				n++
			}
		}
		return n
	}
	before := refusals()
	again := stack.Run(t, "worker", []string{"OWNLLM_NATS_URL=" + c.NATSURL()}, stack.Binary(t, stack.OwnLLM), "worker", "--data-dir", dir,
		"--backend", backend.URL, "--model", model, "--ops-listen", "127.0.0.1:0", "--server", "http://"+edges[1].Addr)
	stack.Until(t, 30*time.Second, "the bus to turn the worker away", func() bool { return refusals() > before })
	for range 8 {
		for i, client := range clients {
			if r := client.chat(ctx, false, map[string]any{"model": model}); r.code() != string(schemas.CodeModelNotFound) {
				t.Errorf("edge %d, with a worker that was removed at the door: status %d, error %+v", i+1, r.status, r.err)
			}
			wantWhole(t, client.chat(ctx, true, nil))
		}
		time.Sleep(250 * time.Millisecond) // it tries again, and tells the server that it lives
	}
	if logged(again, "serving model") {
		t.Error("a worker that was removed serves again")
	}
}
