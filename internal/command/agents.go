package command

import (
	"cmp"
	"context"
	"io"
	"strconv"

	"github.com/ownllm/ownllm/internal/adminapi"
)

// agentsCommand is `ownllm agents`.
type agentsCommand struct {
	List agentsList `cmd:"" help:"List the agents, reachable or not."`
}

// Help shows examples.
func (agentsCommand) Help() string {
	return "An agent is a GPU machine that runs a worker.\n\nExample:\n\n    ownllm agents list"
}

type agentsList struct {
	Tenant string `placeholder:"TENANT" help:"Only those of this tenant, named by slug or id."`
	AdminOptions
	Output
}

// Help shows examples.
func (agentsList) Help() string {
	return "Examples:\n\n    ownllm agents list\n    ownllm agents list --tenant acme --json"
}

// Run lists the agents.
func (c *agentsList) Run(ctx context.Context, env *Environment) error {
	return many(env, c.AdminOptions, c.Output, func(api *adminapi.Client) ([]adminapi.Agent, error) {
		return api.Agents(ctx, c.Tenant)
	}, agentTable)
}

func agentTable(w io.Writer, agents ...adminapi.Agent) error {
	rows := make([][]string, len(agents))
	for i, a := range agents {
		rows[i] = []string{
			cmp.Or(a.Name, string(a.ID)), string(a.ID), cmp.Or(a.TenantSlug, string(a.Tenant)), a.State,
			strconv.Itoa(a.Running) + "/" + strconv.Itoa(a.Slots), strconv.Itoa(a.Waiting),
			strconv.Itoa(len(a.Models)), ago(a.LastSeen), a.Host,
		}
	}
	return table(w, []string{"AGENT", "ID", "TENANT", "STATE", "RUNNING", "WAITING", "MODELS", "SEEN", "HOST"}, rows)
}
