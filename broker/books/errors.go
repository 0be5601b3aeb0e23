package books

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/ownllm/ownllm/schemas"
)

// ErrUnavailable says that the database can't be reached, doesn't answer in time, or
// takes no work just now. Trying again later may help.
var ErrUnavailable = errors.New("the database is unavailable")

// ErrNewerSchema says that a later version of OwnLLM has changed the database.
var ErrNewerSchema = errors.New("the database has a newer schema than this version of ownllm knows: run a newer ownllm")

// Codes of PostgreSQL that we act on.
const (
	sqlForeignKeyViolation = "23503"
	sqlUniqueViolation     = "23505"
	sqlRolledBack          = "40"    // a class: another transaction was in the way
	sqlBadText             = "22021" // not UTF-8, or a NUL
	sqlBadUnicodeEscape    = "22P05" // a NUL in JSON
)

// unreachable reports whether the error is of the way to the server, or of a server
// that takes no work just now.
func unreachable(err error) bool {
	if err == nil {
		return false
	}
	var connect *pgconn.ConnectError
	var network net.Error
	var server *pgconn.PgError
	switch {
	case errors.As(err, &connect), errors.As(err, &network), pgconn.SafeToRetry(err):
		return true
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, net.ErrClosed):
		return true
	case errors.As(err, &server):
		// 08: connections; 53: resources that ran out; 57P: shutting down or starting up;
		// 25006: read-only, as in a failover.
		code := server.Code
		return strings.HasPrefix(code, "08") || strings.HasPrefix(code, "53") ||
			strings.HasPrefix(code, "57P") || code == "25006"
	}
	return false
}

// translate turns an error of the driver into one of ours. ctx is the caller's.
func translate(ctx context.Context, what string, err error) error {
	if err == nil {
		return nil
	}
	var ours *schemas.Error
	if errors.As(err, &ours) {
		return ours
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return fmt.Errorf("%s: %w", what, ctx.Err())
	}
	var server *pgconn.PgError
	if errors.As(err, &server) {
		switch server.Code {
		case sqlUniqueViolation:
			if e, ok := duplicates[server.ConstraintName]; ok {
				return e
			}
		case sqlForeignKeyViolation:
			if server.ConstraintName == "agents_tenant_id_fkey" {
				return notFound("tenant", "")
			}
		case sqlBadText, sqlBadUnicodeEscape:
			return schemas.Errorf(schemas.CodeInvalidValue, "A text holds a NUL character or isn't valid UTF-8.")
		}
	}
	// %v, so that nobody can get at the driver's types.
	if unreachable(err) || server != nil && strings.HasPrefix(server.Code, sqlRolledBack) {
		return fmt.Errorf("%s: %w: %v", what, ErrUnavailable, err)
	}
	return fmt.Errorf("%s: %v", what, err)
}

// duplicates says what a violated constraint means.
var duplicates = map[string]*schemas.Error{
	"tenants_slug_key": invalid("slug", "There is a tenant with this slug already."),
	"users_email":      invalid("email", "The tenant has a user with this e-mail address already."),
	"key_secrets_pkey": invalid("key", "There is a key with this secret already."),
	// Only one that is made of a name is made twice, long after the name was forgotten.
	"pairings_hash_key":     invalid("Idempotency-Key", "This Idempotency-Key was used before. Use a new one for each request."),
	"agents_credential_key": invalid("credential", "There is an agent with this credential already."),
	"agents_machine":        errPaired,
}

func invalid(param, format string, args ...any) *schemas.Error {
	return schemas.Errorf(schemas.CodeInvalidValue, format, args...).WithParam(param)
}

// notFound says that there is no such thing. The name is the caller's own input.
func notFound(kind, name string) *schemas.Error {
	if name == "" {
		return schemas.Errorf(schemas.CodeNotFound, "There is no such %s.", kind)
	}
	const shown = 64
	if r := []rune(name); len(r) > shown {
		name = string(r[:shown]) + "…"
	}
	return schemas.Errorf(schemas.CodeNotFound, "There is no %s %q.", kind, name)
}

// orNotFound turns "no rows" into not_found.
func orNotFound(err error, kind, name string) error {
	if errors.Is(err, pgx.ErrNoRows) {
		return notFound(kind, name)
	}
	return err
}
