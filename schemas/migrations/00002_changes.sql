-- What caches need to know: which tenants, users and keys have changed.
--
-- Every transaction that changes one of them raises the version, and holds the lock
-- on this one row until it commits. So the order of versions is the order of
-- commits: who has read up to a version has missed nothing below it.

-- +goose Up
CREATE TABLE change_counter (
    single  boolean PRIMARY KEY DEFAULT true CHECK (single),
    version bigint NOT NULL,
    -- Rows of changes up to this version are gone: who is behind it starts afresh.
    pruned  bigint NOT NULL CHECK (pruned <= version)
);

INSERT INTO change_counter (version, pruned) VALUES (0, 0);

CREATE TABLE changes (
    version bigint NOT NULL,
    kind    text COLLATE "C" NOT NULL,
    id      text COLLATE "C" NOT NULL,
    PRIMARY KEY (version, kind, id)
);

-- +goose Down
DROP TABLE changes;
DROP TABLE change_counter;
