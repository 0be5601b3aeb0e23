-- A key has one secret that is current, and after a rotation older ones that end.

-- +goose Up
-- hash is the SHA-256 of a secret, which is stored nowhere; prefix is the part of it that
-- may be seen. The current secret is the one that has no end of its own.
CREATE TABLE key_secrets (
    hash       bytea PRIMARY KEY CHECK (length(hash) = 32),
    key_id     text COLLATE "C" NOT NULL REFERENCES api_keys (id),
    prefix     text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz
);

INSERT INTO key_secrets (hash, key_id, prefix, created_at) SELECT hash, id, prefix, created_at FROM api_keys;

CREATE UNIQUE INDEX key_secrets_current ON key_secrets (key_id) WHERE expires_at IS NULL;
CREATE INDEX key_secrets_key ON key_secrets (key_id);

ALTER TABLE api_keys DROP COLUMN hash, DROP COLUMN prefix;

-- +goose Down
ALTER TABLE api_keys ADD COLUMN hash bytea UNIQUE CHECK (length(hash) = 32), ADD COLUMN prefix text;

UPDATE api_keys k SET hash = s.hash, prefix = s.prefix FROM key_secrets s WHERE s.key_id = k.id AND s.expires_at IS NULL;

ALTER TABLE api_keys ALTER COLUMN hash SET NOT NULL, ALTER COLUMN prefix SET NOT NULL;

DROP TABLE key_secrets;
