package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// breakOffs is a backend that notes when requests begin, and when they are broken off.
type breakOffs struct {
	*demo.Server
	mu    sync.Mutex
	begun map[string]bool
	ended map[string]time.Time // by the user of the request
}

func (b *breakOffs) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	var request struct{ User string }
	if json.Unmarshal(body, &request) == nil && request.User != "" {
		b.mu.Lock()
		b.begun[request.User] = true
		b.mu.Unlock()
		broken := func() {
			b.mu.Lock()
			defer b.mu.Unlock()
			if b.ended[request.User].IsZero() {
				b.ended[request.User] = time.Now()
			}
		}
		defer broken() // a write can fail first
		defer context.AfterFunc(r.Context(), broken)()
	}
	b.Server.ServeHTTP(w, r)
}

func (b *breakOffs) count(m func() int) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return m()
}

// TestCancelIsSwift: of 200 requests at once, streamed or not, the backend sees nearly all
// broken off within a second after their clients have left.
func TestCancelIsSwift(t *testing.T) {
	const requests, within, slack = 200, time.Second, 2 * time.Second
	model := demo.DefaultModel()
	model.ContextWindow = 1 << 20
	b := &breakOffs{
		Server: demo.New(demo.Options{Models: []schemas.Model{model}}),
		begun:  make(map[string]bool), ended: make(map[string]time.Time),
	}
	server := httptest.NewServer(b)
	t.Cleanup(server.Close)
	up := stack.StartUp(t, t.TempDir(), "--backend", server.URL, "--slots", "256", "--queue-bound", "1000")
	for name, stream := range map[string]bool{"streamed": true, "whole": false} {
		t.Run(name, func(t *testing.T) {
			c := newClient(up.BaseURL, up.APIKey)
			defer c.close()
			b.count(func() int { clear(b.begun); clear(b.ended); return 0 })
			left := make(map[string]time.Time)
			var mu sync.Mutex
			var clients sync.WaitGroup
			ready := make(chan struct{})
			for i := range requests {
				user := name + "-" + string(rune('a'+i/26)) + string(rune('a'+i%26))
				clients.Go(func() {
					ctx, leave := context.WithCancel(t.Context())
					defer leave()
					body := chatBody(stream, map[string]any{"user": user, "demo": map[string]any{"tokens": 100_000, "tokens_per_second": 20}})
					go func() {
						<-ready
						time.Sleep(time.Duration(rand.IntN(3000)) * time.Millisecond) // they leave at any time
						mu.Lock()
						left[user] = time.Now()
						mu.Unlock()
						leave()
					}()
					resp, err := c.post(ctx, "/chat/completions", body)
					if err != nil {
						return // left before the answer, as all do whose reply isn't streamed
					}
					_, _ = io.Copy(io.Discard, resp.Body)
					_ = resp.Body.Close()
				})
			}
			stack.Until(t, time.Minute, "all to run", func() bool { return b.count(func() int { return len(b.begun) }) == requests })
			close(ready)
			clients.Wait()
			stack.Until(t, time.Minute, "all to be broken off", func() bool { return b.count(func() int { return len(b.ended) }) == requests })
			var took []time.Duration
			b.count(func() int {
				for user, at := range left {
					took = append(took, b.ended[user].Sub(at))
				}
				return 0
			})
			slices.Sort(took)
			p50, p99 := took[len(took)/2], took[len(took)*99/100-1]
			t.Logf("client's close to the backend's: p50 %s, p99 %s, at most %s", p50, p99, took[len(took)-1])
			if p99 > within+slack {
				t.Errorf("p99 is %s", p99)
			}
		})
	}
}
