package edge

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/gofiber/fiber/v2"
	"github.com/valyala/fasthttp"
	oteltrace "go.opentelemetry.io/otel/trace"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/broker/metric"
	"github.com/ownllm/ownllm/broker/quota"
	"github.com/ownllm/ownllm/broker/trace"
	"github.com/ownllm/ownllm/schemas"
)

// call is what the edge knows of an HTTP request, owned by it.
type call struct {
	id       schemas.RequestID
	received time.Time
	method   string
	addr     netip.Addr
	conn     net.Conn
	// key and slug are what the client showed, and identity is whom they stand for, once
	// that is known; model is what it asks for.
	key      apikey.Key
	slug     string
	identity books.Identity
	model    string
	// rate is where the key stands, if the books were asked.
	rate quota.Rate
	// read says that the body was read to its end.
	read bool
	// streaming says that the reply outlives its handler, and is counted at its end.
	streaming bool
}

const callKey = "ownllm.call"

// begin gives every request its id.
func (e *Edge) begin(c *fiber.Ctx) error {
	in := &call{
		id: schemas.NewRequestID(), received: time.Now(), method: c.Method(),
		addr: e.clientAddr(c), conn: c.Context().Conn(),
	}
	c.Locals(callKey, in)
	c.Set("X-Request-Id", string(in.id))
	if e.draining.Load() {
		c.Context().SetConnectionClose()
	}
	e.Metrics.RequestStarted(c.UserContext())
	err := c.Next()
	if err == nil {
		e.tellLimits(c, in)
	}
	if err == nil && !in.streaming {
		e.Metrics.RequestEnded(c.UserContext(), operation(c), metric.CodeOK)
	}
	return err
}

func callOf(c *fiber.Ctx) *call {
	in, ok := c.Locals(callKey).(*call)
	if !ok { // the request failed before any handler saw it
		return &call{received: time.Now(), addr: peer(c.Context()), conn: c.Context().Conn()}
	}
	return in
}

// peer is the address at the other end of the connection.
func peer(ctx *fasthttp.RequestCtx) netip.Addr {
	addr, _ := netip.AddrFromSlice(ctx.RemoteIP())
	return addr.Unmap()
}

// clientAddr is the address of the client: the peer's, or, if that is a trusted
// proxy, the last one in X-Forwarded-For that isn't. Earlier ones are whatever the
// client wrote, be it in the same header or in one before it.
func (e *Edge) clientAddr(c *fiber.Ctx) netip.Addr {
	peer := peer(c.Context())
	if !e.trusted(peer) {
		return peer
	}
	headers := c.Request().Header.PeekAll(fiber.HeaderXForwardedFor)
	for i := len(headers) - 1; i >= 0; i-- {
		hops := strings.Split(string(headers[i]), ",")
		for j := len(hops) - 1; j >= 0; j-- {
			addr, ok := hop(strings.TrimSpace(hops[j]))
			if !ok {
				return peer
			}
			if !e.trusted(addr) {
				return addr
			}
		}
	}
	return peer
}

// hop reads an address of X-Forwarded-For. Some proxies add the port.
func hop(s string) (netip.Addr, bool) {
	addr, err := netip.ParseAddr(s)
	if err != nil {
		withPort, err := netip.ParseAddrPort(s)
		if err != nil {
			return netip.Addr{}, false
		}
		addr = withPort.Addr()
	}
	return addr.Unmap(), true
}

func (e *Edge) trusted(a netip.Addr) bool {
	for _, p := range e.cfg.TrustedProxies {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// authenticate checks the key of a request. An address that has made too many bad
// requests may go on only with keys that are known to be good, so that guessing costs
// nothing but the guesser's time.
func (e *Edge) authenticate(ctx context.Context, c *fiber.Ctx, in *call) (err error) {
	if in.key, err = apikey.Parse(c.Get(fiber.HeaderAuthorization)); err != nil {
		return err
	}
	in.slug = e.slug(e.host(c))
	if e.failures.exhausted(in.addr, in.received) {
		var ok bool
		if in.identity, ok = e.Keys.Cached(in.key, in.slug); !ok {
			return errTooManyFailures()
		}
		return nil
	}
	in.identity, err = e.Keys.Authenticate(ctx, in.key, in.slug)
	return err
}

// host is the name by which the client called this server.
func (e *Edge) host(c *fiber.Ctx) string {
	if name := c.Get(fiber.HeaderXForwardedHost); name != "" && e.trusted(peer(c.Context())) {
		name, _, _ = strings.Cut(name, ",")
		return strings.TrimSpace(name)
	}
	return string(c.Request().Host())
}

// slug is the tenant that a host name stands for, or empty if it stands for none.
func (e *Edge) slug(host string) string {
	if e.cfg.BaseDomain == "" {
		return ""
	}
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.TrimSuffix(strings.ToLower(host), ".")
	slug, ok := strings.CutSuffix(host, "."+strings.ToLower(e.cfg.BaseDomain))
	if !ok {
		return ""
	}
	return slug
}

// readBody reads the body of a request into memory of its own.
func (e *Edge) readBody(c *fiber.Ctx, in *call) (string, error) {
	limit := e.cfg.BodyLimit
	length := c.Request().Header.ContentLength()
	if length > limit {
		return "", errTooLarge(limit)
	}
	if encoding := c.Get(fiber.HeaderContentEncoding); encoding != "" && !strings.EqualFold(encoding, "identity") {
		return "", schemas.Errorf(schemas.CodeInvalidJSON, "The body is encoded as %q; send it unencoded.", encoding)
	}
	if c.Get(headerRefused) != "" { // the key has become valid this very moment
		return "", schemas.Errorf(schemas.CodeInternalError, "The request was refused before it was read. Send it again.").WithRetryAfter(time.Second)
	}
	stream := c.Context().RequestBodyStream()
	if stream == nil {
		in.read = true
		return string(c.Request().Body()), nil
	}
	var body strings.Builder
	if length > 0 {
		body.Grow(min(length, trustedLength))
	}
	buf := copyBuffers.Get().(*[copyBuffer]byte) //nolint:forcetypeassert // the pool holds nothing else
	defer copyBuffers.Put(buf)
	n, err := io.CopyBuffer(&body, io.LimitReader(stream, int64(limit)+1), buf[:])
	switch {
	case n > int64(limit):
		return "", errTooLarge(limit)
	case err != nil:
		return "", schemas.Errorf(schemas.CodeInvalidJSON, "The body ended early: %d bytes of it came.", n)
	}
	in.read = true
	return body.String(), nil
}

const (
	// trustedLength is how much memory a client gets for the mere promise to fill it, in
	// bytes.
	trustedLength = 256 << 10
	copyBuffer    = 16 << 10
)

var copyBuffers = sync.Pool{New: func() any { return new([copyBuffer]byte) }}

func errTooLarge(limit int) *schemas.Error {
	return schemas.Errorf(schemas.CodeRequestTooLarge, "The body is larger than the %d bytes that this server takes.", limit)
}

// fail is the error handler of every route: it writes the envelope.
func (e *Edge) fail(c *fiber.Ctx, err error) error {
	in := callOf(c)
	known := e.translate(c, err)
	if in.id == "" {
		c.Set("X-Request-Id", string(schemas.NewRequestID()))
	}
	// A bad request uses up the address's allowance, and beyond that all bad requests
	// look the same.
	switch status := known.Status(); {
	case status == 400 || status == 401 || status == 404 || status == 405 || status == 413:
		e.failures.allow(anybody, in.received)
		if !e.failures.allow(in.addr, in.received) {
			known = errTooManyFailures()
		}
	case status == 500 && err != dispatch.ErrClientGone: //nolint:errorlint // this very one
		e.failed(c.UserContext(), in, err)
	}
	trace.End(oteltrace.SpanFromContext(c.UserContext()), known)
	if in.id != "" { // else it never began
		code := known.Code
		if err == dispatch.ErrClientGone { //nolint:errorlint // this very one
			code = metric.CodeClientGone
		}
		e.Metrics.RequestEnded(c.UserContext(), operation(c), code)
	}
	e.tellLimits(c, in)
	linger(in.conn, !in.read && (in.id == "" || c.Request().Header.ContentLength() != 0))
	writeError(c.Response(), known)
	if e.Log.Enabled(c.UserContext(), slog.LevelDebug) {
		e.Log.DebugContext(c.UserContext(), "request refused", "request", in.id, "code", known.Code, "status", known.Status())
	}
	return nil
}

// failed notes that it was our fault. Whoever has the request id finds it.
func (e *Edge) failed(ctx context.Context, in *call, err error) {
	e.Log.ErrorContext(ctx, "request failed", "request", in.id, "tenant", in.identity.Tenant, "key", in.identity.Key, "error", err)
}

func (e *Edge) translate(c *fiber.Ctx, err error) *schemas.Error {
	var known *schemas.Error
	if errors.As(err, &known) {
		return known
	}
	var f *fiber.Error
	if !errors.As(err, &f) {
		return schemas.AsError(err)
	}
	switch f.Code {
	case fiber.StatusNotFound:
		return schemas.Errorf(schemas.CodeNotFound, "There is no route %s %s.", c.Method(), c.Path())
	case fiber.StatusMethodNotAllowed:
		return schemas.Errorf(schemas.CodeMethodNotAllowed, "%s doesn't take %s.", c.Path(), c.Method())
	case fiber.StatusRequestEntityTooLarge:
		return errTooLarge(e.cfg.BodyLimit)
	case fiber.StatusRequestHeaderFieldsTooLarge:
		return schemas.Errorf(schemas.CodeRequestTooLarge, "The headers are larger than the %d bytes that this server takes.", headerLimit)
	case fiber.StatusRequestTimeout:
		return schemas.Errorf(schemas.CodeInvalidValue, "The headers of the request didn't come within %s.", e.cfg.HeaderTimeout)
	case fiber.StatusInternalServerError:
		return schemas.AsError(err)
	}
	return schemas.Errorf(schemas.CodeInvalidValue, "The request isn't valid HTTP.")
}

func errTooManyFailures() *schemas.Error {
	return schemas.Errorf(schemas.CodeTooManyFailures,
		"Too many bad requests came from your address. Correct the key or the request, and try again in a few seconds.").WithRetryAfter(2 * time.Second)
}

// writeError writes status, headers and envelope of an error.
func writeError(resp *fasthttp.Response, err *schemas.Error) {
	resp.SetStatusCode(err.Status())
	resp.Header.SetContentType(fiber.MIMEApplicationJSON)
	if s := err.RetryAfterSeconds(); s > 0 {
		resp.Header.Set(fiber.HeaderRetryAfter, strconv.Itoa(s))
	}
	if !err.Retryable() {
		resp.Header.Set("X-Should-Retry", "false")
	}
	resp.SetBody(append(err.AppendJSON(nil), '\n'))
}

// refuseMethod answers a request with a method that no route can have.
func (e *Edge) refuseMethod(ctx *fasthttp.RequestCtx) {
	err := schemas.Errorf(schemas.CodeMethodNotAllowed, "This server doesn't know the method that you used.")
	if !e.failures.allow(peer(ctx), time.Now()) {
		err = errTooManyFailures()
	}
	linger(ctx.Conn(), ctx.Request.Header.ContentLength() != 0)
	ctx.Response.Header.Set("X-Request-Id", string(schemas.NewRequestID()))
	ctx.Response.Header.Set(fiber.HeaderAllow, "GET, HEAD, POST, OPTIONS")
	writeError(&ctx.Response, err)
}

// operation names what a request does, in metrics.
func operation(c *fiber.Ctx) string {
	switch path := c.Path(); {
	case path == chatPath:
		return schemas.OperationChat
	case strings.HasPrefix(path, "/v1/models"):
		return "models"
	case strings.HasPrefix(path, "/api/v1/"):
		return "admin"
	}
	return "other"
}
