package demo

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/tidwall/gjson"
	"go.uber.org/goleak"

	"github.com/ownllm/ownllm/schemas"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// server starts a Server behind a real listener.
func server(t testing.TB, o Options) (*Server, string) {
	t.Helper()
	s := New(o)
	h := httptest.NewServer(s)
	t.Cleanup(func() {
		h.Close()
		http.DefaultClient.CloseIdleConnections()
	})
	return s, h.URL
}

// ask is a chat completion request that says "hi"; members come first in the object.
func ask(members string) string {
	if members != "" {
		members += ","
	}
	return `{` + members + `"model":"demo","messages":[{"role":"user","content":"hi"}]}`
}

func do(t testing.TB, method, url, body string) (int, string) {
	t.Helper()
	status, _, reply, err := try(method, url, body)
	if err != nil {
		t.Fatalf("%s %s: %v", method, url, err)
	}
	return status, reply
}

func try(method, url, body string) (int, http.Header, string, error) {
	request, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		return 0, nil, "", err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return 0, nil, "", err
	}
	defer response.Body.Close()
	b, err := io.ReadAll(response.Body)
	return response.StatusCode, response.Header, string(b), err
}

func chat(t testing.TB, url, body string) (int, string) {
	t.Helper()
	return do(t, "POST", url+"/v1/chat/completions", body)
}

// transcript is what a streamed reply said.
type transcript struct {
	status    int
	chunks    []string
	pieces    []string // content deltas of choice 0
	content   string
	reasoning string
	finish    string
	usage     gjson.Result
	done      bool
	err       error
}

func listen(t testing.TB, url, body string) transcript {
	t.Helper()
	response, err := http.Post(url+"/v1/chat/completions", "application/json", strings.NewReader(body))
	if err != nil {
		return transcript{err: err}
	}
	defer response.Body.Close()
	got := transcript{status: response.StatusCode}
	lines := bufio.NewScanner(response.Body)
	for lines.Scan() {
		data, ok := strings.CutPrefix(lines.Text(), "data: ")
		if !ok {
			continue
		}
		if data == "[DONE]" {
			got.done = true
			continue
		}
		got.chunks = append(got.chunks, data)
		if s := gjson.Get(data, "choices.0.delta.content").Str; s != "" {
			got.pieces = append(got.pieces, s)
			got.content += s
		}
		got.reasoning += gjson.Get(data, "choices.0.delta.reasoning_content").Str
		if s := gjson.Get(data, "choices.0.finish_reason").Str; s != "" {
			got.finish = s
		}
		if usage := gjson.Get(data, "usage"); usage.IsObject() {
			got.usage = usage
		}
	}
	got.err = lines.Err()
	return got
}

// settled waits until no request is active.
func settled(t testing.TB, s *Server) Stats {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if stats := s.Stats(); stats.Active == 0 {
			return stats
		}
	}
	t.Fatalf("requests still run: %+v", s.Stats())
	return Stats{}
}

// count returns " 0 1 … n-1".
func count(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, " %d", i)
	}
	return b.String()
}

func TestSaysThatItIsADemo(t *testing.T) {
	s, url := server(t, Options{})
	status, body := chat(t, url, `{"model":"demo","messages":[{"role":"user","content":"Say \"hello\"!"}]}`)
	content := gjson.Get(body, "choices.0.message.content").Str
	if status != 200 || !strings.Contains(content, "demo") || !strings.Contains(content, `You said: "Say "hello"!"`) {
		t.Fatalf("%d %s", status, body)
	}
	streamed := listen(t, url, `{"stream":true,"stream_options":{"include_usage":true},"model":"demo","messages":[{"role":"user","content":"Say \"hello\"!"}]}`)
	if streamed.content != content || streamed.finish != "stop" || !streamed.done {
		t.Errorf("streamed: %+v", streamed)
	}
	if want := gjson.Get(body, "usage").Raw; streamed.usage.Raw != want || !strings.HasPrefix(want, `{"prompt_tokens":5,`) {
		t.Errorf("usage is %s streamed, %s not", streamed.usage.Raw, want)
	}
	if first := streamed.chunks[0]; gjson.Get(first, "choices.0.delta.role").Str != "assistant" || !strings.HasSuffix(first, `"usage":null}`) {
		t.Errorf("first chunk: %s", first)
	}
	if n := int(streamed.usage.Get("completion_tokens").Int()); n != len(streamed.pieces) {
		t.Errorf("%d completion tokens in %d pieces", n, len(streamed.pieces))
	}
	if stats := settled(t, s); stats.Started != 2 || stats.Finished != 2 || stats.Tokens != int64(2*len(streamed.pieces)) {
		t.Errorf("stats: %+v", stats)
	}
	for _, chunk := range streamed.chunks {
		for _, field := range []string{"id", "created", "model", "object"} {
			if got, want := gjson.Get(chunk, field).Raw, gjson.Get(streamed.chunks[0], field).Raw; got != want {
				t.Errorf("%s changed from %s to %s", field, want, got)
			}
		}
		if gjson.Get(chunk, "error").Exists() {
			t.Errorf("a chunk has the key error: %s", chunk)
		}
	}
}

func TestReplies(t *testing.T) {
	_, url := server(t, Options{})
	long := "Ein Gedicht über Größe:\n\n東京は大きい。🚀🚀 \"quoted\" \\ tab\t" + strings.Repeat("x", 40) + "  "
	echoed := ask(`"demo":{"echo":true},"stream":true,"novel":[1,"é"]`)
	tests := []struct {
		name, body string
		content    string
		finish     string
		pieces     int // 0: not checked
	}{
		{"numbered", ask(`"stream":true,"demo":{"numbered":true,"tokens":300}`), count(300), "stop", 300},
		{"numbered, default", ask(`"stream":true,"demo":{"numbered":true}`), count(64), "stop", 64},
		{"beyond the pre-rendered", ask(`"stream":true,"demo":{"numbered":true,"tokens":5000}`), count(5000), "stop", 5000},
		{"tokens per chunk", ask(`"stream":true,"demo":{"numbered":true,"tokens":10,"tokens_per_chunk":4}`), count(10), "stop", 3},
		{"max_tokens", ask(`"stream":true,"max_tokens":7,"demo":{"numbered":true}`), count(7), "length", 7},
		{"max_completion_tokens", ask(`"stream":true,"max_completion_tokens":7,"demo":{"numbered":true}`), count(7), "length", 7},
		{"max_tokens at the length", ask(`"stream":true,"max_tokens":64,"demo":{"numbered":true}`), count(64), "stop", 64},
		{"text", ask(`"stream":true,"demo":{"text":` + string(schemas.AppendString(nil, long)) + `}`), long, "stop", 0},
		{"split writes", ask(`"stream":true,"demo":{"split_utf8":true,"text":` + string(schemas.AppendString(nil, long)) + `}`), long, "stop", 0},
		{"echo", echoed, echoed, "stop", 0},
		{"json_object", ask(`"stream":true,"response_format":{"type":"json_object"}`), `{"demo": true, "reply": "hi"}`, "stop", 0},
		{"tokens cut the sentence", ask(`"stream":true,"demo":{"tokens":6}`), "This is the OwnLLM demo: no", "stop", 6},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got := listen(t, url, test.body)
			if got.err != nil || got.content != test.content || got.finish != test.finish || !got.done {
				t.Errorf("streamed: %q, finish %q, done %t, error %v, want %q, %q", got.content, got.finish, got.done, got.err, test.content, test.finish)
			}
			if test.pieces != 0 && len(got.pieces) != test.pieces {
				t.Errorf("it came in %d pieces, want %d", len(got.pieces), test.pieces)
			}
			if strings.Contains(test.body, "echo") {
				return
			}
			status, body := chat(t, url, strings.Replace(test.body, `"stream":true,`, "", 1))
			choice := gjson.Get(body, "choices.0")
			if status != 200 || choice.Get("message.content").Str != test.content || choice.Get("finish_reason").Str != test.finish {
				t.Errorf("whole: %d %s", status, body)
			}
		})
	}
}

func TestFillerIsDeterministic(t *testing.T) {
	_, url := server(t, Options{})
	body := ask(`"stream":true,"seed":3,"demo":{"tokens":200}`)
	one, two := listen(t, url, body), listen(t, url, body)
	if one.content != two.content || len(one.pieces) != 200 {
		t.Errorf("two replies differ, or aren't 200 tokens but %d", len(one.pieces))
	}
	if other := listen(t, url, strings.Replace(body, `"seed":3`, `"seed":4`, 1)); other.content == one.content {
		t.Error("the seed makes no difference")
	}
}

func TestReasoning(t *testing.T) {
	_, url := server(t, Options{})
	got := listen(t, url, ask(`"stream":true,"stream_options":{"include_usage":true},"demo":{"numbered":true,"tokens":4,"reasoning_tokens":3,"tokens_per_chunk":5}`))
	if got.reasoning != count(3) || got.content != count(4) || got.usage.Get("completion_tokens").Int() != 7 || got.usage.Get("completion_tokens_details.reasoning_tokens").Int() != 3 {
		t.Errorf("%+v", got)
	}
	_, body := chat(t, url, ask(`"max_tokens":2,"demo":{"numbered":true,"reasoning_tokens":3,"reasoning_field":"reasoning"}`))
	if m := gjson.Get(body, "choices.0.message"); m.Get("reasoning").Str != count(2) || m.Get("content").Str != "" {
		t.Errorf("cut inside the reasoning: %s", body)
	}
}

func TestChoices(t *testing.T) {
	_, url := server(t, Options{})
	got := listen(t, url, ask(`"stream":true,"stream_options":{"include_usage":true},"n":3,"demo":{"numbered":true,"tokens":3}`))
	contents := map[int64]string{}
	finishes := 0
	for _, chunk := range got.chunks {
		choice := gjson.Get(chunk, "choices.0")
		contents[choice.Get("index").Int()] += choice.Get("delta.content").Str
		if choice.Get("finish_reason").Str == "stop" {
			finishes++
		}
	}
	want := map[int64]string{0: " 0 1 2", 1: " 1:0 1:1 1:2", 2: " 2:0 2:1 2:2"}
	if diff := cmp.Diff(want, contents); diff != "" || finishes != 3 || got.usage.Get("completion_tokens").Int() != 9 {
		t.Errorf("%d choices finished, usage %s, contents:\n%s", finishes, got.usage.Raw, diff)
	}
	_, body := chat(t, url, ask(`"n":2,"demo":{"numbered":true,"tokens":2}`))
	if gjson.Get(body, "choices.1.message.content").Str != " 1:0 1:1" {
		t.Errorf("whole: %s", body)
	}
}

func TestContinues(t *testing.T) {
	_, url := server(t, Options{})
	natural := listen(t, url, ask(`"stream":true`)).content
	tests := []struct {
		name, members, prefix, want, finish string
	}{
		{"at a token", `"demo":{"numbered":true}`, count(10), strings.TrimPrefix(count(64), count(10)), "stop"},
		{"inside a token", `"demo":{"numbered":true}`, count(12) + " 1", strings.TrimPrefix(count(64), count(12)+" 1"), "stop"},
		{"at the end", `"demo":{"numbered":true}`, count(64), "", "stop"},
		{"past the end", `"demo":{"numbered":true}`, count(65), count(64), "stop"},
		{"another text", `"demo":{"numbered":true}`, "Hm", count(64), "stop"},
		{"limit counts from here", `"max_tokens":5,"demo":{"numbered":true}`, count(10), " 10 11 12 13 14", "length"},
		{"sentence", `"temperature":1`, natural[:33], natural[33:], "stop"},
		{"filler", `"demo":{"tokens":200}`, natural, "", "stop"},
		{"reasoning is over", `"demo":{"numbered":true,"reasoning_tokens":9,"tokens":4}`, " 0 1", " 2 3", "stop"},
		{"nothing to continue", `"demo":{"numbered":true,"tokens":4}`, "", " 0 1 2 3", "stop"},
		{"failure left behind", `"demo":{"numbered":true,"tokens":4,"die_after":2}`, " 0 1", " 2 3", "stop"},
		{"vLLM", `"continue_final_message":true,"add_generation_prompt":false,"demo":{"numbered":true,"tokens":4}`, " 0 1", " 2 3", "stop"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if test.name == "filler" {
				test.want = strings.TrimPrefix(listen(t, url, ask(`"stream":true,`+test.members)).content, natural)
			}
			got := listen(t, url, `{"stream":true,`+test.members+`,"model":"demo","messages":[{"role":"user","content":"hi"},{"role":"assistant","content":`+
				string(schemas.AppendString(nil, test.prefix))+`}]}`)
			if got.err != nil || got.content != test.want || got.finish != test.finish {
				t.Errorf("got %q, %s, want %q, %s", got.content, got.finish, test.want, test.finish)
			}
		})
	}
	if status, body := chat(t, url, ask(`"continue_final_message":true`)); status != 400 {
		t.Errorf("continue_final_message beside a generation prompt: %d %s", status, body)
	}
	if status, body := chat(t, url, ask(`"continue_final_message":true,"add_generation_prompt":false`)); status != 400 {
		t.Errorf("continue_final_message of a user message: %d %s", status, body)
	}
}

func TestToolCalls(t *testing.T) {
	_, url := server(t, Options{})
	tools := `"tools":[{"type":"function","function":{"name":"a"}},{"type":"function","function":{"name":"b","parameters":` +
		`{"type":"object","properties":{"city":{"type":"string","minLength":30},"n":{"type":"integer"}},"required":["city","n"]}}}]`
	tests := []struct {
		name, members string
		want          []call
	}{
		{"auto", tools, nil},
		{"required", tools + `,"tool_choice":"required"`, []call{{"call_demo_0", "a", "{}"}}},
		{"named", tools + `,"tool_choice":{"type":"function","function":{"name":"b"}}`, []call{{"call_demo_0", "b", `{"city": "` + strings.Repeat("demo", 8)[:30] + `", "n": 0}`}}},
		{"asked", tools + `,"demo":{"tool_calls":3}`, []call{{"call_demo_0", "a", "{}"}, {"call_demo_1", "b", `{"city": "` + strings.Repeat("demo", 8)[:30] + `", "n": 0}`}, {"call_demo_2", "a", "{}"}}},
		{"asked, pieces together", tools + `,"demo":{"tool_calls":2,"tokens_per_chunk":50}`, []call{{"call_demo_0", "a", "{}"}, {"call_demo_1", "b", `{"city": "` + strings.Repeat("demo", 8)[:30] + `", "n": 0}`}}},
		{"asked without tools", `"demo":{"tool_calls":1}`, []call{{"call_demo_0", "demo_tool", "{}"}}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got := listen(t, url, ask(`"stream":true,`+test.members))
			var calls []call
			for _, chunk := range got.chunks {
				gjson.Get(chunk, "choices.0.delta.tool_calls").ForEach(func(_, delta gjson.Result) bool {
					if i := int(delta.Get("index").Int()); i == len(calls) {
						calls = append(calls, call{id: delta.Get("id").Str, name: delta.Get("function.name").Str})
					} else if i != len(calls)-1 {
						t.Fatalf("delta out of order: %s", delta.Raw)
					}
					calls[len(calls)-1].arguments += delta.Get("function.arguments").Str
					return true
				})
			}
			if diff := cmp.Diff(test.want, calls, cmp.AllowUnexported(call{})); diff != "" {
				t.Errorf("streamed: -want +got\n%s", diff)
			}
			_, body := chat(t, url, ask(test.members))
			calls = nil
			gjson.Get(body, "choices.0.message.tool_calls").ForEach(func(_, c gjson.Result) bool {
				calls = append(calls, call{c.Get("id").Str, c.Get("function.name").Str, c.Get("function.arguments").Str})
				return true
			})
			if diff := cmp.Diff(test.want, calls, cmp.AllowUnexported(call{})); diff != "" {
				t.Errorf("whole: -want +got\n%s", diff)
			}
			finish := "stop"
			if test.want != nil {
				finish = "tool_calls"
			}
			if got.finish != finish || gjson.Get(body, "choices.0.finish_reason").Str != finish {
				t.Errorf("finish_reason is %q streamed, %s whole", got.finish, body)
			}
		})
	}
	for _, members := range []string{`"tool_choice":"required"`, tools + `,"tool_choice":{"type":"function","function":{"name":"z"}}`} {
		if status, body := chat(t, url, ask(members)); status != 400 {
			t.Errorf("%s: %d %s", members, status, body)
		}
	}
}

func TestLogprobs(t *testing.T) {
	_, url := server(t, Options{})
	got := listen(t, url, ask(`"stream":true,"logprobs":true,"top_logprobs":2,"demo":{"text":"é b"}`))
	var tokens []string
	for _, chunk := range got.chunks {
		if !json.Valid([]byte(chunk)) {
			t.Fatalf("invalid chunk %s", chunk)
		}
		gjson.Get(chunk, "choices.0.logprobs.content").ForEach(func(_, p gjson.Result) bool {
			var b []byte
			p.Get("bytes").ForEach(func(_, n gjson.Result) bool { b = append(b, byte(n.Int())); return true })
			if string(b) != p.Get("token").Str || p.Get("logprob").Num >= 0 || len(p.Get("top_logprobs").Array()) != 2 {
				t.Errorf("logprob %s", p.Raw)
			}
			tokens = append(tokens, p.Get("token").Str)
			return true
		})
	}
	if diff := cmp.Diff([]string{"é", " b"}, tokens); diff != "" {
		t.Error(diff)
	}
	_, body := chat(t, url, ask(`"logprobs":true,"demo":{"text":"é b"}`))
	if !json.Valid([]byte(body)) || len(gjson.Get(body, "choices.0.logprobs.content").Array()) != 2 {
		t.Error(body)
	}
}

func TestModels(t *testing.T) {
	text := DefaultModel()
	text.ID, text.Capabilities = "demo-text", schemas.Capabilities{Completion: true}
	text.ContextWindow = 20
	broken := DefaultModel()
	broken.ID, broken.State = "demo-failed", schemas.ModelFailed
	_, url := server(t, Options{Models: []schemas.Model{DefaultModel(), text, broken}})
	_, body := do(t, "GET", url+"/v1/models", "")
	want := `{"id":"demo","object":"model","created":1767225600,"owned_by":"ownllm-demo","capabilities":{"completion":true,"vision":true,"embedding":false,"tools":true,"thinking":true},"context_window":32768,"max_model_len":32768,"size_mb":1,"state":"ready","slots":256,"continues":true}`
	if got := gjson.Get(body, "data.0").Raw; got != want {
		t.Errorf("model is\n%s, want\n%s", got, want)
	}
	if got := gjson.Get(body, "data.#.state").Raw; got != `["ready","ready","failed"]` {
		t.Errorf("states are %s", got)
	}
	image := `[{"type":"text","text":"hi"},{"type":"image_url","image_url":{"url":"data:image/png;base64,aGVsbG8="}}]`
	tests := []struct {
		name, body string
		status     int
		says       string
	}{
		{"unknown", `{"model":"x","messages":[{"role":"user","content":"hi"}]}`, 404, "The model `x` does not exist."},
		{"failed", `{"model":"demo-failed","messages":[{"role":"user","content":"hi"}]}`, 500, "failed to load"},
		{"no tools", `{"model":"demo-text","tools":[{}],"messages":[{"role":"user","content":"hi"}]}`, 400, "--enable-auto-tool-choice"},
		{"no vision", `{"model":"demo-text","messages":[{"role":"user","content":` + image + `}]}`, 400, "not a multimodal model"},
		{"vision", `{"model":"demo","messages":[{"role":"user","content":` + image + `}]}`, 200, "You sent 1 image(s): image/png of 5 bytes."},
		{"too long", `{"model":"demo-text","messages":[{"role":"user","content":"` + strings.Repeat("a ", 17) + `"}]}`, 400, "This model's maximum context length is 20 tokens. However, your request has 20 input tokens."},
		{"too many to come", `{"model":"demo-text","max_tokens":17,"messages":[{"role":"user","content":"a"}]}`, 400, "too large: 17"},
		{"just fits", `{"model":"demo-text","max_tokens":16,"messages":[{"role":"user","content":"a"}]}`, 200, `"completion_tokens":16`},
		{"window ends it", `{"model":"demo-text","messages":[{"role":"user","content":"a b c d e f"}]}`, 200, `"finish_reason":"length"`},
		{"no JSON", `{`, 400, "isn't valid JSON"},
		{"deep", strings.Repeat("[", 1<<20), 400, "isn't valid JSON"},
		{"no object", `[]`, 400, "object"},
		{"no messages", `{"model":"demo"}`, 400, "messages"},
		{"empty messages", `{"model":"demo","messages":[]}`, 400, "empty"},
		{"limit", ask(`"max_tokens":0`), 400, "max_tokens"},
		{"n", ask(`"n":0`), 400, "n must"},
		{"misspelt fault", ask(`"demo":{"die_afer":3}`), 400, "die_afer"},
		{"fault out of range", ask(`"demo":{"jitter":2}`), 400, "jitter"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			status, body := chat(t, url, test.body)
			if status != test.status || !strings.Contains(body, test.says) || !json.Valid([]byte(body)) {
				t.Errorf("%d %s, want %d with %q", status, body, test.status, test.says)
			}
			if status >= 400 && gjson.Get(body, "error.code").Int() != int64(status) {
				t.Errorf("error in another form: %s", body)
			}
		})
	}
}

func TestTokenize(t *testing.T) {
	_, url := server(t, Options{})
	messages := `"messages":[{"role":"system","content":"Be  brief."},{"role":"user","content":[{"type":"text","text":"What is\nit?"},{"type":"image_url","image_url":{"url":"http://x"}}]}]`
	_, body := do(t, "POST", url+"/tokenize", `{"model":"demo",`+messages+`}`)
	_, reply := chat(t, url, `{"model":"demo",`+messages+`}`)
	want := gjson.Get(reply, "usage.prompt_tokens").Int()
	if n := gjson.Get(body, "count").Int(); n != want || n != 2+3+3+3+85 || len(gjson.Get(body, "tokens").Array()) != int(n) {
		t.Errorf("/tokenize counts %d, usage %d", n, want)
	}
	if _, body := do(t, "POST", url+"/tokenize", `{"prompt":" a b "}`); gjson.Get(body, "count").Int() != 2 || gjson.Get(body, "max_model_len").Int() != 32768 {
		t.Error(body)
	}
	for _, bad := range []string{``, `{}`, `{"model":"x","prompt":"a"}`} {
		if status, body := do(t, "POST", url+"/tokenize", bad); status != 400 && status != 404 {
			t.Errorf("%s: %d %s", bad, status, body)
		}
	}
}

func TestKeyAndSmallEndpoints(t *testing.T) {
	_, url := server(t, Options{Key: "secret"})
	if status, body := do(t, "GET", url+"/api/demo", ""); status != 200 || body != "{\"demo\":true}\n" {
		t.Errorf("%d %s", status, body)
	}
	if status, _ := do(t, "GET", url+"/health", ""); status != 200 {
		t.Errorf("health: %d", status)
	}
	for _, path := range []string{"GET /v1/models", "POST /v1/chat/completions", "POST /tokenize"} {
		method, path, _ := strings.Cut(path, " ")
		if status, _ := do(t, method, url+path, ""); status != 401 {
			t.Errorf("%s without a key: %d", path, status)
		}
	}
	request, _ := http.NewRequest("GET", url+"/v1/models", nil)
	request.Header.Set("Authorization", "Bearer secret")
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != 200 {
		t.Errorf("with the key: %d", response.StatusCode)
	}
}

func TestServeEndsWhatRuns(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- Serve(ctx, listener, Options{}) }()
	url := "http://" + listener.Addr().String()
	heard := make(chan transcript, 1)
	go func() { heard <- listen(t, url, ask(`"stream":true,"demo":{"numbered":true,"stall_after":3}`)) }()
	for {
		if _, body := do(t, "GET", url+"/demo/stats", ""); gjson.Get(body, "tokens").Int() == 3 {
			break
		}
	}
	stopped := time.Now()
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("Serve: %v", err)
	}
	// A second is what connections get that never ask for anything.
	if took := time.Since(stopped); took >= time.Second {
		t.Errorf("Serve waited %v for a stalled reply", took)
	}
	if got := <-heard; got.err == nil || got.content != count(3) {
		t.Errorf("the stalled stream ended with %q and no error", got.content)
	}
	http.DefaultClient.CloseIdleConnections()
	if _, err := net.Dial("tcp", listener.Addr().String()); err == nil {
		t.Error("the listener is still open")
	}
}

func TestServeReturnsTheListenersError(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	listener.Close()
	if err := Serve(t.Context(), listener, Options{}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve: %v", err)
	}
}

// Whatever the prompt, it has as many tokens as are stated: in the usage, for who counts
// it, and for the window.
func TestStatedPrompt(t *testing.T) {
	s, url := server(t, Options{})
	check := func(member string, want int64) {
		t.Helper()
		_, whole := chat(t, url, ask(member))
		_, counted := do(t, "POST", url+"/tokenize", ask(member))
		if a, b := gjson.Get(whole, "usage.prompt_tokens").Int(), gjson.Get(counted, "count").Int(); a != want || b != want {
			t.Errorf("%s: usage %d, /tokenize %d, want %d", member, a, b, want)
		}
	}
	check(`"demo":{"prompt_tokens":12345}`, 12345)
	if status, body := chat(t, url, ask(`"demo":{"prompt_tokens":32768}`)); status != 400 || !strings.Contains(body, "maximum context length") {
		t.Errorf("a prompt as long as the window: %d %s", status, body)
	}
	if status, _ := do(t, "POST", url+"/tokenize", ask(`"demo":{"prompt_tokens":-1}`)); status != 400 {
		t.Errorf("less than nothing: %d", status)
	}
	f := NoFaults()
	f.PromptTokens = 77
	if err := s.SetFaults("", f); err != nil {
		t.Fatal(err)
	}
	check(`"seed":1`, 77)
	check(`"demo":{"prompt_tokens":5}`, 5)
	f.Times = 1
	if err := s.SetFaults("demo", f); err != nil {
		t.Fatal(err)
	}
	for range 2 { // counting uses nothing up
		if _, body := do(t, "POST", url+"/tokenize", ask(`"seed":1`)); gjson.Get(body, "count").Int() != 77 {
			t.Error(body)
		}
	}
	status, _ := chat(t, url, ask(`"seed":1`))
	if _, body := do(t, "POST", url+"/tokenize", ask(`"seed":1`)); status != 200 || gjson.Get(body, "count").Int() == 77 {
		t.Errorf("afterwards: %s", body)
	}
}

func TestIgnoreLimit(t *testing.T) {
	_, url := server(t, Options{})
	for _, limit := range []string{"max_tokens", "max_completion_tokens"} {
		_, body := chat(t, url, ask(`"`+limit+`":3,"demo":{"numbered":true,"ignore_limit":true}`))
		if gjson.Get(body, "choices.0.finish_reason").Str != "stop" || gjson.Get(body, "usage.completion_tokens").Int() != numberedLength {
			t.Error(body)
		}
	}
}

// With each chunk comes how far its choice is, as vLLM tells it.
func TestContinuousUsage(t *testing.T) {
	_, url := server(t, Options{})
	for options, want := range map[string]string{
		`{"include_usage":true,"continuous_usage_stats":true}`: "0 0 2 2 4 4 5 5 5 5 10",
		`{"include_usage":true}`:                               "10",
		`{"continuous_usage_stats":true}`:                      "",
	} {
		_, body := chat(t, url, ask(`"stream":true,"n":2,"max_tokens":5,"stream_options":`+options+`,"demo":{"numbered":true,"tokens_per_chunk":2}`))
		var told []string
		for line := range strings.Lines(body) {
			if u := gjson.Get(strings.TrimPrefix(line, "data: "), "usage"); u.IsObject() {
				told = append(told, u.Get("completion_tokens").Raw)
				if u.Get("total_tokens").Int() != u.Get("completion_tokens").Int()+u.Get("prompt_tokens").Int() {
					t.Errorf("usage %s", u.Raw)
				}
			}
		}
		if got := strings.Join(told, " "); got != want {
			t.Errorf("%s: %q, want %q", options, got, want)
		}
	}
}
