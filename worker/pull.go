package worker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/schemas"
)

const (
	helloWait  = 2 * time.Second
	helloRetry = 250 * time.Millisecond
	// helloPause is how long a worker that was refused waits before it asks again.
	helloPause = 10 * time.Second
	// renewPause is the least time between two renewals of the connection. renewHold is how
	// long one is put off for jobs of models that are gone, and renewLook how often it is
	// looked for them.
	renewPause = 2 * time.Second
	renewHold  = 30 * time.Second
	renewLook  = 100 * time.Millisecond
	// lingerIdle is for how long the queue of a model that is gone has to be empty before it is
	// left, so that no job stays behind in it.
	lingerIdle = time.Second
	// renewMany renewals, none of which has lasted for renewOften, are no accident.
	renewMany  = 5
	renewOften = 10 * time.Second
)

// forbidden takes in that the bus doesn't let the worker do something, and reports whether
// that is what the error says. After a hello with a model that was never offered before it
// is what has to come, once.
func (w *Worker) forbidden(err error) bool {
	if !errors.Is(err, nats.ErrPermissionViolation) {
		return false
	}
	select {
	case w.refused <- time.Now():
	default:
	}
	w.log.Debug("the bus doesn't know yet what this worker may do", "error", err)
	return true
}

// introduceAndPull says hello whenever that is due, and pulls from the consumers that
// the broker names, until ctx ends. It returns once nothing is pulled any more. Jobs
// run under life and are counted in jobs.
func (w *Worker) introduceAndPull(ctx, life context.Context, jobs *sync.WaitGroup) error {
	type pulling struct {
		*puller
		stop context.CancelFunc
		gone time.Time // since when the model is gone; zero: it isn't
	}
	pulls := make(map[string]pulling) // by model
	isGone := func(model string) bool {
		p, ok := pulls[model]
		return !ok || !p.gone.IsZero()
	}
	var loops sync.WaitGroup
	defer loops.Wait()
	retry := time.NewTimer(0)
	defer retry.Stop()
	// What a connection may pull was settled when it was made, by what the brokers knew
	// then. Since the last hello they may know more, so the connection is renewed once the
	// bus refuses something. Nothing gets lost, and the hello is said again.
	renew := time.NewTimer(0)
	<-renew.C
	defer renew.Stop()
	var refused, renewed time.Time
	renewals := 0 // in a row
	// Edges may have sent jobs to a model before they heard that it is gone. Somebody has to
	// tell them, so its queue is served until it is empty and nothing more comes.
	linger := time.NewTicker(lingerIdle)
	defer linger.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-w.introduce:
		case <-retry.C:
		case now := <-w.refused:
			if refused.IsZero() {
				refused = now
				renew.Reset(max(0, renewPause-now.Sub(renewed)))
			}
			continue
		case now := <-linger.C:
			for model, p := range pulls {
				if !p.gone.IsZero() && now.Sub(p.gone) > lingerIdle && p.idle(now) > lingerIdle {
					p.stop()
					delete(pulls, model)
				}
			}
			continue
		case now := <-renew.C:
			// A job of a model that is gone couldn't be acknowledged any more.
			lingers := false
			for model := range pulls {
				lingers = lingers || isGone(model)
			}
			if now.Sub(refused) < renewHold && (lingers || slices.ContainsFunc(w.list(), func(r *run) bool { return isGone(r.job.Model) })) {
				renew.Reset(renewLook)
				continue
			}
			if now.Sub(renewed) < renewOften {
				renewals++
			} else {
				renewals = 0
			}
			refused, renewed = time.Time{}, now
			for model, p := range pulls {
				if isGone(model) {
					p.stop()
					delete(pulls, model)
				}
				p.leave() // the connection is back too soon for them to hear of it in time
			}
			if renewals == renewMany {
				w.log.Warn("the bus still doesn't let this worker do what the broker told it to; the connection is renewed again and again")
			}
			if err := w.tokens.ForceReconnect(); err != nil {
				w.log.Warn("connection not renewed", "error", err)
			}
			continue
		}
		welcome, err := w.hello(ctx)
		if err != nil {
			if ctx.Err() == nil && !bus.Down(err) {
				w.log.Warn("hello failed", "error", err)
			}
			retry.Reset(helloRetry)
			continue
		}
		if welcome.Error != nil {
			w.log.Error("broker refuses this worker", "code", welcome.Error.Code, "error", welcome.Error.Message)
			retry.Reset(helloPause)
			continue
		}
		for model, p := range pulls {
			switch welcome.Consumers[model] {
			case p.consumer:
				p.gone = time.Time{}
			case "":
				if p.gone.IsZero() {
					p.gone = time.Now()
				}
			default:
				p.stop()
				delete(pulls, model)
				continue
			}
			pulls[model] = p
		}
		for model, consumer := range welcome.Consumers {
			if _, ok := pulls[model]; ok {
				continue
			}
			pullCtx, cancel := context.WithCancel(ctx)
			p := &puller{w: w, stream: welcome.Stream, consumer: consumer}
			pulls[model] = pulling{puller: p, stop: cancel}
			loops.Add(1)
			go func() {
				defer loops.Done()
				defer cancel()
				if err := p.run(pullCtx, life, jobs); err != nil {
					w.log.Error("queue not served", "consumer", consumer, "error", err)
				}
			}()
			w.log.Info("serving model", "model", model)
		}
	}
}

// hello introduces the worker to a broker.
func (w *Worker) hello(ctx context.Context) (*schemas.Welcome, error) {
	_, inventory := w.stock.inventory()
	hello := schemas.Hello{
		Version: schemas.Protocol.Newest, Oldest: schemas.Protocol.Oldest, Incarnation: w.incarnation,
		Software: w.cfg.Software, Host: w.cfg.Host, Inventory: *inventory,
	}
	askCtx, cancel := context.WithTimeout(ctx, helloWait)
	defer cancel()
	m, err := w.tokens.RequestWithContext(askCtx, schemas.HelloSubject(w.cfg.Tenant, w.cfg.Agent), hello.Encode())
	if err != nil {
		return nil, fmt.Errorf("say hello: %w", err)
	}
	var welcome schemas.Welcome
	if err := json.Unmarshal(m.Data, &welcome); err != nil {
		return nil, fmt.Errorf("read welcome: %w", err)
	}
	if version := max(welcome.Version, 1); welcome.Error == nil && !schemas.Protocol.Speak(version) {
		// The broker believed that this worker speaks it.
		theirs := schemas.Versions{Oldest: version, Newest: version}
		welcome.Error = schemas.Errorf(schemas.CodeInvalidValue, "%s", theirs.Refusal(schemas.Protocol))
	}
	return &welcome, nil
}

// puller takes the jobs of one model, one at a time: a job that was pulled and can't
// start yet is as good as queued, and a connection that dies takes one at the most
// with it.
type puller struct {
	w        *Worker
	stream   string
	consumer string

	mu    sync.Mutex
	inbox string
	sub   *nats.Subscription // to the inbox; nil: it was left
	empty time.Time          // since when a pull waits for a job; zero: none does
}

const (
	pullExpiry = 30 * time.Second
	// pullGrace is how much later than that a pull counts as lost.
	pullGrace = 2 * time.Second
	// pullRetry is the pause after a refused pull.
	pullRetry = 250 * time.Millisecond
)

// run pulls until ctx ends. Every pull has a reply subject of its own, so that the
// status of an old one isn't taken for that of the current one; a job is taken from
// whichever brings it.
//
// A connection that is lost leaves a pull behind that leads nowhere, since the server has
// forgotten the way of its answers from one account to the other. It has not forgotten the
// pull, though, and would take it for served by whoever listens to its reply subject, and
// hand it a job, which would be lost for as long as AckWait. So each connection has an inbox
// of its own, and that of the last one is left as soon as it is lost. Nor is an inbox left
// right behind a pull, of which the same would become: so what has happened to the connection
// is heard before the next pull.
func (p *puller) run(ctx, life context.Context, jobs *sync.WaitGroup) error {
	w := p.w
	status := w.tokens.StatusChanged(nats.CONNECTED, nats.RECONNECTING)
	defer w.tokens.RemoveStatusListener(status)
	delivered := make(chan *nats.Msg, 64)
	defer p.leave()
	request := []byte(fmt.Sprintf(`{"batch":1,"expires":%d}`, pullExpiry.Nanoseconds()))
	subject := "$JS.API.CONSUMER.MSG.NEXT." + p.stream + "." + p.consumer
	timer := time.NewTimer(0)
	defer timer.Stop()
	for n := uint64(1); ; n++ {
		for stale := true; stale; {
			select {
			case _, ok := <-status:
				if !ok { // the connection is closed for good
					return nil
				}
				p.leave()
			default:
				stale = false
			}
		}
		inbox, err := p.listen(delivered)
		if err != nil {
			return fmt.Errorf("listen to consumer %s: %w", p.consumer, err)
		}
		reply := inbox + "." + strconv.FormatUint(n, 10)
		p.waits(true)
		wait := pullExpiry + pullGrace
		if err := w.tokens.PublishRequest(subject, reply, request); err != nil {
			wait = pullRetry
		}
		timer.Reset(wait)
	waiting:
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-timer.C:
				break waiting
			case is, ok := <-status:
				if !ok { // the connection is closed for good
					return nil
				}
				p.leave()
				if is == nats.CONNECTED || w.tokens.IsConnected() {
					break waiting
				}
			case m := <-delivered:
				switch code := m.Header.Get("Status"); {
				case code == "" || len(m.Data) > 0:
					p.waits(false)
					p.deliver(ctx, life, m, jobs)
					break waiting
				case m.Subject != reply || code == "100":
				case code == "408" || code == "404":
					break waiting // nothing came
				default:
					// The consumer is gone, or was: the next hello makes it again.
					signal(w.introduce)
					timer.Reset(pullRetry)
				}
			}
		}
	}
}

// waits notes whether a pull waits for a job.
func (p *puller) waits(is bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case !is:
		p.empty = time.Time{}
	case p.empty.IsZero():
		p.empty = time.Now()
	}
}

// idle is for how long pulls have waited for a job.
func (p *puller) idle(now time.Time) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.empty.IsZero() {
		return 0
	}
	return now.Sub(p.empty)
}

// listen returns the inbox that jobs come to, a new one if the last one was left.
func (p *puller) listen(delivered chan *nats.Msg) (inbox string, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sub == nil {
		p.inbox = p.w.tokens.NewInbox()
		p.sub, err = p.w.tokens.ChanSubscribe(p.inbox+".*", delivered)
	}
	return p.inbox, err
}

// leave ends the interest in the inbox.
func (p *puller) leave() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sub != nil {
		_ = p.sub.Unsubscribe() // fails only if the connection is closed for good
		p.sub = nil
	}
}

// deliver starts a job, and returns once the next one may be pulled: when this one
// has its slot, or waits for something else than a slot.
func (p *puller) deliver(ctx, life context.Context, m *nats.Msg, jobs *sync.WaitGroup) {
	r, err := newRun(life, p.w, m)
	if err != nil {
		// A job that can't be read can't be claimed either: its owner runs into the
		// deadline, and nobody else must get it.
		p.w.log.Error("job dropped", "error", err)
		p.w.ack(m.Reply, ackTerm)
		return
	}
	if !p.w.adopt(r) {
		p.w.log.Info("job delivered again", "request", r.job.Request)
		r.cancel(nil)
		return
	}
	jobs.Add(1)
	go func() {
		defer jobs.Done()
		r.do(m.Header)
	}()
	select {
	case <-r.started:
	case <-ctx.Done():
		// Draining: whoever has no slot by now is left to another agent.
	}
}

// The acknowledgements of JetStream.
const (
	ackDone     = "+ACK"
	ackProgress = "+WPI"
	ackTerm     = "+TERM"
)

func (w *Worker) ack(subject, word string) {
	if err := w.tokens.Publish(subject, []byte(word)); err != nil && !bus.Down(err) {
		w.log.Warn("acknowledgement not sent", "error", err)
	}
}
