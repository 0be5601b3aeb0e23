package load

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"testing"
	"time"

	"github.com/tidwall/gjson"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// run makes load, which must be possible.
func run(t *testing.T, c Config) *Report {
	t.Helper()
	if c.URL == nil {
		c.URL = &url.URL{Scheme: "http", Host: "server.test", Path: "/v1"}
	}
	c.Model = "demo"
	r, err := Run(t.Context(), c, nil)
	if err != nil {
		t.Fatal(err)
	}
	if c.Dial != nil {
		time.Sleep(serversEnd)
	}
	return r
}

// serversEnd is how long after a run the last server in memory notices, in the bubble's time.
const serversEnd = time.Hour

func only(t *testing.T, r *Report) *StageReport {
	t.Helper()
	if len(r.Stages) != 1 {
		t.Fatalf("%d stages", len(r.Stages))
	}
	return &r.Stages[0]
}

// inMemory returns a Dial to a server that answers requests over pipes: real connections
// have no place in a bubble of synctest. answer writes the whole response.
func inMemory(answer func(body string, w io.Writer)) func(context.Context) (net.Conn, error) {
	return func(context.Context) (net.Conn, error) {
		ours, theirs := net.Pipe()
		go func() {
			defer theirs.Close()
			in := bufio.NewReader(theirs)
			for {
				req, err := http.ReadRequest(in)
				if err != nil {
					return
				}
				body, err := io.ReadAll(req.Body)
				if err != nil {
					return
				}
				answer(string(body), theirs)
			}
		}()
		return ours, nil
	}
}

// streamHead begins a stream that lasts until its chunks end.
const streamHead = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

func sendChunk(w io.Writer, text string) { fmt.Fprintf(w, "%x\r\n%s\r\n", len(text), text) }

func content(text string) string {
	return `data: {"choices":[{"index":0,"delta":{"content":"` + text + `"},"finish_reason":null}]}` + "\n\n"
}

const (
	finish = `data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}` + "\n\n"
	done   = "data: [DONE]\n\n"
)

// counting answers with as many numbered tokens as are asked for: the first after a wait, the
// others after one each.
func counting(first, each time.Duration) func(string, io.Writer) {
	return func(body string, w io.Writer) {
		time.Sleep(first)
		_, _ = io.WriteString(w, streamHead)
		for i := range int(gjson.Get(body, "max_tokens").Int()) {
			if i > 0 {
				time.Sleep(each)
			}
			sendChunk(w, content(" "+strconv.Itoa(i)))
		}
		sendChunk(w, finish+done)
		_, _ = io.WriteString(w, "0\r\n\r\n")
	}
}
