-- What was used in some time, of all tenants at once. Rows come in the order of their
-- times, so an index of blocks finds them, and costs next to nothing to write.

-- +goose Up
CREATE INDEX ledger_at ON ledger USING brin (at);

-- +goose Down
DROP INDEX ledger_at;
