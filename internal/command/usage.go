package command

import (
	"cmp"
	"context"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/schemas"
)

// usageCommand is `ownllm usage`.
type usageCommand struct {
	Tenant string        `placeholder:"TENANT" help:"Only that of this tenant, named by slug or id."`
	User   string        `placeholder:"USER" help:"Only that of this user, named by id or, together with --tenant, by email."`
	Key    schemas.KeyID `placeholder:"ID" help:"Only that of this key, named by its id, key_…; see ownllm keys list."`
	Model  string        `placeholder:"MODEL" help:"Only that of this model."`
	Since  Moment        `placeholder:"TIME" help:"Only requests that ended since then: 2026-11-01, 2026-11-01T18:00:00Z, or 24h or 7d for so long ago."`
	Until  Moment        `placeholder:"TIME" help:"Only requests that ended before then."`
	By     []string      `default:"tenant,key,model" placeholder:"NAMES" help:"What to sum up by, with commas: tenant, user, key, model, day. Default: tenant,key,model."`
	CSV    bool          `name:"csv" help:"Print CSV, for spreadsheets."`
	AdminOptions
	Output
}

// Help shows examples.
func (usageCommand) Help() string {
	return "Every request that was admitted is counted once, with the tokens that it used at the price that it began with. " +
		"Days and dates are in UTC.\n\nExamples:\n\n" +
		"    ownllm usage --since 2026-11-01 --until 2026-12-01\n" +
		"    ownllm usage --tenant acme --since 7d --by user,day\n" +
		"    ownllm usage --by tenant,user,key,model,day --csv > usage.csv\n" +
		"    ownllm usage --json | jq .total.cost_cents"
}

// Validate checks the flags.
func (c *usageCommand) Validate() error {
	var p problems
	if err := checkKeyID(c.Key); err != nil {
		p.add("--key: %w", err)
	}
	if len(c.By) == 0 {
		p.add("--by: name something to sum up by")
	}
	dimensions := []string{adminapi.ByTenant, adminapi.ByUser, adminapi.ByKey, adminapi.ByModel, adminapi.ByDay}
	for i, name := range c.By {
		if !slices.Contains(dimensions, name) {
			p.add("--by: %q is none of %s", name, strings.Join(dimensions, ", "))
		} else if slices.Contains(c.By[:i], name) {
			p.add("--by: %s comes twice", name)
		}
	}
	since, until := time.Time(c.Since), time.Time(c.Until)
	if !until.IsZero() && until.Before(since) {
		p.add("--until: %s lies before --since, %s", date(&until, ""), date(&since, ""))
	}
	if c.CSV && c.JSON {
		p.add("--csv and --json exclude each other")
	}
	return p.err()
}

// Run sums up the usage.
func (c *usageCommand) Run(ctx context.Context, env *Environment) error {
	api, err := c.client(env)
	if err != nil {
		return err
	}
	defer api.Close()
	rows, err := api.Usage(ctx, adminapi.UsageFilter{
		Tenant: c.Tenant, User: c.User, Key: string(c.Key), Model: c.Model,
		Since: time.Time(c.Since), Until: time.Time(c.Until), By: c.By,
	})
	if err != nil {
		return err
	}
	if c.CSV {
		return adminapi.WriteUsageCSV(env.Stdout, c.By, rows)
	}
	report := usageReport{rows, total(rows)}
	return c.print(env, report, func(w io.Writer) error { return report.table(w, c.By) })
}

// usageReport is what `ownllm usage --json` prints.
type usageReport struct {
	Data  []adminapi.Usage `json:"data"`
	Total adminapi.Usage   `json:"total"`
}

func total(rows []adminapi.Usage) (sum adminapi.Usage) {
	for _, u := range rows {
		sum.Requests = plus(sum.Requests, u.Requests)
		sum.PromptTokens = plus(sum.PromptTokens, u.PromptTokens)
		sum.CompletionTokens = plus(sum.CompletionTokens, u.CompletionTokens)
		sum.CostCents = plus(sum.CostCents, u.CostCents)
	}
	return sum
}

// plus adds what isn't negative; a sum that is too large is the largest that there is,
// as in the books.
func plus[N ~int64](a, b N) N {
	if a > math.MaxInt64-b {
		return math.MaxInt64
	}
	return a + b
}

// usageHeadings are the columns of each dimension.
var usageHeadings = map[string][]string{
	adminapi.ByTenant: {"TENANT"}, adminapi.ByUser: {"USER"}, adminapi.ByKey: {"KEY", "NAME"},
	adminapi.ByModel: {"MODEL"}, adminapi.ByDay: {"DAY"},
}

func usageCells(dimension string, u adminapi.Usage) []string {
	switch dimension {
	case adminapi.ByTenant:
		return []string{cmp.Or(u.TenantSlug, string(u.Tenant))}
	case adminapi.ByUser:
		return []string{cmp.Or(u.Email, string(u.User))}
	case adminapi.ByKey:
		if u.KeyPrefix == "" {
			return []string{string(u.Key), u.KeyName}
		}
		return []string{u.KeyPrefix + "…", u.KeyName}
	case adminapi.ByModel:
		return []string{u.Model}
	}
	return []string{u.Day}
}

func (r usageReport) table(w io.Writer, by []string) error {
	decimals := r.Total.CostCents.Decimals()
	for _, u := range r.Data {
		decimals = max(decimals, u.CostCents.Decimals()) // so that the points are aligned
	}
	numbers := func(u adminapi.Usage) []string {
		return []string{
			strconv.FormatInt(u.Requests, 10), strconv.FormatInt(u.PromptTokens, 10),
			strconv.FormatInt(u.CompletionTokens, 10), u.CostCents.Fixed(decimals),
		}
	}
	var heading []string
	for _, dimension := range by {
		heading = append(heading, usageHeadings[dimension]...)
	}
	left := len(heading)
	rows := make([][]string, len(r.Data))
	for i, u := range r.Data {
		for _, dimension := range by {
			rows[i] = append(rows[i], usageCells(dimension, u)...)
		}
		rows[i] = append(rows[i], numbers(u)...)
	}
	last := make([]string, left)
	last[0] = "TOTAL"
	return grid(w, left, append(heading, "REQUESTS", "PROMPT TOKENS", "COMPLETION TOKENS", "COST IN CENTS"), rows, append(last, numbers(r.Total)...))
}
