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

	"github.com/ownllm/ownllm/broker/credential"
	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/schemas"
)

// agentsCommand is `ownllm agents`.
type agentsCommand struct {
	Pair   agentsPair   `cmd:"" help:"Make a pairing key and show it, this once."`
	List   agentsList   `cmd:"" help:"List the agents, reachable or not."`
	Remove agentsRemove `cmd:"" help:"Remove an agent for good: it is cut off within a second."`
}

// Help shows examples.
func (agentsCommand) Help() string {
	return "An agent is a GPU machine that runs a worker. A pairing key makes a machine one.\n\nExamples:\n\n" +
		"    ownllm agents pair --tenant acme\n    ownllm agents list\n    ownllm agents remove agt_01KAMPZ6V9J3M8R5T2W7X4Y0QB"
}

type agentsPair struct {
	Tenant string `required:"" placeholder:"TENANT" help:"Slug or id of the tenant that the machine is to serve."`
	TTL    Span   `name:"ttl" default:"168h" placeholder:"DURATION" help:"Lifetime of the pairing key, 1h or 7d say. Default: 168h."`
	AdminOptions
	Output
}

// Help shows examples.
func (agentsPair) Help() string {
	return "The pairing key is shown once: only its hash is stored. It pairs one machine.\n\nExamples:\n\n" +
		"    ownllm agents pair --tenant acme\n    ownllm agents pair --tenant acme --ttl 1h --json | jq -r .pairing_key"
}

// Validate checks the flags.
func (c *agentsPair) Validate() error {
	if c.TTL.seconds() < 1 {
		return fmt.Errorf("--ttl: %s is shorter than a second", time.Duration(c.TTL))
	}
	return nil
}

// Run makes the pairing key.
func (c *agentsPair) Run(ctx context.Context, env *Environment) error {
	return one(env, c.AdminOptions, c.Output, func(api *adminapi.Client) (adminapi.Pairing, error) {
		return api.CreatePairing(ctx, adminapi.CreatePairing{Tenant: c.Tenant, TTLSeconds: c.TTL.seconds()})
	}, showPairing)
}

func showPairing(w io.Writer, pairings ...adminapi.Pairing) error {
	for _, p := range pairings {
		out := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		fmt.Fprintf(out, "pairing key\t%s\n", clean(p.Secret, false))
		fmt.Fprintf(out, "tenant\t%s\n", clean(cmp.Or(p.TenantSlug, string(p.Tenant)), false))
		fmt.Fprintf(out, "expires\t%s\n", date(&p.ExpiresAt, ""))
		if err := out.Flush(); err != nil {
			return err
		}
	}
	_, err := fmt.Fprint(w, "\nIt can't be shown again. On the GPU machine, with the address of this server:\n\n"+
		"    ownllm worker --pair "+credential.BeginPairing+"… --server https://…\n")
	return err
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

type agentsRemove struct {
	ID schemas.AgentID `arg:"" help:"Id of the agent, agt_…; see ownllm agents list."`
	AdminOptions
	Output
}

// Help shows examples.
func (agentsRemove) Help() string {
	return "Its credential is dead at once, and its machine can be paired anew.\n\nExample:\n\n    ownllm agents remove agt_01KAMPZ6V9J3M8R5T2W7X4Y0QB"
}

// Validate checks the id, for which a secret may have been given.
func (c *agentsRemove) Validate() error {
	if id := string(c.ID); strings.HasPrefix(id, credential.BeginAgent) || strings.HasPrefix(id, credential.BeginPairing) {
		return errors.New("that is a secret; the id of an agent begins with agt_, see ownllm agents list")
	}
	return checkID(string(c.ID), "agt_")
}

// Run removes the agent.
func (c *agentsRemove) Run(ctx context.Context, env *Environment) error {
	return one(env, c.AdminOptions, c.Output, func(api *adminapi.Client) (adminapi.Agent, error) {
		return api.RemoveAgent(ctx, c.ID)
	}, func(w io.Writer, agents ...adminapi.Agent) error {
		for _, a := range agents {
			fmt.Fprintf(w, "Agent %s is removed.\n", clean(strings.TrimSpace(string(a.ID)+" "+a.Name), false))
		}
		return nil
	})
}

func agentTable(w io.Writer, agents ...adminapi.Agent) error {
	rows := make([][]string, len(agents))
	for i, a := range agents {
		gpu := ""
		if a.Machine != nil {
			gpu = a.Machine.GPU
		}
		rows[i] = []string{
			cmp.Or(a.Name, string(a.ID)), string(a.ID), cmp.Or(a.TenantSlug, string(a.Tenant)), a.State,
			strconv.Itoa(a.Running) + "/" + strconv.Itoa(a.Slots), strconv.Itoa(a.Waiting),
			strconv.Itoa(len(a.Models)), ago(a.LastSeen), gpu,
		}
	}
	return table(w, []string{"AGENT", "ID", "TENANT", "STATE", "RUNNING", "WAITING", "MODELS", "SEEN", "GPU"}, rows)
}
