package edge

import (
	"context"
	"encoding/hex"
	"net"
	"net/url"
	"strings"
	"time"

	"github.com/gofiber/fiber/v2"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/credential"
	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/schemas"
)

// Aside takes in heartbeats of workers that have no link to the bus, as they came, and tells
// all edges. The error is a *schemas.Error if the heartbeat makes no sense.
type Aside interface {
	Aside(tenant schemas.TenantID, agent schemas.AgentID, heartbeat []byte) error
}

const (
	// pairBodyLimit and beatBodyLimit bound the bodies of what machines send, in bytes. A
	// heartbeat may carry an inventory, and is no larger than the bus takes.
	pairBodyLimit = 16 << 10
	beatBodyLimit = 1 << 20
)

// agentRoutes serves what machines ask for. They have no admin token.
func (e *Edge) agentRoutes() {
	e.app.Post(adminapi.Prefix+adminapi.PairPath, e.pairAgent)
	e.app.Post(adminapi.Prefix+adminapi.HeartbeatPath, e.heartbeat)
}

// pairAgent makes an agent of a machine that shows a pairing key.
func (e *Edge) pairAgent(c *fiber.Ctx) error {
	in := callOf(c)
	if e.failures.exhausted(in.addr, in.received) {
		return errTooManyFailures() // whoever guesses is not told whether a guess was right
	}
	var ask adminapi.PairAgent
	if err := e.readOpen(c, pairBodyLimit, &ask); err != nil {
		return err
	}
	key, err := credential.ParsePairing(ask.PairingKey)
	if err != nil {
		return schemas.Errorf(schemas.CodeKeyInvalid, "The pairing key is invalid: %v. Check that it was copied whole.", err).WithParam("pairing_key")
	}
	r := books.PairRequest{
		Secret: key, Name: ask.Name, Credential: e.credentialFor(c, key),
		Machine: books.Machine{VRAMMB: ask.VRAMMB, RAMMB: ask.RAMMB, CPUCores: ask.CPUCores, GPU: ask.GPU, OS: ask.OS},
	}
	if n, err := hex.Decode(r.MachineID[:], []byte(ask.MachineIDHash[:min(len(ask.MachineIDHash), 2*len(r.MachineID))])); err != nil ||
		n != len(r.MachineID) || len(ask.MachineIDHash) != 2*n {
		return refuse("machine_id_hash", "machine_id_hash must be a SHA-256 in 64 hexadecimal digits.")
	}
	ctx := books.WithActor(c.UserContext(), books.Actor{Name: "agent", Request: string(in.id), Address: in.addr.String()})
	if name := c.Get(adminapi.IdempotencyHeader); name != "" {
		// An admin's names are none of the machine's business.
		ctx = books.WithIdempotency(ctx, "pair "+name)
	}
	a, secret, err := e.Books.PairAgent(ctx, r)
	return sendOne(c, fiber.StatusCreated, a, err, func(a books.Agent) adminapi.PairedAgent {
		return adminapi.PairedAgent{Agent: a.ID, Tenant: a.Tenant, Credential: secret.Reveal(), NATSURL: e.agentNATSURL(c)}
	})
}

// agentNATSURL is the address of NATS that a machine is told; empty: none.
func (e *Edge) agentNATSURL(c *fiber.Ctx) string {
	if e.cfg.AgentNATSURL != "" || e.cfg.NATSPort == "" {
		return e.cfg.AgentNATSURL
	}
	u := url.URL{Host: e.host(c)}
	if u.Hostname() == "" {
		return ""
	}
	return "nats://" + net.JoinHostPort(u.Hostname(), e.cfg.NATSPort)
}

// credentialFor returns the credential for a pairing that has an Idempotency-Key, so that
// the same request gets the same one again, see secretFor; the zero Secret for one
// without. To repeat it takes the pairing key as well.
func (e *Edge) credentialFor(c *fiber.Ctx, key credential.Secret) credential.Secret {
	name := c.Get(adminapi.IdempotencyHeader)
	if name == "" {
		return credential.Secret{}
	}
	return credential.DeriveAgent(e.derive("the credential of an agent", key.Reveal(), name))
}

// heartbeat takes in the heartbeat of a worker that has no link to the bus.
func (e *Edge) heartbeat(c *fiber.Ctx) error {
	id, err := e.authenticateAgent(c)
	if err != nil {
		return err
	}
	body, err := boundedBody(c, beatBodyLimit)
	if err != nil {
		return err
	}
	var hb schemas.Heartbeat
	if err := decode(body, &hb, false); err != nil {
		return err
	}
	if err := checkHeartbeat(&hb); err != nil {
		return err
	}
	if e.Aside != nil {
		if err := e.Aside.Aside(id.Tenant, id.Agent, body); err != nil {
			return err
		}
	}
	return c.JSON(adminapi.HeartbeatReply{Agent: id.Agent})
}

// authenticateAgent checks the credential of a worker, as authenticate does the key of a
// client.
func (e *Edge) authenticateAgent(c *fiber.Ctx) (books.AgentIdentity, error) {
	in := callOf(c)
	scheme, text, _ := strings.Cut(c.Get(fiber.HeaderAuthorization), " ")
	secret, err := credential.ParseAgent(strings.TrimSpace(text))
	if err != nil || !strings.EqualFold(scheme, "Bearer") {
		return books.AgentIdentity{}, schemas.Errorf(schemas.CodeKeyMalformed,
			"The Authorization header isn't of the form Bearer %s… .", credential.BeginAgent)
	}
	if e.failures.exhausted(in.addr, in.received) {
		id, ok := e.Keys.CachedAgent(secret)
		if !ok {
			return id, errTooManyFailures()
		}
		return id, nil
	}
	return e.Keys.AuthenticateAgent(c.UserContext(), secret)
}

func checkHeartbeat(hb *schemas.Heartbeat) error {
	switch {
	case !schemas.Protocol.Speak(hb.Version):
		return refuse("v", "%s", schemas.Protocol.Refusal(schemas.Versions{Oldest: hb.Version, Newest: hb.Version}))
	case schemas.ValidateID(string(hb.Incarnation), "inc_") != nil:
		return refuse("incarnation", "incarnation must be inc_ and a ULID.")
	case hb.State != schemas.AgentUp && hb.State != schemas.AgentDraining && hb.State != schemas.AgentBye:
		return refuse("state", "state must be %s, %s or %s.", schemas.AgentUp, schemas.AgentDraining, schemas.AgentBye)
	case hb.Running < 0 || hb.Waiting < 0 || hb.Slots < 0:
		return refuse("slots", "running, waiting and slots can't be negative.")
	}
	return nil
}

// createPairing makes a pairing key.
func (e *Edge) createPairing(c *fiber.Ctx) error {
	var in adminapi.CreatePairing
	if err := e.read(c, &in); err != nil {
		return err
	}
	n := books.NewPairing{Tenant: in.Tenant}
	if name := c.Get(adminapi.IdempotencyHeader); name != "" {
		n.Secret = credential.DerivePairing(e.derive("a pairing key", name))
	}
	if in.TTLSeconds != 0 {
		ttl, err := seconds("ttl_seconds", in.TTLSeconds)
		if err != nil {
			return err
		}
		n.TTL = &ttl
	}
	p, secret, err := e.Books.CreatePairing(named(c), n)
	return sendOne(c, fiber.StatusCreated, p, err, func(p books.Pairing) adminapi.Pairing {
		return adminapi.Pairing{
			ID: p.ID, Tenant: p.Tenant, TenantSlug: p.Slug, Secret: secret.Reveal(), CreatedAt: p.CreatedAt, ExpiresAt: p.ExpiresAt,
		}
	})
}

// removeAgent ends an agent for good.
func (e *Edge) removeAgent(c *fiber.Ctx) error {
	a, err := e.Books.RemoveAgent(c.UserContext(), schemas.AgentID(c.Params("agent")))
	if err == nil {
		e.Roster.Changed(books.KindAgent, string(a.ID)) // needn't wait for the next poll
	}
	return sendOne(c, fiber.StatusOK, a, err, func(a books.Agent) adminapi.Agent {
		w := adminapi.Agent{ID: a.ID, Tenant: a.Tenant, Name: a.Name, State: adminapi.AgentOffline, Models: []adminapi.AgentModel{}, Machine: wireMachine(a.Machine)}
		if !a.LastSeen.IsZero() {
			seen := a.LastSeen.UTC().Round(time.Millisecond)
			w.LastSeen = &seen
		}
		return w
	})
}

func wireMachine(m books.Machine) *adminapi.Machine {
	if m == (books.Machine{}) {
		return nil // it wasn't paired
	}
	return &adminapi.Machine{VRAMMB: m.VRAMMB, RAMMB: m.RAMMB, CPUCores: m.CPUCores, GPU: m.GPU, OS: m.OS}
}

// addMachines completes agents by what their machines said of themselves, if the books can
// be asked.
func (e *Edge) addMachines(ctx context.Context, agents []adminapi.Agent) {
	if len(agents) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, slugWait)
	defer cancel()
	ids := make([]schemas.AgentID, len(agents))
	for i, a := range agents {
		ids[i] = a.ID
	}
	machines, err := e.Books.Machines(ctx, ids)
	if err != nil {
		return // a list without them is better than none
	}
	for i := range agents {
		agents[i].Machine = wireMachine(machines[agents[i].ID])
	}
}
