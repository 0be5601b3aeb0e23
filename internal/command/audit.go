package command

import (
	"cmp"
	"context"
	"io"

	"github.com/ownllm/ownllm/internal/adminapi"
)

// auditCommand is `ownllm audit`.
type auditCommand struct {
	Tenant string `placeholder:"TENANT" help:"Only changes of this tenant, named by slug or id."`
	AdminOptions
	Output
}

// Help shows examples.
func (auditCommand) Help() string {
	return "Every change of a tenant, user, key or price is listed, oldest first.\n\nExamples:\n\n" +
		"    ownllm audit | tail\n    ownllm audit --tenant acme --json | jq '.data[] | select(.action == \"key.revoke\")'"
}

// Run lists the changes.
func (c *auditCommand) Run(ctx context.Context, env *Environment) error {
	return many(env, c.AdminOptions, c.Output, func(api *adminapi.Client) ([]adminapi.AuditEntry, error) {
		return api.Audit(ctx, c.Tenant)
	}, auditTable)
}

func auditTable(w io.Writer, entries ...adminapi.AuditEntry) error {
	rows := make([][]string, len(entries))
	for i, a := range entries {
		rows[i] = []string{date(&a.At, ""), a.Actor, a.Address, a.Action, cmp.Or(a.TenantSlug, string(a.Tenant)), a.Object, string(a.Detail)}
	}
	return table(w, []string{"AT", "BY", "FROM", "ACTION", "TENANT", "OBJECT", "DETAIL"}, rows)
}
