package backend

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/tidwall/gjson"

	"github.com/ownllm/ownllm/schemas"
)

const chatRoute = "POST /v1/chat/completions"

// rendered is the prompt of a template that goes on from the last message and adds after,
// with the content changed by change.
func rendered(answer string, change func(content string) string, after string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		prompt := "<user>" + proofPrompt + "<assistant>" + change(proofText+" \n") + after
		says(200, answer, schemas.AppendString(nil, prompt))(w, r)
	}
}

func same(s string) string { return s }

func continues(t *testing.T, f *fake, id string) bool {
	t.Helper()
	return models(t, probe(t, Config{URL: f.URL}))[id].Continues
}

func TestVLLMContinues(t *testing.T) {
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		want   bool
	}{
		"it can":           {says(200, `{"count":12,"max_model_len":32768,"tokens":[1]}`), true},
		"the template":     {says(400, `{"error":{"message":"continue_final_message is set but the final message does not appear in the chat after applying the chat template!","code":400}}`), false},
		"there is no such": {says(404, `{"detail":"Not Found"}`), false},
		"it's broken":      {says(500, ``), false},
	} {
		f := newVLLM(t)
		f.set("POST /tokenize", c.answer)
		if got := continues(t, f, "base"); got != c.want {
			t.Errorf("%s: continues is %v", name, got)
		}
		asked := gjson.Parse(f.last("POST /tokenize"))
		if asked.Get("add_generation_prompt").Raw != "false" || asked.Get("continue_final_message").Raw != "true" || asked.Get("messages.1.role").String() != "assistant" {
			t.Errorf("%s: asked %s", name, asked.Raw)
		}
	}
}

func TestLlamaContinues(t *testing.T) {
	const answer = `{"prompt":%s}`
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		want   bool
	}{
		"it can":                 {rendered(answer, same, ""), true},
		"it can, but trims":      {rendered(answer, strings.TrimSpace, ""), true},
		"a new message":          {rendered(answer, same, "<end><assistant>"), false},
		"thinking is on":         {says(400, `{"error":{"code":400,"message":"Assistant response prefill is incompatible with enable_thinking.","type":"invalid_request_error"}}`), false},
		"too old to be asked":    {says(404, `{"error":{"code":404,"message":"File Not Found","type":"not_found_error"}}`), false},
		"something else instead": {rendered(answer, strings.ToUpper, ""), false},
	} {
		f := newLlama(t)
		f.set("POST /apply-template", c.answer)
		b := probe(t, Config{URL: f.URL})
		for range 3 {
			if got := models(t, b)["smol"].Continues; got != c.want {
				t.Errorf("%s: continues is %v", name, got)
			}
		}
		if n := f.count("POST /apply-template"); n > 2 {
			t.Errorf("%s: asked %d times", name, n)
		}
		if n := f.count(chatRoute); n != 0 {
			t.Errorf("%s: %d tokens were made for it", name, n)
		}
	}
	// One that doesn't unless it's told.
	f := newLlama(t)
	f.set("POST /apply-template", func(w http.ResponseWriter, r *http.Request) {
		after := "<end><assistant>"
		if asked := f.last("POST /apply-template"); gjson.Get(asked, "continue_final_message").Bool() && gjson.Get(asked, "add_generation_prompt").Raw == "false" {
			after = ""
		}
		rendered(answer, same, after)(w, r)
	})
	b := probe(t, Config{URL: f.URL})
	if !models(t, b)["smol"].Continues || !b.way("smol").flags {
		t.Error("told to continue, it does")
	}
}

// A router isn't made to load a model only to be asked.
func TestRouterContinues(t *testing.T) {
	f := newRouter(t)
	f.set("POST /apply-template", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("autoload") != "false" {
			t.Error("the question may load a model")
		}
		rendered(`{"prompt":%s}`, same, "")(w, r)
	})
	got := models(t, probe(t, Config{URL: f.URL}))
	for id, want := range map[string]bool{"a": true, "b": false, "c": false, "d": false} {
		if got[id].Continues != want {
			t.Errorf("%s continues: %v", id, got[id].Continues)
		}
	}
	if n := f.count("POST /apply-template"); n != 1 {
		t.Errorf("asked %d times", n)
	}
}

func TestOllamaContinues(t *testing.T) {
	const answer = `{"model":"llama3.2:latest","_debug_info":{"rendered_template":%s}}`
	f := newOllama(t)
	f.set("POST /api/chat", rendered(answer, same, ""))
	b := probe(t, Config{URL: f.URL})
	if models(t, b)["llama3.2:latest"].Continues || f.count("POST /api/chat") != 0 {
		t.Fatal("a model was loaded only to be asked")
	}
	f.set("GET /api/ps", says(200, `{"models":[{"name":"llama3.2:latest","model":"llama3.2:latest","context_length":16384}]}`))
	if !models(t, b)["llama3.2:latest"].Continues {
		t.Error("in memory, it isn't known to continue")
	}
	asked := gjson.Parse(f.last("POST /api/chat"))
	if !asked.Get("_debug_render_only").Bool() || asked.Get("options.num_ctx").Int() != 16384 || asked.Get("options.num_predict").Int() != 1 || asked.Get("stream").Raw != "false" {
		t.Errorf("asked %s", asked.Raw)
	}
	// What is known stays known when the model isn't in memory any more.
	f.set("GET /api/ps", says(200, `{"models":[]}`))
	if !models(t, b)["llama3.2:latest"].Continues || f.count("POST /api/chat") != 1 {
		t.Errorf("asked %d times", f.count("POST /api/chat"))
	}
	if !b.way("llama3.2").can || !b.way("llama3.2:latest").can || b.way("llama3").can {
		t.Error("it is known under another name")
	}

	for name, answer := range map[string]http.HandlerFunc{
		"an old build answers": says(200, `{"message":{"role":"assistant","content":" there"},"done":true}`),
		"a new message":        rendered(answer, same, "<end><assistant>"),
	} {
		f := newOllama(t)
		f.set("POST /api/chat", answer)
		f.set("GET /api/ps", says(200, `{"models":[{"name":"llama3.2:latest","model":"llama3.2:latest"}]}`))
		if continues(t, f, "llama3.2:latest") {
			t.Errorf("%s: it counts as one that continues", name)
		}
	}
}

// An answer that doesn't come proves nothing, and is asked for again later.
func TestInconclusiveProof(t *testing.T) {
	f := newLlama(t)
	f.set("POST /apply-template", says(503, llamaLoading))
	b := probe(t, Config{URL: f.URL})
	models(t, b)
	models(t, b)
	if n := f.count("POST /apply-template"); n != 1 {
		t.Errorf("asked %d times in a row", n)
	}
	b.mu.Lock()
	c := b.continues["smol"]
	c.at = c.at.Add(-trialPause)
	b.continues["smol"] = c
	b.mu.Unlock()
	f.set("POST /apply-template", rendered(`{"prompt":%s}`, same, ""))
	if !models(t, b)["smol"].Continues {
		t.Error("it isn't asked again")
	}
}

// chunks is a stream of contents, as llama.cpp and vLLM begin and end it.
func chunks(usage string, contents ...string) string {
	var s strings.Builder
	event := func(choices string) {
		s.WriteString(`data: {"id":"x","object":"chat.completion.chunk","created":1,"model":"up","choices":` + choices + "}\n\n")
	}
	event(`[{"index":0,"delta":{"role":"assistant","content":null},"finish_reason":null}]`)
	for _, c := range contents {
		event(`[{"index":0,"delta":{"content":` + string(schemas.AppendString(nil, c)) + `},"finish_reason":null}]`)
	}
	event(`[{"index":0,"delta":{},"finish_reason":"stop"}]`)
	s.WriteString(`data: {"id":"x","choices":[],"usage":` + usage + "}\n\ndata: [DONE]\n\n")
	return s.String()
}

// spoken is what a client gets of a stream.
type spoken struct {
	text, finish string
	roles        int
	usage        schemas.Usage
}

func listen(t *testing.T, out string) (s spoken) {
	t.Helper()
	for line := range strings.Lines(out) {
		var c struct {
			Choices []struct {
				Delta  struct{ Role, Content string }
				Finish string `json:"finish_reason"`
			}
			Usage *schemas.Usage
		}
		if err := json.Unmarshal([]byte(line), &c); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		for _, choice := range c.Choices {
			s.text, s.finish = s.text+choice.Delta.Content, s.finish+choice.Finish
			if choice.Delta.Role != "" {
				s.roles++
			}
		}
		if c.Usage != nil {
			s.usage = *c.Usage
		}
	}
	return s
}

func resumed(body, text string, tokens, prompt int) *Call {
	return &Call{
		Model: "m", Body: []byte(body), Stream: true, IncludeUsage: true, Completion: "chatcmpl-1", Created: 7, ReplyModel: "m",
		Continue: &schemas.Continuation{Text: text, Tokens: tokens, PromptTokens: prompt},
	}
}

// newVLLMThatContinues and its kin are servers of which it is known.
func newVLLMThatContinues(t *testing.T) (*fake, *Backend) {
	f := newVLLM(t)
	f.set("POST /tokenize", says(200, `{"count":12}`))
	b := probe(t, Config{URL: f.URL})
	models(t, b)
	return f, b
}

func newLlamaThatContinues(t *testing.T) (*fake, *Backend) {
	f := newLlama(t)
	f.set("POST /apply-template", rendered(`{"prompt":%s}`, same, ""))
	b := probe(t, Config{URL: f.URL})
	models(t, b)
	return f, b
}

func TestContinueOnVLLM(t *testing.T) {
	f, b := newVLLMThatContinues(t)
	f.set(chatRoute, streams(chunks(`{"prompt_tokens":17,"completion_tokens":3,"total_tokens":20}`, "\n", " time", "!")))
	c := resumed(`{"model":"base","messages":[{"role":"user","content":"Hi"} ],"echo":true,"max_tokens":100,"min_tokens":2,"x":1}`, "Once \"upon\n ", 5, 11)
	c.Model = "base"
	r, err := b.Chat(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	out, err := drain(r)
	if err != nil {
		t.Fatal(err)
	}
	// The client has had "\n ", which the server says again.
	if got, want := listen(t, out), (spoken{"time!", "stop", 0, schemas.Usage{PromptTokens: 11, CompletionTokens: 8}}); got != want {
		t.Errorf("the client gets %+v, want %+v", got, want)
	}
	if r.Tokens() != 8 || r.Usage() != (schemas.Usage{PromptTokens: 11, CompletionTokens: 8}) {
		t.Errorf("%d tokens, usage %+v", r.Tokens(), r.Usage())
	}
	want := `{"stream":true,"stream_options":{"include_usage":true,"continuous_usage_stats":true},"add_generation_prompt":false,"continue_final_message":true,` +
		`"model":"base","messages":[{"role":"user","content":"Hi"} ,{"role":"assistant","content":"Once \"upon"}],"echo":false,"max_tokens":95,"min_tokens":0,"x":1}`
	if got := f.last(chatRoute); got != want {
		t.Errorf("the server got\n%s, want\n%s", got, want)
	}
}

// What the server says of the prompt has the text in it; without a count of its own, be it a late
// one, it is what is left without that.
func TestContinueWithoutACount(t *testing.T) {
	f, b := newVLLMThatContinues(t)
	f.set(chatRoute, streams(chunks(`{"prompt_tokens":17,"completion_tokens":1}`, "!")))
	c := resumed(`{"model":"base","messages":[{"role":"user","content":"Hi"}]}`, "Once", 5, 0)
	c.Model = "base"
	for counted, want := range map[[2]int]int{{0, 0}: 12, {13, 13}: 13, {0, 13}: 13} { // before and after the call
		n := counted[0]
		c.Prompt = func() int { return n }
		r, err := b.Chat(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		n = counted[1]
		out, err := drain(r)
		if got := listen(t, out).usage; err != nil || got != (schemas.Usage{PromptTokens: want, CompletionTokens: 6}) || r.Usage() != got {
			t.Errorf("%v, usage %+v, %+v", err, got, r.Usage())
		}
		r.Close()
	}
}

func TestContinueOnLlama(t *testing.T) {
	const text = "ab ab"
	for _, test := range []struct {
		name     string
		repeats  bool
		contents []string
		text     string
		tokens   int
		fails    bool
	}{
		{"says only what is new", false, []string{" ab", "!"}, " ab!", 7, false},
		{"says by chance the same", false, []string{"ab ab", "!"}, "ab ab!", 7, false},
		{"repeats, in one piece with what is new", true, []string{"ab ab ab", "!"}, " ab!", 7, false},
		{"repeats, in one piece", true, []string{"ab ab", " ab", "!"}, " ab!", 7, false},
		{"repeats, in many pieces", true, []string{"a", "b", " a", "b a", "b!"}, " ab!", 7, false},
		{"repeats, and says the same again", true, []string{"ab ab", "ab ab", "!"}, "ab ab!", 7, false},
		{"repeats something else", true, []string{"ab", " cd"}, "", 0, true},
		{"repeats half of it", true, []string{"ab"}, "", 0, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			f, b := newLlamaThatContinues(t)
			f.set(chatRoute, func(w http.ResponseWriter, r *http.Request) {
				const usage = `{"prompt_tokens":14,"completion_tokens":2}`
				asked := gjson.Parse(f.last(chatRoute))
				messages := asked.Get("messages").Array()
				last := messages[len(messages)-1].Get("content").String()
				switch {
				case last == text:
					streams(chunks(usage, test.contents...))(w, r)
				case last != proofText || asked.Get("max_tokens").Int() != 1:
					t.Errorf("the server was asked %s", asked.Raw)
				case test.repeats:
					streams(chunks(usage, proofText+" there"))(w, r)
				default:
					streams(chunks(usage, " there"))(w, r)
				}
			})
			c := resumed(`{"model":"smol","messages":[{"role":"user","content":"Hi"}],"n_predict":-1,"max_tokens":10.0}`, text, 5, 9)
			c.Model = "smol"
			for range 2 {
				r, err := b.Chat(t.Context(), c)
				if err != nil {
					t.Fatal(err)
				}
				out, err := drain(r)
				r.Close()
				if test.fails {
					var e *schemas.Error
					if !errors.As(err, &e) || e.Code != schemas.CodeBackendError || !strings.Contains(e.Message, "can't continue") || listen(t, out).text != "" {
						t.Errorf("%q, %v", out, err)
					}
					continue
				}
				got, want := listen(t, out), spoken{test.text, "stop", 0, schemas.Usage{PromptTokens: 9, CompletionTokens: test.tokens}}
				if err != nil || got != want {
					t.Errorf("%v, the client gets %+v, want %+v", err, got, want)
				}
			}
			if n := f.count(chatRoute); n != 3 {
				t.Errorf("%d requests for two replies, and one token to find out", n)
			}
			if got := f.last(chatRoute); !strings.HasSuffix(got, `"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"ab ab"}],"n_predict":-1,"max_tokens":5}`) {
				t.Errorf("the server got %s", got)
			}
		})
	}
}

func TestContinueOnOllama(t *testing.T) {
	f := newOllama(t)
	f.set("POST /api/chat", rendered(`{"_debug_info":{"rendered_template":%s}}`, strings.TrimSpace, ""))
	f.set("GET /api/ps", says(200, `{"models":[{"name":"llama3.2:latest","model":"llama3.2:latest"}]}`))
	b := probe(t, Config{URL: f.URL})
	models(t, b)
	f.set(chatRoute, streams(chunks(`{"prompt_tokens":14,"completion_tokens":2}`, "upon", "!")))
	c := resumed(`{"model":"llama3.2","messages":[{"role":"user","content":"Hi"}],"max_completion_tokens":10}`, "Once ", 4, 9)
	c.Model = "llama3.2"
	r, err := b.Chat(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	out, err := drain(r)
	if got := listen(t, out); err != nil || got.text != "upon!" || got.usage.CompletionTokens != 6 {
		t.Errorf("%v, the client gets %+v", err, got)
	}
	if got := f.last(chatRoute); !strings.HasSuffix(got, `"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Once"}],"max_tokens":6}`) {
		t.Errorf("the server got %s", got)
	}
}

// Where it isn't proved, nobody is asked.
func TestContinueUnproved(t *testing.T) {
	f := newVLLM(t)
	b := probe(t, Config{URL: f.URL})
	models(t, b)
	before := f.count(chatRoute)
	c := resumed(`{"model":"base","messages":[{"role":"user","content":"Hi"}]}`, "Once", 1, 1)
	c.Model = "base"
	if _, err := b.Chat(t.Context(), c); !errors.Is(err, schemas.Errorf(schemas.CodeBackendError, "")) {
		t.Errorf("got %v", err)
	}
	if n := f.count(chatRoute) - before; n != 0 {
		t.Errorf("%d requests", n)
	}
	// A reply of which there is only the role begins anew, without the role.
	f.set(chatRoute, streams(chunks(`{"prompt_tokens":9,"completion_tokens":1}`, "Once")))
	c.Continue = &schemas.Continuation{}
	r, err := b.Chat(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	out, err := drain(r)
	if got := listen(t, out); err != nil || got != (spoken{"Once", "stop", 0, schemas.Usage{PromptTokens: 9, CompletionTokens: 1}}) {
		t.Errorf("%v, the client gets %+v", err, got)
	}
	if got := f.last(chatRoute); strings.Contains(got, "assistant") || strings.Contains(got, "continue_final_message") {
		t.Errorf("the server got %s", got)
	}
}

// A reply that has reached its limit has come to its end, and needs no server for that.
func TestContinueAtTheLimit(t *testing.T) {
	f, b := newVLLMThatContinues(t)
	before := f.count(chatRoute)
	for name, c := range map[string]*Call{
		"the client's":           resumed(`{"messages":[{"role":"user","content":"Hi"}],"max_tokens":5}`, "Once", 5, 11),
		"by its other name":      resumed(`{"messages":[{"role":"user","content":"Hi"}],"max_completion_tokens":4,"max_tokens":9}`, "Once", 5, 11),
		"that of the allowance":  resumed(`{"messages":[{"role":"user","content":"Hi"}]}`, "Once", 5, 11),
		"with more than allowed": resumed(`{"messages":[{"role":"user","content":"Hi"}]}`, "Once", 6, 11),
	} {
		c.Model = "base"
		if !strings.Contains(string(c.Body), "max") {
			c.MaxTokens = 5
			c.Allowed = func() int64 { return 5 }
		}
		r, err := b.Chat(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		out, err := drain(r)
		if got, want := listen(t, out), (spoken{"", "length", 0, schemas.Usage{PromptTokens: 11, CompletionTokens: c.Continue.Tokens}}); err != nil || got != want || r.Usage() != want.usage {
			t.Errorf("%s: %v, the client gets %+v, want %+v; usage %+v", name, err, got, want, r.Usage())
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
	if n := f.count(chatRoute) - before; n != 0 {
		t.Errorf("%d requests", n)
	}
}

// What is allowed counts from the beginning of the whole reply.
func TestContinueWithinTheAllowance(t *testing.T) {
	f, b := newVLLMThatContinues(t)
	var stream strings.Builder
	for i := range 4 {
		stream.WriteString(`data: {"choices":[{"index":0,"delta":{"content":" ` + strconv.Itoa(i) + `"},"finish_reason":null}],"usage":{"prompt_tokens":20,"completion_tokens":` + strconv.Itoa(i+1) + "}}\n\n")
	}
	f.set(chatRoute, streams(stream.String()))
	allowed := int64(7)
	c := resumed(`{"messages":[{"role":"user","content":"Hi"}]}`, "Once", 5, 11)
	c.Model = "base"
	r := bounded(t, b, c, &allowed)
	out, err := hold(t, r)
	if got := listen(t, out); !errors.Is(err, ErrHeld) || got.text != " 0 1" || r.Wanted() != 8 || r.Tokens() != 7 {
		t.Errorf("%v after %+v; %d tokens, wanted %d", err, got, r.Tokens(), r.Wanted())
	}
	if got := listen(t, string(r.Cut(nil))); got != (spoken{"", "length", 0, schemas.Usage{PromptTokens: 11, CompletionTokens: 7}}) {
		t.Errorf("cut, it ends with %+v", got)
	}
}

// Thoughts in the middle of a text say that the server has begun anew.
func TestContinuedByThoughts(t *testing.T) {
	f, b := newVLLMThatContinues(t)
	f.set(chatRoute, streams(`data: {"choices":[{"index":0,"delta":{"role":"assistant","content":"","reasoning":""},"finish_reason":null}]}`+"\n\n"+
		`data: {"choices":[{"index":0,"delta":{"reasoning":"The user"},"finish_reason":null}]}`+"\n\n"))
	c := resumed(`{"messages":[{"role":"user","content":"Hi"}]}`, "Once", 5, 11)
	c.Model = "base"
	r, err := b.Chat(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	out, err := drain(r)
	if !errors.Is(err, schemas.Errorf(schemas.CodeBackendError, "")) || errors.Is(err, io.EOF) || strings.Contains(out, "user") {
		t.Errorf("%q, %v", out, err)
	}
}
