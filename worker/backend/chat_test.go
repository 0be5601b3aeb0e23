package backend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ownllm/ownllm/schemas"
)

func TestChatStream(t *testing.T) {
	f := newVLLM(t)
	b := probe(t, Config{URL: f.URL, Key: "sk-1", Models: map[string]string{"base": "mine"}})
	headers := make(chan http.Header, 1)
	f.set("POST /v1/chat/completions", func(w http.ResponseWriter, r *http.Request) {
		headers <- r.Header
		streams(wholeStream)(w, r)
	})
	c := &Call{Model: "mine", Body: []byte(`{"model":"mine","stream":true,"x":1}`), Stream: true, IncludeUsage: true, Completion: "chatcmpl-7", Created: 9, ReplyModel: "mine"}
	r, err := b.Chat(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	out, err := drain(r)
	if err != nil || strings.Count(out, "\n") != 5 || strings.Contains(out, "[DONE]") {
		t.Errorf("%v\n%s", err, out)
	}
	for line := range strings.Lines(out) {
		if !strings.HasPrefix(line, `{"id":"chatcmpl-7","object":"chat.completion.chunk","created":9,"model":"mine"`) {
			t.Errorf("line %s", line)
		}
	}
	if u := r.Usage(); u != (schemas.Usage{PromptTokens: 1, CompletionTokens: 2}) || r.Tokens() != 2 {
		t.Errorf("usage %+v, tokens %d", u, r.Tokens())
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if want := `{"stream_options":{"include_usage":true,"continuous_usage_stats":true},"model":"base","stream":true,"x":1}`; f.last("POST /v1/chat/completions") != want {
		t.Errorf("the server got %s", f.last("POST /v1/chat/completions"))
	}
	h := <-headers
	if h.Get("Authorization") != "Bearer sk-1" || h.Get("Content-Type") != "application/json" || h.Get("Idempotency-Key") != "" {
		t.Errorf("headers %v", h)
	}
}

func TestChatWhole(t *testing.T) {
	f := newLlama(t)
	b := probe(t, Config{URL: f.URL})
	c := testCall(false, false)
	c.Body = []byte(`{"model":"m"}`)
	tests := []struct {
		name, in string
		code     schemas.Code
	}{
		{"whole", `{"choices":[{"index":0,"message":{"role":"assistant","content":"hi"},"finish_reason":"stop"}],"usage":{"prompt_tokens":4,"completion_tokens":2}}`, ""},
		{"unfinished", `{"choices":[{"index":0,"message":{"role":"assistant","content":"hi"},"finish_reason":null}]}`, schemas.CodeBackendError},
		{"an error with status 200", `{"error":{"message":"boom"}}`, schemas.CodeBackendError},
		{"no choices", `{"choices":[],"usage":{"prompt_tokens":1}}`, schemas.CodeBackendError},
		{"garbage", `<html>`, schemas.CodeBackendError},
		{"nothing", ``, schemas.CodeBackendError},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f.set("POST /v1/chat/completions", says(200, "%s", tt.in))
			r, err := b.Chat(t.Context(), c)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			out, err := r.Body()
			if tt.code == "" {
				if err != nil || r.Usage() != (schemas.Usage{PromptTokens: 4, CompletionTokens: 2}) {
					t.Errorf("%v, usage %+v", err, r.Usage())
				}
				if _, err := r.Body(); err == nil {
					t.Error("a second Body gives no error")
				}
				return
			}
			var e *schemas.Error
			if out != nil || !errors.As(err, &e) || e.Code != tt.code {
				t.Errorf("%s, %v", out, err)
			}
		})
	}
}

func TestRefusals(t *testing.T) {
	tests := []struct {
		name    string
		kind    Kind
		status  int
		body    string
		code    schemas.Code
		message string // part of it
		param   string
		retry   time.Duration
	}{
		{"llama.cpp: too long", LlamaCPP, 400, `{"error":{"code":400,"message":"the request exceeds the available context size, try increasing it","type":"exceed_context_size_error","n_prompt_tokens":5000,"n_ctx":4096}}`,
			schemas.CodeContextLengthExceeded, `has 5000 tokens, and the context window of "m" is 4096`, "messages", 0},
		{"vLLM: too long", VLLM, 400, `{"error":{"message":"This model's maximum context length is 2048 tokens. However, your request has 3000 input tokens.","type":"BadRequestError","param":null,"code":400}}`,
			schemas.CodeContextLengthExceeded, "3000 input tokens", "messages", 0},
		{"vLLM: max_tokens too large", VLLM, 400, `{"error":{"message":"'max_tokens' is too large: 5000. This model's maximum context length is 4096 tokens","type":"BadRequestError","param":"max_tokens","code":400}}`,
			schemas.CodeContextLengthExceeded, "too large: 5000", "max_tokens", 0},
		{"old vLLM, flat", VLLM, 400, `{"object":"error","message":"This model's maximum context length is 10 tokens.","type":"BadRequestError","param":null,"code":400}`,
			schemas.CodeContextLengthExceeded, "10 tokens", "messages", 0},
		{"OpenAI: too long", OpenAI, 400, `{"error":{"message":"too much","type":"invalid_request_error","param":"messages","code":"context_length_exceeded"}}`,
			schemas.CodeContextLengthExceeded, "larger window", "messages", 0},
		{"LM Studio: too long", OpenAI, 400, `{"error":"Trying to keep the first 9000 tokens when context the overflows. However, the model is loaded with context length of only 4096 tokens"}`,
			schemas.CodeContextLengthExceeded, "4096", "messages", 0},
		{"vLLM: no tools", VLLM, 400, `{"error":{"message":"\"auto\" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set","type":"BadRequestError","code":400}}`,
			schemas.CodeModelDoesNotSupportTools, "tools", "tools", 0},
		{"Ollama: no tools", Ollama, 400, `{"error":{"message":"registry.ollama.ai/library/gemma:2b does not support tools","type":"invalid_request_error","param":null,"code":null}}`,
			schemas.CodeModelDoesNotSupportTools, `"m"`, "tools", 0},
		{"llama.cpp: no vision", LlamaCPP, 500, `{"error":{"code":500,"message":"image input is not supported - hint: if this is unexpected, you may need to provide the mmproj","type":"server_error"}}`,
			schemas.CodeModelDoesNotSupportVision, "see images", "messages", 0},
		{"a wrong value", VLLM, 400, `{"error":{"message":"temperature must be\nnon-negative, got -1.0.","type":"BadRequestError","param":"temperature","code":400}}`,
			schemas.CodeInvalidValue, "The vLLM backend refused the request: temperature must be non-negative, got -1.0.", "temperature", 0},
		{"FastAPI's detail", VLLM, 422, `{"detail":[{"loc":["body","messages",0,"role"],"msg":"Field required","type":"missing"}]}`,
			schemas.CodeInvalidValue, "Field required", "messages.0.role", 0},
		{"llama.cpp names the field", LlamaCPP, 400, `{"error":{"code":400,"message":"Field 'n': Value must be between 1 <= value <= 2, but got 3","type":"invalid_request_error"}}`, schemas.CodeInvalidValue, "but got 3", "n", 0},
		{"an odd param", VLLM, 400, `{"error":{"message":"bad","param":"a b: c"}}`, schemas.CodeInvalidValue, "bad", "", 0},
		{"no reason", OpenAI, 400, ``, schemas.CodeInvalidValue, "no reason", "", 0},
		{"Ollama: no such model", Ollama, 404, `{"error":{"message":"model \"m\" not found, try pulling it first","type":"not_found_error"}}`, schemas.CodeModelNotFound, "any more", "model", 0},
		{"vLLM: no such model", VLLM, 404, "{\"error\":{\"message\":\"The model `x` does not exist.\",\"type\":\"NotFoundError\",\"code\":404}}", schemas.CodeModelNotFound, "any more", "model", 0},
		{"router: no such model", LlamaCPP, 400, `{"error":{"code":400,"message":"model 'x' not found","type":"invalid_request_error"}}`, schemas.CodeModelNotFound, "any more", "model", 0},
		{"no such route", OpenAI, 404, `{"detail":"Not Found"}`, schemas.CodeBackendError, "status 404", "", 0},
		{"a wrong key", VLLM, 401, `{"error":"Unauthorized: sk-secret"}`, schemas.CodeBackendError, "OWNLLM_BACKEND_KEY", "", 0},
		{"forbidden", OpenAI, 403, ``, schemas.CodeBackendError, "status 403", "", 0},
		{"llama.cpp: loading", LlamaCPP, 503, llamaLoading, schemas.CodeModelLoading, `"m" is loading`, "", 3 * time.Second},
		{"router: not loaded", LlamaCPP, 400, `{"error":{"code":400,"message":"model is not loaded","type":"invalid_request_error"}}`, schemas.CodeModelLoading, "loading", "", 3 * time.Second},
		{"Ollama: too busy", Ollama, 503, `{"error":{"message":"server busy, please try again.  maximum pending requests exceeded","type":"api_error"}}`, schemas.CodeBackendError, "too busy", "", 2 * time.Second},
		{"rate limit", OpenAI, 429, `{"error":{"message":"slow down"}}`, schemas.CodeBackendError, "too busy", "", 7 * time.Second},
		{"body too large", VLLM, 413, ``, schemas.CodeRequestTooLarge, "vLLM", "", 0},
		{"out of memory", Ollama, 500, `{"error":{"message":"CUDA error: out of memory secret","type":"api_error"}}`, schemas.CodeBackendError, "failed with status 500: it ran out of memory.", "", 0},
		{"can't load", Ollama, 500, `{"error":{"message":"llama runner process has terminated: error loading model secret","type":"api_error"}}`, schemas.CodeBackendError, "died", "", 0},
		{"a failure that quotes", LlamaCPP, 500, `{"error":{"code":500,"message":"Failed to parse input at pos 0: secret","type":"server_error"}}`, schemas.CodeBackendError, "failed with status 500", "", 0},
		{"plain text", OpenAI, 500, `Internal Server Error: secret`, schemas.CodeBackendError, "status 500", "", 0},
		{"a redirect", OpenAI, 307, ``, schemas.CodeBackendError, "status 307", "", 0},
		{"a timeout upstream", OpenAI, 504, `<html>secret`, schemas.CodeBackendError, "status 504", "", 0},
		{"200 and no stream", OpenAI, 200, `{"choices":[{"message":{"content":"secret"}}]}`, schemas.CodeBackendError, "isn't a stream", "", 0},
		{"200 and a page", OpenAI, 200, `<html>secret`, schemas.CodeBackendError, "isn't a stream", "", 0},
		{"200 and an error", LlamaCPP, 200, `{"error":{"code":400,"message":"the request exceeds the available context size","type":"exceed_context_size_error"}}`, schemas.CodeContextLengthExceeded, "window", "messages", 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newFake(t, map[string]http.HandlerFunc{"GET /v1/models": says(200, `{"data":[{"id":"m"}]}`)})
			b := probe(t, Config{URL: f.URL, Key: "sk-secret"})
			b.kind = tt.kind
			f.set("POST /v1/chat/completions", func(w http.ResponseWriter, r *http.Request) {
				if tt.status == http.StatusTooManyRequests {
					w.Header().Set("Retry-After", "7")
				}
				says(tt.status, "%s", tt.body)(w, r)
			})
			c := testCall(true, false)
			c.Body = []byte(`{"messages":[{"role":"user","content":"secret"}]}`)
			r, err := b.Chat(t.Context(), c)
			var e *schemas.Error
			if r != nil || !errors.As(err, &e) {
				t.Fatalf("%v, %v", r, err)
			}
			if e.Code != tt.code || !strings.Contains(e.Message, tt.message) || e.Param != tt.param || e.RetryAfter != tt.retry {
				t.Errorf("%+v, want %s %q %q %v", *e, tt.code, tt.message, tt.param, tt.retry)
			}
			if strings.Contains(e.Message, "secret") {
				t.Errorf("the message gives too much away: %s", e.Message)
			}
		})
	}
}

func TestLongMessagesAreCut(t *testing.T) {
	c := readComplaint(400, fmt.Appendf(nil, `{"error":{"message":%q}}`, strings.Repeat("ž", 1000)))
	if n := len(c.message); n > maxMessage+len("…") || !strings.HasSuffix(c.message, "ž…") {
		t.Errorf("%d bytes: %s", n, c.message)
	}
}

func TestConnectionFailures(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	answers := make(chan string, 10)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			// The request has to be read, or the close would be a reset.
			req := make([]byte, 64<<10)
			_, _ = conn.Read(req)
			_, _ = io.WriteString(conn, <-answers)
			_ = conn.Close()
		}
	}()
	b := &Backend{kind: LlamaCPP, base: "http://" + address, transport: newTransport()}
	defer b.Close()
	c := testCall(true, false)
	c.Body = []byte(`{}`)
	chat := func() error {
		r, err := b.Chat(t.Context(), c)
		if err != nil {
			return err
		}
		defer r.Close()
		_, err = drain(r)
		return err
	}
	const header = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
	for _, tt := range []struct{ name, answer, want string }{
		{"closed without a word", "", "closed the connection"},
		{"not HTTP", "SSH-2.0-x\r\n\r\n", "doesn't answer in HTTP"},
		{"cut in the headers", "HTTP/1.1 200 OK\r\nContent-Ty", "doesn't answer in HTTP"},
		{"cut in the stream", header + "10\r\ndata: {\"choic", "connection was lost"},
		{"cut between chunks", header + "1\r\n\n\r\n", "connection was lost"},
	} {
		answers <- tt.answer
		err := chat()
		var e *schemas.Error
		if !errors.As(err, &e) || e.Code != schemas.CodeBackendError || !strings.Contains(e.Message, tt.want) || strings.Contains(e.Message, address) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	if err := chat(); err == nil || !strings.Contains(err.Error(), "isn't answering") {
		t.Errorf("refused: %v", err)
	}
}

var errClientGone = errors.New("client is gone")

func TestCancel(t *testing.T) {
	for _, when := range []string{"before the answer", "in the stream", "in a whole reply"} {
		t.Run(when, func(t *testing.T) {
			f := newLlama(t)
			b := probe(t, Config{URL: f.URL})
			arrived, left := make(chan struct{}), make(chan struct{})
			f.set("POST /v1/chat/completions", func(w http.ResponseWriter, r *http.Request) {
				defer close(left)
				if when != "before the answer" {
					w.Header().Set("Content-Type", "text/event-stream")
					w.(http.Flusher).Flush()
				}
				close(arrived)
				<-r.Context().Done()
			})
			ctx, cancel := context.WithCancelCause(t.Context())
			go func() {
				<-arrived
				cancel(errClientGone)
			}()
			c := testCall(when != "in a whole reply", false)
			c.Body = []byte(`{}`)
			r, err := b.Chat(ctx, c)
			if err == nil {
				defer r.Close()
				if c.Stream {
					_, err = r.Next(nil)
				} else {
					_, err = r.Body()
				}
			}
			if !errors.Is(err, errClientGone) {
				t.Errorf("error %v doesn't tell the cause", err)
			}
			<-left // the server hears of it
		})
	}
}

func TestCloseStopsTheServer(t *testing.T) {
	f := newLlama(t)
	b := probe(t, Config{URL: f.URL})
	left := make(chan struct{})
	f.set("POST /v1/chat/completions", func(w http.ResponseWriter, r *http.Request) {
		defer close(left)
		streams(`data: {"choices":[{"index":0,"delta":{"content":"a"}}]}`+"\n\n")(w, r)
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	c := testCall(true, false)
	c.Body = []byte(`{}`)
	r, err := b.Chat(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := r.Next(nil); err != nil || len(out) == 0 {
		t.Fatalf("%q, %v", out, err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	<-left
	if _, err := r.Next(nil); err == nil {
		t.Error("Next after Close gives no error")
	}
	if err := r.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

// TestConnectionsAreUsedAgain shows that a reply read to its end leaves a connection
// that serves the next one, and that a server which keeps the reply open after
// [DONE] costs no more than that connection.
func TestConnectionsAreUsedAgain(t *testing.T) {
	f := newLlama(t)
	b := probe(t, Config{URL: f.URL})
	addresses := make(chan string, 100)
	// The end of the HTTP reply comes after the reader has seen [DONE].
	stay, seen := make(chan struct{}), make(chan struct{}, 1)
	f.set("POST /v1/chat/completions", func(w http.ResponseWriter, r *http.Request) {
		addresses <- r.RemoteAddr
		streams(`data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":"stop"}]}`+"\n\ndata: [DONE]\n\n")(w, r)
		w.(http.Flusher).Flush()
		select {
		case <-seen:
		case <-stay:
		}
	})
	c := testCall(true, false)
	c.Body = []byte(`{}`)
	run := func(end bool) string {
		r, err := b.Chat(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := drain(r); err != nil {
			t.Fatal(err)
		}
		if end {
			seen <- struct{}{}
		}
		_ = r.Close()
		return <-addresses
	}
	first := run(true)
	for range 10 {
		if again := run(true); again != first {
			t.Fatalf("connection %s, then %s", first, again)
		}
	}
	began := time.Now()
	run(false)
	if took := time.Since(began); took > 20*drainWait {
		t.Errorf("Close waited %v", took)
	}
	close(stay)
}

// TestStaleConnection shows that a request which meets a connection that the server
// has just closed is sent again.
func TestStaleConnection(t *testing.T) {
	f := newLlama(t)
	b := probe(t, Config{URL: f.URL})
	c := testCall(false, false)
	c.Body = []byte(`{}`)
	var mu sync.Mutex
	fresh := map[string]bool{}
	f.set("POST /v1/chat/completions", func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		first := !fresh[r.RemoteAddr]
		fresh[r.RemoteAddr] = true
		mu.Unlock()
		if first {
			says(200, `{"choices":[{"index":0,"message":{"content":"a"},"finish_reason":"stop"}]}`)(w, r)
			return
		}
		panic(http.ErrAbortHandler) // closes without an answer
	})
	b.Close() // the probe's connection
	for range 3 {
		r, err := b.Chat(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.Body(); err != nil {
			t.Fatal(err)
		}
		_ = r.Close()
	}
	if len(fresh) != 3 {
		t.Errorf("%d connections, want 3", len(fresh))
	}
}

// BenchmarkChat is a whole streamed call of 32 tokens over a real connection, fake
// server included.
func BenchmarkChat(b *testing.B) {
	text := strings.Repeat("data: "+benchChunks["llama"]+"\n\n", 32) +
		`data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}` + "\n\ndata: [DONE]\n\n"
	server := httptest.NewServer(streams(text))
	defer server.Close()
	backend := &Backend{kind: VLLM, base: server.URL, transport: newTransport()}
	defer backend.Close()
	c := testCall(true, false)
	c.Body = []byte(`{"model":"m","stream":true,"messages":[{"role":"user","content":"hi"}]}`)
	var dst []byte
	b.ReportAllocs()
	for b.Loop() {
		r, err := backend.Chat(b.Context(), c)
		if err != nil {
			b.Fatal(err)
		}
		for err == nil {
			dst, err = r.Next(dst[:0])
		}
		if err != io.EOF {
			b.Fatal(err)
		}
		_ = r.Close()
	}
}
