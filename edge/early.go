package edge

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"github.com/gofiber/fiber/v2"
	"github.com/valyala/fasthttp"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/schemas"
)

// The server reads the first kilobytes of a body before it calls a handler, so a
// client that waits with its body would wait for its refusal, too. A request that will
// be refused whatever its body says is therefore treated as one that asks before it
// sends its body ("Expect: 100-continue"), and is told no.

// headerRefused marks such a request. What a client sends under this name is removed.
const headerRefused = "Ownllm-Refused"

// onHeaders looks at a request whose headers have come, and maybe nothing else.
func (e *Edge) onHeaders(h *fasthttp.RequestHeader) fasthttp.RequestConfig {
	h.Del(headerRefused)
	if h.ContentLength() > 0 && h.IsHTTP11() && e.hopeless(h) {
		h.Set(headerRefused, "yes")
		h.Set(fiber.HeaderExpect, "100-continue")
	}
	return fasthttp.RequestConfig{ReadTimeout: readTimeout}
}

// onExpect answers a request that asks before it sends its body.
func (e *Edge) onExpect(ctx *fasthttp.RequestCtx) int {
	if len(ctx.Request.Header.Peek(headerRefused)) == 0 {
		return fasthttp.StatusContinue
	}
	e.app.Server().Handler(ctx)
	return ctx.Response.StatusCode()
}

// hopeless reports whether a chat request will be refused for its key or its size. It
// can't know the client's address. So keys are looked up here only while all addresses
// together make no more bad requests than one may make; else the handler finds out.
func (e *Edge) hopeless(h *fasthttp.RequestHeader) bool {
	if !h.IsPost() || string(h.RequestURI()) != chatPath {
		return false
	}
	if h.ContentLength() > e.cfg.BodyLimit {
		return true
	}
	key, err := apikey.Parse(string(h.Peek(fiber.HeaderAuthorization)))
	if err != nil {
		return true
	}
	if e.cfg.BaseDomain != "" && len(h.Peek(fiber.HeaderXForwardedHost)) > 0 {
		return false // whether that counts depends on the address
	}
	slug := e.slug(string(h.Host()))
	if _, ok := e.Keys.Cached(key, slug); ok {
		return false
	}
	if e.failures.exhausted(anybody, time.Now()) {
		return false
	}
	_, err = e.Keys.Authenticate(context.Background(), key, slug)
	var refusal *schemas.Error
	return errors.As(err, &refusal) && refusal.Code != schemas.CodeInternalError
}

// anybody stands for all addresses together.
var anybody netip.Addr
