package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// scripts is where the clients are, and what scripts/setup installs.
const scripts = "../../scripts"

// natsClient is one of the programs of scripts/nats, each with the official NATS client of its
// language.
type natsClient struct {
	name    string
	command []string
	key     string // its id, if the client is told
}

// natsClients are the three for programs. Without what scripts/setup installs the test fails,
// or is skipped in a short run.
func natsClients(t *testing.T) []natsClient {
	t.Helper()
	needClients(t)
	return []natsClient{
		{name: "go", command: []string{stack.Binary(t, stack.OwnLLM+"/scripts/nats")}},
		{name: "python", command: []string{installed(t, ".venv/bin/python"), installed(t, "nats/client.py")}},
		{name: "node", command: []string{installed(t, ".venv/bin/node"), installed(t, "nats/client.mjs")}},
	}
}

func needClients(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("not in a short run: it needs what scripts/setup installs")
	}
	for _, path := range []string{".venv/complete", "nats/node_modules"} {
		if _, err := os.Stat(filepath.Join(scripts, path)); err != nil {
			t.Fatalf("%v: run scripts/setup first", err)
		}
	}
}

func installed(t *testing.T, path string) string {
	t.Helper()
	abs, err := filepath.Abs(filepath.Join(scripts, path))
	if err != nil {
		t.Fatal(err)
	}
	return abs
}

// ran is how a client has ended.
type ran struct {
	code           int
	stdout, stderr string
}

// refusal is the answer with an error that the client was given.
func (r ran) refusal(t *testing.T) (a schemas.Answer) {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(r.stderr), "\n")
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &a); r.code != 1 || err != nil || a.Error == nil {
		t.Fatalf("exit code %d, %q, %q: not refused", r.code, r.stdout, r.stderr)
	}
	return a
}

// natsCommand is the fourth, for people.
func natsCommand(t *testing.T) natsClient {
	t.Helper()
	return natsClient{name: "nats command", command: []string{"bash", installed(t, "nats/client.sh")}}
}

// run runs a client with the secret of a key. stdin is for an argument "-".
func (c natsClient) run(t *testing.T, url, secret, stdin string, args ...string) ran {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.command[0], append(c.command[1:len(c.command):len(c.command)], args...)...)
	cmd.Env = append(os.Environ(), "NATS_URL="+url, "OWNLLM_API_KEY="+secret, "OWNLLM_KEY_ID="+c.key, "PYTHONDONTWRITEBYTECODE=1",
		"PATH="+installed(t, ".venv/bin")+string(os.PathListSeparator)+os.Getenv("PATH"))
	cmd.Stdin = strings.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: %v", c.name, err)
	}
	return ran{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// natsCase is a way to an error, over NATS.
type natsCase struct {
	name, key string // default: "good"
	body      string
	code      schemas.Code
	param     string
	retry     bool // there is a retry_after
	operation string
}

// natsCases provoke every error that a publisher can be told. Those of keys it isn't told,
// since it can't connect, and some are of HTTP alone: see unheard.
func natsCases() []natsCase {
	image := `"messages":[{"role":"user","content":[{"type":"text","text":"Look"},{"type":"image_url","image_url":{"url":"data:image/png;base64,iVBORw0KGgo="}}]}]`
	tools := `"tools":[{"type":"function","function":{"name":"f","parameters":{}}}]`
	plain := `"model":"` + plainModel + `"`
	of := func(id string) string { return chatWith(`"model":"` + id + `"`) }
	stream := func(members string) string { return chatWith(members, `"stream":true`) }
	return []natsCase{
		{name: "not JSON", body: `{"model":`, code: "invalid_json"},
		{name: "not an object", body: `[]`, code: "invalid_json"},
		{name: "no model", body: `{"messages":[{"role":"user","content":"Hi"}]}`, code: "model_required", param: "model"},
		{name: "no messages", body: `{"model":"demo"}`, code: "messages_required", param: "messages"},
		{name: "tools", body: chatWith(plain, tools), code: "model_does_not_support_tools", param: "tools"},
		{name: "vision", body: chatWith(plain, image), code: "model_does_not_support_vision", param: "messages"},
		{name: "more than the window", body: chatWith(plain, `"max_tokens":65`), code: "context_length_exceeded", param: "max_tokens"},
		{name: "response_format", body: chatWith(`"response_format":{"type":"yaml"}`), code: "invalid_response_format", param: "response_format.type"},
		{name: "wrong type", body: chatWith(`"stream":"yes"`), code: "invalid_value", param: "stream"},
		{name: "refused by the backend", body: chatWith(`"demo":{"status":400}`), code: "invalid_value"},
		{name: "model that nobody has", body: of("gpt-9"), code: "model_not_found", param: "model"},
		{name: "no such operation", operation: "embed", body: `{}`, code: "not_found"},
		{name: "cancel of nothing", operation: "cancel", body: `{"request_id":"req_01K9ZQ8V7M4T2X6B3C5D7E8F9G"}`, code: "invalid_value", param: "request_id"},
		{name: "submission without an id", operation: "submit", body: `{"request":{}}`, code: "invalid_value", param: "id"},
		{name: "result of nothing", operation: "result", body: `{"id":"nobody's"}`, code: "invalid_value", param: "id"},
		{name: "scope", key: "scoped", body: chatWith(), code: "scope_required", param: "model"},
		{name: "money spent", key: "without money", body: of(dearModel), code: "budget_exceeded", retry: true},
		{name: "slots taken", key: "without slots", body: chatWith(), code: "concurrency_limit", retry: true},
		{name: "tenant too fast", key: "of the tenant drained", body: chatWith(), code: "tenant_qps_limit", retry: true},
		{name: "agent that left", body: of(awayModel), code: "agent_offline", retry: true},
		{name: "no agent", operation: "models", key: "of the tenant bare", code: "agent_offline", retry: true},
		{name: "agent that lost its bus", body: of(mutedModel), code: "tunnel_down", retry: true},
		{name: "cold model", body: of(coldModel), code: "model_loading", retry: true},
		{name: "full queue", body: of(busyModel), code: "queue_full", retry: true},
		{name: "backend that stalls at once", body: stream(`"demo":{"stall_after":0}`), code: "agent_timeout"},
		{name: "backend that stalls", body: stream(`"demo":{"tokens":9,"numbered":true,"stall_after":3}`), code: "agent_timeout"},
		{name: "backend that fails", body: chatWith(`"demo":{"status":500}`), code: "backend_error"},
		{name: "backend that dies", body: stream(`"demo":{"tokens":9,"numbered":true,"die_after":3}`), code: "backend_error"},
		{name: "backend that talks nonsense", body: stream(`"demo":{"tokens":9,"numbered":true,"garbage_after":3}`), code: "backend_error"},
		{name: "backend that ends early", body: stream(`"demo":{"tokens":9,"numbered":true,"end_after":3}`), code: "backend_error"},
	}
}

// unheard are the codes that no natsCase can have, and why.
var unheard = map[schemas.Code]string{
	schemas.CodeKeyMalformed:     "can't connect",
	schemas.CodeKeyInvalid:       "can't connect",
	schemas.CodeKeyExpired:       "can't connect",
	schemas.CodeTenantDisabled:   "can't connect",
	schemas.CodeUserDeactivated:  "can't connect",
	schemas.CodeTooManyFailures:  "HTTP only",
	schemas.CodeMethodNotAllowed: "HTTP only",
	schemas.CodeRequestTooLarge:  "tried at the end, by a server with a low limit",
	schemas.CodeInternalError:    "tried at the end, by a broker that stops",
}

// TestNATSClients has the official NATS clients for Go, Python and Node stream replies, cancel
// them, and run into every error.
func TestNATSClients(t *testing.T) {
	clients := natsClients(t)
	cases := natsCases()
	heard := make(map[schemas.Code]bool)
	for _, c := range cases {
		heard[c.code] = true
	}
	for _, info := range schemas.Codes {
		if heard[info.Code] == (unheard[info.Code] != "") {
			t.Errorf("%s: provoked %v, though %q", info.Code, heard[info.Code], unheard[info.Code])
		}
	}
	brokerArgs := []string{"--cold-wait", "300ms", "--first-token-timeout", "4s", "--idle-timeout", "4s", "--drain-timeout", "1s"}
	r := newRefusals(t, brokerArgs...)
	held := r.backend.Stats().Active
	const endless = `"demo":{"tokens":100000,"numbered":true,"tokens_per_second":50}`
	for _, c := range clients {
		t.Run(c.name+" streams", func(t *testing.T) {
			for _, stream := range []string{"true", "false"} {
				got := c.run(t, r.NATSURL(), r.keys["good"], "", "chat", chatWith(`"stream":`+stream, `"demo":{"tokens":300,"numbered":true,"tokens_per_second":200}`))
				var end struct {
					Request schemas.RequestID `json:"request_id"`
					Usage   schemas.TotalUsage
				}
				if err := json.Unmarshal([]byte(got.stderr), &end); err != nil || got.code != 0 || strings.TrimSpace(got.stdout) != strings.TrimSpace(numbered(300)) ||
					end.Usage.CompletionTokens != 300 || end.Request == "" {
					t.Errorf("stream %s: exit code %d, %.60q, %q: %v", stream, got.code, got.stdout, got.stderr, err)
				}
			}
		})
		t.Run(c.name+" cancels", func(t *testing.T) {
			got := c.run(t, r.NATSURL(), r.keys["good"], "", "chat", chatWith(`"stream":true`, endless), "20")
			a := got.refusal(t)
			if a.Error.Code != schemas.CodeNotFound || !strings.Contains(a.Error.Message, "cancelled") || tokensOf(got.stdout) < 19 {
				t.Errorf("%+v, %q", a.Error, got.stdout)
			}
			stack.Until(t, 30*time.Second, "the backend to stop", func() bool { return r.backend.Stats().Active == held })
		})
	}
	t.Run("errors", func(t *testing.T) {
		for _, c := range clients {
			t.Run(c.name, func(t *testing.T) {
				t.Parallel()
				for _, test := range cases {
					t.Run(test.name, func(t *testing.T) { r.checkOverNATS(t, c, test) })
				}
				for _, key := range []string{"unknown", "malformed", "expired", "revoked", "of a deactivated user", "of the tenant held"} {
					if got := c.run(t, r.NATSURL(), r.keys[key], "", "ask", "whoami"); got.code != 2 || !strings.Contains(strings.ToLower(got.stderr), "authorization") {
						t.Errorf("key %s: exit code %d, %q", key, got.code, got.stderr)
					}
				}
				big := chatWith(`"padding":"` + strings.Repeat("x", 1<<20) + `"`)
				if got := c.run(t, r.NATSURL(), r.keys["good"], big, "chat", "-"); got.code != 2 || !strings.Contains(strings.ToLower(got.stderr), "payload") {
					t.Errorf("a request that is too large: exit code %d, %q", got.code, got.stderr)
				}
			})
		}
	})
	t.Run("a broker that stops", func(t *testing.T) {
		before := r.backend.Stats().Active
		ends := make([]ran, len(clients))
		var running sync.WaitGroup
		for i, c := range clients {
			model := []string{demo.ModelID, demo.ModelID, dearModel}[i] // the first has no room for more
			running.Go(func() {
				ends[i] = c.run(t, r.NATSURL(), r.keys["good"], "", "chat", chatWith(`"model":"`+model+`"`, `"stream":true`, endless))
			})
		}
		stack.Until(t, 30*time.Second, "the replies to run", func() bool { return r.backend.Stats().Active == before+int64(len(clients)) })
		if err := r.Broker.Stop(); err != nil {
			t.Error(err)
		}
		running.Wait()
		for i, c := range clients {
			if a := ends[i].refusal(t); a.Error.Code != schemas.CodeInternalError || a.RetryAfter == 0 {
				t.Errorf("%s: %+v", c.name, a.Error)
			}
		}
	})
	r.emptyQueue()
	t.Run("a low limit", func(t *testing.T) {
		up := stack.StartUp(t, t.TempDir(), "--backend", "demo", "--body-limit", "2KB")
		for _, c := range clients {
			got := c.run(t, up.NATSURL, up.APIKey, chatWith(`"padding":"`+strings.Repeat("x", 3000)+`"`), "chat", "-")
			if a := got.refusal(t); a.Error.Code != schemas.CodeRequestTooLarge {
				t.Errorf("%s: %+v", c.name, a.Error)
			}
		}
	})
}

func (r *refusals) checkOverNATS(t *testing.T, c natsClient, test natsCase) {
	t.Helper()
	if test.key == "" {
		test.key = "good"
	}
	args := []string{"chat", test.body}
	if test.operation != "" {
		args = []string{"ask", test.operation, test.body}
	}
	a := c.run(t, r.NATSURL(), r.keys[test.key], "", args...).refusal(t)
	param := ""
	if a.Error.Param != nil {
		param = *a.Error.Param
	}
	if a.Error.Code != test.code || a.Error.Type != test.code.Info().Type || param != test.param || len(a.Error.Message) < 20 || (a.RetryAfter > 0) != test.retry {
		t.Errorf("%+v, param %q, retry after %d; want %s, %q", a.Error, param, a.RetryAfter, test.code, test.param)
	}
}

// TestNATSClientsOutliveRestarts has each client submit and go away. Then broker and
// nats-server are killed and started again, and a new process of each fetches the result.
func TestNATSClientsOutliveRestarts(t *testing.T) {
	t.Parallel()
	clients := natsClients(t)
	c := stack.StartCluster(t)
	backend := stack.StartBackend(t, demo.Options{})
	c.StartWorker(backend.URL).Serving()
	s := newSubmitter(t, c, books.NewKey{Concurrency: new(1)})
	body := string(chatBody(false, slow(2*time.Second)))
	submit := func(n natsClient, duplicate bool) {
		got := n.run(t, c.NATSURL(), s.secret, "", "submit", n.name, body)
		var o outcome
		if err := json.Unmarshal([]byte(got.stdout), &o); err != nil || got.code != 0 || o.Kind != schemas.KindAccepted || o.ID != n.name || o.Duplicate != duplicate {
			t.Errorf("%s submits: exit code %d, %q, %q, %v", n.name, got.code, got.stdout, got.stderr, err)
		}
	}
	for _, n := range clients {
		submit(n, false)
	}
	stack.Until(t, 30*time.Second, "a run", func() bool { return backend.Stats().Started > 0 })
	c.Broker.Kill()
	c.NATS.Kill()
	c.StartNATS()
	c.StartBroker()
	for _, n := range clients {
		var got ran
		stack.Until(t, 60*time.Second, "the bus to let the client in", func() bool {
			got = n.run(t, c.NATSURL(), s.secret, "", "result", n.name)
			return got.code != 2
		})
		var o outcome
		if err := json.Unmarshal([]byte(got.stdout), &o); err != nil || got.code != 0 || o.State != schemas.SubmissionDone || o.text() != "late" || o.Usage == nil || o.Usage.TotalTokens == 0 {
			t.Errorf("%s gets its result: exit code %d, %q, %q, %v", n.name, got.code, got.stdout, got.stderr, err)
		}
		submit(n, true)
	}
	// The run that the broker was killed in may have come to its end without it.
	if n := backend.Stats().Finished - int64(len(clients)); n < 0 || n > 1 {
		t.Errorf("%d replies more came to their ends than were submitted", n)
	}
}

// TestNATSCommand has the nats command do what the other clients do.
func TestNATSCommand(t *testing.T) {
	t.Parallel()
	needClients(t)
	n := natsCommand(t)
	c := stack.StartCluster(t)
	backend := stack.StartBackend(t, demo.Options{})
	c.StartWorker(backend.URL).Serving()
	s := newSubmitter(t, c, books.NewKey{})
	s.accept("warm", says("up"))
	s.done("warm", "up") // so the broker knows the model

	run := func(code int, args ...string) string {
		t.Helper()
		got := n.run(t, c.NATSURL(), s.secret, "", args...)
		if got.code != code {
			t.Errorf("%.80q: exit code %d, %q, %q", args, got.code, got.stdout, got.stderr)
		}
		return got.stdout
	}
	var text heard
	for line := range strings.Lines(run(0, "chat", chatWith(`"stream":true`, `"demo":{"text":"all of it"}`))) {
		text.take([]byte(line))
	}
	wantDone(t, text)
	if text.text != "all of it" {
		t.Errorf("the reply is %q", text.text)
	}
	if out := run(1, "chat", `{}`); !strings.Contains(out, "model_required") {
		t.Errorf("%q", out)
	}
	if out := run(0, "ask", "whoami"); !strings.Contains(out, string(s.key)) {
		t.Errorf("%q", out)
	}
	if out := run(0, "ask", "models"); !strings.Contains(out, `"id":"demo"`) {
		t.Errorf("%q", out)
	}
	if out := run(0, "submit", "by-hand", string(chatBody(false, says("later")))); !strings.Contains(out, `"kind":"accepted"`) {
		t.Errorf("%q", out)
	}
	if out := run(0, "result", "by-hand"); !strings.Contains(out, `"content":"later"`) {
		t.Errorf("%q", out)
	}

	// It is cancelled from another terminal, which learns the id from a listener here.
	ended := make(chan ran, 1)
	go func() {
		ended <- n.run(t, c.NATSURL(), s.secret, "", "chat", chatWith(`"stream":true`, `"demo":{"tokens":100000,"numbered":true,"tokens_per_second":50}`))
	}()
	nc := connect(t, c.NATSURL(), nats.Token(s.secret))
	defer nc.Close()
	overheard, err := nc.SubscribeSync(schemas.PublisherInboxPrefix(s.key) + ".>")
	if err != nil {
		t.Fatal(err)
	}
	m, err := overheard.NextMsg(20 * time.Second)
	if err != nil {
		t.Fatal(err)
	}
	a, err := schemas.DecodeAnswer(m.Data)
	if err != nil {
		t.Fatal(err)
	}
	if out := run(0, "ask", "cancel", string(schemas.CancelRequest{Request: a.Request}.Encode())); !strings.Contains(out, `"kind":"cancelled"`) {
		t.Errorf("%q", out)
	}
	if got := <-ended; got.code != 1 || !strings.Contains(got.stdout, "cancelled") {
		t.Errorf("exit code %d, %.200q", got.code, got.stdout)
	}
	stack.Until(t, 30*time.Second, "the backend to stop", func() bool { return backend.Stats().Active == 0 })
}

// TestNATSClientsNoticeWhatIsMissing plays a broker that is bad at it.
func TestNATSClientsNoticeWhatIsMissing(t *testing.T) {
	t.Parallel()
	clients := append(natsClients(t), natsCommand(t))
	addr := stack.FreeAddr(t)
	_, port, _ := strings.Cut(addr, ":")
	stack.Run(t, "nats-server", nil, stack.Binary(t, "github.com/nats-io/nats-server/v2"), "-a", "127.0.0.1", "-p", port)
	url := "nats://" + addr
	var nc *nats.Conn
	stack.Until(t, 30*time.Second, "nats-server", func() (ok bool) {
		var err error
		nc, err = nats.Connect(url)
		return err == nil
	})
	defer nc.Close()
	const key = "key_01K9ZQ8V7M4T2X6B3C5D7E8F9G"
	try := func(what, says string) {
		t.Helper()
		var together sync.WaitGroup
		for _, c := range clients {
			c.key = key
			together.Go(func() {
				if got := c.run(t, url, "anything", "", "chat", what); got.code != 2 || !strings.Contains(got.stderr, says) {
					t.Errorf("%s, %s: exit code %d, %q, %q", c.name, what, got.code, got.stdout, got.stderr)
				}
			})
		}
		together.Wait()
	}
	try("nobody", "")
	_, err := nc.Subscribe(schemas.InSubject(key, schemas.OperationChat), func(m *nats.Msg) {
		request := schemas.NewRequestID()
		progress := schemas.Answer{Seq: 1, Kind: schemas.FrameProgress, Request: request}
		done := schemas.Answer{Seq: 3, Kind: schemas.FrameDone, Request: request, Usage: schemas.Usage{}.Total()}
		_ = nc.PublishRequest(m.Reply, schemas.ProgressSubject(key, "own_1", request), progress.Append(nil))
		if string(m.Data) == "gap" {
			_ = nc.Publish(m.Reply, done.Append(nil))
		}
	})
	if err == nil {
		err = nc.Flush()
	}
	if err != nil {
		t.Fatal(err)
	}
	try("gap", "message 2 is missing")
	try("silence", "")
}
