// Package access decides what whoever connects to NATS may do there, and makes a
// nats-server enforce it.
//
// There are four accounts, which see nothing of each other but what is said here.
// Account Core has JetStream, and only edges and brokers are in it. Account Agents is
// where workers are; edges and brokers have connections there too, by which they talk to
// them. Account Ingress is where publishers are, who hold an API key; brokers have
// connections there too, and nothing leads from it anywhere else. Account System is the
// server's own.
//
// The server answers to whatever reply subject a request names, with no look at the
// permissions of who asked. So all that workers need of JetStream, to pull from their own
// consumers, to acknowledge, and to report usage, is imported into Agents from Core: an
// answer comes out in Agents, where no stream listens. One export serves all imports,
// since the server lets no message through the same export twice: so no answer finds its
// way back. What an answer can reach are the subscriptions of edges and brokers in Agents,
// and these take nothing whose reply subject is outside the inbox of the agent that its
// subject names: see schemas.AnswersTo. For publishers that is schemas.PublisherAnswersTo,
// and there is nothing else in Ingress that answers: no stream, no import.
//
// What the server says of a connection, its account and its user, is what it was let in
// as, and nothing that the client says of itself: by that it is found and closed when it
// may not be there any more, see Sweep.
//
// PermissionsFor is the one place where permissions come from. The embedded server calls
// Authenticate directly; an external one asks a Callout, and is configured by
// ServerConfig.
package access

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/credential"
	"github.com/ownllm/ownllm/schemas"
)

// The accounts.
const (
	AccountCore    = "CORE"
	AccountAgents  = "AGENTS"
	AccountIngress = "INGRESS"
	AccountSystem  = "SYS"
)

// systemAccounts are the accounts of the system users, which may do everything there.
var systemAccounts = map[string]string{
	bus.UserCore:    AccountCore,
	bus.UserAgents:  AccountAgents,
	bus.UserIngress: AccountIngress,
	bus.UserSystem:  AccountSystem,
}

// Agent is an agent as its credential makes it known.
type Agent struct {
	ID     schemas.AgentID
	Tenant schemas.TenantID
	// Models are those that it has last offered: it may pull their jobs.
	Models []string
}

// Publisher is a client with an API key, as the key makes it known.
type Publisher struct {
	Key schemas.KeyID
	// Secret is which of the key's secrets was shown.
	Secret apikey.Hash
	// Remaining is how much longer the secret is valid; 0: it has no end.
	Remaining time.Duration
}

// Principal is whoever connects: a system user, if User is set, a publisher, if it has a
// key, else an agent.
type Principal struct {
	User      string
	Publisher Publisher
	Agent     Agent
}

// Grant is what somebody may do.
type Grant struct {
	// Account is where, by its name.
	Account string
	// User is the name under which the server knows the connection.
	User string
	// All says that there are no bounds within the account. Else Publish and Subscribe are
	// the subjects, which may hold wildcards.
	All                bool
	Publish, Subscribe []string
	// Answer says that it may answer requests, besides.
	Answer bool
	// Remaining is for how long; 0: for ever.
	Remaining time.Duration
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
	switch {
	case p.User != "":
		account := systemAccounts[p.User]
		return Grant{Account: account, User: p.User, All: account != ""}
	case p.Publisher.Key != "":
		return p.Publisher.grant()
	}
	return p.Agent.grant()
}

func (p Publisher) grant() Grant {
	// Who doesn't know the id of its key yet asks for it under its fingerprint.
	stranger := schemas.KeyID(p.Secret.Fingerprint())
	return Grant{
		Account: AccountIngress,
		User:    publisherUser(p.Key, p.Secret),
		Publish: []string{
			schemas.Prefix + "in." + schemas.EncodeToken(string(p.Key)) + ".>",
			schemas.InSubject(stranger, schemas.OperationWhoami),
		},
		Subscribe: []string{
			schemas.PublisherInboxPrefix(p.Key) + ".>",
			schemas.PublisherInboxPrefix(stranger) + ".>",
			schemas.ResultWildcard(p.Key),
		},
		Remaining: p.Remaining,
	}
}

// publisherUser is <key>.<fingerprint of the secret>: so it shows with which of a key's
// secrets a connection was opened.
func publisherUser(k schemas.KeyID, secret apikey.Hash) string {
	return string(k) + "." + secret.Fingerprint()
}

// ParsePublisherUser returns the key and the secret that Grant.User of a publisher names,
// and false for other users.
func ParsePublisherUser(user string) (schemas.KeyID, apikey.Hash, bool) {
	key, fingerprint, _ := strings.Cut(user, ".")
	secret, err := apikey.ParseFingerprint(fingerprint)
	return schemas.KeyID(key), secret, key != "" && err == nil
}

func (a Agent) grant() Grant {
	id := schemas.EncodeToken(string(a.ID))
	g := Grant{
		Account: AccountAgents,
		User:    string(a.ID),
		Answer:  true,
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
	stream := schemas.JobStream(a.ID)
	for _, model := range a.Models {
		consumer := stream + "." + bus.ConsumerName(a.ID, model)
		g.Publish = append(g.Publish,
			nextPrefix+consumer,
			ackPrefix+consumer+".>",
			// The other format of acknowledgements: domain and account come first.
			ackPrefix+"*.*."+consumer+".>",
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
func imports() []string {
	list := []string{schemas.UsageSubjects}
	for stream := range schemas.JobStreams() {
		list = append(list, nextPrefix+stream+".*", ackPrefix+stream+".>", ackPrefix+"*.*."+stream+".>")
	}
	return list
}

// Directory knows who holds a credential.
type Directory interface {
	// Agent returns the agent whose credential has the SHA-256, or an error that wraps
	// ErrDenied if there is none.
	Agent(ctx context.Context, hash credential.Hash) (Agent, error)
	// Publisher returns who holds the API key whose secret has the SHA-256, or an error that
	// wraps ErrDenied if there is none, or if it isn't valid now.
	Publisher(ctx context.Context, hash apikey.Hash) (Publisher, error)
}

// ErrDenied says that what somebody shows opens nothing.
var ErrDenied = errors.New("access denied")

// Login is what a client shows when it connects.
type Login struct{ User, Password, Token string }

// Name is who the client says it is, for the log. It is empty if that might be a secret.
func (l Login) Name() string {
	if systemAccounts[l.User] != "" || strings.HasPrefix(l.User, "agt_") {
		return l.User
	}
	return ""
}

// Authenticate returns what the client may do. The shared token of edges and brokers is the
// password of the system users; an agent's user is its id, and its password its credential;
// a publisher shows its API key as its token, or as its password with any user. The error
// wraps ErrDenied, unless nobody knows.
func Authenticate(ctx context.Context, d Directory, token string, l Login) (Grant, error) {
	if systemAccounts[l.User] != "" {
		want, got := sha256.Sum256([]byte(token)), sha256.Sum256([]byte(l.Password))
		if token == "" || subtle.ConstantTimeCompare(want[:], got[:]) != 1 {
			return Grant{}, fmt.Errorf("system user %s: %w", l.User, ErrDenied)
		}
		return PermissionsFor(Principal{User: l.User}), nil
	}
	if d == nil {
		return Grant{}, fmt.Errorf("unknown user: %w", ErrDenied)
	}
	if key, err := apikey.FromSecret(cmp.Or(l.Token, l.Password)); err == nil {
		publisher, err := d.Publisher(ctx, key.Hash())
		if err != nil {
			return Grant{}, fmt.Errorf("publisher with the key %s: %w", key, err)
		}
		return PermissionsFor(Principal{Publisher: publisher}), nil
	}
	secret, err := credential.ParseAgent(l.Password)
	if err != nil {
		return Grant{}, fmt.Errorf("unknown user: %w", ErrDenied)
	}
	agent, err := d.Agent(ctx, secret.Hash())
	switch {
	case err != nil:
		return Grant{}, fmt.Errorf("agent %s: %w", l.Name(), err)
	case string(agent.ID) != l.User:
		return Grant{}, fmt.Errorf("agent %s shows the credential of another: %w", l.Name(), ErrDenied)
	}
	return PermissionsFor(Principal{Agent: agent}), nil
}
