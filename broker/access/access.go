// Package access decides what whoever connects to NATS may do there, and makes a
// nats-server enforce it.
//
// There are three accounts, which see nothing of each other but what is said here.
// Account Core has JetStream, and only edges and brokers are in it. Account Agents is
// where workers are; edges and brokers have connections there too, by which they talk to
// them. Account System is the server's own.
//
// The server answers to whatever reply subject a request names, with no look at the
// permissions of who asked. So all that workers need of JetStream, to pull from their own
// consumers, to acknowledge, and to report usage, is imported into Agents from Core: an
// answer comes out in Agents, where no stream listens. One export serves all imports,
// since the server lets no message through the same export twice: so no answer finds its
// way back. What an answer can reach are the subscriptions of edges and brokers in Agents,
// and these take nothing whose reply subject is outside the inbox of the agent that its
// subject names: see schemas.AnswersTo.
//
// PermissionsFor is the one place where permissions come from. The embedded server calls
// Authenticate directly; an external one asks a Callout, and is configured by
// ServerConfig.
package access

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"time"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/credential"
	"github.com/ownllm/ownllm/schemas"
)

// The accounts.
const (
	AccountCore   = "CORE"
	AccountAgents = "AGENTS"
	AccountSystem = "SYS"
)

// systemAccounts are the accounts of the system users, which may do everything there.
var systemAccounts = map[string]string{
	bus.UserCore:   AccountCore,
	bus.UserAgents: AccountAgents,
	bus.UserSystem: AccountSystem,
}

// Agent is an agent as its credential makes it known.
type Agent struct {
	ID     schemas.AgentID
	Tenant schemas.TenantID
	// Models are those that it has last offered: it may pull their jobs.
	Models []string
}

// Principal is whoever connects: a system user, if User is set, else an agent.
type Principal struct {
	User  string
	Agent Agent
}

// Grant is what somebody may do.
type Grant struct {
	// Account is where, by its name.
	Account string
	// All says that there are no bounds within the account. Else Publish and Subscribe are
	// the subjects, which may hold wildcards, and there are the answers to requests.
	All                bool
	Publish, Subscribe []string
}

// An agent may answer each request that it gets so many times, within AnswerWithin. That
// is how it answers the questions on its control subject.
const (
	Answers      = 1
	AnswerWithin = 10 * time.Second
)

// PermissionsFor returns what a principal may do. That of an unknown system user is
// nothing, in no account.
func PermissionsFor(p Principal) Grant {
	if p.User != "" {
		account := systemAccounts[p.User]
		return Grant{Account: account, All: account != ""}
	}
	a := p.Agent
	id := schemas.EncodeToken(string(a.ID))
	g := Grant{
		Account: AccountAgents,
		Publish: []string{
			schemas.Prefix + "out." + id + ".>",
			schemas.Prefix + "body." + id + ".>",
			schemas.HeartbeatSubject(a.Tenant, a.ID),
			schemas.HelloSubject(a.Tenant, a.ID),
			schemas.UsageSubject(a.Tenant, a.ID),
		},
		Subscribe: []string{
			schemas.ControlSubject(a.ID),
			schemas.AgentInboxPrefix(a.ID) + ".>",
		},
	}
	for _, model := range a.Models {
		consumer := bus.ConsumerName(a.ID, model)
		g.Publish = append(g.Publish,
			nextPrefix+schemas.JobStream+"."+consumer,
			ackPrefix+schemas.JobStream+"."+consumer+".>",
			// The other format of acknowledgements: domain and account come first.
			ackPrefix+"*.*."+schemas.JobStream+"."+consumer+".>",
		)
	}
	return g
}

// What workers use of JetStream.
const (
	nextPrefix = "$JS.API.CONSUMER.MSG.NEXT."
	ackPrefix  = "$JS.ACK."
)

// imports are the subjects of Core that can be published to in Agents.
var imports = []string{
	nextPrefix + schemas.JobStream + ".*",
	ackPrefix + schemas.JobStream + ".>",
	ackPrefix + "*.*." + schemas.JobStream + ".>",
	schemas.UsageSubjects,
}

// Agents knows who holds a credential.
type Agents interface {
	// Agent returns the agent whose credential has the SHA-256, or an error that wraps
	// ErrDenied if there is none.
	Agent(ctx context.Context, hash credential.Hash) (Agent, error)
}

// ErrDenied says that a user's password is wrong.
var ErrDenied = errors.New("access denied")

// Authenticate returns what the user may do who shows the password. The token is the
// password of the system users; an agent's name is its id, and its password its
// credential. The error wraps ErrDenied, unless nobody knows.
func Authenticate(ctx context.Context, agents Agents, token, user, password string) (Grant, error) {
	if systemAccounts[user] != "" {
		want, got := sha256.Sum256([]byte(token)), sha256.Sum256([]byte(password))
		if token == "" || subtle.ConstantTimeCompare(want[:], got[:]) != 1 {
			return Grant{}, fmt.Errorf("system user %s: %w", user, ErrDenied)
		}
		return PermissionsFor(Principal{User: user}), nil
	}
	secret, err := credential.ParseAgent(password)
	if err != nil || agents == nil {
		return Grant{}, fmt.Errorf("unknown user: %w", ErrDenied)
	}
	agent, err := agents.Agent(ctx, secret.Hash())
	switch {
	case err != nil:
		return Grant{}, fmt.Errorf("agent %s: %w", user, err)
	case string(agent.ID) != user:
		return Grant{}, fmt.Errorf("agent %s shows the credential of another: %w", user, ErrDenied)
	}
	return PermissionsFor(Principal{Agent: agent}), nil
}
