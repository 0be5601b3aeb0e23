package e2e

import (
	"context"
	"errors"
	"net/url"
	"os/exec"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/internal/secret"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/worker/demo"
)

// TestDatabaseRole runs an edge and a broker as the role that `ownllm database-role` makes.
// They do all that they do, and the role can't do what they never do.
func TestDatabaseRole(t *testing.T) {
	const role, password = "ownllm_app", "secret-of-the-role"
	backend := stack.StartBackend(t, demo.Options{})
	c := stack.StartCluster(t)
	sql, err := exec.CommandContext(t.Context(), stack.Binary(t, stack.OwnLLM), "database-role", role).Output()
	if err != nil {
		t.Fatal(err)
	}
	owner := openLedger(t, c.DatabaseURL)
	for range 2 { // again after an upgrade
		owner.exec(string(sql))
	}
	owner.exec(`ALTER ROLE ` + role + ` PASSWORD '` + password + `'`)
	t.Cleanup(func() { // it belongs to the server, which others use
		_, _ = owner.pool.Exec(context.Background(), `DROP OWNED BY `+role+` CASCADE; DROP ROLE `+role)
	})
	u, err := url.Parse(c.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword(role, password)
	as := []string{"--database-url", u.String()}
	if err := c.Broker.Stop(); err != nil {
		t.Fatal(err)
	}
	c.StartBroker(as...)
	c.StartWorker(backend.URL).Serving()
	edge := c.StartEdge(as...)
	awaitModel(t, []*stack.Edge{edge}, c.Key.Reveal(), demo.ModelID)

	api, err := adminapi.NewClient("http://"+edge.Addr+adminapi.Prefix, secret.String(stack.AdminToken))
	if err != nil {
		t.Fatal(err)
	}
	defer api.Close()
	user, err := api.CreateUser(t.Context(), adminapi.CreateUser{Tenant: string(c.Tenant.ID), Email: "ada@example.com"})
	if err != nil {
		t.Fatal(err)
	}
	made, err := api.CreateKey(t.Context(), adminapi.CreateKey{Tenant: string(c.Tenant.ID), User: string(user.ID)})
	if err != nil {
		t.Fatal(err)
	}
	client := newClient(edge.BaseURL, made.Secret)
	defer client.close()
	wantWhole(t, client.chat(t.Context(), true, nil))
	s := newSubmitter(t, c, books.NewKey{})
	s.accept("job", says("done"))
	s.done("job", "done")
	if _, err := api.RevokeKey(t.Context(), made.ID); err != nil {
		t.Fatal(err)
	}

	conn, err := pgx.Connect(t.Context(), u.String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.Background()) }()
	for _, statement := range []string{
		`DROP TABLE tenants`, `ALTER TABLE api_keys DROP COLUMN revoked_at`, `TRUNCATE ledger`, `CREATE TABLE mine (x int)`,
		`CREATE TEMPORARY TABLE mine (x int)`, `CREATE SCHEMA mine`, `CREATE INDEX ON ledger (cost)`,
		`DELETE FROM ledger`, `UPDATE ledger SET cost = 0`, `DELETE FROM audit`, `UPDATE audit SET at = now()`,
		`UPDATE goose_db_version SET version_id = 0`, `DROP FUNCTION books_cost`, `DROP TRIGGER submission_release ON key_accounts`,
		`ALTER TABLE key_accounts DISABLE TRIGGER ALL`, `CREATE ROLE other`, `COPY tenants TO '/tmp/tenants'`,
	} {
		_, err := conn.Exec(t.Context(), statement)
		var refused *pgconn.PgError
		if err == nil || !errors.As(err, &refused) || refused.Code != "42501" && !strings.Contains(err.Error(), "must be owner") {
			t.Errorf("%s: %v", statement, err)
		}
	}
}
