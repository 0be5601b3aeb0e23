package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/worker/demo"
)

// haproxy is HAProxy, with the configuration of docker-compose.yml but for addresses and TLS.
type haproxy struct {
	t       *testing.T
	addr    string // of the API
	metrics string
}

// startBalancer starts it before edges.
func startBalancer(t *testing.T, edges []*stack.Edge) *haproxy {
	t.Helper()
	program, err := exec.LookPath("haproxy")
	if err != nil {
		if program, err = exec.LookPath("/usr/sbin/haproxy"); err != nil {
			t.Fatalf("%v: scripts/setup installs it", err)
		}
	}
	b := &haproxy{t, stack.FreeAddr(t), stack.FreeAddr(t)}
	text := regexp.MustCompile(`(?m)^.* ssl crt .*\n`).ReplaceAllString(read(t, "scripts/compose/haproxy.cfg"), "")
	replace := func(old, by string) {
		if strings.Count(text, old) != 1 {
			t.Fatalf("haproxy.cfg has %q %d times", old, strings.Count(text, old))
		}
		text = strings.Replace(text, old, by, 1)
	}
	replace("bind :9191", "bind "+b.addr)
	replace("bind :8404", "bind "+b.metrics)
	replace("check port 9192", "check")
	for i, edge := range edges {
		_, port, err := net.SplitHostPort(strings.TrimPrefix(edge.OpsURL, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		replace(fmt.Sprintf(" edge-%d:9191", i+1), " "+edge.Addr+" port "+port)
	}
	file := filepath.Join(t.TempDir(), "haproxy.cfg")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	stack.Run(t, "haproxy", nil, program, "-db", "-f", file)
	return b
}

// value is one of its metrics, of an edge, and 0 if it isn't there.
func (b *haproxy) value(metric string, edge int, labels string) float64 {
	b.t.Helper()
	resp, err := http.Get("http://" + b.metrics + "/metrics")
	if err != nil {
		return 0 // it isn't up yet
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	http.DefaultClient.CloseIdleConnections()
	if err != nil {
		b.t.Fatal(err)
	}
	series := regexp.MustCompile(fmt.Sprintf(`(?m)^%s\{proxy="edges",server="edge-%d"%s\} (\S+)`, metric, edge+1, labels))
	m := series.FindSubmatch(text)
	if m == nil {
		return 0
	}
	v, err := strconv.ParseFloat(string(m[1]), 64)
	if err != nil {
		b.t.Fatal(err)
	}
	return v
}

// await waits until it sees an edge in a state, "UP" or "DOWN".
func (b *haproxy) await(edge int, state string) {
	b.t.Helper()
	stack.Until(b.t, 30*time.Second, "HAProxy to see an edge "+state, func() bool {
		return b.value("haproxy_server_status", edge, `,state="`+state+`"`) == 1
	})
}

// TestBalancer: the load balancer of docker-compose.yml passes tokens on as they come, tells an
// edge at once when a client hangs up, and sends nothing to an edge that drains, of which no
// client sees anything.
func TestBalancer(t *testing.T) {
	backend := stack.StartBackend(t, demo.Options{})
	c := stack.StartCluster(t)
	c.StartWorker(backend.URL).Serving()
	edges := c.StartEdges(2, "--drain-delay", "3s") // for HAProxy, which takes 2 s to see that one leaves
	awaitModel(t, edges, c.Key.Reveal(), demo.ModelID)
	b := startBalancer(t, edges)
	for i := range edges {
		b.await(i, "UP")
	}
	client := newClient("http://"+b.addr+"/v1", c.Key.Reveal())
	defer client.close()
	idle := func() {
		stack.Until(t, 20*time.Second, "the backend to stop", func() bool { return backend.Stats().Active == 0 })
	}

	// A token comes though nothing else does; and the end of a client who waits for more, or
	// for the first one, ends the work.
	for after := range 2 {
		for _, stream := range []bool{true, false} {
			if !stream && after > 0 {
				continue // it gets all or nothing
			}
			ctx, leave := context.WithCancel(t.Context())
			var came sync.WaitGroup
			tokens := make(chan string, 1)
			came.Go(func() {
				client.follow(ctx, stream, map[string]any{"demo": map[string]any{"numbered": true, "stall_after": after}}, func(r *reply) {
					if r.text != "" {
						select {
						case tokens <- r.text:
						default: // it came before
						}
					}
				})
			})
			stack.Until(t, 20*time.Second, "the backend to work", func() bool { return backend.Stats().Active == 1 })
			if after > 0 {
				select {
				case <-tokens:
				case <-time.After(20 * time.Second):
					t.Error("the first token doesn't come before the second")
				}
			}
			leave()
			came.Wait()
			idle()
		}
	}

	// One edge drains while requests come, over connections that are kept.
	const count, pace = 120, 20
	var streams, load sync.WaitGroup
	for range 2 * len(edges) {
		streams.Go(func() { wantWhole(t, client.chat(t.Context(), true, counting(true, count, pace))) })
	}
	stack.Until(t, 20*time.Second, "streams at both edges", func() bool {
		return b.value("haproxy_server_current_sessions", 0, "") > 0 && b.value("haproxy_server_current_sessions", 1, "") > 0
	})
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var mu sync.Mutex
	served := 0
	for range 3 {
		load.Go(func() {
			for ctx.Err() == nil {
				r := client.chat(t.Context(), false, counting(false, 3, 100))
				if wantWhole(t, r); t.Failed() {
					return
				}
				mu.Lock()
				served++
				mu.Unlock()
			}
		})
	}
	drained := make(chan error, 1)
	go func() { drained <- edges[0].Stop() }()
	b.await(0, "DOWN")
	before := b.value("haproxy_server_sessions_total", 0, "")
	for range 20 {
		wantWhole(t, client.chat(t.Context(), false, counting(false, 3, 100)))
	}
	if after := b.value("haproxy_server_sessions_total", 0, ""); after != before {
		t.Errorf("an edge that drains got %g sessions more", after-before)
	}
	stop()
	load.Wait()
	streams.Wait()
	if err := <-drained; err != nil {
		t.Error(err)
	}
	t.Logf("%d requests while an edge drained", served)
}
