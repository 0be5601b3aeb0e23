package command

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/metric"
	"github.com/ownllm/ownllm/broker/trace"
	"github.com/ownllm/ownllm/internal/telemetry"
)

// config is how to connect to NATS.
func (o NATSOptions) config(env *Environment) (bus.Config, error) {
	token, err := o.token(env)
	if err != nil {
		return bus.Config{}, err
	}
	return bus.Config{
		URL: o.NATSURL.Reveal(), Token: token.Reveal(), CredentialsFile: o.NATSCreds,
		CAFile: o.NATSTLSCA, CertFile: o.NATSTLSCert, KeyFile: o.NATSTLSKey,
	}, nil
}

// connect opens the two connections of a role: one for tokens, one for large bodies.
func connect(cfg bus.Config, role string, log *slog.Logger) (tokens, bulk *nats.Conn, err error) {
	cfg.Name = "ownllm-" + role
	if tokens, err = bus.Connect(cfg, log); err != nil {
		return nil, nil, unreachableError{err}
	}
	cfg.Name += "-bulk"
	if bulk, err = bus.Connect(cfg, log); err != nil {
		tokens.Close()
		return nil, nil, unreachableError{err}
	}
	return tokens, bulk, nil
}

// openBooks opens the books at an address, and brings their schema up to date.
func openBooks(ctx context.Context, url string) (*books.Store, error) {
	store, err := books.Open(ctx, books.Config{URL: url})
	if err != nil {
		return nil, unavailable(err)
	}
	if err := store.Migrate(ctx); err != nil {
		store.Close()
		return nil, unavailable(err)
	}
	return store, nil
}

// unavailable marks the error of a database that isn't there.
func unavailable(err error) error {
	if errors.Is(err, books.ErrUnavailable) {
		return unreachableError{err}
	}
	return err
}

// tele is the telemetry of a process, and the instruments that its parts share.
type tele struct {
	*telemetry.Telemetry
	metrics *metric.Instruments
	tracer  *trace.Tracer
}

func startTelemetry(ctx context.Context, service string, log *slog.Logger) (*tele, error) {
	t, err := telemetry.Start(ctx, telemetry.Config{Service: service, Version: Version(), Log: log})
	if err != nil {
		return nil, err
	}
	m, err := metric.New(t.MeterProvider())
	if err != nil {
		return nil, errors.Join(err, t.Shutdown(ctx))
	}
	return &tele{t, m, trace.New(t.TracerProvider())}, nil
}

// flushWait bounds the export of what is left at the end.
const flushWait = 3 * time.Second

func (t *tele) stop(log *slog.Logger) {
	ctx, cancel := context.WithTimeout(context.Background(), flushWait)
	defer cancel()
	if err := t.Shutdown(ctx); err != nil {
		log.Warn("telemetry not flushed", "error", err)
	}
}
