package e2e

import (
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/worker/demo"
)

func TestZZQueued(t *testing.T) {
	backend := stack.StartBackend(t, demo.Options{})
	c := stack.StartCluster(t)
	l := openLedger(t, c.DatabaseURL)
	setPrice(t, c, demo.ModelID, books.MicroCents)
	c.StartWorker(backend.URL, "--slots", "2")
	edges := c.StartEdges(2)
	awaitModel(t, edges, c.Key.Reveal(), demo.ModelID)
	var asks []ask
	for range 2 {
		asks = append(asks, ask{stream: true, tokens: 3000, pace: 40})
	}
	f := depart(t, c, edges[0], backend, asks...)
	key, secret := newKey(t, c, books.NewKey{BudgetCents: new(int64(100_000))})
	client := newClient(edges[0].BaseURL, secret)
	defer client.close()
	for i := range 12 {
		go client.chat(t.Context(), i%2 == 0, limited(priced(t, 3000, map[string]any{"tokens_per_second": 40}), 3000))
	}
	l.until(20*time.Second, "queued", key, func(h holding) bool { return h.InFlight == 12 })
	time.Sleep(300 * time.Millisecond)
	edges[0].Kill()
	since := time.Now()
	go func() {
		cl := newClient(edges[1].BaseURL, c.Key.Reveal())
		defer cl.close()
		r := cl.chat(t.Context(), true, priced(t, 5, nil))
		t.Logf("another client waited %s: %v %v", time.Since(since), r.status, r.err)
	}()
	s, m := l.awaitReturn(f.key, since, time.Minute, time.Minute)
	t.Logf("running: %s %s", s, m)
	s, m = l.awaitReturn(key, since, time.Minute, 2*time.Minute)
	t.Logf("queued: %s %s; started %d, jobs %d", s, m, backend.Stats().Started, jobs(t, c))
	for _, e := range l.entries(key) {
		t.Logf("%+v", e)
	}
}
