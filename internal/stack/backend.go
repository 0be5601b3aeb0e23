package stack

import (
	"context"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/ownllm/ownllm/worker/demo"
)

// Backend is a demo backend in the test's own process, so that the test can set its
// faults and read its statistics.
type Backend struct {
	*demo.Server
	URL string
}

// StartBackend serves a demo backend.
func StartBackend(t testing.TB, o demo.Options) *Backend {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := demo.New(o)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("demo backend: %v", err)
		}
	})
	return &Backend{server, "http://" + l.Addr().String()}
}

// MortalBackend is a demo backend in a process of its own, which can be killed, and
// started again at the same address.
type MortalBackend struct {
	*Process
	URL    string
	t      testing.TB
	models []string
}

// StartMortalBackend starts a demo backend that serves the models.
func StartMortalBackend(t testing.TB, models ...string) *MortalBackend {
	t.Helper()
	b := &MortalBackend{URL: "http://" + FreeAddr(t), t: t, models: models}
	b.Start()
	return b
}

// Start starts the backend again, after it has ended, as it was at first.
func (b *MortalBackend) Start() {
	b.t.Helper()
	args := []string{"demo", "--listen", strings.TrimPrefix(b.URL, "http://")}
	for _, id := range b.models {
		args = append(args, Flag("demo-model", id))
	}
	b.Process = Run(b.t, "backend", nil, Binary(b.t, OwnLLM), args...)
	Until(b.t, startWait, "the backend", func() bool {
		if !b.Alive() {
			b.t.Fatalf("the backend has ended: %v", b.Err())
		}
		return Answers(b.URL + "/health")
	})
}

// Do sends a request to the backend, to /demo/remove say, and fails the test unless the
// status is 200.
func (b *MortalBackend) Do(method, path, body string) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, b.URL+path, strings.NewReader(body))
	if err != nil {
		b.t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		b.t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		b.t.Fatalf("%s %s: %s", method, path, resp.Status)
	}
	http.DefaultClient.CloseIdleConnections()
}
