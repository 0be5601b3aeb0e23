package desk_test

import (
	"errors"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/desk"
	"github.com/ownllm/ownllm/broker/presence"
	"github.com/ownllm/ownllm/internal/natstest"
	"github.com/ownllm/ownllm/schemas"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const tenant = schemas.TenantID("ten_1")

var anybody = books.Identity{Key: "key_1", Tenant: tenant, Scopes: []string{books.ScopeAll}}

// open returns a desk whose tenant has one agent with the model m, and has had one with
// the model away.
func open(t *testing.T) *desk.Desk {
	t.Helper()
	table := presence.NewTable()
	table.Restore(presence.Known{Tenant: tenant, Agent: "agt_away", Inventory: schemas.Inventory{Models: []schemas.Model{{ID: "away"}}}})
	inventory := schemas.Inventory{Models: []schemas.Model{{ID: "m", State: schemas.ModelReady, Slots: 1, ContextWindow: 100}}}
	table.Observe(tenant, "agt_1", &schemas.Heartbeat{
		Version: schemas.ProtocolVersion, Incarnation: schemas.NewIncarnation(), State: schemas.AgentUp,
		Hash: inventory.Hash(), Inventory: &inventory, Slots: 1,
	}, time.Now())
	return desk.New(table, presence.NewFeed(natstest.Start(t).Connect("feed"), table, natstest.Log))
}

func TestChat(t *testing.T) {
	d := open(t)
	const messages = `"messages":[{"role":"user","content":"x"}]`
	for _, c := range []struct {
		about, body, wait string
		id                books.Identity
		code              schemas.Code
		model             string // of the request, with an error, too
	}{
		{"all is well", `{"model":"m",` + messages + `,"stream":true}`, "30s", anybody, "", "m"},
		{"not JSON", `x`, "", anybody, schemas.CodeInvalidJSON, ""},
		{"no model", `{` + messages + `}`, "", anybody, schemas.CodeModelRequired, ""},
		{"beyond the scope", `{"model":"m",` + messages + `}`, "", books.Identity{Tenant: tenant, Scopes: []string{"model:n"}}, schemas.CodeScopeRequired, "m"},
		{"tools", `{"model":"m","tools":[{"type":"function","function":{"name":"f"}}],` + messages + `}`, "", anybody, schemas.CodeModelDoesNotSupportTools, "m"},
		{"a wait of nothing", `{"model":"m",` + messages + `}`, "soon", anybody, schemas.CodeInvalidValue, "m"},
		{"too long a wait", `{"model":"m",` + messages + `}`, "3601", anybody, schemas.CodeInvalidValue, "m"},
	} {
		received := time.Now()
		req, model, err := d.Chat(c.id, desk.Call{ID: "req_1", Received: received, Body: c.body, Wait: c.wait, WaitHeader: "H"})
		if req.Model != c.model {
			t.Errorf("%s: model %q", c.about, req.Model)
		}
		var refusal *schemas.Error
		if c.code != "" {
			if !errors.As(err, &refusal) || refusal.Code != c.code {
				t.Errorf("%s: %v, want %s", c.about, err, c.code)
			}
			continue
		}
		if err != nil || model.ID != "m" || req.ID != "req_1" || req.Key != "key_1" || req.Tenant != tenant || req.Body != c.body || !req.Stream ||
			req.Operation != schemas.OperationChat || !req.Received.Equal(received) || *req.LoadWait != 30*time.Second || req.Prompt == 0 || req.Most == 0 {
			t.Errorf("%s: %+v, %+v, %v", c.about, req, model, err)
		}
	}
}

func TestModels(t *testing.T) {
	d := open(t)
	all, err := d.Models(anybody)
	if err != nil || len(all) == 0 || all[0].OwnedBy != "ownllm" {
		t.Errorf("%+v, %v", all, err)
	}
	none, err := d.Models(books.Identity{Tenant: tenant, Scopes: []string{"model:other"}})
	if err != nil || none == nil || len(none) != 0 {
		t.Errorf("%+v, %v: want an empty list, which isn't null", none, err)
	}
	if m, err := d.Reachable(anybody, "m"); err != nil || m.ID != "m" {
		t.Errorf("%+v, %v", m, err)
	}
	// The feed hasn't run, so nobody can be said not to exist.
	var refusal *schemas.Error
	if _, err := d.Model(anybody, "nope"); !errors.As(err, &refusal) || refusal.Code != schemas.CodeInternalError || refusal.RetryAfter != desk.LearnWait {
		t.Errorf("%v", err)
	}
	if _, err := d.Models(books.Identity{Tenant: "ten_2"}); !errors.As(err, &refusal) {
		t.Errorf("%v", err)
	}
}
