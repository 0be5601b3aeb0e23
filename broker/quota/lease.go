package quota

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/schemas"
)

// term is the time of one epoch of the lease.
type term struct {
	lease books.Lease
	ended chan struct{}
}

func (t *term) over() bool {
	select {
	case <-t.ended:
		return true
	default:
		return false
	}
}

// lease is the right of this process to own requests. All times are of the monotonic
// clock, and counted from before a renewal was begun, so the lease never ends in the
// books before it does here.
type lease struct {
	books Books
	owner schemas.OwnerID
	ttl   time.Duration
	log   *slog.Logger
	now   chan struct{} // holds one token: renew at once

	mu     sync.RWMutex
	term   *term     // nil: there was none yet, or it was given back
	until  time.Time // as long as that, it surely holds
	marked time.Time // when a try last began or ended
	// slept says that the lease ran out while this process didn't run.
	slept bool
}

func newLease(b Books, cfg Config, log *slog.Logger) *lease {
	return &lease{books: b, owner: cfg.Owner, ttl: cfg.Lease, log: log, now: make(chan struct{}, 1)}
}

// current is the term under which requests can be admitted, or nil.
func (l *lease) current(now time.Time) *term {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if now.Before(l.until) {
		return l.term
	}
	return nil
}

// doubtful reports whether the lease may have been taken away. It ran out, and that
// isn't because the books couldn't be reached: then nobody takes it away, or the
// requests' money at least.
func (l *lease) doubtful(now time.Time) bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return !now.Before(l.until) && (l.slept || now.Sub(l.marked) > l.maxPause())
}

// maxPause is more than what lies between two marks while this process runs.
func (l *lease) maxPause() time.Duration { return l.ttl / 2 }

// doubt has the lease renewed at once, because the books say that it is another.
func (l *lease) doubt() {
	select {
	case l.now <- struct{}{}:
	default:
	}
}

// run renews the lease until ctx ends.
func (l *lease) run(ctx context.Context) {
	for ctx.Err() == nil {
		pause := l.ttl / 4
		if !l.renew(ctx) {
			pause = l.ttl / 20
		}
		next := time.NewTimer(pause)
		select {
		case <-next.C:
		case <-l.now:
		case <-ctx.Done():
		}
		next.Stop()
	}
}

// mark notes that this process runs. l.mu is held.
func (l *lease) mark(now time.Time) {
	if !now.Before(l.until) && now.Sub(l.marked) > l.maxPause() {
		l.slept = true
	}
	l.marked = now
}

// renew renews the lease once.
func (l *lease) renew(ctx context.Context) bool {
	begun := time.Now()
	l.mu.Lock()
	l.mark(begun)
	l.mu.Unlock()
	bounded, cancel := context.WithTimeout(ctx, l.ttl/4)
	defer cancel()
	got, err := l.books.RenewLease(bounded, l.owner, l.ttl)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mark(time.Now())
	if err != nil {
		if ctx.Err() == nil {
			l.log.Warn("the lease wasn't renewed", "error", err)
		}
		return false
	}
	l.until, l.slept = begun.Add(l.ttl), false
	if l.term != nil && l.term.lease == got {
		return true
	}
	if l.term != nil {
		l.log.Error("the lease lapsed, and requests in flight are ended", "owner", l.owner)
		close(l.term.ended)
	}
	l.term = &term{lease: got, ended: make(chan struct{})}
	return true
}

// end gives the lease back.
func (l *lease) end(ctx context.Context) {
	l.mu.Lock()
	t := l.term
	l.term, l.until = nil, time.Time{}
	l.mu.Unlock()
	if t == nil {
		return
	}
	close(t.ended)
	bounded, cancel := context.WithTimeout(ctx, l.ttl/4)
	defer cancel()
	if err := l.books.EndLease(bounded, t.lease); err != nil {
		l.log.Warn("the lease wasn't given back", "error", err)
	}
}
