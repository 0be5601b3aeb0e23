package edge_test

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/desk"
	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/broker/keyring"
	"github.com/ownllm/ownllm/broker/presence"
	"github.com/ownllm/ownllm/broker/quota"
	"github.com/ownllm/ownllm/broker/registry"
	"github.com/ownllm/ownllm/broker/roster"
	"github.com/ownllm/ownllm/edge"
	"github.com/ownllm/ownllm/internal/faultproxy"
	"github.com/ownllm/ownllm/internal/logtest"
	"github.com/ownllm/ownllm/internal/natstest"
	"github.com/ownllm/ownllm/internal/pgtest"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker"
	"github.com/ownllm/ownllm/worker/backend"
	"github.com/ownllm/ownllm/worker/demo"
)

func TestMain(m *testing.M) {
	// These tests wait more than they work.
	if err := flag.Set("test.parallel", "4"); err != nil {
		panic(err)
	}
	pgtest.Main(m,
		// fasthttp keeps one goroutine for the Date header for ever, and one of each
		// server for up to ten seconds after its end.
		goleak.IgnoreAnyFunction("github.com/valyala/fasthttp.updateServerDate.func1"),
		goleak.IgnoreAnyFunction("github.com/valyala/fasthttp.(*workerPool).Start.func2"),
	)
}

// house is everything between an HTTP client and the demo model, in this process: an
// edge, its dispatcher and what else it stands on, a worker, a real nats-server and a
// real PostgreSQL.
type house struct {
	t     testing.TB
	store *books.Store
	bus   *natstest.Server
	// database is the way of the edge to PostgreSQL, which can be cut.
	database *faultproxy.Proxy
	backend  *demo.Server
	queue    *bus.Queue
	edge     *edge.Edge
	keys     *keyring.Keyring
	agents   *presence.Table
	disp     *dispatch.Dispatcher
	addr     string
	tenant   books.Tenant
	user     books.User
	key      string
	stop     context.CancelFunc // of the edge
	served   chan error
	log      *logtest.Book
}

// plan says how a house is built.
type plan struct {
	edge     edge.Config
	dispatch func(*dispatch.Config)
	models   []schemas.Model // of the demo backend
	slots    int             // of the worker; 0: what the backend says
	empty    bool            // no worker; the edge isn't waited for until it is ready
	closed   bool            // no admin API
	aside    edge.Aside      // who hears of heartbeats over HTTPS
	limited  bool            // the tenant may make as many requests a second as by default
}

// patience is how long a test waits for what has to come.
const patience = time.Minute

const adminToken = "admin-token-of-the-test"

func build(t testing.TB, p plan) *house {
	t.Helper()
	h := &house{t: t, log: &logtest.Book{}, bus: natstest.Start(t)}
	log := slog.New(slog.NewTextHandler(h.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	ctx := t.Context()
	h.database = faultproxy.New(t, pgtest.New(t))
	var err error
	must := func() {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	h.store, err = books.Open(ctx, books.Config{URL: h.database.URL()})
	must()
	t.Cleanup(h.store.Close)
	key := apikey.New()
	h.key = key.Reveal()
	h.tenant, h.user, _, err = h.store.EnsureFirst(ctx, key)
	must()
	if !p.limited {
		h.tenant, err = h.store.SetTenant(ctx, string(h.tenant.ID), books.TenantChange{QPS: new(1_000_000)})
		must()
	}

	_, queue := h.bus.Queue(64)
	tokens, bulk := h.bus.Connect("tokens"), h.bus.Connect("bulk")
	h.queue, h.agents, h.keys = queue, presence.NewTable(), keyring.New(h.store, log)
	feed := presence.NewFeed(tokens, h.agents, log)
	cfg := dispatch.DefaultConfig()
	if p.dispatch != nil {
		p.dispatch(&cfg)
	}
	gate := quota.New(h.store, quota.Config{}, log)
	h.disp = dispatch.New(dispatch.Parts{Tokens: tokens, Bulk: bulk, Queue: queue, Agents: h.agents, Feed: feed, Gate: gate, Log: log}, cfg)
	kept := roster.New(h.store, h.agents)
	h.keys.OnChange(kept.Changed)
	h.run("keyring", h.keys.Run)
	h.run("roster", kept.Run)
	h.run("gate", gate.Run)
	h.run("dispatcher", h.disp.Run)
	h.run("feed", feed.Run)
	h.run("registry", registry.New(h.bus.Connect("registry"), queue, offers{h.store, h.bus.Agents()}, h.agents, log).Run)

	h.backend = demo.New(demo.Options{Models: p.models})
	backends := listen(t, "127.0.0.1:0")
	h.run("backend", func(ctx context.Context) error { return h.backend.Serve(ctx, backends) })
	if !p.empty {
		h.work(h.tenant.ID, backend.Config{URL: "http://" + backends.Addr().String(), Slots: p.slots}, log)
	}

	e := p.edge
	if e.BodyLimit == 0 {
		e.BodyLimit = 1 << 20
	}
	if e.FailureBurst == 0 {
		e.FailureRate, e.FailureBurst = 1000, 100_000
	}
	if e.Drain == 0 {
		e.Drain = 10 * time.Second
	}
	if e.Version = "test"; !p.closed {
		e.AdminToken = adminToken
	}
	h.edge = edge.New(e, edge.Parts{
		Keys: h.keys, Agents: h.agents, Feed: feed, Dispatcher: h.disp, Gate: gate, Books: h.store, Queue: queue, Log: log,
		Aside: p.aside, Desk: desk.New(h.agents, feed), Roster: kept,
	})
	l := listen(t, "127.0.0.1:0")
	h.addr = l.Addr().String()
	edgeCtx, stop := context.WithCancel(context.Background())
	h.stop, h.served = stop, make(chan error, 1)
	go func() { h.served <- h.edge.Serve(edgeCtx, l) }()
	t.Cleanup(func() {
		if err := h.end(); err != nil {
			t.Errorf("edge: %v", err)
		}
		if t.Failed() {
			t.Logf("--- log:\n%s", h.log.String())
		}
	})
	if !p.empty {
		until(t, "the edge to know its models", func() bool {
			models, _ := h.agents.Models(h.tenant.ID)
			return h.edge.Readiness(ctx).Ready && len(models) > 0
		})
	}
	return h
}

// end stops the edge, once, and says how it ended.
func (h *house) end() error {
	h.stop()
	err, ok := <-h.served
	if ok {
		close(h.served)
	}
	return err
}

// run runs a part until the test ends.
func (h *house) run(name string, part func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- part(ctx) }()
	h.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			h.t.Errorf("%s: %v", name, err)
		}
	})
}

// offers lets agents pull what they offer, from their next connection on.
type offers struct {
	registry.Store
	agents *natstest.Agents
}

// UpsertAgent implements registry.Store.
func (o offers) UpsertAgent(ctx context.Context, r books.AgentReport) error {
	var models []string
	for _, m := range r.Inventory.Models {
		models = append(models, m.ID)
	}
	o.agents.Offer(r.Tenant, r.ID, models...)
	return o.Store.UpsertAgent(ctx, r)
}

// work runs a worker of a new agent.
func (h *house) work(tenant schemas.TenantID, b backend.Config, log *slog.Logger) {
	id := schemas.NewAgentID()
	bulk := bus.NewSideline(h.bus.AgentConfig(tenant, id), worker.BulkRest, log)
	h.t.Cleanup(bulk.Close)
	w := worker.New(h.bus.Agent(tenant, id), bulk, worker.Config{
		Tenant: tenant, Agent: id, Host: "test", Backends: []backend.Config{b}, Drain: time.Second,
	}, log)
	h.run("worker", w.Run)
}

func listen(t testing.TB, addr string) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// until looks again and again until ok.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	within(t, patience, what, ok)
}

func within(t testing.TB, wait time.Duration, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(wait); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited %s for %s", wait, what)
		}
	}
}

// newKey makes a key of a user.
func (h *house) newKey(n books.NewKey) (schemas.KeyID, string) {
	h.t.Helper()
	if n.Tenant == "" {
		n.Tenant, n.User = string(h.tenant.ID), string(h.user.ID)
	}
	k, secret, err := h.store.CreateKey(context.Background(), n)
	if err != nil {
		h.t.Fatal(err)
	}
	return k.ID, secret.Reveal()
}

// newTenant makes a tenant with a user and a key.
func (h *house) newTenant(slug string) (books.Tenant, books.User, string) {
	h.t.Helper()
	ctx := context.Background()
	tenant, err := h.store.CreateTenant(ctx, books.NewTenant{Slug: slug, QPS: new(1_000_000)})
	if err != nil {
		h.t.Fatal(err)
	}
	user, err := h.store.CreateUser(ctx, books.NewUser{Tenant: slug, Email: "a@" + slug})
	if err != nil {
		h.t.Fatal(err)
	}
	_, key := h.newKey(books.NewKey{Tenant: slug, User: string(user.ID)})
	return tenant, user, key
}

// ask is a chat request, with further members.
func ask(members string) string {
	if members != "" {
		members = "," + members
	}
	return `{"model":"demo","messages":[{"role":"user","content":"Hello"}]` + members + `}`
}

// raw is a connection on which a test writes HTTP by hand.
type raw struct {
	net.Conn
	t testing.TB
	r *bufio.Reader
}

func (h *house) dial() *raw {
	h.t.Helper()
	c, err := net.Dial("tcp", h.addr)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { _ = c.Close() })
	return newRaw(h.t, c)
}

func newRaw(t testing.TB, c net.Conn) *raw {
	_ = c.SetDeadline(time.Now().Add(patience))
	return &raw{c, t, bufio.NewReader(c)}
}

// send writes text, in which each newline stands for CR LF.
func (c *raw) send(text string) {
	c.t.Helper()
	if _, err := io.WriteString(c, strings.ReplaceAll(text, "\n", "\r\n")); err != nil {
		c.t.Fatal(err)
	}
}

// post writes a chat request.
func (c *raw) post(key, body string) {
	c.t.Helper()
	head := strings.ReplaceAll(fmt.Sprintf("POST /v1/chat/completions HTTP/1.1\nHost: h\nAuthorization: Bearer %s\nContent-Length: %d\n\n", key, len(body)), "\n", "\r\n")
	if _, err := io.WriteString(c, head+body); err != nil {
		c.t.Fatal(err)
	}
}

// answer reads the head of an answer; the body is to be read from it.
func (c *raw) answer(method string) *http.Response {
	c.t.Helper()
	resp, err := http.ReadResponse(c.r, &http.Request{Method: method})
	if err != nil {
		c.t.Fatalf("read answer: %v", err)
	}
	return resp
}

// whole reads an answer with its body.
func (c *raw) whole(method string) (*http.Response, string) {
	c.t.Helper()
	resp := c.answer(method)
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatalf("read body after %q: %v", b, err)
	}
	return resp, string(b)
}

// do sends a request on a connection of its own and reads the answer.
func (h *house) do(method, path, key, body string, headers ...string) (*http.Response, string) {
	h.t.Helper()
	c := h.dial()
	defer c.Close()
	var head strings.Builder
	fmt.Fprintf(&head, "%s %s HTTP/1.1\nHost: h\nConnection: close\n", method, path)
	if key != "" {
		fmt.Fprintf(&head, "Authorization: Bearer %s\n", key)
	}
	if body != "" {
		fmt.Fprintf(&head, "Content-Length: %d\n", len(body))
	}
	for _, line := range headers {
		head.WriteString(line + "\n")
	}
	c.send(head.String() + "\n")
	if _, err := io.WriteString(c, body); err != nil {
		h.t.Fatal(err)
	}
	return c.whole(method)
}

// refusal is an error as a client sees it.
type refusal struct {
	status int
	code   string
}

func (h *house) code(method, path, key, body string, headers ...string) refusal {
	h.t.Helper()
	resp, text := h.do(method, path, key, body, headers...)
	return refusal{resp.StatusCode, codeIn(text)}
}

// codeIn is the code of an envelope, or "".
func codeIn(envelope string) string {
	_, rest, _ := strings.Cut(envelope, `"code":"`)
	code, _, _ := strings.Cut(rest, `"`)
	return code
}
