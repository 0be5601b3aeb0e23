package command

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/ingress"
	"github.com/ownllm/ownllm/broker/natsd"
	"github.com/ownllm/ownllm/edge"
	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/internal/postgres"
	"github.com/ownllm/ownllm/internal/secret"
)

// upCommand is `ownllm up`.
type upCommand struct {
	ConfigOptions
	DataOptions
	ListenOptions
	NATSListen    string `name:"nats-listen" default:"127.0.0.1:4222" placeholder:"ADDR" help:"Address of NATS, for workers on other machines; another free port if it is taken. Default: 127.0.0.1:4222."`
	NATSWebSocket string `name:"nats-websocket" placeholder:"ADDR" help:"Address of NATS for workers that come by WebSocket, ws://, as through an HTTP proxy or a tunnel. Without it there is none."`
	AgentOptions
	BackendOptions
	DatabaseOptions
	HTTPOptions
	DeadlineOptions
	OpenOptions
	LimitOptions
	QueueOptions
	ConnectionOptions
	SubmissionOptions
	AdminTokenFile string `placeholder:"FILE" help:"File with the admin token, - for standard input; or give the token itself in $$OWNLLM_ADMIN_TOKEN. Without either one is made on the first run."`
	LogOptions
	ReportOptions
}

// Help shows examples.
func (upCommand) Help() string {
	return `Runs everything in one process: NATS, a private PostgreSQL, the edge, the broker and a
worker. The first run makes a tenant, a user and a key.

Examples:

    ownllm up
    ownllm up --backend http://127.0.0.1:11434
    ownllm up --data-dir /srv/ownllm --listen :9191 --database-url postgres://…`
}

// amiss reports what is wrong with a secret, which has no flag.
func (c *upCommand) amiss(env *Environment) error { return c.wrong(env) }

// Validate reports all problems of the flags at once.
func (c *upCommand) Validate() error {
	var p problems
	c.ListenOptions.check(&p)
	address(&p, "--nats-listen", c.NATSListen)
	if c.NATSWebSocket != "" {
		address(&p, "--nats-websocket", c.NATSWebSocket)
	}
	c.AgentOptions.check(&p)
	c.BackendOptions.check(&p)
	c.DatabaseOptions.check(&p, false)
	c.HTTPOptions.check(&p)
	c.DeadlineOptions.check(&p)
	c.OpenOptions.check(&p)
	c.LimitOptions.check(&p)
	c.QueueOptions.check(&p)
	c.ConnectionOptions.check(&p)
	c.SubmissionOptions.check(&p)
	return p.err()
}

// Run serves until ctx ends.
func (c *upCommand) Run(ctx context.Context, env *Environment) (err error) {
	log, err := c.logger(env)
	if err != nil {
		return err
	}
	log, flush, err := c.reporting(env, "ownllm", log)
	if err != nil {
		return err
	}
	defer flush()
	dir, err := c.dir(env)
	if err != nil {
		return err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("--data-dir: %w", err)
	}
	secrets, err := c.secrets(env, dir)
	if err != nil {
		return err
	}
	tel, err := startTelemetry(ctx, "ownllm", log)
	if err != nil {
		return err
	}
	defer tel.stop(log)

	var parts []part
	databaseURL := c.DatabaseURL.Reveal()
	if databaseURL == "" {
		pg, err := postgres.Start(ctx, postgres.Config{DataDir: filepath.Join(dir, "postgres"), Log: log.With("component", "postgres")})
		if err != nil {
			return unreachableError{err}
		}
		defer func() { err = errors.Join(err, pg.Stop(context.WithoutCancel(ctx))) }()
		databaseURL = pg.URL()
		parts = append(parts, part{"postgres", func(ctx context.Context) error {
			select {
			case <-ctx.Done():
				return nil
			case <-pg.Done():
				return errors.New("the server has stopped by itself")
			}
		}})
	}
	store, err := openBooks(ctx, databaseURL, c.DatabaseConns)
	if err != nil {
		return err
	}
	defer store.Close()
	turnstile := c.ConnectionOptions.turnstile(store, log)
	nats, err := natsd.Start(ctx, natsd.Config{
		Listen: c.NATSListen, WebSocket: c.NATSWebSocket, StoreDir: filepath.Join(dir, "nats"),
		Token: secrets.nats.Reveal(), Directory: turnstile, Log: log,
	})
	if err != nil {
		return err
	}
	defer nats.Stop()
	natsConfig := bus.Config{URL: nats.URL(), Password: secrets.nats.Reveal(), InProcess: nats}
	tenant, _, _, err := store.EnsureFirst(ctx, secrets.key)
	if err != nil {
		return unavailable(err)
	}
	owner, err := newOwner(ctx, natsConfig, "ownllm-edge", store, tel, c.DeadlineOptions, c.OpenOptions, log)
	if err != nil {
		return err
	}
	defer owner.close()
	door := newEdge(owner, store, tel, frontOptions{
		http: c.HTTPOptions, deadlines: c.DeadlineOptions, limits: c.LimitOptions, adminToken: secrets.admin,
		agentNATSURL: c.AgentNATSURL, natsPort: portOf(nats.URL()),
	}, log)
	scheduler, line, err := newScheduler(owner, natsConfig, store, tel, c.SubmissionOptions, c.DrainTimeout, log)
	if err != nil {
		return err
	}
	defer line.close()
	side, err := newIngress(owner, natsConfig, tel, scheduler, ingress.Config{BodyLimit: int(c.BodyLimit), Drain: c.DrainTimeout}, log)
	if err != nil {
		return err
	}
	defer side.close()
	office, err := newBackOffice(ctx, natsConfig, c.QueueOptions, store, owner, turnstile, log)
	if err != nil {
		return err
	}
	defer office.conns.close()
	own, err := ownIdentity(ctx, dir, store, tenant.ID)
	if err != nil {
		return err
	}
	backends, demoParts, err := c.BackendOptions.open(ctx, env, log)
	if err != nil {
		return err
	}
	w, leave, err := newWorker(natsConfig, own, nil, backends, c.DrainTimeout, tel, log)
	if err != nil {
		return err
	}
	defer leave()
	api, ops, err := c.ListenOptions.open()
	if err != nil {
		return err
	}
	scheme := "http"
	if c.TLSCert != "" {
		scheme = "https"
	}
	base := scheme + "://" + reachable(api.Addr())
	ready := adminapi.Ready{
		PID: os.Getpid(), BaseURL: base + "/v1", APIKey: secrets.key.Reveal(),
		AdminURL: base + "/api/v1", AdminToken: secrets.admin.Reveal(),
		OpsURL: "http://" + reachable(ops.Addr()), NATSURL: nats.URL(), DatabaseURL: databaseURL,
	}
	parts = append(parts, demoParts...)
	parts = append(parts, office.parts...)
	parts = append(parts, owner.parts()...)
	parts = append(parts,
		part{"worker", w.Run},
		opsPart(ops, tel, door),
		together(part{"submissions", scheduler.Run}, part{"ingress", side.Run}, serveHTTP(door, api)),
		part{"announcement", func(ctx context.Context) error { return announce(ctx, env, owner, door, ready, dir, string(tenant.ID)) }},
	)
	return ended(log, runParts(ctx, parts...))
}

// upSecrets are what `up` keeps in its data dir from one run to the next.
type upSecrets struct {
	admin, nats secret.String
	key         apikey.Key
}

func (c *upCommand) secrets(env *Environment, dir string) (s upSecrets, err error) {
	if s.admin, err = env.secret("OWNLLM_ADMIN_TOKEN", c.AdminTokenFile); err != nil {
		return s, err
	}
	if s.admin == "" {
		if s.admin, err = secretFile(dir, "admin.token", "ownllm_admin_"); err != nil {
			return s, err
		}
	}
	if s.nats, err = secretFile(dir, "nats.token", ""); err != nil {
		return s, err
	}
	path := filepath.Join(dir, "first.key")
	b, err := os.ReadFile(path)
	switch {
	case err == nil:
		s.key, err = apikey.FromSecret(strings.TrimSpace(string(b)))
	case os.IsNotExist(err):
		s.key = apikey.New()
		err = writeFile(path, s.key.Reveal())
	}
	return s, err
}

const (
	// learnWait is how long the announcement waits until there is something to announce.
	learnWait = 10 * time.Second
	lookEvery = 50 * time.Millisecond
)

// announce says that everything is up, once it is, and takes that back at the end.
func announce(ctx context.Context, env *Environment, w *owner, door *edge.Edge, ready adminapi.Ready, dir, tenant string) (err error) {
	give := time.NewTimer(learnWait)
	defer give.Stop()
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	for waiting := true; waiting; {
		select {
		case <-ctx.Done():
			return nil
		case <-give.C:
			waiting = false // no backend answers; `ownllm status` tells which
		case <-look.C:
			ready.Models = w.models(tenant)
			waiting = !door.Readiness(ctx).Ready || len(ready.Models) == 0
		}
	}
	if err := ready.Write(dir); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ready.Remove(dir)) }()
	printReady(env, ready)
	<-ctx.Done()
	return nil
}

func printReady(env *Environment, r adminapi.Ready) {
	model, models := "demo", "none yet: no inference server answers, see `ownllm status`"
	if len(r.Models) > 0 {
		model, models = r.Models[0], strings.Join(r.Models, ", ")
	}
	fmt.Fprintf(env.Stdout, `OwnLLM is up.

  base URL  %s
  API key   %s
  models    %s

Try it:

  curl %s/chat/completions \
    -H "Authorization: Bearer %s" -H "Content-Type: application/json" \
    -d '{"model":"%s","messages":[{"role":"user","content":"Hello!"}],"stream":true}'

`, r.BaseURL, r.APIKey, models, r.BaseURL, r.APIKey, model)
}

// reachable is an address under which this machine reaches itself.
func reachable(addr net.Addr) string {
	host, port, err := net.SplitHostPort(addr.String())
	if err != nil {
		return addr.String()
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, port)
}
