package command

import (
	"context"
	"io"

	"github.com/ownllm/ownllm/internal/adminapi"
)

// tenantsCommand is `ownllm tenants`.
type tenantsCommand struct {
	Create  tenantsCreate  `cmd:"" help:"Create a tenant."`
	List    tenantsList    `cmd:"" help:"List the tenants."`
	Suspend tenantsSuspend `cmd:"" help:"Suspend a tenant: its keys stop working within a second."`
	Resume  tenantsResume  `cmd:"" help:"End the suspension of a tenant."`
}

// Help shows examples.
func (tenantsCommand) Help() string {
	return "A tenant owns agents, users and keys.\n\nExample:\n\n    ownllm tenants create --slug acme"
}

type tenantsCreate struct {
	Slug string `required:"" placeholder:"SLUG" help:"Name of the tenant in host names; unique."`
	AdminOptions
	Output
}

// Help shows examples.
func (tenantsCreate) Help() string {
	return "Examples:\n\n    ownllm tenants create --slug acme\n    ownllm tenants create --slug acme --json | jq -r .id"
}

// Run creates the tenant.
func (c *tenantsCreate) Run(ctx context.Context, env *Environment) error {
	return one(env, c.AdminOptions, c.Output, func(api *adminapi.Client) (adminapi.Tenant, error) {
		return api.CreateTenant(ctx, adminapi.CreateTenant{Slug: c.Slug})
	}, tenantTable)
}

type tenantsList struct {
	AdminOptions
	Output
}

// Help shows examples.
func (tenantsList) Help() string {
	return "Examples:\n\n    ownllm tenants list\n    ownllm tenants list --json | jq -r '.data[].slug'"
}

// Run lists the tenants.
func (c *tenantsList) Run(ctx context.Context, env *Environment) error {
	return many(env, c.AdminOptions, c.Output, func(api *adminapi.Client) ([]adminapi.Tenant, error) {
		return api.Tenants(ctx)
	}, tenantTable)
}

type tenantsSuspend struct {
	Tenant string `arg:"" help:"Slug or id of the tenant."`
	AdminOptions
	Output
}

// Help shows examples.
func (tenantsSuspend) Help() string {
	return "Requests with the tenant's keys get 403 tenant_disabled until it is resumed.\n\n" +
		"Example:\n\n    ownllm tenants suspend acme"
}

// Run suspends the tenant.
func (c *tenantsSuspend) Run(ctx context.Context, env *Environment) error {
	return one(env, c.AdminOptions, c.Output, func(api *adminapi.Client) (adminapi.Tenant, error) {
		return api.SuspendTenant(ctx, c.Tenant)
	}, tenantTable)
}

type tenantsResume struct {
	Tenant string `arg:"" help:"Slug or id of the tenant."`
	AdminOptions
	Output
}

// Help shows examples.
func (tenantsResume) Help() string { return "Example:\n\n    ownllm tenants resume acme" }

// Run ends the suspension of the tenant.
func (c *tenantsResume) Run(ctx context.Context, env *Environment) error {
	return one(env, c.AdminOptions, c.Output, func(api *adminapi.Client) (adminapi.Tenant, error) {
		return api.ResumeTenant(ctx, c.Tenant)
	}, tenantTable)
}

func tenantTable(w io.Writer, tenants ...adminapi.Tenant) error {
	rows := make([][]string, len(tenants))
	for i, t := range tenants {
		rows[i] = []string{t.Slug, string(t.ID), t.State, date(&t.CreatedAt, "")}
	}
	return table(w, []string{"SLUG", "ID", "STATE", "CREATED"}, rows)
}
