package edge_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
	"testing"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/edge"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// envelope is the one form of every refusal, byte for byte.
var envelope = regexp.MustCompile(`^\{"error":\{"message":"(?:[^"\\]|\\.)+","type":"([a-z_]+)","param":(null|"[^"]+"),"code":"([a-z_]+)"\}\}\n$`)

// checkRefusal checks all that the contract says of a refusal.
func checkRefusal(t *testing.T, resp *http.Response, body, code, param string) {
	t.Helper()
	info := schemas.Code(code).Info()
	if resp.StatusCode != info.Status {
		t.Errorf("status is %d, want %d", resp.StatusCode, info.Status)
	}
	if resp.Request == nil || resp.Request.Method != http.MethodHead {
		m := envelope.FindStringSubmatch(body)
		if m == nil {
			t.Fatalf("body isn't the envelope: %q", body)
		}
		wantParam := "null"
		if param != "" {
			wantParam = `"` + param + `"`
		}
		if m[1] != info.Type || m[2] != wantParam || m[3] != code {
			t.Errorf("type %s, param %s, code %s; want %s, %s, %s: %s", m[1], m[2], m[3], info.Type, wantParam, code, body)
		}
	}
	if got := resp.Header.Get("Content-Type"); got != "application/json" {
		t.Errorf("Content-Type is %q", got)
	}
	if !strings.HasPrefix(resp.Header.Get("X-Request-Id"), "req_") {
		t.Errorf("X-Request-Id is %q", resp.Header.Get("X-Request-Id"))
	}
	if wait := resp.Header.Get("Retry-After"); (info.Status == 429 || info.Status == 503) && wait == "" {
		t.Error("no Retry-After")
	}
	if got := resp.Header.Get("X-Should-Retry"); got != "" {
		t.Errorf("X-Should-Retry is %q", got)
	}
}

func TestRoutesAndMethods(t *testing.T) {
	t.Parallel()
	h := build(t, plan{empty: true})
	for _, test := range []struct{ method, path, code, allow string }{
		{"GET", "/", "not_found", ""},
		{"GET", "/v1", "not_found", ""},
		{"GET", "/v1/", "not_found", ""},
		{"POST", "/v1/completions", "not_found", ""},
		{"POST", "/V1/chat/completions", "not_found", ""},
		{"POST", "/v1/chat/completions/", "not_found", ""},
		{"GET", "/v1/chat/completions", "method_not_allowed", "POST"},
		{"HEAD", "/v1/chat/completions", "method_not_allowed", "POST"},
		{"DELETE", "/v1/chat/completions", "method_not_allowed", "POST"},
		{"PATCH", "/v1/chat/completions", "method_not_allowed", "POST"},
		{"OPTIONS", "/v1/chat/completions", "method_not_allowed", "POST"},
		{"TRACE", "/v1/chat/completions", "method_not_allowed", "POST"},
		{"POST", "/v1/models", "method_not_allowed", "GET, HEAD"},
		{"DELETE", "/v1/models/a/b", "method_not_allowed", "GET, HEAD"},
		{"POST", "/healthz", "method_not_allowed", "GET, HEAD"},
		{"FOO", "/v1/models", "method_not_allowed", "GET, HEAD, POST, OPTIONS"},
		{"get", "/v1/models", "method_not_allowed", "GET, HEAD, POST, OPTIONS"},
		{"QUERY", "/nowhere", "method_not_allowed", "GET, HEAD, POST, OPTIONS"},
		{"GET", "/v1/..%2f..%2fetc/passwd", "not_found", ""},
		{"GET", "/v1/%00", "not_found", ""},
		{"GET", "/api/v1/nothing", "key_invalid", ""},
	} {
		t.Run(test.method+" "+test.path, func(t *testing.T) {
			resp, body := h.do(test.method, test.path, h.key, "")
			checkRefusal(t, resp, body, test.code, "")
			if allow := sorted(resp.Header.Get("Allow")); allow != sorted(test.allow) {
				t.Errorf("Allow is %q, want %q", allow, test.allow)
			}
		})
	}
}

func TestWhatIsNotHTTP(t *testing.T) {
	t.Parallel()
	h := build(t, plan{empty: true})
	for _, test := range []struct{ name, text, code string }{
		{"nonsense", "hello\n\n", "invalid_value"},
		{"no version", "GET /v1/models\n\n", "invalid_value"},
		{"TLS", "\x16\x03\x01\x00\x05hello\n\n", "invalid_value"},
		{"bad length", "POST /v1/chat/completions HTTP/1.1\nHost: h\nContent-Length: x\n\n", "invalid_value"},
		{"negative length", "POST /v1/chat/completions HTTP/1.1\nHost: h\nContent-Length: -1\n\n", "invalid_value"},
		{"two lengths", "POST /v1/chat/completions HTTP/1.1\nHost: h\nContent-Length: 2\nContent-Length: 3\n\n{}", "invalid_value"},
		{"length and chunks", "POST /v1/chat/completions HTTP/1.1\nHost: h\nContent-Length: 2\nTransfer-Encoding: chunked\n\n0\n\n", "key_malformed"}, // read as chunks, and closed
		{"no colon", "GET /v1/models HTTP/1.1\nHost: h\nwhat\n\n", "invalid_value"},
		{"space before the colon", "GET /v1/models HTTP/1.1\nHost: h\nX : y\n\n", "invalid_value"},
		{"large header", "GET /v1/models HTTP/1.1\nHost: h\nX-Large: " + strings.Repeat("x", 20<<10) + "\n\n", "request_too_large"},
		{"many headers", "GET /v1/models HTTP/1.1\nHost: h\n" + strings.Repeat("X-Y: z\n", 4<<10) + "\n", "request_too_large"},
		{"long path", "GET /" + strings.Repeat("x", 20<<10) + " HTTP/1.1\nHost: h\n\n", "request_too_large"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := h.dial()
			c.send(test.text)
			resp, body := c.whole("GET")
			checkRefusal(t, resp, body, test.code, "")
			if !resp.Close {
				t.Error("the connection is kept")
			}
			if _, err := io.Copy(io.Discard, c.r); err != nil {
				t.Errorf("the connection broke: %v", err)
			}
		})
	}
	t.Run("chunk that isn't", func(t *testing.T) {
		c := h.dial()
		c.send("POST /v1/chat/completions HTTP/1.1\nHost: h\nAuthorization: Bearer " + h.key + "\nTransfer-Encoding: chunked\n\nzz\n")
		resp, body := c.whole("POST")
		checkRefusal(t, resp, body, "invalid_json", "")
	})
	t.Run("body that ends early", func(t *testing.T) {
		c := h.dial()
		c.send("POST /v1/chat/completions HTTP/1.1\nHost: h\nAuthorization: Bearer " + h.key + "\nTransfer-Encoding: chunked\n\n5\n{\"mod")
		if err := c.Conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		resp, body := c.whole("POST")
		checkRefusal(t, resp, body, "invalid_json", "")
	})
	t.Run("compressed body", func(t *testing.T) {
		resp, body := h.do("POST", "/v1/chat/completions", h.key, "{}", "Content-Encoding: gzip")
		checkRefusal(t, resp, body, "invalid_json", "")
	})
}

// A body over the limit is refused when the limit is reached, and not at its end.
func TestBodyLimit(t *testing.T) {
	t.Parallel()
	const limit = 64 << 10
	h := build(t, plan{edge: edge.Config{BodyLimit: limit}})
	fits := ask(`"x":""`)
	fits = ask(`"x":"` + strings.Repeat("y", limit-len(fits)) + `"`)
	if len(fits) != limit {
		t.Fatal(len(fits))
	}
	if resp, body := h.do("POST", "/v1/chat/completions", h.key, fits); resp.StatusCode != 200 {
		t.Errorf("at the limit: %d %s", resp.StatusCode, body)
	}
	resp, body := h.do("POST", "/v1/chat/completions", h.key, fits+" ")
	checkRefusal(t, resp, body, "request_too_large", "")

	chunks := func(body string) (*http.Response, string) {
		c := h.dial()
		c.send("POST /v1/chat/completions HTTP/1.1\nHost: h\nAuthorization: Bearer " + h.key + "\nTransfer-Encoding: chunked\n\n")
		for len(body) > 0 {
			n := min(1000, len(body))
			c.send(fmt.Sprintf("%x\n%s\n", n, body[:n]))
			body = body[n:]
		}
		c.send("0\n\n")
		return c.whole("POST")
	}
	if resp, body := chunks(fits); resp.StatusCode != 200 {
		t.Errorf("chunks at the limit: %d %s", resp.StatusCode, body)
	}
	resp, body = chunks(fits + " ")
	checkRefusal(t, resp, body, "request_too_large", "")

	// One that never ends is answered, too.
	c := h.dial()
	c.send("POST /v1/chat/completions HTTP/1.1\nHost: h\nAuthorization: Bearer " + h.key + "\nTransfer-Encoding: chunked\n\n")
	c.send(fmt.Sprintf("%x\n%s", 1<<20, strings.Repeat(" ", limit+1)))
	resp, body = c.whole("POST")
	checkRefusal(t, resp, body, "request_too_large", "")
}

func TestHead(t *testing.T) {
	t.Parallel()
	h := build(t, plan{})
	c := h.dial()
	for range 2 { // on one connection: a body would be taken for the next answer
		for path, status := range map[string]int{"/healthz": 200, "/v1/models": 200, "/v1/models/demo": 200, "/v1/models/none": 404, "/nowhere": 404} {
			c.send("HEAD " + path + " HTTP/1.1\nHost: h\nAuthorization: Bearer " + h.key + "\n\n")
			resp, body := c.whole("HEAD")
			if resp.StatusCode != status || body != "" || resp.ContentLength <= 0 {
				t.Errorf("%s: status %d, %d bytes announced, body %q", path, resp.StatusCode, resp.ContentLength, body)
			}
		}
	}
}

func TestCORS(t *testing.T) {
	t.Parallel()
	const page = "https://app.example.com"
	for _, test := range []struct {
		name          string
		origins       []string
		origin, allow string
	}{
		{"listed", []string{"https://other.example.com", page}, page, page},
		{"not listed", []string{"https://other.example.com"}, page, ""},
		{"all", []string{"*"}, page, "*"},
		{"all, among others", []string{"https://other.example.com", "*"}, page, "*"},
		{"off", nil, page, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := build(t, plan{empty: true, edge: edge.Config{CORSOrigins: test.origins}})
			resp, body := h.do("OPTIONS", "/v1/chat/completions", "", "", "Origin: "+test.origin,
				"Access-Control-Request-Method: POST", "Access-Control-Request-Headers: authorization,content-type,x-stainless-os")
			if got := resp.Header.Get("Access-Control-Allow-Origin"); got != test.allow {
				t.Errorf("preflight allows %q, want %q", got, test.allow)
			}
			switch {
			case test.origins == nil:
				checkRefusal(t, resp, body, "method_not_allowed", "")
			case resp.StatusCode != 204 || test.allow != "" && resp.Header.Get("Access-Control-Allow-Headers") != "authorization,content-type,x-stainless-os":
				t.Errorf("preflight: %d %v", resp.StatusCode, resp.Header)
			}
			// A page has to be able to read refusals, and their request id.
			resp, body = h.do("POST", "/v1/chat/completions", "", "{}", "Origin: "+test.origin)
			checkRefusal(t, resp, body, "key_malformed", "")
			if got := resp.Header.Get("Access-Control-Allow-Origin"); got != test.allow {
				t.Errorf("a refusal allows %q, want %q", got, test.allow)
			}
			if exposed := resp.Header.Get("Access-Control-Expose-Headers"); test.origins != nil && !strings.Contains(exposed, "X-Request-Id") {
				t.Errorf("exposed are %q", exposed)
			}
		})
	}
}

func TestModels(t *testing.T) {
	t.Parallel()
	const odd = "qwen/qwen2.5:32b+it %41 é"
	m := demo.DefaultModel()
	m.ID = odd
	h := build(t, plan{models: []schemas.Model{demo.DefaultModel(), m}})
	for _, path := range []string{
		"qwen%2Fqwen2.5:32b+it%20%2541%20%C3%A9", "qwen/qwen2.5:32b+it%20%2541%20%C3%A9",
		"qwen%2Fqwen2.5%3A32b%2Bit%20%2541%20%C3%A9", "qwen%2fqwen2.5:32b%2bit%20%2541%20%c3%a9?x=y",
	} {
		resp, body := h.do("GET", "/v1/models/"+path, h.key, "")
		var got struct {
			ID, Object, OwnedBy string
			Created             int64
			Capabilities        map[string]bool
			ContextWindow       int `json:"context_window"`
		}
		if err := json.Unmarshal([]byte(body), &got); err != nil || resp.StatusCode != 200 || got.ID != odd || got.Object != "model" || got.ContextWindow != 32768 || len(got.Capabilities) != 5 {
			t.Errorf("%s: %d %s", path, resp.StatusCode, body)
		}
	}
	for path, want := range map[string]refusal{
		"qwen":       {404, "model_not_found"},
		"demo/":      {404, "model_not_found"},
		"DEMO":       {404, "model_not_found"},
		"":           {400, "invalid_value"},
		"%zz":        {400, "invalid_value"},
		"a/../demo":  {404, "model_not_found"},
		"%2e%2e/x":   {404, "model_not_found"},
		"..%2fchat":  {404, "model_not_found"},
		"demo%00":    {404, "model_not_found"},
		"demo%0d%0a": {404, "model_not_found"},
	} {
		if got := h.code("GET", "/v1/models/"+path, h.key, ""); got != want {
			t.Errorf("/v1/models/%s: %+v, want %+v", path, got, want)
		}
	}
	_, list := h.do("GET", "/v1/models", h.key, "")
	want := `{"object":"list","data":[{"id":"demo","object":"model","created":1767225600,"owned_by":"ownllm",` +
		`"capabilities":{"completion":true,"vision":true,"embedding":false,"tools":true,"thinking":true},` +
		`"context_window":32768,"size_mb":1,"runtime_profile":`
	if !strings.HasPrefix(list, want) {
		t.Errorf("list is\n%s\nwant\n%s…", list, want)
	}
	_, scoped := h.newKey(books.NewKey{Scopes: []string{"model:other"}})
	if resp, body := h.do("GET", "/v1/models", scoped, ""); resp.StatusCode != 200 || body != `{"object":"list","data":[]}` {
		t.Errorf("list without a model: %s %s", resp.Status, body)
	}
	_, _, stranger := h.newTenant("other")
	resp, body := h.do("GET", "/v1/models", stranger, "")
	checkRefusal(t, resp, body, "agent_offline", "")
}

func TestBaseDomain(t *testing.T) {
	t.Parallel()
	h := build(t, plan{edge: edge.Config{BaseDomain: "Ownllm.test"}})
	_, _, stranger := h.newTenant("other")
	ask := func(key, host string, headers ...string) string {
		c := h.dial()
		c.send("GET /v1/models HTTP/1.1\nHost: " + host + "\nConnection: close\nAuthorization: Bearer " + key + "\n" + strings.Join(headers, "") + "\n")
		_, body := c.whole("GET")
		return codeIn(body)
	}
	for _, test := range []struct{ key, host, want string }{
		{h.key, "local.ownllm.test", ""},
		{h.key, "LOCAL.OwnLLM.test:9191", ""},
		{h.key, "local.ownllm.test.", ""},
		{h.key, "ownllm.test", ""},
		{h.key, "127.0.0.1:9191", ""},
		{h.key, "[::1]:9191", ""},
		{h.key, "localownllm.test", ""},
		{h.key, "other.ownllm.test", "key_invalid"},
		{h.key, "x.local.ownllm.test", "key_invalid"},
		{h.key, "nobody.ownllm.test", "key_invalid"},
		{stranger, "local.ownllm.test", "key_invalid"},
		{stranger, "other.ownllm.test", "agent_offline"},
	} {
		if got := ask(test.key, test.host); got != test.want {
			t.Errorf("host %s: %q, want %q", test.host, got, test.want)
		}
	}
	// Only a trusted proxy may say what the host was.
	if got := ask(stranger, "local.ownllm.test", "X-Forwarded-Host: other.ownllm.test\n"); got != "key_invalid" {
		t.Errorf("a client chose its host: %q", got)
	}
	// The check before the body looks at the host, too.
	c := h.dial()
	c.send("POST /v1/chat/completions HTTP/1.1\nHost: other.ownllm.test\nAuthorization: Bearer " + h.key + "\nContent-Length: 9000\n\n")
	if resp, body := c.whole("POST"); codeIn(body) != "key_invalid" {
		t.Errorf("before the body: %d %s", resp.StatusCode, body)
	}
}

func TestForwardedHostOfATrustedProxy(t *testing.T) {
	t.Parallel()
	h := build(t, plan{edge: edge.Config{BaseDomain: "ownllm.test", TrustedProxies: prefixes("127.0.0.0/8")}})
	if got := h.code("GET", "/v1/models", h.key, "", "X-Forwarded-Host: other.ownllm.test"); got.code != "key_invalid" {
		t.Errorf("got %+v", got)
	}
	if got := h.code("GET", "/v1/models", h.key, "", "X-Forwarded-Host: local.ownllm.test, inner"); got.code != "" {
		t.Errorf("got %+v", got)
	}
}

func TestReadiness(t *testing.T) {
	t.Parallel()
	h := build(t, plan{})
	is := func(status int, want string) func() bool {
		return func() bool {
			resp, body := h.do("GET", "/readyz", "", "")
			return resp.StatusCode == status && (resp.Header.Get("Retry-After") != "") == (status == 503) && strings.TrimSpace(body) == want && resp.Header.Get("Content-Type") == "application/json"
		}
	}
	const fine = `{"ready":true,"postgres":"ok","nats":"ok","draining":false}`
	until(t, "ready", is(200, fine))
	if resp, body := h.do("GET", "/healthz", "", ""); resp.StatusCode != 200 || body != `{"status":"ok"}` {
		t.Errorf("healthz: %d %s", resp.StatusCode, body)
	}
	h.database.Cut()
	until(t, "postgres to be down", is(503, `{"ready":false,"postgres":"down","nats":"ok","draining":false}`))
	h.database.Restore()
	until(t, "ready again", is(200, fine))
	h.bus.Restart(func() {
		until(t, "nats to be down", is(503, `{"ready":false,"postgres":"ok","nats":"down","draining":false}`))
		// An edge that is cut off itself blames nobody else.
		for _, request := range []struct{ method, path, body string }{
			{"POST", "/v1/chat/completions", ask("")}, {"POST", "/v1/chat/completions", ask(`"stream":true`)},
		} {
			resp, body := h.do(request.method, request.path, h.key, request.body)
			checkRefusal(t, resp, body, "internal_error", "")
			if resp.Header.Get("Retry-After") == "" {
				t.Error("no Retry-After")
			}
		}
	})
	until(t, "ready once more", is(200, fine))
	until(t, "an answer", func() bool {
		resp, _ := h.do("POST", "/v1/chat/completions", h.key, ask(""))
		return resp.StatusCode == 200
	})

	// Known keys go on for a second without Postgres, all others are refused.
	_, fresh := h.newKey(books.NewKey{})
	h.database.Cut()
	resp, body := h.do("GET", "/v1/models", fresh, "")
	checkRefusal(t, resp, body, "internal_error", "")
	if resp.Header.Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}
	h.database.Restore()
	until(t, "the key to be good", func() bool {
		resp, _ := h.do("GET", "/v1/models", fresh, "")
		return resp.StatusCode == 200
	})
}

// HTTP/1.0 has no chunks. Proxies speak it unless they are told otherwise.
func TestHTTP10(t *testing.T) {
	t.Parallel()
	h := build(t, plan{})
	for _, keep := range []string{"", "Connection: keep-alive\n"} {
		c := h.dial()
		body := ask(`"stream":true,"demo":{"numbered":true,"tokens":5,"tokens_per_second":20}`)
		c.send("POST /v1/chat/completions HTTP/1.0\n" + keep + "Authorization: Bearer " + h.key + fmt.Sprintf("\nContent-Length: %d\n\n", len(body)) + body)
		head := ""
		for !strings.HasSuffix(head, "\r\n\r\n") {
			line, err := c.r.ReadString('\n')
			if err != nil {
				t.Fatalf("after %q: %v", head, err)
			}
			head += line
		}
		for _, want := range []string{"HTTP/1.1 200 OK\r\n", "\r\nContent-Type: text/event-stream\r\n", "\r\nX-Request-Id: req_", "\r\nConnection: close\r\n"} {
			if !strings.Contains(head, want) {
				t.Errorf("head %q lacks %q", head, want)
			}
		}
		if strings.Contains(head, "Transfer-Encoding") || strings.Contains(head, "Content-Length") {
			t.Errorf("head %q frames the body", head)
		}
		if line, err := c.r.ReadString('\n'); err != nil || !strings.HasPrefix(line, `data: {"id":`) {
			t.Fatalf("first line %q, error %v", line, err)
		}
		rest, err := io.ReadAll(c.r)
		if err != nil || !strings.HasSuffix(string(rest), "\n\ndata: [DONE]\n\n") {
			t.Errorf("stream %q, error %v", rest, err)
		}
	}
	c := h.dial()
	c.send("POST /v1/chat/completions HTTP/1.0\nAuthorization: Bearer " + h.key + fmt.Sprintf("\nContent-Length: %d\n\n", len(ask(""))) + ask(""))
	resp, body := c.whole("POST")
	if resp.StatusCode != 200 || !strings.Contains(body, `"finish_reason":"stop"`) {
		t.Errorf("whole reply: %d %s", resp.StatusCode, body)
	}
	until(t, "nothing to be active", func() bool { return h.disp.Active() == 0 })
}
