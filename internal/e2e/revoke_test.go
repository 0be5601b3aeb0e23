package e2e

import (
	"context"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/internal/secret"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// TestChangesEndRunningReplies revokes, deactivates and suspends at one edge while replies
// run at three: those that have begun end with the error in the stream, the others with
// its status, and what came is paid for.
func TestChangesEndRunningReplies(t *testing.T) {
	c := startThreeEdges(t)
	setPrice(t, c.Cluster, demo.ModelID, books.MicroCents)
	api, err := adminapi.NewClient("http://"+c.edges[0].Addr+adminapi.Prefix, secret.String(stack.AdminToken))
	if err != nil {
		t.Fatal(err)
	}
	defer api.Close()
	tenant, user := newTenant(t, c.Cluster, "doomed", 1000)
	c.StartWorkerOf(tenant.ID, c.backend.URL)
	ctx, cancel := context.WithTimeout(t.Context(), raceTime)
	defer cancel()
	const slack = 2 * time.Second // for a busy machine, on top of the second
	for _, change := range []struct {
		name string
		code schemas.Code
		do   func(books.Key) error
		undo func() error
	}{
		{"revocation", schemas.CodeKeyInvalid, func(k books.Key) error { _, err := api.RevokeKey(ctx, k.ID); return err }, nil},
		{
			"deactivation", schemas.CodeUserDeactivated,
			func(books.Key) error { _, err := api.DeactivateUser(ctx, user.ID); return err },
			func() error { _, err := api.ActivateUser(ctx, user.ID); return err },
		},
		{
			"suspension", schemas.CodeTenantDisabled,
			func(books.Key) error { _, err := api.SuspendTenant(ctx, tenant.Slug); return err },
			func() error { _, err := api.ResumeTenant(ctx, tenant.Slug); return err },
		},
		{"rotation without an overlap", schemas.CodeKeyExpired, func(k books.Key) error { _, err := api.RotateKey(ctx, k.ID, adminapi.RotateKey{}); return err }, nil},
	} {
		t.Run(change.name, func(t *testing.T) {
			k, shown, err := c.Books.CreateKey(ctx, books.NewKey{Tenant: tenant.Slug, User: string(user.ID), BudgetCents: new(int64(1000))})
			if err != nil {
				t.Fatal(err)
			}
			awaitModel(t, c.edges, shown.Reveal(), demo.ModelID)
			before := c.backend.Stats()
			clients := clientsOf(t, c.edges, shown.Reveal())
			// At each edge one that streams, one whose first token is far away, one that
			// comes in one piece.
			kinds := []struct {
				stream bool
				status int
				fields map[string]any
			}{
				{true, http.StatusOK, priced(t, 10_000, map[string]any{"tokens_per_second": 20})},
				{true, change.code.Info().Status, priced(t, 10, map[string]any{"first_token_ms": 100_000})},
				{false, change.code.Info().Status, priced(t, 10_000, map[string]any{"tokens_per_second": 20})},
			}
			n := len(kinds) * len(clients)
			took := make([]time.Duration, n)
			changed := make(chan time.Time, 1)
			var begun sync.Map // of the streams, those that have brought a token
			go func() {
				stack.Until(t, 30*time.Second, "replies to run", func() bool {
					streams := 0
					begun.Range(func(any, any) bool { streams++; return true })
					s := c.backend.Stats()
					return s.Active == int64(n) && s.Tokens > before.Tokens+20 && streams == len(clients) || ctx.Err() != nil
				})
				now := time.Now()
				if err := change.do(k); err != nil {
					t.Error(err)
				}
				changed <- now
			}()
			replies := together(n, func(i int) reply {
				kind := kinds[i/len(clients)]
				r := clients[i%len(clients)].follow(ctx, kind.stream, kind.fields, func(r *reply) {
					if r.text != "" {
						begun.Store(i, true)
					}
				})
				took[i] = time.Duration(time.Now().UnixNano())
				return r
			})
			at := <-changed
			var last time.Duration
			for i, r := range replies {
				if kind := kinds[i/len(clients)]; r.status != kind.status || r.code() != string(change.code) || r.broken != nil || r.done {
					t.Errorf("request %d ended with status %d, error %+v, broken %v, want %d %s", i, r.status, r.err, r.broken, kind.status, change.code)
				}
				last = max(last, took[i]-time.Duration(at.UnixNano()))
			}
			if last > time.Second+slack {
				t.Errorf("the last reply ended %s after the change", last)
			}
			entries := c.ledger.wantClosed(k.ID, 30*time.Second)
			for i, r := range replies {
				e, ok := entries[r.request()]
				if !ok || e.Outcome != "error" || e.Completion < int64(tokensOf(r.text)) || i >= len(clients) && e.Cost != 0 {
					t.Errorf("request %d got %d tokens, and the ledger has %+v, %v", i, tokensOf(r.text), e, ok)
				}
			}
			stack.Until(t, 30*time.Second, "the backend to be idle", func() bool { return c.backend.Stats().Active == 0 })
			if change.undo != nil {
				if err := change.undo(); err != nil {
					t.Error(err)
				}
			}
			t.Logf("the last of %d replies ended %s after the change", n, last.Round(time.Millisecond))
		})
	}
}
