package presence

import (
	"testing"
	"time"

	"github.com/ownllm/ownllm/schemas"
)

func TestIdleFor(t *testing.T) {
	at := func(seconds float64) time.Time { return t0.Add(time.Duration(seconds * float64(time.Second))) }
	beat := func(seconds float64, running int) step {
		return saysAt(at(seconds), "agt_1", "inc_1", schemas.AgentUp, load{running: running, slots: 4}, "m=ready")
	}
	for name, c := range map[string]struct {
		steps []step
		since float64
		want  float64
	}{
		"nothing heard":                 {nil, 0, 0},
		"idle all the time":             {[]step{beat(0, 0), beat(1, 0), beat(2, 0), beat(3, 0)}, 0, 3},
		"idle since before":             {[]step{beat(0, 0), beat(1, 0), beat(2, 0), beat(3, 0)}, 1.5, 1.5},
		"not heard since":               {[]step{beat(0, 0), beat(1, 0)}, 1.5, 0},
		"busy at the end":               {[]step{beat(0, 0), beat(1, 0), beat(2, 1)}, 0, 0},
		"busy in between":               {[]step{beat(0, 0), beat(1, 1), beat(2, 0), beat(3, 0)}, 0, 1},
		"silent in between":             {[]step{beat(0, 0), beat(1, 0), beat(6, 0), beat(7, 0)}, 0, 1},
		"one beat is missing":           {[]step{beat(0, 0), beat(2, 0), beat(3, 0)}, 0, 3},
		"another run":                   {[]step{beat(0, 0), beat(1, 0), saysAt(at(2), "agt_1", "inc_2", schemas.AgentUp, load{slots: 4})}, 0, 0},
		"drains":                        {[]step{beat(0, 0), saysAt(at(1), "agt_1", "inc_1", schemas.AgentDraining, load{slots: 4})}, 0, 0},
		"spoken for, not heard":         {[]step{beat(0, 0), beat(1, 0), func(t *Table) { t.Excuse(at(4)) }}, 0, 1},
		"gone, though idle to the last": {[]step{beat(0, 0), beat(1, 0), func(t *Table) { t.Lost(tenant, "agt_1", "inc_1") }}, 0, 0},
	} {
		table := NewTable()
		do(table, c.steps...)
		if got := table.IdleFor(tenant, "agt_1", "inc_1", at(c.since)); got != at(c.want).Sub(t0) {
			t.Errorf("%s: %s, want %g s", name, got, c.want)
		}
	}
}
