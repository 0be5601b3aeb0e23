package presence

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ownllm/ownllm/schemas"
)

const (
	tenant = schemas.TenantID("ten_1")
	other  = schemas.TenantID("ten_2")
)

var t0 = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// step changes a table.
type step func(*Table)

func do(table *Table, steps ...step) {
	for _, s := range steps {
		s(table)
	}
}

// load is what a heartbeat says of running, waiting and slots.
type load struct{ running, waiting, slots int }

// inventory returns models in the given states: "m=ready".
func inventory(models ...string) *schemas.Inventory {
	inv := &schemas.Inventory{}
	for _, m := range models {
		id, state, _ := strings.Cut(m, "=")
		inv.Models = append(inv.Models, schemas.Model{ID: id, State: schemas.ModelState(state)})
	}
	return inv
}

// says is a heartbeat at t0.
func says(id schemas.AgentID, inc schemas.Incarnation, state schemas.AgentState, l load, models ...string) step {
	return saysAt(t0, id, inc, state, l, models...)
}

func saysAt(now time.Time, id schemas.AgentID, inc schemas.Incarnation, state schemas.AgentState, l load, models ...string) step {
	return func(t *Table) {
		hb := &schemas.Heartbeat{
			Version: schemas.ProtocolVersion, Incarnation: inc, State: state, Hash: strings.Join(models, ","),
			Running: l.running, Waiting: l.waiting, Slots: l.slots, Inventory: inventory(models...),
		}
		t.Observe(tenant, id, hb, now)
	}
}

func up(id schemas.AgentID, models ...string) step {
	return says(id, "inc_1", schemas.AgentUp, load{slots: 4}, models...)
}

func draining(id schemas.AgentID, models ...string) step {
	return says(id, "inc_1", schemas.AgentDraining, load{slots: 4}, models...)
}

func bye(id schemas.AgentID) step { return says(id, "inc_1", schemas.AgentBye, load{}) }

func remembered(id schemas.AgentID, models ...string) step {
	return func(t *Table) {
		t.Restore(Known{Tenant: tenant, Agent: id, Name: "gpu", LastSeen: t0.Add(-time.Hour), Inventory: *inventory(models...)})
	}
}

func lost(id schemas.AgentID) step    { return func(t *Table) { t.Lost(tenant, id, "") } }
func expire(after time.Duration) step { return func(t *Table) { t.Expire(t0.Add(after)) } }

// gives makes n choices without a release, as this process does while it has n
// attempts under way.
func gives(n int, model string) step {
	return func(t *Table) {
		for range n {
			if _, err := t.Route(tenant, model, nil); err != nil {
				panic(err)
			}
		}
	}
}

func TestRoute(t *testing.T) {
	for _, c := range []struct {
		name    string
		steps   []step
		exclude []schemas.AgentID
		agent   schemas.AgentID // or
		code    schemas.Code
		says    string // a part of the message
	}{
		{name: "an empty table", code: schemas.CodeModelNotFound, says: `"m"`},
		{name: "another model", steps: []step{up("a", "n=ready")}, code: schemas.CodeModelNotFound},
		{name: "an agent without models", steps: []step{up("a")}, code: schemas.CodeModelNotFound},
		{name: "another model, and its agent is away", steps: []step{up("a", "n=ready"), lost("a")}, code: schemas.CodeModelNotFound},
		{name: "another tenant's agent", steps: []step{func(t *Table) {
			t.Observe(other, "a", &schemas.Heartbeat{Incarnation: "inc_1", State: schemas.AgentUp, Hash: "h", Inventory: inventory("m=ready")}, t0)
		}}, code: schemas.CodeModelNotFound},

		{name: "ready", steps: []step{up("a", "m=ready")}, agent: "a"},
		{name: "cold", steps: []step{up("a", "m=cold")}, agent: "a"},
		{name: "loading", steps: []step{up("a", "m=loading")}, agent: "a"},
		{name: "failed", steps: []step{up("a", "m=failed")}, code: schemas.CodeBackendError, says: "isn't answering"},
		{name: "failed, and the worker says why", steps: []step{up("a", "m=ready"), func(t *Table) {
			inv := &schemas.Inventory{Models: []schemas.Model{{ID: "m", State: schemas.ModelFailed, Detail: "out of memory"}}}
			t.Observe(tenant, "a", &schemas.Heartbeat{Incarnation: "inc_1", State: schemas.AgentUp, Hash: "h", Inventory: inv}, t0)
		}}, code: schemas.CodeBackendError, says: "out of memory"},
		{name: "known from Postgres only", steps: []step{remembered("a", "m=ready")}, code: schemas.CodeAgentOffline, says: "is connected"},
		{name: "said bye", steps: []step{up("a", "m=ready"), bye("a")}, code: schemas.CodeAgentOffline},
		{name: "lost", steps: []step{up("a", "m=ready"), lost("a")}, code: schemas.CodeAgentOffline},
		{name: "silent, not stale yet", steps: []step{up("a", "m=ready"), expire(StaleAfter)}, agent: "a"},
		{name: "stale", steps: []step{up("a", "m=ready"), expire(StaleAfter + 1)}, code: schemas.CodeAgentOffline},
		{name: "stale, and back", steps: []step{up("a", "m=ready"), expire(time.Hour), up("a", "m=ready")}, agent: "a"},
		{name: "back without its inventory", steps: []step{up("a", "m=ready"), expire(time.Hour), func(t *Table) {
			t.Observe(tenant, "a", &schemas.Heartbeat{Incarnation: "inc_2", State: schemas.AgentUp, Hash: "new"}, t0)
		}}, agent: "a"},
		{name: "draining", steps: []step{draining("a", "m=ready")}, code: schemas.CodeAgentOffline, says: "shutting down"},
		{name: "the model was removed", steps: []step{up("a", "m=ready"), up("a", "n=ready")}, code: schemas.CodeModelNotFound},
		{name: "forgotten", steps: []step{up("a", "m=ready"), func(t *Table) { t.Forget(tenant, "a") }}, code: schemas.CodeModelNotFound},

		{name: "ready before loading", steps: []step{up("a", "m=loading"), up("b", "m=ready")}, agent: "b"},
		{name: "ready before cold", steps: []step{up("a", "m=cold"), up("b", "m=ready")}, agent: "b"},
		{name: "cold before loading", steps: []step{up("a", "m=loading"), up("b", "m=cold")}, agent: "b"},
		{name: "anything before failed", steps: []step{up("a", "m=failed"), up("b", "m=loading")}, agent: "b"},
		{name: "anything before draining", steps: []step{draining("a", "m=ready"), up("b", "m=cold")}, agent: "b"},
		{name: "ready and busy before cold and free", steps: []step{
			says("a", "inc_1", schemas.AgentUp, load{slots: 4}, "m=cold"), says("b", "inc_1", schemas.AgentUp, load{4, 9, 4}, "m=ready"),
		}, agent: "b"},
		{name: "the one that is here", steps: []step{up("a", "m=ready"), up("b", "m=ready"), lost("a")}, agent: "b"},
		{name: "the one that has the model", steps: []step{up("a", "n=ready"), up("b", "m=ready")}, agent: "b"},
		{name: "of equals the first", steps: []step{up("b", "m=ready"), up("a", "m=ready"), up("c", "m=ready")}, agent: "a"},
		{name: "the less loaded", steps: []step{
			says("a", "inc_1", schemas.AgentUp, load{2, 0, 4}, "m=ready"), says("b", "inc_1", schemas.AgentUp, load{1, 0, 4}, "m=ready"),
		}, agent: "b"},
		{name: "less loaded for its size", steps: []step{
			says("a", "inc_1", schemas.AgentUp, load{1, 0, 2}, "m=ready"), says("b", "inc_1", schemas.AgentUp, load{3, 0, 8}, "m=ready"),
		}, agent: "b"},
		{name: "what waits is load", steps: []step{
			says("a", "inc_1", schemas.AgentUp, load{1, 3, 4}, "m=ready"), says("b", "inc_1", schemas.AgentUp, load{3, 0, 4}, "m=ready"),
		}, agent: "b"},
		{name: "no slots is one slot", steps: []step{
			says("a", "inc_1", schemas.AgentUp, load{1, 0, 0}, "m=ready"), says("b", "inc_1", schemas.AgentUp, load{1, 0, 2}, "m=ready"),
		}, agent: "b"},
		{name: "what was given counts before a heartbeat says so", steps: []step{up("a", "m=ready"), up("b", "m=ready"), gives(1, "m")}, agent: "b"},
		{name: "what was given of another model counts", steps: []step{up("a", "m=ready", "n=ready"), gives(2, "n"), up("b", "m=ready")}, agent: "b"},
		{name: "what was given isn't counted twice", steps: []step{
			up("a", "m=ready"), gives(2, "m"),
			says("a", "inc_1", schemas.AgentUp, load{2, 0, 4}, "m=ready"), says("b", "inc_1", schemas.AgentUp, load{3, 0, 4}, "m=ready"),
		}, agent: "a"},
		{name: "what was released is free", steps: []step{
			up("a", "m=ready"), gives(3, "m"), up("b", "m=ready"),
			func(t *Table) {
				for range 3 {
					t.Release(tenant, "a", "m")
				}
			},
		}, agent: "a"},

		{name: "excluded", steps: []step{up("a", "m=ready"), up("b", "m=loading")}, exclude: []schemas.AgentID{"a"}, agent: "b"},
		{name: "all are excluded", steps: []step{up("a", "m=ready"), up("b", "m=ready")}, exclude: []schemas.AgentID{"a", "b"}, code: schemas.CodeAgentOffline},
		{name: "excluded, and the other failed", steps: []step{up("a", "m=ready"), up("b", "m=failed")}, exclude: []schemas.AgentID{"a"}, code: schemas.CodeBackendError},
		{name: "failed here, away there", steps: []step{up("a", "m=failed"), up("b", "m=ready"), lost("b")}, code: schemas.CodeBackendError},
		{name: "failed, and away since", steps: []step{up("a", "m=failed"), lost("a")}, code: schemas.CodeAgentOffline},
		{name: "draining and failed", steps: []step{draining("a", "m=failed")}, code: schemas.CodeAgentOffline, says: "shutting down"},
	} {
		t.Run(c.name, func(t *testing.T) {
			table := NewTable()
			do(table, c.steps...)
			exclude := map[schemas.AgentID]bool{}
			for _, id := range c.exclude {
				exclude[id] = true
			}
			got, err := table.Route(tenant, "m", exclude)
			if c.code == "" {
				if err != nil || got.Agent != c.agent || got.Model.ID != "m" || got.Incarnation == "" {
					t.Fatalf("Route is %+v, %v, want agent %q", got, err, c.agent)
				}
				return
			}
			var e *schemas.Error
			if !errors.As(err, &e) || e.Code != c.code || !strings.Contains(e.Message, c.says) || !strings.Contains(e.Message, `"m"`) {
				t.Fatalf("Route is %+v, %v, want %s with %q", got, err, c.code, c.says)
			}
			if got != (Choice{}) {
				t.Errorf("an error comes with a choice: %+v", got)
			}
			if notFound := c.code == schemas.CodeModelNotFound; notFound != (e.Param == "model") || notFound == (e.RetryAfter > 0) {
				t.Errorf("%s has param %q and a wait of %v", c.code, e.Param, e.RetryAfter)
			}
		})
	}
}

func TestOffline(t *testing.T) {
	if e := NewTable().Away(tenant, ""); e.Code != schemas.CodeAgentOffline || strings.Contains(e.Message, `""`) || !strings.Contains(e.Message, "ownllm status") {
		t.Errorf("for no model in particular: %v", e)
	}
	if e := NewTable().Away(tenant, "m"); !strings.Contains(e.Message, `"m"`) {
		t.Errorf("for a model: %v", e)
	}
}

func TestRelease(t *testing.T) {
	table := NewTable()
	do(table, up("a", "m=ready"), up("b", "m=ready"))
	// One release too many, or for an agent that is gone, doesn't make room for more.
	for range 3 {
		table.Release(tenant, "a", "m")
	}
	table.Release(tenant, "x", "m")
	table.Release("ten_x", "a", "m")
	var got []schemas.AgentID
	for range 4 {
		c, err := table.Route(tenant, "m", nil)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, c.Agent)
	}
	if diff := cmp.Diff([]schemas.AgentID{"a", "b", "a", "b"}, got); diff != "" {
		t.Errorf("requests went to (-want +got):\n%s", diff)
	}
}

func TestModels(t *testing.T) {
	for _, c := range []struct {
		name      string
		steps     []step
		want      []string
		reachable bool
	}{
		{name: "nobody"},
		{name: "known from Postgres only", steps: []step{remembered("a", "m=ready")}},
		{name: "away", steps: []step{up("a", "m=ready"), lost("a")}},
		{name: "said bye", steps: []step{up("a", "m=ready"), bye("a")}},
		{name: "here without models", steps: []step{up("a")}, reachable: true},
		{name: "sorted", steps: []step{up("a", "n=ready", "m=cold", "o=failed")}, want: []string{"m=cold", "n=ready", "o=failed"}, reachable: true},
		{name: "draining", steps: []step{draining("a", "m=ready")}, want: []string{"m=ready"}, reachable: true},
		{name: "two agents, each once", steps: []step{up("a", "m=cold", "n=ready"), up("b", "m=ready", "o=loading")}, want: []string{"m=ready", "n=ready", "o=loading"}, reachable: true},
		{name: "one of two is away", steps: []step{up("a", "m=ready", "n=ready"), up("b", "m=cold"), lost("a")}, want: []string{"m=cold"}, reachable: true},
		{name: "ready is best", steps: []step{up("a", "m=failed"), up("b", "m=loading"), up("c", "m=cold"), up("d", "m=ready")}, want: []string{"m=ready"}, reachable: true},
		{name: "cold is better than loading", steps: []step{up("a", "m=failed"), up("b", "m=loading"), up("c", "m=cold")}, want: []string{"m=cold"}, reachable: true},
		{name: "loading is better than failed", steps: []step{up("a", "m=failed"), up("b", "m=loading")}, want: []string{"m=loading"}, reachable: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			table := NewTable()
			do(table, c.steps...)
			models, reachable := table.Models(tenant)
			var got []string
			for _, m := range models {
				got = append(got, m.ID+"="+string(m.State))
			}
			if diff := cmp.Diff(c.want, got); diff != "" || reachable != c.reachable {
				t.Errorf("reachable %v, want %v (-want +got):\n%s", reachable, c.reachable, diff)
			}
			if models == nil {
				t.Error("no models is a nil list")
			}
			if models, reachable := table.Models(other); len(models) > 0 || reachable {
				t.Errorf("another tenant sees %v", models)
			}
		})
	}
}

func TestFind(t *testing.T) {
	for _, c := range []struct {
		name  string
		steps []step
		want  schemas.ModelState // or empty, if there is none
	}{
		{"nobody", nil, ""},
		{"another model", []step{up("a", "n=ready")}, ""},
		{"here", []step{up("a", "m=cold")}, "cold"},
		{"draining", []step{draining("a", "m=ready")}, "ready"},
		{"known from Postgres only", []step{remembered("a", "m=ready")}, "ready"},
		{"away", []step{up("a", "m=loading"), lost("a")}, "loading"},
		{"here, though worse, before away", []step{up("a", "m=ready"), lost("a"), up("b", "m=failed")}, "failed"},
		{"the best of those here", []step{up("a", "m=failed"), up("b", "m=cold"), up("c", "m=loading")}, "cold"},
		{"the best of those away", []step{remembered("a", "m=failed"), remembered("b", "m=cold")}, "cold"},
		{"no longer offered", []step{up("a", "m=ready"), up("a", "n=ready")}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			table := NewTable()
			do(table, c.steps...)
			m, ok := table.Find(tenant, "m")
			if ok != (c.want != "") || m.State != c.want {
				t.Errorf("Find is %+v, %v, want %q", m, ok, c.want)
			}
			if m, ok := table.Find(other, "m"); ok {
				t.Errorf("another tenant finds %+v", m)
			}
		})
	}
}

// A request is checked against what Find says. If that changed from one call to the
// next with nothing else changed, the same request would be refused now and then.
func TestAnswersDoNotChange(t *testing.T) {
	for range 20 {
		table := NewTable()
		for _, id := range []schemas.AgentID{"d", "b", "a", "c"} {
			inv := &schemas.Inventory{Models: []schemas.Model{{ID: "m", State: schemas.ModelReady, Backend: string(id)}}}
			table.Observe(tenant, id, &schemas.Heartbeat{Incarnation: "inc_1", State: schemas.AgentUp, Hash: "h", Inventory: inv}, t0)
		}
		if m, _ := table.Find(tenant, "m"); m.Backend != "a" {
			t.Fatalf("Find has the model of agent %s", m.Backend)
		}
		if list, _ := table.Models(tenant); list[0].Backend != "a" {
			t.Fatalf("Models has the model of agent %s", list[0].Backend)
		}
	}
}

// watched is a table that notes what OnGone hears.
func watched() (*Table, *[]Gone) {
	table, gone := NewTable(), new([]Gone)
	table.OnGone(func(g Gone) {
		table.Agents("") // the lock is free
		*gone = append(*gone, g)
	})
	return table, gone
}

func TestGone(t *testing.T) {
	const (
		isUp    = schemas.AgentUp
		isDrain = schemas.AgentDraining
		isBye   = schemas.AgentBye
	)
	beat := func(inc schemas.Incarnation, state schemas.AgentState) step {
		return says("a", inc, state, load{slots: 1}, "m=ready")
	}
	ended := func(inc schemas.Incarnation) Gone { return Gone{Agent: "a", Incarnation: inc} }
	drains := func(inc schemas.Incarnation) Gone { return Gone{Agent: "a", Incarnation: inc, Draining: true} }
	for _, c := range []struct {
		name  string
		steps []step
		want  []Gone
		state schemas.AgentState
		inc   schemas.Incarnation
	}{
		{name: "comes", steps: []step{beat("inc_1", isUp)}, state: isUp, inc: "inc_1"},
		{name: "stays", steps: []step{beat("inc_1", isUp), beat("inc_1", isUp)}, state: isUp, inc: "inc_1"},
		{name: "drains, told once", steps: []step{beat("inc_1", isUp), beat("inc_1", isDrain), beat("inc_1", isDrain)}, want: []Gone{drains("inc_1")}, state: isDrain, inc: "inc_1"},
		{name: "drains and goes", steps: []step{beat("inc_1", isUp), beat("inc_1", isDrain), beat("inc_1", isBye)}, want: []Gone{drains("inc_1"), ended("inc_1")}, inc: "inc_1"},
		{name: "comes draining", steps: []step{beat("inc_1", isDrain)}, want: []Gone{drains("inc_1")}, state: isDrain, inc: "inc_1"},
		{name: "goes", steps: []step{beat("inc_1", isUp), beat("inc_1", isBye)}, want: []Gone{ended("inc_1")}, inc: "inc_1"},
		{name: "goes twice", steps: []step{beat("inc_1", isUp), beat("inc_1", isBye), beat("inc_1", isBye)}, want: []Gone{ended("inc_1")}, inc: "inc_1"},
		{name: "goes before it was seen", steps: []step{beat("inc_1", isBye)}, inc: "inc_1"},
		{name: "bye is the last word", steps: []step{beat("inc_1", isUp), beat("inc_1", isBye), beat("inc_1", isDrain), beat("inc_1", isUp)}, want: []Gone{ended("inc_1")}, inc: "inc_1"},
		{name: "goes and comes", steps: []step{beat("inc_1", isUp), beat("inc_1", isBye), beat("inc_2", isUp)}, want: []Gone{ended("inc_1")}, state: isUp, inc: "inc_2"},
		{name: "is replaced", steps: []step{beat("inc_1", isUp), beat("inc_2", isUp)}, want: []Gone{ended("inc_1")}, state: isUp, inc: "inc_2"},
		{name: "is replaced while it drains", steps: []step{beat("inc_1", isDrain), beat("inc_2", isUp)}, want: []Gone{drains("inc_1"), ended("inc_1")}, state: isUp, inc: "inc_2"},
		{name: "is replaced by one that drains", steps: []step{beat("inc_1", isDrain), beat("inc_2", isDrain)}, want: []Gone{drains("inc_1"), ended("inc_1"), drains("inc_2")}, state: isDrain, inc: "inc_2"},
		{name: "is replaced by one that is gone", steps: []step{beat("inc_1", isUp), beat("inc_2", isBye)}, want: []Gone{ended("inc_1")}, inc: "inc_2"},
		{name: "a replaced one still beats", steps: []step{beat("inc_1", isUp), beat("inc_2", isUp), beat("inc_1", isUp)}, want: []Gone{ended("inc_1")}, state: isUp, inc: "inc_2"},
		{name: "a replaced one says bye", steps: []step{beat("inc_1", isUp), beat("inc_2", isUp), beat("inc_1", isDrain), beat("inc_1", isBye)}, want: []Gone{ended("inc_1")}, state: isUp, inc: "inc_2"},
		{name: "a replaced one outlives the newer", steps: []step{beat("inc_2", isUp), beat("inc_2", isBye), beat("inc_1", isUp)}, want: []Gone{ended("inc_2")}, inc: "inc_2"},
		{name: "lost", steps: []step{beat("inc_1", isUp), lost("a"), lost("a")}, want: []Gone{ended("inc_1")}, inc: "inc_1"},
		{name: "after a clock was set back", steps: []step{beat("inc_2", isUp), lost("a"), func(t *Table) {
			t.Observe(tenant, "a", &schemas.Heartbeat{Incarnation: "inc_1", State: isUp}, t0.Add(time.Minute))
		}}, want: []Gone{ended("inc_2")}, state: isUp, inc: "inc_1"},
		{name: "lost before it was seen", steps: []step{lost("a"), remembered("a"), lost("a")}},
		{name: "lost, and back", steps: []step{beat("inc_1", isUp), lost("a"), beat("inc_1", isUp)}, want: []Gone{ended("inc_1")}, state: isUp, inc: "inc_1"},
		{name: "lost, and a new one", steps: []step{beat("inc_1", isUp), lost("a"), beat("inc_2", isUp)}, want: []Gone{ended("inc_1")}, state: isUp, inc: "inc_2"},
		{name: "lost by name", steps: []step{beat("inc_1", isUp), func(t *Table) { t.Lost(tenant, "a", "inc_1") }}, want: []Gone{ended("inc_1")}, inc: "inc_1"},
		{name: "an older one is lost", steps: []step{beat("inc_2", isUp), func(t *Table) { t.Lost(tenant, "a", "inc_1") }}, state: isUp, inc: "inc_2"},
		{name: "lost of another tenant", steps: []step{beat("inc_1", isUp), func(t *Table) { t.Lost(other, "a", "inc_1") }}, state: isUp, inc: "inc_1"},
		{name: "silent", steps: []step{beat("inc_1", isUp), expire(StaleAfter)}, state: isUp, inc: "inc_1"},
		{name: "stale, told once", steps: []step{beat("inc_1", isUp), expire(StaleAfter + 1), expire(time.Hour)}, want: []Gone{ended("inc_1")}, inc: "inc_1"},
		{name: "stale while it drains", steps: []step{beat("inc_1", isDrain), expire(StaleAfter + 1)}, want: []Gone{drains("inc_1"), ended("inc_1")}, inc: "inc_1"},
		{name: "excused", steps: []step{beat("inc_1", isUp), func(t *Table) { t.Excuse(t0.Add(time.Minute)) }, expire(time.Minute + StaleAfter)}, state: isUp, inc: "inc_1"},
		{name: "excused, and still silent", steps: []step{beat("inc_1", isUp), func(t *Table) { t.Excuse(t0.Add(time.Minute)) }, expire(time.Minute + StaleAfter + 1)}, want: []Gone{ended("inc_1")}, inc: "inc_1"},
		{name: "restored while here", steps: []step{beat("inc_1", isUp), remembered("a", "n=ready")}, state: isUp, inc: "inc_1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			table, gone := watched()
			do(table, c.steps...)
			if diff := cmp.Diff(c.want, *gone); diff != "" {
				t.Errorf("told (-want +got):\n%s", diff)
			}
			list := table.Agents(tenant)
			if len(list) != 1 || list[0].State != c.state || list[0].Incarnation != c.inc {
				t.Errorf("agents are %+v, want one in state %q of incarnation %q", list, c.state, c.inc)
			}
		})
	}
}

func TestGoneTellsEverybody(t *testing.T) {
	table := NewTable()
	var heard []string
	table.OnGone(func(Gone) { heard = append(heard, "first") })
	table.OnGone(func(Gone) { heard = append(heard, "second") })
	do(table, up("a"), lost("a"))
	if diff := cmp.Diff([]string{"first", "second"}, heard); diff != "" {
		t.Errorf("heard (-want +got):\n%s", diff)
	}
}

func TestObserveAsks(t *testing.T) {
	table := NewTable()
	hb := func(inc schemas.Incarnation, hash string, inv *schemas.Inventory) bool {
		return table.Observe(tenant, "a", &schemas.Heartbeat{Incarnation: inc, State: schemas.AgentUp, Hash: hash, Inventory: inv}, t0)
	}
	has := func(model string) bool { _, ok := table.Find(tenant, model); return ok }
	for range 2 {
		if !hb("inc_1", "h1", nil) {
			t.Error("an unknown inventory isn't asked for")
		}
	}
	if hb("inc_1", "h1", inventory("m=ready")) || !has("m") {
		t.Error("an inventory that came along is asked for")
	}
	if hb("inc_1", "h1", nil) || hb("inc_2", "h1", nil) || !has("m") {
		t.Error("an inventory that is known is asked for")
	}
	if !hb("inc_2", "h2", nil) || !has("m") {
		t.Error("a changed inventory isn't asked for, or the old one was dropped at once")
	}
	if hb("inc_1", "h3", inventory("n=ready")) || has("n") {
		t.Error("an older run is asked, or changes the inventory")
	}
	if hb("inc_2", "h2", inventory("n=ready")) || has("m") || !has("n") {
		t.Error("a new inventory doesn't replace the old one")
	}
	do(table, lost("a"))
	if hb("inc_2", "h2", nil) {
		t.Error("an inventory that is known is asked for when the agent comes back")
	}
	do(table, lost("a"), remembered("a", "m=ready"))
	if !has("m") || !hb("inc_2", "h2", nil) {
		t.Error("what Postgres remembers is taken for what the agent says")
	}
}

func TestRestore(t *testing.T) {
	table := NewTable()
	do(table, up("here", "m=ready"))
	for _, id := range []schemas.AgentID{"here", "away"} {
		table.Restore(Known{Tenant: tenant, Agent: id, Name: "gpu of " + string(id), LastSeen: t0.Add(-time.Hour), Inventory: *inventory("n=ready")})
	}
	list := table.Agents(tenant)
	want := []AgentStatus{
		{Tenant: tenant, Agent: "away", Name: "gpu of away", LastSeen: t0.Add(-time.Hour), Models: inventory("n=ready").Models},
		{Tenant: tenant, Agent: "here", Name: "gpu of here", Incarnation: "inc_1", State: schemas.AgentUp, LastSeen: t0, Slots: 4, Models: inventory("m=ready").Models},
	}
	if diff := cmp.Diff(want, list); diff != "" {
		t.Errorf("agents (-want +got):\n%s", diff)
	}
	// An older memory doesn't set back the clock, nor does a nameless one take the name.
	table.Restore(Known{Tenant: tenant, Agent: "away", LastSeen: t0.Add(-2 * time.Hour), Inventory: *inventory("o=cold")})
	got := table.Agents(tenant)[0]
	if !got.LastSeen.Equal(t0.Add(-time.Hour)) || got.Name != "gpu of away" || got.Models[0].ID != "o" {
		t.Errorf("agent %+v", got)
	}
}

// A worker that can't ask one of its backends yet doesn't make that one's models unknown,
// whoever remembers them, and in whatever order.
func TestPartialInventory(t *testing.T) {
	partial := func(inc schemas.Incarnation, models ...string) step {
		return func(t *Table) {
			inv := inventory(models...)
			inv.Partial = true
			t.Observe(tenant, "a", &schemas.Heartbeat{Incarnation: inc, State: schemas.AgentUp, Hash: "partial", Inventory: inv}, t0)
		}
	}
	aside := func(t *Table) {
		inv := inventory("here=ready")
		inv.Partial = true
		t.ObserveAside(tenant, "a", &schemas.Heartbeat{Incarnation: "inc_2", State: schemas.AgentUp, Hash: "partial", Inventory: inv}, t0)
	}
	for name, c := range map[string]struct {
		steps []step
		code  schemas.Code // for the model "late"; empty: it can be run
	}{
		"of the run before":            {[]step{up("a", "here=ready", "late=ready"), partial("inc_2", "here=ready")}, schemas.CodeBackendError},
		"of the books":                 {[]step{remembered("a", "here=ready", "late=ready"), partial("inc_1", "here=ready")}, schemas.CodeBackendError},
		"of the books, heard later":    {[]step{partial("inc_1", "here=ready"), remembered("a", "here=cold", "late=ready")}, schemas.CodeBackendError},
		"said twice":                   {[]step{up("a", "late=ready"), partial("inc_2", "here=ready"), partial("inc_2", "here=ready")}, schemas.CodeBackendError},
		"over HTTPS":                   {[]step{remembered("a", "late=ready"), aside}, schemas.CodeTunnelDown},
		"of nobody":                    {[]step{partial("inc_1", "here=ready")}, schemas.CodeModelNotFound},
		"until the backend has it":     {[]step{up("a", "late=ready"), partial("inc_2", "here=ready"), says("a", "inc_2", schemas.AgentUp, load{slots: 1}, "here=ready", "late=ready")}, ""},
		"until the backend has it not": {[]step{up("a", "late=ready"), partial("inc_2", "here=ready"), says("a", "inc_2", schemas.AgentUp, load{slots: 1}, "here=ready"), remembered("a", "late=ready")}, schemas.CodeModelNotFound},
	} {
		table := NewTable()
		do(table, c.steps...)
		_, err := table.Route(tenant, "late", nil)
		var told *schemas.Error
		if errors.As(err, &told); told == nil && c.code != "" || told != nil && told.Code != c.code {
			t.Errorf("%s: %v, want %q", name, err, c.code)
		}
		if c.code == schemas.CodeBackendError && (told.RetryAfterSeconds() == 0 || !strings.Contains(told.Message, "may still be starting")) {
			t.Errorf("%s: %v, to come back after %d s", name, told, told.RetryAfterSeconds())
		}
		if m, ok := table.Find(tenant, "here"); name != "over HTTPS" && (!ok || m.State != schemas.ModelReady) && c.code != "" {
			t.Errorf("%s: what can be asked is %+v", name, m)
		}
	}
}

func TestAgents(t *testing.T) {
	table := NewTable()
	do(table, says("b", "inc_1", schemas.AgentUp, load{3, 2, 4}, "m=ready"), says("a", "inc_2", schemas.AgentUp, load{1, 1, 1}, "m=ready"), lost("a"))
	table.Observe(other, "c", &schemas.Heartbeat{Incarnation: "inc_3", State: schemas.AgentDraining, Hash: "h"}, t0)
	a := AgentStatus{Tenant: tenant, Agent: "a", Incarnation: "inc_2", LastSeen: t0, Slots: 1, Models: inventory("m=ready").Models}
	b := AgentStatus{Tenant: tenant, Agent: "b", Incarnation: "inc_1", State: schemas.AgentUp, LastSeen: t0, Running: 3, Waiting: 2, Slots: 4, Models: inventory("m=ready").Models}
	c := AgentStatus{Tenant: other, Agent: "c", Incarnation: "inc_3", State: schemas.AgentDraining, LastSeen: t0}
	for of, want := range map[schemas.TenantID][]AgentStatus{tenant: {a, b}, other: {c}, "": {a, b, c}, "ten_x": nil} {
		if diff := cmp.Diff(want, table.Agents(of)); diff != "" {
			t.Errorf("agents of %q (-want +got):\n%s", of, diff)
		}
	}
	// The list is the caller's own.
	for _, s := range table.Agents(tenant) {
		s.Models[0].ID = "changed"
	}
	if _, ok := table.Find(tenant, "m"); !ok {
		t.Error("a caller changed the table through the list")
	}
}

func TestSuspects(t *testing.T) {
	table := NewTable()
	do(table, up("a"), saysAt(t0.Add(time.Second), "b", "inc_2", schemas.AgentDraining, load{}), up("c"), lost("c"), remembered("d"))
	at := func(d time.Duration) (ids []schemas.AgentID) {
		for _, s := range table.Suspects(t0.Add(d), time.Second) {
			ids = append(ids, s.Agent)
		}
		return ids
	}
	if got := at(time.Second); got != nil {
		t.Errorf("suspects %v after exactly the time that is allowed", got)
	}
	if diff := cmp.Diff([]schemas.AgentID{"a"}, at(time.Second+1)); diff != "" {
		t.Errorf("suspects (-want +got):\n%s", diff)
	}
	if got := at(3 * time.Second); len(got) != 2 {
		t.Errorf("suspects %v, want a and b", got)
	}
	if got := table.Suspects(t0.Add(2*time.Second), time.Second); len(got) != 1 || got[0] != (Suspect{tenant, "a", "inc_1"}) {
		t.Errorf("suspects %+v", got)
	}
}

// TestRouteTellsTheProtocol: what is written to a worker is of the newest version that it and
// this build know, whichever of them is older.
func TestRouteTellsTheProtocol(t *testing.T) {
	for version, want := range map[int]int{
		schemas.ProtocolVersion - 1: schemas.ProtocolVersion - 1,
		schemas.ProtocolVersion:     schemas.ProtocolVersion,
		schemas.ProtocolVersion + 1: schemas.ProtocolVersion,
	} {
		table := NewTable()
		do(table, up("a", "m=ready"), func(t *Table) {
			t.Observe(tenant, "a", &schemas.Heartbeat{Version: version, Incarnation: "inc_2", State: schemas.AgentUp, Hash: "m=ready"}, t0)
		})
		if got, err := table.Route(tenant, "m", nil); err != nil || got.Protocol != want {
			t.Errorf("a worker speaks version %d, and is written to in %d, want %d: %v", version, got.Protocol, want, err)
		}
	}
}
