package e2e

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/micro"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// natsHouse is a cluster with two brokers, an edge and a worker, and a key for publishers.
type natsHouse struct {
	*stack.Cluster
	edge    *stack.Edge
	backend *stack.Backend
	ledger  *ledger
	key     schemas.KeyID
	secret  string
}

func startNATSHouse(t *testing.T) *natsHouse {
	t.Helper()
	h := &natsHouse{backend: stack.StartBackend(t, demo.Options{})}
	h.Cluster = stack.StartCluster(t)
	h.StartBroker() // the second one
	h.edge = h.StartEdge()
	h.StartWorker(h.backend.URL, "--slots", "64").Serving()
	h.ledger = openLedger(t, h.DatabaseURL)
	setPrice(t, h.Cluster, demo.ModelID, books.MicroCents)
	h.key, h.secret = newKey(t, h.Cluster, books.NewKey{Concurrency: new(1000)})
	h.publisher(t).awaitModel(t)
	return h
}

// publisher connects with the key of the house.
func (h *natsHouse) publisher(t *testing.T, options ...nats.Option) *publisher {
	t.Helper()
	return newPublisher(t, h.NATSURL(), h.key, h.secret, options...)
}

// idle waits until the backend has nothing to do, and says how long that took.
func (h *natsHouse) idle(t *testing.T, since time.Time) time.Duration {
	t.Helper()
	stack.Until(t, 30*time.Second, "the backend to be idle", func() bool { return h.backend.Stats().Active == 0 })
	return time.Since(since).Round(time.Millisecond)
}

// long is a reply that nobody waits for.
var long = map[string]any{"demo": map[string]any{"numbered": true, "tokens": 100_000, "tokens_per_second": 50}}

func TestIngress(t *testing.T) {
	h := startNATSHouse(t)
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	p := h.publisher(t)

	t.Run("a streamed reply", func(t *testing.T) {
		r := p.chat(ctx, true, map[string]any{"demo": map[string]any{"numbered": true, "tokens": 300, "tokens_per_second": 200}})
		wantDone(t, r)
		if r.text != numbered(300) || r.usage.CompletionTokens != 300 || r.usage.TotalTokens != r.usage.PromptTokens+300 || r.usage.PromptTokens == 0 || r.completion != nil {
			t.Errorf("text %.60q, usage %+v, completion %s", r.text, r.usage, r.completion)
		}
		if r.progress < 2 {
			t.Errorf("%d progress messages in more than a second", r.progress)
		}
	})
	t.Run("a whole reply", func(t *testing.T) {
		r := p.chat(ctx, false, map[string]any{"demo": map[string]any{"numbered": true, "tokens": 20}})
		wantDone(t, r)
		var whole chatChunk
		if err := json.Unmarshal(r.completion, &whole); err != nil || len(whole.Choices) != 1 {
			t.Fatalf("completion %s: %v", r.completion, err)
		}
		if whole.Choices[0].Message.Content != numbered(20) || r.text != "" || r.usage.CompletionTokens != 20 || whole.Usage.CompletionTokens != 20 {
			t.Errorf("completion %s, text %q, usage %+v", r.completion, r.text, r.usage)
		}
	})
	t.Run("models", func(t *testing.T) {
		var list schemas.ModelsAnswer
		if err := p.ask(schemas.OperationModels, nil, &list); err != nil || list.Kind != "models" || list.Object != "list" || len(list.Data) != 1 || list.Data[0].ID != demo.ModelID {
			t.Errorf("%+v, %+v", list, err)
		}
	})
	t.Run("whoami", func(t *testing.T) { h.whoami(t, p) })
	t.Run("errors", func(t *testing.T) { h.errors(ctx, t, p) })
	t.Run("the last slot", func(t *testing.T) { h.lastSlot(ctx, t) })
	t.Run("cancel", func(t *testing.T) { h.cancel(ctx, t, p) })
	t.Run("a publisher that is killed", func(t *testing.T) { h.killed(ctx, t) })
	t.Run("a publisher that falls silent", func(t *testing.T) { h.silent(ctx, t, p) })
	t.Run("changes", func(t *testing.T) { h.changes(ctx, t) })
	t.Run("statistics", func(t *testing.T) { h.statistics(t) })
	h.ledger.wantClosed(h.key, 30*time.Second)
}

// whoami asks by the id of the key, and by the fingerprint of its secret.
func (h *natsHouse) whoami(t *testing.T, p *publisher) {
	var who schemas.Whoami
	if err := p.ask(schemas.OperationWhoami, nil, &who); err != nil {
		t.Fatal(err)
	}
	if who.Kind != "whoami" || who.Key != h.key || who.Tenant != h.Tenant.ID || who.Slug != h.Tenant.Slug || who.User != h.User.ID ||
		!slices.Equal(who.Scopes, []string{"model:*"}) || who.Concurrency != 1000 || who.BudgetCents != nil || who.Expires != 0 {
		t.Errorf("%+v", who)
	}
	secret, err := apikey.FromSecret(h.secret)
	if err != nil {
		t.Fatal(err)
	}
	stranger := schemas.KeyID(secret.Hash().Fingerprint())
	nc := connect(t, h.NATSURL(), nats.UserInfo("anybody", h.secret), nats.CustomInboxPrefix(schemas.PublisherInboxPrefix(stranger)))
	defer nc.Close()
	var same schemas.Whoami
	if err := (&publisher{nc: nc, key: stranger}).ask(schemas.OperationWhoami, nil, &same); err != nil || same.Key != h.key || same.Prefix != who.Prefix {
		t.Errorf("by the fingerprint: %+v, %+v", same, err)
	}
}

func (h *natsHouse) errors(ctx context.Context, t *testing.T, p *publisher) {
	scoped, scopedSecret := newKey(t, h.Cluster, books.NewKey{Scopes: []string{"model:other"}})
	poor, poorSecret := newKey(t, h.Cluster, books.NewKey{BudgetCents: new(int64(0))})
	limits := newPublisher(t, h.NATSURL(), scoped, scopedSecret)
	broke := newPublisher(t, h.NATSURL(), poor, poorSecret)
	for _, c := range []struct {
		about, operation, body string
		p                      *publisher
		code                   schemas.Code
		param                  string
	}{
		{"not JSON", "chat", "hello", p, schemas.CodeInvalidJSON, ""},
		{"nothing", "chat", "", p, schemas.CodeInvalidJSON, ""},
		{"no model", "chat", `{"messages":[{"role":"user","content":"x"}]}`, p, schemas.CodeModelRequired, "model"},
		{"no messages", "chat", `{"model":"demo"}`, p, schemas.CodeMessagesRequired, "messages"},
		{"an unknown model", "chat", `{"model":"nope","messages":[{"role":"user","content":"x"}]}`, p, schemas.CodeModelNotFound, "model"},
		{"a bad value", "chat", `{"model":"demo","n":-1,"messages":[{"role":"user","content":"x"}]}`, p, schemas.CodeInvalidValue, "n"},
		{"an unknown operation", "embed", `{}`, p, schemas.CodeNotFound, ""},
		{"a request that doesn't run", "cancel", string(schemas.CancelRequest{Request: schemas.NewRequestID()}.Encode()), p, schemas.CodeInvalidValue, "request_id"},
		{"beyond the scope", "chat", `{"model":"demo","messages":[{"role":"user","content":"x"}]}`, limits, schemas.CodeScopeRequired, "model"},
		{"no money", "chat", `{"model":"demo","max_tokens":5,"messages":[{"role":"user","content":"x"}]}`, broke, schemas.CodeBudgetExceeded, ""},
	} {
		r := c.p.follow(ctx, c.operation, []byte(c.body), func(*heard, *nats.Msg) {})
		if r.broken != nil || r.code() != c.code || r.messages != 1 {
			t.Errorf("%s: %+v, error %+v, want %s", c.about, r, r.err, c.code)
			continue
		}
		param := ""
		if r.err.Param != nil {
			param = *r.err.Param
		}
		if info := c.code.Info(); param != c.param || r.err.Type != info.Type || r.err.Message == "" || (r.retryAfter > 0) != (info.Status == 429) {
			t.Errorf("%s: error %+v, param %q, retry after %d", c.about, r.err, param, r.retryAfter)
		}
	}
	var list schemas.ModelsAnswer
	if err := limits.ask(schemas.OperationModels, nil, &list); err != nil || len(list.Data) != 0 {
		t.Errorf("a key sees models beyond its scope: %+v, %+v", list, err)
	}
	tenant, user := newTenant(t, h.Cluster, "lonely", 1000)
	k, secret, err := h.Books.CreateKey(ctx, books.NewKey{Tenant: tenant.Slug, User: string(user.ID)})
	if err != nil {
		t.Fatal(err)
	}
	lonely := newPublisher(t, h.NATSURL(), k.ID, secret.Reveal())
	if err := lonely.ask(schemas.OperationModels, nil, &list); err == nil || err.Code != schemas.CodeAgentOffline {
		t.Errorf("models of a tenant without agents: %+v", err)
	}
}

// lastSlot has a key with one slot ask twice.
func (h *natsHouse) lastSlot(ctx context.Context, t *testing.T) {
	id, secret := newKey(t, h.Cluster, books.NewKey{Concurrency: new(1)})
	p := newPublisher(t, h.NATSURL(), id, secret)
	running, leave := context.WithCancelCause(ctx)
	begun, ended := make(chan struct{}), make(chan heard, 1)
	go func() {
		once := sync.OnceFunc(func() { close(begun) })
		ended <- p.follow(running, "chat", chatBody(true, long), func(r *heard, _ *nats.Msg) {
			if r.text != "" {
				once()
			}
		})
	}()
	<-begun
	r := p.chat(ctx, true, nil)
	if r.code() != schemas.CodeConcurrencyLimit || r.retryAfter != 1 {
		t.Errorf("second request: %+v, error %+v", r, r.err)
	}
	leave(errLeft)
	<-ended
	// It has unsubscribed, and that is all that it says.
	t.Logf("unsubscribed, and the backend was idle after %s", h.idle(t, time.Now()))
	h.ledger.until(20*time.Second, "the slot to be back", id, func(held holding) bool { return held.InFlight == 0 })
	for range 5 { // one after the other
		wantDone(t, p.chat(ctx, true, map[string]any{"demo": map[string]any{"tokens": 3}}))
	}
	h.ledger.wantClosed(id, 30*time.Second)
}

// cancel cancels requests at whichever of the two brokers takes the word.
func (h *natsHouse) cancel(ctx context.Context, t *testing.T, p *publisher) {
	stranger, secret := newKey(t, h.Cluster, books.NewKey{})
	other := newPublisher(t, h.NATSURL(), stranger, secret)
	for range 6 {
		var cancelled, foreign *schemas.ClientError
		var took time.Time
		asked := false
		r := p.follow(ctx, "chat", chatBody(true, long), func(r *heard, _ *nats.Msg) {
			if r.text == "" || asked {
				return
			}
			asked = true
			var done schemas.Cancelled
			foreign = other.ask(schemas.OperationCancel, schemas.CancelRequest{Request: r.request}.Encode(), &done)
			took = time.Now()
			cancelled = p.ask(schemas.OperationCancel, schemas.CancelRequest{Request: r.request}.Encode(), &done)
			if cancelled == nil && (done.Kind != "cancelled" || done.Request != r.request) {
				t.Errorf("answer %+v", done)
			}
		})
		if cancelled != nil || r.broken != nil || r.code() != schemas.CodeNotFound {
			t.Errorf("cancel: %+v; the reply ended with %+v, broken %v", cancelled, r.err, r.broken)
		}
		if foreign == nil || foreign.Code != schemas.CodeInvalidValue {
			t.Errorf("a stranger's cancel: %+v", foreign)
		}
		t.Logf("cancelled after %s, and the backend was idle after %s", time.Since(took).Round(time.Millisecond), h.idle(t, took))
	}
}

// killed has the connection of a publisher closed in mid-stream, without a word, as by the
// end of its process.
func (h *natsHouse) killed(ctx context.Context, t *testing.T) {
	for _, stream := range []bool{true, false} {
		cut := new(cutDialer)
		p := h.publisher(t, nats.SetCustomDialer(cut), nats.NoReconnect())
		ended := make(chan heard, 1)
		gone, leave := context.WithCancelCause(ctx)
		go func() { ended <- p.follow(gone, "chat", chatBody(stream, long), func(*heard, *nats.Msg) {}) }()
		stack.Until(t, 30*time.Second, "the reply to run", func() bool { return h.backend.Stats().Active == 1 })
		time.Sleep(time.Second / 2) // it runs for a while
		at := time.Now()
		cut.cut()
		took := h.idle(t, at)
		leave(errLeft)
		<-ended
		t.Logf("stream %v: the backend was idle %s after the publisher's end", stream, took)
		if took > 3*time.Second { // one, and slack for a busy machine
			t.Errorf("stream %v: that took %s", stream, took)
		}
	}
}

// cutDialer remembers the connection that it made.
type cutDialer struct {
	mu   sync.Mutex
	conn net.Conn
}

// Dial implements nats.CustomDialer.
func (d *cutDialer) Dial(network, address string) (net.Conn, error) {
	conn, err := net.Dial(network, address)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.conn = conn
	return conn, err
}

func (d *cutDialer) cut() {
	d.mu.Lock()
	defer d.mu.Unlock()
	_ = d.conn.Close()
}

// silent has a publisher answer progress messages, and then no more. One that never did
// isn't asked to, and one that goes on answering stays.
func (h *natsHouse) silent(ctx context.Context, t *testing.T, p *publisher) {
	const silence = 10 * time.Second // after that it is taken for gone
	length := map[string]any{"demo": map[string]any{"numbered": true, "tokens": 700, "tokens_per_second": 50}}
	answers := map[string]int{"never": 0, "once": 1, "always": 1 << 30}
	ended := make(map[string]heard)
	left, leave := context.WithCancelCause(ctx)
	defer leave(nil)
	var mu sync.Mutex
	var wg sync.WaitGroup
	start := time.Now()
	for name, n := range answers {
		wg.Go(func() {
			mine := ctx
			if name == "once" { // it hears no end
				mine = left
			}
			r := p.follow(mine, "chat", chatBody(true, length), func(_ *heard, m *nats.Msg) {
				if m.Reply != "" && n > 0 {
					n--
					_ = m.Respond(nil)
				}
			})
			mu.Lock()
			defer mu.Unlock()
			ended[name] = r
		})
	}
	stack.Until(t, 30*time.Second, "three to run", func() bool { return h.backend.Stats().Active == 3 })
	stack.Until(t, 30*time.Second, "one to be ended", func() bool { return h.backend.Stats().Active == 2 })
	if after := time.Since(start); after < silence || after > silence+4*time.Second {
		t.Errorf("ended after %s", after)
	}
	stack.Until(t, 30*time.Second, "the others to be whole", func() bool { return h.backend.Stats().Active == 0 })
	leave(errLeft)
	wg.Wait()
	wantDone(t, ended["never"])
	wantDone(t, ended["always"])
	if r := ended["once"]; r.usage != nil || r.err != nil {
		t.Errorf("who is taken for gone gets %+v, %+v", r.usage, r.err)
	}
}

// changes ends replies by what an admin does.
func (h *natsHouse) changes(ctx context.Context, t *testing.T) {
	tenant, user := newTenant(t, h.Cluster, "doomed", 1000)
	h.StartWorkerOf(tenant.ID, h.backend.URL).Serving()
	for _, change := range []struct {
		name string
		code schemas.Code
		do   func(books.Key) error
	}{
		{"revocation", schemas.CodeKeyInvalid, func(k books.Key) error { _, err := h.Books.RevokeKey(ctx, k.ID); return err }},
		{"suspension", schemas.CodeTenantDisabled, func(books.Key) error {
			_, err := h.Books.SetTenantState(ctx, tenant.Slug, books.TenantSuspended)
			return err
		}},
	} {
		k, secret, err := h.Books.CreateKey(ctx, books.NewKey{Tenant: tenant.Slug, User: string(user.ID)})
		if err != nil {
			t.Fatal(err)
		}
		p := newPublisher(t, h.NATSURL(), k.ID, secret.Reveal())
		p.awaitModel(t)
		before := h.backend.Stats()
		ended := make(chan heard, 1)
		left, leave := context.WithTimeout(ctx, 10*time.Second)
		go func() { ended <- p.follow(left, "chat", chatBody(true, long), func(*heard, *nats.Msg) {}) }()
		stack.Until(t, 30*time.Second, "the reply to run", func() bool { return h.backend.Stats().Tokens > before.Tokens+10 })
		at := time.Now()
		if err := change.do(k); err != nil {
			t.Fatal(err)
		}
		took := h.idle(t, at)
		t.Logf("%s: the backend was idle after %s", change.name, took)
		if took > 3*time.Second {
			t.Errorf("%s: that took %s", change.name, took)
		}
		// Its connection is closed at the same time: it hears why only if it is lucky.
		if r := <-ended; r.usage != nil || r.code() != "" && r.code() != change.code {
			t.Errorf("%s: the reply ended with %+v, %+v", change.name, r.usage, r.err)
		}
		leave()
		h.ledger.wantClosed(k.ID, 30*time.Second)
	}
}

// statistics are those that `nats micro` shows.
func (h *natsHouse) statistics(t *testing.T) {
	nc, err := nats.Connect(h.NATSURL(), nats.UserInfo(bus.UserIngress, h.Token()))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	gather := func(verb micro.Verb) (found [][]byte) {
		subject, err := micro.ControlSubject(verb, "ownllm", "")
		if err != nil {
			t.Fatal(err)
		}
		sub, err := nc.SubscribeSync(nc.NewInbox())
		if err != nil {
			t.Fatal(err)
		}
		defer sub.Unsubscribe()
		if err := nc.PublishRequest(subject, sub.Subject, nil); err != nil {
			t.Fatal(err)
		}
		for range 2 { // brokers
			m, err := sub.NextMsg(5 * time.Second)
			if err != nil {
				t.Fatalf("%s: %v", verb, err)
			}
			found = append(found, m.Data)
		}
		return found
	}
	gather(micro.PingVerb)
	for _, b := range gather(micro.InfoVerb) {
		var info micro.Info
		if err := json.Unmarshal(b, &info); err != nil || info.Name != "ownllm" || len(info.Endpoints) < 4 || info.Metadata["owner"] == "" {
			t.Errorf("%s: %v", b, err)
		}
	}
	requests, failed := 0, 0
	stack.Until(t, 20*time.Second, "no request to be active", func() bool {
		requests, failed = 0, 0
		active := 0
		for _, b := range gather(micro.StatsVerb) {
			var stats micro.Stats
			if err := json.Unmarshal(b, &stats); err != nil {
				t.Fatal(err)
			}
			for _, e := range stats.Endpoints {
				if e.Name != schemas.OperationChat {
					continue
				}
				var own struct{ Active, Errors int }
				if err := json.Unmarshal(e.Data, &own); err != nil {
					t.Fatalf("%s: %v", e.Data, err)
				}
				requests, failed, active = requests+e.NumRequests, failed+own.Errors, active+own.Active
			}
		}
		return active == 0
	})
	if requests < 10 || failed < 5 || failed >= requests {
		t.Errorf("%d requests, %d of them failed", requests, failed)
	}
}

// TestMixedLoad has clients come over HTTP and over NATS with the same key, some of which
// leave, and some of whose replies break off: what the ledger has is what the owners have taken
// in, to the token.
func TestMixedLoad(t *testing.T) {
	h := startNATSHouse(t)
	owners := []string{h.edge.OpsURL}
	for _, b := range h.Brokers {
		owners = append(owners, b.OpsURL)
	}
	takenIn := func() (tokens int64) {
		for _, url := range owners {
			n, _ := measured(t, url, "gen_ai_client_token_usage_sum", `="output"`)
			tokens += int64(n)
		}
		return tokens
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	n := count(60, 400)
	p := h.publisher(t)
	c := newClient(h.edge.BaseURL, h.secret)
	defer c.close()
	awaitModel(t, []*stack.Edge{h.edge}, h.secret, demo.ModelID)
	type got struct {
		request string
		tokens  int
		whole   bool
	}
	replies := make([]got, n)
	var clients sync.WaitGroup
	at := make(chan struct{}, 48)
	for i := range n {
		at <- struct{}{}
		clients.Go(func() {
			defer func() { <-at }()
			fields := map[string]any{"demo": map[string]any{"numbered": true, "tokens": 20 + i%30, "tokens_per_second": 100}}
			leaves := i%5 == 0 // in mid-stream
			breaks := i%7 == 3 && !leaves
			if breaks {
				fields["demo"].(map[string]any)[[]string{"die_after", "end_after", "garbage_after"}[i%3]] = 10
			}
			stream := leaves || i%3 != 0
			mine, leave := context.WithCancelCause(ctx)
			defer leave(nil)
			if i%2 == 0 {
				r := p.follow(mine, "chat", chatBody(stream, fields), func(r *heard, _ *nats.Msg) {
					if leaves && tokensOf(r.text) >= 5 {
						leave(errLeft)
					}
				})
				replies[i] = got{string(r.request), tokensOf(r.text), r.usage != nil}
				if r.usage != nil {
					replies[i].tokens = r.usage.CompletionTokens
				} else if !leaves && !breaks {
					t.Errorf("request %d: %+v, error %+v", i, r, r.err)
				}
				return
			}
			r := c.follow(mine, stream, fields, func(r *reply) {
				if leaves && tokensOf(r.text) >= 5 {
					leave(errLeft)
				}
			})
			replies[i] = got{r.request(), tokensOf(r.text), r.done}
			if !leaves && !breaks && (!r.done || r.status != http.StatusOK) {
				t.Errorf("request %d: status %d, error %+v, broken %v", i, r.status, r.err, r.broken)
			}
		})
	}
	clients.Wait()
	entries := h.ledger.wantClosed(h.key, 30*time.Second)
	if len(entries) != n {
		t.Errorf("%d requests, %d rows in the ledger", n, len(entries))
	}
	var charged int64
	for _, e := range entries {
		charged += e.Completion
	}
	stack.Until(t, 30*time.Second, "the owners to have counted", func() bool { return takenIn() >= charged })
	if n := takenIn(); n != charged {
		t.Errorf("the ledger has %d tokens, and the owners took in %d", charged, n)
	}
	whole, broken := 0, 0
	for i, r := range replies {
		e, ok := entries[r.request]
		switch {
		case !ok:
			t.Errorf("request %d, %q, isn't in the ledger", i, r.request)
		case r.whole && (e.Completion != int64(20+i%30) || e.Completion != int64(r.tokens) || e.Outcome != "done"):
			t.Errorf("request %d is whole with %d tokens, and the ledger has %+v", i, r.tokens, e)
		case !r.whole && (e.Completion < int64(r.tokens) || e.Completion > int64(20+i%30)):
			t.Errorf("request %d broke off after %d tokens, and the ledger has %+v", i, r.tokens, e)
		}
		if r.whole {
			whole++
		} else if e.Outcome == "error" {
			broken++
		}
	}
	stack.Until(t, 30*time.Second, "the backend to be idle", func() bool { return h.backend.Stats().Active == 0 })
	t.Logf("%d requests, %d of them whole, %d broken off; %d tokens", n, whole, broken, charged)
	if whole < n/2 || whole > n-n/20 || broken < n/20 {
		t.Errorf("%d of %d replies are whole, %d broke off", whole, n, broken)
	}
}

// TestIngressOfUp asks `ownllm up` over NATS with what ready.json says.
func TestIngressOfUp(t *testing.T) {
	up := stack.StartUp(t, t.TempDir(), "--backend", "demo")
	secret, err := apikey.FromSecret(up.APIKey)
	if err != nil {
		t.Fatal(err)
	}
	stranger := schemas.KeyID(secret.Hash().Fingerprint())
	var who schemas.Whoami
	if err := newPublisher(t, up.NATSURL, stranger, up.APIKey).ask(schemas.OperationWhoami, nil, &who); err != nil {
		t.Fatal(err)
	}
	p := newPublisher(t, up.NATSURL, who.Key, up.APIKey)
	wantDone(t, p.chat(t.Context(), true, nil))
	// A reply that runs is finished before `up` ends.
	stopped := make(chan error, 1)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	asked := false
	r := p.follow(ctx, "chat", chatBody(true, map[string]any{"demo": map[string]any{"numbered": true, "tokens": 200, "tokens_per_second": 100}}), func(r *heard, _ *nats.Msg) {
		if r.text != "" && !asked {
			asked = true
			go func() { stopped <- up.Stop() }()
		}
	})
	wantDone(t, r)
	if r.text != numbered(200) {
		t.Errorf("text %.60q", r.text)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}
