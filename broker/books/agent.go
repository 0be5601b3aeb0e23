package books

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/ownllm/ownllm/schemas"
)

// Agent is a GPU machine, as it was when it was last heard of.
type Agent struct {
	ID            schemas.AgentID     `json:"id"`
	Tenant        schemas.TenantID    `json:"tenant_id"`
	Name          string              `json:"name"`
	Inventory     schemas.Inventory   `json:"inventory"`
	InventoryHash string              `json:"inventory_hash"`
	Incarnation   schemas.Incarnation `json:"incarnation"`
	// Machine is what the machine said of itself when it was paired.
	Machine Machine `json:"machine"`
	// LastSeen is zero if it never was.
	LastSeen  time.Time `json:"last_seen"`
	CreatedAt time.Time `json:"created_at"`
}

const agentColumns = `id, tenant_id, name, inventory, inventory_hash, incarnation, facts, coalesce(last_seen, 'epoch'), created_at`

func scanAgent(row pgx.CollectableRow) (Agent, error) {
	var a Agent
	err := row.Scan(&a.ID, &a.Tenant, &a.Name, &a.Inventory, &a.InventoryHash, &a.Incarnation, &a.Machine, &a.LastSeen, &a.CreatedAt)
	if a.LastSeen.Unix() == 0 {
		a.LastSeen = time.Time{}
	}
	return a, err
}

// AgentReport is what an agent says of itself.
type AgentReport struct {
	ID          schemas.AgentID
	Tenant      schemas.TenantID
	Name        string
	Inventory   schemas.Inventory
	Incarnation schemas.Incarnation
}

func (r AgentReport) check() ([]byte, error) {
	if err := schemas.ValidateID(string(r.ID), "agt_"); err != nil {
		return nil, invalid("id", "The agent's id must be agt_ and a ULID.")
	}
	if err := schemas.ValidateID(string(r.Incarnation), "inc_"); err != nil {
		return nil, invalid("incarnation", "The agent's incarnation must be inc_ and a ULID.")
	}
	if err := checkName(r.Name); err != nil {
		return nil, err
	}
	for _, m := range r.Inventory.Models {
		if !validModel(m.ID) {
			return nil, invalid("inventory", "A model's id must have 1 to %d bytes, without control characters or spaces at its ends.", maxModel)
		}
	}
	b, err := json.Marshal(r.Inventory)
	if err != nil {
		return nil, invalid("inventory", "The inventory can't be encoded.")
	}
	if len(b) > maxInventory {
		return nil, invalid("inventory", "The inventory must have at most %d bytes.", maxInventory)
	}
	return b, nil
}

// UpsertAgent stores what an agent says of itself, as seen now. A partial inventory keeps the
// models that were stored before. Apart from that, the last word wins:
// which incarnation of an agent is the live one is for presence to judge. An agent
// never changes its tenant, and one that was removed stays so.
func (s *Store) UpsertAgent(ctx context.Context, r AgentReport) error {
	inventory, err := r.check()
	if err != nil {
		return err
	}
	return s.write(ctx, "store an agent", func(ctx context.Context, tx pgx.Tx) ([]deed, error) {
		stored := r
		if r.Inventory.Partial {
			var before schemas.Inventory
			err := tx.QueryRow(ctx, `SELECT inventory FROM agents WHERE id = $1 FOR NO KEY UPDATE`, r.ID).Scan(&before)
			if err != nil && !errors.Is(err, pgx.ErrNoRows) {
				return nil, err
			}
			stored.Inventory = r.Inventory.Keep(before.Models)
			if inventory, err = stored.check(); err != nil {
				return nil, err
			}
		}
		tag, err := tx.Exec(ctx, `
			INSERT INTO agents (id, tenant_id, name, inventory, inventory_hash, incarnation, last_seen)
			VALUES ($1, $2, $3, $4::jsonb, $5, $6, now())
			ON CONFLICT (id) DO UPDATE SET
				name = excluded.name, inventory = excluded.inventory, inventory_hash = excluded.inventory_hash,
				incarnation = excluded.incarnation, last_seen = now()
			WHERE agents.tenant_id = excluded.tenant_id AND agents.removed_at IS NULL`,
			r.ID, r.Tenant, r.Name, string(inventory), stored.Inventory.Hash(), r.Incarnation)
		if err == nil && tag.RowsAffected() == 0 {
			return nil, invalid("id", "The agent was removed, or another tenant has one with this id. Pair the machine again.")
		}
		return nil, err
	})
}

// TouchAgents notes that agents were heard of just now. Unknown ids are passed over.
// Several brokers may hear the same agents: who is being touched is skipped.
func (s *Store) TouchAgents(ctx context.Context, ids []schemas.AgentID) error {
	if len(ids) == 0 {
		return nil
	}
	return s.write(ctx, "touch the agents", func(ctx context.Context, tx pgx.Tx) ([]deed, error) {
		_, err := tx.Exec(ctx, `
			UPDATE agents SET last_seen = now()
			WHERE id IN (SELECT id FROM agents WHERE id = ANY ($1) FOR NO KEY UPDATE SKIP LOCKED)`, ids)
		return nil, err
	})
}

// ListAgents returns a page of the agents, and the cursor of the next page: of the
// tenant with the given id or slug, or of all tenants if that is empty.
func (s *Store) ListAgents(ctx context.Context, tenant string, page Page) (list []Agent, next string, err error) {
	limit, err := page.check("agt_")
	if err != nil {
		return nil, "", err
	}
	err = s.read(ctx, "list the agents", func(ctx context.Context) error {
		query, args := `SELECT `+agentColumns+` FROM agents WHERE id > $1 AND removed_at IS NULL`, []any{page.After, limit}
		if tenant != "" {
			t, err := getTenant(ctx, s.pool, tenant)
			if err != nil {
				return err
			}
			query, args = query+` AND tenant_id = $3`, append(args, t.ID)
		}
		rows, err := s.pool.Query(ctx, query+` ORDER BY id LIMIT $2`, args...)
		if err != nil {
			return err
		}
		list, err = pgx.CollectRows(rows, scanAgent)
		return err
	})
	if err != nil {
		return nil, "", err
	}
	list, next = cut(list, limit, func(a Agent) string { return string(a.ID) })
	return list, next, nil
}
