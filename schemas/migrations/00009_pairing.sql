-- How machines become agents, and by what an agent is known.

-- +goose Up
-- credential is the SHA-256 of an agent's credential, which is stored nowhere, and machine
-- that of its machine id; facts are what the machine said of itself when it was paired. An
-- agent that was removed keeps its row, so that nothing that was on its way revives it.
ALTER TABLE agents
    ADD COLUMN credential bytea UNIQUE CHECK (length(credential) = 32),
    ADD COLUMN machine    bytea CHECK (length(machine) = 32),
    ADD COLUMN facts      jsonb NOT NULL DEFAULT '{}',
    ADD COLUMN removed_at timestamptz,
    ADD CHECK (removed_at IS NULL OR credential IS NULL),
    ALTER COLUMN last_seen DROP NOT NULL;

CREATE UNIQUE INDEX agents_machine ON agents (machine) WHERE removed_at IS NULL;

-- hash is the SHA-256 of a pairing key, which is stored nowhere; agent_id is who was paired
-- by it.
CREATE TABLE pairings (
    id         text COLLATE "C" PRIMARY KEY,
    tenant_id  text COLLATE "C" NOT NULL REFERENCES tenants (id),
    hash       bytea NOT NULL UNIQUE CHECK (length(hash) = 32),
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    used_at    timestamptz,
    agent_id   text COLLATE "C" REFERENCES agents (id),
    CHECK ((used_at IS NULL) = (agent_id IS NULL))
);

-- +goose Down
DROP TABLE pairings;

DELETE FROM agents WHERE removed_at IS NOT NULL;

UPDATE agents SET last_seen = created_at WHERE last_seen IS NULL;

ALTER TABLE agents
    DROP COLUMN credential,
    DROP COLUMN machine,
    DROP COLUMN facts,
    DROP COLUMN removed_at,
    ALTER COLUMN last_seen SET NOT NULL;
