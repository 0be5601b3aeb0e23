package e2e

import (
	"context"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/worker/demo"
)

// rateHeaders are what an answer tells of a key's limits; empty: it doesn't tell.
type rateHeaders struct{ limit, remaining, reset, tokens, tokensLeft string }

func rateHeadersOf(h http.Header) rateHeaders {
	return rateHeaders{
		h.Get("X-RateLimit-Limit-Requests"), h.Get("X-RateLimit-Remaining-Requests"), h.Get("X-RateLimit-Reset-Requests"),
		h.Get("X-RateLimit-Limit-Tokens-Monthly"), h.Get("X-RateLimit-Remaining-Tokens-Monthly"),
	}
}

// TestAnswersTellLimits looks at the headers of every route, where it succeeds and where it
// fails.
func TestAnswersTellLimits(t *testing.T) {
	const cents, slots, price = 7, 3, 2 * books.MicroCents // for 1,000 tokens
	backend := stack.StartBackend(t, demo.Options{})
	c := stack.StartCluster(t)
	c.StartWorker(backend.URL)
	edge := c.StartEdge()
	setPrice(t, c, demo.ModelID, price)
	key := func(n books.NewKey) string {
		n.Concurrency = new(slots)
		_, secret := newKey(t, c, n)
		return secret
	}
	budget := new(int64(cents))
	rich, free := key(books.NewKey{BudgetCents: budget}), key(books.NewKey{})
	awaitModel(t, []*stack.Edge{edge}, rich, demo.ModelID)
	_, empty := newTenant(t, c, "empty", 100)
	ok := `{"model":"demo","max_tokens":5,"messages":[{"role":"user","content":"Hi"}],"demo":{"tokens":5}`
	for _, test := range []struct {
		name         string
		key          string
		method, path string
		body         string
		status       int
		tells, money bool
	}{
		{"reply", rich, "POST", "/chat/completions", ok + `}`, 200, true, true},
		{"stream", rich, "POST", "/chat/completions", ok + `,"stream":true}`, 200, true, true},
		{"reply to a key without a budget", free, "POST", "/chat/completions", ok + `}`, 200, true, false},
		{"models", rich, "GET", "/models", "", 200, true, false},
		{"model", rich, "GET", "/models/demo", "", 200, true, true},
		{"model, to a key without a budget", free, "GET", "/models/demo", "", 200, true, false},
		{"backend that fails", key(books.NewKey{BudgetCents: budget}), "POST", "/chat/completions", strings.Replace(ok, `"tokens":5}`, `"status":500}`, 1) + `}`, 502, true, true},
		{"no JSON", rich, "POST", "/chat/completions", `{`, 400, true, false},
		{"no messages", rich, "POST", "/chat/completions", `{"model":"demo"}`, 400, true, false},
		{"no such model", rich, "POST", "/chat/completions", strings.Replace(ok, `"demo"`, `"gpt"`, 1) + `}`, 404, true, false},
		{"no such model, model", rich, "GET", "/models/gpt", "", 404, true, false},
		{"out of scope", key(books.NewKey{BudgetCents: budget, Scopes: []string{"model:x"}}), "POST", "/chat/completions", ok + `}`, 403, true, true},
		{"out of scope, model", key(books.NewKey{BudgetCents: budget, Scopes: []string{"model:x"}}), "GET", "/models/demo", "", 403, true, true},
		{"out of budget", key(books.NewKey{BudgetCents: new(int64(0))}), "POST", "/chat/completions", ok + `}`, 429, true, true},
		{"no agent", key(books.NewKey{Tenant: "empty", User: string(empty.ID)}), "GET", "/models", "", 503, true, false},
		{"no agent, chat", key(books.NewKey{Tenant: "empty", User: string(empty.ID)}), "POST", "/chat/completions", ok + `}`, 404, true, false},
		{"nobody's key", apikey.New().Reveal(), "POST", "/chat/completions", ok + `}`, 401, false, false},
		{"nobody's key, models", apikey.New().Reveal(), "GET", "/models", "", 401, false, false},
		{"no key", "x", "POST", "/chat/completions", ok + `}`, 401, false, false},
		{"no such route", rich, "GET", "/nothing", "", 404, false, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			req, err := http.NewRequestWithContext(t.Context(), test.method, edge.BaseURL+test.path, strings.NewReader(test.body))
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Authorization", "Bearer "+test.key)
			transport := &http.Transport{}
			defer transport.CloseIdleConnections()
			resp, err := (&http.Client{Transport: transport}).Do(req)
			if err != nil {
				t.Fatal(err)
			}
			_ = resp.Body.Close()
			got := rateHeadersOf(resp.Header)
			if resp.StatusCode != test.status {
				t.Fatalf("status %d, want %d", resp.StatusCode, test.status)
			}
			if !test.tells {
				if got != (rateHeaders{}) {
					t.Errorf("headers %+v", got)
				}
				return
			}
			left, err := strconv.Atoi(got.remaining)
			if got.limit != strconv.Itoa(slots) || err != nil || left < slots-1 || left > slots {
				t.Errorf("requests: %+v, want %d of %d", got, slots, slots)
			}
			reset, err := strconv.ParseInt(got.reset, 10, 64)
			if d := time.Since(time.Unix(reset, 0)); err != nil || d < -2*time.Second || d > 5*time.Second {
				t.Errorf("reset %q", got.reset)
			}
			if !test.money {
				if got.tokens != "" || got.tokensLeft != "" {
					t.Errorf("tokens: %+v", got)
				}
				return
			}
			most := cents * books.MicroCents / (price / 1000)
			if test.status == 429 {
				most = 0
			}
			tokens, err := strconv.Atoi(got.tokensLeft)
			if got.tokens != strconv.Itoa(most) || err != nil || tokens > most || tokens < most-most/5 {
				t.Errorf("tokens: %+v, want %d", got, most)
			}
		})
	}
}

// TestHeadersCount follows the numbers of the headers while requests come and go.
func TestHeadersCount(t *testing.T) {
	const slots = 3
	c := startThreeEdges(t)
	setPrice(t, c.Cluster, demo.ModelID, tabPrice)
	key, secret := newKey(t, c.Cluster, books.NewKey{BudgetCents: new(int64(10)), Concurrency: new(slots)})
	clients := clientsOf(t, c.edges, secret)
	tokens := tab - promptBound(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var flying []chan reply
	for i := range slots {
		ended := make(chan reply, 1)
		go func() {
			ended <- clients[i].chat(ctx, true, limited(priced(t, tokens, map[string]any{"first_token_ms": 60_000}), tokens))
		}()
		flying = append(flying, ended)
		c.ledger.until(20*time.Second, "the request to be admitted", key, func(h holding) bool { return h.InFlight == i+1 })
	}
	r := clients[0].chat(ctx, true, limited(priced(t, tokens, nil), tokens))
	want429(t, r, "concurrency_limit")
	got := rateHeadersOf(r.header)
	reset, err := strconv.ParseInt(got.reset, 10, 64)
	if d := time.Until(time.Unix(reset, 0)); err != nil || d < -2*time.Second || d > 2*time.Second {
		t.Errorf("reset %q", got.reset)
	}
	if got.limit != "3" || got.remaining != "0" || got.tokens != strconv.Itoa(10*tab) || got.tokensLeft != strconv.Itoa(7*tab) {
		t.Errorf("with all slots taken: %+v", got)
	}
	cancel()
	for _, ended := range flying {
		<-ended
	}
	c.ledger.wantClosed(key, 30*time.Second)
	for i := range 4 {
		r := clients[i%3].chat(t.Context(), i%2 == 0, limited(priced(t, tokens, nil), tokens))
		wantWhole(t, r)
		if got := rateHeadersOf(r.header); got.limit != "3" || got.remaining != "2" || got.tokensLeft == "" {
			t.Errorf("alone: %+v", got)
		}
		// Who has slots left isn't kept waiting for the books at the end of a reply.
		c.ledger.until(20*time.Second, "the slot to be back", key, func(h holding) bool { return h.InFlight == 0 })
	}
}
