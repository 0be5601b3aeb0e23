// Package ingress is the NATS front door: it answers the publishers, who hold an API key and
// ask over the bus for what others ask over HTTP.
//
// A publisher sends a request to ownllm.v1.in.<key>.<operation>, where <key> is the id of its
// API key: the bus has checked the key, and lets nobody publish under another's id. So the
// subject, and nothing else, says who asks. Answers go into the inbox of that key only, since
// the bus doesn't check reply subjects: see schemas.PublisherAnswersTo. Checks, admission and
// errors are those of HTTP, by the same code (package desk).
//
// # What it promises
//
// A reply is a sequence of messages, numbered from 1 without gaps, and one done or error
// message ends it. Whatever gets lost on the way shows as a gap or as a missing end; so a
// publisher never takes a part for the whole. If the broker's own connection was lost
// meanwhile, the reply ends with an error.
//
// A publisher that is gone costs no tokens for long. Core NATS doesn't tell a sender that
// nobody listens, but for requests. So once a second, and once before the first chunk, a
// progress message of each reply goes out as a request: if nobody is subscribed, the server
// says so at once, and the reply is ended. A publisher may answer them; one that has done so
// once and then falls silent is taken for gone, too, however alive its connection is.
//
// Requests wait in no subscription: each has a goroutine, which the door lets in only if its
// key hasn't too many on their way to admission already. So no key delays another.
package ingress

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/micro"
	"golang.org/x/time/rate"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/desk"
	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/broker/metric"
	"github.com/ownllm/ownllm/broker/trace"
	"github.com/ownllm/ownllm/schemas"
)

// Config says how the ingress faces publishers. The zero Config is ready to use.
type Config struct {
	// BodyLimit bounds a request, in bytes; 0: what the bus lets through.
	BodyLimit int
	// Drain bounds how long running replies may take to finish once the ingress stops.
	Drain time.Duration
	// Beat is how often a publisher is asked whether it is there; 0: once a second.
	Beat time.Duration
	// Silence is how long one that has answered before may leave that unanswered; 0: 10 s.
	Silence time.Duration
	// Version is that of the build, as the service tells it.
	Version string
}

// Keys knows whom a key stands for, and whether it is valid now.
type Keys interface {
	Identify(ctx context.Context, key schemas.KeyID) (books.Identity, error)
	Recognize(ctx context.Context, hash apikey.Hash, slug string) (books.Identity, error)
	GuardID(id books.Identity, end func(*schemas.Error)) (release func())
}

// Parts are what the ingress works with.
type Parts struct {
	// Conn is a connection to the account of the publishers that nobody else uses.
	Conn       *nats.Conn
	Keys       Keys
	Desk       *desk.Desk
	Dispatcher *dispatch.Dispatcher
	// Submissions are what publishers leave behind.
	Submissions Submissions
	// Metrics and Tracer may be nil.
	Metrics *metric.Instruments
	Tracer  *trace.Tracer
	Log     *slog.Logger
}

// Ingress answers publishers.
type Ingress struct {
	Parts
	cfg   Config
	noisy rate.Sometimes // messages that are dropped
	// open ends when the door is shut: who waits for something to happen doesn't any more.
	open context.Context //nolint:containedctx // the life of the door
	shut context.CancelFunc
	// opened is closed once publishers reach the door.
	opened chan struct{}

	mu       sync.Mutex
	closed   bool
	calls    sync.WaitGroup // Add only with mu held and closed false
	running  map[schemas.RequestID]*call
	entering map[schemas.KeyID]int // calls on their way to admission
	tallies  map[string]*tally     // by operation
}

// tally is what the service's statistics say of an operation, beside what micro counts.
type tally struct {
	Active int `json:"active"`
	Errors int `json:"errors"`
}

// operation answers a call. Its error ends the call; it is a *schemas.Error, or the
// publisher learns nothing of it.
type operation func(in *Ingress, ctx context.Context, c *call, id books.Identity) error

// operations are what publishers can ask for.
var operations = map[string]operation{
	schemas.OperationChat:   (*Ingress).chat,
	schemas.OperationModels: (*Ingress).models,
	schemas.OperationWhoami: (*Ingress).whoami,
	schemas.OperationCancel: (*Ingress).cancel,
	schemas.OperationSubmit: (*Ingress).submit,
	schemas.OperationResult: (*Ingress).result,
}

const (
	// serviceName and serviceVersion are how the service introduces itself; the version is
	// that of the protocol.
	serviceName    = "ownllm"
	serviceVersion = "1.0.0"

	// otherQueue shares out what is asked of operations that don't exist. The server would
	// take a queue of the same name for the same queue, whatever the subjects.
	otherQueue = "ownllm-other"

	defaultBeat    = time.Second
	defaultSilence = 10 * time.Second
	// lookEvery is how exact the two are.
	lookEvery = 100 * time.Millisecond

	// backlog bounds the requests that wait for the callback of an endpoint, in bytes. It
	// never waits, so there are few.
	backlog = 64 << 20
	// maxEntering is how many requests of one key may be on their way to admission.
	maxEntering = 256

	dropEvery = time.Second
	flushWait = time.Second
	// interruptEvery is how often replies are looked for that the drain doesn't wait for: one
	// may be between two attempts.
	interruptEvery = 100 * time.Millisecond
)

// New returns an ingress that doesn't listen yet.
func New(cfg Config, parts Parts) *Ingress {
	if cfg.Beat <= 0 {
		cfg.Beat = defaultBeat
	}
	if cfg.Silence <= 0 {
		cfg.Silence = defaultSilence
	}
	in := &Ingress{
		Parts: parts, cfg: cfg, noisy: rate.Sometimes{Interval: dropEvery},
		opened:  make(chan struct{}),
		running: make(map[schemas.RequestID]*call), entering: make(map[schemas.KeyID]int), tallies: make(map[string]*tally),
	}
	in.open, in.shut = context.WithCancel(context.Background())
	for name := range operations {
		in.tallies[name] = new(tally)
	}
	return in
}

// Opened is closed once publishers reach the ingress, by which time it runs.
func (in *Ingress) Opened() <-chan struct{} { return in.opened }

// Run answers publishers until ctx ends, then drains: it takes no new requests, lets running
// replies finish within cfg.Drain, ends the others with an error that says so, and returns.
func (in *Ingress) Run(ctx context.Context) error {
	for subject, take := range map[string]nats.MsgHandler{
		// The server says who isn't there only to the connection that asked.
		schemas.ProgressWildcard(in.Dispatcher.Owner()): in.heard,
		schemas.PeerCancelWildcard:                      in.peerCancel,
	} {
		sub, err := in.Conn.Subscribe(subject, take)
		if err != nil {
			return fmt.Errorf("listen to publishers: %w", err)
		}
		defer sub.Unsubscribe()
	}
	looking, stopLooking := context.WithCancel(context.WithoutCancel(ctx))
	looked := make(chan struct{})
	go func() {
		defer close(looked)
		in.look(looking)
	}()
	defer func() {
		stopLooking()
		<-looked
	}()
	service, other, err := in.listen()
	if err != nil {
		return err
	}
	_ = in.Conn.FlushTimeout(flushWait) // else it hears of it once the connection is back
	close(in.opened)
	<-ctx.Done()
	in.close(service, other)
	in.drain(ctx)
	return nil
}

// listen opens the door.
func (in *Ingress) listen() (micro.Service, *nats.Subscription, error) {
	service, err := micro.AddService(in.Conn, micro.Config{
		Name: serviceName, Version: serviceVersion, Description: "Chat completions by the GPU machines of a tenant.",
		Metadata:     map[string]string{"build": in.cfg.Version, "owner": string(in.Dispatcher.Owner())},
		StatsHandler: func(e *micro.Endpoint) any { return in.stats(e.Name) },
	})
	if err != nil {
		return nil, nil, fmt.Errorf("listen to publishers: %w", err)
	}
	for name := range operations {
		err := service.AddEndpoint(name, micro.HandlerFunc(func(r micro.Request) {
			in.take(name, r.Subject(), r.Reply(), nats.Header(r.Headers()), r.Data())
		}), micro.WithEndpointSubject(schemas.InWildcard(name)), micro.WithEndpointPendingLimits(-1, backlog))
		if err != nil {
			_ = service.Stop()
			return nil, nil, fmt.Errorf("listen to publishers: %w", err)
		}
	}
	other, err := in.Conn.QueueSubscribe(schemas.InAny, otherQueue, in.takeOther)
	if err != nil {
		_ = service.Stop()
		return nil, nil, fmt.Errorf("listen to publishers: %w", err)
	}
	return service, other, nil
}

// close shuts the door, behind the last who is in it.
func (in *Ingress) close(service micro.Service, other *nats.Subscription) {
	if err := service.Stop(); err != nil {
		in.Log.Warn("service not stopped", "error", err)
	}
	_ = other.Drain()
	// What the server has sent before it heard of that is here once it answers, and has been
	// taken once the barrier is passed.
	if in.Conn.FlushTimeout(flushWait) == nil {
		taken := make(chan struct{})
		if in.Conn.Barrier(func() { close(taken) }) == nil {
			select {
			case <-taken:
			case <-time.After(flushWait):
			}
		}
	}
	in.mu.Lock()
	in.closed = true
	in.mu.Unlock()
	in.shut()
}

// drain waits for the running calls.
func (in *Ingress) drain(ctx context.Context) {
	done := make(chan struct{})
	go func() {
		in.calls.Wait()
		close(done)
	}()
	timer := time.NewTimer(in.cfg.Drain)
	defer timer.Stop()
	for warned := false; ; {
		select {
		case <-done:
			_ = in.Conn.FlushTimeout(flushWait) // their last words
			return
		case <-timer.C:
			list := in.live()
			if len(list) > 0 && !warned {
				warned = true
				in.Log.WarnContext(ctx, "drain time is over, replies are ended", "active", len(list))
			}
			for _, c := range list {
				c.reply.Interrupt(desk.ErrShuttingDown)
			}
			timer.Reset(interruptEvery)
		}
	}
}

// look sees to the running replies until ctx ends.
func (in *Ingress) look(ctx context.Context) {
	tick := time.NewTicker(min(lookEvery, in.cfg.Beat))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			for _, c := range in.live() {
				c.beat(now)
			}
		}
	}
}

// live returns the calls that have a reply under way.
func (in *Ingress) live() []*call {
	in.mu.Lock()
	defer in.mu.Unlock()
	list := make([]*call, 0, len(in.running))
	for _, c := range in.running {
		list = append(list, c)
	}
	return list
}

// find returns the call that runs under an id, if it is of the key.
func (in *Ingress) find(key schemas.KeyID, id schemas.RequestID) *call {
	in.mu.Lock()
	defer in.mu.Unlock()
	if c := in.running[id]; c != nil && c.key == key {
		return c
	}
	return nil
}

func (in *Ingress) stats(name string) tally {
	in.mu.Lock()
	defer in.mu.Unlock()
	return *in.tallies[name]
}
