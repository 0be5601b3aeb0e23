// Package dispatch is the owner's side of a request: it picks an agent, puts the job
// into the queue, grants the claim of the worker that takes it, and takes in the
// frames of the reply.
//
// The owner of a request is the process that accepted it, and it alone decides what
// counts. Safety comes from three checks made on every frame: its subject ends in the
// nonce of the current attempt (128 random bits, made anew for each), its run is the
// one whose claim was granted, and its number follows the last. Whatever JetStream
// delivers twice, delivers late or brings back after a restart fails one of them, so
// each token of a reply is taken exactly once. Liveness comes from the sweep: every
// request has deadlines, and the end of an agent's run ends its attempts.
//
// Answers go only into the inbox of the agent that the frame's subject names, which the
// bus has checked; it doesn't check reply subjects.
//
// Frames of all requests arrive through one subscription, whose callback only checks
// and appends; everything that waits or talks to JetStream happens in the goroutine
// that reads the Reply.
package dispatch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/metric"
	"github.com/ownllm/ownllm/broker/presence"
	"github.com/ownllm/ownllm/broker/quota"
	"github.com/ownllm/ownllm/broker/trace"
	"github.com/ownllm/ownllm/schemas"
)

// Config holds the deadlines and bounds of a Dispatcher.
type Config struct {
	// ColdWait is how long a request waits for a model that has to be loaded first.
	ColdWait time.Duration
	// FirstToken bounds the time from the claim to the first chunk of a stream.
	FirstToken time.Duration
	// Idle bounds the time between two chunks of a stream.
	Idle time.Duration
	// Total bounds the whole request, its wait in the queue included.
	Total time.Duration
	// KeepAlive is after how much silence a reader gets a Tick. The first one comes
	// after FirstTick.
	FirstTick, KeepAlive time.Duration
	// MaxUnread is how many bytes of a reply may wait for a reader that is too slow,
	// before its reply is ended.
	MaxUnread int
}

// DefaultConfig returns the documented deadlines.
func DefaultConfig() Config {
	return Config{
		ColdWait:   5 * time.Second,
		FirstToken: 120 * time.Second,
		Idle:       60 * time.Second,
		Total:      10 * time.Minute,
		FirstTick:  20 * time.Second,
		KeepAlive:  10 * time.Second,
		MaxUnread:  4 << 20,
	}
}

// Request is a validated request that is to be run.
type Request struct {
	ID     schemas.RequestID
	Tenant schemas.TenantID
	Key    schemas.KeyID
	// Operation is the API operation, "chat".
	Operation string
	// Model is what the client asked for.
	Model string
	// Body is the client's body, byte for byte.
	Body         string
	Stream       bool
	IncludeUsage bool
	// Continuable says that a stream which breaks off may be gone on with from its text.
	Continuable bool
	// Prompt is the most tokens that the prompt can have, Limit how many the client allows
	// the reply, 0 if it doesn't say, and Most how many it can have because of the model's
	// context window, 0 if that isn't known.
	Prompt, Limit, Most int64
	// LoadWait is how long the request waits for a model that isn't in memory; nil stands
	// for Config.ColdWait.
	LoadWait *time.Duration
	// Once says that the request ends when an agent that has begun it goes away, rather than
	// go to another: whoever asks counts how often that happens.
	Once bool
	// Received is when the request came in; the deadlines count from it.
	Received time.Time
}

// Dispatcher owns requests. It is safe for concurrent use.
type Dispatcher struct {
	owner   schemas.OwnerID
	tokens  *nats.Conn
	bulk    *nats.Conn
	queue   *bus.Queue
	agents  *presence.Table
	feed    *presence.Feed
	gate    *quota.Gate
	cfg     Config
	holdFor time.Duration
	metrics *metric.Instruments
	tracer  *trace.Tracer
	log     *slog.Logger

	mu      sync.RWMutex
	ends    uint64                   // counts the ends of agents' runs
	replies map[schemas.Nonce]*Reply // by the nonce of the current attempt
}

// Parts are what a Dispatcher works with.
type Parts struct {
	// Tokens carries frames and control, Bulk large bodies, so that they never delay a
	// token.
	Tokens, Bulk *nats.Conn
	// Queue is where jobs are put.
	Queue  *bus.Queue
	Agents *presence.Table
	Feed   *presence.Feed
	// Gate admits and settles. Its owner id is that of the dispatcher.
	Gate *quota.Gate
	// Metrics and Tracer may be nil.
	Metrics *metric.Instruments
	Tracer  *trace.Tracer
	Log     *slog.Logger
}

// New returns a dispatcher that owns requests under the owner id of the gate. It has to
// be made before the table gets its first heartbeat.
func New(p Parts, cfg Config) *Dispatcher {
	d := &Dispatcher{
		owner: p.Gate.Owner(), gate: p.Gate, tokens: p.Tokens, bulk: p.Bulk, queue: p.Queue,
		agents: p.Agents, feed: p.Feed, cfg: cfg, holdFor: holdFor, metrics: p.Metrics, tracer: p.Tracer, log: p.Log,
		replies: make(map[schemas.Nonce]*Reply),
	}
	p.Agents.OnGone(d.gone)
	return d
}

// Owner is the id under which this dispatcher owns requests.
func (d *Dispatcher) Owner() schemas.OwnerID { return d.owner }

// sweepEvery is how exact deadlines are.
const sweepEvery = 100 * time.Millisecond

// frameBacklog bounds the frames that wait for the callback, in bytes. It is far
// above what the callback, which never waits, lets pile up.
const frameBacklog = 256 << 20

// Run takes in frames until ctx ends.
func (d *Dispatcher) Run(ctx context.Context) error {
	frames, err := d.tokens.Subscribe(schemas.OutWildcard(d.owner), d.frame)
	if err != nil {
		return fmt.Errorf("listen to frames: %w", err)
	}
	defer frames.Unsubscribe()
	if err := frames.SetPendingLimits(-1, frameBacklog); err != nil {
		return fmt.Errorf("listen to frames: %w", err)
	}
	bodies, err := d.bulk.Subscribe(schemas.BodyWildcard(d.owner), d.body)
	if err != nil {
		return fmt.Errorf("listen to body requests: %w", err)
	}
	defer bodies.Unsubscribe()
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			for _, r := range d.live() {
				r.sweep(now)
			}
		}
	}
}

// live returns the replies that have an attempt under way.
func (d *Dispatcher) live() []*Reply {
	d.mu.RLock()
	defer d.mu.RUnlock()
	list := make([]*Reply, 0, len(d.replies))
	for _, r := range d.replies {
		list = append(list, r)
	}
	return list
}

// InterruptAll ends all replies with an error.
func (d *Dispatcher) InterruptAll(err *schemas.Error) {
	for _, r := range d.live() {
		r.Interrupt(err)
	}
}

// Active counts the requests that have an attempt under way.
func (d *Dispatcher) Active() int {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return len(d.replies)
}

func (d *Dispatcher) reply(n schemas.Nonce) *Reply {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.replies[n]
}

// frame is the callback of all frames.
func (d *Dispatcher) frame(m *nats.Msg) {
	if m.Reply != "" && !schemas.AnswersTo(m.Subject, m.Reply) {
		d.log.Warn("frame with a foreign reply subject dropped", "subject", m.Subject)
		return
	}
	nonce := schemas.Nonce(schemas.LastToken(m.Subject))
	r := d.reply(nonce)
	if r == nil {
		d.answer(m.Reply, schemas.Verdict{Reason: schemas.ReasonFinished})
		return
	}
	f, err := schemas.DecodeFrame(m.Data)
	if err != nil {
		d.log.Warn("frame dropped", "request", r.req.ID, "error", err)
		return
	}
	if v, ok := r.take(m.Subject, m.Reply, &f, time.Now()); ok {
		d.answer(m.Reply, v)
	}
}

func (d *Dispatcher) answer(inbox string, v schemas.Verdict) {
	if inbox == "" {
		return
	}
	if err := d.tokens.Publish(inbox, v.Encode()); err != nil && !bus.Down(err) {
		d.log.Warn("verdict not sent", "error", err)
	}
}

// body serves a piece of a body that was too large for its job.
func (d *Dispatcher) body(m *nats.Msg) {
	if !schemas.AnswersTo(m.Subject, m.Reply) {
		d.log.Warn("body request with a foreign reply subject dropped", "subject", m.Subject)
		return
	}
	r := d.reply(schemas.Nonce(schemas.LastToken(m.Subject)))
	var piece string
	if offset, err := schemas.DecodeBodyRequest(m.Data); err == nil && r != nil && r.lends(m.Subject) && offset < len(r.req.Body) {
		piece = r.req.Body[offset:min(offset+schemas.BodyPiece, len(r.req.Body))]
	}
	// An empty piece says that there is nothing: the attempt is over.
	if err := m.Respond([]byte(piece)); err != nil && !bus.Down(err) {
		d.log.Warn("body not sent", "error", err)
	}
}

// gone ends the attempts that an agent can't finish any more.
func (d *Dispatcher) gone(g presence.Gone) {
	d.mu.Lock()
	d.ends++
	d.mu.Unlock()
	for _, r := range d.live() {
		r.agentGone(g)
	}
}

func (d *Dispatcher) endsSoFar() uint64 {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.ends
}

// cancel tells a worker that an attempt is over. If the word gets lost, the answer to
// the worker's next progress frame says the same within a second.
func (d *Dispatcher) cancel(agent schemas.AgentID, nonce schemas.Nonce) {
	d.control(agent, schemas.Control{Operation: schemas.ControlCancel, Nonce: nonce, Reason: schemas.ReasonCancelled})
}

func (d *Dispatcher) control(agent schemas.AgentID, c schemas.Control) {
	if err := d.tokens.Publish(schemas.ControlSubject(agent), c.Encode()); err != nil && !bus.Down(err) {
		d.log.Warn("control not sent", "agent", agent, "operation", c.Operation, "error", err)
	}
}

func (d *Dispatcher) forget(n schemas.Nonce) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.replies, n)
}

// errBusDown is what a client gets while this process itself is cut off.
func errBusDown() *schemas.Error {
	return schemas.Errorf(schemas.CodeInternalError,
		"This server has lost its message bus and can't reach any GPU machine. Try again in a few seconds.").WithRetryAfter(2 * time.Second)
}

// Start admits the request and puts it into the queue of an agent. The error is a
// *schemas.Error for the client; the cause of an internal one is logged. The rate tells
// where the key stands, as far as the books were asked. The caller has to Close the
// reply, and its context has to last until then.
func (d *Dispatcher) Start(ctx context.Context, req Request) (*Reply, quota.Rate, error) {
	r := &Reply{d: d, ctx: ctx, req: req, wake: make(chan struct{}, 1), heard: req.Received}
	r.bill.settled = make(chan struct{})
	if err := r.attempt(nil); err != nil {
		r.Close()
		return nil, r.bill.grant.Rate, err
	}
	return r, r.bill.grant.Rate, nil
}

// attempt starts the next attempt of the request on the best agent that isn't in
// exclude. An agent whose queue is full is passed over for another.
func (r *Reply) attempt(exclude map[schemas.AgentID]bool) error {
	d := r.d
	if !d.feed.Await(r.ctx, bus.ReturnWait) {
		return errBusDown()
	}
	var full *schemas.Error
	for {
		ends := d.endsSoFar()
		choice, err := d.agents.Route(r.req.Tenant, r.req.Model, exclude)
		if err != nil {
			if full != nil {
				return full
			}
			return err
		}
		if r.from != nil && r.from.Text != "" && !choice.Model.Continues {
			d.agents.Release(r.req.Tenant, choice.Agent, r.req.Model)
			exclude = with(exclude, choice.Agent)
			continue
		}
		outlook, ahead := r.outlook(choice)
		if ahead {
			var refused error
			if refused, err = r.ahead(choice, ends, outlook); refused != nil {
				return refused
			}
		} else {
			if err := r.assign(choice.Agent); err != nil {
				d.agents.Release(r.req.Tenant, choice.Agent, r.req.Model)
				return err
			}
			err = r.publish(choice, ends, nil)
		}
		switch {
		case err == nil:
			return nil
		case errors.Is(err, errChooseAgain):
		case errors.Is(err, bus.ErrQueueFull):
			full = schemas.Errorf(schemas.CodeQueueFull,
				"The queue for %q is full. Try again in a few seconds.", r.req.Model).WithRetryAfter(2 * time.Second)
			exclude = with(exclude, choice.Agent)
		default:
			d.log.ErrorContext(r.ctx, "job not published", "request", r.req.ID, "agent", choice.Agent, "error", err)
			if bus.Down(err) {
				return errBusDown()
			}
			return schemas.AsError(err)
		}
	}
}

// with returns the set and one agent more.
func with(set map[schemas.AgentID]bool, one schemas.AgentID) map[schemas.AgentID]bool {
	next := map[schemas.AgentID]bool{one: true}
	maps.Copy(next, set)
	return next
}

// errChooseAgain says that the agent may have gone since it was chosen.
var errChooseAgain = errors.New("an agent has gone meanwhile")

// publish puts the next attempt into the queue of the agent that was chosen. ends is
// what endsSoFar said before the choice. outlook is what is expected of the books, if they
// are still being asked.
func (r *Reply) publish(choice presence.Choice, ends uint64, outlook *quota.Outlook) error {
	d := r.d
	now := time.Now()
	nonce := schemas.NewNonce()
	a := &attempt{
		agent: choice.Agent, incarnation: choice.Incarnation, nonce: nonce,
		subject: schemas.OutSubject(choice.Agent, d.owner, nonce), published: now, next: 1,
		series: d.metrics.Series(r.req.Operation, choice.Model.Backend, r.req.Model),
	}
	a.series.Queued(r.ctx)
	job := schemas.Job{
		Version: choice.Protocol, Request: r.req.ID, Attempt: r.attempts + 1,
		Nonce: a.nonce, Owner: d.owner, Tenant: r.req.Tenant, Key: r.req.Key,
		Operation: r.req.Operation, Model: r.req.Model,
		Deadline: r.req.Received.Add(d.cfg.Total).UnixMilli(), ColdWait: d.cfg.ColdWait.Milliseconds(),
		Stream: r.req.Stream, IncludeUsage: r.req.IncludeUsage,
		Completion: r.req.ID.CompletionID(), Created: r.req.Received.Unix(), ReplyModel: r.req.Model,
		Continue: r.from,
	}
	if r.req.LoadWait != nil {
		job.ColdWait = r.req.LoadWait.Milliseconds()
	}
	if !r.inline() {
		job.BodySize = len(r.req.Body)
		a.body = schemas.BodySubject(a.agent, d.owner, a.nonce)
	}
	r.attempts++
	r.mu.Lock()
	r.cur, r.lost = a, false
	if a.held = outlook != nil && !r.bill.let; a.held {
		job.Hold, job.CountLate = true, outlook.Budget
	} else {
		job.Limit, job.More = r.bill.limit, r.bill.more
		if g := &r.bill.grant; g.Rate.HasBudget {
			job.Count, job.CountLate = g.Scarce, !g.Scarce
		}
	}
	r.mu.Unlock()
	// Known before it is published: the claim can be faster than JetStream's answer.
	d.mu.Lock()
	d.replies[a.nonce] = r
	changed := d.ends != ends
	d.mu.Unlock()
	if changed {
		// The word of an end that came between the choice and here has missed this attempt.
		r.retire(a)
		return errChooseAgain
	}
	ctx, span := d.tracer.Send(r.ctx, &job)
	header := make(nats.Header, 4)
	trace.Inject(ctx, header)
	seq, err := d.queue.Publish(ctx, choice.Agent, &job, r.req.Body, header)
	trace.End(span, err)
	if err != nil {
		r.retire(a)
		return err
	}
	a.seq = seq
	r.mu.Lock()
	a.queued = time.Now()
	r.bill.begun = true
	r.mu.Unlock()
	return nil
}
