package command

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/alecthomas/kong"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/schemas"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	testToken  = "canary-admin-token"
	testSecret = "sk-ownllm-canarycanarycanarycan"
	usrID      = "usr_01KAMPZ6V9J3M8R5T2W7X4Y0QB"
	keyID      = "key_01KAMPZ6V9J3M8R5T2W7X4Y0QB"
	agentID    = "agt_01KAMPZ6V9J3M8R5T2W7X4Y0QB"
	tenantID   = "ten_01KAMPZ6V9J3M8R5T2W7X4Y0QB"

	testPairing    = "ownllm_pair_c0ffeec0ffeec0ffeec0ffeec0ffeec0"
	testCredential = "ownllm_agent_canarycanarycanarycanarycanarycana"
)

// result is what a run of the command line leaves behind.
type result struct {
	code           int
	stdout, stderr string
}

// run runs the command line with an environment of its own.
func run(t *testing.T, env map[string]string, args ...string) result {
	t.Helper()
	return runIn(t.Context(), env, "", args...)
}

func runIn(ctx context.Context, env map[string]string, stdin string, args ...string) result {
	var stdout, stderr bytes.Buffer
	code := Main(ctx, args, strings.NewReader(stdin), &stdout, &stderr, func(name string) string { return env[name] })
	return result{code, stdout.String(), stderr.String()}
}

// admin is an edge's admin API with fixed replies, which records what it is asked.
type admin struct {
	*httptest.Server
	mu       sync.Mutex // guards the fields below
	requests []string   // method, path, query and body
	bearers  map[string]bool
	replies  map[string]any // by method and path; a *schemas.Error is refused
}

func newAdmin(t *testing.T, replies map[string]any) *admin {
	a := &admin{bearers: map[string]bool{}, replies: replies}
	a.Server = httptest.NewServer(a)
	t.Cleanup(a.Close)
	return a
}

func (a *admin) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.requests = append(a.requests, strings.TrimSpace(r.Method+" "+r.URL.RequestURI()+" "+string(body)))
	a.bearers[r.Header.Get("Authorization")] = true
	w.Header().Set("Content-Type", "application/json")
	reply, ok := a.replies[r.Method+" "+r.URL.EscapedPath()]
	if !ok {
		reply = schemas.Errorf(schemas.CodeNotFound, "There is no %s %s.", r.Method, r.URL.Path)
	}
	if e, refused := reply.(*schemas.Error); refused {
		w.WriteHeader(e.Status())
		_, _ = w.Write(e.AppendJSON(nil))
		return
	}
	_ = json.NewEncoder(w).Encode(reply)
}

// env addresses the server.
func (a *admin) env() map[string]string {
	return map[string]string{"OWNLLM_SERVER": a.URL, "OWNLLM_ADMIN_TOKEN": testToken}
}

func (a *admin) asked() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.requests
}

var (
	at      = time.Date(2026, 11, 22, 18, 4, 5, 0, time.UTC)
	later   = time.Date(2026, 11, 23, 18, 4, 5, 0, time.UTC)
	aTenant = adminapi.Tenant{ID: "ten_1", Slug: "acme", Name: "Acme Inc.", State: adminapi.TenantActive, QPS: 32, CreatedAt: at}
	aUser   = adminapi.User{ID: usrID, Tenant: "ten_1", TenantSlug: "acme", Email: "ada@example.com", State: adminapi.UserActive, CreatedAt: at}
	aKey    = adminapi.Key{
		ID: keyID, Tenant: "ten_1", TenantSlug: "acme", User: usrID, Email: "ada@example.com", Name: "laptop",
		Prefix: "sk-ownllm-ca", Scopes: []string{"model:*"}, BudgetCents: new(int64(500)), Concurrency: 32, State: adminapi.KeyActive, CreatedAt: at, ExpiresAt: &later,
	}
	lastSeen = time.Now().Add(-150 * time.Minute)
	anAgent  = adminapi.Agent{
		ID: "agt_1", Tenant: "ten_1", TenantSlug: "acme", Name: "gpu-1", Host: "rack\x1b[31m", State: adminapi.AgentUp,
		LastSeen: &lastSeen, Running: 2, Waiting: 3, Slots: 4,
		Models: []adminapi.AgentModel{
			{ID: "llama-3.3-70b", State: schemas.ModelReady, Backend: "vllm", ContextWindow: 131072, Queued: 5},
			{ID: "qwen2.5:32b", State: schemas.ModelFailed, Backend: "ollama", Detail: "out of\nmemory"},
		},
		Machine: &adminapi.Machine{VRAMMB: 24564, RAMMB: 65536, CPUCores: 16, GPU: "RTX\x1b[31m", OS: "linux/amd64"},
	}
	aPairing = adminapi.Pairing{ID: "pai_1", Tenant: "ten_1", TenantSlug: "acme", Secret: testPairing, CreatedAt: at, ExpiresAt: later}
	aModel   = adminapi.Model{
		ID: "llama-3.3-70b", Tenant: "ten_1", State: schemas.ModelReady, ContextWindow: 131072, SizeMB: 40000,
		Capabilities: schemas.Capabilities{Completion: true, Tools: true}, Agents: []schemas.AgentID{"agt_1", "agt_2"},
		CentsPer1kTokens: new(adminapi.Cents(250_000)),
	}
	aPrice = adminapi.Price{Model: "llama-3.3-70b", CentsPer1kTokens: 250_000, UpdatedAt: at}
	usage  = []adminapi.Usage{
		{Tenant: "ten_1", TenantSlug: "acme", Key: keyID, KeyName: "laptop", KeyPrefix: "sk-ownllm-ab12", Model: "llama-3.3-70b", Requests: 1200, PromptTokens: 50_000, CompletionTokens: 7, CostCents: 12_501_750},
		{Tenant: "ten_1", TenantSlug: "acme", Key: "key_2", KeyName: "=1+1", Model: "demo", Requests: 1, CostCents: 0},
	}
	anEntry = adminapi.AuditEntry{ID: 7, At: at, Actor: "admin", Request: "req_1", Address: "203.0.113.7", Action: "tenant.set", Kind: "tenant", Object: "ten_1", Tenant: "ten_1", TenantSlug: "acme", Detail: []byte(`{"qps":{"old":32,"new":5}}`)}
	aStatus = adminapi.Status{Version: "v1.2.3", Ready: true, Postgres: "ok", NATS: "ok", Agents: []adminapi.Agent{anAgent}}
)

func page[T any](data ...T) adminapi.List[T] { return adminapi.List[T]{Data: data} }

func TestCommands(t *testing.T) {
	const created = "2026-11-22 18:04:05 UTC"
	const tenantTable = "SLUG  ID     NAME       STATE   QPS  CREATED\nacme  ten_1  Acme Inc.  active  32   " + created + "\n"
	const keyTable = "KEY            ID                              NAME    TENANT  USER             STATE   SCOPES   CENTS/MONTH  CONCURRENCY  EXPIRES\n" +
		"sk-ownllm-ca…  " + keyID + "  laptop  acme    ada@example.com  active  model:*  500          32           2026-11-23 18:04:05 UTC\n"
	const keyShown = "key        " + testSecret + "\nid         " + keyID + "\nname       laptop\ntenant     acme\nuser       ada@example.com\n" +
		"scopes     model:*\nbudget     500 cents a month\nin flight  32 requests at most\nexpires    2026-11-23 18:04:05 UTC\n\nStore the key now: it can't be shown again.\n"
	const priceTable = "MODEL          FOR           CENTS/1K TOKENS  SET\nllama-3.3-70b  every tenant  0.25             " + created + "\n"
	for name, tc := range map[string]struct {
		args  []string
		reply any
		asked string
		want  string
	}{
		"tenants create": {
			[]string{"tenants", "create", "--slug", "acme"}, aTenant,
			`POST /api/v1/tenants {"slug":"acme"}`,
			tenantTable,
		},
		"tenants create in full": {
			[]string{"tenants", "create", "--slug", "acme", "--name", "Acme Inc.", "--qps", "32"}, aTenant,
			`POST /api/v1/tenants {"slug":"acme","name":"Acme Inc.","qps":32}`, tenantTable,
		},
		"tenants set": {
			[]string{"tenants", "set", "acme", "--name=", "--qps", "5"}, aTenant, `PATCH /api/v1/tenants/acme {"name":"","qps":5}`, tenantTable,
		},
		"tenants list": {
			[]string{"tenants", "list"}, page(aTenant), "GET /api/v1/tenants?limit=500",
			tenantTable,
		},
		"tenants suspend": {
			[]string{"tenants", "suspend", "acme"}, aTenant, "POST /api/v1/tenants/acme/suspend",
			tenantTable,
		},
		"tenants resume": {
			[]string{"tenants", "resume", "a/b"}, aTenant, "POST /api/v1/tenants/a%2Fb/resume",
			tenantTable,
		},
		"users create": {
			[]string{"users", "create", "--tenant", "acme", "--email", "ada@example.com"}, aUser,
			`POST /api/v1/users {"tenant":"acme","email":"ada@example.com"}`,
			"EMAIL            ID                              TENANT  STATE   CREATED\nada@example.com  " + usrID + "  acme    active  " + created + "\n",
		},
		"users list": {
			[]string{"users", "list", "--tenant", "acme"}, page[adminapi.User](), "GET /api/v1/users?limit=500&tenant=acme",
			"EMAIL  ID  TENANT  STATE  CREATED\n",
		},
		"users deactivate": {
			[]string{"users", "deactivate", usrID}, aUser, "POST /api/v1/users/" + usrID + "/deactivate",
			"EMAIL            ID                              TENANT  STATE   CREATED\nada@example.com  " + usrID + "  acme    active  " + created + "\n",
		},
		"users activate": {
			[]string{"users", "activate", usrID}, aUser, "POST /api/v1/users/" + usrID + "/activate",
			"EMAIL            ID                              TENANT  STATE   CREATED\nada@example.com  " + usrID + "  acme    active  " + created + "\n",
		},
		"keys create": {
			[]string{"keys", "create", "--tenant", "acme", "--user", "ada@example.com", "--name", "laptop", "--scope", "model:a", "--scope", "model:b:7b", "--ttl", "24h"},
			adminapi.CreatedKey{Key: aKey, Secret: testSecret},
			`POST /api/v1/keys {"tenant":"acme","user":"ada@example.com","name":"laptop","scopes":["model:a","model:b:7b"],"ttl_seconds":86400}`,
			keyShown,
		},
		"keys create with limits": {
			[]string{"keys", "create", "--tenant", "acme", "--user", "ada@example.com", "--budget-cents", "500", "--concurrency", "32", "--ttl", "1d12h"},
			adminapi.CreatedKey{Key: aKey, Secret: testSecret},
			`POST /api/v1/keys {"tenant":"acme","user":"ada@example.com","budget_cents":500,"concurrency":32,"ttl_seconds":129600}`, keyShown,
		},
		"keys create with no budget": {
			[]string{"keys", "create", "--tenant", "acme", "--user", "ada@example.com", "--budget-cents", "none"},
			adminapi.CreatedKey{Key: aKey, Secret: testSecret}, `POST /api/v1/keys {"tenant":"acme","user":"ada@example.com"}`, keyShown,
		},
		"keys set": {
			[]string{"keys", "set", keyID, "--budget-cents", "0", "--concurrency", "1", "--scope", "model:a", "--scope", "model:b", "--name", "x"}, aKey,
			`PATCH /api/v1/keys/` + keyID + ` {"name":"x","scopes":["model:a","model:b"],"budget_cents":0,"concurrency":1}`, keyTable,
		},
		"keys set no budget": {
			[]string{"keys", "set", keyID, "--budget-cents", "none"}, aKey, `PATCH /api/v1/keys/` + keyID + ` {"budget_cents":null}`, keyTable,
		},
		"keys rotate": {
			[]string{"keys", "rotate", keyID}, adminapi.CreatedKey{Key: aKey, Secret: testSecret}, `POST /api/v1/keys/` + keyID + `/rotate {}`,
			keyShown + "The old one has stopped working.\n",
		},
		"keys rotate with overlap": {
			[]string{"keys", "rotate", keyID, "--overlap", "90m"}, adminapi.CreatedKey{Key: aKey, Secret: testSecret},
			`POST /api/v1/keys/` + keyID + `/rotate {"overlap_seconds":5400}`, keyShown + "The old one works for another 1h30m.\n",
		},
		"models price": {
			[]string{"models", "price", "llama-3.3-70b", "--cents-per-1k-tokens", "0.25"}, aPrice,
			`PUT /api/v1/prices {"model":"llama-3.3-70b","cents_per_1k_tokens":0.25}`, priceTable,
		},
		"models price of a tenant": {
			[]string{"models", "price", "a/b:c", "--cents-per-1k-tokens", "0.1234560", "--tenant", "acme"}, aPrice,
			`PUT /api/v1/prices {"model":"a/b:c","tenant":"acme","cents_per_1k_tokens":0.123456}`, priceTable,
		},
		"models prices": {
			[]string{"models", "prices", "--tenant", "acme"}, page(adminapi.Price{Model: "m", Tenant: "ten_1", TenantSlug: "acme", UpdatedAt: at}),
			"GET /api/v1/prices?limit=500&tenant=acme",
			"MODEL  FOR   CENTS/1K TOKENS  SET\nm      acme  free             " + created + "\n",
		},
		"audit": {
			[]string{"audit", "--tenant", "acme"}, page(anEntry), "GET /api/v1/audit?limit=500&tenant=acme",
			"AT                       BY     FROM         ACTION      TENANT  OBJECT  DETAIL\n" +
				created + "  admin  203.0.113.7  tenant.set  acme    ten_1   {\"qps\":{\"old\":32,\"new\":5}}\n",
		},
		"keys list": {
			[]string{"keys", "list", "--tenant", "acme", "--user", usrID}, page(aKey), "GET /api/v1/keys?limit=500&tenant=acme&user=" + usrID,
			keyTable,
		},
		"keys revoke": {
			[]string{"keys", "revoke", keyID}, aKey, "POST /api/v1/keys/" + keyID + "/revoke",
			keyTable,
		},
		"agents list": {
			[]string{"agents", "list", "--tenant", "acme"}, page(anAgent, adminapi.Agent{ID: "agt_2", Tenant: "ten_1", State: "offline"}),
			"GET /api/v1/agents?limit=500&tenant=acme",
			"AGENT  ID     TENANT  STATE    RUNNING  WAITING  MODELS  SEEN    GPU\n" +
				"gpu-1  agt_1  acme    up       2/4      3        2       2h ago  RTX?[31m\n" +
				"agt_2  agt_2  ten_1   offline  0/0      0        0       never   -\n",
		},
		"agents pair": {
			[]string{"agents", "pair", "--tenant", "acme"}, aPairing, `POST /api/v1/agents/pairings {"tenant":"acme","ttl_seconds":604800}`,
			"pairing key  " + testPairing + "\ntenant       acme\nexpires      2026-11-23 18:04:05 UTC\n\n" +
				"It can't be shown again. On the GPU machine, with the address of this server:\n\n    ownllm worker --pair ownllm_pair_… --server https://…\n",
		},
		"agents remove": {
			[]string{"agents", "remove", agentID}, anAgent, "DELETE /api/v1/agents/" + agentID,
			"Agent agt_1 gpu-1 is removed.\n",
		},
		"models list": {
			[]string{"models", "list"}, page(aModel), "GET /api/v1/models?limit=500",
			"MODEL          TENANT  STATE  AGENTS  CONTEXT  SIZE MB  CENTS/1K TOKENS  CAPABILITIES\n" +
				"llama-3.3-70b  ten_1   ready  2       131072   40000    0.25             completion,tools\n",
		},
		"status": {
			[]string{"status"}, aStatus, "GET /api/v1/status",
			"OwnLLM v1.2.3 at SERVER/api/v1 is ready (postgres ok, nats ok)\n\n" +
				"AGENT  ID     TENANT  STATE  RUNNING  WAITING  MODELS  SEEN    GPU\n" +
				"gpu-1  agt_1  acme    up     2/4      3        2       2h ago  RTX?[31m\n\n" +
				"MODEL          AGENT  STATE   BACKEND  CONTEXT  QUEUED  DETAIL\n" +
				"llama-3.3-70b  gpu-1  ready   vllm     131072   5       -\n" +
				"qwen2.5:32b    gpu-1  failed  ollama   -        0       out of?memory\n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			method, rest, _ := strings.Cut(tc.asked, " ")
			path, _, _ := strings.Cut(strings.Fields(rest)[0], "?")
			a := newAdmin(t, map[string]any{method + " " + path: tc.reply})

			got := run(t, a.env(), tc.args...)
			if diff := cmp.Diff(result{0, strings.ReplaceAll(tc.want, "SERVER", a.URL), ""}, got, cmp.AllowUnexported(result{})); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if diff := cmp.Diff([]string{tc.asked}, a.asked()); diff != "" {
				t.Errorf("requests, -want +got:\n%s", diff)
			}
			if diff := cmp.Diff(map[string]bool{"Bearer " + testToken: true}, a.bearers); diff != "" {
				t.Errorf("authorization, -want +got:\n%s", diff)
			}

			got = run(t, a.env(), append(tc.args, "--json")...)
			want, err := json.Marshal(tc.reply)
			if err != nil {
				t.Fatal(err)
			}
			if bytes.Contains(want, []byte(`"has_more"`)) {
				want = bytes.Replace(want, []byte(`,"has_more":false`), nil, 1)
				want = bytes.Replace(want, []byte(`"data":null`), []byte(`"data":[]`), 1)
			}
			if got.code != 0 || got.stderr != "" || got.stdout != string(want)+"\n" {
				t.Errorf("--json: %d, %s\n%s", got.code, got.stderr, cmp.Diff(string(want)+"\n", got.stdout))
			}
		})
	}
}

func TestExitCodes(t *testing.T) {
	a := newAdmin(t, map[string]any{
		"POST /api/v1/tenants":             schemas.Errorf(schemas.CodeInvalidValue, "The slug acme is taken.").WithParam("slug"),
		"GET /api/v1/tenants":              schemas.Errorf(schemas.CodeKeyInvalid, "The admin token is wrong."),
		"POST /api/v1/tenants/none/resume": schemas.Errorf(schemas.CodeNotFound, "There is no tenant none."),
	})
	nobody := nowhere(t)
	html := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") }))
	defer html.Close()

	for name, tc := range map[string]struct {
		env  map[string]string
		args string
		code int
		want []string // parts of stderr
	}{
		"nothing":            {nil, "", ExitUsage, []string{"Usage: ownllm <command>"}},
		"unknown command":    {nil, "frobnicate", ExitUsage, []string{"unexpected argument frobnicate", `"ownllm --help"`}},
		"unknown flag":       {nil, "tenants list --frob", ExitUsage, []string{"--frob", `"ownllm tenants list --help"`}},
		"half a command":     {nil, "keys", ExitUsage, []string{`"create", "list", "set", "rotate", "revoke"`}},
		"flag missing":       {nil, "users create", ExitUsage, []string{"--email", "--tenant"}},
		"argument missing":   {nil, "keys revoke", ExitUsage, []string{"<id>"}},
		"all problems":       {nil, "keys create --tenant a --user u --ttl 1ms --scope all", ExitUsage, []string{"--ttl: 1ms", `--scope: "all"`}},
		"bad lifetime":       {nil, "keys create --tenant a --user u --ttl soon", ExitUsage, []string{"--ttl", `"soon"`, "24h or 7d"}},
		"negative budget":    {nil, "keys create --tenant a --user u --budget-cents=-1", ExitUsage, []string{"--budget-cents", `"-1"`}},
		"budget too large":   {nil, "keys set " + keyID + " --budget-cents 99999999999999999999", ExitUsage, []string{"--budget-cents", "whole number of cents"}},
		"no change of key":   {nil, "keys set " + keyID, ExitUsage, []string{"nothing to change", "--budget-cents"}},
		"no change":          {nil, "tenants set acme", ExitUsage, []string{"nothing to change", "--qps"}},
		"bad scope":          {nil, "keys set " + keyID + " --scope x", ExitUsage, []string{`--scope: "x"`}},
		"key for its id":     {nil, "keys rotate " + testSecret, ExitUsage, []string{"that is the key itself"}},
		"secret for an id":   {nil, "agents remove " + testCredential, ExitUsage, []string{"that is a secret"}},
		"no time to pair":    {nil, "agents pair --tenant a --ttl 1ms", ExitUsage, []string{"--ttl: 1ms"}},
		"key in usage":       {nil, "usage --key " + testSecret, ExitUsage, []string{"that is the key itself"}},
		"no price":           {nil, "models price m", ExitUsage, []string{"--cents-per-1k-tokens"}},
		"bad price":          {nil, "models price m --cents-per-1k-tokens 0.1234567", ExitUsage, []string{`"0.1234567"`, "6 decimals"}},
		"negative price":     {nil, "models price m --cents-per-1k-tokens=-1", ExitUsage, []string{`"-1"`, "negative"}},
		"bad time":           {nil, "usage --since yesterday", ExitUsage, []string{"--since", `"yesterday"`, "2026-11-01"}},
		"times in disorder":  {nil, "usage --since 1h --until 2d", ExitUsage, []string{"--until", "before --since"}},
		"bad dimension":      {nil, "usage --by model,hour,model", ExitUsage, []string{`"hour"`, "tenant, user, key, model, day", "model comes twice"}},
		"two forms":          {nil, "usage --csv --json", ExitUsage, []string{"exclude"}},
		"bad duration":       {nil, "status --interval soon", ExitUsage, []string{"--interval"}},
		"bad environment":    {map[string]string{"OWNLLM_INTERVAL": "soon"}, "status", ExitUsage, []string{"$OWNLLM_INTERVAL", `"ownllm status --help"`}},
		"no time":            {nil, "status --interval 0s", ExitUsage, []string{"--interval: 0s"}},
		"wrong kind of id":   {nil, "users deactivate ada@example.com", ExitUsage, []string{`doesn't begin with "usr_"`}},
		"no token":           {map[string]string{"OWNLLM_SERVER": a.URL}, "tenants list", ExitUsage, []string{"OWNLLM_ADMIN_TOKEN", "--admin-token-file"}},
		"no such token file": {map[string]string{"OWNLLM_SERVER": a.URL}, "tenants list --admin-token-file /nonexistent", ExitUsage, []string{"/nonexistent"}},
		"bad server":         {map[string]string{"OWNLLM_ADMIN_TOKEN": testToken}, "tenants list --server localhost", ExitUsage, []string{`"localhost"`, "http://host:port"}},
		"refused":            {a.env(), "tenants create --slug acme", ExitFailed, []string{"ownllm: The slug acme is taken. (invalid_value, slug)"}},
		"not found":          {a.env(), "tenants resume none", ExitFailed, []string{"There is no tenant none. (not_found)"}},
		"wrong token":        {a.env(), "tenants list", ExitFailed, []string{"(key_invalid)", "OWNLLM_ADMIN_TOKEN"}},
		"not an edge":        {map[string]string{"OWNLLM_SERVER": html.URL, "OWNLLM_ADMIN_TOKEN": testToken}, "tenants list", ExitFailed, []string{html.URL, "isn't of OwnLLM"}},
		"nobody there":       {map[string]string{"OWNLLM_SERVER": nobody, "OWNLLM_ADMIN_TOKEN": testToken}, "tenants list", ExitUnreachable, []string{"can't reach", nobody, "connection refused", "ownllm up"}},
		"no ready.json":      {map[string]string{"HOME": t.TempDir()}, "status", ExitUnreachable, []string{".ownllm/ready.json", "ownllm up"}},
		"no home":            {nil, "status", ExitUsage, []string{"--data-dir", "$HOME"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := run(t, tc.env, strings.Fields(tc.args)...)
			if got.code != tc.code {
				t.Errorf("exit code %d, want %d", got.code, tc.code)
			}
			if got.stdout != "" {
				t.Errorf("stdout: %s", got.stdout)
			}
			for _, part := range tc.want {
				if !strings.Contains(got.stderr, part) {
					t.Errorf("stderr lacks %q:\n%s", part, got.stderr)
				}
			}
			if strings.Contains(got.stderr, "canary") {
				t.Errorf("stderr gives a secret away:\n%s", got.stderr)
			}
		})
	}
}

func TestKeyGivenForItsID(t *testing.T) {
	got := run(t, nil, "keys", "revoke", testSecret)
	if got.code != ExitUsage || strings.Contains(got.stderr, testSecret) || !strings.Contains(got.stderr, "that is the key itself") {
		t.Errorf("%d: %s", got.code, got.stderr)
	}
}

func TestInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		cancel()
		<-r.Context().Done()
	}))
	defer server.Close()
	got := runIn(ctx, map[string]string{"OWNLLM_SERVER": server.URL, "OWNLLM_ADMIN_TOKEN": testToken}, "", "status")
	if got.code != ExitFailed || got.stderr != "ownllm: interrupted\n" {
		t.Errorf("%d: %s", got.code, got.stderr)
	}
}

// The address and the token come from flags, the environment, or ready.json.
func TestDiscovery(t *testing.T) {
	a := newAdmin(t, map[string]any{"GET /api/v1/tenants": page(aTenant)})
	home := t.TempDir()
	dir := filepath.Join(home, ".ownllm")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	ready := adminapi.Ready{PID: 1, AdminURL: a.URL + "/api/v1", AdminToken: "of-ready-json"}
	if err := ready.Write(dir); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(home, "token")
	if err := os.WriteFile(file, []byte("of-file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	empty := filepath.Join(home, "empty")
	if err := os.WriteFile(empty, []byte("\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		env   map[string]string
		stdin string
		args  string
		code  int
		want  string
	}{
		"ready.json at home":     {map[string]string{"HOME": home}, "", "", 0, "of-ready-json"},
		"ready.json by flag":     {nil, "", "--data-dir " + dir, 0, "of-ready-json"},
		"ready.json by variable": {map[string]string{"OWNLLM_DATA_DIR": dir}, "", "", 0, "of-ready-json"},
		"token by variable":      {map[string]string{"HOME": home, "OWNLLM_ADMIN_TOKEN": "of-variable"}, "", "", 0, "of-variable"},
		"token by file":          {map[string]string{"HOME": home, "OWNLLM_ADMIN_TOKEN": "of-variable"}, "", "--admin-token-file " + file, 0, "of-file"},
		"file by variable":       {map[string]string{"HOME": home, "OWNLLM_ADMIN_TOKEN_FILE": file}, "", "", 0, "of-file"},
		"token by stdin":         {map[string]string{"HOME": home}, "of-stdin\n", "--admin-token-file -", 0, "of-stdin"},
		"empty file":             {map[string]string{"HOME": home}, "", "--admin-token-file " + empty, ExitUsage, ""},
		"flag over variable":     {map[string]string{"OWNLLM_SERVER": "http://127.0.0.1:1", "OWNLLM_ADMIN_TOKEN": "of-variable"}, "", "--server " + a.URL, 0, "of-variable"},
		"empty is not set":       {map[string]string{"HOME": home, "OWNLLM_SERVER": "", "OWNLLM_DATA_DIR": ""}, "", "", 0, "of-ready-json"},
	} {
		t.Run(name, func(t *testing.T) {
			a.mu.Lock()
			a.bearers = map[string]bool{}
			a.mu.Unlock()
			got := runIn(t.Context(), tc.env, tc.stdin, append([]string{"tenants", "list"}, strings.Fields(tc.args)...)...)
			if got.code != tc.code {
				t.Fatalf("exit code %d: %s", got.code, got.stderr)
			}
			if tc.want != "" && !a.bearers["Bearer "+tc.want] {
				t.Errorf("asked with %v", a.bearers)
			}
		})
	}

	if err := os.WriteFile(filepath.Join(dir, adminapi.ReadyFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := run(t, map[string]string{"HOME": home}, "status"); got.code != ExitFailed || !strings.Contains(got.stderr, "ready.json") {
		t.Errorf("a broken ready.json: %d, %s", got.code, got.stderr)
	}
}

func TestJSONByEnvironment(t *testing.T) {
	got := run(t, map[string]string{"OWNLLM_JSON": "true"}, "version")
	var v map[string]any
	if err := json.Unmarshal([]byte(got.stdout), &v); err != nil || v["version"] == "" || v["protocol"] != 1.0 {
		t.Errorf("%v: %s", err, got.stdout)
	}
	if got := run(t, nil, "version"); !strings.HasPrefix(got.stdout, "ownllm ") {
		t.Errorf("%s", got.stdout)
	}
}

func TestStatusTellsWhatIsDown(t *testing.T) {
	for name, tc := range map[string]struct {
		status adminapi.Status
		code   int
		want   string
	}{
		"postgres":  {adminapi.Status{Postgres: "down", NATS: "ok"}, ExitUnreachable, "ownllm: the edge can't reach Postgres\n"},
		"nats":      {adminapi.Status{Postgres: "ok", NATS: "down"}, ExitUnreachable, "ownllm: the edge can't reach NATS\n"},
		"both":      {adminapi.Status{Postgres: "down", NATS: "down"}, ExitUnreachable, "ownllm: the edge can't reach Postgres and NATS\n"},
		"not ready": {adminapi.Status{Postgres: "ok", NATS: "ok"}, ExitFailed, "ownllm: the edge isn't ready\n"},
		"no agents": {adminapi.Status{Ready: true, Postgres: "ok", NATS: "ok"}, ExitOK, ""},
	} {
		t.Run(name, func(t *testing.T) {
			a := newAdmin(t, map[string]any{"GET /api/v1/status": tc.status})
			got := run(t, a.env(), "status")
			if got.code != tc.code || got.stderr != tc.want {
				t.Errorf("%d: %s", got.code, got.stderr)
			}
			if !strings.Contains(got.stdout, "No agent has connected yet") {
				t.Errorf("%s", got.stdout)
			}
		})
	}
}

// A watch outlives an edge that is away for a while, and ends well when it is
// interrupted.
func TestStatusWatch(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	n := 0
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		n++
		w.Header().Set("Content-Type", "application/json")
		switch n {
		case 2:
			e := schemas.Errorf(schemas.CodeInternalError, "Postgres is away.")
			w.WriteHeader(e.Status())
			_, _ = w.Write(e.AppendJSON(nil))
			return
		case 4:
			defer cancel()
		}
		_ = json.NewEncoder(w).Encode(adminapi.Status{Version: fmt.Sprintf("v%d", n), Ready: true})
	}))
	defer server.Close()
	got := runIn(ctx, map[string]string{"OWNLLM_SERVER": server.URL, "OWNLLM_ADMIN_TOKEN": testToken}, "",
		"status", "--watch", "--json", "--interval", "1ms")
	if got.code != ExitOK || !strings.Contains(got.stderr, "Postgres is away.") {
		t.Errorf("%d: %s", got.code, got.stderr)
	}
	lines := strings.Split(strings.TrimSpace(got.stdout), "\n")
	if len(lines) < 2 || !strings.HasPrefix(lines[0], `{"version":"v1"`) || !strings.HasPrefix(lines[1], `{"version":"v3"`) {
		t.Errorf("stdout:\n%s", got.stdout)
	}
}

// Every command explains itself: a help text, an example that begins with its own
// name, and for each flag a text and the name of its variable. Of the flags only --key of
// bench takes a secret, because every tool of its kind has it.
func TestHelp(t *testing.T) {
	parser, err := newParser(t.Context(), &cli{}, &Environment{Getenv: func(string) string { return "" }})
	if err != nil {
		t.Fatal(err)
	}
	secrets := []string{"token", "password", "secret", "key", "credentials"}
	seen := 0
	err = kong.Visit(parser.Model, func(v kong.Visitable, next kong.Next) error {
		node, ok := v.(*kong.Node)
		if !ok || node.Type != kong.CommandNode {
			return next(nil)
		}
		seen++
		path := strings.TrimPrefix(node.FullPath(), "ownllm ")
		t.Run(path, func(t *testing.T) {
			got := run(t, nil, append(strings.Fields(path), "--help")...)
			if got.code != ExitOK || got.stderr != "" {
				t.Fatalf("--help: %d, %s", got.code, got.stderr)
			}
			if !strings.Contains(got.stdout, "Usage: ownllm "+path) || !strings.Contains(got.stdout, "Example") ||
				!strings.Contains(strings.ReplaceAll(got.stdout, "OWNLLM_ADMIN_TOKEN=… ", ""), "    ownllm "+path) {
				t.Errorf("no usage or example:\n%s", got.stdout)
			}
			for _, f := range node.Flags {
				if f.Name != "help" && (f.Help == "" || !strings.Contains(got.stdout, variable(f.Name)+")")) {
					t.Errorf("--%s has no text or no variable", f.Name)
				}
				for _, word := range secrets {
					if strings.HasSuffix(f.Name, word) && path+" --"+f.Name != "bench --key" && f.PlaceHolder != "FILE" && f.PlaceHolder != "ID" {
						t.Errorf("--%s takes a secret", f.Name)
					}
				}
			}
		})
		return next(nil)
	})
	if err != nil {
		t.Fatal(err)
	}
	if seen < 27 {
		t.Errorf("only %d commands", seen)
	}
	if got := run(t, nil, "--help"); got.code != ExitOK || !strings.Contains(got.stdout, "Administer:") {
		t.Errorf("--help: %d\n%s", got.code, got.stdout)
	}
}
