package worker

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// late is something that is due if a run lasts for long enough, which few do. The pump looks
// after it, so what never comes to pass costs neither a timer nor a context.
type late struct {
	due atomic.Int64 // Unix time in nanoseconds; 0: nothing is

	mu     sync.Mutex
	ctx    context.Context //nolint:containedctx // what do is to run under
	do     func(context.Context)
	cancel context.CancelFunc
	done   chan struct{} // closed when do has returned; nil: it hasn't begun
}

// after has do done in a goroutine of its own, under a context that stop ends.
func (l *late) after(ctx context.Context, wait time.Duration, do func(context.Context)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ctx, l.do, l.done = ctx, do, nil
	l.due.Store(time.Now().Add(wait).UnixNano())
}

// look begins what is due.
func (l *late) look(now time.Time) {
	if due := l.due.Load(); due == 0 || now.UnixNano() < due {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.due.Swap(0) == 0 {
		return // stopped just now
	}
	ctx, cancel := context.WithCancel(l.ctx)
	do, done := l.do, make(chan struct{})
	l.cancel, l.done = cancel, done
	go func() { // ends with stop, which every run calls
		defer close(done)
		do(ctx)
	}()
}

// stop returns once nothing is done, or will be. It may be called often.
func (l *late) stop() {
	l.mu.Lock()
	l.due.Store(0)
	cancel, done := l.cancel, l.done
	l.mu.Unlock()
	if done != nil {
		cancel()
		<-done
	}
}
