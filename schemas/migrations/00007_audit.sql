-- Who has changed what, and which creates were made already.

-- +goose Up
-- Whoever writes an entry holds the lock on the row of change_counter, so ids are in the
-- order of commits. tenant_id is empty for what is everybody's.
CREATE TABLE audit (
    id        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at        timestamptz NOT NULL,
    actor     text NOT NULL,
    request   text NOT NULL,
    address   text NOT NULL,
    action    text NOT NULL,
    kind      text NOT NULL,
    object    text COLLATE "C" NOT NULL,
    tenant_id text COLLATE "C" NOT NULL,
    detail    jsonb NOT NULL
);

CREATE INDEX audit_tenant ON audit (tenant_id, id);

-- content is the SHA-256 of what was asked for, object the id of what was made.
CREATE TABLE idempotency (
    name       text COLLATE "C" PRIMARY KEY,
    action     text NOT NULL,
    content    bytea NOT NULL CHECK (length(content) = 32),
    object     text COLLATE "C" NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE INDEX idempotency_age ON idempotency (created_at);

-- +goose Down
DROP TABLE idempotency;
DROP TABLE audit;
