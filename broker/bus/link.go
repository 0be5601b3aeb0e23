package bus

import (
	"context"
	"errors"
	"log/slog"
	"sync"

	"github.com/nats-io/nats.go"
)

// link says in the log how a connection fares. What lasts is said once: a server that
// refuses a connection does it at every attempt.
type link struct {
	log *slog.Logger

	mu      sync.Mutex
	renewed bool // the loss was wanted: the connection comes back with other permissions
	refused bool // the server has refused it since it was last there
}

func (l *link) options() []nats.Option {
	return []nats.Option{
		nats.ConnectHandler(l.connected),
		nats.DisconnectErrHandler(l.lost),
		nats.ReconnectHandler(l.connected),
		nats.ErrorHandler(l.failed),
	}
}

// lost hears that the connection is gone. The client library names no error if that was
// its user's wish.
func (l *link) lost(nc *nats.Conn, err error) {
	if nc.IsClosed() {
		return
	}
	l.mu.Lock()
	l.renewed = err == nil
	l.mu.Unlock()
	if err != nil {
		l.log.Warn("bus connection lost", "error", err)
	}
}

func (l *link) connected(nc *nats.Conn) {
	l.mu.Lock()
	level := slog.LevelInfo
	if l.renewed {
		level = slog.LevelDebug
	}
	l.renewed, l.refused = false, false
	l.mu.Unlock()
	if nc.Stats().Reconnects > 0 {
		l.log.Log(context.Background(), level, "bus connection is back", "server", nc.ConnectedUrlRedacted())
	}
}

func (l *link) failed(_ *nats.Conn, sub *nats.Subscription, err error) {
	if errors.Is(err, nats.ErrAuthorization) {
		l.mu.Lock()
		again := l.refused
		l.refused = true
		l.mu.Unlock()
		if !again {
			l.log.Warn("the bus refuses this connection, which is tried again and again", "error", err)
		}
		return
	}
	subject := ""
	if sub != nil {
		subject = sub.Subject
	}
	l.log.Error("bus error", "subject", subject, "error", err)
}
