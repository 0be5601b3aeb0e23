package quota

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/ownllm/ownllm/broker/books"
)

const (
	// maxTurn bounds each list of a turn, and so for how long it locks its keys.
	maxTurn = 512
	// gatherFor is how long a settlement that nobody waits for may lie.
	gatherFor = 5 * time.Millisecond
	// awayFor is how long the books are left alone after they couldn't be reached.
	awayFor = 250 * time.Millisecond
	// retryWithin is how fast a turn must have failed to be tried again at once.
	retryWithin = time.Second
	// flushFor bounds how long a gate that stops waits for the books to take what was
	// settled.
	flushFor = 5 * time.Second
)

// admission is a request that waits for a decision.
type admission struct {
	ask      Ask
	foreseen func(Grant)   // or nil, see Gate.AdmitForeseen
	done     chan struct{} // closed when the rest is final

	term     *term // under which it was asked
	decision books.Decision
	err      error
	// uncertain says that an answer got lost: the books may have admitted the request, or
	// still may, whatever they say now.
	uncertain bool

	// Guarded by shard.mu.
	abandoned bool // nobody waits any more
	answered  bool
}

// change is an Alter that waits.
type change struct {
	alter books.Alter
	out   books.Altered
	err   error
	done  chan struct{}
}

// settlement is one that the books haven't taken yet.
type settlement struct {
	books.Settlement
	scarce bool   // somebody may wait for what it gives back
	then   func() // or nil
	done   chan struct{}
}

// shard has one turn under way at a time; what comes in meanwhile waits for the next.
type shard struct {
	gate *Gate
	wake chan struct{} // holds one token

	mu      sync.Mutex
	stopped bool
	asks    []*admission
	changes []*change
	settles []*settlement // oldest first
	taken   int           // settlements in the turn under way
	scarce  bool          // one of settles is
}

func newShard(g *Gate) *shard { return &shard{gate: g, wake: make(chan struct{}, 1)} }

// add puts something into the queue, unless the gate has stopped.
func (s *shard) add(put func()) bool {
	s.mu.Lock()
	stopped := s.stopped
	if !stopped {
		put()
	}
	s.mu.Unlock()
	s.signal()
	return !stopped
}

func (s *shard) signal() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// settle takes a settlement even after the gate has stopped: then nobody gets to it.
func (s *shard) settle(x books.Settlement, scarce bool, then func()) <-chan struct{} {
	p := &settlement{Settlement: x, scarce: scarce, then: then, done: make(chan struct{})}
	s.mu.Lock()
	s.settles = append(s.settles, p)
	s.scarce = s.scarce || scarce
	s.mu.Unlock()
	s.signal()
	return p.done
}

// void makes sure that a request holds nothing.
func (s *shard) void(a Ask) {
	s.settle(books.Settlement{Request: a.Request, Key: a.Key, Outcome: books.OutcomeVoid}, true, nil)
}

func (s *shard) unsettled() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.settles) + s.taken
}

// abandon notes that nobody waits for an admission any more, and reports whether it
// came before the answer.
func (s *shard) abandon(a *admission) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	a.abandoned = true
	return !a.answered
}

// answer makes a decision final, and reports whether somebody still waits for it.
func (s *shard) answer(a *admission) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	a.answered = true
	close(a.done)
	return !a.abandoned
}

// work is what goes into one turn.
type work struct {
	asks    []*admission
	changes []*change
	settles []*settlement
}

func (w *work) size() int { return len(w.asks) + len(w.changes) + len(w.settles) }

// take takes the next turn out of the queue; what nobody waits for is dropped.
func (s *shard) take() (w work, more bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.asks) > 0 && len(w.asks) < maxTurn {
		if !s.asks[0].abandoned {
			w.asks = append(w.asks, s.asks[0])
		} else {
			close(s.asks[0].done)
		}
		s.asks = s.asks[1:]
	}
	n := min(len(s.changes), maxTurn)
	w.changes, s.changes = s.changes[:n:n], s.changes[n:]
	n = min(len(s.settles), maxTurn)
	w.settles, s.settles = s.settles[:n:n], s.settles[n:]
	s.taken, s.scarce = n, false
	return w, len(s.asks)+len(s.changes)+len(s.settles) > 0
}

// run takes turns until ctx ends, and then until nothing is left to settle.
func (s *shard) run(ctx context.Context) {
	for ctx.Err() == nil {
		select {
		case <-s.wake:
		case <-ctx.Done():
			continue
		}
		s.gather(ctx)
		w, more := s.take()
		if more {
			s.signal()
		}
		if w.size() > 0 && !s.turn(ctx, w) {
			s.pause(ctx)
		}
	}
	s.mu.Lock()
	s.stopped = true
	s.mu.Unlock()
	flush, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushFor)
	defer cancel()
	for {
		w, more := s.take()
		s.refuse(w)
		if len(w.settles) == 0 && !more {
			return
		}
		if !s.turn(flush, work{settles: w.settles}) {
			s.pause(flush)
		}
		if flush.Err() != nil {
			s.gate.log.Error("the database didn't take all settlements before the end", "count", s.unsettled())
			return
		}
	}
}

// gather leaves settlements that nobody waits for a moment to be joined by others: a turn
// costs the books several times what one more settlement in it does.
func (s *shard) gather(ctx context.Context) {
	if s.pressed() {
		return
	}
	timer := time.NewTimer(gatherFor)
	defer timer.Stop()
	for !s.pressed() {
		select {
		case <-s.wake:
		case <-timer.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

// pressed reports whether somebody waits for the next turn.
func (s *shard) pressed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.scarce || len(s.asks)+len(s.changes) > 0 || len(s.settles) >= maxTurn
}

// pause leaves the books alone for a moment, and refuses whoever asks meanwhile.
func (s *shard) pause(ctx context.Context) {
	over := time.NewTimer(awayFor)
	defer over.Stop()
	for {
		select {
		case <-over.C:
			s.signal()
			return
		case <-ctx.Done():
			return
		case <-s.wake:
			s.mu.Lock()
			w := work{asks: s.asks, changes: s.changes}
			s.asks, s.changes = nil, nil
			s.mu.Unlock()
			s.refuse(w)
		}
	}
}

// refuse answers those that the books weren't asked about.
func (s *shard) refuse(w work) {
	for _, a := range w.asks {
		a.err = errAway()
		s.refused(a)
	}
	for _, c := range w.changes {
		c.err = errAway()
		close(c.done)
	}
}

// refused answers an admission that holds nothing, or mustn't.
func (s *shard) refused(a *admission) {
	if a.uncertain {
		s.void(a.ask)
	}
	s.answer(a)
}

// turn takes a turn, a second time if the first one failed: after a restart of the
// database, the first to use a connection finds it dead. It reports whether the books
// could be reached.
func (s *shard) turn(ctx context.Context, w work) bool {
	begun := time.Now()
	if len(w.asks) > 0 {
		t := s.gate.lease.current(begun)
		if t == nil {
			s.refuse(work{asks: w.asks})
			w.asks = nil
		}
		for _, a := range w.asks {
			a.term = t
		}
	}
	if w.size() == 0 {
		return true
	}
	out, err := s.ask(ctx, w)
	if errors.Is(err, books.ErrUnavailable) && ctx.Err() == nil && time.Since(begun) < retryWithin {
		for _, a := range w.asks {
			a.uncertain = true
		}
		out, err = s.ask(ctx, w)
	}
	switch {
	case err == nil:
		s.answerAll(w, out)
		return true
	case errors.Is(err, books.ErrUnavailable) || ctx.Err() != nil:
		s.gate.log.Warn("the database can't be reached", "error", err)
		for _, a := range w.asks {
			a.uncertain = true
		}
		s.refuse(w)
		s.keep(w.settles)
		return false
	case w.size() > 1:
		// Nothing was done. One of them is to blame, and the others needn't suffer.
		return s.oneByOne(ctx, w)
	}
	s.gate.log.Error("the database refuses a request's books", "error", err)
	s.refuse(w)
	for _, x := range w.settles {
		s.gate.log.Error("settlement dropped", "request", x.Request, "key", x.Key, "completion_tokens", x.Completion)
	}
	s.settled(w.settles)
	return true
}

func (s *shard) ask(ctx context.Context, w work) (books.Outcomes, error) {
	turn := books.Turn{OpenTokens: s.gate.cfg.OpenTokens}
	for _, x := range w.settles {
		turn.Settle = append(turn.Settle, x.Settlement)
	}
	for _, c := range w.changes {
		turn.Alter = append(turn.Alter, c.alter)
	}
	for _, a := range w.asks {
		turn.Admit = append(turn.Admit, a.ask)
		turn.Lease = a.term.lease // of all the same
	}
	if len(w.asks) == 1 && w.asks[0].foreseen != nil && !w.asks[0].uncertain {
		a := w.asks[0]
		turn.Foreseen = func(d books.Decision) { a.foreseen(s.gate.grant(a, &d)) }
	}
	// It isn't broken off: the answer would get lost.
	return s.gate.books.Turn(context.WithoutCancel(ctx), turn)
}

func (s *shard) answerAll(w work, out books.Outcomes) {
	s.settled(w.settles)
	for i, c := range w.changes {
		c.out = out.Altered[i]
		close(c.done)
	}
	for i, a := range w.asks {
		a.decision = out.Admit[i]
		if a.decision.Reason != books.Admitted {
			s.refused(a)
		} else if !s.answer(a) {
			s.void(a.ask)
		}
	}
}

// oneByOne takes a turn for each.
func (s *shard) oneByOne(ctx context.Context, w work) (reached bool) {
	reached = true
	for _, x := range w.settles {
		reached = s.turn(ctx, work{settles: []*settlement{x}}) && reached
	}
	for _, c := range w.changes {
		reached = s.turn(ctx, work{changes: []*change{c}}) && reached
	}
	for _, a := range w.asks {
		reached = s.turn(ctx, work{asks: []*admission{a}}) && reached
	}
	return reached
}

func (s *shard) settled(list []*settlement) {
	for _, x := range list {
		if x.then != nil {
			x.then()
		}
		close(x.done)
	}
	s.mu.Lock()
	s.taken -= len(list)
	s.mu.Unlock()
}

// keep puts settlements back, to be tried again.
func (s *shard) keep(list []*settlement) {
	s.mu.Lock()
	s.settles = append(list, s.settles...)
	s.scarce = true
	s.taken -= len(list)
	s.mu.Unlock()
}
