package floor

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

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

// startServer starts a NATS server, and returns what connects to it.
func startServer(t *testing.T) (connect func() *nats.Conn) {
	server, err := natsd.Start(t.Context(), natsd.Config{Listen: "127.0.0.1:0", StoreDir: t.TempDir(), Token: token, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Stop)
	return func() *nats.Conn {
		nc, err := bus.Connect(bus.Config{URL: server.URL(), Password: token}.As(bus.UserCore, "test"), slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		return nc
	}
}

// A client's leaving is told again until the worker has heard, whose connection may be down.
func TestLeaveIsHeard(t *testing.T) {
	connect := startServer(t)
	ours, theirs := connect(), connect()
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

// TestTogether has a backend say a whole stream at once: it goes on in one message.
func TestTogether(t *testing.T) {
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // what is unread when conn is closed may take the reply with it
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		reply := "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
		for event := range strings.SplitAfterSeq(events, "\n\n") {
			reply += fmt.Sprintf("%x\r\n%s\r\n", len(event), event) // the last one is empty, and the end
		}
		_, _ = io.WriteString(conn, reply)
	}))
	defer backend.Close()
	connect := startServer(t)
	ours, theirs := connect(), connect()
	sub, err := ours.SubscribeSync(replies + "*")
	if err == nil {
		err = ours.Flush() // it is there before the first message
	}
	if err != nil {
		t.Fatal(err)
	}
	w := &worker{nc: theirs, url: backend.URL, running: make(map[string]context.CancelFunc)}
	w.serve(t.Context(), []byte("7\nstream"))
	for _, want := range []string{"s" + events, "e"} {
		m, err := sub.NextMsgWithContext(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if got := string(m.Data); got != want {
			t.Errorf("a message of %q, want %q", got, want)
		}
	}
}

// TestRead reads streams in pieces: each is what has come and fits, and nothing is lost.
func TestRead(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := &stream{in: &inbox{wake: make(chan struct{}, 1)}}
		var unread []byte
		read := func(size int) {
			b := make([]byte, size)
			n, err := s.Read(b)
			want := unread[:min(size, len(unread))]
			if err != nil || !bytes.Equal(b[:n], want) {
				t.Fatalf("read %q, %v, want %q", b[:n], err, want)
			}
			unread = unread[n:]
		}
		piece := rapid.SliceOfN(rapid.Byte(), 1, 9)
		t.Repeat(map[string]func(*rapid.T){
			"put": func(t *rapid.T) {
				text := piece.Draw(t, "text")
				s.in.put(append([]byte{frameChunk}, text...))
				unread = append(unread, text...)
			},
			"read": func(t *rapid.T) {
				if len(unread) > 0 { // else it would wait
					read(rapid.IntRange(1, 20).Draw(t, "size"))
				}
			},
		})
		end, want := byte(frameEnd), io.EOF
		if rapid.Bool().Draw(t, "fails") {
			end, want = frameFail, io.ErrUnexpectedEOF
		}
		s.in.put([]byte{end})
		for len(unread) > 0 {
			read(7)
		}
		if n, err := s.Read(make([]byte, 1)); n != 0 || !errors.Is(err, want) {
			t.Fatalf("behind the end: %d bytes, %v, want %v", n, err, want)
		}
	})
}
