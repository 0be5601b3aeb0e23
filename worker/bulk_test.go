package worker_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/access"
	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// traffic is what the server knows of the worker's connections of one name.
type traffic struct {
	open, closed int
	sent         int // bytes, to the worker
}

// connections are those of the worker that are open or were, by their names.
func connections(t *testing.T, system *nats.Conn) map[string]traffic {
	t.Helper()
	found := make(map[string]traffic)
	for state := range 2 { // open ones, and closed ones
		m, err := system.Request("$SYS.REQ.SERVER.PING.CONNZ", fmt.Appendf(nil, `{"auth":true,"state":%d,"acc":%q}`, state, access.AccountAgents), patience)
		if err != nil {
			t.Fatal(err)
		}
		var answer struct {
			Data struct {
				Connections []struct {
					Name string `json:"name"`
					User string `json:"authorized_user"`
					Sent int    `json:"out_bytes"`
				} `json:"connections"`
			} `json:"data"`
		}
		if err := json.Unmarshal(m.Data, &answer); err != nil {
			t.Fatal(err)
		}
		for _, c := range answer.Data.Connections {
			if c.User == string(agent) {
				sum := found[c.Name]
				sum.open += 1 - state
				sum.closed += state
				sum.sent += c.Sent
				found[c.Name] = sum
			}
		}
	}
	return found
}

// awaitRest waits until the second connection is closed, and returns what it was used for.
func awaitRest(t *testing.T, system *nats.Conn) (bulk traffic) {
	t.Helper()
	until(t, "the second connection to be closed", func() bool {
		bulk = connections(t, system)[bulkName]
		return bulk.open == 0
	})
	return bulk
}

// largeBody is the least size of the body of a large request: several pieces.
const largeBody = schemas.MaxInlineBody + schemas.BodyPiece

// large is a request whose body stays with its owner.
func large(faults map[string]any) dispatch.Request {
	req := request("demo", true, faults)
	req.Body = strings.TrimSuffix(req.Body, "}") + `,"padding":"` + strings.Repeat("x", largeBody) + `"}`
	return req
}

// The second connection is there for large bodies, and goes when it has rested. What needs
// none has none; what is fetched over it doesn't pass by the tokens.
func TestSecondConnection(t *testing.T) {
	t.Parallel()
	h, _ := one(t, demo.Options{}, 2)
	system := h.nats.System()
	h.start(request("demo", true, numbered(3, 0))).wantNumbered(3)
	if all := connections(t, system); len(all) != 1 || all[bulkName] != (traffic{}) {
		t.Errorf("a worker that was asked for little has %+v", all)
	}
	for round := 1; round <= 2; round++ {
		h.start(large(numbered(5, 0))).wantNumbered(5)
		if bulk := awaitRest(t, system); bulk.closed < round || bulk.sent < round*largeBody {
			t.Errorf("after %d large bodies the second connection was %+v", round, bulk)
		}
	}
	for name, other := range connections(t, system) {
		if name != bulkName && other.sent > schemas.MaxInlineBody {
			t.Errorf("%d bytes came by the connection of the tokens", other.sent)
		}
	}
}

// A worker that has lost both connections has both when it needs them.
func TestSecondConnectionAfterACut(t *testing.T) {
	t.Parallel()
	h, s := one(t, demo.Options{}, 2)
	system := h.nats.System()
	for range 3 {
		h.start(large(numbered(3, 0))).wantNumbered(3)
		running := h.start(request("demo", true, numbered(20, time.Second))).begin()
		disconnect(t, system, agent)
		h.start(large(numbered(3, 0))).wantNumbered(3)
		running.wantNumbered(20)
		until(t, "the backend to be free", func() bool { return s.stats().Active == 0 })
	}
}

// A report takes the second connection, too.
func TestReportOverTheSecondConnection(t *testing.T) {
	t.Parallel()
	h, _ := one(t, demo.Options{}, 1)
	system := h.nats.System()
	o := h.owner()
	job := o.job(time.Now().Add(10 * time.Minute))
	o.ask(job, wish(t, nil, numbered(6000, 10*time.Minute)))
	r := o.hear()
	r.until("some tokens", func() bool { return r.tokens > 4 })
	if bulk := connections(t, system)[bulkName]; bulk != (traffic{}) {
		t.Errorf("before there is anything to report there is %+v", bulk)
	}
	o.die()
	h.wantReport(job)
	if bulk := awaitRest(t, system); bulk.closed == 0 {
		t.Error("the report took another way")
	}
}
