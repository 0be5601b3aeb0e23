package command

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/access"
	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/credential"
	"github.com/ownllm/ownllm/broker/keyring"
	"github.com/ownllm/ownllm/broker/metric"
	"github.com/ownllm/ownllm/broker/trace"
	"github.com/ownllm/ownllm/internal/secret"
	"github.com/ownllm/ownllm/internal/telemetry"
	"github.com/ownllm/ownllm/schemas"
)

// address is how to connect to NATS, but for who connects.
func (o NATSOptions) address() bus.Config {
	return bus.Config{URL: o.NATSURL.Reveal(), CAFile: o.NATSTLSCA, CertFile: o.NATSTLSCert, KeyFile: o.NATSTLSKey}
}

// config is how to connect to NATS as any of the system users.
func (o BusOptions) config(env *Environment) (bus.Config, error) {
	token, err := o.token(env)
	cfg := o.address()
	cfg.Password = token.Reveal()
	return cfg, err
}

// conns are connections to NATS that belong together.
type conns []*nats.Conn

// connect opens a connection for each configuration.
func connect(log *slog.Logger, each ...bus.Config) (conns, error) {
	var c conns
	for _, cfg := range each {
		nc, err := bus.Connect(cfg, log)
		if err != nil {
			c.close()
			return nil, unreachableError{err}
		}
		c = append(c, nc)
	}
	return c, nil
}

func (c conns) close() {
	for _, nc := range c {
		nc.Close()
	}
}

// identities gives access what the books know of agents and of keys.
type identities struct{ store *books.Store }

// Agent implements access.Directory.
func (i identities) Agent(ctx context.Context, hash credential.Hash) (access.Agent, error) {
	id, err := i.store.LookupAgent(ctx, hash)
	var a books.Agent
	if err == nil {
		a, err = i.store.GetAgent(ctx, id.Agent)
	}
	if err != nil {
		return access.Agent{}, denied(err)
	}
	agent := access.Agent{ID: a.ID, Tenant: a.Tenant}
	for _, m := range a.Inventory.Models {
		agent.Models = append(agent.Models, m.ID)
	}
	return agent, nil
}

// Publisher implements access.Directory. It asks the books, whose answer is as new as can
// be, and not what is in memory: a connection lasts.
func (i identities) Publisher(ctx context.Context, hash apikey.Hash) (access.Publisher, error) {
	id, err := i.store.LookupKey(ctx, hash)
	if err == nil {
		err = keyring.Judge(id)
	}
	if err != nil {
		return access.Publisher{}, denied(err)
	}
	p := access.Publisher{Key: id.Key, Secret: hash}
	if id.ExpiresAt != nil {
		p.Remaining = id.ExpiresAt.Sub(id.AsOf)
	}
	return p, nil
}

// denied marks an error of the books that says that somebody isn't known, or not valid.
func denied(err error) error {
	var refused *schemas.Error
	if errors.As(err, &refused) && refused.Code != schemas.CodeInternalError {
		return fmt.Errorf("%w: %w", access.ErrDenied, err)
	}
	return err
}

// openBooks opens the books at an address, and brings their schema up to date.
func openBooks(ctx context.Context, url string, conns int) (*books.Store, error) {
	store, err := books.Open(ctx, books.Config{URL: url, MaxConns: conns})
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

const (
	// flushWait bounds the export of what is left at the end, and reportWait that of reports.
	flushWait  = 3 * time.Second
	reportWait = 2 * time.Second
)

func (t *tele) stop(log *slog.Logger) {
	ctx, cancel := context.WithTimeout(context.Background(), flushWait)
	defer cancel()
	if err := t.Shutdown(ctx); err != nil {
		log.Warn("telemetry not flushed", "error", err)
	}
}

// ReportOptions say where errors are reported.
type ReportOptions struct {
	SentryDSNFile string `name:"sentry-dsn-file" placeholder:"FILE" help:"File with the DSN of Sentry, - for standard input; or give the DSN itself in $$SENTRY_DSN. Without one errors are only logged."`
}

// dsn is the address of Sentry, empty without one.
func (o ReportOptions) dsn(env *Environment) (secret.String, error) {
	dsn, err := env.secret("SENTRY_DSN", o.SentryDSNFile)
	if err == nil && dsn != "" {
		if err = telemetry.CheckDSN(dsn.Reveal()); err != nil {
			err = usageError{fmt.Errorf("$SENTRY_DSN or --sentry-dsn-file: %w", err)}
		}
	}
	return dsn, err
}

// wrong is what is wrong with the DSN, as far as that can be seen before the role starts.
func (o ReportOptions) wrong(env *Environment) error {
	if o.SentryDSNFile == "-" {
		return nil // it can be read only once
	}
	_, err := o.dsn(env)
	return err
}

// reporting returns a logger whose errors are reported, too, if there is where to, and how to
// end that.
func (o ReportOptions) reporting(env *Environment, role string, log *slog.Logger) (*slog.Logger, func(), error) {
	dsn, err := o.dsn(env)
	if err != nil || dsn == "" {
		return log, func() {}, err
	}
	r, err := telemetry.StartReporter(telemetry.ReporterConfig{DSN: dsn.Reveal(), Role: role, Release: Version(), Log: log})
	if err != nil {
		return nil, nil, err
	}
	return r.Logger(log), func() {
		ctx, cancel := context.WithTimeout(context.Background(), reportWait)
		defer cancel()
		if err := r.Close(ctx); err != nil {
			log.Warn("errors not reported", "error", err)
		}
	}, nil
}
