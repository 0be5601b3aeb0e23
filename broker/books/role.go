package books

import (
	"strings"

	"github.com/jackc/pgx/v5"
)

// roleSQL makes a role that can do what edges and brokers do, once the schema is there, and
// nothing else. What is written once and for all, the ledger and the audit, it can't change;
// what later migrations add, it may use.
const roleSQL = `DO $$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = :literal) THEN
        CREATE ROLE :role LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION;
    END IF;
    EXECUTE format('GRANT CONNECT ON DATABASE %I TO :role', current_database());
    EXECUTE format('REVOKE CREATE, TEMPORARY ON DATABASE %I FROM PUBLIC', current_database());
END $$;
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
GRANT USAGE ON SCHEMA public TO :role;
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO :role;
GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO :role;
REVOKE UPDATE, DELETE ON ledger, audit FROM :role;
REVOKE INSERT, UPDATE, DELETE ON goose_db_version FROM :role;
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO :role;
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT USAGE ON SEQUENCES TO :role;
`

// RoleSQL returns the statements that make the role of that name, or bring one that is there
// up to date. The owner of the schema runs them, in its database, after Migrate. The role has no
// password until somebody gives it one.
func RoleSQL(name string) string {
	return strings.NewReplacer(
		":literal", "'"+strings.ReplaceAll(name, "'", "''")+"'",
		":role", pgx.Identifier{name}.Sanitize(),
	).Replace(roleSQL)
}
