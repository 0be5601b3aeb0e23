package adminapi_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/schemas"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func client(t *testing.T, server string) *adminapi.Client {
	t.Helper()
	c, err := adminapi.NewClient(server, "canary")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func serve(t *testing.T, h http.HandlerFunc) string {
	server := httptest.NewServer(h)
	t.Cleanup(server.Close)
	return server.URL
}

func reply(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	_ = json.NewEncoder(w).Encode(v)
}

func TestAddress(t *testing.T) {
	for server, want := range map[string]string{
		"http://h:1":               "http://h:1/api/v1",
		"http://h:1/":              "http://h:1/api/v1",
		"http://h:1/api/v1":        "http://h:1/api/v1",
		"https://h/ownllm/api/v1/": "https://h/ownllm/api/v1",
	} {
		if got := client(t, server).Address(); got != want {
			t.Errorf("%s: %s, want %s", server, got, want)
		}
	}
	for _, server := range []string{"", "h:1", "localhost", "ftp://h", "http://", "http://u:canary@h", "http://h?x=1", "http://h#x", "http://h\x7f"} {
		if _, err := adminapi.NewClient(server, ""); err == nil || strings.Contains(err.Error(), "canary") {
			t.Errorf("%s: %v", server, err)
		}
	}
}

func TestListFollowsItsPages(t *testing.T) {
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		var page adminapi.List[adminapi.User]
		switch q := r.URL.Query(); {
		case q.Get("tenant") != "a&b" || q.Get("limit") == "":
			http.Error(w, "query "+r.URL.RawQuery, http.StatusBadRequest)
			return
		case q.Get("after") == "":
			page = adminapi.List[adminapi.User]{Data: []adminapi.User{{ID: "usr_1"}, {ID: "usr_2"}}, HasMore: true, Next: "n/1"}
		case q.Get("after") == "n/1":
			page = adminapi.List[adminapi.User]{Data: []adminapi.User{{ID: "usr_3"}}}
		}
		reply(w, page)
	})
	users, err := client(t, url).Users(t.Context(), "a&b")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]adminapi.User{{ID: "usr_1"}, {ID: "usr_2"}, {ID: "usr_3"}}, users); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestListThatNeverEnds(t *testing.T) {
	url := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		reply(w, adminapi.List[adminapi.Key]{HasMore: true, Next: "same"})
	})
	if _, err := client(t, url).Keys(t.Context(), "", ""); err == nil || !strings.Contains(err.Error(), "leads nowhere") {
		t.Errorf("%v", err)
	}
}

func TestErrors(t *testing.T) {
	redirected := false
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/refused/api/v1/status":
			e := schemas.Errorf(schemas.CodeInvalidValue, "No \"slug\".").WithParam("slug")
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(e.Status())
			_, _ = w.Write(e.AppendJSON(nil))
		case "/tomorrow/api/v1/status":
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusConflict)
			fmt.Fprint(w, `{"error":{"message":"m","type":"t","param":null,"code":"code_of_tomorrow"}}`)
		case "/proxy/api/v1/status":
			http.Error(w, "<html>bad gateway canary</html>", http.StatusBadGateway)
		case "/other/api/v1/status":
			reply(w, []int{1})
		case "/html/api/v1/status":
			fmt.Fprint(w, "<html>")
		case "/null/api/v1/status":
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusInternalServerError)
			fmt.Fprint(w, `{"detail":"x"}`)
		case "/moved/api/v1/status":
			http.Redirect(w, r, "/elsewhere", http.StatusMovedPermanently)
		case "/elsewhere":
			redirected = true
		}
	})
	for path, want := range map[string]string{
		"/proxy": "502 Bad Gateway", "/other": "cannot unmarshal", "/html": "isn't of OwnLLM",
		"/null": "500 Internal Server Error", "/moved": "301 Moved Permanently",
	} {
		_, err := client(t, url+path).Status(t.Context())
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "canary") {
			t.Errorf("%s: %v", path, err)
		}
	}
	if redirected {
		t.Error("a redirect was followed")
	}

	var refused *schemas.Error
	_, err := client(t, url+"/refused").Status(t.Context())
	if !errors.As(err, &refused) || *refused != (schemas.Error{Code: schemas.CodeInvalidValue, Message: `No "slug".`, Param: "slug"}) {
		t.Errorf("refused: %#v", err)
	}
	if _, err = client(t, url+"/tomorrow").Status(t.Context()); !errors.As(err, &refused) || refused.Code != schemas.CodeInternalError ||
		!strings.Contains(refused.Message, "code_of_tomorrow") {
		t.Errorf("tomorrow: %v", err)
	}

	var away *adminapi.UnreachableError
	_, err = client(t, "http://127.0.0.1:1").Status(t.Context())
	if !errors.As(err, &away) || away.Address != "http://127.0.0.1:1/api/v1" || strings.Count(err.Error(), "127.0.0.1:1/") != 1 {
		t.Errorf("away: %v", err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err = client(t, url).Status(ctx); !errors.Is(err, context.Canceled) || errors.As(err, &away) {
		t.Errorf("cancelled: %v", err)
	}
}

// The wire form is a promise: this is its text.
func TestWireForm(t *testing.T) {
	for want, v := range map[string]any{
		`{"id":"key_1","tenant":"","tenant_slug":"","user":"","email":"","name":"","prefix":"sk-ownllm-ab","scopes":null,"budget_cents":null,"concurrency":0,"state":"active","created_at":"0001-01-01T00:00:00Z","expires_at":null,"revoked_at":null,"key":"sk-ownllm-abc"}`: adminapi.CreatedKey{
			Key: adminapi.Key{ID: "key_1", Prefix: "sk-ownllm-ab", State: "active"}, Secret: "sk-ownllm-abc",
		},
		`{"version":"v1","ready":true,"postgres":"ok","nats":"down","agents":[{"id":"agt_1","tenant":"ten_1","name":"gpu","host":"h","state":"up","last_seen":null,"running":1,"waiting":2,"slots":3,` +
			`"models":[{"id":"m","state":"cold","backend":"vllm","capabilities":{"completion":true,"vision":false,"embedding":false,"tools":false,"thinking":false},"context_window":8,"size_mb":9,"queued":1,"detail":"d"}]}]}`: adminapi.Status{
			Version: "v1", Ready: true, Postgres: "ok", NATS: "down", Agents: []adminapi.Agent{{
				ID: "agt_1", Tenant: "ten_1", Name: "gpu", Host: "h", State: "up", Running: 1, Waiting: 2, Slots: 3,
				Models: []adminapi.AgentModel{{
					ID: "m", State: "cold", Backend: "vllm", Capabilities: schemas.Capabilities{Completion: true},
					ContextWindow: 8, SizeMB: 9, Queued: 1, Detail: "d",
				}},
			}},
		},
		`{"data":[{"id":"ten_1","slug":"acme","name":"Acme","state":"active","qps":32,"created_at":"0001-01-01T00:00:00Z"}],"has_more":true,"next":"c"}`: adminapi.List[adminapi.Tenant]{
			Data: []adminapi.Tenant{{ID: "ten_1", Slug: "acme", Name: "Acme", State: "active", QPS: 32}}, HasMore: true, Next: "c",
		},
		`{"id":"m","tenant":"ten_1","state":"ready","capabilities":{"completion":false,"vision":false,"embedding":false,"tools":false,"thinking":false},` +
			`"context_window":0,"size_mb":0,"agents":null,"cents_per_1k_tokens":0.25}`: adminapi.Model{ID: "m", Tenant: "ten_1", State: "ready", CentsPer1kTokens: cents(250_000)},
		`{"model":"m","cents_per_1k_tokens":0,"updated_at":"0001-01-01T00:00:00Z"}`:    adminapi.Price{Model: "m"},
		`{"model":"m","cents_per_1k_tokens":null}`:                                     adminapi.SetPrice{Model: "m"},
		`{"requests":1,"prompt_tokens":2,"completion_tokens":3,"cost_cents":0.000001}`: adminapi.Usage{Requests: 1, PromptTokens: 2, CompletionTokens: 3, CostCents: 1},
		`{"tenant":"a","user":"b"}`:                                                    adminapi.CreateKey{Tenant: "a", User: "b"},
		`{}`:                                                                           adminapi.ChangeKey{},
		`{"budget_cents":null}`:                                                        adminapi.ChangeKey{BudgetCents: adminapi.Budget{Given: true}},
		`{"name":"","scopes":["model:*"],"budget_cents":0}`:                            adminapi.ChangeKey{Name: new(string), Scopes: []string{"model:*"}, BudgetCents: adminapi.Budget{Given: true, Cents: new(int64)}},
		`{"slug":"acme"}`:                                                              adminapi.CreateTenant{Slug: "acme"},
		`{"id":7,"at":"0001-01-01T00:00:00Z","actor":"admin","action":"a","kind":"k","object":"o","detail":{}}`: adminapi.AuditEntry{ID: 7, Actor: "admin", Action: "a", Kind: "k", Object: "o", Detail: []byte(`{}`)},
	} {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, string(b)); diff != "" {
			t.Errorf("%T, -want +got:\n%s", v, diff)
		}
	}
}

func cents(n adminapi.Cents) *adminapi.Cents { return &n }

// A budget can be a number, none, or not told.
func TestBudget(t *testing.T) {
	for text, want := range map[string]adminapi.Budget{
		`{}`:                      {},
		`{"budget_cents":null}`:   {Given: true},
		`{"budget_cents":0}`:      {Given: true, Cents: new(int64)},
		`{"budget_cents": null }`: {Given: true},
	} {
		var c adminapi.ChangeKey
		if err := json.Unmarshal([]byte(text), &c); err != nil {
			t.Errorf("%s: %v", text, err)
		}
		if diff := cmp.Diff(want, c.BudgetCents); diff != "" {
			t.Errorf("%s, -want +got:\n%s", text, diff)
		}
	}
	for _, text := range []string{`"5"`, `1.5`, `[]`, `{}`, `true`, `99999999999999999999`} {
		var c adminapi.ChangeKey
		var wrong *json.UnmarshalTypeError
		if err := json.Unmarshal([]byte(`{"budget_cents":`+text+`}`), &c); !errors.As(err, &wrong) || wrong.Field != "budget_cents" {
			t.Errorf("%s: %v, %+v", text, err, c)
		}
	}
}

// What makes something is sent again under its name when the connection fails, and
// whatever else isn't.
func TestCreatesAreTriedAgain(t *testing.T) {
	var mu sync.Mutex
	var names []string
	failing := 2
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		names = append(names, r.Method+" "+r.URL.Path+" "+r.Header.Get(adminapi.IdempotencyHeader))
		if len(names) <= failing {
			panic(http.ErrAbortHandler) // the connection breaks
		}
		reply(w, struct{}{})
	})
	tries := func(fail int, ask func(*adminapi.Client) error) ([]string, error) {
		mu.Lock()
		names, failing = nil, fail
		mu.Unlock()
		c := client(t, url)
		err := ask(c)
		mu.Lock()
		defer mu.Unlock()
		return names, err
	}
	seen := map[string]bool{}
	for what, ask := range map[string]func(*adminapi.Client) error{
		"/tenants": func(c *adminapi.Client) error {
			_, err := c.CreateTenant(t.Context(), adminapi.CreateTenant{})
			return err
		},
		"/users": func(c *adminapi.Client) error {
			_, err := c.CreateUser(t.Context(), adminapi.CreateUser{})
			return err
		},
		"/keys": func(c *adminapi.Client) error {
			_, err := c.CreateKey(t.Context(), adminapi.CreateKey{})
			return err
		},
		"/keys/key_1/rotate": func(c *adminapi.Client) error {
			_, err := c.RotateKey(t.Context(), "key_1", adminapi.RotateKey{})
			return err
		},
	} {
		names, err := tries(2, ask)
		if err != nil || len(names) < 3 || !strings.HasPrefix(names[0], "POST /api/v1"+what+" ") || len(names[0]) < len("POST /api/v1"+what+" ")+20 {
			t.Errorf("%s: %v, %v", what, names, err)
		}
		for _, name := range names {
			if name != names[0] {
				t.Errorf("%s: another name: %v", what, names)
			}
		}
		if seen[names[0]] {
			t.Errorf("%s: an old name", what)
		}
		seen[names[0]] = true

		var away *adminapi.UnreachableError
		if names, err := tries(1000, ask); !errors.As(err, &away) || len(names) < 3 {
			t.Errorf("%s: %v, %v", what, names, err)
		}
	}
	names, err := tries(1, func(c *adminapi.Client) error {
		_, err := c.ChangeTenant(t.Context(), "a/b", adminapi.ChangeTenant{})
		return err
	})
	if err == nil || len(names) != 1 || names[0] != "PATCH /api/v1/tenants/a/b " {
		t.Errorf("a change: %v, %v", names, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if names, err := tries(1000, func(c *adminapi.Client) error {
		_, err := c.CreateTenant(ctx, adminapi.CreateTenant{})
		return err
	}); !errors.Is(err, context.Canceled) || len(names) != 0 {
		t.Errorf("interrupted: %v, %v", names, err)
	}
}

func TestUsageAsksForWhatIsWanted(t *testing.T) {
	var got string
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		got = r.URL.RawQuery
		reply(w, adminapi.List[adminapi.Usage]{Data: someUsage})
	})
	since := time.Date(2026, 11, 1, 1, 0, 0, 500, time.FixedZone("", 3600))
	for want, f := range map[string]adminapi.UsageFilter{
		"limit=500": {},
		"by=key%2Cday&key=key_1&limit=500&model=a%2Fb&since=2026-11-01T00%3A00%3A00.0000005Z&tenant=acme&until=2026-11-01T01%3A00%3A00.0000005Z&user=u": {
			Tenant: "acme", User: "u", Key: "key_1", Model: "a/b", Since: since, Until: since.Add(time.Hour), By: []string{"key", "day"},
		},
	} {
		rows, err := client(t, url).Usage(t.Context(), f)
		if err != nil || got != want {
			t.Errorf("%v: asked %s, want %s", err, got, want)
		}
		if diff := cmp.Diff(someUsage, rows); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
	}
}

func TestReady(t *testing.T) {
	dir := t.TempDir()
	if _, err := adminapi.ReadReady(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	first := adminapi.Ready{
		PID: 1, BaseURL: "http://127.0.0.1:9191/v1", APIKey: "canary", AdminURL: "http://127.0.0.1:9191/api/v1", AdminToken: "canary",
		OpsURL: "http://127.0.0.1:9192", NATSURL: "nats://127.0.0.1:4222", DatabaseURL: "postgres://canary",
	}
	second := first
	second.PID, second.Models = 2, []string{"demo"}
	for _, r := range []adminapi.Ready{first, second} {
		if err := r.Write(dir); err != nil {
			t.Fatal(err)
		}
	}
	info, err := os.Stat(filepath.Join(dir, adminapi.ReadyFile))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	b, _ := os.ReadFile(filepath.Join(dir, adminapi.ReadyFile))
	var fields map[string]any
	if err := json.Unmarshal(b, &fields); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"pid", "base_url", "api_key", "admin_url", "admin_token", "ops_url", "nats_url", "database_url", "models"} {
		if _, ok := fields[name]; !ok {
			t.Errorf("no field %s", name)
		}
	}
	if len(fields) != 9 {
		t.Errorf("fields: %v", fields)
	}
	got, err := adminapi.ReadReady(dir)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(second, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}

	if err := first.Remove(dir); err != nil { // the file is the second's by now
		t.Fatal(err)
	}
	if _, err := adminapi.ReadReady(dir); err != nil {
		t.Errorf("a process removed its successor's file: %v", err)
	}
	for range 2 {
		if err := second.Remove(dir); err != nil {
			t.Fatal(err)
		}
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}

	if err := first.Write(filepath.Join(dir, "none")); err == nil {
		t.Error("wrote into a directory that isn't there")
	}
	if err := os.Mkdir(filepath.Join(dir, adminapi.ReadyFile), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := first.Write(dir); err == nil {
		t.Error("wrote over a directory")
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("a failed write left behind: %v", left)
	}
}

func TestReadyKeepsItsSecretsOutOfTheLog(t *testing.T) {
	var out strings.Builder
	slog.New(slog.NewTextHandler(&out, nil)).Info("ready", "ready", adminapi.Ready{PID: 7, APIKey: "canary", AdminToken: "canary", DatabaseURL: "canary"})
	if strings.Contains(out.String(), "canary") || !strings.Contains(out.String(), "ready.pid=7") {
		t.Errorf("%s", out.String())
	}
}
