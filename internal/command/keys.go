package command

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
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
	Revoke keysRevoke `cmd:"" help:"Revoke a key for good: it stops working within a second."`
}

// Help shows examples.
func (keysCommand) Help() string {
	return "A key belongs to one user of one tenant.\n\nExample:\n\n    ownllm keys create --tenant acme --user ada@example.com"
}

type keysCreate struct {
	Tenant string        `required:"" placeholder:"TENANT" help:"Slug or id of the tenant."`
	User   string        `required:"" placeholder:"USER" help:"Email or id of the user."`
	Name   string        `placeholder:"NAME" help:"What the key is for, to tell it from others."`
	Scope  []string      `placeholder:"SCOPE" help:"What the key opens: model:ID, or model:* for every model, which is the default. May be repeated."`
	TTL    time.Duration `name:"ttl" placeholder:"DURATION" help:"Lifetime of the key, 24h say; without it the key doesn't expire."`
	AdminOptions
	Output
}

// Help shows examples.
func (keysCreate) Help() string {
	return "The key is shown once: only its hash is stored.\n\nExamples:\n\n" +
		"    ownllm keys create --tenant acme --user ada@example.com --name laptop\n" +
		"    ownllm keys create --tenant acme --user ada@example.com --scope model:llama-3.3-70b --ttl 24h\n" +
		"    ownllm keys create --tenant acme --user ada@example.com --json | jq -r .key"
}

// Validate checks the flags.
func (c *keysCreate) Validate() error {
	var p problems
	if c.TTL < 0 || c.TTL > 0 && c.TTL < time.Second {
		p.add("--ttl: %s is shorter than a second", c.TTL)
	}
	for _, scope := range c.Scope {
		if model, ok := strings.CutPrefix(scope, "model:"); !ok || model == "" {
			p.add("--scope: %q is neither model:ID nor model:*", scope)
		}
	}
	return p.err()
}

// Run creates the key.
func (c *keysCreate) Run(ctx context.Context, env *Environment) error {
	return one(env, c.AdminOptions, c.Output, func(api *adminapi.Client) (adminapi.CreatedKey, error) {
		return api.CreateKey(ctx, adminapi.CreateKey{
			Tenant: c.Tenant, User: c.User, Name: c.Name, Scopes: c.Scope,
			TTLSeconds: int64(c.TTL / time.Second),
		})
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
func (c *keysRevoke) Validate() error {
	if strings.HasPrefix(string(c.ID), "sk-") {
		return errors.New("that is the key itself; its id begins with key_, see ownllm keys list")
	}
	return checkID(string(c.ID), "key_")
}

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
			k.State, strings.Join(k.Scopes, ", "), date(k.ExpiresAt, "never"),
		}
	}
	return table(w, []string{"KEY", "ID", "NAME", "TENANT", "USER", "STATE", "SCOPES", "EXPIRES"}, rows)
}
