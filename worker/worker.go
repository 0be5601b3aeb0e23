// Package worker is the agent on the GPU machine. It dials out to the bus, offers the
// models of its inference backends, takes jobs from its queues, runs them, and sends
// the replies back token by token.
//
// A worker decides nothing about a request: it claims a job from the owner and stops
// when the owner says so. It keeps what it has sent until the owner has taken it, so
// a lost connection costs time and no tokens.
//
// What a request has burnt whose owner dies, it reports to the brokers, who have kept the
// money for it.
//
// The goroutines: one for heartbeats on the bus, heartbeats beside it, inventory, progress and
// reports each, one for each model
// that pulls jobs, and one for each job at hand. Run waits for all of them.
package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"golang.org/x/sync/errgroup"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/metric"
	"github.com/ownllm/ownllm/broker/trace"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/backend"
)

// Config says who the worker is and what it serves.
type Config struct {
	Tenant schemas.TenantID
	Agent  schemas.AgentID
	// Incarnation is that of this run of the agent; a new one is made if it is empty.
	Incarnation schemas.Incarnation
	// Host is the name of the machine, for people.
	Host string
	// Software is the version of this build.
	Software string
	// Backends are the inference servers, in order of preference: of two that have
	// the same model, the first one serves it. One that isn't there yet is waited for.
	Backends []backend.Config
	// Drain bounds how long running jobs may take to finish once the worker stops.
	Drain time.Duration
	// Aside is told of the worker while it has no link to the bus; it may be nil.
	Aside Aside
	// GiveUp is for how long the worker has to be turned away before it ends; 0 stands for
	// DefaultGiveUp.
	GiveUp time.Duration
	// Metrics and Tracer record what the worker does; both may be nil.
	Metrics *metric.Instruments
	Tracer  *trace.Tracer
}

// Worker serves the models of one machine.
type Worker struct {
	cfg         Config
	incarnation schemas.Incarnation
	tokens      *nats.Conn    // frames, control, jobs
	bulk        *bus.Sideline // large bodies, so that they never delay a token, and reports
	stock       *stock
	reports     *reports
	departed    departed
	bundles     *bundles
	log         *slog.Logger
	inbox       string         // verdicts come to inbox.<run>
	introduce   chan struct{}  // holds one token: a hello is due
	reconnected chan struct{}  // likewise: the bus is back
	refused     chan time.Time // likewise: when the bus didn't let the worker do something
	replaced    chan struct{}  // likewise: a newer run of the agent has taken over
	dismissed   chan struct{}  // likewise: the agent was removed

	mu    sync.Mutex
	state schemas.AgentState
	runs  map[schemas.Nonce]*run // the jobs at hand
	byRun map[string]*run        // the same, by the name of the run
	past  past                   // the jobs that were at hand
}

// BulkRest is for how long nothing is asked of the second connection until it is closed. It is
// long enough for a conversation with an image in it, whose every turn is a large body.
const BulkRest = time.Minute

// New returns a worker that uses the two connections: tokens all the time, bulk for large
// bodies and for reports on requests without owners. The caller closes them.
func New(tokens *nats.Conn, bulk *bus.Sideline, cfg Config, log *slog.Logger) *Worker {
	w := &Worker{
		cfg: cfg, incarnation: cfg.Incarnation, tokens: tokens, bulk: bulk,
		log: log.With("agent", cfg.Agent), inbox: tokens.NewInbox(),
		introduce:   make(chan struct{}, 1),
		reconnected: make(chan struct{}, 1),
		replaced:    make(chan struct{}, 1),
		dismissed:   make(chan struct{}, 1),
		refused:     make(chan time.Time, 1),
		state:       schemas.AgentUp,
		runs:        make(map[schemas.Nonce]*run),
		byRun:       make(map[string]*run),
		past:        past{set: make(map[schemas.Nonce]struct{})},
	}
	if w.cfg.GiveUp == 0 {
		w.cfg.GiveUp = DefaultGiveUp
	}
	w.stock = newStock(cfg.Backends, w.log)
	w.bundles = newBundles(cfg.Agent, tokens, w.log)
	w.reports = newReports(func(ctx context.Context, u *schemas.UsageReport) error {
		return bulk.Use(func(nc *nats.Conn) error { return bus.ReportUsage(ctx, nc, cfg.Tenant, cfg.Agent, u) })
	}, w.log)
	if w.incarnation == "" {
		w.incarnation = schemas.NewIncarnation()
	}
	return w
}

// The causes for which a run is cancelled.
var (
	errCancelled = errors.New("cancelled by the owner")
	errOwnerGone = errors.New("the owner of the request is gone")
	errDraining  = errors.New("the worker is shutting down")
	errLate      = errors.New("the deadline of the request has passed")
)

// Run serves until ctx ends or a newer run of the agent takes over, then drains: it takes
// nothing new, finishes what it runs within cfg.Drain, says goodbye and returns. The error
// wraps ErrRemoved if the agent is no more.
func (w *Worker) Run(ctx context.Context) error {
	// Jobs, and what they need to report, outlive ctx by the drain.
	life, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	defer stop(nil)

	verdicts, err := w.tokens.Subscribe(w.inbox+".*", w.verdict)
	if err != nil {
		return fmt.Errorf("listen to verdicts: %w", err)
	}
	defer verdicts.Unsubscribe()
	control, err := w.tokens.Subscribe(schemas.ControlSubject(w.cfg.Agent), w.control)
	if err != nil {
		return fmt.Errorf("listen to control: %w", err)
	}
	defer control.Unsubscribe()
	back := w.tokens.ReconnectHandler()
	w.tokens.SetReconnectHandler(func(nc *nats.Conn) {
		back(nc)
		signal(w.introduce)
		signal(w.reconnected)
	})
	defer w.tokens.SetReconnectHandler(back)
	failed := w.tokens.ErrorHandler()
	w.tokens.SetErrorHandler(func(nc *nats.Conn, sub *nats.Subscription, err error) {
		if !w.forbidden(err) {
			failed(nc, sub, err)
		}
	})
	defer w.tokens.SetErrorHandler(failed)

	w.stock.refresh(ctx)
	signal(w.introduce)
	background, bgCtx := errgroup.WithContext(life)
	background.Go(func() error { return w.beat(bgCtx) })
	background.Go(func() error { return w.beatAside(bgCtx) })
	background.Go(func() error { return w.pump(bgCtx) })
	background.Go(func() error { return w.bundles.run(bgCtx) })
	background.Go(func() error { return w.reports.run(bgCtx) })
	background.Go(func() error { return w.watchStock(bgCtx) })
	background.Go(func() error { return w.stock.waitLoads(bgCtx) })
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	background.Go(func() error {
		select {
		case <-w.replaced:
			end(nil)
		case <-w.dismissed:
			end(ErrRemoved)
			for _, r := range w.list() {
				r.cancel(errCancelled) // their owners have given them up long ago
			}
		case <-bgCtx.Done():
		}
		return nil
	})

	var jobs sync.WaitGroup
	pulls := w.introduceAndPull(ctx, life, &jobs)

	w.drain(stop, &jobs)
	w.say(schemas.AgentBye, nil)
	err = w.tokens.FlushTimeout(time.Second)
	if err != nil && w.tokens.IsConnected() {
		w.log.Warn("goodbye not sent", "error", err)
	}
	stop(errDraining)
	err = errors.Join(pulls, background.Wait())
	if errors.Is(context.Cause(ctx), ErrRemoved) {
		err = errors.Join(ErrRemoved, err)
	}
	w.reports.flush()
	w.stock.close()
	return err
}

// drain waits for the jobs at hand, and after the drain time ends them.
func (w *Worker) drain(stop context.CancelCauseFunc, jobs *sync.WaitGroup) {
	w.setState(schemas.AgentDraining)
	w.say(schemas.AgentDraining, nil)
	finished := make(chan struct{})
	go func() {
		jobs.Wait()
		close(finished)
	}()
	timer := time.NewTimer(w.cfg.Drain)
	defer timer.Stop()
	select {
	case <-finished:
		return
	case <-timer.C:
	}
	w.log.Warn("drain time is over, jobs are ended", "running", len(w.list()))
	for _, r := range w.list() {
		r.cancel(errDraining)
	}
	// Each sends its error and goes; the ones whose owner doesn't answer give up.
	timer.Reset(drainWords)
	select {
	case <-finished:
	case <-timer.C:
		stop(errDraining)
		<-finished
	}
}

// drainWords is how long jobs that the drain has ended may try to tell their owners.
const drainWords = 3 * time.Second

func (w *Worker) setState(s schemas.AgentState) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.state = s
}

// list returns the jobs at hand.
func (w *Worker) list() []*run {
	w.mu.Lock()
	defer w.mu.Unlock()
	list := make([]*run, 0, len(w.runs))
	for _, r := range w.runs {
		list = append(list, r)
	}
	return list
}

// adopt registers a job that was delivered. If the worker has it already, JetStream has
// delivered it again, because a server forgot what it knew of the first delivery: a run
// that is at hand goes on, and answers for the new delivery; one that has ended has
// nothing left to do but to be acknowledged.
func (w *Worker) adopt(r *run) (isNew bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if old := w.runs[r.job.Nonce]; old != nil {
		old.redelivered(r.ackSubject)
		return false
	}
	if w.past.has(r.job.Nonce) {
		w.ack(r.ackSubject, ackTerm)
		return false
	}
	w.runs[r.job.Nonce] = r
	w.byRun[r.id] = r
	return true
}

func (w *Worker) forget(r *run) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.runs, r.job.Nonce)
	delete(w.byRun, r.id)
	w.past.add(r.job.Nonce)
}

// past remembers the latest pastKept jobs.
type past struct {
	set   map[schemas.Nonce]struct{}
	order []schemas.Nonce // a ring, once it is full
	next  int
}

const pastKept = 1024

func (p *past) has(n schemas.Nonce) bool {
	_, ok := p.set[n]
	return ok
}

func (p *past) add(n schemas.Nonce) {
	if len(p.order) < pastKept {
		p.order = append(p.order, n)
	} else {
		delete(p.set, p.order[p.next])
		p.order[p.next] = n
		p.next = (p.next + 1) % pastKept
	}
	p.set[n] = struct{}{}
}

// signal gives the one token that c holds.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
