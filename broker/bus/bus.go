// Package bus connects the parts of OwnLLM to NATS and holds the queues of jobs and of
// usage reports.
//
// A connection reconnects for ever and never buffers what is published while it is
// down: a token or a heartbeat that arrives late is worse than one that is missing,
// since sequence numbers and the next beat repair the loss.
package bus

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/nats-io/nats.go"
)

// Config says where the bus is and who connects.
type Config struct {
	// URL is one or several addresses, comma-separated.
	URL string
	// Name is shown in the server's list of connections.
	Name string
	// User is one of the system users, or the id of an agent. Password is the shared
	// secret of edges and brokers, or the credential of the agent.
	User, Password string
	// InboxPrefix begins the reply subjects, if it is set: an agent has its own.
	InboxPrefix string
	// CAFile, CertFile and KeyFile are for TLS; empty ones are not used.
	CAFile, CertFile, KeyFile string
	// Patient says that the first connect is tried again and again, too, in the background.
	Patient bool
	// InProcess, if set, connects to an embedded server without the network.
	InProcess nats.InProcessConnProvider
}

// The system users: the accounts that edges and brokers connect to. Each has everything
// there, and the same password.
const (
	// UserCore has JetStream.
	UserCore = "core"
	// UserAgents talks to workers.
	UserAgents = "agents"
	// UserIngress talks to publishers.
	UserIngress = "ingress"
	// UserSystem hears of connections, and closes them.
	UserSystem = "sys"
)

// As returns the configuration of another connection, of a user and with a name.
func (c Config) As(user, name string) Config {
	c.User, c.Name = user, name
	return c
}

// The same timing as the server's: a black-holed link is noticed on both sides
// within about three seconds.
const (
	pingInterval = time.Second
	maxPingsOut  = 2
)

// A connection that was lost comes back after 100 to 200 ms. One that doesn't get through
// again and again is tried less often, so that a bus or a database that comes up isn't
// overrun.
const (
	reconnectWait   = 100 * time.Millisecond
	reconnectSpread = 100 * time.Millisecond
	reconnectMost   = time.Second
	// eagerTries is how often it is tried before the wait grows.
	eagerTries = 30
)

func reconnectDelay(tries int) time.Duration {
	wait := reconnectWait * time.Duration(1+max(0, tries-eagerTries))
	return min(wait, reconnectMost) + rand.N(reconnectSpread) //nolint:gosec // only to spread them
}

// Connect opens a connection. The first connect may fail at once, with an error that
// wraps ErrUnavailable, unless cfg.Patient is set; later losses are repaired in the background.
func Connect(cfg Config, log *slog.Logger, options ...nats.Option) (*nats.Conn, error) {
	log = log.With("connection", cfg.Name)
	opts := []nats.Option{
		nats.Name(cfg.Name),
		nats.MaxReconnects(-1),
		nats.CustomReconnectDelay(reconnectDelay),
		// Whether somebody is let in takes a database, which may be away for a while.
		nats.IgnoreAuthErrorAbort(),
		nats.ReconnectBufSize(-1),
		nats.PingInterval(pingInterval),
		nats.MaxPingsOutstanding(maxPingsOut),
		nats.DisconnectErrHandler(func(nc *nats.Conn, err error) {
			if !nc.IsClosed() {
				log.Warn("bus connection lost", "error", err)
			}
		}),
		nats.ReconnectHandler(func(nc *nats.Conn) {
			log.Info("bus connection is back", "server", nc.ConnectedUrlRedacted())
		}),
		nats.ErrorHandler(func(_ *nats.Conn, sub *nats.Subscription, err error) {
			subject := ""
			if sub != nil {
				subject = sub.Subject
			}
			log.Error("bus error", "subject", subject, "error", err)
		}),
	}
	if cfg.Patient {
		opts = append(opts, nats.RetryOnFailedConnect(true))
	}
	if cfg.InProcess != nil {
		opts = append(opts, nats.InProcessServer(cfg.InProcess))
	}
	if cfg.User != "" {
		opts = append(opts, nats.UserInfo(cfg.User, cfg.Password))
	}
	if cfg.InboxPrefix != "" {
		opts = append(opts, nats.CustomInboxPrefix(cfg.InboxPrefix))
	}
	if cfg.CAFile != "" {
		opts = append(opts, nats.RootCAs(cfg.CAFile))
	}
	if cfg.CertFile != "" {
		opts = append(opts, nats.ClientCert(cfg.CertFile, cfg.KeyFile))
	}
	nc, err := nats.Connect(cfg.URL, append(opts, options...)...)
	if err != nil {
		return nil, fmt.Errorf("%w: connect to NATS at %s: %w", ErrUnavailable, redact(cfg.URL), err)
	}
	return nc, nil
}

// ErrUnavailable says that NATS can't be reached.
var ErrUnavailable = errors.New("message bus unavailable")

// Down reports whether err means that the bus can't be reached right now, so that
// trying again later may help.
func Down(err error) bool {
	return errors.Is(err, ErrUnavailable) ||
		errors.Is(err, nats.ErrConnectionClosed) ||
		errors.Is(err, nats.ErrConnectionReconnecting) ||
		errors.Is(err, nats.ErrDisconnected) ||
		errors.Is(err, nats.ErrReconnectBufExceeded) ||
		errors.Is(err, nats.ErrNoResponders) ||
		errors.Is(err, nats.ErrTimeout) ||
		errors.Is(err, context.DeadlineExceeded)
}
