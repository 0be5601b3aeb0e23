package books

import (
	"context"
	"encoding/hex"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/ownllm/ownllm/broker/credential"
	"github.com/ownllm/ownllm/schemas"
)

// The lifetime of a pairing key: if none is asked for, and at the most.
const (
	defaultPairing = 7 * 24 * time.Hour
	maxPairing     = 365 * 24 * time.Hour
)

// Pairing is a key by which one machine can become an agent of a tenant, once. It is
// without its secret.
type Pairing struct {
	ID        schemas.PairingID `json:"id"`
	Tenant    schemas.TenantID  `json:"tenant_id"`
	Slug      string            `json:"tenant_slug"`
	CreatedAt time.Time         `json:"created_at"`
	ExpiresAt time.Time         `json:"expires_at"`
}

// NewPairing is what a pairing key is made of.
type NewPairing struct {
	Tenant string         // id or slug
	TTL    *time.Duration // from now on; nil: 7 days
	// Secret is used if it isn't zero, else a new one is made.
	Secret credential.Secret
}

// CreatePairing makes a pairing key, and returns its secret, which can't be had again.
// See WithIdempotency.
func (s *Store) CreatePairing(ctx context.Context, n NewPairing) (p Pairing, secret credential.Secret, err error) {
	given, ttl := n.Secret, defaultPairing
	if n.TTL != nil {
		ttl = *n.TTL
	}
	if ttl <= 0 || ttl > maxPairing {
		return Pairing{}, credential.Secret{}, invalid("ttl_seconds", "A pairing key's lifetime must be more than 0 and at most a year.")
	}
	if n.Secret.IsZero() {
		n.Secret = credential.NewPairing()
	}
	err = s.write(ctx, "create a pairing key", func(ctx context.Context, tx pgx.Tx) ([]deed, error) {
		id := schemas.NewPairingID()
		made, err := claim(ctx, tx, "pairing.create", []any{n.Tenant, ttl, hashOf(given)}, string(id))
		if err != nil {
			return nil, err
		}
		if made != "" {
			secret = given
			p, err = getPairing(ctx, tx, schemas.PairingID(made))
			return nil, err
		}
		t, err := getTenant(ctx, tx, n.Tenant)
		if err != nil {
			return nil, err
		}
		hash := n.Secret.Hash()
		_, err = tx.Exec(ctx, `
			INSERT INTO pairings (id, tenant_id, hash, expires_at) VALUES ($1, $2, $3, coalesce($4, now()) + $5::interval)`,
			id, t.ID, hash[:], s.at(), ttl)
		if err != nil {
			return nil, err
		}
		secret = n.Secret
		p, err = getPairing(ctx, tx, id)
		return []deed{{Change{KindPairing, string(id)}, "pairing.create", t.ID, map[string]any{"expires_at": p.ExpiresAt}}}, err
	})
	if err != nil {
		return Pairing{}, credential.Secret{}, err
	}
	return p, secret, nil
}

func getPairing(ctx context.Context, q querier, id schemas.PairingID) (Pairing, error) {
	rows, err := q.Query(ctx, `
		SELECT p.id, p.tenant_id, t.slug, p.created_at, p.expires_at
		FROM pairings p JOIN tenants t ON t.id = p.tenant_id WHERE p.id = $1`, id)
	if err != nil {
		return Pairing{}, err
	}
	return pgx.CollectExactlyOneRow(rows, func(row pgx.CollectableRow) (Pairing, error) {
		var p Pairing
		err := row.Scan(&p.ID, &p.Tenant, &p.Slug, &p.CreatedAt, &p.ExpiresAt)
		return p, err
	})
}

// hashOf is a secret as the content of a name may have it; empty for none.
func hashOf(secret credential.Secret) string {
	if secret.IsZero() {
		return ""
	}
	sum := secret.Hash()
	return hex.EncodeToString(sum[:])
}

// The refusals of a pairing. They are shared: nobody changes a *schemas.Error.
var (
	errPairingUnknown = schemas.Errorf(schemas.CodeKeyInvalid,
		"The pairing key is invalid: there is no such key. Check that it was copied whole, or make a new one with `ownllm agents pair`.").WithParam("pairing_key")
	errPairingExpired = schemas.Errorf(schemas.CodeKeyExpired,
		"The pairing key has expired. Make a new one with `ownllm agents pair`.").WithParam("pairing_key")
	errPairingUsed = schemas.Errorf(schemas.CodeKeyInvalid,
		"The pairing key was already used; each pairs one machine. Make a new one with `ownllm agents pair`.").WithParam("pairing_key")
	errPaired = invalid("machine_id_hash",
		"This machine is already paired. To pair it anew, remove its agent first, with `ownllm agents remove`.")
)

// PairingRefused reports whether an error says that a pairing key isn't good, or not any
// more.
func PairingRefused(err error) bool {
	return errors.Is(err, errPairingUnknown) || errors.Is(err, errPairingExpired)
}

// PairRequest is how a machine asks to become an agent.
type PairRequest struct {
	Secret credential.Secret // of the pairing key
	// MachineID is the SHA-256 of what the machine is known by.
	MachineID [32]byte
	Name      string // for people; may be empty
	Machine   Machine
	// Credential is used if it isn't zero, else a new one is made.
	Credential credential.Secret
}

// PairAgent makes an agent of a machine that shows a pairing key, spends the key, and
// returns the agent's credential, which can't be had again. Of several who show the same
// key one gets an agent.
//
// The refusals are *schemas.Error: key_invalid for a key that doesn't exist and for one
// that was used already, key_expired, and invalid_value with the param machine_id_hash for
// a machine that is paired already. See WithIdempotency.
func (s *Store) PairAgent(ctx context.Context, r PairRequest) (a Agent, secret credential.Secret, err error) {
	given := r.Credential
	if err := checkName(r.Name); err != nil {
		return Agent{}, credential.Secret{}, err
	}
	if r.MachineID == ([32]byte{}) {
		return Agent{}, credential.Secret{}, invalid("machine_id_hash", "machine_id_hash is needed: the SHA-256 of what the machine is known by.")
	}
	if err := r.Machine.check(); err != nil {
		return Agent{}, credential.Secret{}, err
	}
	if given.IsZero() {
		r.Credential = credential.NewAgent()
	}
	// Whoever has no key at all shall not make us write.
	key := r.Secret.Hash()
	err = s.read(ctx, "look up a pairing key", func(ctx context.Context) error {
		var found bool
		err := s.pool.QueryRow(ctx, `SELECT true FROM pairings WHERE hash = $1`, key[:]).Scan(&found)
		if errors.Is(err, pgx.ErrNoRows) {
			return errPairingUnknown
		}
		return err
	})
	if err != nil {
		return Agent{}, credential.Secret{}, err
	}
	err = s.write(ctx, "pair an agent", func(ctx context.Context, tx pgx.Tx) ([]deed, error) {
		id := schemas.NewAgentID()
		made, err := claim(ctx, tx, "agent.pair", []any{hashOf(r.Secret), r.MachineID, r.Name, r.Machine, hashOf(given)}, string(id))
		if err != nil {
			return nil, err
		}
		if made != "" {
			secret = given
			a, err = getAgent(ctx, tx, schemas.AgentID(made))
			return nil, err
		}
		var d deed
		a, d, err = s.pairAgent(ctx, tx, id, r)
		secret = r.Credential
		return []deed{d}, err
	})
	if err != nil {
		return Agent{}, credential.Secret{}, err
	}
	return a, secret, nil
}

func (s *Store) pairAgent(ctx context.Context, tx pgx.Tx, id schemas.AgentID, r PairRequest) (Agent, deed, error) {
	key := r.Secret.Hash()
	// The lock comes first, in a statement of its own, because what the next one sees is as
	// old as itself: who waits here finds the key used.
	if _, err := tx.Exec(ctx, `SELECT FROM pairings WHERE hash = $1 FOR NO KEY UPDATE`, key[:]); err != nil {
		return Agent{}, deed{}, err
	}
	var (
		pairing       schemas.PairingID
		tenant        schemas.TenantID
		used, expired bool
	)
	err := tx.QueryRow(ctx, `
		SELECT id, tenant_id, used_at IS NOT NULL, expires_at <= coalesce($2, clock_timestamp()) FROM pairings WHERE hash = $1`,
		key[:], s.at()).Scan(&pairing, &tenant, &used, &expired)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return Agent{}, deed{}, errPairingUnknown
	case err != nil:
		return Agent{}, deed{}, err
	case used:
		return Agent{}, deed{}, errPairingUsed
	case expired:
		return Agent{}, deed{}, errPairingExpired
	}
	if err := checkMachine(ctx, tx, tenant, r.MachineID); err != nil {
		return Agent{}, deed{}, err
	}
	a, err := insertAgent(ctx, tx, id, tenant, r)
	if err != nil {
		return Agent{}, deed{}, err
	}
	_, err = tx.Exec(ctx, `UPDATE pairings SET used_at = coalesce($2, now()), agent_id = $3 WHERE id = $1`, pairing, s.at(), id)
	return a, deed{Change{KindAgent, string(id)}, "agent.pair", tenant, map[string]any{
		"name": r.Name, "pairing_id": pairing, "machine": r.Machine,
	}}, err
}

// checkMachine refuses a machine that is an agent. Two that are paired at once by keys of
// their own are told apart by the index.
func checkMachine(ctx context.Context, tx pgx.Tx, tenant schemas.TenantID, machine [32]byte) error {
	var id schemas.AgentID
	var ours bool
	err := tx.QueryRow(ctx, `SELECT id, tenant_id = $2 FROM agents WHERE machine = $1 AND removed_at IS NULL`, machine[:], tenant).Scan(&id, &ours)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return nil
	case err != nil:
		return err
	case ours:
		return invalid("machine_id_hash",
			"This machine is already paired, as agent %s. To pair it anew, remove that first: `ownllm agents remove %s`.", id, id)
	}
	return errPaired // another tenant's agents are nobody's business
}

func insertAgent(ctx context.Context, tx pgx.Tx, id schemas.AgentID, tenant schemas.TenantID, r PairRequest) (Agent, error) {
	var machine []byte
	if r.MachineID != ([32]byte{}) {
		machine = r.MachineID[:]
	}
	hash, nothing := r.Credential.Hash(), schemas.Inventory{Models: []schemas.Model{}}
	_, err := tx.Exec(ctx, `
		INSERT INTO agents (id, tenant_id, name, inventory, inventory_hash, incarnation, credential, machine, facts, last_seen)
		VALUES ($1, $2, $3, $4, $5, '', $6, $7, $8, NULL)`,
		id, tenant, r.Name, nothing, nothing.Hash(), hash[:], machine, r.Machine)
	if err != nil {
		return Agent{}, err
	}
	return getAgent(ctx, tx, id)
}
