package e2e

import (
	"context"
	"math/rand/v2"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/chat"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// count is how often something is done: seldom in an ordinary run, and as often as it
// takes to believe in it if OWNLLM_FULL is set, as `make limits` does.
func count(seldom, often int) int {
	if os.Getenv("OWNLLM_FULL") != "" {
		return often
	}
	return seldom
}

const (
	// tab is how many tokens a priced request of these tests comes to, prompt and reply,
	// and tabPrice the price of 1,000 that makes it cost one cent.
	tab      = 200
	tabPrice = books.MicroCents * 1000 / tab
)

// promptBound is how many tokens are reserved for the prompt of every chatBody.
func promptBound(t *testing.T) int {
	t.Helper()
	req, err := chat.Parse(string(chatBody(false, nil)))
	if err != nil {
		t.Fatal(err)
	}
	return int(req.PromptBound())
}

// priced are the fields of a request whose prompt has as many tokens as are reserved for
// it, and whose reply has as many as given.
func priced(t *testing.T, tokens int, extra map[string]any) map[string]any {
	t.Helper()
	fields := map[string]any{"prompt_tokens": promptBound(t), "tokens": tokens, "numbered": true}
	for k, v := range extra {
		fields[k] = v
	}
	return map[string]any{"demo": fields}
}

// limited adds the limit of tokens to a request.
func limited(fields map[string]any, tokens int) map[string]any {
	with := map[string]any{"max_tokens": tokens}
	for k, v := range fields {
		with[k] = v
	}
	return with
}

// newKey makes a key of a tenant of the cluster, by default of the first one.
func newKey(t *testing.T, c *stack.Cluster, n books.NewKey) (schemas.KeyID, string) {
	t.Helper()
	if n.Tenant == "" {
		n.Tenant, n.User = string(c.Tenant.ID), string(c.User.ID)
	}
	k, secret, err := c.Books.CreateKey(t.Context(), n)
	if err != nil {
		t.Fatal(err)
	}
	return k.ID, secret.Reveal()
}

// newTenant makes a tenant with a user.
func newTenant(t *testing.T, c *stack.Cluster, slug string, qps int) (books.Tenant, books.User) {
	t.Helper()
	tenant, err := c.Books.CreateTenant(t.Context(), books.NewTenant{Slug: slug, QPS: &qps})
	if err != nil {
		t.Fatal(err)
	}
	user, err := c.Books.CreateUser(t.Context(), books.NewUser{Tenant: slug, Email: "ada@example.com"})
	if err != nil {
		t.Fatal(err)
	}
	return tenant, user
}

// setPrice sets the price of 1,000 tokens of a model, in micro-cents.
func setPrice(t *testing.T, c *stack.Cluster, model string, price int64) {
	t.Helper()
	if _, err := c.Books.SetPrice(t.Context(), "", model, price); err != nil {
		t.Fatal(err)
	}
}

// awaitModel waits until the edges know an agent with the model.
func awaitModel(t *testing.T, edges []*stack.Edge, key, model string) {
	t.Helper()
	for _, e := range edges {
		stack.Until(t, 30*time.Second, "the edge to know the model", func() bool {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, e.BaseURL+"/models/"+model, nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Authorization", "Bearer "+key)
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			_ = resp.Body.Close()
			return resp.StatusCode == http.StatusOK
		})
	}
	http.DefaultClient.CloseIdleConnections()
}

// clientsOf are a client for each edge.
func clientsOf(t *testing.T, edges []*stack.Edge, key string) []*client {
	var list []*client
	for _, e := range edges {
		c := newClient(e.BaseURL, key)
		t.Cleanup(c.close)
		list = append(list, c)
	}
	return list
}

// obedient sends a request until it is let in or told not to come again, and waits in
// between for as long as it is told to, and a little longer, as SDKs do.
func (c *client) obedient(ctx context.Context, stream bool, fields map[string]any) reply {
	for {
		r := c.chat(ctx, stream, fields)
		if r.status != http.StatusTooManyRequests || r.header.Get("X-Should-Retry") == "false" {
			return r
		}
		seconds, err := strconv.Atoi(r.header.Get("Retry-After"))
		if err != nil {
			return r
		}
		select {
		case <-time.After(time.Duration(seconds)*time.Second + rand.N(200*time.Millisecond)):
		case <-ctx.Done():
			return r
		}
	}
}

// tokensOf is how many tokens of a numbered reply came.
func tokensOf(text string) int { return strings.Count(text, " ") }

// want429 fails the test unless the reply is a refusal of the given code, with the
// headers that go with it.
func want429(t *testing.T, r reply, code schemas.Code) {
	t.Helper()
	if r.status != http.StatusTooManyRequests || r.code() != string(code) {
		t.Errorf("got status %d, error %+v, broken %v, want %s", r.status, r.err, r.broken, code)
		return
	}
	after, err := strconv.Atoi(r.header.Get("Retry-After"))
	switch {
	case err != nil:
		t.Errorf("%s: Retry-After %q", code, r.header.Get("Retry-After"))
	case code != schemas.CodeBudgetExceeded:
		if after != 1 || r.header.Get("X-Should-Retry") != "" {
			t.Errorf("%s: Retry-After %d, X-Should-Retry %q", code, after, r.header.Get("X-Should-Retry"))
		}
	default:
		now := time.Now().UTC()
		month := time.Date(now.Year(), now.Month()+1, 1, 0, 0, 0, 0, time.UTC)
		if d := month.Sub(now) - time.Duration(after)*time.Second; d < -10*time.Second || d > 10*time.Second {
			t.Errorf("%s: Retry-After %d, but the month ends in %s", code, after, month.Sub(now))
		}
		if r.header.Get("X-Should-Retry") != "false" {
			t.Errorf("%s: X-Should-Retry %q", code, r.header.Get("X-Should-Retry"))
		}
	}
}

// threeEdges is a cluster of three edges and a worker that serves the demo model.
type threeEdges struct {
	*stack.Cluster
	backend *stack.Backend
	edges   []*stack.Edge
	ledger  *ledger
}

func startThreeEdges(t *testing.T, edgeArgs ...string) *threeEdges {
	t.Helper()
	c := &threeEdges{backend: stack.StartBackend(t, demo.Options{}), Cluster: stack.StartCluster(t)}
	c.StartWorker(c.backend.URL)
	c.edges = c.StartEdges(3, edgeArgs...)
	awaitModel(t, c.edges, c.Key.Reveal(), demo.ModelID)
	c.ledger = openLedger(t, c.DatabaseURL)
	return c
}
