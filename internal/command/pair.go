package command

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"

	"github.com/ownllm/ownllm/broker/credential"
	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/internal/secret"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker"
	"github.com/ownllm/ownllm/worker/machine"
)

// PairOptions say how a machine becomes an agent, and where its server is.
type PairOptions struct {
	Pair      secret.String `placeholder:"KEY" help:"Pairing key, ownllm_pair_…, which makes this machine an agent; needed once. Others on this machine may see it as a flag: rather give it by the environment or --pair-file."`
	PairFile  string        `placeholder:"FILE" help:"File with the pairing key, - for standard input."`
	Server    string        `placeholder:"URL" help:"Address of the edge, https://ownllm.example.com say; needed for pairing, and known from then on."`
	MachineID string        `name:"machine-id" placeholder:"TEXT" help:"By what this machine is known, if not by its own id: for a second worker on it, or a copy of another machine. Only its hash is told."`
}

func (o PairOptions) check(p *problems) {
	if o.Pair != "" {
		if _, err := credential.ParsePairing(o.Pair.Reveal()); err != nil && o.PairFile == "" {
			p.add("--pair: the pairing key is invalid: %w", err)
		}
	}
	if o.PairFile != "-" {
		exists(p, "--pair-file", o.PairFile)
	}
	if o.Server != "" {
		if _, err := adminapi.NewClient(o.Server, ""); err != nil {
			p.add("--server: %w", err)
		}
	} else if o.Pair != "" || o.PairFile != "" {
		p.add("--pair needs --server: the address of the edge, https://ownllm.example.com say")
	}
}

// key is the pairing key; the zero Secret if none is given.
func (o PairOptions) key(env *Environment) (credential.Secret, error) {
	text := o.Pair
	if o.PairFile != "" {
		var err error
		if text, err = env.secret("", o.PairFile); err != nil {
			return credential.Secret{}, err
		}
	}
	if text == "" {
		return credential.Secret{}, nil
	}
	key, err := credential.ParsePairing(text.Reveal())
	if err != nil {
		return credential.Secret{}, usageError{fmt.Errorf("the pairing key is invalid: %w", err)}
	}
	return key, nil
}

// AgentOptions say what machines are told that become agents.
type AgentOptions struct {
	AgentNATSURL string `name:"agent-nats-url" placeholder:"URL" help:"Address of NATS that machines are told when they are paired, tls://nats.example.com:4222 or wss://nats.example.com say; without it they take the host of their --server."`
}

func (o AgentOptions) check(p *problems) {
	u, err := url.Parse(o.AgentNATSURL)
	if o.AgentNATSURL != "" && (err != nil || u.Host == "" || u.User != nil || u.Scheme != "nats" && u.Scheme != "tls" && u.Scheme != "ws" && u.Scheme != "wss") {
		p.add("--agent-nats-url: the address doesn't look like tls://host:4222 or wss://host") // it may hold a password
	}
}

// identity is who this machine is: as it was paired now, or, without a pairing key or with
// the one that it was paired with, before.
func (o PairOptions) identity(ctx context.Context, env *Environment, dir string, log *slog.Logger) (identity, error) {
	key, err := o.key(env)
	if err != nil {
		return identity{}, err
	}
	path := filepath.Join(dir, pairedFile)
	id, err := readIdentity(path)
	switch {
	case key.IsZero() && errors.Is(err, errNotPaired):
		return identity{}, usageError{err}
	case key.IsZero():
		// as before
	case err == nil && id.Pairing == spent(key):
		log.Info("the pairing key has done its work, this machine is paired", "agent", id.Agent)
	default:
		if id, err = o.pair(ctx, dir, key); err != nil {
			return identity{}, err
		}
		if err := id.write(path); err != nil {
			return identity{}, fmt.Errorf("paired as %s, but that can't be kept: %w. Remove that agent, and pair this machine again", id.Agent, err)
		}
		log.Info("this machine is paired", "agent", id.Agent, "tenant", id.Tenant)
		return id, nil
	}
	if err == nil {
		id.Server = cmp.Or(o.Server, id.Server)
	}
	return id, err
}

// pairedFile is the identity of a machine that was paired. `ownllm up` has another, so that
// both can be in the same data dir.
const pairedFile = "worker.json"

// spent is how a pairing key is known again that has done its work.
func spent(key credential.Secret) string {
	sum := sha256.Sum256([]byte("spent\x00" + key.Reveal()))
	return hex.EncodeToString(sum[:8])
}

// pair makes an agent of this machine.
func (o PairOptions) pair(ctx context.Context, dir string, key credential.Secret) (identity, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return identity{}, fmt.Errorf("--data-dir: %w", err)
	}
	hash, err := machine.ID(o.MachineID, dir)
	if err != nil {
		return identity{}, err
	}
	facts := machine.Look(ctx)
	client, err := adminapi.NewClient(o.Server, "")
	if err != nil {
		return identity{}, usageError{fmt.Errorf("--server: %w", err)}
	}
	defer client.Close()
	a, err := client.PairAgent(ctx, adminapi.PairAgent{
		PairingKey: key.Reveal(), MachineIDHash: hex.EncodeToString(hash[:]), Name: hostName(),
		VRAMMB: facts.VRAMMB, RAMMB: facts.RAMMB, CPUCores: facts.CPUCores, GPU: facts.GPU, OS: facts.OS,
	})
	var away *adminapi.UnreachableError
	var refused *schemas.Error
	switch {
	case errors.As(err, &away):
		return identity{}, unreachableError{fmt.Errorf("can't reach the server at %s: %w", o.Server, away.Err)}
	case errors.As(err, &refused):
		// Not as such: what the admin commands say of a wrong token doesn't help here.
		text := refused.Message
		if refused.Param == "machine_id_hash" {
			text += " A second worker on it, or a copy of it, needs a --machine-id of its own."
		}
		return identity{}, fmt.Errorf("this machine wasn't paired: %s (%s)", text, refused.Code)
	case err != nil:
		return identity{}, err
	}
	return identity{
		Agent: a.Agent, Tenant: a.Tenant, Credential: a.Credential, NATSURL: a.NATSURL, Server: o.Server, Pairing: spent(key),
	}, nil
}

// portOf is the port of an address; empty if it has none.
func portOf(address string) string {
	u, err := url.Parse(address)
	if err != nil {
		return ""
	}
	return u.Port()
}

// usualNATSPort is where NATS listens if nobody says otherwise.
const usualNATSPort = "4222"

// natsURL is where the bus is as far as the identity tells; empty if it doesn't: what the
// server said, or else its host at the usual port. A server that is spoken to by TLS gives
// no reason to do without on the bus.
func (id identity) natsURL() string {
	if id.NATSURL != "" || id.Server == "" {
		return id.NATSURL
	}
	u, err := url.Parse(id.Server)
	if err != nil || u.Hostname() == "" {
		return ""
	}
	scheme := "nats"
	if u.Scheme == "https" {
		scheme = "tls"
	}
	return scheme + "://" + net.JoinHostPort(u.Hostname(), usualNATSPort)
}

// aside is a worker's way to its server beside the bus.
type aside struct{ client *adminapi.Client }

// newAside returns the way of an agent, which is to be closed; nil if its server isn't
// known.
func newAside(id identity) (*aside, error) {
	if id.Server == "" {
		return nil, nil
	}
	client, err := adminapi.NewClient(id.Server, secret.String(id.Credential))
	if err != nil {
		return nil, usageError{fmt.Errorf("--server: %w", err)}
	}
	return &aside{client}, nil
}

// Beat implements worker.Aside.
func (a *aside) Beat(ctx context.Context, hb schemas.Heartbeat) error {
	_, err := a.client.Heartbeat(ctx, hb)
	return err
}

func (a *aside) close() {
	if a != nil {
		a.client.Close()
	}
}

// or is the way as a worker takes it, which knows none by nil.
func (a *aside) or() worker.Aside {
	if a == nil {
		return nil
	}
	return a
}
