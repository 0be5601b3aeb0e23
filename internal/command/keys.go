package command

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/schemas"
)

// keysCommand is `ownllm keys`.
type keysCommand struct {
	Create keysCreate `cmd:"" help:"Create an API key and show it, this once."`
	List   keysList   `cmd:"" help:"List the keys, without their secrets."`
	Set    keysSet    `cmd:"" help:"Change the name, scopes or limits of a key."`
	Rotate keysRotate `cmd:"" help:"Give a key a new secret and show it, this once."`
	Revoke keysRevoke `cmd:"" help:"Revoke a key for good: it stops working within a second."`
}

// Help shows examples.
func (keysCommand) Help() string {
	return "A key belongs to one user of one tenant.\n\nExamples:\n\n    ownllm keys create --tenant acme --user ada@example.com\n" +
		"    ownllm keys set key_01KAMPZ6V9J3M8R5T2W7X4Y0QB --budget-cents 500"
}

type keysCreate struct {
	Tenant      string   `required:"" placeholder:"TENANT" help:"Slug or id of the tenant."`
	User        string   `required:"" placeholder:"USER" help:"Email or id of the user."`
	Name        string   `placeholder:"NAME" help:"What the key is for, to tell it from others."`
	Scope       []string `sep:"none" placeholder:"SCOPE" help:"What the key opens: model:ID, or model:* for every model, which is the default. May be repeated."`
	BudgetCents Budget   `placeholder:"N" help:"What the key may spend in a calendar month (UTC), in cents; without it there is no bound."`
	Concurrency *int     `placeholder:"N" help:"Requests of the key that may be in flight at once; without it 32."`
	TTL         *Span    `name:"ttl" placeholder:"DURATION" help:"Lifetime of the key, 24h or 90d say; without it the key doesn't expire."`
	AdminOptions
	Output
}

// Help shows examples.
func (keysCreate) Help() string {
	return "The key is shown once: only its hash is stored.\n\nExamples:\n\n" +
		"    ownllm keys create --tenant acme --user ada@example.com --name laptop --budget-cents 500\n" +
		"    ownllm keys create --tenant acme --user ada@example.com --scope model:llama-3.3-70b --ttl 24h\n" +
		"    ownllm keys create --tenant acme --user ada@example.com --json | jq -r .key"
}

// Validate checks the flags.
func (c *keysCreate) Validate() error {
	var p problems
	if c.TTL != nil && c.TTL.seconds() < 1 {
		p.add("--ttl: %s is shorter than a second", time.Duration(*c.TTL))
	}
	checkScopes(&p, c.Scope)
	return p.err()
}

func checkScopes(p *problems, scopes []string) {
	for _, scope := range scopes {
		if model, ok := strings.CutPrefix(scope, "model:"); !ok || model == "" {
			p.add("--scope: %q is neither model:ID nor model:*", scope)
		}
	}
}

// Run creates the key.
func (c *keysCreate) Run(ctx context.Context, env *Environment) error {
	in := adminapi.CreateKey{
		Tenant: c.Tenant, User: c.User, Name: c.Name, Scopes: c.Scope,
		BudgetCents: c.BudgetCents.Cents, Concurrency: c.Concurrency,
	}
	if c.TTL != nil {
		in.TTLSeconds = c.TTL.seconds()
	}
	return one(env, c.AdminOptions, c.Output, func(api *adminapi.Client) (adminapi.CreatedKey, error) {
		return api.CreateKey(ctx, in)
	}, showCreatedKey)
}

func showCreatedKey(w io.Writer, keys ...adminapi.CreatedKey) error {
	for _, k := range keys {
		out := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		for _, row := range [][2]string{
			{"key", k.Secret},
			{"id", string(k.ID)},
			{"name", k.Name},
			{"tenant", cmp.Or(k.TenantSlug, string(k.Tenant))},
			{"user", cmp.Or(k.Email, string(k.User))},
			{"scopes", strings.Join(k.Scopes, ", ")},
			{"budget", budget(k.BudgetCents, " cents a month")},
			{"in flight", strconv.Itoa(k.Concurrency) + " requests at most"},
			{"expires", date(k.ExpiresAt, "never")},
		} {
			fmt.Fprintf(out, "%s\t%s\n", row[0], cmp.Or(clean(row[1], false), "-"))
		}
		if err := out.Flush(); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintln(w, "\nStore the key now: it can't be shown again.")
	return err
}

// budget is a budget for people.
func budget(cents *int64, unit string) string {
	if cents == nil {
		return "no limit"
	}
	return strconv.FormatInt(*cents, 10) + unit
}

type keysSet struct {
	ID          schemas.KeyID `arg:"" help:"Id of the key, key_…; see ownllm keys list."`
	Name        *string       `placeholder:"NAME" help:"What the key is for, to tell it from others."`
	Scope       []string      `sep:"none" placeholder:"SCOPE" help:"What the key opens from now on, and nothing else: model:ID, or model:* for every model. May be repeated."`
	BudgetCents Budget        `placeholder:"N" help:"What the key may spend in a calendar month (UTC), in cents; none takes the bound away."`
	Concurrency *int          `placeholder:"N" help:"Requests of the key that may be in flight at once."`
	AdminOptions
	Output
}

// Help shows examples.
func (keysSet) Help() string {
	return "What isn't given stays. New scopes and limits hold within a second, for requests that begin then.\n\nExamples:\n\n" +
		"    ownllm keys set key_01KAMPZ6V9J3M8R5T2W7X4Y0QB --budget-cents 1000 --concurrency 8\n" +
		"    ownllm keys set key_01KAMPZ6V9J3M8R5T2W7X4Y0QB --scope model:llama-3.3-70b --budget-cents none"
}

// Validate checks the id, the flags, and that there is something to do.
func (c *keysSet) Validate() error {
	var p problems
	if err := checkKeyID(c.ID); err != nil {
		p.add("%w", err)
	}
	checkScopes(&p, c.Scope)
	if c.Name == nil && c.Scope == nil && !c.BudgetCents.Given && c.Concurrency == nil {
		p.add("nothing to change: give --name, --scope, --budget-cents or --concurrency")
	}
	return p.err()
}

// Run changes the key.
func (c *keysSet) Run(ctx context.Context, env *Environment) error {
	return one(env, c.AdminOptions, c.Output, func(api *adminapi.Client) (adminapi.Key, error) {
		return api.ChangeKey(ctx, c.ID, adminapi.ChangeKey{
			Name: c.Name, Scopes: c.Scope, BudgetCents: adminapi.Budget(c.BudgetCents), Concurrency: c.Concurrency,
		})
	}, keyTable)
}

type keysRotate struct {
	ID      schemas.KeyID `arg:"" help:"Id of the key, key_…; see ownllm keys list."`
	Overlap Span          `placeholder:"DURATION" help:"How long the old secret goes on working, 24h or 7d say; without it, it stops at once."`
	AdminOptions
	Output
}

// Help shows examples.
func (keysRotate) Help() string {
	return "Id, scopes, limits and what was spent stay. The new secret is shown once: only its hash is stored.\n\nExamples:\n\n" +
		"    ownllm keys rotate key_01KAMPZ6V9J3M8R5T2W7X4Y0QB --overlap 24h\n" +
		"    ownllm keys rotate key_01KAMPZ6V9J3M8R5T2W7X4Y0QB --json | jq -r .key"
}

// Validate checks the id.
func (c *keysRotate) Validate() error { return checkKeyID(c.ID) }

// Run rotates the key.
func (c *keysRotate) Run(ctx context.Context, env *Environment) error {
	return one(env, c.AdminOptions, c.Output, func(api *adminapi.Client) (adminapi.CreatedKey, error) {
		return api.RotateKey(ctx, c.ID, adminapi.RotateKey{OverlapSeconds: c.Overlap.seconds()})
	}, func(w io.Writer, keys ...adminapi.CreatedKey) error {
		if err := showCreatedKey(w, keys...); err != nil {
			return err
		}
		old := "The old one has stopped working."
		if c.Overlap.seconds() > 0 {
			old = "The old one works for another " + c.Overlap.String() + "."
		}
		_, err := fmt.Fprintln(w, old)
		return err
	})
}

// checkKeyID checks the id of a key, for which the key itself may have been given.
func checkKeyID(id schemas.KeyID) error {
	if strings.HasPrefix(string(id), "sk-") {
		return errors.New("that is the key itself; its id begins with key_, see ownllm keys list")
	}
	return checkID(string(id), "key_")
}

type keysList struct {
	Tenant string `placeholder:"TENANT" help:"Only those of this tenant, named by slug or id."`
	User   string `placeholder:"USER" help:"Only those of this user, named by email or id."`
	AdminOptions
	Output
}

// Help shows examples.
func (keysList) Help() string {
	return "Examples:\n\n    ownllm keys list\n    ownllm keys list --tenant acme --user ada@example.com --json"
}

// Run lists the keys.
func (c *keysList) Run(ctx context.Context, env *Environment) error {
	return many(env, c.AdminOptions, c.Output, func(api *adminapi.Client) ([]adminapi.Key, error) {
		return api.Keys(ctx, c.Tenant, c.User)
	}, keyTable)
}

type keysRevoke struct {
	ID schemas.KeyID `arg:"" help:"Id of the key, key_…; see ownllm keys list."`
	AdminOptions
	Output
}

// Help shows examples.
func (keysRevoke) Help() string {
	return "Requests with the key get 401 key_invalid from then on. There is no way back.\n\n" +
		"Example:\n\n    ownllm keys revoke key_01KAMPZ6V9J3M8R5T2W7X4Y0QB"
}

// Validate checks the id.
func (c *keysRevoke) Validate() error { return checkKeyID(c.ID) }

// Run revokes the key.
func (c *keysRevoke) Run(ctx context.Context, env *Environment) error {
	return one(env, c.AdminOptions, c.Output, func(api *adminapi.Client) (adminapi.Key, error) {
		return api.RevokeKey(ctx, c.ID)
	}, keyTable)
}

func keyTable(w io.Writer, keys ...adminapi.Key) error {
	rows := make([][]string, len(keys))
	for i, k := range keys {
		rows[i] = []string{
			k.Prefix + "…", string(k.ID), k.Name, cmp.Or(k.TenantSlug, string(k.Tenant)), cmp.Or(k.Email, string(k.User)),
			k.State, strings.Join(k.Scopes, ", "), budget(k.BudgetCents, ""), strconv.Itoa(k.Concurrency), date(k.ExpiresAt, "never"),
		}
	}
	return table(w, []string{"KEY", "ID", "NAME", "TENANT", "USER", "STATE", "SCOPES", "CENTS/MONTH", "CONCURRENCY", "EXPIRES"}, rows)
}
