package command

import (
	"context"
	"errors"
	"fmt"
	"regexp"

	"github.com/ownllm/ownllm/broker/books"
)

// migrateCommand is `ownllm migrate`.
type migrateCommand struct{ DatabaseOptions }

// Help shows examples.
func (migrateCommand) Help() string {
	return `Brings the schema in Postgres to the version of this program, and leaves a newer one alone.
Edges and brokers do so themselves when they start, if they may. Where they connect as a role that may not
(see ownllm database-role), run this first, as the owner of the schema.

Examples:

    export OWNLLM_DATABASE_URL=postgres://owner:…@db/ownllm
    ownllm migrate`
}

// Validate reports all problems of the flags at once.
func (c *migrateCommand) Validate() error {
	var p problems
	c.DatabaseOptions.check(&p, true)
	return p.err()
}

// Run migrates.
func (c *migrateCommand) Run(ctx context.Context, env *Environment) error {
	store, err := openBooks(ctx, c.DatabaseURL.Reveal(), c.DatabaseConns)
	if err != nil {
		return err
	}
	store.Close()
	_, err = fmt.Fprintln(env.Stdout, "The schema is up to date.")
	return err
}

// databaseRoleCommand is `ownllm database-role`.
type databaseRoleCommand struct {
	Name string `arg:"" optional:"" default:"ownllm_app" help:"Name of the role. Default: ownllm_app."`
}

// Help shows examples.
func (databaseRoleCommand) Help() string {
	return `Prints the SQL that makes a role for edges and brokers: it reads and writes rows, and can't drop,
alter, truncate or make a table, or change what is in the ledger and the audit. Run it as the
owner of the schema, after ownllm migrate, and again after each upgrade. Then give the role a
password.

Examples:

    ownllm database-role | psql "$OWNLLM_DATABASE_URL"
    psql "$OWNLLM_DATABASE_URL" -c '\password ownllm_app'`
}

var roleName = regexp.MustCompile(`^[a-z_][a-z0-9_]{0,62}$`)

// Validate checks the name.
func (c *databaseRoleCommand) Validate() error {
	if !roleName.MatchString(c.Name) {
		return errors.New("NAME: a role is lower-case letters, digits and _, up to 63, and begins with no digit")
	}
	return nil
}

// Run prints the statements.
func (c *databaseRoleCommand) Run(env *Environment) error {
	_, err := fmt.Fprint(env.Stdout, books.RoleSQL(c.Name))
	return err
}
