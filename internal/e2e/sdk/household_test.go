package sdk

import (
	"bytes"
	"context"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/internal/faultproxy"
	"github.com/ownllm/ownllm/internal/secret"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

const wait = 30 * time.Second

// The models of the demo backend.
const (
	textModel   = "demo-text"        // completion only
	slashModel  = "qwen/qwen2.5:32b" // as the demo model, under another name
	coldModel   = "demo-cold"        // loads for longer than the test takes
	failModel   = "demo-broken"      // can't be loaded
	smallModel  = "demo-small"       // with a small context window
	busyModel   = "demo-busy"        // whose queue is full
	pricedModel = "demo-priced"      // costs something
	awayModel   = "demo-away"        // of an agent that has left
	mutedModel  = "demo-muted"       // of an agent that has lost its bus
	missing     = "demo-never-heard-of"
	window      = 64
	queueBound  = 8
)

func models() []schemas.Model {
	demoModel := demo.DefaultModel()
	list := []schemas.Model{demoModel}
	for _, id := range []string{textModel, slashModel, coldModel, failModel, smallModel, busyModel, pricedModel} {
		m := demoModel
		m.ID = id
		switch id {
		case textModel:
			m.Capabilities = schemas.Capabilities{Completion: true}
		case coldModel:
			m.State = schemas.ModelCold
		case failModel:
			m.State = schemas.ModelFailed
		case smallModel:
			m.ContextWindow = window
		}
		list = append(list, m)
	}
	return list
}

// household is a running `ownllm up` with all that the errors of the contract come
// from: tenants, users and keys in every state, models in every state, an agent that
// has left, and further edges, each with something that the first doesn't have.
type household struct {
	*stack.Up
	t       *testing.T
	backend *stack.Backend
	admin   *adminapi.Client
	// tenant is a second tenant, whose agent has left and whose host is tenantURL.
	tenant, tenantURL string
	// hasty is an edge that waits two seconds for a token and six for a reply, strict one that has had enough of
	// bad requests, and cut one that has lost its database.
	hasty, strict, cut string
	// spent is a key whose money is spent, busy one with as many requests in flight as it may
	// have, and hurried one of a tenant whose requests come too fast.
	spent, busy, hurried string
}

func newHousehold(t *testing.T) *household {
	t.Helper()
	h := &household{t: t, backend: stack.StartBackend(t, demo.Options{Models: models()})}
	load := demo.NoFaults()
	load.LoadMS = int(time.Hour.Milliseconds())
	if err := h.backend.SetFaults(coldModel, load); err != nil {
		t.Fatal(err)
	}
	h.Up = stack.StartUp(t, t.TempDir(), "--backend", h.backend.URL,
		// A host of the form SLUG.DOMAIN that needs no name server: 127.0.0.2.
		"--listen", "0.0.0.0:0", "--base-domain", "0.0.2",
		"--body-limit", "1MB", "--cold-wait", "1s",
		"--queue-bound", strconv.Itoa(queueBound), "--first-token-timeout", "30m", "--total-timeout", "30m",
		"--failure-rate", "10000", "--failure-burst", "10000")
	var err error
	if h.admin, err = adminapi.NewClient(h.AdminURL, secret.String(h.AdminToken)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.admin.Close)
	h.tenant = "127"
	h.tenantURL = strings.Replace(h.BaseURL, "127.0.0.1", "127.0.0.2", 1)
	h.newTenant(h.tenant)
	h.visit()
	h.mute()
	h.hasty = h.startEdge(h.DatabaseURL, "--first-token-timeout", "2s", "--idle-timeout", "2s", "--total-timeout", "6s")
	h.strict = h.startEdge(h.DatabaseURL, "--failure-rate", "0.001", "--failure-burst", "1")
	h.get(h.strict+"/models", "not a key")
	books := faultproxy.New(t, h.DatabaseURL)
	h.cut = h.startEdge(books.URL())
	books.Cut()
	h.fillQueue()
	h.useUp()
	return h
}

// plenty is a limit that no test comes near.
const plenty = 1_000_000

// newTenant makes a tenant with a user.
func (h *household) newTenant(slug string) adminapi.User {
	h.t.Helper()
	if _, err := h.admin.CreateTenant(h.t.Context(), adminapi.CreateTenant{Slug: slug, QPS: new(plenty)}); err != nil {
		h.t.Fatal(err)
	}
	return h.newUser(slug, "first@example.com")
}

func (h *household) newUser(tenant, email string) adminapi.User {
	h.t.Helper()
	u, err := h.admin.CreateUser(h.t.Context(), adminapi.CreateUser{Tenant: tenant, Email: email})
	if err != nil {
		h.t.Fatal(err)
	}
	return u
}

// newKey makes a key of a user.
func (h *household) newKey(u adminapi.User, change func(*adminapi.CreateKey)) adminapi.CreatedKey {
	h.t.Helper()
	in := adminapi.CreateKey{Tenant: string(u.Tenant), User: string(u.ID)}
	if change != nil {
		change(&in)
	}
	k, err := h.admin.CreateKey(h.t.Context(), in)
	if err != nil {
		h.t.Fatal(err)
	}
	return k
}

// environ is what a role needs to join.
func (h *household) environ(databaseURL string) []string {
	h.t.Helper()
	token, err := os.ReadFile(filepath.Join(h.DataDir, "nats.token"))
	if err != nil {
		h.t.Fatal(err)
	}
	return []string{
		"OWNLLM_NATS_URL=" + h.NATSURL, "OWNLLM_NATS_TOKEN=" + strings.TrimSpace(string(token)),
		"OWNLLM_DATABASE_URL=" + databaseURL,
	}
}

// startEdge starts a further edge and returns its base URL.
func (h *household) startEdge(databaseURL string, args ...string) string {
	h.t.Helper()
	addr, ops := stack.FreeAddr(h.t), stack.FreeAddr(h.t)
	args = append([]string{"edge", "--listen", addr, "--ops-listen", ops}, args...)
	p := stack.Run(h.t, "edge", h.environ(databaseURL), stack.Binary(h.t, stack.OwnLLM), args...)
	stack.Until(h.t, wait, "a further edge", func() bool {
		if !p.Alive() {
			h.t.Fatalf("ownllm edge has ended: %v", p.Err())
		}
		return stack.Answers("http://" + ops + "/readyz")
	})
	return "http://" + addr + "/v1"
}

// useUp makes the keys that have no more of something, until the test ends.
func (h *household) useUp() {
	h.t.Helper()
	ctx := h.t.Context()
	if _, err := h.admin.SetPrice(ctx, adminapi.SetPrice{Model: pricedModel, CentsPer1kTokens: new(adminapi.Cents(1))}); err != nil {
		h.t.Fatal(err)
	}
	user := h.newTenant("hurried")
	own := h.newUser("local", "limited@example.com")
	h.spent = h.newKey(own, func(in *adminapi.CreateKey) { in.BudgetCents = new(int64) }).Secret
	h.busy = h.newKey(own, func(in *adminapi.CreateKey) { in.Concurrency = new(1) }).Secret
	h.hurried = h.newKey(user, nil).Secret
	h.hold(h.busy, demo.ModelID)
	stack.Until(h.t, wait, "the slot to be taken", func() bool { return h.backend.Stats().Active == queueBound+1 })

	h.startWorker(string(user.Tenant), "--model", demo.ModelID)
	stack.Until(h.t, wait, "the worker of the hurried tenant", func() bool {
		return h.get(h.BaseURL+"/models/"+demo.ModelID, h.hurried) == http.StatusOK
	})
	if _, err := h.admin.ChangeTenant(ctx, "hurried", adminapi.ChangeTenant{QPS: new(1)}); err != nil {
		h.t.Fatal(err)
	}
	h.drain(user.Tenant)
}

// drain keeps the bucket of a tenant empty, as if others took out whatever comes in.
func (h *household) drain(tenant schemas.TenantID) {
	h.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	conn, err := pgx.Connect(ctx, h.DatabaseURL)
	if err != nil {
		h.t.Fatal(err)
	}
	first, done := make(chan struct{}), make(chan struct{})
	h.t.Cleanup(func() {
		cancel()
		<-done
		_ = conn.Close(context.Background())
	})
	go func() {
		defer close(done)
		for n := 0; ctx.Err() == nil; n++ {
			_, err := conn.Exec(ctx, `
				INSERT INTO tenant_buckets (tenant_id, full_at) VALUES ($1, (extract(epoch FROM now()) * 1000000000)::bigint + 2000000000)
				ON CONFLICT (tenant_id) DO UPDATE SET full_at = excluded.full_at`, tenant)
			if err != nil && ctx.Err() == nil {
				h.t.Errorf("drain the bucket: %v", err)
			}
			if n == 0 {
				close(first)
			}
			select {
			case <-ctx.Done():
			case <-time.After(50 * time.Millisecond):
			}
		}
	}()
	<-first
}

// visit starts a worker of the second tenant, waits until it is seen, and stops it.
func (h *household) visit() {
	h.t.Helper()
	tenants, err := h.admin.Tenants(h.t.Context())
	if err != nil {
		h.t.Fatal(err)
	}
	id := ""
	for _, tenant := range tenants {
		if tenant.Slug == h.tenant {
			id = string(tenant.ID)
		}
	}
	p := h.startWorker(id, "--model", demo.ModelID+"="+awayModel)
	state := func(state string) func() bool {
		return func() bool {
			agents, err := h.admin.Agents(h.t.Context(), h.tenant)
			return err == nil && len(agents) == 1 && agents[0].State == state && len(agents[0].Models) == 1
		}
	}
	stack.Until(h.t, wait, "the visiting worker", state(adminapi.AgentUp))
	if err := p.Stop(); err != nil {
		h.t.Errorf("the visiting worker ended with %v", err)
	}
	stack.Until(h.t, wait, "the visiting worker to be gone", state(adminapi.AgentOffline))
}

// mute starts a worker of the first tenant that has no way to the bus, and waits until it
// has told by HTTP what it has.
func (h *household) mute() {
	h.t.Helper()
	bus := faultproxy.New(h.t, h.NATSURL)
	bus.Cut()
	h.startWorker("local", "--nats-url", bus.URL(), "--model", demo.ModelID+"="+mutedModel)
	stack.Until(h.t, wait, "the worker without a bus", func() bool {
		return h.get(h.BaseURL+"/models/"+mutedModel, h.APIKey) == http.StatusOK
	})
}

// startWorker starts a worker of a tenant, as a machine that is paired with it.
func (h *household) startWorker(tenant string, args ...string) *stack.Process {
	h.t.Helper()
	pairing, err := h.admin.CreatePairing(h.t.Context(), adminapi.CreatePairing{Tenant: tenant})
	if err != nil {
		h.t.Fatal(err)
	}
	dir := h.t.TempDir()
	args = append([]string{
		"worker", "--data-dir", dir, "--ops-listen", stack.FreeAddr(h.t), "--backend", h.backend.URL,
		"--server", strings.TrimSuffix(h.AdminURL, adminapi.Prefix), "--machine-id", dir,
	}, args...)
	env := append(h.environ(""), "OWNLLM_PAIR="+pairing.Secret)
	return stack.Run(h.t, "worker", env, stack.Binary(h.t, stack.OwnLLM), args...)
}

// fillQueue keeps the queue of the busy model full until the test ends.
func (h *household) fillQueue() {
	h.t.Helper()
	for range queueBound {
		h.hold(h.APIKey, busyModel)
	}
	stack.Until(h.t, wait, "a full queue", func() bool { return h.backend.Stats().Active == queueBound })
}

// hold keeps a request in flight until the test ends.
func (h *household) hold(key, model string) {
	h.t.Helper()
	body := []byte(`{"model":"` + model + `","messages":[{"role":"user","content":"Hi"}],"demo":{"first_token_ms":3600000}}`)
	ctx, cancel := context.WithCancel(context.Background())
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, h.BaseURL+"/chat/completions", bytes.NewReader(body))
	if err != nil {
		h.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+key)
	done := make(chan struct{})
	h.t.Cleanup(func() {
		cancel()
		<-done
	})
	go func() {
		defer close(done)
		if resp, err := http.DefaultClient.Do(req); err == nil {
			_ = resp.Body.Close()
			h.t.Errorf("a request that was to wait got status %d", resp.StatusCode)
		}
	}()
}

// get sends a request, and returns the status of the reply.
func (h *household) get(url, key string) int {
	h.t.Helper()
	req, err := http.NewRequestWithContext(h.t.Context(), http.MethodGet, url, nil)
	if err != nil {
		h.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+key)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		h.t.Fatal(err)
	}
	_ = resp.Body.Close()
	return resp.StatusCode
}

// target is the household for the checks of the SDKs.
func (h *household) target() target {
	return target{
		BaseURL: h.BaseURL, APIKey: h.APIKey, BackendURL: h.backend.URL,
		Model: demo.ModelID, TextModel: textModel, SlashModel: slashModel, Cases: h.cases(),
	}
}

// unknownKey is well-formed, but nobody's.
func unknownKey() string { return apikey.New().Reveal() }
