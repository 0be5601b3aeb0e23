package books

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"

	"github.com/ownllm/ownllm/broker/credential"
	"github.com/ownllm/ownllm/schemas"
)

// Machine is what a machine says of itself when it is paired.
type Machine struct {
	VRAMMB   int64  `json:"vram_mb"` // of all GPUs; 0: none, or unknown
	RAMMB    int64  `json:"ram_mb"`
	CPUCores int    `json:"cpu_cores"`
	GPU      string `json:"gpu"` // the type; empty: none, or unknown
	OS       string `json:"os"`
}

// Bounds of what a machine may say of itself.
const (
	maxMB    = 1 << 40 // an exbibyte
	maxCores = 1 << 20
	maxFact  = 200 // bytes
)

func (m Machine) check() error {
	switch {
	case m.VRAMMB < 0 || m.VRAMMB > maxMB:
		return invalid("vram_mb", "vram_mb must be from 0 to %d.", int64(maxMB))
	case m.RAMMB < 0 || m.RAMMB > maxMB:
		return invalid("ram_mb", "ram_mb must be from 0 to %d.", int64(maxMB))
	case m.CPUCores < 0 || m.CPUCores > maxCores:
		return invalid("cpu_cores", "cpu_cores must be from 0 to %d.", maxCores)
	case len(m.GPU) > maxFact || !printable(m.GPU):
		return invalid("gpu", "gpu must have at most %d bytes, without control characters.", maxFact)
	case len(m.OS) > maxFact || !printable(m.OS):
		return invalid("os", "os must have at most %d bytes, without control characters.", maxFact)
	}
	return nil
}

// AgentIdentity is who a credential stands for.
type AgentIdentity struct {
	Agent  schemas.AgentID
	Tenant schemas.TenantID
	Name   string
	// Version is the version of the books that the answer comes from, see Changes.
	Version int64
}

// LookupAgent returns whom a credential, of which it gets the hash, stands for. One that no
// agent has, or whose agent was removed, is a key_invalid *schemas.Error.
func (s *Store) LookupAgent(ctx context.Context, hash credential.Hash) (AgentIdentity, error) {
	var id AgentIdentity
	err := s.read(ctx, "look up an agent", func(ctx context.Context) error {
		id = AgentIdentity{}
		err := s.pool.QueryRow(ctx, `
			SELECT a.id, a.tenant_id, a.name, c.version FROM agents a CROSS JOIN change_counter c
			WHERE a.credential = $1 AND a.removed_at IS NULL`, hash[:]).
			Scan(&id.Agent, &id.Tenant, &id.Name, &id.Version)
		if errors.Is(err, pgx.ErrNoRows) {
			return schemas.Errorf(schemas.CodeKeyInvalid, "The agent's credential is unknown, or the agent was removed. Pair the machine again.")
		}
		return err
	})
	if err != nil {
		return AgentIdentity{}, err
	}
	return id, nil
}

// GetAgent returns the agent with the given id; not_found if there is none, or if it was
// removed.
func (s *Store) GetAgent(ctx context.Context, id schemas.AgentID) (a Agent, err error) {
	err = s.read(ctx, "get an agent", func(ctx context.Context) error {
		a, err = getAgent(ctx, s.pool, id)
		return err
	})
	return a, err
}

func getAgent(ctx context.Context, q querier, id schemas.AgentID) (Agent, error) {
	if schemas.ValidateID(string(id), "agt_") != nil {
		return Agent{}, notFound("agent", "") // it may be a secret, pasted into the wrong place
	}
	rows, err := q.Query(ctx, `SELECT `+agentColumns+` FROM agents WHERE id = $1 AND removed_at IS NULL`, id)
	if err != nil {
		return Agent{}, err
	}
	a, err := pgx.CollectExactlyOneRow(rows, scanAgent)
	return a, orNotFound(err, "agent", string(id))
}

// PresentAgents tells which of the ids are of agents that weren't removed.
func (s *Store) PresentAgents(ctx context.Context, ids []schemas.AgentID) (present map[schemas.AgentID]bool, err error) {
	err = s.read(ctx, "look for agents", func(ctx context.Context) error {
		present = make(map[schemas.AgentID]bool, len(ids))
		rows, err := s.pool.Query(ctx, `SELECT id FROM agents WHERE id = ANY ($1) AND removed_at IS NULL`, ids)
		if err != nil {
			return err
		}
		var id schemas.AgentID
		_, err = pgx.ForEachRow(rows, []any{&id}, func() error {
			present[id] = true
			return nil
		})
		return err
	})
	return present, err
}

// Machines returns what the machines of agents said of themselves when they were paired.
func (s *Store) Machines(ctx context.Context, ids []schemas.AgentID) (machines map[schemas.AgentID]Machine, err error) {
	err = s.read(ctx, "read the machines of agents", func(ctx context.Context) error {
		machines = make(map[schemas.AgentID]Machine)
		rows, err := s.pool.Query(ctx, `SELECT id, facts FROM agents WHERE id = ANY ($1)`, ids)
		if err != nil {
			return err
		}
		var id schemas.AgentID
		var m Machine
		_, err = pgx.ForEachRow(rows, []any{&id, &m}, func() error {
			machines[id] = m
			m = Machine{}
			return nil
		})
		return err
	})
	return machines, err
}

// AddAgent makes sure that there is an agent with a credential, of the tenant with the
// given id or slug, and returns it. It is for a worker that needs no pairing, because it
// runs in the same process.
//
// The agent that has the credential is left as it is. If there is none, the credential is
// given to the agent with the given id, if the tenant has it, and else to a new one, which
// gets that id unless it was somebody's before.
func (s *Store) AddAgent(ctx context.Context, tenant string, id schemas.AgentID, name string, secret credential.Secret) (a Agent, err error) {
	if err := schemas.ValidateID(string(id), "agt_"); err != nil {
		return Agent{}, invalid("id", "The agent's id must be agt_ and a ULID.")
	}
	if err := checkName(name); err != nil {
		return Agent{}, err
	}
	err = s.write(ctx, "add an agent", func(ctx context.Context, tx pgx.Tx) ([]deed, error) {
		// Two processes may be here at once: the second finds what the first has made.
		if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock($1)`, firstLock); err != nil {
			return nil, err
		}
		t, err := getTenant(ctx, tx, tenant)
		if err != nil {
			return nil, err
		}
		hash := secret.Hash()
		rows, err := tx.Query(ctx, `SELECT `+agentColumns+` FROM agents WHERE credential = $1 AND tenant_id = $2 AND removed_at IS NULL`, hash[:], t.ID)
		if err != nil {
			return nil, err
		}
		if a, err = pgx.CollectExactlyOneRow(rows, scanAgent); !errors.Is(err, pgx.ErrNoRows) {
			return nil, err
		}
		tag, err := tx.Exec(ctx, `UPDATE agents SET credential = $2 WHERE id = $1 AND tenant_id = $3 AND removed_at IS NULL`, id, hash[:], t.ID)
		if err != nil {
			return nil, err
		}
		if tag.RowsAffected() == 1 {
			a, err = getAgent(ctx, tx, id)
		} else {
			var taken bool
			if err := tx.QueryRow(ctx, `SELECT EXISTS (SELECT FROM agents WHERE id = $1)`, id).Scan(&taken); err != nil {
				return nil, err
			}
			if taken {
				id = schemas.NewAgentID()
			}
			a, err = insertAgent(ctx, tx, id, t.ID, PairRequest{Name: name, Credential: secret})
		}
		return []deed{{Change{KindAgent, string(id)}, "agent.add", t.ID, map[string]any{"name": a.Name}}}, err
	})
	if err != nil {
		return Agent{}, err
	}
	return a, nil
}

// RemoveAgent ends an agent for good, and returns what it was: its credential is dead, its
// models are gone, and its machine can be paired anew. Again, it is not_found.
func (s *Store) RemoveAgent(ctx context.Context, id schemas.AgentID) (a Agent, err error) {
	if schemas.ValidateID(string(id), "agt_") != nil {
		return Agent{}, notFound("agent", "")
	}
	err = s.write(ctx, "remove an agent", func(ctx context.Context, tx pgx.Tx) ([]deed, error) {
		if _, err := tx.Exec(ctx, `SELECT FROM agents WHERE id = $1 FOR NO KEY UPDATE`, id); err != nil {
			return nil, err
		}
		if a, err = getAgent(ctx, tx, id); err != nil {
			return nil, err
		}
		nothing := schemas.Inventory{Models: []schemas.Model{}}
		_, err := tx.Exec(ctx, `
			UPDATE agents SET removed_at = now(), credential = NULL, inventory = $2, inventory_hash = $3 WHERE id = $1`,
			id, nothing, nothing.Hash())
		return []deed{{Change{KindAgent, string(id)}, "agent.remove", a.Tenant, map[string]any{"name": a.Name}}}, err
	})
	if err != nil {
		return Agent{}, err
	}
	return a, nil
}
