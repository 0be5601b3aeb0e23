package edge_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/credential"
	"github.com/ownllm/ownllm/edge"
	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/schemas"
)

const (
	pairPath = adminapi.Prefix + adminapi.PairPath
	beatPath = adminapi.Prefix + adminapi.HeartbeatPath
)

// machineHash is that of machine n.
func machineHash(n int) string { return fmt.Sprintf("%064x", n+1) }

func (h *house) pairingKey() string {
	h.t.Helper()
	return admin[adminapi.Pairing](h, "POST", "/agents/pairings", `{"tenant":"local"}`).Secret
}

// pair pairs machine n.
func (h *house) pair(n int) adminapi.PairedAgent {
	h.t.Helper()
	resp, body := h.do("POST", pairPath, "", pairBody(h.pairingKey(), machineHash(n)))
	var a adminapi.PairedAgent
	if err := json.Unmarshal([]byte(body), &a); err != nil || resp.StatusCode != http.StatusCreated {
		h.t.Fatalf("%s %s", resp.Status, body)
	}
	return a
}

func pairBody(key, machine string) string {
	return fmt.Sprintf(`{"pairing_key":%q,"machine_id_hash":%q,"name":"rig","vram_mb":24576,"ram_mb":65536,"cpu_cores":16,"gpu":"RTX","os":"linux/amd64","later":{}}`, key, machine)
}

func beatBody() string {
	return string(schemas.Heartbeat{Version: schemas.ProtocolVersion, Incarnation: schemas.NewIncarnation(), State: schemas.AgentUp, Slots: 2}.Encode())
}

// Each refusal of a pairing is one of its own, and none spends a key.
func TestPair(t *testing.T) {
	t.Parallel()
	h := build(t, plan{empty: true, edge: edge.Config{AgentNATSURL: "wss://nats.example.com"}})
	a := h.pair(0)
	if a.NATSURL != "wss://nats.example.com" || a.Tenant != h.tenant.ID || !strings.HasPrefix(a.Credential, credential.BeginAgent) {
		t.Errorf("%+v", a.Agent)
	}
	key := h.pairingKey()
	expiring := admin[adminapi.Pairing](h, "POST", "/agents/pairings", `{"tenant":"local","ttl_seconds":1}`)
	until(t, "the end of a pairing key", func() bool { return time.Now().After(expiring.ExpiresAt.Add(100 * time.Millisecond)) })
	good := pairBody(key, machineHash(1))
	seen := map[string]bool{}
	for _, test := range []struct{ name, body, code, param, says string }{
		{"nothing", "", "invalid_json", "", ""},
		{"no object", "[]", "invalid_json", "", ""},
		{"no key", "{}", "key_invalid", "pairing_key", "invalid"},
		{"malformed", pairBody(key+"0", machineHash(1)), "key_invalid", "pairing_key", "invalid"},
		{"an API key", pairBody(h.key, machineHash(1)), "key_invalid", "pairing_key", "invalid"},
		{"unknown", pairBody(credential.NewPairing().Reveal(), machineHash(1)), "key_invalid", "pairing_key", "no such key"},
		{"expired", pairBody(expiring.Secret, machineHash(1)), "key_expired", "pairing_key", "expired"},
		{"paired", pairBody(key, machineHash(0)), "invalid_value", "machine_id_hash", "already paired"},
		{"no machine", pairBody(key, ""), "invalid_value", "machine_id_hash", "64"},
		{"half a machine", pairBody(key, machineHash(1)[:62]), "invalid_value", "machine_id_hash", "64"},
		{"too much of a machine", pairBody(key, machineHash(1)+"00"), "invalid_value", "machine_id_hash", "64"},
		{"no hexadecimal", pairBody(key, strings.Repeat("x", 64)), "invalid_value", "machine_id_hash", "64"},
		{"zero", pairBody(key, strings.Repeat("0", 64)), "invalid_value", "machine_id_hash", "needed"},
		{"wrong type", strings.Replace(good, "24576", `"much"`, 1), "invalid_value", "vram_mb", "JSON string"},
		{"out of range", strings.Replace(good, "24576", "-1", 1), "invalid_value", "vram_mb", "from 0"},
		{"large", strings.Replace(good, "{}", `"`+strings.Repeat("x", 17<<10)+`"`, 1), "request_too_large", "", "16384"},
	} {
		t.Run(test.name, func(t *testing.T) {
			resp, body := h.do("POST", pairPath, "", test.body)
			checkRefusal(t, resp, body, test.code, test.param)
			if !strings.Contains(body, test.says) || strings.Contains(body, key) || strings.Contains(body, h.key) {
				t.Errorf("says %s", body)
			}
			seen[body] = true
		})
	}
	resp, body := h.do("POST", pairPath, "", good)
	if resp.StatusCode != http.StatusCreated || strings.Contains(body, key) {
		t.Errorf("a refusal spent the key: %s %s", resp.Status, body)
	}
	resp, body = h.do("POST", pairPath, "", pairBody(key, machineHash(2)))
	checkRefusal(t, resp, body, "key_invalid", "pairing_key")
	if !strings.Contains(body, "already used") || seen[body] {
		t.Errorf("says %s", body)
	}
	for _, method := range []string{"GET", "DELETE"} { // an admin's routes begin alike
		resp, body := h.do(method, pairPath, h.key, "")
		checkRefusal(t, resp, body, "key_invalid", "")
	}
	resp, body = h.do("POST", adminapi.Prefix+"/agents/pairings", h.key, `{"tenant":"local"}`)
	checkRefusal(t, resp, body, "key_invalid", "")
	resp, body = h.do("DELETE", adminapi.Prefix+"/agents/"+string(a.Agent), h.key, "")
	checkRefusal(t, resp, body, "key_invalid", "")
	resp, body = h.do("DELETE", adminapi.Prefix+"/agents/"+a.Credential, adminToken, "")
	checkRefusal(t, resp, body, "not_found", "")
	if strings.Contains(body, a.Credential) {
		t.Error("a secret in a wrong place is repeated")
	}
	for _, secret := range []string{key, a.Credential} {
		if strings.Contains(h.log.String(), secret) {
			t.Error("a secret is in the log")
		}
	}
}

// Whoever guesses pairing keys or credentials runs into the bound for bad requests, and
// then doesn't even learn whether a guess was right; an agent that is known goes on.
func TestFloodOfBadPairings(t *testing.T) {
	t.Parallel()
	const burst = 12
	h := build(t, plan{empty: true, edge: edge.Config{FailureRate: 0.01, FailureBurst: burst}})
	a, key := h.pair(0), h.pairingKey()
	until(t, "the agent to be known", func() bool {
		resp, body := h.do("POST", beatPath, a.Credential, beatBody())
		if resp.StatusCode != 200 {
			t.Fatalf("%s %s", resp.Status, body)
		}
		_, ok := h.keys.CachedAgent(must(credential.ParseAgent(a.Credential)))
		return ok
	})
	for i := range burst {
		if i%2 == 0 {
			resp, body := h.do("POST", pairPath, "", pairBody(credential.NewPairing().Reveal(), machineHash(1)))
			checkRefusal(t, resp, body, "key_invalid", "pairing_key")
		} else {
			resp, body := h.do("POST", beatPath, credential.NewAgent().Reveal(), beatBody())
			checkRefusal(t, resp, body, "key_invalid", "")
		}
	}
	resp, body := h.do("POST", pairPath, "", pairBody(key, machineHash(1)))
	checkRefusal(t, resp, body, "too_many_failures", "")
	resp, body = h.do("POST", beatPath, credential.NewAgent().Reveal(), beatBody())
	checkRefusal(t, resp, body, "too_many_failures", "")
	// On a machine that is overrun, what the edge remembers of it can be too old for a moment.
	until(t, "an agent that is known to be heard", func() bool {
		resp, _ := h.do("POST", beatPath, a.Credential, beatBody())
		return resp.StatusCode == 200
	})
}

// Without an address of its own for it, an edge says that the bus is where it is itself.
func TestPairTellsWhereTheBusIs(t *testing.T) {
	t.Parallel()
	h := build(t, plan{empty: true, edge: edge.Config{NATSPort: "4333"}})
	if got := h.pair(0).NATSURL; got != "nats://h:4333" {
		t.Errorf("told %q", got)
	}
	c, ask := h.dial(), pairBody(h.pairingKey(), machineHash(1))
	c.send(fmt.Sprintf("POST %s HTTP/1.1\nHost: [::1]:9191\nContent-Length: %d\n\n%s", pairPath, len(ask), ask))
	if resp, body := c.whole("POST"); !strings.Contains(body, `"nats://[::1]:4333"`) {
		t.Errorf("%s %s", resp.Status, body)
	}
	h = build(t, plan{empty: true})
	if got := h.pair(0).NATSURL; got != "" {
		t.Errorf("told %q", got)
	}
}

// asides notes the heartbeats over HTTPS.
type asides struct {
	mu    sync.Mutex
	heard []string
}

func (a *asides) Aside(tenant schemas.TenantID, agent schemas.AgentID, heartbeat []byte) error {
	var hb schemas.Heartbeat
	if err := json.Unmarshal(heartbeat, &hb); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.heard = append(a.heard, fmt.Sprintf("%s %s %s %d", tenant, agent, hb.State, hb.Slots))
	return nil
}

func (a *asides) take() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	heard := a.heard
	a.heard = nil
	return heard
}

func TestHeartbeatOverHTTP(t *testing.T) {
	t.Parallel()
	heard := &asides{}
	h := build(t, plan{empty: true, aside: heard})
	a := h.pair(0)
	resp, body := h.do("POST", beatPath, a.Credential, beatBody())
	if want := fmt.Sprintf("%s %s up 2", a.Tenant, a.Agent); resp.StatusCode != 200 || !strings.Contains(body, string(a.Agent)) {
		t.Errorf("%s %s", resp.Status, body)
	} else if got := heard.take(); len(got) != 1 || got[0] != want {
		t.Errorf("heard %q, want %q", got, want)
	}
	for _, test := range []struct{ name, key, body, code, param string }{
		{"no credential", "", beatBody(), "key_malformed", ""},
		{"an API key", h.key, beatBody(), "key_malformed", ""},
		{"unknown", credential.NewAgent().Reveal(), beatBody(), "key_invalid", ""},
		{"nothing", a.Credential, "", "invalid_json", ""},
		{"version", a.Credential, strings.Replace(beatBody(), `"v":1`, `"v":2`, 1), "invalid_value", "v"},
		{"incarnation", a.Credential, strings.Replace(beatBody(), "inc_", "inx_", 1), "invalid_value", "incarnation"},
		{"state", a.Credential, strings.Replace(beatBody(), `"up"`, `"upside down"`, 1), "invalid_value", "state"},
		{"count", a.Credential, strings.Replace(beatBody(), `"slots":2`, `"slots":-2`, 1), "invalid_value", "slots"},
		{"large", a.Credential, strings.Replace(beatBody(), "{", `{"x":"`+strings.Repeat("x", 1<<20)+`",`, 1), "request_too_large", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			resp, body := h.do("POST", beatPath, test.key, test.body)
			checkRefusal(t, resp, body, test.code, test.param)
		})
	}
	if got := heard.take(); len(got) != 0 {
		t.Errorf("refused, and yet heard: %q", got)
	}

	// A removal made elsewhere kills the credential within a second.
	until(t, "the agent in the list", func() bool {
		return len(admin[adminapi.List[adminapi.Agent]](h, "GET", "/agents", "").Data) == 1
	})
	if _, err := h.store.RemoveAgent(t.Context(), a.Agent); err != nil {
		t.Fatal(err)
	}
	within(t, noticed+slack, "the credential to die", func() bool {
		resp, _ := h.do("POST", beatPath, a.Credential, beatBody())
		return resp.StatusCode == 401
	})
	// Nor is it shown any more, though a heartbeat of it was on its way.
	h.agents.Observe(a.Tenant, a.Agent, &schemas.Heartbeat{Version: 1, Incarnation: schemas.NewIncarnation(), State: schemas.AgentUp}, time.Now())
	within(t, noticed+slack, "the agent to be forgotten", func() bool {
		return len(admin[adminapi.List[adminapi.Agent]](h, "GET", "/agents", "").Data) == 0
	})
}

// An agent is listed from the moment it is paired, with what its machine is.
func TestPairedAgentIsListed(t *testing.T) {
	t.Parallel()
	h := build(t, plan{empty: true})
	a := h.pair(0)
	var list []adminapi.Agent
	within(t, noticed+slack, "the agent in the list", func() bool {
		list = admin[adminapi.List[adminapi.Agent]](h, "GET", "/agents", "").Data
		return len(list) == 1
	})
	want := adminapi.Machine{VRAMMB: 24576, RAMMB: 65536, CPUCores: 16, GPU: "RTX", OS: "linux/amd64"}
	if got := list[0]; got.ID != a.Agent || got.Name != "rig" || got.State != adminapi.AgentOffline || got.LastSeen != nil || got.Machine == nil || *got.Machine != want {
		t.Errorf("%+v", got)
	}
	gone := admin[adminapi.Agent](h, "DELETE", "/agents/"+string(a.Agent), "")
	if gone.ID != a.Agent || gone.Machine == nil {
		t.Errorf("%+v", gone)
	}
	within(t, noticed+slack, "the agent to be gone", func() bool {
		return len(admin[adminapi.List[adminapi.Agent]](h, "GET", "/agents", "").Data) == 0
	})
	h.calm()
}

// A pairing whose answer was lost can be asked for again under its name, and by nobody
// who doesn't have the key.
func TestPairAgain(t *testing.T) {
	t.Parallel()
	h := build(t, plan{empty: true})
	key := h.pairingKey()
	name := "Idempotency-Key: " + strings.Repeat("n", 26)
	_, first := h.do("POST", pairPath, "", pairBody(key, machineHash(0)), name)
	resp, again := h.do("POST", pairPath, "", pairBody(key, machineHash(0)), name)
	if resp.StatusCode != http.StatusCreated || first != again {
		t.Errorf("%s\n%s\n%s", resp.Status, first, again)
	}
	resp, body := h.do("POST", pairPath, "", pairBody(key, machineHash(1)), name)
	checkRefusal(t, resp, body, "invalid_value", "Idempotency-Key")
	resp, body = h.do("POST", pairPath, "", pairBody(h.pairingKey(), machineHash(0)), name)
	checkRefusal(t, resp, body, "invalid_value", "Idempotency-Key")
	resp, body = h.do("POST", pairPath, "", pairBody(key, machineHash(0)))
	checkRefusal(t, resp, body, "key_invalid", "pairing_key")
	// An admin's names are others.
	if resp, body := h.do("POST", adminapi.Prefix+"/tenants", adminToken, `{"slug":"acme"}`, name); resp.StatusCode != http.StatusCreated {
		t.Errorf("%s %s", resp.Status, body)
	}
	if list, _, err := h.store.ListAgents(t.Context(), "", books.Page{}); err != nil || len(list) != 1 {
		t.Errorf("%d agents, %v", len(list), err)
	}
}
