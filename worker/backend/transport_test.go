package backend

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// script is a server that answers the requests of each connection with what is written down
// for it; "" closes the connection.
func script(t *testing.T, connections ...[]string) (url string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for _, answers := range connections {
			nc, err := listener.Accept()
			if err != nil {
				return
			}
			defer nc.Close()
			r := bufio.NewReader(nc)
			for _, answer := range answers {
				if answer == "" {
					_ = nc.Close()
					break
				}
				req, err := http.ReadRequest(r)
				if err != nil {
					break
				}
				_, _ = io.Copy(io.Discard, req.Body)
				_, _ = io.WriteString(nc, answer)
			}
		}
	}()
	t.Cleanup(func() {
		_ = listener.Close()
		<-done
	})
	return "http://" + listener.Addr().String()
}

const okAnswer = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

func ask(t *testing.T, tr *transport, url string) (string, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader("hello"))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return string(text), err
}

func TestTransport(t *testing.T) {
	for _, tt := range []struct {
		name        string
		connections [][]string
		requests    int
		want        string // in the error of the last request; "": it is answered with ok
	}{
		{"one connection serves many", [][]string{{okAnswer, okAnswer, okAnswer}}, 3, ""},
		{"chunks", [][]string{{"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n", okAnswer}}, 2, ""},
		{"no length", [][]string{{"HTTP/1.1 200 OK\r\n\r\nok", ""}}, 1, ""},
		{"interim answers", [][]string{{"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + okAnswer, okAnswer}}, 2, ""},
		{"a server that closes", [][]string{{"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"}, {okAnswer}}, 2, ""},
		{"a connection that has died meanwhile", [][]string{{okAnswer, ""}, {okAnswer}}, 2, ""},
		{"what nobody has asked for", [][]string{{okAnswer + "HTTP/1.1 408 Request Timeout\r\nContent-Length: 3\r\n\r\nbye"}, {okAnswer}}, 2, ""},
		{"silence on a fresh connection", [][]string{{""}}, 1, errNoAnswer.Error()},
		{"silence on two", [][]string{{okAnswer, ""}, {""}}, 2, errNoAnswer.Error()},
		{"another protocol", [][]string{{"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"}}, 1, errHead.Error()},
		{"interim answers without end", [][]string{{strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", 100)}}, 1, errHead.Error()},
		{"a head without end", [][]string{{"HTTP/1.1 200 OK\r\n" + strings.Repeat("X-Y: "+strings.Repeat("z", 1000)+"\r\n", 2*maxHead/1000)}}, 1, errHead.Error()},
	} {
		t.Run(tt.name, func(t *testing.T) {
			url, tr := script(t, tt.connections...), newTransport()
			defer tr.CloseIdleConnections()
			for n := 1; n <= tt.requests; n++ {
				text, err := ask(t, tr, url)
				switch {
				case n == tt.requests && tt.want != "":
					if err == nil || !strings.Contains(err.Error(), tt.want) {
						t.Errorf("request %d: %q, %v, want %q", n, text, err, tt.want)
					}
				case err != nil || text != "ok":
					t.Fatalf("request %d: %q, %v", n, text, err)
				}
			}
		})
	}
}

// TestLateRefusal shows that a server which refuses a request without reading it is heard,
// whether the body is sent at once or beside the answer.
func TestLateRefusal(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Connection", "close")
		w.WriteHeader(http.StatusRequestEntityTooLarge)
	}))
	defer server.Close()
	tr := newTransport()
	defer tr.CloseIdleConnections()
	for _, size := range []int{10, maxDirect, maxDirect + 1, 8 << 20} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL, bytes.NewReader(make([]byte, size)))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := tr.RoundTrip(req)
		if err != nil {
			t.Errorf("%d bytes: %v", size, err)
			continue
		}
		if resp.StatusCode != http.StatusRequestEntityTooLarge {
			t.Errorf("%d bytes: status %d", size, resp.StatusCode)
		}
		_ = resp.Body.Close()
	}
}

// TestIdleConnectionsEnd shows that a connection doesn't wait for ever, nor more than maxIdle.
func TestIdleConnectionsEnd(t *testing.T) {
	tr := newTransport()
	ends := func() net.Conn {
		a, b := net.Pipe()
		tr.keep(&conn{Conn: a, of: tr})
		return b
	}
	old := ends()
	tr.idle[0].since = time.Now().Add(-idleFor - time.Second)
	young := ends()
	if _, err := old.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the old one: %v", err)
	}
	for range maxIdle {
		ends()
	}
	if len(tr.idle) != maxIdle {
		t.Errorf("%d connections wait", len(tr.idle))
	}
	tr.CloseIdleConnections()
	if _, err := young.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the young one: %v", err)
	}
}

// TestStreamsLendTheirReaders shows that streams which wait, and leave their readers to others
// meanwhile, come whole and in order, wherever they are cut; and that their connections serve
// again.
func TestStreamsLendTheirReaders(t *testing.T) {
	const streams, length = 8, 40
	var connections atomic.Int64
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		piece, _ := strconv.Atoi(r.URL.Query().Get("piece"))
		var text []byte
		for n := range length {
			text = fmt.Appendf(text, "data: %s %d\n\n", r.URL.Query().Get("stream"), n)
		}
		for part := range slices.Chunk(text, piece) {
			_, _ = w.Write(part)
			_ = http.NewResponseController(w).Flush()
		}
	}))
	server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			connections.Add(1)
		}
	}
	server.Start()
	defer server.Close()
	tr := newTransport()
	defer tr.CloseIdleConnections()
	for _, piece := range []int{1, 7, 500} {
		var all sync.WaitGroup
		for id := range streams {
			all.Go(func() {
				req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, fmt.Sprintf("%s?stream=%d&piece=%d", server.URL, id, piece), nil)
				if err != nil {
					t.Error(err)
					return
				}
				resp, err := tr.RoundTrip(req)
				if err != nil {
					t.Error(err)
					return
				}
				defer resp.Body.Close()
				var e events
				e.begin(resp.Body)
				defer e.end()
				for n := range length {
					if data, _, err := e.next(true); err != nil || string(data) != fmt.Sprint(id, " ", n) {
						t.Errorf("in pieces of %d, stream %d, event %d: %q, %v", piece, id, n, data, err)
						return
					}
				}
				if _, _, err := e.next(true); !errors.Is(err, io.EOF) {
					t.Errorf("in pieces of %d, stream %d: it ends with %v", piece, id, err)
				}
			})
		}
		all.Wait()
	}
	if n := connections.Load(); n > streams {
		t.Errorf("%d streams at once took %d connections", streams, n)
	}
}

// TestPlenty shows that what a server has sent all at once comes in large pieces, whole and in order,
// that nothing of it waits for what comes later, and that a stream which waits has no stage.
func TestPlenty(t *testing.T) {
	burst, rest := make(chan []byte), make(chan []byte)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for _, from := range []chan []byte{burst, rest} {
			text := <-from
			for part := range slices.Chunk(text, 1+rand.IntN(2000)) {
				_, _ = w.Write(part)
			}
			_ = http.NewResponseController(w).Flush()
		}
	}))
	defer server.Close()
	tr := newTransport()
	defer tr.CloseIdleConnections()
	staged := 0
	for range 30 {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, server.URL, nil)
		if err != nil {
			t.Fatal(err)
		}
		length := rand.IntN(20_000)
		text := make([]byte, 0, 20*length)
		for n := range length {
			text = fmt.Appendf(text, "data: %d\n\n", n)
		}
		text = append(text, "data: the "...)
		go func() { burst <- text }()
		resp, err := tr.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		c := resp.Body.(*body).conn
		var e events
		e.begin(resp.Body)
		expect := func(wait bool, want string) {
			t.Helper()
			if data, _, err := e.next(wait); err != nil || string(data) != want {
				t.Fatalf("%q, %v, want %q of %d", data, err, want, length)
			}
		}
		for n := 0; n < length; {
			expect(true, strconv.Itoa(n)) // hangs if it waits for the rest
			n++
			for ; n < length && e.lineReady(); n++ {
				if c.stage != nil {
					staged++
				}
				expect(false, strconv.Itoa(n))
			}
		}
		if data, _, err := e.next(false); !errors.Is(err, errNotYet) {
			t.Fatalf("behind the last event is %q, %v", data, err)
		}
		if c.stage != nil {
			t.Error("a stream that waits has a stage")
		}
		rest <- []byte("end\n\n")
		expect(true, "the end")
		if _, _, err := e.next(true); !errors.Is(err, io.EOF) {
			t.Errorf("it ends with %v", err)
		}
		e.end()
		_ = resp.Body.Close()
		if c.stage != nil || len(c.ahead) > 0 || c.plenty {
			t.Errorf("the connection is put by with %d bytes ahead, plenty %t", len(c.ahead), c.plenty)
		}
	}
	if staged == 0 {
		t.Error("nothing ever came in a large piece")
	}
}

// TestContextOfAnAnswer shows that a context which ends once the answer was read takes nothing
// from the connection, and one that ends before closes it.
func TestContextOfAnAnswer(t *testing.T) {
	url, tr := script(t, []string{okAnswer, okAnswer}), newTransport()
	defer tr.CloseIdleConnections()
	for _, early := range []bool{false, true} {
		ctx, cancel := context.WithCancel(t.Context())
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := tr.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		if early {
			cancel()
		}
		_, _ = io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		cancel()
		if kept := len(tr.idle) == 1; kept == early {
			t.Errorf("cancelled early %v: kept %v", early, kept)
		}
		if _, err := resp.Body.Read(make([]byte, 1)); !errors.Is(err, errClosed) {
			t.Errorf("read after Close: %v", err)
		}
	}
}
