-- The GPU machines, and what they offered when they were last heard of, so that an
-- edge that has just started knows the models of an agent that is away.

-- +goose Up
CREATE TABLE agents (
    id             text COLLATE "C" PRIMARY KEY,
    tenant_id      text COLLATE "C" NOT NULL REFERENCES tenants (id),
    name           text NOT NULL,
    inventory      jsonb NOT NULL,
    inventory_hash text NOT NULL,
    incarnation    text NOT NULL,
    last_seen      timestamptz NOT NULL DEFAULT now(),
    created_at     timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50); -- last_seen is written all the time, and no index holds it

CREATE INDEX agents_tenant ON agents (tenant_id, id);

-- +goose Down
DROP TABLE agents;
