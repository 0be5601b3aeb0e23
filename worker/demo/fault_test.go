package demo

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/tidwall/gjson"

	"github.com/ownllm/ownllm/schemas"
)

func TestFaultsInAStream(t *testing.T) {
	s, url := server(t, Options{})
	tests := []struct {
		fault   string
		content string
		last    string // of the chunks, a part of it
		done    bool
		broken  bool // the connection
	}{
		{`"die_after":5`, count(5), ` 4`, false, true},
		{`"die_after":8`, count(8), ` 7`, false, true},
		{`"die_after":9`, count(8), `"stop"`, true, false},
		{`"die_after":5,"tokens_per_chunk":4`, count(5), ` 4`, false, true},
		{`"die_after":0`, "", "", false, true},
		{`"error_after":5`, count(5), `{"error":{"message":"The demo model was asked to fail.","type":"InternalServerError","param":null,"code":500}}`, true, false},
		{`"error_after":0`, "", `{"error":`, true, false},
		{`"end_after":5`, count(5), ` 4`, false, false},
		{`"end_after":0`, "", "", false, false},
		{`"garbage_after":5`, count(5), `<html>502`, false, false},
		{`"lose_at":3`, " 0 1 2 4 5 6 7", `"stop"`, true, false},
		{`"repeat_at":3`, " 0 1 2 3 3 4 5 6 7", `"stop"`, true, false},
		{`"lose_at":3,"repeat_at":0,"tokens_per_chunk":4`, " 0 0 1 2 4 5 6 7", `"stop"`, true, false},
		{`"end_after":3,"die_after":5`, count(3), ` 2`, false, false},
		{`"reasoning_tokens":3,"die_after":5`, count(2), ` 1`, false, true},
	}
	for _, test := range tests {
		t.Run(test.fault, func(t *testing.T) {
			s.Reset()
			got := listen(t, url, ask(`"stream":true,"demo":{"numbered":true,"tokens":8,`+test.fault+`}`))
			last := ""
			if len(got.chunks) > 0 {
				last = got.chunks[len(got.chunks)-1]
			}
			if got.content != test.content || !strings.Contains(last, test.last) || got.done != test.done {
				t.Errorf("%+v", got)
			}
			if broken := got.err != nil; broken != test.broken {
				t.Errorf("the connection ended with %v", got.err)
			}
			if test.broken && !errors.Is(got.err, io.ErrUnexpectedEOF) && !errors.Is(got.err, io.EOF) {
				t.Errorf("the connection ended with %v", got.err)
			}
			stats := settled(t, s)
			if want := got.finish == ""; stats.Failed == 1 != want || stats.Finished == 1 == want {
				t.Errorf("stats: %+v", stats)
			}
		})
	}
}

func TestFaultsInAWholeReply(t *testing.T) {
	_, url := server(t, Options{})
	post := func(fault string) (int, http.Header, string, error) {
		return try("POST", url+"/v1/chat/completions", ask(`"demo":{"numbered":true,"tokens":8,`+fault+`}`))
	}
	if _, _, _, err := post(`"die_after":5`); !errors.Is(err, io.EOF) {
		t.Errorf("die: %v", err)
	}
	if status, _, body, _ := post(`"error_after":5`); status != 500 || !gjson.Get(body, "error.message").Exists() {
		t.Errorf("error: %d %s", status, body)
	}
	if status, _, body, _ := post(`"end_after":5`); status != 200 || gjson.Get(body, "choices.0.finish_reason").Type != gjson.Null || gjson.Get(body, "choices.0.message.content").Str != count(5) || gjson.Get(body, "usage").Exists() {
		t.Errorf("end: %d %s", status, body)
	}
	if status, _, body, _ := post(`"garbage_after":5`); status != 200 || gjson.Valid(body) {
		t.Errorf("garbage: %d %s", status, body)
	}
	if status, header, body, _ := post(`"status":429,"retry_after":7`); status != 429 || header.Get("Retry-After") != "7" || gjson.Get(body, "error.type").Str != "RateLimitError" {
		t.Errorf("status: %d %v %s", status, header, body)
	}
	if _, _, body, _ := post(`"lose_at":1,"repeat_at":2`); gjson.Get(body, "choices.0.message.content").Str != " 0 2 2 3 4 5 6 7" {
		t.Errorf("lost and repeated: %s", body)
	}
	if status, _, body, _ := post(`"status":500,"error_body":"oops"`); status != 500 || body != "oops" {
		t.Errorf("error body: %d %s", status, body)
	}
	if _, _, body, _ := post(`"no_usage":true`); gjson.Get(body, "usage").Exists() {
		t.Errorf("no usage: %s", body)
	}
	if got := listen(t, url, ask(`"stream":true,"stream_options":{"include_usage":true},"demo":{"no_usage":true}`)); got.usage.Exists() || !got.done {
		t.Errorf("no usage in a stream: %+v", got)
	}
}

func TestSetFaults(t *testing.T) {
	other := DefaultModel()
	other.ID = "other"
	_, url := server(t, Options{Models: []schemas.Model{DefaultModel(), other}})
	content := func(model, members string) string {
		t.Helper()
		status, body := chat(t, url, `{"model":"`+model+`",`+members+`"messages":[{"role":"user","content":"hi"}]}`)
		if status != 200 {
			return gjson.Get(body, "error.code").Raw
		}
		return gjson.Get(body, "choices.0.message.content").Str
	}
	put := func(query, body string, want int) {
		t.Helper()
		if status, reply := do(t, "PUT", url+"/demo/faults"+query, body); status != want {
			t.Fatalf("PUT %s: %d %s", body, status, reply)
		}
	}
	check := func(got, want string) {
		t.Helper()
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	put("", `{"text":"all"}`, 200)
	check(content("demo", ""), "all")
	put("?model=other", `{"text":"one"}`, 200)
	check(content("demo", ""), "all")
	check(content("other", ""), "one")
	check(content("other", `"demo":{"status":503},`), "503")
	check(content("other", `"demo":{"text":"this"},`), "this")
	_, body := do(t, "GET", url+"/demo/faults", "")
	check(gjson.Get(body, "default.text").Str+","+gjson.Get(body, "models.other.text").Str+","+gjson.Get(body, "default.die_after").Raw, "all,one,-1")
	put("", `{"text":"again"}`, 200)
	check(content("other", ""), "again")
	put("", `{"status":500,"times":2}`, 200)
	check(content("demo", ""), "500")
	check(content("other", ""), "500")
	if s := content("demo", ""); !strings.Contains(s, "demo") {
		t.Errorf("a third request got %q", s)
	}
	put("", `{"text":"x"}`, 200)
	if _, body := do(t, "POST", url+"/demo/reset", ""); gjson.Get(body, "started").Int() != 0 {
		t.Error(body)
	}
	if s := content("demo", ""); s == "x" {
		t.Error("faults outlive a reset")
	}
	put("", `{"txt":"x"}`, 400)
	put("", `{"text":"x"} {}`, 400)
	put("", `{"tokens":-1}`, 400)
	put("", `{"status":200}`, 400)
	put("", `{"tokens_per_second":-1}`, 400)
	put("?model=none", `{}`, 404)
	if status, _ := do(t, "POST", url+"/demo/unload?model=none", ""); status != 404 {
		t.Errorf("unload of no model: %d", status)
	}
	if status, _ := do(t, "POST", url+"/demo/remove?model=none", ""); status != 404 {
		t.Errorf("removal of no model: %d", status)
	}
	_, body = do(t, "POST", url+"/demo/remove?model=other", "")
	check(gjson.Get(body, "data.#.id").Raw, `["demo"]`)
	check(content("other", ""), "404")
	do(t, "POST", url+"/demo/reset", "")
	if s := content("other", ""); s == "404" {
		t.Error("a removal outlives a reset")
	}
}

func TestClientGone(t *testing.T) {
	tests := []struct{ name, members string }{
		{"stalled", `"stream":true,"demo":{"numbered":true,"stall_after":3}`},
		{"between tokens", `"stream":true,"demo":{"numbered":true,"tokens":5,"tokens_per_second":0.001}`},
		{"before the first token", `"stream":true,"demo":{"first_token_ms":600000}`},
		{"whole", `"demo":{"first_token_ms":600000}`},
		{"whole, stalled", `"demo":{"stall_after":3}`},
		{"loading", `"demo":{"load_ms":600000}`},
		{"at full speed", `"stream":true,"demo":{"tokens":30000}`},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s, url := server(t, Options{})
			if strings.Contains(test.members, "load_ms") {
				if err := s.Unload(""); err != nil {
					t.Fatal(err)
				}
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			request, err := http.NewRequestWithContext(ctx, "POST", url+"/v1/chat/completions", strings.NewReader(ask(test.members)))
			if err != nil {
				t.Fatal(err)
			}
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				response, err := http.DefaultClient.Do(request)
				if err == nil {
					<-ctx.Done()
					response.Body.Close()
				}
			}()
			for s.Stats().Active == 0 {
				time.Sleep(time.Millisecond)
			}
			cancelled := time.Now()
			cancel()
			<-ended
			stats := settled(t, s)
			if stats.Aborted != 1 || stats.LastAbort == nil {
				t.Fatalf("stats: %+v", stats)
			}
			if took := stats.LastAbort.Sub(cancelled); took > 3*time.Second {
				t.Errorf("noticed after %v", took)
			}
		})
	}
}

// A client that hangs up once it has read the end is no abort.
func TestHangUpAfterTheEnd(t *testing.T) {
	s, url := server(t, Options{})
	for range 50 {
		if got := listen(t, url, ask(`"stream":true,"demo":{"tokens":2}`)); !got.done {
			t.Fatalf("%+v", got)
		}
		http.DefaultClient.CloseIdleConnections()
	}
	if stats := settled(t, s); stats.Finished != 50 || stats.Aborted != 0 {
		t.Errorf("stats: %+v", stats)
	}
}

func TestPeak(t *testing.T) {
	s, url := server(t, Options{})
	var clients sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	for range 20 {
		clients.Go(func() {
			request, _ := http.NewRequestWithContext(ctx, "POST", url+"/v1/chat/completions", strings.NewReader(ask(`"demo":{"stall_after":0}`)))
			if response, err := http.DefaultClient.Do(request); err == nil {
				response.Body.Close()
			}
		})
	}
	for s.Stats().Active < 20 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	clients.Wait()
	if stats := settled(t, s); stats.Peak != 20 || stats.Aborted != 20 || stats.Started != 20 {
		t.Errorf("stats: %+v", stats)
	}
}

// record is a ResponseWriter that notes when each write came, for tests in fake time.
type record struct {
	*httptest.ResponseRecorder
	at    []time.Time
	sizes []int
}

func (r *record) Write(b []byte) (int, error) {
	r.at, r.sizes = append(r.at, time.Now()), append(r.sizes, len(b))
	return r.ResponseRecorder.Write(b)
}

// A split must be inside a character, and the halves apart in time: else it may
// arrive as one read, and nobody's decoder is tested.
func TestSplitUTF8(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(Options{})
		got := hear(s, `"stream":true,"demo":{"split_utf8":true,"text":"é 🚀"}`)
		inside := 0
		rest := got.Body.String()
		for i, size := range got.sizes {
			if i%2 == 1 && !got.at[i].After(got.at[i-1]) {
				t.Errorf("write %d came together with the one before", i)
			}
			if !utf8.ValidString(rest[:size]) {
				inside++
			}
			rest = rest[size:]
		}
		// Two tokens, each cut into two pieces that aren't valid by themselves; role,
		// finish_reason and [DONE] are cut too.
		if inside != 4 || len(got.sizes) != 10 {
			t.Errorf("%d of %d writes begin or end inside a character", inside, len(got.sizes))
		}
	})
}

func hear(s *Server, members string) *record {
	r := &record{ResponseRecorder: httptest.NewRecorder()}
	s.ServeHTTP(r, httptest.NewRequest("POST", "/v1/chat/completions", strings.NewReader(ask(members))))
	return r
}

func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(Options{})
		start := time.Now()
		got := hear(s, `"stream":true,"demo":{"first_token_ms":300,"tokens_per_second":50,"tokens":11}`)
		// The role comes with the first token, finish_reason and [DONE] with the last.
		for i, at := range got.at {
			token := min(max(i-1, 0), 10)
			if want := 300*time.Millisecond + time.Duration(token)*20*time.Millisecond; at.Sub(start) != want {
				t.Errorf("write %d came after %v, want %v", i, at.Sub(start), want)
			}
		}
		if len(got.at) != 14 {
			t.Errorf("%d writes", len(got.at))
		}
		start = time.Now()
		hear(s, `"demo":{"first_token_ms":300,"tokens_per_second":50,"tokens":11}`)
		if took := time.Since(start); took != 500*time.Millisecond {
			t.Errorf("the whole reply took %v", took)
		}
		start = time.Now()
		got = hear(s, `"stream":true,"demo":{"tokens_per_second":50,"tokens":100,"tokens_per_chunk":10}`)
		if first := got.at[1].Sub(start); first != 180*time.Millisecond || time.Since(start) != 1980*time.Millisecond {
			t.Errorf("chunks of ten: the first after %v, all after %v", first, time.Since(start))
		}
	})
}

func TestJitter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(Options{})
		start := time.Now()
		got := hear(s, `"stream":true,"demo":{"tokens_per_second":10,"jitter":0.5,"tokens":100}`)
		moved := 0
		for i, at := range got.at[1:101] {
			due := time.Duration(i) * 100 * time.Millisecond
			switch late := at.Sub(start) - due; {
			case late < 0 || late > 50*time.Millisecond:
				t.Errorf("token %d is %v late", i, late)
			case late > 0:
				moved++
			}
		}
		if moved < 90 {
			t.Errorf("only %d of 100 tokens moved", moved)
		}
	})
}

func TestLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cold := DefaultModel()
		cold.State = schemas.ModelCold
		s := New(Options{Models: []schemas.Model{cold}})
		state := func() string {
			r := httptest.NewRecorder()
			s.ServeHTTP(r, httptest.NewRequest("GET", "/v1/models", nil))
			return gjson.Get(r.Body.String(), "data.0.state").Str + gjson.Get(r.Body.String(), "data.0.load_ms").Raw
		}
		expect := func(want string) {
			t.Helper()
			if got := state(); got != want {
				t.Errorf("state is %s, want %s", got, want)
			}
		}
		expect("cold")
		start := time.Now()
		var clients sync.WaitGroup
		for i := range 3 {
			clients.Go(func() {
				time.Sleep(time.Duration(i) * time.Second)
				hear(s, `"demo":{"load_ms":5000}`)
				if took := time.Since(start); took != 5*time.Second {
					t.Errorf("request %d was answered after %v", i, took)
				}
			})
		}
		time.Sleep(3500 * time.Millisecond)
		expect("loading1500")
		clients.Wait()
		expect("ready")
		start = time.Now()
		hear(s, `"demo":{"load_ms":5000}`)
		if took := time.Since(start); took != 0 {
			t.Errorf("a loaded model took %v", took)
		}
		if err := s.Unload(ModelID); err != nil {
			t.Fatal(err)
		}
		expect("cold")
		f := NoFaults()
		f.LoadMS = 100
		if err := s.SetFaults("", f); err != nil {
			t.Fatal(err)
		}
		hear(s, "")
		if took := time.Since(start); took != 100*time.Millisecond {
			t.Errorf("the load took %v", took)
		}
		// A load goes on without the request that began it.
		if err := s.Unload(""); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		func() {
			defer func() {
				if v := recover(); v != http.ErrAbortHandler {
					t.Errorf("recovered %v", v)
				}
			}()
			s.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("POST", "/v1/chat/completions", strings.NewReader(ask(""))).WithContext(ctx))
		}()
		time.Sleep(100 * time.Millisecond)
		expect("ready")
	})
}

func TestHelpNamesEveryFault(t *testing.T) {
	s := New(Options{})
	r := httptest.NewRecorder()
	s.ServeHTTP(r, httptest.NewRequest("GET", "/demo/faults", nil))
	gjson.Get(r.Body.String(), "default").ForEach(func(key, _ gjson.Result) bool {
		if !strings.Contains(Help, key.Str) {
			t.Errorf("Help doesn't name %s", key.Str)
		}
		return true
	})
}
