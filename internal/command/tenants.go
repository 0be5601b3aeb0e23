package command

import (
	"context"
	"errors"
	"io"
	"strconv"

	"github.com/ownllm/ownllm/internal/adminapi"
)

// tenantsCommand is `ownllm tenants`.
type tenantsCommand struct {
	Create  tenantsCreate  `cmd:"" help:"Create a tenant."`
	List    tenantsList    `cmd:"" help:"List the tenants."`
	Set     tenantsSet     `cmd:"" help:"Change the name or the limit of a tenant."`
	Suspend tenantsSuspend `cmd:"" help:"Suspend a tenant: its keys stop working within a second."`
	Resume  tenantsResume  `cmd:"" help:"End the suspension of a tenant."`
}

// Help shows examples.
func (tenantsCommand) Help() string {
	return "A tenant owns agents, users and keys.\n\nExample:\n\n    ownllm tenants create --slug acme"
}

type tenantsCreate struct {
	Slug string `required:"" placeholder:"SLUG" help:"Name of the tenant in host names; unique, and for good."`
	Name string `placeholder:"NAME" help:"Name for people; without it the slug."`
	QPS  *int   `name:"qps" placeholder:"N" help:"Requests that all keys of the tenant together may make each second; without it 32."`
	AdminOptions
	Output
}

// Help shows examples.
func (tenantsCreate) Help() string {
	return "Examples:\n\n    ownllm tenants create --slug acme\n" +
		"    ownllm tenants create --slug acme --name \"Acme Inc.\" --qps 100\n    ownllm tenants create --slug acme --json | jq -r .id"
}

// Run creates the tenant.
func (c *tenantsCreate) Run(ctx context.Context, env *Environment) error {
	return one(env, c.AdminOptions, c.Output, func(api *adminapi.Client) (adminapi.Tenant, error) {
		return api.CreateTenant(ctx, adminapi.CreateTenant{Slug: c.Slug, Name: c.Name, QPS: c.QPS})
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

type tenantsSet struct {
	Tenant string  `arg:"" help:"Slug or id of the tenant."`
	Name   *string `placeholder:"NAME" help:"Name for people."`
	QPS    *int    `name:"qps" placeholder:"N" help:"Requests that all keys of the tenant together may make each second."`
	AdminOptions
	Output
}

// Help shows examples.
func (tenantsSet) Help() string {
	return "What isn't given stays. A new limit holds from the next second on.\n\nExamples:\n\n" +
		"    ownllm tenants set acme --qps 100\n    ownllm tenants set acme --name \"Acme Inc.\""
}

// Validate checks that there is something to do.
func (c *tenantsSet) Validate() error {
	if c.Name == nil && c.QPS == nil {
		return errors.New("nothing to change: give --name or --qps")
	}
	return nil
}

// Run changes the tenant.
func (c *tenantsSet) Run(ctx context.Context, env *Environment) error {
	return one(env, c.AdminOptions, c.Output, func(api *adminapi.Client) (adminapi.Tenant, error) {
		return api.ChangeTenant(ctx, c.Tenant, adminapi.ChangeTenant{Name: c.Name, QPS: c.QPS})
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
		rows[i] = []string{t.Slug, string(t.ID), t.Name, t.State, strconv.Itoa(t.QPS), date(&t.CreatedAt, "")}
	}
	return table(w, []string{"SLUG", "ID", "NAME", "STATE", "QPS", "CREATED"}, rows)
}
