package command

import "github.com/alecthomas/kong"

// cli is the whole command line.
type cli struct {
	Up           upCommand           `cmd:"" group:"serve" help:"Run everything in one process."`
	Edge         edgeCommand         `cmd:"" group:"serve" help:"Serve the HTTP API."`
	Broker       brokerCommand       `cmd:"" group:"serve" help:"Make the queues and answer the workers."`
	Worker       workerCommand       `cmd:"" group:"serve" help:"Serve the models of this machine."`
	NATSConfig   natsConfigCommand   `cmd:"" name:"nats-config" group:"serve" help:"Print the configuration of a nats-server for edges, brokers and workers."`
	Migrate      migrateCommand      `cmd:"" group:"serve" help:"Bring the schema in Postgres up to date."`
	DatabaseRole databaseRoleCommand `cmd:"" name:"database-role" group:"serve" help:"Print the SQL of a role for edges and brokers that can't touch the schema."`
	Demo         demoCommand         `cmd:"" group:"serve" help:"Serve the demo model by itself, for load tests and fault tests."`

	Status  statusCommand  `cmd:"" group:"look" help:"Show whether the edge, its agents and their models are up."`
	Agents  agentsCommand  `cmd:"" group:"look" help:"List the GPU machines."`
	Models  modelsCommand  `cmd:"" group:"look" help:"List the models that the agents have, and set their prices."`
	Usage   usageCommand   `cmd:"" group:"look" help:"Show what was used, and what it costs."`
	Bench   benchCommand   `cmd:"" group:"look" help:"Load test an OpenAI-compatible API."`
	Tenants tenantsCommand `cmd:"" group:"admin" help:"Create, list, change, suspend and resume tenants."`
	Users   usersCommand   `cmd:"" group:"admin" help:"Create, list, deactivate and activate users."`
	Keys    keysCommand    `cmd:"" group:"admin" help:"Create, list, change, rotate and revoke API keys."`
	Audit   auditCommand   `cmd:"" group:"admin" help:"List who has changed what."`
	Version versionCommand `cmd:"" help:"Show the version of this program."`
}

// groups are the headings of the list of commands.
var groups = []kong.Group{
	{Key: "serve", Title: "Serve:"},
	{Key: "look", Title: "Look:"},
	{Key: "admin", Title: "Administer:"},
}
