package e2e

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
)

// topology is what internal/topology says of what it runs.
type topology struct {
	*stack.Process
	dir         string
	PID         int               `json:"pid"`
	Edges       []string          `json:"edges"`
	Balancer    string            `json:"balancer"`
	Ops         map[string]string `json:"ops"`
	NATSURLs    []string          `json:"nats_urls"`
	CAFile      string            `json:"ca_file"`
	DatabaseURL string            `json:"database_url"`
	APIKey      string            `json:"api_key"`
	NATSToken   string            `json:"nats_token"`
}

// startTopology runs docker-compose.yml as plain processes.
func startTopology(t *testing.T, otlp string) *topology {
	t.Helper()
	dir, err := os.MkdirTemp("", "ownllm-topology-") // PostgreSQL can't enter that of t
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		logs, _ := filepath.Glob(filepath.Join(dir, "logs", "*.log")) // the pattern is well-formed
		for _, path := range logs {
			b, err := os.ReadFile(path)
			if err != nil || strings.Contains(string(b), "DATA RACE") {
				t.Errorf("%s: a data race, or %v", filepath.Base(path), err)
			}
			if t.Failed() {
				t.Logf("--- %s:\n%s", filepath.Base(path), b[max(0, len(b)-4000):])
			}
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	p := stack.Run(t, "topology", nil, stack.Binary(t, stack.OwnLLM+"/internal/topology"),
		"-file", filepath.Join(root, "docker-compose.yml"), "-dir", dir, "-otlp", otlp,
		"-ownllm", stack.Binary(t, stack.OwnLLM), "-nats-server", stack.Binary(t, "github.com/nats-io/nats-server/v2"))
	c := &topology{Process: p, dir: dir}
	stack.Until(t, 200*time.Second, "the topology", func() bool {
		if !p.Alive() {
			t.Fatalf("the topology has ended: %v", p.Err())
		}
		b, err := os.ReadFile(filepath.Join(dir, "topology.json"))
		return err == nil && json.Unmarshal(b, c) == nil
	})
	return c
}

// TestTopology is docker-compose.yml at work: streams through both edges and the load
// balancer, a publisher at each nats-server, TLS, one trace, and the metrics that its
// dashboard and its alerts need.
func TestTopology(t *testing.T) {
	received := &traces{}
	otlp := httptest.NewServer(received)
	defer otlp.Close()
	began := time.Now()
	c := startTopology(t, otlp.URL)
	t.Logf("up after %s, HAProxy: %t", time.Since(began).Round(100*time.Millisecond), c.Balancer != "")
	if len(c.Edges) != 2 || len(c.NATSURLs) != 3 || len(c.Ops) != 5 {
		t.Fatalf("the topology is %+v", c)
	}
	pool := x509.NewCertPool()
	ca, err := os.ReadFile(c.CAFile)
	if err != nil || !pool.AppendCertsFromPEM(ca) {
		t.Fatalf("the authority's certificate: %v", err)
	}

	// Streams come as they are made, whichever way.
	for i, base := range append(c.Edges, c.Balancer) {
		if base == "" {
			continue
		}
		client := newClient(base, c.APIKey)
		client.http.Transport.(*http.Transport).TLSClientConfig = &tls.Config{RootCAs: pool}
		trace := fmt.Sprintf("4bf92f3577b34da6a3ce929d0e0e47%02x", i)
		const parent = "00f067aa0ba902b7"
		client.header = http.Header{"Traceparent": {"00-" + trace + "-" + parent + "-01"}}
		var first time.Time
		r := client.follow(t.Context(), true, map[string]any{"demo": map[string]any{"numbered": true, "tokens": 40, "tokens_per_second": 40}}, func(r *reply) {
			if first.IsZero() && r.text != "" {
				first = time.Now()
			}
		})
		if wantWhole(t, r); r.text != numbered(40) || time.Since(first) < 300*time.Millisecond {
			t.Errorf("%s: the stream is %.80q, and came within %s", base, r.text, time.Since(first))
		}
		received.wantChain(t, trace, parent, "POST /v1/chat/completions", "send ownllm.v1.job", "process ownllm.v1.job", "chat demo")
		if r := newClient(base, "sk-ownllm-0123456789abcdefghijklmn"); base != c.Balancer {
			if got := r.chat(t.Context(), true, nil); got.err == nil || got.err.Code != "key_invalid" {
				t.Errorf("%s: a wrong key gets %+v", base, got.err)
			}
			r.close()
		}
		client.close()
	}

	// Publishers at each nats-server, by TLS and not otherwise.
	b, err := os.ReadFile(filepath.Join(c.dir, "volumes", "first", "key.json"))
	var key struct{ ID schemas.KeyID }
	if err != nil || json.Unmarshal(b, &key) != nil {
		t.Fatalf("the first key: %v", err)
	}
	for _, url := range c.NATSURLs {
		p := newPublisher(t, url, key.ID, c.APIKey, nats.RootCAs(c.CAFile))
		wantDone(t, p.chat(t.Context(), true, nil))
		if err := p.nc.Publish(schemas.InSubject(key.ID, schemas.OperationChat), chatBody(true, nil)); err != nil { // it is dropped, and counted
			t.Fatal(err)
		}
		p.nc.Close()
		var unknown x509.UnknownAuthorityError
		if nc, err := nats.Connect(url, nats.Token(c.APIKey)); !errors.As(err, &unknown) {
			nc.Close()
			t.Errorf("without the authority: %v", err)
		}
	}

	// So does Postgres: its certificate is checked.
	if !strings.Contains(c.DatabaseURL, "sslmode=verify-full") {
		t.Fatalf("the database is at %s", c.DatabaseURL)
	}
	store, err := books.Open(t.Context(), books.Config{URL: c.DatabaseURL})
	if err != nil {
		t.Fatal(err)
	}
	store.Close()
	foreign := filepath.Join(t.TempDir(), "foreign.pem")
	other := httptest.NewTLSServer(nil)
	other.Close()
	if err := os.WriteFile(foreign, pemOf(other.Certificate()), 0o600); err != nil {
		t.Fatal(err)
	}
	if store, err := books.Open(t.Context(), books.Config{URL: strings.Replace(c.DatabaseURL, c.CAFile, foreign, 1)}); err == nil || !strings.Contains(err.Error(), "certificate") {
		if err == nil {
			store.Close()
		}
		t.Errorf("with another authority: %v", err)
	}

	exported := make(map[string]bool)
	for name, ops := range c.Ops {
		series := scrape(t, ops)
		if len(series) < 30 {
			t.Errorf("%s exports %d series", name, len(series))
		}
		for s := range series {
			exported[s] = true
		}
	}
	checkQueries(t, exported)

	// A broker takes nothing back that the others rely on.
	late := stack.Run(t, "late broker", []string{
		"OWNLLM_NATS_URL=" + strings.Join(c.NATSURLs, ","), "OWNLLM_NATS_TLS_CA=" + c.CAFile, "OWNLLM_NATS_TOKEN=" + c.NATSToken,
		"OWNLLM_DATABASE_URL=" + c.DatabaseURL, "OWNLLM_OPS_LISTEN=127.0.0.1:0",
	}, stack.Binary(t, stack.OwnLLM), "broker")
	stack.Until(t, 30*time.Second, "the broker with one copy to end", func() bool { return !late.Alive() })
	if log := strings.Join(late.Log(), "\n"); late.Err() == nil || !strings.Contains(log, "3 copies, not 1: it has more copies than --queue-replicas asks for") {
		t.Errorf("a broker with one copy ends with %v:\n%s", late.Err(), log)
	}
	if err := c.Stop(); err != nil {
		t.Errorf("the end: %v", err)
	}
	if _, err := os.Stat(filepath.Join(c.dir, "topology.json")); !os.IsNotExist(err) {
		t.Errorf("topology.json is left: %v", err)
	}
}

// scrape returns the series of a process, without their values: name{label="value",…}.
func scrape(t *testing.T, ops string) map[string]bool {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, ops+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	defer http.DefaultClient.CloseIdleConnections()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	series := make(map[string]bool)
	for line := range strings.Lines(string(b)) {
		if i := strings.LastIndexByte(strings.TrimSpace(line), ' '); i > 0 && line[0] != '#' {
			series[line[:i]] = true
		}
	}
	return series
}
