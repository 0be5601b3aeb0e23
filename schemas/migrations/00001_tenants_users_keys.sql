-- Who may ask for what: tenants, their users, their API keys.
--
-- Ids are prefixed ULIDs; the collation "C" sorts them by the time they were made.

-- +goose Up
CREATE TABLE tenants (
    id         text COLLATE "C" PRIMARY KEY,
    slug       text COLLATE "C" NOT NULL UNIQUE,
    name       text NOT NULL,
    state      text NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'suspended')),
    qps        integer NOT NULL DEFAULT 32 CHECK (qps > 0),
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE users (
    id         text COLLATE "C" PRIMARY KEY,
    tenant_id  text COLLATE "C" NOT NULL REFERENCES tenants (id),
    email      text NOT NULL,
    state      text NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'deactivated')),
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    UNIQUE (tenant_id, id)
);

CREATE UNIQUE INDEX users_email ON users (tenant_id, lower(email));

-- hash is the SHA-256 of the secret, which is stored nowhere; prefix is the part of
-- it that may be seen. The tenant of a key is always that of its user.
CREATE TABLE api_keys (
    id           text COLLATE "C" PRIMARY KEY,
    tenant_id    text COLLATE "C" NOT NULL,
    user_id      text COLLATE "C" NOT NULL,
    name         text NOT NULL,
    hash         bytea NOT NULL UNIQUE CHECK (length(hash) = 32),
    prefix       text NOT NULL,
    scopes       text[] NOT NULL,
    budget_cents bigint CHECK (budget_cents >= 0),
    concurrency  integer NOT NULL DEFAULT 32 CHECK (concurrency > 0),
    expires_at   timestamptz,
    revoked_at   timestamptz,
    created_at   timestamptz NOT NULL DEFAULT now(),
    FOREIGN KEY (tenant_id, user_id) REFERENCES users (tenant_id, id)
);

CREATE INDEX api_keys_tenant ON api_keys (tenant_id, id);
CREATE INDEX api_keys_user ON api_keys (user_id, id);

-- +goose Down
DROP TABLE api_keys;
DROP TABLE users;
DROP TABLE tenants;
