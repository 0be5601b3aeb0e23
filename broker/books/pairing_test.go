package books_test

import (
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/credential"
	"github.com/ownllm/ownllm/internal/pgtest"
	"github.com/ownllm/ownllm/schemas"
)

// pairingKey makes one of acme.
func pairingKey(t *testing.T, s *books.Store) credential.Secret {
	t.Helper()
	_, secret, err := s.CreatePairing(t.Context(), books.NewPairing{Tenant: "acme"})
	if err != nil {
		t.Fatal(err)
	}
	return secret
}

var rig = books.Machine{VRAMMB: 24576, RAMMB: 65536, CPUCores: 16, GPU: "NVIDIA GeForce RTX 4090", OS: "linux/amd64"}

func TestPairing(t *testing.T) {
	s := open(t)
	tenant, _ := household(t, s, "acme")
	p, secret, err := s.CreatePairing(t.Context(), books.NewPairing{Tenant: string(tenant.ID)})
	if err != nil || p.Tenant != tenant.ID || p.Slug != "acme" || p.ExpiresAt.Sub(p.CreatedAt) != 7*24*time.Hour {
		t.Fatalf("%+v, %v", p, err)
	}
	version := changes(t, s, -1).Version
	a, agent, err := s.PairAgent(t.Context(), books.PairRequest{Secret: secret, MachineID: [32]byte{7}, Name: "rig", Machine: rig})
	if err != nil {
		t.Fatal(err)
	}
	if a.Tenant != tenant.ID || a.Name != "rig" || a.Machine != rig || !a.LastSeen.IsZero() || len(a.Inventory.Models) != 0 || a.InventoryHash != a.Inventory.Hash() {
		t.Errorf("paired %+v", a)
	}
	if c := changes(t, s, version); !slices.Equal(c.Changes, []books.Change{{Kind: books.KindAgent, ID: string(a.ID)}}) {
		t.Errorf("changes %+v", c)
	}
	id, err := s.LookupAgent(t.Context(), agent.Hash())
	if want := (books.AgentIdentity{Agent: a.ID, Tenant: tenant.ID, Name: "rig", Version: version + 1}); err != nil || id != want {
		t.Errorf("looked up %+v, %v", id, err)
	}
	_, err = s.LookupAgent(t.Context(), credential.NewAgent().Hash())
	wantError(t, err, schemas.CodeKeyInvalid, "")

	// What it says later doesn't lose what was told at pairing, nor the credential.
	report := books.AgentReport{ID: a.ID, Tenant: tenant.ID, Name: "rig", Incarnation: schemas.NewIncarnation(), Inventory: schemas.Inventory{Models: []schemas.Model{{ID: "m"}}}}
	if err := s.UpsertAgent(t.Context(), report); err != nil {
		t.Fatal(err)
	}
	got, err := s.GetAgent(t.Context(), a.ID)
	if err != nil || got.Machine != rig || got.LastSeen.IsZero() || len(got.Inventory.Models) != 1 {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := s.LookupAgent(t.Context(), agent.Hash()); err != nil {
		t.Error(err)
	}

	removed, err := s.RemoveAgent(t.Context(), a.ID)
	if diff := cmp.Diff(got, removed); diff != "" || err != nil {
		t.Error(err, diff)
	}
	if c := changes(t, s, version+1); !slices.Equal(c.Changes, []books.Change{{Kind: books.KindAgent, ID: string(a.ID)}}) {
		t.Errorf("changes %+v", c)
	}
	_, err = s.LookupAgent(t.Context(), agent.Hash())
	wantError(t, err, schemas.CodeKeyInvalid, "")
	_, err = s.GetAgent(t.Context(), a.ID)
	wantError(t, err, schemas.CodeNotFound, "")
	_, err = s.RemoveAgent(t.Context(), a.ID)
	wantError(t, err, schemas.CodeNotFound, "")
	if list, _, err := s.ListAgents(t.Context(), "", books.Page{}); err != nil || len(list) != 0 {
		t.Errorf("still listed: %+v, %v", list, err)
	}
	// A hello that was on its way doesn't revive it.
	wantError(t, s.UpsertAgent(t.Context(), report), schemas.CodeInvalidValue, "id")
	if err := s.TouchAgents(t.Context(), []schemas.AgentID{a.ID}); err != nil {
		t.Error(err)
	}
	// Its machine can be paired anew.
	again, _, err := s.PairAgent(t.Context(), books.PairRequest{Secret: pairingKey(t, s), MachineID: [32]byte{7}})
	if err != nil || again.ID == a.ID {
		t.Errorf("%+v, %v", again, err)
	}

	var actions []string
	for _, e := range audits(t, s, "acme") {
		if strings.HasPrefix(e.Action, "agent.") || strings.HasPrefix(e.Action, "pairing.") {
			actions = append(actions, e.Action+" "+string(e.Kind)+" "+e.Object[:4])
		}
	}
	if want := []string{"pairing.create pairing pai_", "agent.pair agent agt_", "agent.remove agent agt_", "pairing.create pairing pai_", "agent.pair agent agt_"}; !slices.Equal(actions, want) {
		t.Errorf("audit %q", actions)
	}
}

// Each refusal is one of its own, and changes nothing.
func TestPairingRefusals(t *testing.T) {
	s := open(t)
	household(t, s, "acme")
	household(t, s, "other")
	used := pairingKey(t, s)
	a, _, err := s.PairAgent(t.Context(), books.PairRequest{Secret: used, MachineID: [32]byte{1}})
	if err != nil {
		t.Fatal(err)
	}
	_, foreign, err := s.CreatePairing(t.Context(), books.NewPairing{Tenant: "other"})
	if err != nil {
		t.Fatal(err)
	}
	_, expired, err := s.CreatePairing(t.Context(), books.NewPairing{Tenant: "acme", TTL: new(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	// By the database's clock, whatever this machine's says.
	hash := expired.Hash()
	if err := s.Exec(t.Context(), `UPDATE pairings SET expires_at = now() WHERE hash = $1`, hash[:]); err != nil {
		t.Fatal(err)
	}
	good := pairingKey(t, s)
	before := everything(t, s)
	texts := map[string]bool{}
	for _, c := range []struct {
		name  string
		r     books.PairRequest
		code  schemas.Code
		param string
		says  string
	}{
		{"invalid", books.PairRequest{Secret: credential.NewPairing(), MachineID: [32]byte{2}}, schemas.CodeKeyInvalid, "pairing_key", "invalid"},
		{"expired", books.PairRequest{Secret: expired, MachineID: [32]byte{2}}, schemas.CodeKeyExpired, "pairing_key", "has expired"},
		{"used", books.PairRequest{Secret: used, MachineID: [32]byte{2}}, schemas.CodeKeyInvalid, "pairing_key", "already used"},
		{"used, by the same machine", books.PairRequest{Secret: used, MachineID: [32]byte{1}}, schemas.CodeKeyInvalid, "pairing_key", "already used"},
		{"paired", books.PairRequest{Secret: good, MachineID: [32]byte{1}}, schemas.CodeInvalidValue, "machine_id_hash", string(a.ID)},
		{"paired with another tenant", books.PairRequest{Secret: foreign, MachineID: [32]byte{1}}, schemas.CodeInvalidValue, "machine_id_hash", "already paired"},
		{"no machine", books.PairRequest{Secret: good}, schemas.CodeInvalidValue, "machine_id_hash", "needed"},
		{"name", books.PairRequest{Secret: good, MachineID: [32]byte{2}, Name: "a\x00"}, schemas.CodeInvalidValue, "name", ""},
		{"vram", books.PairRequest{Secret: good, MachineID: [32]byte{2}, Machine: books.Machine{VRAMMB: -1}}, schemas.CodeInvalidValue, "vram_mb", ""},
		{"ram", books.PairRequest{Secret: good, MachineID: [32]byte{2}, Machine: books.Machine{RAMMB: 1 << 60}}, schemas.CodeInvalidValue, "ram_mb", ""},
		{"cores", books.PairRequest{Secret: good, MachineID: [32]byte{2}, Machine: books.Machine{CPUCores: -1}}, schemas.CodeInvalidValue, "cpu_cores", ""},
		{"gpu", books.PairRequest{Secret: good, MachineID: [32]byte{2}, Machine: books.Machine{GPU: "\x1b"}}, schemas.CodeInvalidValue, "gpu", ""},
		{"os", books.PairRequest{Secret: good, MachineID: [32]byte{2}, Machine: books.Machine{OS: strings.Repeat("x", 201)}}, schemas.CodeInvalidValue, "os", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			for range 2 { // the second isn't told something else
				_, _, err := s.PairAgent(t.Context(), c.r)
				wantError(t, err, c.code, c.param)
				var e *schemas.Error
				if !errors.As(err, &e) || !strings.Contains(e.Message, c.says) {
					t.Errorf("says %v", err)
				}
				if strings.HasPrefix(c.name, "paired with") && strings.Contains(e.Message, string(a.ID)) {
					t.Error("tells of another tenant's agent")
				}
				texts[e.Message] = true
			}
		})
	}
	if len(texts) != 12 { // "used" is one
		t.Errorf("%d messages: %v", len(texts), texts)
	}
	if after := everything(t, s); after != before {
		t.Errorf("a refusal wrote: before\n%safter\n%s", before, after)
	}
	if _, _, err := s.PairAgent(t.Context(), books.PairRequest{Secret: good, MachineID: [32]byte{2}}); err != nil {
		t.Errorf("the good key was spent by a refusal: %v", err)
	}

	for _, ttl := range []time.Duration{0, -1, 366 * 24 * time.Hour} {
		_, _, err := s.CreatePairing(t.Context(), books.NewPairing{Tenant: "acme", TTL: &ttl})
		wantError(t, err, schemas.CodeInvalidValue, "ttl_seconds")
	}
	_, _, err = s.CreatePairing(t.Context(), books.NewPairing{Tenant: "nobody"})
	wantError(t, err, schemas.CodeNotFound, "")
}

// A pairing key lives by the clock of the books.
func TestPairingExpires(t *testing.T) {
	s := open(t)
	household(t, s, "acme")
	now := time.Now().Add(1000 * time.Hour)
	s.SetClock(func() time.Time { return now })
	_, secret, err := s.CreatePairing(t.Context(), books.NewPairing{Tenant: "acme", TTL: new(time.Minute)})
	if err != nil {
		t.Fatal(err)
	}
	now = now.Add(time.Minute)
	_, _, err = s.PairAgent(t.Context(), books.PairRequest{Secret: secret, MachineID: [32]byte{1}})
	wantError(t, err, schemas.CodeKeyExpired, "pairing_key")
	now = now.Add(-time.Second)
	if _, _, err := s.PairAgent(t.Context(), books.PairRequest{Secret: secret, MachineID: [32]byte{1}}); err != nil {
		t.Error(err)
	}
}

// Of many who show one key at the same time one gets an agent, and of many keys that one
// machine shows at the same time one counts.
func TestPairingRace(t *testing.T) {
	address := pgtest.New(t)
	admin := openAt(t, books.Config{URL: address})
	household(t, admin, "acme")
	const racers = 6
	race := func(request func(i int) books.PairRequest) (won int, lost []error) {
		var mu sync.Mutex
		var wg sync.WaitGroup
		start := make(chan struct{})
		for i := range racers {
			s := openAt(t, books.Config{URL: address, MaxConns: 2})
			r := request(i)
			wg.Go(func() {
				<-start
				_, secret, err := s.PairAgent(t.Context(), r)
				if err == nil {
					_, err = s.LookupAgent(t.Context(), secret.Hash())
				}
				mu.Lock()
				defer mu.Unlock()
				if err == nil {
					won++
				} else {
					lost = append(lost, err)
				}
			})
		}
		close(start)
		wg.Wait()
		return won, lost
	}
	for round := range byte(3) {
		one := pairingKey(t, admin)
		won, lost := race(func(i int) books.PairRequest {
			return books.PairRequest{Secret: one, MachineID: [32]byte{1, round, byte(i)}}
		})
		if won != 1 || len(lost) != racers-1 {
			t.Errorf("%d won, %v", won, lost)
		}
		for _, err := range lost {
			wantError(t, err, schemas.CodeKeyInvalid, "pairing_key")
		}
		won, lost = race(func(int) books.PairRequest {
			return books.PairRequest{Secret: pairingKey(t, admin), MachineID: [32]byte{2, round}}
		})
		if won != 1 || len(lost) != racers-1 {
			t.Errorf("%d won, %v", won, lost)
		}
		for _, err := range lost {
			wantError(t, err, schemas.CodeInvalidValue, "machine_id_hash")
		}
	}
	if n, err := books.Query[int](t.Context(), admin, `SELECT count(*) FROM agents`); err != nil || n != 6 {
		t.Errorf("%d agents, %v", n, err)
	}
}

// Nobody reads a key as unused that another transaction is about to spend.
func TestPairingWaits(t *testing.T) {
	s := open(t)
	household(t, s, "acme")
	other, _, err := s.PairAgent(t.Context(), books.PairRequest{Secret: pairingKey(t, s), MachineID: [32]byte{1}})
	if err != nil {
		t.Fatal(err)
	}
	p, secret, err := s.CreatePairing(t.Context(), books.NewPairing{Tenant: "acme"})
	if err != nil {
		t.Fatal(err)
	}
	err = s.Meanwhile(t.Context(), `SELECT FROM pairings WHERE id = $1 FOR UPDATE`, string(p.ID), func() {
		_, _, err := s.PairAgent(t.Context(), books.PairRequest{Secret: secret, MachineID: [32]byte{2}})
		wantError(t, err, schemas.CodeKeyInvalid, "pairing_key")
	}, `UPDATE pairings SET used_at = now(), agent_id = $2 WHERE id = $1`, string(other.ID))
	if err != nil {
		t.Fatal(err)
	}
}

func TestAddAgent(t *testing.T) {
	address := pgtest.New(t)
	s := openAt(t, books.Config{URL: address})
	tenant, _ := household(t, s, "acme")
	household(t, s, "other")
	add := func(id schemas.AgentID, secret credential.Secret) books.Agent {
		t.Helper()
		a, err := s.AddAgent(t.Context(), "acme", id, "rig", secret)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := s.LookupAgent(t.Context(), secret.Hash()); err != nil || got.Agent != a.ID || got.Tenant != tenant.ID {
			t.Errorf("%+v, %v", got, err)
		}
		return a
	}
	id, secret := schemas.NewAgentID(), credential.NewAgent()
	var wg sync.WaitGroup
	for range 4 {
		other := openAt(t, books.Config{URL: address, MaxConns: 2})
		wg.Go(func() {
			if a, err := other.AddAgent(t.Context(), "acme", id, "rig", secret); err != nil || a.ID != id {
				t.Errorf("%+v, %v", a, err)
			}
		})
	}
	wg.Wait()
	before := everything(t, s)
	if a := add(id, secret); a.ID != id || a.Name != "rig" {
		t.Errorf("%+v", a)
	}
	if a := add(schemas.NewAgentID(), secret); a.ID != id {
		t.Errorf("the credential's agent is %s, got %s", id, a.ID)
	}
	if after := everything(t, s); after != before {
		t.Errorf("again, it wrote: before\n%safter\n%s", before, after)
	}

	// An agent of a version without credentials gets one, and loses no models.
	old := books.AgentReport{ID: schemas.NewAgentID(), Tenant: tenant.ID, Name: "old", Incarnation: schemas.NewIncarnation(), Inventory: schemas.Inventory{Models: []schemas.Model{{ID: "m"}}}}
	if err := s.UpsertAgent(t.Context(), old); err != nil {
		t.Fatal(err)
	}
	if a := add(old.ID, credential.NewAgent()); a.ID != old.ID || a.Name != "old" || len(a.Inventory.Models) != 1 {
		t.Errorf("%+v", a)
	}

	// One that was removed stays so; its credential gets a new agent.
	if _, err := s.RemoveAgent(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if a := add(id, secret); a.ID == id {
		t.Error("revived")
	}
	_, err := s.AddAgent(t.Context(), "nobody", id, "", secret)
	wantError(t, err, schemas.CodeNotFound, "")
	_, err = s.AddAgent(t.Context(), "acme", "rig", "", secret)
	wantError(t, err, schemas.CodeInvalidValue, "id")
	_, err = s.AddAgent(t.Context(), "other", schemas.NewAgentID(), "", secret)
	wantError(t, err, schemas.CodeInvalidValue, "credential")
}

// The way down forgets who was removed, and leaves the others as they were.
func TestMigrateAgents(t *testing.T) {
	s := open(t)
	household(t, s, "acme")
	var ids []schemas.AgentID
	for i := range byte(2) {
		a, _, err := s.PairAgent(t.Context(), books.PairRequest{Secret: pairingKey(t, s), MachineID: [32]byte{1 + i}, Name: "rig"})
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, a.ID)
	}
	if _, err := s.RemoveAgent(t.Context(), ids[0]); err != nil {
		t.Fatal(err)
	}
	if err := s.DownTo(t.Context(), 8); err != nil {
		t.Fatal(err)
	}
	if got, err := books.Query[string](t.Context(), s, `SELECT string_agg(id || ' ' || name || ' ' || (last_seen = created_at), ',') FROM agents`); err != nil || got != string(ids[1])+" rig true" {
		t.Errorf("%s, %v", got, err)
	}
	if err := s.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.GetAgent(t.Context(), ids[1]); err != nil {
		t.Error(err)
	}
}
