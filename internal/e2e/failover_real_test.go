package e2e

import (
	"encoding/json"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/internal/secret"
	"github.com/ownllm/ownllm/internal/stack"
)

// realModel is a real model behind a real llama.cpp server in a process of its own.
type realModel struct {
	*stack.Process
	URL, Model string
}

// startRealModel starts the server of scripts/realmodel.
func startRealModel(t *testing.T) *realModel {
	t.Helper()
	const scripts = "../../scripts/"
	if testing.Short() {
		t.Skip("not in a short run: it needs what scripts/setup installs")
	}
	if _, err := os.Stat(scripts + ".venv/complete"); err != nil {
		t.Fatalf("%v: run scripts/setup first", err)
	}
	m := &realModel{Process: stack.Run(t, "llama.cpp", nil, scripts+".venv/bin/python", scripts+"realmodel/serve.py", "--threads", "1", "--context", "1024")}
	stack.Until(t, 3*time.Minute, "the real model", func() bool {
		if !m.Alive() {
			t.Fatalf("the real model has ended: %v", m.Err())
		}
		for _, line := range m.Log() {
			// The log of its server may have begun the line, or go on in it.
			if i := strings.Index(line, `{"url"`); i >= 0 && json.NewDecoder(strings.NewReader(line[i:])).Decode(m) == nil {
				return true
			}
		}
		return false
	})
	return m
}

// adminOf is a client of the admin API of an edge.
func adminOf(t *testing.T, edge *stack.Edge) *adminapi.Client {
	t.Helper()
	api, err := adminapi.NewClient("http://"+edge.Addr+adminapi.Prefix, secret.String(stack.AdminToken))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(api.Close)
	return api
}

// awaitAgents waits until the edge knows so many agents that are up and have a model.
func awaitAgents(t *testing.T, edge *stack.Edge, want int) {
	t.Helper()
	api := adminOf(t, edge)
	stack.Until(t, 30*time.Second, "the edge to know the agents", func() bool {
		agents, err := api.Agents(t.Context(), "")
		up := 0
		for _, a := range agents {
			if a.State == adminapi.AgentUp && len(a.Models) > 0 {
				up++
			}
		}
		return err == nil && up == want
	})
}

// busy reports whether the server is at work.
func (m *realModel) busy(t *testing.T) bool {
	resp, err := http.Get(m.URL + "/slots")
	if err != nil {
		t.Error(err)
		return false
	}
	defer resp.Body.Close()
	var slots []struct {
		Processing bool `json:"is_processing"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&slots); err != nil {
		t.Error(err)
	}
	for _, s := range slots {
		if s.Processing {
			return true
		}
	}
	return false
}

// TestRealModelIsContinued: a reply of a real model on a real llama.cpp server, of which
// the worker or the server itself is killed, is continued by a second server. What came
// before is the beginning of what there is in the end.
func TestRealModelIsContinued(t *testing.T) {
	models := []*realModel{startRealModel(t), startRealModel(t)}
	for _, victim := range []string{"worker", "server"} { // the server last: it isn't started again
		t.Run(victim, func(t *testing.T) {
			c := stack.StartCluster(t)
			edge := c.StartEdge()
			client, key := failoverClient(t, c, edge)
			workers := []*stack.Worker{c.StartWorker(models[0].URL).Serving(), c.StartWorker(models[1].URL).Serving()}
			awaitAgents(t, edge, 2)
			const tokens = 150
			before, killed := "", 0
			r := client.follow(t.Context(), true, map[string]any{
				"model": models[0].Model, "max_tokens": tokens, "temperature": 0, "stream_options": map[string]any{"include_usage": true},
				"messages": []map[string]string{{"role": "user", "content": "Write a long story about a dog and the sea."}},
			}, func(r *reply) {
				if killed > 0 || len(r.text) < 40 {
					return
				}
				before = r.text
				for i, m := range models {
					if !m.busy(t) {
						continue
					}
					killed++
					if victim == "server" {
						m.Kill()
					} else {
						workers[i].Kill()
					}
				}
			})
			wantWhole(t, r)
			if killed != 1 || !strings.HasPrefix(r.text, before) || len(r.text) <= len(before) {
				t.Errorf("%d were killed; before it was %q, in the end %q", killed, before, r.text)
			}
			if r.roles != 1 || r.usage > tokens || r.finish == "length" && r.usage != tokens || r.prompt == 0 {
				t.Errorf("the reply has %d roles, finish_reason %q, and counts %d tokens after %d", r.roles, r.finish, r.usage, r.prompt)
			}
			e := openLedger(t, c.DatabaseURL).wantClosed(key, 30*time.Second)[r.request()]
			if e.Outcome != "done" || e.Completion != int64(r.usage) || e.Prompt != int64(r.prompt) {
				t.Errorf("the ledger has %+v, the reply %d tokens after %d", e, r.usage, r.prompt)
			}
			t.Logf("killed after %q: %q", before, r.text)
		})
	}
}
