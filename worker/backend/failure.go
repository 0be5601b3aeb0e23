package backend

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/tidwall/gjson"

	"github.com/ownllm/ownllm/schemas"
)

const (
	// maxMessage bounds what is passed on of a server's own message, in bytes.
	maxMessage = 300
	// maxWait bounds the advice to wait that is passed on from a server.
	maxWait = time.Minute
	// busyWait and loadWait are the advice where the server gives none.
	busyWait = 2 * time.Second
	loadWait = 3 * time.Second
)

// complaint is what a server says in an error, in whichever form it says it.
type complaint struct {
	status  int // HTTP status, or the code in the error if that is one; 0: unknown
	message string
	lower   string // message in lower case
	kind    string // "type"
	code    string
	param   string
	prompt  int // tokens of the prompt, if the server counted them
	window  int // tokens of the context window
	retry   time.Duration
}

// readComplaint understands OpenAI's envelope and what servers make of it: numbers
// for codes (llama.cpp, vLLM), a bare string (Ollama), a flat object (old vLLM),
// FastAPI's detail, plain text.
func readComplaint(status int, raw []byte) complaint {
	c := complaint{status: status}
	if !gjson.ValidBytes(raw) {
		c.say(string(raw))
		return c
	}
	e := gjson.ParseBytes(raw)
	for inner := e.Get("error"); inner.Exists(); inner = e.Get("error") {
		e = inner
	}
	if e.Type == gjson.String {
		c.say(e.String())
		return c
	}
	c.say(e.Get("message").String())
	c.kind, c.code, c.param = e.Get("type").String(), e.Get("code").String(), e.Get("param").String()
	c.prompt, c.window = int(e.Get("n_prompt_tokens").Int()), int(e.Get("n_ctx").Int())
	if detail := e.Get("detail"); c.message == "" && detail.Exists() {
		if detail.IsArray() {
			detail = detail.Get("0")
			var path []string
			for _, part := range detail.Get("loc").Array() {
				if part.String() != "body" {
					path = append(path, part.String())
				}
			}
			c.param = strings.Join(path, ".")
			detail = detail.Get("msg")
		}
		c.say(detail.String())
	}
	if n, err := strconv.Atoi(c.code); err == nil && n >= 400 && n <= 599 && status == 0 {
		c.status = n
	}
	if c.param == "" {
		// llama.cpp names it in its message.
		if rest, ok := strings.CutPrefix(c.message, "Field '"); ok {
			c.param, _, _ = strings.Cut(rest, "'")
		}
	}
	if !fieldName(c.param) {
		c.param = ""
	}
	return c
}

// say keeps a message: one line, bounded, valid UTF-8.
func (c *complaint) say(s string) {
	s = strings.Join(strings.Fields(strings.ToValidUTF8(s, "")), " ")
	if len(s) > maxMessage {
		cut := maxMessage
		for !utf8.RuneStart(s[cut]) {
			cut--
		}
		s = s[:cut] + "…"
	}
	c.message, c.lower = s, strings.ToLower(s)
}

func (c *complaint) says(parts ...string) bool {
	for _, p := range parts {
		if strings.Contains(c.lower, p) {
			return true
		}
	}
	return false
}

// fieldName reports whether a param names a field, and isn't a piece of somebody's
// text.
func fieldName(s string) bool {
	if len(s) > 64 {
		return false
	}
	for _, r := range s {
		if !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("_.-[]", r)) {
			return false
		}
	}
	return true
}

// overflow reports whether the server says that the request is too long for it.
func (c *complaint) overflow() bool {
	return c.kind == "exceed_context_size_error" || c.code == "context_length_exceeded" ||
		c.says("maximum context length", "context length", "available context size", "context size has been exceeded",
			"exceed context window", "exceeds the context", "exceeds context", "context the overflows",
			"longer than the maximum model length", "prompt is too long", "input is too long", "prompt too long")
}

// loading reports whether the server says that it isn't ready yet.
func (c *complaint) loading() bool {
	switch c.status {
	case 0, http.StatusServiceUnavailable, http.StatusTooManyRequests:
		return c.says("loading model", "is loading", "still loading", "being loaded") && !c.says("error loading", "fail")
	}
	return c.says("model is not loaded", "model is loading")
}

// causes are the ways in which a server itself breaks that are worth telling. Their
// text is ours: what a server says when it breaks may quote a prompt or a reply.
var causes = []struct{ sign, text string }{
	{"requires more system memory", "the model needs more memory than the machine has free"},
	{"out of memory", "it ran out of memory"},
	{"failed to allocate", "it ran out of memory"},
	{"runner process has terminated", "the process that ran the model died"},
	{"runner terminated", "the process that ran the model died"},
	{"llama-server process", "the process that ran the model died"},
	{"cuda error", "the GPU reported an error"},
	{"rocm error", "the GPU reported an error"},
	{"enginedead", "its engine died"},
	{"enginecore", "its engine died"},
	{"engine loop", "its engine died"},
	{"unable to load model", "it can't load the model"},
	{"error loading model", "it can't load the model"},
	{"failed to load model", "it can't load the model"},
}

// cause returns the known cause that a complaint names, or "".
func (c *complaint) cause() string {
	for _, k := range causes {
		if strings.Contains(c.lower, k.sign) {
			return k.text
		}
	}
	return ""
}

// broken is the error of a server that failed by its own fault.
func (k Kind) broken(format string, args ...any) *schemas.Error {
	return schemas.Errorf(schemas.CodeBackendError, "The "+k.Label()+" backend "+format, args...)
}

// refusal turns an error answer to a chat completion for the model into the error
// for the client.
func (k Kind) refusal(model string, c complaint) *schemas.Error {
	switch {
	case c.overflow():
		return tooLong(model, &c)
	case c.says("tool choice requires", "enable-auto-tool-choice", "does not support tools", "tools param requires",
		"tool use is not supported", "does not support tool"):
		return schemas.Errorf(schemas.CodeModelDoesNotSupportTools,
			"The model %q can't call tools. Choose one whose capabilities.tools is true, or leave out tools.", model).WithParam("tools")
	case c.says("image input is not supported", "not a multimodal model", "at most 0 image", "does not support image",
		"does not support vision", "doesn't support image", "does not support multimodal"):
		return schemas.Errorf(schemas.CodeModelDoesNotSupportVision,
			"The model %q can't see images. Choose one whose capabilities.vision is true.", model).WithParam("messages")
	case c.status < 500 && c.says("model") && c.says("not found", "does not exist", "doesn't exist"):
		return gone(model)
	case c.loading():
		return schemas.Errorf(schemas.CodeModelLoading, "The model %q is loading. Try again in a few seconds.", model).WithRetryAfter(c.wait(loadWait))
	}
	switch c.status {
	case http.StatusBadRequest, http.StatusUnprocessableEntity:
		if c.message == "" {
			c.message = "it gave no reason"
		}
		return &schemas.Error{
			Code:    schemas.CodeInvalidValue,
			Message: "The " + k.Label() + " backend refused the request: " + c.message,
			Param:   c.param,
		}
	case http.StatusRequestEntityTooLarge:
		return schemas.Errorf(schemas.CodeRequestTooLarge, "The request is larger than the %s backend takes.", k.Label())
	case http.StatusUnauthorized, http.StatusForbidden:
		return k.broken("refused the agent's own key (status %d). Give the agent the right one as OWNLLM_BACKEND_KEY.", c.status)
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		return k.broken("is too busy (status %d). Try again in a few seconds.", c.status).WithRetryAfter(c.wait(busyWait))
	}
	why := c.cause()
	switch {
	case why != "" && c.status != 0:
		return k.broken("failed with status %d: %s.", c.status, why)
	case why != "":
		return k.broken("failed: %s.", why)
	case c.status != 0:
		return k.broken("failed with status %d. Its own log on the agent's machine says why.", c.status)
	}
	return k.broken("failed. Its own log on the agent's machine says why.")
}

// gone is the error of a model that the server no longer has.
func gone(model string) *schemas.Error {
	return schemas.Errorf(schemas.CodeModelNotFound, "The agent doesn't have the model %q any more.", model).WithParam("model")
}

// tooLong is the error of a request that doesn't fit the window.
func tooLong(model string, c *complaint) *schemas.Error {
	param := "messages"
	if c.param == "max_tokens" || c.param == "max_completion_tokens" {
		param = c.param
	}
	switch {
	case c.prompt > 0 && c.window > 0:
		return exceeded(model, c.prompt, c.window)
	case c.says("maximum context length", "tokens"):
		// vLLM and its kin explain it well, in numbers only.
		return schemas.Errorf(schemas.CodeContextLengthExceeded, "The request doesn't fit the context window of %q: %s", model, c.message).WithParam(param)
	}
	return schemas.Errorf(schemas.CodeContextLengthExceeded,
		"The request doesn't fit the context window of %q. Shorten the messages, or choose a model with a larger window.", model).WithParam(param)
}

func exceeded(model string, tokens, window int) *schemas.Error {
	return schemas.Errorf(schemas.CodeContextLengthExceeded,
		"The prompt has %d tokens, and the context window of %q is %d. Shorten the messages, or choose a model with a larger window.",
		tokens, model, window).WithParam("messages")
}

// wait is the advice to wait: the server's, within reason, else d.
func (c *complaint) wait(d time.Duration) time.Duration {
	if c.retry > 0 {
		return min(c.retry, maxWait)
	}
	return d
}

// retryAfter reads the header of that name.
func retryAfter(h http.Header) time.Duration {
	if n, err := strconv.Atoi(h.Get("Retry-After")); err == nil && n > 0 {
		return time.Duration(n) * time.Second
	}
	return 0
}

// unreachable turns an error of the connection, before any answer, into the error
// for the client. The server's address stays out of it.
func (k Kind) unreachable(err error) *schemas.Error {
	var dns *net.DNSError
	var timeout net.Error
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return k.broken("isn't answering: nothing listens at its address. Is it running?")
	case errors.As(err, &dns):
		return k.broken("can't be found: its host name doesn't resolve.")
	case errors.As(err, &timeout) && timeout.Timeout():
		return k.broken("isn't answering: the connection timed out.")
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return k.broken("closed the connection without an answer.")
	}
	return k.broken("can't be reached, or doesn't answer in HTTP.")
}

// interrupted turns an error in the middle of a reply into the error for the client.
func (k Kind) interrupted(model string, err error) *schemas.Error {
	var failure *backendFailure
	switch {
	case errors.As(err, &failure):
		return k.refusal(model, readComplaint(0, envelope(failure.raw)))
	case errors.Is(err, errNotJSON), errors.Is(err, errNotReply):
		return k.broken("can't be understood: %v.", err)
	case errors.Is(err, errNotContinued):
		return k.broken("can't continue the reply: %v.", err)
	case errors.Is(err, errTooLong):
		return k.broken("sent more than %d MiB at once.", maxEvent>>20)
	}
	return k.broken("broke off the reply: the connection was lost.")
}

// envelope makes raw, the value of an "error", an object that readComplaint takes.
func envelope(raw []byte) []byte {
	raw = bytes.TrimSpace(raw)
	if !json.Valid(raw) {
		raw = schemas.AppendString(nil, string(raw))
	}
	return append(append([]byte(`{"error":`), raw...), '}')
}
