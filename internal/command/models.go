package command

import (
	"cmp"
	"context"
	"io"
	"strconv"
	"strings"

	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/schemas"
)

// modelsCommand is `ownllm models`.
type modelsCommand struct {
	List modelsList `cmd:"" help:"List the models."`
}

// Help shows examples.
func (modelsCommand) Help() string {
	return "What clients may ask for is what the agents have.\n\nExample:\n\n    ownllm models list"
}

type modelsList struct {
	Tenant string `placeholder:"TENANT" help:"Only those of this tenant, named by slug or id."`
	AdminOptions
	Output
}

// Help shows examples.
func (modelsList) Help() string {
	return "Examples:\n\n    ownllm models list\n    ownllm models list --tenant acme --json | jq -r '.data[].id'"
}

// Run lists the models.
func (c *modelsList) Run(ctx context.Context, env *Environment) error {
	return many(env, c.AdminOptions, c.Output, func(api *adminapi.Client) ([]adminapi.Model, error) {
		return api.Models(ctx, c.Tenant)
	}, modelTable)
}

func modelTable(w io.Writer, models ...adminapi.Model) error {
	rows := make([][]string, len(models))
	for i, m := range models {
		rows[i] = []string{
			m.ID, cmp.Or(m.TenantSlug, string(m.Tenant)), string(m.State), strconv.Itoa(len(m.Agents)),
			number(m.ContextWindow), number(m.SizeMB), strings.Join(abilities(m.Capabilities), ","),
		}
	}
	return table(w, []string{"MODEL", "TENANT", "STATE", "AGENTS", "CONTEXT", "SIZE MB", "CAPABILITIES"}, rows)
}

// number is n, or nothing where 0 stands for unknown.
func number(n int) string {
	if n == 0 {
		return ""
	}
	return strconv.Itoa(n)
}

// abilities are the names of what a model can do.
func abilities(c schemas.Capabilities) []string {
	var names []string
	for _, a := range []struct {
		name string
		has  bool
	}{
		{"completion", c.Completion}, {"vision", c.Vision}, {"embedding", c.Embedding},
		{"tools", c.Tools}, {"thinking", c.Thinking},
	} {
		if a.has {
			names = append(names, a.name)
		}
	}
	return names
}
