-- Who may spend what, who holds it, and what was spent: prices, budgets, slots,
-- reservations, leases, the ledger.
--
-- Money is in micro-cents: one cent is 1,000,000. A price is at most 10^10 for 1,000
-- tokens and a count of tokens at most 10^8, so no product of the two, and no sum of
-- what a budget may hold, leaves a bigint.
--
-- Who changes anything of a key holds the lock on its row of key_accounts, and who
-- takes from a tenant's bucket that on its row of tenant_buckets: first tenants, then
-- keys, each in the order of their ids. Rows that are written all the time have no
-- index on what changes, and room for its next version in the same page. What is
-- written once for each request refers to nothing, because each reference would cost
-- a look-up and a lock; keys, users and tenants are never deleted.

-- +goose Up

-- The tenant '' stands for every tenant that has no price of its own. A model without
-- a price is free.
CREATE TABLE model_prices (
    tenant_id  text COLLATE "C" NOT NULL,
    model      text COLLATE "C" NOT NULL,
    price      bigint NOT NULL CHECK (price BETWEEN 0 AND 10000000000), -- for 1,000 tokens
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, model)
);

CREATE TABLE key_accounts (
    key_id    text COLLATE "C" PRIMARY KEY REFERENCES api_keys (id),
    in_flight integer NOT NULL DEFAULT 0 CHECK (in_flight >= 0)
) WITH (fillfactor = 50);

CREATE TABLE budgets (
    key_id   text COLLATE "C" NOT NULL REFERENCES api_keys (id),
    month    date NOT NULL CHECK (extract(day FROM month) = 1), -- of UTC
    spent    bigint NOT NULL DEFAULT 0 CHECK (spent >= 0),
    reserved bigint NOT NULL DEFAULT 0 CHECK (reserved >= 0),
    PRIMARY KEY (key_id, month)
) WITH (fillfactor = 50);

-- The bucket as one number: the moment, in nanoseconds since 1970, at which it would be
-- full if nothing more were taken. It holds one second's worth of requests.
CREATE TABLE tenant_buckets (
    tenant_id text COLLATE "C" PRIMARY KEY REFERENCES tenants (id),
    full_at   bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 50);

-- An owner is one run of an edge or broker. Its epoch rises when a lapsed lease is
-- taken from it: what it admitted under an earlier epoch is nobody's any more. Epochs
-- come from a sequence, so that one that was forgotten doesn't come back to an old one.
CREATE SEQUENCE owner_epochs;

CREATE TABLE owners (
    id         text COLLATE "C" PRIMARY KEY,
    epoch      bigint NOT NULL DEFAULT nextval('owner_epochs'),
    held       boolean NOT NULL DEFAULT true,
    lease      interval NOT NULL,
    expires_at timestamptz NOT NULL
) WITH (fillfactor = 50);

-- in_flight says that the reservation has one of its key's slots; it ends with the
-- state open, or earlier, when the owner's lease lapses.
CREATE TABLE reservations (
    id            text COLLATE "C" PRIMARY KEY, -- of the request
    key_id        text COLLATE "C" NOT NULL,
    tenant_id     text COLLATE "C" NOT NULL,
    user_id       text COLLATE "C" NOT NULL,
    model         text COLLATE "C" NOT NULL,
    month         date NOT NULL,
    price         bigint NOT NULL CHECK (price BETWEEN 0 AND 10000000000),
    prompt_tokens bigint NOT NULL CHECK (prompt_tokens BETWEEN 0 AND 100000000),
    limit_tokens  bigint NOT NULL CHECK (limit_tokens BETWEEN 0 AND 100000000),
    amount        bigint NOT NULL CHECK (amount >= 0),
    state         text NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'settled', 'expired')),
    in_flight     boolean NOT NULL DEFAULT true CHECK (state = 'open' OR NOT in_flight),
    owner_id      text COLLATE "C" NOT NULL,
    epoch         bigint NOT NULL,
    agent_id      text COLLATE "C",
    deadline      timestamptz NOT NULL,
    created_at    timestamptz NOT NULL,
    ended_at      timestamptz
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05);

CREATE INDEX reservations_open ON reservations (owner_id, deadline) WHERE state = 'open';

-- One row for each request that was charged, be it nothing.
CREATE TABLE ledger (
    request_id        text COLLATE "C" PRIMARY KEY,
    tenant_id         text COLLATE "C" NOT NULL,
    user_id           text COLLATE "C" NOT NULL,
    key_id            text COLLATE "C" NOT NULL,
    model             text COLLATE "C" NOT NULL,
    agent_id          text COLLATE "C",
    month             date NOT NULL, -- that of the admission
    prompt_tokens     bigint NOT NULL CHECK (prompt_tokens >= 0),
    completion_tokens bigint NOT NULL CHECK (completion_tokens >= 0),
    cost              bigint NOT NULL CHECK (cost >= 0),
    outcome           text NOT NULL CHECK (outcome IN ('done', 'error', 'cancelled', 'orphaned', 'expired')),
    at                timestamptz NOT NULL -- when it was settled
);

CREATE INDEX ledger_tenant ON ledger (tenant_id, at);
CREATE INDEX ledger_key ON ledger (key_id, at);

-- +goose Down
DROP TABLE ledger;
DROP TABLE reservations;
DROP TABLE owners;
DROP SEQUENCE owner_epochs;
DROP TABLE tenant_buckets;
DROP TABLE budgets;
DROP TABLE key_accounts;
DROP TABLE model_prices;
