package worker

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/ownllm/ownllm/schemas"
)

const (
	// reportFor is how long it is tried to report a request; for as long JetStream knows
	// a report that it has already. reportRetry is the pause after a failed try, and
	// lastReports bounds the last one, when the worker stops.
	reportFor   = 10 * time.Minute
	reportRetry = 500 * time.Millisecond
	lastReports = 2 * time.Second
)

// reports brings the reports on requests that have lost their owners to the brokers.
type reports struct {
	publish func(context.Context, *schemas.UsageReport) error
	log     *slog.Logger
	wake    chan struct{} // holds one token: there is one to bring

	mu   sync.Mutex
	list []pendingReport
}

type pendingReport struct {
	*schemas.UsageReport
	since time.Time
}

func newReports(publish func(context.Context, *schemas.UsageReport) error, log *slog.Logger) *reports {
	return &reports{publish: publish, log: log, wake: make(chan struct{}, 1)}
}

func (r *reports) add(u *schemas.UsageReport) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.list = append(r.list, pendingReport{u, time.Now()})
	signal(r.wake)
}

// run brings reports until ctx ends.
func (r *reports) run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.wake:
		}
		for !r.try(ctx) {
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(reportRetry):
			}
		}
	}
}

// flush tries once more to bring what is left.
func (r *reports) flush() {
	ctx, cancel := context.WithTimeout(context.Background(), lastReports)
	defer cancel()
	if !r.try(ctx) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.log.Error("reports on requests without owners are lost", "count", len(r.list))
	}
}

// try brings the reports in their order until one fails, and reports whether there is
// none left.
func (r *reports) try(ctx context.Context) bool {
	for {
		r.mu.Lock()
		if len(r.list) == 0 {
			r.mu.Unlock()
			return true
		}
		first := r.list[0]
		r.mu.Unlock()
		if err := r.publish(ctx, first.UsageReport); err != nil {
			if time.Since(first.since) < reportFor {
				return false
			}
			r.log.Error("report on a request without an owner is lost", "request", first.Request, "error", err)
		}
		r.mu.Lock()
		r.list = r.list[1:] // only this goroutine takes away
		r.mu.Unlock()
	}
}
