package books_test

import (
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/schemas"
)

// slug is a fresh one.
func slug() string { return strings.ToLower(strings.TrimPrefix(string(schemas.NewTenantID()), "ten_")) }

func TestAgents(t *testing.T) {
	s := open(t)
	tenant, _ := household(t, s, "acme")
	other, _ := household(t, s, "other")
	report := books.AgentReport{
		ID: schemas.NewAgentID(), Tenant: tenant.ID, Name: "rig", Incarnation: schemas.NewIncarnation(),
		Inventory: schemas.Inventory{Models: []schemas.Model{{
			ID: "qwen/qwen2.5:32b", ContextWindow: 131072, SizeMB: 40000, State: schemas.ModelReady, Created: 1714500000,
			Capabilities: schemas.Capabilities{Completion: true, Tools: true}, Backend: "vllm", Slots: 8, Detail: "ünï <&>",
		}}},
	}
	version := changes(t, s, -1).Version
	if err := s.UpsertAgent(t.Context(), report); err != nil {
		t.Fatal(err)
	}
	get := func() books.Agent {
		t.Helper()
		list, next, err := s.ListAgents(t.Context(), "acme", books.Page{})
		if err != nil || len(list) != 1 || next != "" {
			t.Fatalf("list %+v, %q, %v", list, next, err)
		}
		return list[0]
	}
	first := get()
	if first.ID != report.ID || first.Tenant != tenant.ID || first.Name != "rig" || first.Incarnation != report.Incarnation ||
		first.InventoryHash != report.Inventory.Hash() || first.Inventory.Hash() != report.Inventory.Hash() {
		t.Errorf("stored %+v", first)
	}
	if diff := cmp.Diff(report.Inventory, first.Inventory); diff != "" {
		t.Error(diff)
	}

	report.Name, report.Incarnation, report.Inventory = "new", schemas.NewIncarnation(), schemas.Inventory{Models: []schemas.Model{}}
	if err := s.UpsertAgent(t.Context(), report); err != nil {
		t.Fatal(err)
	}
	second := get()
	if second.Name != "new" || second.Incarnation != report.Incarnation || len(second.Inventory.Models) != 0 ||
		second.CreatedAt != first.CreatedAt || !second.LastSeen.After(first.LastSeen) {
		t.Errorf("stored %+v", second)
	}

	// What a partial inventory can't speak of stays, as failed, until one that is whole comes.
	model := func(id string) schemas.Model { return schemas.Model{ID: id, State: schemas.ModelReady} }
	for _, c := range []struct {
		partial bool
		says    []schemas.Model
		want    string
	}{
		{false, []schemas.Model{model("a"), model("b")}, "a=ready b=ready"},
		{true, []schemas.Model{model("b")}, "b=ready a=failed"},
		{true, nil, "b=failed a=failed"},
		{true, []schemas.Model{model("a")}, "a=ready b=failed"},
		{false, []schemas.Model{model("a")}, "a=ready"},
		{false, []schemas.Model{}, ""},
	} {
		report.Inventory = schemas.Inventory{Models: c.says, Partial: c.partial}
		if err := s.UpsertAgent(t.Context(), report); err != nil {
			t.Fatal(err)
		}
		var have []string
		for _, m := range get().Inventory.Models {
			have = append(have, m.ID+"="+string(m.State))
		}
		if got := strings.Join(have, " "); got != c.want || get().Inventory.Partial != c.partial || get().InventoryHash != get().Inventory.Hash() {
			t.Errorf("after %+v the books have %q", c, got)
		}
	}
	newcomer := books.AgentReport{ID: schemas.NewAgentID(), Tenant: other.ID, Incarnation: report.Incarnation, Inventory: schemas.Inventory{Partial: true}}
	if err := s.UpsertAgent(t.Context(), newcomer); err != nil {
		t.Errorf("a partial inventory of an agent that is new: %v", err)
	}
	second = get()

	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if err := s.TouchAgents(t.Context(), []schemas.AgentID{schemas.NewAgentID(), report.ID, report.ID}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if third := get(); !third.LastSeen.After(second.LastSeen) {
		t.Error("touched, and not seen later")
	}
	if err := s.TouchAgents(t.Context(), nil); err != nil {
		t.Error(err)
	}
	if got := changes(t, s, -1).Version; got != version {
		t.Error("agents come and go without an admin, and yet the version rose")
	}

	for _, c := range []struct {
		code   schemas.Code
		param  string
		change func(*books.AgentReport)
	}{
		{schemas.CodeInvalidValue, "id", func(r *books.AgentReport) { r.Tenant = other.ID }},
		{schemas.CodeInvalidValue, "id", func(r *books.AgentReport) { r.ID = "rig" }},
		{schemas.CodeInvalidValue, "incarnation", func(r *books.AgentReport) { r.Incarnation = "" }},
		{schemas.CodeInvalidValue, "name", func(r *books.AgentReport) { r.Name = "a\r" }},
		{schemas.CodeInvalidValue, "inventory", func(r *books.AgentReport) { r.Inventory.Models = []schemas.Model{{ID: "a\x00"}} }},
		{schemas.CodeInvalidValue, "inventory", func(r *books.AgentReport) { r.Inventory.Models = []schemas.Model{{}} }},
		{schemas.CodeInvalidValue, "inventory", func(r *books.AgentReport) {
			r.Inventory.Models = []schemas.Model{{ID: "a", Detail: strings.Repeat("x", 1<<20)}}
		}},
		{schemas.CodeInvalidValue, "", func(r *books.AgentReport) { r.Inventory.Models = []schemas.Model{{ID: "a", Detail: "\x00"}} }},
		{schemas.CodeNotFound, "", func(r *books.AgentReport) { r.ID, r.Tenant = schemas.NewAgentID(), schemas.NewTenantID() }},
	} {
		bad := report
		c.change(&bad)
		wantError(t, s.UpsertAgent(t.Context(), bad), c.code, c.param)
	}
	if got := get(); got.Tenant != tenant.ID || got.Name != "new" {
		t.Errorf("a refused report left a mark: %+v", got)
	}

	if err := s.UpsertAgent(t.Context(), books.AgentReport{ID: schemas.NewAgentID(), Tenant: other.ID, Incarnation: schemas.NewIncarnation()}); err != nil {
		t.Fatal(err)
	}
	if list, _, err := s.ListAgents(t.Context(), "", books.Page{}); err != nil || len(list) != 3 {
		t.Errorf("of all tenants: %+v, %v", list, err)
	}
	_, _, err := s.ListAgents(t.Context(), "nobody", books.Page{})
	wantError(t, err, schemas.CodeNotFound, "")
}
