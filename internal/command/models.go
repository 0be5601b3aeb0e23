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
	List   modelsList   `cmd:"" help:"List the models, with their prices."`
	Price  modelsPrice  `cmd:"" help:"Set the price of a model."`
	Prices modelsPrices `cmd:"" help:"List the prices that are set, of whatever models."`
}

// Help shows examples.
func (modelsCommand) Help() string {
	return "What clients may ask for is what the agents have. A model without a price is free.\n\nExamples:\n\n" +
		"    ownllm models list\n    ownllm models price llama-3.3-70b --cents-per-1k-tokens 0.25"
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
			number(m.ContextWindow), number(m.SizeMB), price(m.CentsPer1kTokens), strings.Join(abilities(m.Capabilities), ","),
		}
	}
	return table(w, []string{"MODEL", "TENANT", "STATE", "AGENTS", "CONTEXT", "SIZE MB", "CENTS/1K TOKENS", "CAPABILITIES"}, rows)
}

// price is a price for people.
func price(p *adminapi.Cents) string {
	if p == nil || *p == 0 {
		return "free"
	}
	return p.String()
}

type modelsPrice struct {
	Model            string `arg:"" help:"Id of the model; it needn't be there yet."`
	CentsPer1kTokens *Cents `name:"cents-per-1k-tokens" required:"" placeholder:"X" help:"Price of 1,000 tokens in cents, with up to 6 decimals, for prompt and reply alike; 0 makes the model free."`
	Tenant           string `placeholder:"TENANT" help:"Only for this tenant, named by slug or id; without it, for every tenant that has no price of its own."`
	AdminOptions
	Output
}

// Help shows examples.
func (modelsPrice) Help() string {
	return "Budgets and usage are counted at the price that a request began with.\n\nExamples:\n\n" +
		"    ownllm models price llama-3.3-70b --cents-per-1k-tokens 0.25\n" +
		"    ownllm models price llama-3.3-70b --cents-per-1k-tokens 0.2 --tenant acme"
}

// Run sets the price.
func (c *modelsPrice) Run(ctx context.Context, env *Environment) error {
	return one(env, c.AdminOptions, c.Output, func(api *adminapi.Client) (adminapi.Price, error) {
		return api.SetPrice(ctx, adminapi.SetPrice{Model: c.Model, Tenant: c.Tenant, CentsPer1kTokens: (*adminapi.Cents)(c.CentsPer1kTokens)})
	}, priceTable)
}

type modelsPrices struct {
	Tenant string `placeholder:"TENANT" help:"Only those that hold for this tenant, named by slug or id."`
	AdminOptions
	Output
}

// Help shows examples.
func (modelsPrices) Help() string {
	return "A tenant's own price goes before that of every tenant.\n\nExamples:\n\n" +
		"    ownllm models prices\n    ownllm models prices --tenant acme --json"
}

// Run lists the prices.
func (c *modelsPrices) Run(ctx context.Context, env *Environment) error {
	return many(env, c.AdminOptions, c.Output, func(api *adminapi.Client) ([]adminapi.Price, error) {
		return api.Prices(ctx, c.Tenant)
	}, priceTable)
}

func priceTable(w io.Writer, prices ...adminapi.Price) error {
	rows := make([][]string, len(prices))
	for i, p := range prices {
		rows[i] = []string{p.Model, cmp.Or(p.TenantSlug, string(p.Tenant), "every tenant"), price(&p.CentsPer1kTokens), date(&p.UpdatedAt, "")}
	}
	return table(w, []string{"MODEL", "FOR", "CENTS/1K TOKENS", "SET"}, rows)
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
