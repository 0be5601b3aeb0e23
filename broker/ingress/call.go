package ingress

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	oteltrace "go.opentelemetry.io/otel/trace"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/broker/metric"
	"github.com/ownllm/ownllm/broker/trace"
	"github.com/ownllm/ownllm/schemas"
)

// call is one request of a publisher.
type call struct {
	in        *Ingress
	id        schemas.RequestID
	operation string
	key       schemas.KeyID // as the subject says
	inbox     string        // empty: nobody wants an answer
	header    nats.Header
	body      []byte
	received  time.Time
	identity  books.Identity // once it is known
	// reply and reconnects, how often the connection was lost before, are set before the call
	// is among those that run.
	reply      *dispatch.Reply
	reconnects uint64
	inside     bool // it isn't on its way to admission any more; belongs to the call's goroutine

	// mu guards what follows, and keeps messages in the order of their numbers.
	mu   sync.Mutex
	seq  uint64 // of the last message
	over bool   // that was the end
	buf  []byte
	// asked is when the publisher was last asked whether it is there, and unanswered when it
	// was for the first time since it last said so. talks says that it ever did.
	asked, unanswered time.Time
	talks             bool
}

// take is the callback of all operations.
func (in *Ingress) take(name, subject, reply string, header nats.Header, body []byte) {
	key, _, err := schemas.ParseInSubject(subject)
	if err != nil || !schemas.PublisherAnswersTo(subject, reply) {
		in.drop(subject, reply)
		if err != nil || reply != "" || name != schemas.OperationSubmit {
			return
		}
		// Its publisher has said how it will ask for the result.
	}
	c := &call{
		in: in, id: schemas.NewRequestID(), operation: name, key: key, inbox: reply, header: header, body: body, received: time.Now(),
	}
	if refusal := in.enter(c); refusal != nil {
		c.finish(refusal)
		return
	}
	go in.serve(c)
}

// takeOther is the callback of all that is asked of any operation.
func (in *Ingress) takeOther(m *nats.Msg) {
	_, name, err := schemas.ParseInSubject(m.Subject)
	if operations[name] != nil && err == nil {
		return // it has a callback of its own
	}
	if !schemas.PublisherAnswersTo(m.Subject, m.Reply) {
		in.drop(m.Subject, m.Reply)
		return
	}
	c := &call{in: in, id: schemas.NewRequestID(), inbox: m.Reply}
	c.finish(schemas.Errorf(schemas.CodeNotFound, "There is no operation %q. Use one of %s.", name, strings.Join(slices.Sorted(maps.Keys(operations)), ", ")))
}

// drop counts a message that can't be answered. But for a submission, nothing comes of it.
func (in *Ingress) drop(subject, reply string) {
	reason := metric.DropForeignReply
	if reply == "" {
		reason = metric.DropNoReply
	}
	in.Metrics.Dropped(context.Background(), reason)
	in.noisy.Do(func() { in.Log.Warn("request of a publisher can't be answered", "subject", subject, "reason", reason) })
}

// enter lets a call in, or says why not.
func (in *Ingress) enter(c *call) *schemas.Error {
	in.mu.Lock()
	defer in.mu.Unlock()
	switch {
	case in.closed:
		return schemas.Errorf(schemas.CodeInternalError, "This server is shutting down. Send the request again.").WithRetryAfter(time.Second)
	case in.entering[c.key] >= maxEntering:
		return schemas.Errorf(schemas.CodeConcurrencyLimit, "Your key has %d requests that wait to be let in. Send fewer at once.", maxEntering)
	}
	in.calls.Add(1)
	in.entering[c.key]++
	in.tallies[c.operation].Active++
	return nil
}

// letIn notes that a call isn't on its way to admission any more.
func (in *Ingress) letIn(c *call) {
	if c.inside {
		return
	}
	c.inside = true
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.entering[c.key]--; in.entering[c.key] == 0 {
		delete(in.entering, c.key)
	}
}

// leave notes the end of a call.
func (in *Ingress) leave(c *call, failed bool) {
	in.letIn(c)
	in.mu.Lock()
	t := in.tallies[c.operation]
	t.Active--
	if failed {
		t.Errors++
	}
	in.mu.Unlock()
	in.calls.Done()
}

// serve answers a call.
func (in *Ingress) serve(c *call) {
	ctx, span := in.Tracer.Take(trace.Extract(context.Background(), c.header), c.operation)
	in.Metrics.RequestStarted(ctx)
	err := in.answer(ctx, span, c)
	code := outcome(err)
	if err == dispatch.ErrClientGone { //nolint:errorlint // this very one
		err = nil
	}
	if err != nil {
		known := schemas.AsError(err)
		if code == schemas.CodeInternalError {
			in.Log.ErrorContext(ctx, "request failed", "request", c.id, "tenant", c.identity.Tenant, "key", c.identity.Key, "error", err)
		}
		c.finish(known)
	}
	in.Metrics.RequestEnded(ctx, c.operation, code)
	trace.End(span, err)
	in.leave(c, err != nil)
}

// outcome is the code that is counted for a call which ended with the error.
func outcome(err error) schemas.Code {
	switch {
	case err == nil:
		return metric.CodeOK
	case err == dispatch.ErrClientGone, err == errCancelled: //nolint:errorlint // these very ones
		return metric.CodeClientGone
	}
	return schemas.AsError(err).Code
}

// answer finds out who calls, and does what is asked.
func (in *Ingress) answer(ctx context.Context, span oteltrace.Span, c *call) (err error) {
	defer func() {
		if what := recover(); what != nil {
			in.Log.ErrorContext(ctx, "panic", "request", c.id, "tenant", c.identity.Tenant, "key", c.identity.Key,
				"error", what, "stack", string(debug.Stack()))
			err = errors.New("panic")
		}
	}()
	if limit := in.cfg.BodyLimit; limit > 0 && len(c.body) > limit {
		return schemas.Errorf(schemas.CodeRequestTooLarge, "The request is larger than the %d bytes that this server takes.", limit)
	}
	id, err := in.identify(ctx, c)
	if err != nil {
		return err
	}
	c.identity = id
	if span.IsRecording() {
		span.SetAttributes(trace.AttrRequest.String(string(c.id)), trace.AttrTenant.String(string(id.Tenant)), trace.AttrKey.String(string(id.Key)))
	}
	return operations[c.operation](in, ctx, c, id)
}

func (in *Ingress) identify(ctx context.Context, c *call) (books.Identity, error) {
	if c.operation == schemas.OperationWhoami {
		if hash, err := apikey.ParseFingerprint(string(c.key)); err == nil {
			return in.Keys.Recognize(ctx, hash, "")
		}
	}
	return in.Keys.Identify(ctx, c.key)
}

// models answers with what the tenant's agents have, cut down to the scopes of the key.
func (in *Ingress) models(_ context.Context, c *call, id books.Identity) error {
	list, err := in.Desk.Models(id)
	if err != nil {
		return err
	}
	return c.tell(schemas.ModelsAnswer{Kind: schemas.KindModels, Object: "list", Data: list})
}

// whoami answers with what is known of the key.
func (in *Ingress) whoami(_ context.Context, c *call, id books.Identity) error {
	who := schemas.Whoami{
		Kind: schemas.KindWhoami, Key: id.Key, Name: id.Name, Prefix: id.Prefix, Tenant: id.Tenant, Slug: id.Slug, User: id.User,
		Scopes: id.Scopes, BudgetCents: id.BudgetCents, Concurrency: id.Concurrency, QPS: id.QPS,
	}
	if id.ExpiresAt != nil {
		who.Expires = id.ExpiresAt.Unix()
	}
	return c.tell(who)
}

// tell sends an answer that is complete in itself.
func (c *call) tell(answer any) error {
	b, err := json.Marshal(answer)
	if err != nil {
		return err
	}
	return c.publish(b)
}

// publish sends the encoded form of such an answer.
func (c *call) publish(b []byte) error {
	if c.inbox == "" {
		return nil
	}
	if err := c.in.Conn.Publish(c.inbox, b); err != nil && !bus.Down(err) {
		return err
	}
	return nil
}

// finish ends the call with an error.
func (c *call) finish(err *schemas.Error) {
	if err := c.send(schemas.ErrorAnswer(0, c.id, err), ""); err != nil && !bus.Down(err) {
		c.in.Log.Warn("error not sent", "request", c.id, "error", err)
	}
}

// send numbers and sends a message of the reply, as a request if progress says where to
// answer. After the end nothing more is sent.
func (c *call) send(a *schemas.Answer, progress string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.over || c.inbox == "" {
		return nil
	}
	a.Seq = c.seq + 1
	c.buf = a.Append(c.buf[:0])
	var err error
	if progress == "" {
		err = c.in.Conn.Publish(c.inbox, c.buf)
	} else {
		err = c.in.Conn.PublishRequest(c.inbox, progress, c.buf)
	}
	if err != nil {
		return err
	}
	c.seq, c.over = a.Seq, a.Kind.Terminal()
	return nil
}

// option is a header of the request, whatever the case of its name.
func (c *call) option(name string) string {
	for header, values := range c.header {
		if strings.EqualFold(header, name) && len(values) > 0 {
			return values[0]
		}
	}
	return ""
}
