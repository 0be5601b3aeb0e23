package e2e

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/sentrytest"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// exported is an OTLP receiver that keeps what is sent to it, traces and metrics, byte for
// byte: in protobuf a text stands as it is.
type exported struct {
	mu    sync.Mutex
	bytes map[string][]byte // by path
}

func (e *exported) ServeHTTP(_ http.ResponseWriter, r *http.Request) {
	b, _ := io.ReadAll(r.Body)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.bytes[r.URL.Path] = append(e.bytes[r.URL.Path], b...)
}

func (e *exported) of(path string) []byte {
	e.mu.Lock()
	defer e.mu.Unlock()
	return bytes.Clone(e.bytes[path])
}

// TestNothingSecretGetsOut sends requests of all kinds over NATS, submissions among them, and
// some over HTTP, with every role at its most talkative, and looks for what they held: in the
// logs, the traces, the metrics, the reports to Sentry, and what others are told.
func TestNothingSecretGetsOut(t *testing.T) {
	const (
		prompt     = "CANARY-of-the-prompt"
		completion = "CANARY-of-the-completion"
		complaint  = "CANARY-of-the-backend"
		badKey     = "sk-ownllm-CANARYofTheBadKey00000"
	)
	out := &exported{bytes: make(map[string][]byte)}
	otlp := httptest.NewServer(out)
	defer otlp.Close()
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", otlp.URL)
	t.Setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
	t.Setenv("OTEL_METRIC_EXPORT_INTERVAL", "500")
	sentry := sentrytest.Start(t)
	t.Setenv("SENTRY_DSN", sentry.DSN)
	backend := stack.StartBackend(t, demo.Options{})
	owner := []string{"--log-level", "debug", "--first-token-timeout", "2s", "--total-timeout", "10s"}
	c := stack.StartCluster(t, owner...)
	worker := c.StartWorker(backend.URL, "--log-level", "debug").Serving()
	edge := c.StartEdge(owner...)
	id, secret := newKey(t, c, books.NewKey{Concurrency: new(1000)})
	p := newPublisher(t, c.NATSURL(), id, secret)
	client := newClient(edge.BaseURL, secret)
	defer client.close()

	var errors strings.Builder // what clients are told of what went wrong
	complain := func(e any) {
		b, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		errors.Write(b)
	}
	say := []map[string]string{{"role": "user", "content": prompt}}
	asks := map[string]map[string]any{
		"reply":           {"demo": map[string]any{"text": completion}},
		"tools":           {"tools": []any{map[string]any{"type": "function", "function": map[string]any{"name": prompt}}}, "demo": map[string]any{"tool_calls": 1}},
		"backend fails":   {"demo": map[string]any{"status": 500, "error_body": `{"error":{"message":"` + complaint + `"}}`}},
		"backend refuses": {"demo": map[string]any{"status": 400, "error_body": `{"error":{"message":"` + complaint + `"}}`}},
		"garbage":         {"demo": map[string]any{"text": completion, "garbage_after": 1}},
		"error inside":    {"demo": map[string]any{"text": completion, "error_after": 1}},
		"dies":            {"demo": map[string]any{"text": completion, "die_after": 1}},
		"stalls":          {"demo": map[string]any{"stall_after": 0}},
		"unknown model":   {"model": "nobody-has-it"},
	}
	var work sync.WaitGroup
	var mu sync.Mutex
	for name, fields := range asks {
		fields["messages"] = say
		for _, stream := range []bool{true, false} {
			work.Go(func() {
				h := p.chat(t.Context(), stream, fields)
				mu.Lock()
				defer mu.Unlock()
				if h.broken != nil {
					t.Errorf("%s: %v", name, h.broken)
				}
				complain(h.err)
			})
		}
		work.Go(func() {
			r := client.chat(t.Context(), true, fields)
			mu.Lock()
			defer mu.Unlock()
			complain(r.err)
		})
	}
	work.Wait()
	tell := func(operation, body string) {
		t.Helper()
		m, err := p.nc.Request(schemas.InSubject(id, operation), []byte(body), 10*time.Second)
		if err != nil {
			t.Errorf("%s: %v", operation, err)
			return
		}
		if bytes.Contains(m.Data, []byte(`"error"`)) {
			errors.Write(m.Data)
		}
	}
	request := func(fields map[string]any) string { return string(chatBody(false, fields)) }
	tell(schemas.OperationChat, `{"messages":"`+prompt)
	tell(schemas.OperationChat, `{"model":"demo","messages":[{"role":"user","content":{"`+prompt+`":1}}]}`)
	tell(schemas.OperationCancel, `{"request_id":"req_`+prompt+`"}`)
	tell(schemas.OperationSubmit, `{"id":"x","request":"`+prompt+`"}`)
	tell(schemas.OperationSubmit, `{"id":"`+prompt+`","request":{"messages":["`+prompt+`"]}}`)
	for name, fields := range asks {
		if name != "stalls" {
			tell(schemas.OperationSubmit, `{"id":"`+name+`","request":`+request(fields)+`}`)
		}
	}
	tell(schemas.OperationSubmit, `{"id":"reply","request":`+request(asks["tools"])+`}`) // another one
	for name := range asks {
		if name == "stalls" {
			continue
		}
		stack.Until(t, 30*time.Second, "the end of "+name, func() bool {
			m, err := p.nc.Request(schemas.InSubject(id, schemas.OperationResult), []byte(`{"id":"`+name+`","wait_seconds":5}`), 10*time.Second)
			var o outcome
			if err != nil || json.Unmarshal(m.Data, &o) != nil || !o.State.Ended() {
				return false
			}
			complain(o.Error)
			return true
		})
	}
	// Whoever isn't let in, or asks for what there isn't.
	if nc, err := nats.Connect(c.NATSURL(), nats.Token(badKey)); err == nil {
		nc.Close()
		t.Error("a bad key was let in")
	}
	_ = p.nc.PublishRequest(schemas.InSubject(id, "nothing"), "elsewhere."+prompt, []byte(prompt))
	_ = p.nc.Publish(schemas.InSubject(id, schemas.OperationChat), []byte(prompt))
	// The loss of the bus makes everybody speak of it, and of what hangs on it.
	work.Go(func() {
		client.chat(t.Context(), true, map[string]any{"messages": say, "demo": map[string]any{"tokens": 60, "tokens_per_second": 20}})
	})
	stack.Until(t, 30*time.Second, "a reply to run", func() bool { return backend.Stats().Active > 0 })
	c.NATS.Kill()
	complain(client.chat(t.Context(), true, asks["reply"]).err) // our fault, which is reported
	c.StartNATS()
	work.Wait()

	canaries := map[string]string{
		"a prompt": prompt, "a completion": completion, "a key": secret, "a bad key": badKey,
		"the admin token": stack.AdminToken, "the bus secret": c.Token(),
	}
	look := func(where, text string) {
		t.Helper()
		if text == "" {
			t.Errorf("there is nothing in %s", where)
		}
		for what, canary := range canaries {
			if i := strings.Index(text, canary); i >= 0 {
				t.Errorf("%s has %s: %q", where, what, text[max(0, i-200):i+len(canary)])
			}
		}
	}
	look("what clients are told of errors", errors.String())
	canaries["a backend's words"] = complaint
	for _, role := range []*stack.Process{edge.Process, c.Broker, worker.Process} {
		resp, err := http.Get(role.OpsURL + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		look("the metrics", string(b))
		if err := role.Stop(); err != nil {
			t.Error(err)
		}
		look("a log", strings.Join(role.Log(), "\n"))
	}
	http.DefaultClient.CloseIdleConnections()
	look("the traces", string(out.of("/v1/traces")))
	look("the metrics that are sent", string(out.of("/v1/metrics")))
	look("the reports to Sentry", sentry.Raw())
}
