package load

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"pgregory.net/rapid"
)

// read reads a response as a client does, and returns what is wrong with it.
func read(in io.Reader, want int) (r *reply, f Failure, b Breach, err error) {
	at := time.Unix(1, 0)
	l := &lines{arrived: func() { at = at.Add(time.Millisecond) }}
	r = &reply{live: new(atomic.Int64), numbers: numbers{want: want}}
	buffered := bufio.NewReader(in)
	h, err := readHead(buffered)
	if err == nil {
		r.status = h.status
		l.reset(h.body(buffered))
		switch {
		case h.status != 200:
			r.refused(l, &at)
		case h.stream:
			err = r.stream(l, &at)
		default:
			err = r.whole(l, &at)
		}
	}
	f, b = r.outcome(err)
	return r, f, b, err
}

func events(pieces ...string) string { return strings.Join(pieces, "") }

// until the connection closes, so that the body is all there is.
const plainStream = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n\r\n"

func TestReply(t *testing.T) {
	four := []string{content(" 0"), content(" 1"), content(" 2"), content(" 3")}
	chunk := func(choice, rest string) string { return `data: {"choices":[` + choice + `]` + rest + "}\n\n" }
	for name, tc := range map[string]struct {
		body    string
		want    int // numbered tokens; 0: not verified
		breach  Breach
		failure Failure
		tokens  int
	}{
		"whole":             {events(events(four...), finish, done), 4, "", Failure{}, 4},
		"role first":        {events(chunk(`{"delta":{"role":"assistant","content":""}}`, ""), events(four...), finish, done), 4, "", Failure{}, 4},
		"keep-alives":       {events(": queued\n", four[0], ": queued\n", events(four[1:]...), finish, done), 4, "", Failure{}, 4},
		"carriage returns":  {strings.ReplaceAll(events(events(four...), finish, done), "\n", "\r\n"), 4, "", Failure{}, 4},
		"spaces in it":      {events(`data: {"choices": [{"delta": {"content": " 0"}, "finish_reason": null}]}`+"\n\n", finish, done), 1, "", Failure{}, 1},
		"no space at all":   {strings.ReplaceAll(events(events(four...), finish, done), "data: ", "data:"), 4, "", Failure{}, 4},
		"finish with text":  {events(chunk(`{"delta":{"content":" 0"},"finish_reason":"stop"}`, ""), done), 1, "", Failure{}, 1},
		"usage counts":      {events(four[0], finish, chunk("", `,"usage":{"prompt_tokens":7,"completion_tokens":9}`), done), 0, "", Failure{}, 9},
		"usage is null":     {events(chunk(`{"delta":{"content":"x"}}`, `,"usage":null`), finish, done), 0, "", Failure{}, 1},
		"error is null":     {events(chunk(`{"delta":{"content":"x"}}`, `,"error":null`), finish, done), 0, "", Failure{}, 1},
		"mark in the text":  {events(chunk(`{"delta":{"content":"\"finish_reason\":\"stop\" \"error\""}}`, ""), finish, done), 0, "", Failure{}, 1},
		"reasoning":         {events(chunk(`{"delta":{"reasoning_content":"hm"}}`, ""), four[0], finish, done), 0, "", Failure{}, 2},
		"tools":             {events(chunk(`{"delta":{"tool_calls":[{"index":0}]}}`, ""), chunk(`{"delta":{},"finish_reason":"tool_calls"}`, ""), done), 0, "", Failure{}, 1},
		"no [DONE]":         {events(four[0], finish), 0, "", Failure{}, 1},
		"no [DONE], strict": {events(four[0], finish), 1, Torn, Failure{}, 1},
		"no finish":         {events(events(four...), done), 4, Torn, Failure{}, 4},
		"nothing":           {"", 0, Torn, Failure{}, 0},
		"lost":              {events(four[0], four[2], four[3], finish, done), 4, Lost, Failure{}, 3},
		"swapped":           {events(four[0], four[2], four[1], four[3], finish, done), 4, Lost, Failure{}, 4},
		"repeated":          {events(four[0], four[0], four[1], finish, done), 4, Repeated, Failure{}, 3},
		"begins anew":       {events(events(four...), events(four...), finish, done), 4, Repeated, Failure{}, 8},
		"short":             {events(events(four...), finish, done), 5, Short, Failure{}, 4},
		"long":              {events(events(four...), finish, done), 3, Long, Failure{}, 4},
		"garbled":           {events(content(" 0"), content(" one"), finish, done), 2, Garbled, Failure{}, 2},
		"escapes":           {events(content(` 0\n`), finish, done), 1, Garbled, Failure{}, 1},
		"coalesced":         {events(content(" 0 1 2"), content(" 3"), finish, done), 4, "", Failure{}, 2},
		"cut in a number":   {events(content(" 0 1 2 3 4 5 6 7 8 9 1"), content("0"), finish, done), 11, "", Failure{}, 2},
		"error":             {events(four[0], `data: {"error":{"message":"m","type":"t","param":null,"code":"agent_offline"}}`+"\n\n"), 4, "", Failure{Status: 200, Code: "agent_offline"}, 1},
		"error in words":    {events(four[0], `data: {"error":"oops"}`+"\n\n"), 4, "", Failure{Status: 200, Code: "http_200"}, 1},
		"after [DONE]":      {events(four[0], finish, done, four[0]), 1, "", Failure{}, 1},
		"not JSON":          {events(four[0], "data: <html>\n\n"), 4, "", Failure{Status: 200, Code: "not_json"}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			for how, in := range map[string]io.Reader{
				"at once": strings.NewReader(plainStream + tc.body), "by bytes": iotest.OneByteReader(strings.NewReader(plainStream + tc.body)),
			} {
				r, f, b, err := read(in, tc.want)
				if f != tc.failure || b != tc.breach || err != nil || r.tokens() != tc.tokens {
					t.Errorf("%s: %+v, %q, %v, %d tokens; want %+v, %q, %d tokens", how, f, b, err, r.tokens(), tc.failure, tc.breach, tc.tokens)
				}
				if want := max(r.chunks-1, 0); len(r.gaps) != want {
					t.Errorf("%s: %d gaps, want %d", how, len(r.gaps), want)
				}
			}
		})
	}
}

func TestResponse(t *testing.T) {
	const whole = `{"choices":[{"message":{"content":" 0 1"},"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"completion_tokens":2}}`
	sized := func(body string) string { return fmt.Sprintf("content-length: %d\r\n\r\n%s", len(body), body) }
	for name, tc := range map[string]struct {
		response string
		failure  Failure
		breach   Breach
	}{
		"length":         {"HTTP/1.1 200 OK\r\n" + sized(whole), Failure{}, ""},
		"chunks":         {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + fmt.Sprintf("5\r\n%s\r\n%x\r\n%s\r\n0\r\nTrailer: x\r\n\r\n", whole[:5], len(whole)-5, whole[5:]), Failure{}, ""},
		"until it ends":  {"HTTP/1.0 200 OK\r\n\r\n" + whole, Failure{}, ""},
		"early hints":    {"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\n" + sized(whole), Failure{}, ""},
		"refused":        {"HTTP/1.1 429 Too Many Requests\r\n" + sized(`{"error":{"code":"tenant_qps_limit","type":"rate_limit_exceeded"}}`), Failure{Status: 429, Code: "tenant_qps_limit"}, ""},
		"no code":        {"HTTP/1.1 400 Bad Request\r\n" + sized(`{"error":{"type":"bad"}}`), Failure{Status: 400, Code: "bad"}, ""},
		"redirect":       {"HTTP/1.1 307 Temporary Redirect\r\nLocation: /\r\n" + sized(""), Failure{Status: 307, Code: "http_307"}, ""},
		"error as 200":   {"HTTP/1.1 200 OK\r\n" + sized(`{"error":{"code":7}}`), Failure{Status: 200, Code: "7"}, ""},
		"no finish":      {"HTTP/1.1 200 OK\r\n" + sized(`{"choices":[{"message":{"content":" 0 1"}}]}`), Failure{}, Torn},
		"short length":   {"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" + whole, Failure{}, Torn},
		"short chunk":    {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n500\r\n" + whole, Failure{}, Torn},
		"no last chunk":  {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", Failure{}, Torn},
		"nothing":        {"", Failure{Cause: CauseClosed}, ""},
		"half a head":    {"HTTP/1.1 200 OK\r\nContent-", Failure{Cause: CauseClosed}, ""},
		"not HTTP":       {"SSH-2.0-OpenSSH_9.2\r\n", Failure{Cause: CauseProtocol}, ""},
		"HTTP/2":         {"HTTP/2 200 OK hello\r\n\r\n", Failure{Cause: CauseProtocol}, ""},
		"a bad length":   {"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", Failure{Cause: CauseProtocol}, ""},
		"a long header":  {"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 10_000) + "\r\n\r\n", Failure{Cause: CauseProtocol}, ""},
		"not JSON":       {"HTTP/1.1 200 OK\r\n" + sized("<html>"), Failure{Status: 200, Code: "not_json"}, ""},
		"wrong numbers":  {"HTTP/1.1 200 OK\r\n" + sized(strings.Replace(whole, " 1", " 2", 1)), Failure{}, Lost},
		"a lost content": {"HTTP/1.1 200 OK\r\n" + sized(strings.Replace(whole, " 0 1", "", 1)), Failure{}, Short},
	} {
		t.Run(name, func(t *testing.T) {
			if _, f, b, err := read(strings.NewReader(tc.response), 2); f != tc.failure || b != tc.breach {
				t.Errorf("%+v, %q, %v; want %+v, %q", f, b, err, tc.failure, tc.breach)
			}
		})
	}
}

// Where the network cuts a stream changes nothing.
func TestCutsDontMatter(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var b strings.Builder
		n := rapid.IntRange(1, 30).Draw(t, "tokens")
		for i := range n {
			b.WriteString(content(fmt.Sprintf(" %d", i)))
		}
		b.WriteString(finish + done)
		rest, wire := b.String(), plainStream
		if rapid.Bool().Draw(t, "chunked") {
			wire = streamHead
			for len(rest) > 0 {
				k := rapid.IntRange(1, len(rest)).Draw(t, "chunk")
				wire += fmt.Sprintf("%x\r\n%s\r\n", k, rest[:k])
				rest = rest[k:]
			}
			rest = "0\r\n\r\n"
		}
		var parts []io.Reader
		for all := wire + rest; len(all) > 0; {
			k := rapid.IntRange(1, len(all)).Draw(t, "part")
			parts = append(parts, strings.NewReader(all[:k]))
			all = all[k:]
		}
		r, f, breach, err := read(io.MultiReader(parts...), n)
		if err != nil || breach != "" || (f != Failure{}) || r.chunks != n {
			t.Fatalf("%v, %q, %+v, %d chunks of %d", err, breach, f, r.chunks, n)
		}
	})
}

// Whatever a server sends, reading it ends, and what isn't a whole reply isn't taken for one.
func FuzzReply(f *testing.F) {
	f.Add([]byte(plainStream + content(" 0") + finish + done))
	f.Add([]byte(streamHead + "5\r\ndata:\r\n0\r\n\r\n"))
	f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"))
	f.Add([]byte("HTTP/1.1 503 x\r\n\r\n{\"error\":{\"code\":\"x\"}}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, failure, breach, err := read(strings.NewReader(string(b)), 1)
		if failure == (Failure{}) && breach == "" && (err != nil || !strings.Contains(string(b), "finish_reason") && !strings.Contains(string(b), `\u`)) {
			t.Errorf("taken for a success: %v", err)
		}
		if errors.Is(err, io.EOF) && failure.Cause != CauseClosed && breach != Torn {
			t.Errorf("the end is taken for %+v, %q", failure, breach)
		}
	})
}

func BenchmarkStream(b *testing.B) {
	var s strings.Builder
	for i := range 256 {
		s.WriteString(content(fmt.Sprintf(" %d", i)))
	}
	s.WriteString(finish + done)
	body := s.String()
	at := time.Now()
	l := &lines{arrived: func() { at = time.Now() }}
	r := &reply{}
	live := new(atomic.Int64)
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		*r = reply{gaps: r.gaps[:0], live: live, numbers: numbers{want: 256}}
		l.reset(strings.NewReader(body))
		if err := r.stream(l, &at); err != nil || r.check() != "" {
			b.Fatal(err, r.check())
		}
	}
}
