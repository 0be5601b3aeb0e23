// Package edge is the HTTP front door: it authenticates and validates requests, hands
// them to the dispatcher, and streams the replies back as server-sent events.
//
// It is the only package that imports Fiber, and no Fiber value leaves a handler:
// Fiber reuses its memory for the next request on the connection, which may be
// another tenant's, so everything is copied into an owned request at the door.
//
// The status line is held until the backend's first chunk or error, so that a client
// gets a real 4xx or 5xx, which its SDK can retry. A client that goes away is noticed
// by watching its socket, whether the request is queued or streaming.
package edge

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gofiber/fiber/v2"
	"github.com/gofiber/fiber/v2/middleware/cors"
	"github.com/gofiber/fiber/v2/middleware/recover"
	"github.com/valyala/fasthttp"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/desk"
	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/broker/keyring"
	"github.com/ownllm/ownllm/broker/metric"
	"github.com/ownllm/ownllm/broker/presence"
	"github.com/ownllm/ownllm/broker/quota"
	"github.com/ownllm/ownllm/broker/roster"
	"github.com/ownllm/ownllm/broker/trace"
)

// Config says how the edge faces its clients.
type Config struct {
	// CertFile and KeyFile turn TLS on.
	CertFile, KeyFile string
	// TrustedProxies are the networks whose X-Forwarded-For is believed.
	TrustedProxies []netip.Prefix
	// BaseDomain, if set, makes <slug>.<BaseDomain> the address of the tenant <slug>.
	BaseDomain string
	// CORSOrigins are the origins whose pages may call the API; "*" is all of them.
	CORSOrigins []string
	// BodyLimit bounds a request body, in bytes.
	BodyLimit int
	// HeaderTimeout bounds how long a client may take to send the headers of a request, and
	// how long a connection may be silent at first; 0 stands for 20 s.
	HeaderTimeout time.Duration
	// FailureRate and FailureBurst bound the bad requests of one address: how many it
	// may make each second, and how many at once.
	FailureRate  float64
	FailureBurst int
	// AgentNATSURL is the address of NATS that machines are told when they are paired. If it
	// is empty, that is the host by which they called the edge, with NATSPort; if that is
	// empty too, they have to know.
	AgentNATSURL, NATSPort string
	// AdminToken opens the admin API. Without one, the API is closed.
	AdminToken string
	// DrainDelay is how long the edge still serves new requests once it is to stop, and says
	// already that it isn't ready: a load balancer needs a moment to see that. Each reply
	// closes its connection then, so that none is left on which a request could come while
	// it is being closed.
	DrainDelay time.Duration
	// Drain bounds how long running replies may take to finish once the edge stops.
	Drain time.Duration
	// Version is what the admin API says of the build.
	Version string
}

// Parts are what the edge works with.
type Parts struct {
	Keys       *keyring.Keyring
	Agents     *presence.Table
	Feed       *presence.Feed
	Dispatcher *dispatch.Dispatcher
	Gate       *quota.Gate
	Books      *books.Store
	Queue      *bus.Queue
	Desk       *desk.Desk
	// Roster hears at once of the agents that are paired and removed here.
	Roster *roster.Roster
	// Aside may be nil: then heartbeats over HTTPS are taken, and nobody is told.
	Aside   Aside
	Metrics *metric.Instruments
	Tracer  *trace.Tracer
	Log     *slog.Logger
}

// Edge serves the HTTP API.
type Edge struct {
	Parts
	cfg      Config
	app      *fiber.App
	failures *failures
	watch    *watcher
	clients  *clients
	uploads  uploads
	draining atomic.Bool
	ready    readiness
	slugs    slugs
}

const (
	// headerTimeout is the default of Config.HeaderTimeout, and readTimeout bounds how long a
	// client may take to send a body.
	headerTimeout = 20 * time.Second
	readTimeout   = 90 * time.Second
	// idleTimeout is how long a connection may wait for its next request.
	idleTimeout = 2 * time.Minute
	// headerLimit bounds the request line and headers, in bytes. Each connection that is open
	// has a buffer of that size.
	headerLimit = 8 << 10
)

// New returns an edge that isn't listening yet.
func New(cfg Config, parts Parts) *Edge {
	cfg.HeaderTimeout = cmp.Or(cfg.HeaderTimeout, headerTimeout)
	e := &Edge{
		Parts: parts, cfg: cfg, watch: newWatcher(), clients: newClients(),
		failures: newFailures(cfg.FailureRate, cfg.FailureBurst),
	}
	e.app = fiber.New(fiber.Config{
		AppName:               "OwnLLM",
		DisableStartupMessage: true,
		Immutable:             true,
		StrictRouting:         true,
		CaseSensitive:         true,
		BodyLimit:             cfg.BodyLimit,
		StreamRequestBody:     true, // the key is checked before a body is read
		ReadBufferSize:        headerLimit,
		ReadTimeout:           cfg.HeaderTimeout,
		IdleTimeout:           idleTimeout,
		ErrorHandler:          e.fail,
		// Multipart forms are nobody's business here.
		DisablePreParseMultipartForm: true,
	})
	server := e.app.Server()
	server.CloseOnShutdown = true
	server.HeaderReceived = e.onHeaders
	server.ExpectHandler = e.onExpect
	// Fiber answers an unknown method in plain text, before any handler of ours.
	route := server.Handler
	server.Handler = func(ctx *fasthttp.RequestCtx) {
		if !knownMethod(string(ctx.Method())) {
			e.refuseMethod(ctx)
			return
		}
		route(ctx)
	}
	e.routes()
	return e
}

const chatPath = "/v1/chat/completions"

func (e *Edge) routes() {
	e.app.Use(e.begin, recover.New(recover.Config{
		EnableStackTrace: true,
		StackTraceHandler: func(c *fiber.Ctx, what any) {
			in := callOf(c)
			e.Log.ErrorContext(c.UserContext(), "panic", "request", in.id, "tenant", in.identity.Tenant, "key", in.identity.Key,
				"error", what, "stack", string(debug.Stack()))
		},
	}))
	if len(e.cfg.CORSOrigins) > 0 {
		origins := strings.Join(e.cfg.CORSOrigins, ",")
		if slices.Contains(e.cfg.CORSOrigins, "*") {
			origins = "*" // the middleware takes it only alone
		}
		e.app.Use(cors.New(cors.Config{
			AllowOrigins: origins,
			AllowMethods: "GET,POST,PUT,PATCH,DELETE,OPTIONS",
			ExposeHeaders: "X-Request-Id,Retry-After,X-Should-Retry," + strings.Join([]string{
				headerLimitRequests, headerRemainingRequests, headerResetRequests, headerLimitTokens, headerRemainingTokens,
			}, ","),
			MaxAge: 600,
		}))
	}
	e.app.Get("/healthz", e.healthz)
	e.app.Get("/readyz", e.readyz)
	e.app.Post(chatPath, e.chat)
	e.app.Get("/v1/models", e.listModels)
	e.app.Get("/v1/models/*", e.getModel)
	e.agentRoutes() // before those that take an admin token
	e.adminRoutes()
}

// Serve answers requests on the listener until ctx ends, and for cfg.DrainDelay after it.
// Then it refuses new connections, lets running replies finish within cfg.Drain, ends the
// others with an error that says so, and returns.
func (e *Edge) Serve(ctx context.Context, l net.Listener) error {
	l = listener{l, e.clients}
	if e.cfg.CertFile != "" {
		cert, err := tls.LoadX509KeyPair(e.cfg.CertFile, e.cfg.KeyFile)
		if err != nil {
			return fmt.Errorf("load TLS certificate: %w", err)
		}
		l = tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12})
	}
	watching, stopWatching := context.WithCancel(context.WithoutCancel(ctx))
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		e.watch.run(watching)
	}()
	served := make(chan error, 1)
	go func() { served <- e.app.Listener(l) }()
	var err error
	leave := lingerWait
	select {
	case err = <-served:
	case <-ctx.Done():
		if err = e.shutdown(ctx); err != nil {
			leave = 0 // they had their time
		}
		err = errors.Join(err, <-served)
	}
	e.clients.finish(leave)
	stopWatching()
	<-watched
	return err
}

const (
	// lastWords is how long replies that are ended by the drain have to say so.
	lastWords = 3 * time.Second
	// interruptEvery is how often they are looked for: one may be between two attempts.
	interruptEvery = 100 * time.Millisecond
)

func (e *Edge) shutdown(ctx context.Context) error {
	e.draining.Store(true)
	time.Sleep(e.cfg.DrainDelay)
	// fasthttp must not be asked twice: it would let idle connections go on in between,
	// and the second time doesn't wait.
	all, cancel := context.WithTimeout(context.WithoutCancel(ctx), e.cfg.Drain+lastWords)
	defer cancel()
	stopped := make(chan error, 1)
	go func() { stopped <- e.app.ShutdownWithContext(all) }()
	timer := time.NewTimer(e.cfg.Drain)
	defer timer.Stop()
	for warned := false; ; {
		select {
		case err := <-stopped:
			if err != nil {
				return fmt.Errorf("shut the edge down: %w", err)
			}
			return nil
		case <-timer.C:
			if n := e.Dispatcher.Active(); n > 0 && !warned {
				warned = true
				e.Log.WarnContext(ctx, "drain time is over, replies are ended", "active", n)
			}
			e.Dispatcher.InterruptAll(desk.ErrShuttingDown)
			timer.Reset(interruptEvery)
		}
	}
}

func knownMethod(m string) bool {
	switch m {
	case fiber.MethodGet, fiber.MethodHead, fiber.MethodPost, fiber.MethodPut, fiber.MethodPatch,
		fiber.MethodDelete, fiber.MethodOptions, fiber.MethodConnect, fiber.MethodTrace:
		return true
	}
	return false
}

// healthz says that the process is alive.
func (e *Edge) healthz(c *fiber.Ctx) error { return c.JSON(fiber.Map{"status": "ok"}) }

// readyz says whether the edge can do its work, and if not, what is missing.
func (e *Edge) readyz(c *fiber.Ctx) error {
	r := e.Readiness(c.UserContext())
	if !r.Ready {
		c.Status(fiber.StatusServiceUnavailable)
		c.Set(fiber.HeaderRetryAfter, strconv.Itoa(int(desk.LearnWait/time.Second)))
	}
	return c.JSON(r)
}

// Readiness is whether an edge can do its work.
type Readiness struct {
	Ready    bool   `json:"ready"`
	Postgres string `json:"postgres"` // "ok" or "down"
	NATS     string `json:"nats"`     // "ok", "down" or "learning"
	Draining bool   `json:"draining"`
}

const (
	// pingWait bounds the question to Postgres, and readyFor is how long an answer does:
	// anybody may ask.
	pingWait = time.Second
	readyFor = 250 * time.Millisecond
)

// readiness is what was last found out.
type readiness struct {
	mu       sync.Mutex // held while Postgres is asked
	at       time.Time
	postgres string
}

// Readiness asks what the edge depends on.
func (e *Edge) Readiness(ctx context.Context) Readiness {
	r := Readiness{Postgres: e.postgres(ctx), NATS: "ok", Draining: e.draining.Load()}
	switch {
	case !e.Feed.Connected():
		r.NATS = "down"
	case !e.Feed.Ready():
		r.NATS = "learning" // who is there
	}
	r.Ready = r.Postgres == "ok" && r.NATS == "ok" && !r.Draining
	return r
}

func (e *Edge) postgres(ctx context.Context) string {
	e.ready.mu.Lock()
	defer e.ready.mu.Unlock()
	if time.Since(e.ready.at) < readyFor {
		return e.ready.postgres
	}
	// Others want the answer, too, so one who leaves must not spoil it.
	ping, cancel := context.WithTimeout(context.WithoutCancel(ctx), pingWait)
	defer cancel()
	e.ready.postgres = "ok"
	if err := e.Books.Ping(ping); err != nil || !e.Gate.Ready() {
		e.ready.postgres = "down" // or it hasn't renewed the lease, without which nothing is admitted
	}
	e.ready.at = time.Now()
	return e.ready.postgres
}
