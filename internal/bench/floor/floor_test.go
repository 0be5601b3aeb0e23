package floor

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		// fasthttp leaves them behind: one looks for its end every few seconds, one never does.
		goleak.IgnoreAnyFunction("github.com/valyala/fasthttp.(*workerPool).Start.func2"),
		goleak.IgnoreAnyFunction("github.com/valyala/fasthttp.updateServerDate.func1"),
	)
}

const (
	events = "data: {\"a\":1}\n\ndata: {\"b\":2}\n\ndata: [DONE]\n\n"
	whole  = `{"whole":true}`
)

// Replies come through as they are, what the backend refuses is an error, and it is told of
// clients that leave.
func TestPaths(t *testing.T) {
	left := make(chan struct{})
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch body, _ := io.ReadAll(r.Body); string(body) {
		case "stream":
			w.Header().Set("Content-Type", "text/event-stream; charset=utf-8")
			for event := range strings.SplitAfterSeq(events, "\n\n") {
				_, _ = io.WriteString(w, event)
				w.(http.Flusher).Flush()
			}
		case "endless":
			w.Header().Set("Content-Type", "text/event-stream; charset=utf-8")
			for tick := time.Tick(time.Millisecond); r.Context().Err() == nil; <-tick {
				_, _ = io.WriteString(w, events)
				w.(http.Flusher).Flush()
			}
			left <- struct{}{}
		case "whole":
			_, _ = io.WriteString(w, whole)
		default:
			http.Error(w, "no", http.StatusTeapot)
		}
	}))
	defer backend.Close()
	for name, queued := range map[string]bool{"core": false, "queue": true} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			says, stdout := io.Pipe()
			ended := make(chan error, 1)
			go func() {
				ended <- Serve(ctx, Config{Backend: backend.URL, Dir: t.TempDir(), Queue: queued}, stdout)
				_ = stdout.Close()
			}()
			line, err := bufio.NewReader(says).ReadString('\n')
			if err != nil {
				t.Fatal(err, <-ended)
			}
			_, url, _ := strings.Cut(strings.TrimSpace(line), "listening on ")
			transport := &http.Transport{}
			defer transport.CloseIdleConnections()
			client := &http.Client{Transport: transport}
			for range 3 {
				for body, want := range map[string]string{"stream": events, "whole": whole, "nonsense": ""} {
					resp, err := client.Post(url+"/v1/chat/completions", "application/json", strings.NewReader(body))
					if err != nil {
						t.Fatal(err)
					}
					got, err := io.ReadAll(resp.Body)
					_ = resp.Body.Close()
					if fails := want == ""; err != nil || fails != (resp.StatusCode != http.StatusOK) || !fails && string(got) != want {
						t.Errorf("%s: %s, %q, %v", body, resp.Status, got, err)
					}
				}
			}
			resp, err := client.Post(url+"/v1/chat/completions", "application/json", strings.NewReader("endless"))
			if err != nil {
				t.Fatal(err)
			}
			_, _ = io.ReadFull(resp.Body, make([]byte, len(events)))
			_ = resp.Body.Close()
			<-left
			cancel()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		})
	}
}
