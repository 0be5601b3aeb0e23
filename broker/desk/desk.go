// Package desk is what every front door of OwnLLM shares: it turns what an authenticated
// client sends into a request that can be dispatched, says which models the client may
// see, and ends a reply.
//
// Over HTTP and over NATS the same body gets the same checks in the same order, so the
// same error, and the same request comes of it.
package desk

import (
	"context"
	"strconv"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/chat"
	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/broker/metric"
	"github.com/ownllm/ownllm/broker/presence"
	"github.com/ownllm/ownllm/schemas"
)

// Desk is safe for concurrent use.
type Desk struct {
	agents *presence.Table
	feed   *presence.Feed
}

// New returns a desk that knows the models of the table, which the feed fills.
func New(agents *presence.Table, feed *presence.Feed) *Desk { return &Desk{agents, feed} }

// Call is what a client sends.
type Call struct {
	ID       schemas.RequestID
	Received time.Time
	// Body is the OpenAI request.
	Body string
	// Wait is for how long the client waits for a model that isn't in memory: "30s", a
	// number of seconds, or empty for the usual time. WaitHeader is where it said so.
	Wait, WaitHeader string
}

// Chat makes every check of a chat completion that comes before the choice of an agent, in
// the order of the contract, and returns the request and the model that it asks for. Its
// error is a *schemas.Error. The Model of the request is set as soon as it is known, with an
// error, too.
func (d *Desk) Chat(id books.Identity, call Call) (dispatch.Request, schemas.Model, error) {
	var r dispatch.Request
	req, err := chat.Parse(call.Body)
	if err != nil {
		return r, schemas.Model{}, err
	}
	r.Model = req.Model
	model, err := d.Model(id, req.Model)
	if err != nil {
		return r, schemas.Model{}, err
	}
	if err := req.CheckModel(model); err != nil {
		return r, schemas.Model{}, err
	}
	wait, err := loadWait(call.WaitHeader, call.Wait)
	if err != nil {
		return r, schemas.Model{}, err
	}
	return dispatch.Request{
		LoadWait: wait,
		ID:       call.ID, Tenant: id.Tenant, Key: id.Key, Operation: schemas.OperationChat,
		Model: req.Model, Body: call.Body, Stream: req.Stream, IncludeUsage: req.IncludeUsage,
		Continuable: req.Continuable(),
		Prompt:      req.PromptBound(), Limit: req.ReplyLimit(), Most: req.MostTokens(model),
		Received: call.Received,
	}, model, nil
}

// maxLoadWait bounds for how long a client may wait for a model; the deadline of the whole
// request does, too.
const maxLoadWait = time.Hour

func loadWait(header, value string) (*time.Duration, error) {
	if value == "" {
		return nil, nil
	}
	wait, err := time.ParseDuration(value)
	if seconds, bare := strconv.Atoi(value); bare == nil {
		wait, err = time.Duration(min(max(seconds, -1), int(2*maxLoadWait/time.Second)))*time.Second, nil
	}
	if err != nil || wait < 0 || wait > maxLoadWait {
		return nil, schemas.Errorf(schemas.CodeInvalidValue,
			"The header %s has to be a time like 30s, or a number of seconds, from 0 to %d.", header, int(maxLoadWait/time.Second)).WithParam(header)
	}
	return &wait, nil
}

// Models returns what the tenant's agents have, cut down to the scopes of the key. Its
// error is a *schemas.Error: nobody can be asked.
func (d *Desk) Models(id books.Identity) ([]schemas.ModelEntry, error) {
	models, reachable := d.agents.Models(id.Tenant)
	if !reachable {
		return nil, d.unreachable(id.Tenant, "")
	}
	list := []schemas.ModelEntry{}
	for _, m := range models {
		if id.Allows(m.ID) {
			list = append(list, m.Entry())
		}
	}
	return list, nil
}

// Reachable returns a model that the key may see, and an error also if no agent of the
// tenant can be asked.
func (d *Desk) Reachable(id books.Identity, name string) (schemas.ModelEntry, error) {
	m, err := d.Model(id, name)
	if err != nil {
		return schemas.ModelEntry{}, err
	}
	if _, reachable := d.agents.Models(id.Tenant); !reachable {
		return schemas.ModelEntry{}, d.unreachable(id.Tenant, name)
	}
	return m.Entry(), nil
}

// Model returns a model that the key may see. A key that isn't scoped for a model hears
// the same whether the model exists or not.
func (d *Desk) Model(id books.Identity, name string) (schemas.Model, error) {
	if !id.Allows(name) {
		return schemas.Model{}, schemas.Errorf(schemas.CodeScopeRequired,
			"Your key isn't scoped for the model %q. Ask for a key with the scope model:%s, or use another model.", name, name).WithParam("model")
	}
	m, ok := d.agents.Find(id.Tenant, name)
	if ok {
		return m, nil
	}
	// Nobody can be said not to exist by a process that has heard nobody yet.
	if !d.feed.Ready() {
		return schemas.Model{}, d.unreachable(id.Tenant, name)
	}
	return schemas.Model{}, presence.NotFound(name)
}

// LearnWait is the advice to clients of a process that has to find its feet.
const LearnWait = 2 * time.Second

// unreachable says why no agent can be asked: because all are away, or because this
// process itself is cut off.
func (d *Desk) unreachable(tenant schemas.TenantID, model string) error {
	if !d.feed.Connected() {
		return schemas.Errorf(schemas.CodeInternalError,
			"This server has lost its message bus and can't reach any GPU machine. Try again in a few seconds.").WithRetryAfter(LearnWait)
	}
	if !d.feed.Ready() {
		return schemas.Errorf(schemas.CodeInternalError,
			"This server has just started and doesn't know the GPU machines yet. Try again in a few seconds.").WithRetryAfter(LearnWait)
	}
	return d.agents.Away(tenant, model)
}

// ErrShuttingDown ends the replies that a drain doesn't wait for.
var ErrShuttingDown = schemas.Errorf(schemas.CodeInternalError,
	"This server is shutting down. Send the request again.").WithRetryAfter(time.Second)

// settleWait is how long a client waits for the end of its reply until the books have
// what it costs, if its key has little left: it may begin the next request at once, and
// what the last one held has to be free by then, wherever that goes.
const settleWait = time.Second

// Settle ends the request, and waits for a while until the books have it, if that matters.
func Settle(reply *dispatch.Reply) {
	reply.Close()
	if !reply.Scarce() {
		return
	}
	select {
	case <-reply.Settled():
		return
	default:
	}
	timer := time.NewTimer(settleWait)
	defer timer.Stop()
	select {
	case <-reply.Settled():
	case <-timer.C:
	}
}

// Record records how a reply went that has ended with the code, and returns what it burnt.
func Record(ctx context.Context, series *metric.Series, reply *dispatch.Reply, code schemas.Code, stream bool) schemas.Usage {
	timing, usage := reply.Timing(), reply.Usage()
	record := metric.Reply{Code: code, Duration: time.Since(timing.Received), Usage: usage}
	if stream && !timing.FirstChunk.IsZero() {
		record.FirstToken = timing.FirstChunk.Sub(timing.Received)
		series.FirstToken(ctx, record.FirstToken)
	}
	series.Replied(ctx, record)
	return usage
}
