package command

import (
	"fmt"
	"maps"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/access"
	"github.com/ownllm/ownllm/broker/books"
)

// What has changed is looked at now and a little later, and what was noted when its time
// has come.
func TestRemovalIsDue(t *testing.T) {
	agents, publishers := access.Scope{Account: access.AccountAgents}, access.Scope{Account: access.AccountIngress}
	one := access.Scope{Account: access.AccountAgents, User: "agt_1"}
	change := func(kind books.Kind, id string) books.Change { return books.Change{Kind: kind, ID: id} }
	many := make([]books.Change, removalAgents+1)
	for i := range many {
		many[i] = change(books.KindAgent, fmt.Sprintf("agt_%d", i))
	}
	for name, test := range map[string]struct {
		changes books.Changes
		want    []access.Scope
	}{
		"nothing":            {books.Changes{}, nil},
		"the start":          {books.Changes{Reset: true}, []access.Scope{agents, publishers}},
		"an agent":           {books.Changes{Changes: []books.Change{change(books.KindAgent, "agt_1"), change(books.KindAgent, "agt_1")}}, []access.Scope{one}},
		"many agents":        {books.Changes{Changes: many}, []access.Scope{agents}},
		"a key":              {books.Changes{Changes: []books.Change{change(books.KindKey, "key_1")}}, []access.Scope{publishers}},
		"a user":             {books.Changes{Changes: []books.Change{change(books.KindUser, "usr_1")}}, []access.Scope{publishers}},
		"a tenant":           {books.Changes{Changes: []books.Change{change(books.KindTenant, "ten_1")}}, []access.Scope{publishers}},
		"a key and an agent": {books.Changes{Changes: []books.Change{change(books.KindKey, "key_1"), change(books.KindAgent, "agt_1")}}, []access.Scope{publishers, one}},
	} {
		want := make(map[access.Scope]bool)
		for _, scope := range test.want {
			want[scope] = true
		}
		r, now := &removal{}, time.Now()
		test.changes.AsOf = now
		for _, step := range []struct {
			what    string
			changes books.Changes
			want    map[access.Scope]bool
		}{
			{"at once", test.changes, want},
			{"soon after", books.Changes{AsOf: now.Add(removalAgain - time.Millisecond)}, nil},
			{"once more", books.Changes{AsOf: now.Add(removalAgain)}, want},
			{"then", books.Changes{AsOf: now.Add(2 * removalAgain)}, nil},
		} {
			if got := r.due(step.changes); !maps.Equal(got, step.want) {
				t.Errorf("%s, %s: %v, want %v", name, step.what, got, step.want)
			}
		}
	}
	r, end := &removal{}, time.Now()
	r.note(publishers, end)
	r.note(publishers, end)
	for at, want := range map[time.Duration]int{-time.Millisecond: 0, 0: 1} {
		r := &removal{agenda: append([]appointment(nil), r.agenda...)}
		if got := r.due(books.Changes{AsOf: end.Add(at)}); len(got) != want || len(r.agenda) != 1-want {
			t.Errorf("%s after the end %v is due, and %v is left", at, got, r.agenda)
		}
	}
}
