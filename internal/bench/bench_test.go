package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The whole benchmark, once and short, so that it works when somebody needs it.
func TestQuick(t *testing.T) {
	if testing.Short() {
		t.Skip("builds and starts the whole program")
	}
	var stdout, stderr bytes.Buffer
	if code := run(t.Context(), []string{"-quick", "-json"}, &stdout, &stderr); code != 0 {
		t.Fatalf("exit code %d\n%s", code, &stderr)
	}
	var r Report
	if err := json.Unmarshal(stdout.Bytes(), &r); err != nil {
		t.Fatal(err)
	}
	if r.Cores < 1 || r.Commit == "" || len(r.Workloads) != len(workloads) || r.Admissions == nil {
		t.Fatalf("report = %+v", r)
	}
	for _, m := range r.Workloads {
		if len(m.Rounds) != 1 {
			t.Fatalf("%s: %d rounds, want 1", m, len(m.Rounds))
		}
		for side, f := range map[string]Figure{"direct": m.Rounds[0].Direct, "proxy": m.Rounds[0].Proxy, "broker": m.Rounds[0].Broker} {
			if f.PerSecond <= 0 || f.FirstP50 <= 0 || f.FirstP99 < f.FirstP50 {
				t.Errorf("%s, %s: %+v", m, side, f)
			}
		}
	}
	for _, c := range []contest{
		{1000, 1, "admit", 0}, {1000, 32, "update", 32}, {1000, 256, "update", 256}, {1, 256, "admit", 0}, {1, 256, "update", 64},
	} {
		if rounds := r.Admissions.find(c); len(rounds) != 1 {
			t.Errorf("%+v: %d rounds, want 1", c, len(rounds))
		}
	}
	// Admission alone is one round trip and its settlement another, however busy the machine.
	if p := r.Admissions.find(alone)[0]; p.Trips != 2 {
		t.Errorf("%v round trips for an admission and a settlement", p.Trips)
	}
	var text strings.Builder
	if err := r.writeText(&text); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{r.Commit, "stream, 256 tokens, 32 clients", "whole,   32 tokens,  1 client", "p99", "ownllm up", "1000 keys,  32 waiters", "   1 key,    1 waiter "} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("the text lacks %q:\n%s", want, &text)
		}
	}
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{{"-rounds", "0"}, {"-duration", "1ms"}, {"-nonsense"}, {"word"}, {"-only", "word"}} {
		var stdout, stderr bytes.Buffer
		if code := run(t.Context(), args, &stdout, &stderr); code != 2 || stderr.Len() == 0 {
			t.Errorf("%q: exit code %d, says %q", args, code, &stderr)
		}
	}
}

// event is an event of a stream as the demo model sends it.
func event(i int, finish string) string {
	return fmt.Sprintf("data: {\"id\":\"x\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" %d\"},\"finish_reason\":%s}]}\n\n", i, finish)
}

func wholeStream() []string {
	events := []string{"data: {\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}]}\n\n"}
	for i := range 32 {
		events = append(events, event(i, "null"))
	}
	return append(events, "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n", "data: [DONE]\n\n")
}

func TestCheckStream(t *testing.T) {
	good := wholeStream()
	last := len(good) - 1
	for name, tc := range map[string]struct {
		change func(e []string) []string
		want   string
	}{
		"whole":            {func(e []string) []string { return e }, ""},
		"a token is lost":  {func(e []string) []string { return append(e[:5], e[6:]...) }, "tokens are"},
		"a token is twice": {func(e []string) []string { e[5] += e[5]; return e }, "tokens are"},
		"out of order":     {func(e []string) []string { e[5], e[6] = e[6], e[5]; return e }, "tokens are"},
		"no finish_reason": {func(e []string) []string { return append(e[:last-1], e[last]) }, "0 finish_reasons"},
		"no [DONE]":        {func(e []string) []string { return e[:last] }, "no [DONE]"},
		"more after it":    {func(e []string) []string { return append(e, event(0, "null")) }, "after [DONE]"},
		"an error":         {func(e []string) []string { e[last-1] = "data: {\"error\":{}}\n\n"; return e }, "error in the stream"},
		"not an event":     {func(e []string) []string { e[3] = "<html>\n"; return e }, "not data"},
		"nothing":          {func([]string) []string { return nil }, "tokens are"},
	} {
		t.Run(name, func(t *testing.T) {
			body := strings.Join(tc.change(append([]string(nil), good...)), "")
			_, err := checkStream([]byte(body), nil, numbered(32))
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("error is %v, want %q", err, tc.want)
			}
		})
	}
}

func TestCheckWhole(t *testing.T) {
	good := `{"choices":[{"message":{"content":"` + numbered(32) + `"},"finish_reason":"stop"}]}`
	if err := checkWhole([]byte(good), numbered(32)); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{"", strings.Replace(good, " 7", "", 1), strings.Replace(good, "stop", "length", 1)} {
		if checkWhole([]byte(bad), numbered(32)) == nil {
			t.Errorf("%q is taken for the whole reply", bad)
		}
	}
}

// A client reads both forms of a body, and goes on with the next reply on the same
// connection.
func TestRoundTrip(t *testing.T) {
	stream := strings.Join(wholeStream(), "")
	var chunked strings.Builder
	for len(stream) > 0 {
		n := min(len(stream), 100)
		fmt.Fprintf(&chunked, "%x\r\n%s\r\n", n, stream[:n])
		stream = stream[n:]
	}
	whole := `{"content":"` + numbered(32) + `","finish_reason":"stop"}`
	for name, tc := range map[string]struct {
		stream bool
		answer string
		want   string
	}{
		"chunks":      {true, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked.String() + "0\r\n\r\n", ""},
		"length":      {false, "HTTP/1.1 200 OK\r\ncontent-length: " + strconv.Itoa(len(whole)) + "\r\n\r\n" + whole, ""},
		"an error":    {true, "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 6\r\n\r\nsorry\n", "status 503: sorry"},
		"no length":   {false, "HTTP/1.1 200 OK\r\n\r\n", "no length"},
		"not HTTP":    {false, "SSH-2.0-OpenSSH\r\n", "not HTTP"},
		"short chunk": {true, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcdefgh", "read body"},
	} {
		t.Run(name, func(t *testing.T) {
			ours, theirs := net.Pipe()
			c := &client{conn: ours, in: bufio.NewReader(ours), request: []byte("request"), stream: tc.stream, want: numbered(32)}
			defer c.close()
			go func() {
				defer theirs.Close()
				for range 2 {
					if _, err := theirs.Read(make([]byte, 64)); err != nil {
						return
					}
					if _, err := theirs.Write([]byte(tc.answer)); err != nil {
						return
					}
				}
			}()
			for range 2 {
				took, err := c.roundTrip()
				if tc.want != "" {
					if err == nil || !strings.Contains(err.Error(), tc.want) {
						t.Errorf("error is %v, want %q", err, tc.want)
					}
					return
				}
				if err != nil || took <= 0 {
					t.Fatalf("took %s, error %v", took, err)
				}
			}
		})
	}
}

func TestParseStat(t *testing.T) {
	line := "4242 (a (odd) name) S 77 4242 4242 0 -1 4194560 1 2 3 4 150 25 7 3 20 0 1 0 100"
	want := stat{pid: 4242, parent: 77, own: 1750 * time.Millisecond, reaped: 100 * time.Millisecond}
	if got := parseStat(line); got != want {
		t.Errorf("parseStat = %+v, want %+v", got, want)
	}
	if got := parseStat("1 (cut"); got.own != 0 {
		t.Errorf("a line that was cut off gives %+v", got)
	}
}

func TestStatistics(t *testing.T) {
	var m Measured
	for _, n := range []float64{4, 1, 3, 2} {
		m.Rounds = append(m.Rounds, Round{Broker: Figure{PerSecond: n}})
	}
	value := func(p Round) float64 { return p.Broker.PerSecond }
	if got, want := m.over(value), (spread{1, 2.5, 4}); got != want {
		t.Errorf("over = %v, want %v", got, want)
	}
	m.Rounds = m.Rounds[:3]
	if got, want := m.over(value), (spread{1, 3, 4}); got != want {
		t.Errorf("over = %v, want %v", got, want)
	}
	sorted := make([]time.Duration, 100)
	for i := range sorted {
		sorted[i] = time.Duration(i) * time.Microsecond
	}
	if p50, p99 := quantile(sorted, 0.5), quantile(sorted, 0.99); p50 != 50 || p99 != 99 {
		t.Errorf("p50 = %v, p99 = %v", p50, p99)
	}
	if got := quantile(sorted[:1], 0.99); got != 0 {
		t.Errorf("p99 of one value = %v", got)
	}
}
