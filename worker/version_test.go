package worker_test

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/internal/natstest"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker"
	"github.com/ownllm/ownllm/worker/backend"
	"github.com/ownllm/ownllm/worker/demo"
)

// lines is a log that a test reads while it is written.
type lines struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *lines) has(what string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Contains(l.text.String(), what)
}

// A worker says which versions it speaks, and doesn't serve a broker that answers in one
// that it doesn't, or that refuses it; either way its log tells which side to upgrade.
func TestBrokersOfOtherVersions(t *testing.T) {
	t.Parallel()
	next := schemas.ProtocolVersion + 1
	refusal := schemas.Versions{Oldest: next, Newest: next + 1}.Refusal(schemas.Protocol)
	for name, tc := range map[string]struct {
		welcome schemas.Welcome
		says    string
	}{
		"answers in the next version": {
			schemas.Welcome{Version: next, Stream: schemas.JobStream(agent), Consumers: map[string]string{"demo": "c"}},
			fmt.Sprintf("The brokers speak version %d of the bus protocol", next),
		},
		"refuses": {schemas.Welcome{Error: schemas.Errorf(schemas.CodeInvalidValue, "%s", refusal)}, "Upgrade this machine's worker"},
		"says no version": {
			schemas.Welcome{Stream: schemas.JobStream(agent), Consumers: map[string]string{"demo": "c"}}, "serving model",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server, s := natstest.Start(t), newServer(t, demo.Options{})
			server.Queue(1)
			hellos := make(chan schemas.Hello, 1)
			broker := server.Connect("broker")
			sub, err := broker.Subscribe(schemas.HelloWildcard, func(m *nats.Msg) {
				var hello schemas.Hello
				if json.Unmarshal(m.Data, &hello) == nil {
					select {
					case hellos <- hello:
					default:
					}
				}
				_ = m.Respond(tc.welcome.Encode())
			})
			if err != nil {
				t.Fatal(err)
			}
			defer sub.Unsubscribe()
			if err := broker.Flush(); err != nil {
				t.Fatal(err)
			}
			log := &lines{}
			w := worker.New(server.Agent(tenant, agent, "demo"), newBulk(t, server), worker.Config{
				Tenant: tenant, Agent: agent, Host: "host", Software: "test",
				Backends: []backend.Config{{URL: s.URL, Slots: 1}}, Drain: patience,
			}, slog.New(slog.NewTextHandler(log, nil)))
			stop := background(t, w.Run)
			if got := (<-hellos).Versions(); got != schemas.Protocol {
				t.Errorf("the hello is of %s, want %s", got, schemas.Protocol)
			}
			until(t, "the worker to say it", func() bool { return log.has(tc.says) })
			stop()
			if served := log.has("serving model"); served != (tc.says == "serving model") {
				t.Errorf("the worker serves: %t", served)
			}
		})
	}
}
