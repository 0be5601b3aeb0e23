package command

import (
	"fmt"

	"github.com/ownllm/ownllm/broker/access"
)

// natsConfigCommand is `ownllm nats-config`.
type natsConfigCommand struct {
	TokenOptions
	SyncAlways bool `help:"JetStream flushes to the disk before it acknowledges, so that a power failure takes no job. On a single server each write waits for its own flush."`
}

// Help shows examples.
func (natsConfigCommand) Help() string {
	return `Prints the configuration of a nats-server: the accounts, and that ` + "`ownllm broker`" + ` lets
agents and publishers in. The output holds the secret. Addresses, TLS, the folder of JetStream and the
other servers of a cluster are for you to add, by flags or in a file that includes this
one. Give routes and gateways an authorization of their own: without one, whoever reaches
their port is a server of the cluster. For workers that come by WebSocket add a websocket
block.

Examples:

    export OWNLLM_NATS_TOKEN=…
    ownllm nats-config >ownllm.conf
    nats-server -c ownllm.conf -js -sd /var/lib/nats`
}

// Run prints the configuration.
func (c *natsConfigCommand) Run(env *Environment) error {
	token, err := c.token(env)
	if err != nil {
		return err
	}
	text, err := access.ServerConfig(token.Reveal(), c.SyncAlways)
	if err != nil {
		return err
	}
	_, err = fmt.Fprint(env.Stdout, text)
	return err
}
