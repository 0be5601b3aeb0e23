package books_test

import (
	"reflect"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/credential"
	"github.com/ownllm/ownllm/schemas"
)

// Many secrets and agents are looked up at once, with the same answers as one by one.
func TestLookupOfMany(t *testing.T) {
	s := open(t)
	_, user := household(t, s, "acme")
	unknown := apikey.New().Hash()
	hashes := []apikey.Hash{unknown}
	var last books.Key
	for range 3 {
		k, secret, err := s.CreateKey(t.Context(), books.NewKey{Tenant: "acme", User: user.Email})
		if err != nil {
			t.Fatal(err)
		}
		last, hashes = k, append(hashes, secret.Hash())
	}
	_, rotated, err := s.RotateKey(t.Context(), last.ID, books.Rotation{Overlap: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	hashes = append(hashes, rotated.Hash(), hashes[1]) // one of them twice
	found, err := s.LookupKeys(t.Context(), hashes)
	if err != nil || len(found) != 4 {
		t.Fatalf("%d found, %v", len(found), err)
	}
	for hash, id := range found {
		want, err := s.LookupKey(t.Context(), hash)
		id.AsOf = want.AsOf
		if err != nil || !reflect.DeepEqual(id, want) {
			t.Errorf("%+v, one by one %+v, %v", id, want, err)
		}
	}
	if old := found[hashes[3]]; old.Key != last.ID || old.ExpiresAt == nil || found[rotated.Hash()].ExpiresAt != nil {
		t.Errorf("the old secret is %+v, the new %+v", old, found[rotated.Hash()])
	}

	var agents []schemas.AgentID
	for range 2 {
		a, err := s.AddAgent(t.Context(), "acme", schemas.NewAgentID(), "rig", credential.NewAgent())
		if err != nil {
			t.Fatal(err)
		}
		agents = append(agents, a.ID)
	}
	if _, err := s.RemoveAgent(t.Context(), agents[0]); err != nil {
		t.Fatal(err)
	}
	present, err := s.PresentAgents(t.Context(), append(agents, "agt_nobody", "'; --"))
	if want := map[schemas.AgentID]bool{agents[1]: true}; err != nil || !reflect.DeepEqual(present, want) {
		t.Errorf("%v, %v", present, err)
	}
}
