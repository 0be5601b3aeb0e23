package floor

import (
	"bufio"
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/natsd"
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

// A client's leaving is told again until the worker has heard, whose connection may be down.
func TestLeaveIsHeard(t *testing.T) {
	server, err := natsd.Start(t.Context(), natsd.Config{Listen: "127.0.0.1:0", StoreDir: t.TempDir(), Token: token, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Stop()
	connect := func() *nats.Conn {
		nc, err := bus.Connect(bus.Config{URL: server.URL(), Password: token}.As(bus.UserCore, "test"), slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		return nc
	}
	ours, theirs := connect(), connect()
	defer theirs.Close()
	p := &path{nc: ours}
	left := make(chan error, 1)
	go func() { left <- p.leave("7") }()
	if _, err := ours.RequestWithContext(t.Context(), leaves, []byte("nobody is there")); !errors.Is(err, nats.ErrNoResponders) {
		t.Fatal(err)
	}
	select {
	case err := <-left:
		t.Fatalf("somebody has heard: %v", err)
	default:
	}
	ctx, cancel := context.WithCancel(t.Context())
	w := &worker{nc: theirs, running: map[string]context.CancelFunc{"7": cancel}}
	if _, err := theirs.Subscribe(leaves, w.left); err != nil {
		t.Fatal(err)
	}
	<-ctx.Done()
	if err := <-left; err != nil {
		t.Error(err)
	}
	ours.Close()
	if err := p.leave("8"); !errors.Is(err, nats.ErrConnectionClosed) {
		t.Errorf("on a closed connection: %v", err)
	}
}
