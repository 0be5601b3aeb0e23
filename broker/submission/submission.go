// Package submission runs requests that publishers leave behind: each once, whenever it can
// be, and keeps what comes of it.
//
// # What it promises
//
// A submission that was accepted is in Postgres, and ends: with a completion, or with an
// error that says why there is none. It has one outcome, whatever dies on the way; the same
// id again, while it waits, while it runs or months later, is the same submission.
//
// Safety comes from the books. A claim names its owner and its run, and only that run can
// end the submission, in one transaction; what was taken from an owner whose lease lapsed
// isn't its any more, whether it knows or not. What a run delivers is one thing, what is
// recorded another: if an owner dies after its run and before the end is recorded, the
// request runs once more, with a request id and a row in the ledger of its own, since it
// did burn those tokens. The result that is recorded is that of one run, whole.
//
// Liveness comes from the lease, too. When it lapses, the sweep lets the owner's submissions
// wait again; one whose runs were lost several times is taken for what kills them, and ends
// with an error. Whoever waits is looked at when its key gets a slot back, when its model
// gets room, when its pause is over, and at its deadline; the words by which the books tell
// of that may get lost, and a look once a second replaces them.
//
// # Waiting
//
// A submission is admitted by dispatch.Dispatcher.Start like any other request, so budgets
// and slots hold. A refusal that may pass sends it back to its old place: no slot, no rate
// and money that others hold park its key, a model that can't be had parks that model of
// its key. What never passes ends it. No submission that waits has a goroutine or a timer,
// and what it costs to find the next one doesn't grow with how many wait.
//
// Keys take turns. A model gets only as many submissions as its agents have slots, and a few
// more, so that a backlog stays here, where it is fair, and not in the queue of an agent.
package submission

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"golang.org/x/sync/errgroup"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/desk"
	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/broker/keyring"
	"github.com/ownllm/ownllm/broker/metric"
	"github.com/ownllm/ownllm/broker/presence"
	"github.com/ownllm/ownllm/broker/quota"
	"github.com/ownllm/ownllm/broker/trace"
	"github.com/ownllm/ownllm/schemas"
)

// Config holds the bounds of a Scheduler. The zero value of each stands for its default.
type Config struct {
	// Runs is how many submissions this process runs at once: 256.
	Runs int
	// Keep is for how long a result can be fetched: 7 days. KeepID is for how long an id is
	// known: 90 days. Both count from the end of the submission.
	Keep, KeepID time.Duration
	// Drain is how long what runs may go on when the scheduler is to stop: 30 s.
	Drain time.Duration
	// Poll is how often it is looked whether there is something to do: 1 s.
	Poll time.Duration
}

func (c Config) withDefaults() Config {
	set := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	set(&c.Keep, 7*24*time.Hour)
	set(&c.KeepID, 90*24*time.Hour)
	set(&c.Drain, 30*time.Second)
	set(&c.Poll, time.Second)
	if c.Runs <= 0 {
		c.Runs = 256
	}
	return c
}

// Books is what a Scheduler needs of the books.
type Books interface {
	Submit(ctx context.Context, n books.NewSubmission) (books.Submission, bool, error)
	FindSubmission(ctx context.Context, key schemas.KeyID, client string) (books.Submission, error)
	ClaimSubmissions(ctx context.Context, lease books.Lease, limit int) ([]books.Claim, error)
	ReturnSubmission(ctx context.Context, r books.Return) (bool, error)
	SubmissionBegun(ctx context.Context, c *books.Claim) error
	EndSubmission(ctx context.Context, c *books.Claim, e books.End) (bool, error)
	OwnedSubmissions(ctx context.Context, owner schemas.OwnerID) ([]books.OwnedSubmission, error)
	SweepSubmissions(ctx context.Context, o books.SubmissionSweep) (books.SweptSubmissions, error)
	ListenSubmissions(ctx context.Context, wake func()) error
	WaitingSubmissions(ctx context.Context) (n int, oldest time.Duration, err error)
}

// Parts are what a Scheduler works with.
type Parts struct {
	Books Books
	Keys  *keyring.Keyring
	Desk  *desk.Desk
	// Agents and Feed say what room there is.
	Agents     *presence.Table
	Feed       *presence.Feed
	Gate       *quota.Gate
	Dispatcher *dispatch.Dispatcher
	// Metrics and Tracer may be nil.
	Metrics *metric.Instruments
	Tracer  *trace.Tracer
	// Ingress is a connection to the account of publishers.
	Ingress *nats.Conn
	Log     *slog.Logger
}

// Scheduler takes submissions, and runs them. It is safe for concurrent use.
type Scheduler struct {
	Parts
	cfg  Config
	wake chan struct{} // holds one token: something may be claimed

	mu      sync.Mutex
	running map[int64]int64   // the runs that this process has, by submission
	rooms   map[place]*room   // those of them that are at a model
	waiting map[name][]waiter // for results
}

// name is what a publisher calls a submission.
type name struct {
	key schemas.KeyID
	id  string
}

// New returns a scheduler.
func New(p Parts, cfg Config) *Scheduler {
	return &Scheduler{
		Parts: p, cfg: cfg.withDefaults(), wake: make(chan struct{}, 1),
		running: make(map[int64]int64), rooms: make(map[place]*room), waiting: make(map[name][]waiter),
	}
}

const (
	// claimBatch is how many submissions are claimed at once, at the most.
	claimBatch = 32
	// again is the pause after a failure to reach the books.
	again = 500 * time.Millisecond
	// booksWait bounds one call of the books when this process is about to end.
	booksWait = 5 * time.Second
)

// Run works until ctx ends. Then it begins nothing new, lets what runs go on for as long as a
// drain takes, and has the rest wait again.
func (s *Scheduler) Run(ctx context.Context) error {
	results, err := s.hear()
	if err != nil {
		return err
	}
	defer results.Unsubscribe()
	// Runs outlive ctx.
	work, end := context.WithCancelCause(context.WithoutCancel(ctx))
	defer end(nil)
	var runs sync.WaitGroup
	var loops errgroup.Group
	loops.Go(func() error {
		s.listen(ctx)
		return nil
	})
	loops.Go(func() error {
		s.sweep(ctx)
		return nil
	})
	loops.Go(func() error {
		s.measure(ctx)
		return nil
	})
	loops.Go(func() error {
		s.schedule(ctx, func(c *books.Claim, entered bool) {
			runs.Go(func() { s.run(work, c, entered) })
		})
		return nil
	})
	_ = loops.Wait() // they return nothing
	drained := time.AfterFunc(s.cfg.Drain, func() { end(desk.ErrShuttingDown) })
	defer drained.Stop()
	runs.Wait()
	return nil
}

// Wake has the scheduler look whether something can be claimed.
func (s *Scheduler) Wake() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// listen has the books tell when something can be claimed.
func (s *Scheduler) listen(ctx context.Context) {
	away := false
	for {
		err := s.Books.ListenSubmissions(ctx, s.Wake)
		if ctx.Err() != nil {
			return
		}
		if !away {
			s.Log.Warn("releases aren't heard of; until they are, submissions are looked at once a second", "error", err)
		}
		away = true
		pause(ctx, again)
	}
}

// pause waits for d, or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

// schedule claims what can run, and begins it.
func (s *Scheduler) schedule(ctx context.Context, begin func(c *books.Claim, entered bool)) {
	tick := time.NewTicker(s.cfg.Poll)
	defer tick.Stop()
	var strays time.Time // when it was last looked for them
	for {
		for ctx.Err() == nil {
			list, err := s.claim(ctx)
			if err != nil {
				s.Log.WarnContext(ctx, "submissions not claimed", "error", err)
				strays = time.Time{} // some may have been
			}
			entered := s.enter(list)
			for i := range list {
				begin(&list[i], entered[i])
			}
			if len(list) == 0 {
				break
			}
		}
		if now := time.Now(); now.Sub(strays) > strayEvery {
			strays = now
			if err := s.returnStrays(ctx); err != nil {
				strays = time.Time{}
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-s.wake:
		}
	}
}

// claim claims as many as can run here.
func (s *Scheduler) claim(ctx context.Context) ([]books.Claim, error) {
	s.mu.Lock()
	free := min(s.cfg.Runs-len(s.running), claimBatch)
	s.mu.Unlock()
	lease, ok := s.Gate.Lease()
	if free <= 0 || !ok || !s.Feed.Ready() {
		return nil, nil
	}
	list, err := s.Books.ClaimSubmissions(ctx, lease, free)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range list {
		s.running[c.ID] = c.Run
	}
	return list, nil
}

// strayEvery is how often it is looked whether the books have claims of ours that we don't
// know of, since the answer got lost.
const strayEvery = 5 * time.Second

// returnStrays lets such submissions wait again. It belongs to the goroutine that claims.
func (s *Scheduler) returnStrays(ctx context.Context) error {
	owner := s.Gate.Owner()
	owned, err := s.Books.OwnedSubmissions(ctx, owner)
	if err != nil {
		return err
	}
	for _, o := range owned {
		s.mu.Lock()
		run := s.running[o.ID]
		s.mu.Unlock()
		if run == o.Run {
			continue
		}
		c := &books.Claim{ID: o.ID, Owner: owner, Run: o.Run}
		if _, err := s.Books.ReturnSubmission(ctx, books.Return{Claim: c, For: books.WaitsForNothing}); err != nil {
			return err
		}
		s.Wake()
	}
	return nil
}

// sweep ends what has waited too long, lets the submissions of dead owners wait again, and
// forgets what is old.
func (s *Scheduler) sweep(ctx context.Context) {
	tick := time.NewTicker(s.cfg.Poll)
	defer tick.Stop()
	for {
		swept, err := s.Books.SweepSubmissions(ctx, books.SubmissionSweep{Keep: s.cfg.Keep, KeepID: s.cfg.KeepID})
		if err != nil && ctx.Err() == nil {
			s.Log.WarnContext(ctx, "submissions not swept", "error", err)
		}
		for i := range swept.Ended {
			s.Metrics.SubmissionEnded(ctx, codeOf(swept.Ended[i].Err))
			s.push(&swept.Ended[i])
		}
		if swept.Returned > 0 {
			s.Log.WarnContext(ctx, "submissions of dead owners wait again", "count", swept.Returned)
			s.Wake()
		}
		if swept.More {
			continue
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// measureEvery is how often it is counted what waits. That reads all of it, by index.
const measureEvery = 10 * time.Second

// measure records what waits until ctx ends.
func (s *Scheduler) measure(ctx context.Context) {
	for s.Metrics != nil && ctx.Err() == nil {
		n, oldest, err := s.Books.WaitingSubmissions(ctx)
		switch {
		case err == nil:
			s.Metrics.SubmissionsWait(ctx, n, oldest)
		case ctx.Err() == nil:
			s.Log.WarnContext(ctx, "submissions that wait not counted", "error", err)
		}
		pause(ctx, measureEvery)
	}
}
