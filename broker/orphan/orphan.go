// Package orphan settles the requests whose owners have died.
//
// The owner of a request, an edge, settles it. If it dies before that, its lease lapses
// within 10 s, the sweeper returns its slots, and the money of its requests is still held.
// Then there are three ways, and whichever comes first counts:
//
// The worker that runs the request notices that nobody takes its frames any more, and
// reports what it has counted on the usage stream. A Settler takes the report and settles
// the request by it, once the lease has lapsed; before, it is asked again every second.
//
// If no report can come, a Settler expires the request: the prompt that was reserved is
// charged, and the rest comes back. No report can come of a request whose agent isn't
// here, or is here with another run than it had at some time since the request was
// admitted: a run that ends takes its jobs with it. That has to be so for the time of
// grace, since what the last run had to say may be on its way. A request that still lay in
// the queue when the run ended looks the same; its next run would report nothing but the
// prompt. So the money of a request is back 10 s after the death of its owner, plus a
// second for the sweeper, and three for grace and pace; or three seconds and what presence
// takes to notice it after the death of its worker, if that is later.
//
// What neither of these ends, the sweeper does at the deadline of the request: for
// example, if the job was never published and its agent lives, or if the run that had it
// ended before this process was started.
//
// Any number of brokers may run a Settler. Reports are shared, and each way ends a request
// only if it is still open.
package orphan

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/presence"
	"github.com/ownllm/ownllm/schemas"
)

const (
	// batch is how many reports are taken at once, and parallel how many are settled at
	// the same time.
	batch    = 64
	parallel = 4
	// again is after how long a report is delivered again that can't be settled yet.
	again = time.Second
	// pause is the pause after a failure to fetch reports.
	pause = 500 * time.Millisecond
	// booksWait bounds one call of the books.
	booksWait = 5 * time.Second

	lookEvery = 500 * time.Millisecond
	grace     = 2 * time.Second
	// maxEnds is how many runs of an agent are remembered that have ended.
	maxEnds = 8
)

// Store is what a Settler needs of the books.
type Store interface {
	SettleOrphan(ctx context.Context, tenant schemas.TenantID, agent schemas.AgentID, report *schemas.UsageReport) (books.Orphan, error)
	Orphans(ctx context.Context) ([]books.Orphaned, error)
	ExpireOrphans(ctx context.Context, ids []schemas.RequestID) (int, error)
}

// Feed says whether the table of agents can be believed.
type Feed interface{ Ready() bool }

// Settler settles and expires requests whose owners have died.
type Settler struct {
	queue  *bus.Queue
	store  Store
	agents *presence.Table
	feed   Feed
	log    *slog.Logger

	mu   sync.Mutex
	ends map[schemas.AgentID][]end // the latest last
}

// end is the end of a run of an agent, or what looked like one.
type end struct {
	incarnation schemas.Incarnation
	at          time.Time
}

// New returns a settler. It has to be made before the table gets its first heartbeat.
func New(queue *bus.Queue, store Store, agents *presence.Table, feed Feed, log *slog.Logger) *Settler {
	s := &Settler{queue: queue, store: store, agents: agents, feed: feed, log: log, ends: make(map[schemas.AgentID][]end)}
	agents.OnGone(s.gone)
	return s
}

// Run works until ctx ends.
func (s *Settler) Run(ctx context.Context) error {
	var work errgroup.Group
	work.Go(func() error {
		s.settle(ctx)
		return nil
	})
	work.Go(func() error {
		s.expire(ctx)
		return nil
	})
	return work.Wait()
}

// settle takes reports.
func (s *Settler) settle(ctx context.Context) {
	reports := s.queue.Reports()
	for ctx.Err() == nil {
		list, err := reports.Next(ctx, batch)
		if err == nil {
			var work errgroup.Group
			work.SetLimit(parallel)
			for _, r := range list {
				work.Go(func() error { return s.take(ctx, r) })
			}
			err = work.Wait()
		}
		if err == nil || ctx.Err() != nil {
			continue
		}
		if !bus.Down(err) {
			s.log.WarnContext(ctx, "usage reports not settled", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

// take settles one report, or leaves it for later.
func (s *Settler) take(ctx context.Context, r bus.Report) error {
	tenant, agent, err := schemas.ParseAgentSubject(r.Subject())
	if err != nil {
		s.log.ErrorContext(ctx, "usage report dropped", "subject", r.Subject(), "error", err)
		return r.Done()
	}
	report, err := schemas.DecodeUsageReport(r.Data())
	if err != nil {
		s.log.ErrorContext(ctx, "usage report dropped", "subject", r.Subject(), "error", err)
		return r.Done()
	}
	bounded, cancel := context.WithTimeout(ctx, booksWait)
	defer cancel()
	outcome, err := s.store.SettleOrphan(bounded, tenant, agent, report)
	if err != nil {
		if late := r.Later(again); late != nil {
			return late
		}
		return fmt.Errorf("request %s: %w", report.Request, err)
	}
	switch outcome {
	case books.OrphanOwned:
		return r.Later(again)
	case books.OrphanSettled:
		s.log.InfoContext(ctx, "request without an owner is settled by its agent's report",
			"request", report.Request, "agent", agent, "completion_tokens", report.CompletionTokens)
	case books.OrphanForeign:
		s.log.WarnContext(ctx, "agent reports a request that isn't its own", "request", report.Request, "tenant", tenant, "agent", agent)
	case books.OrphanEnded, books.OrphanUnknown:
	}
	return r.Done()
}

// expire ends what nobody will report.
func (s *Settler) expire(ctx context.Context) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	// since says from when on nobody has been there to report a request.
	since := make(map[schemas.RequestID]time.Time)
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			if err := s.look(ctx, now, since); err != nil && ctx.Err() == nil {
				s.log.WarnContext(ctx, "requests without owners not looked after", "error", err)
			}
		}
	}
}

// look expires the requests that it has found hopeless for the time of grace.
func (s *Settler) look(ctx context.Context, now time.Time, since map[schemas.RequestID]time.Time) error {
	if !s.feed.Ready() {
		clear(since)
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, booksWait)
	defer cancel()
	orphans, err := s.store.Orphans(ctx)
	if err != nil {
		clear(since)
		return err
	}
	hopeless := s.hopeless(orphans, now)
	for id := range since {
		if !hopeless[id] {
			delete(since, id)
		}
	}
	var due []schemas.RequestID
	for id := range hopeless {
		if first, ok := since[id]; !ok {
			since[id] = now
		} else if now.Sub(first) >= grace {
			due = append(due, id)
		}
	}
	if len(due) == 0 {
		return nil
	}
	n, err := s.store.ExpireOrphans(ctx, due)
	if n > 0 {
		s.log.InfoContext(ctx, "requests without owners and agents are expired", "count", n)
	}
	return err
}

// hopeless returns those of which no report can come.
func (s *Settler) hopeless(orphans []books.Orphaned, now time.Time) map[schemas.RequestID]bool {
	found := make(map[schemas.RequestID]bool)
	if len(orphans) == 0 {
		return found
	}
	here := make(map[schemas.AgentID]schemas.Incarnation)
	for _, a := range s.agents.Agents("") {
		if a.State != "" {
			here[a.Agent] = a.Incarnation
		}
	}
	for _, o := range orphans {
		if incarnation, ok := here[o.Agent]; !ok || s.replaced(o.Agent, incarnation).After(now.Add(-o.Age)) {
			found[o.Request] = true
		}
	}
	return found
}

// gone notes the end of a run.
func (s *Settler) gone(g presence.Gone) {
	if g.Draining {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	list := s.ends[g.Agent]
	for i := range list {
		if list[i].incarnation == g.Incarnation {
			list = append(list[:i], list[i+1:]...)
			break
		}
	}
	if len(list) == maxEnds {
		list = append(list[:0], list[1:]...)
	}
	s.ends[g.Agent] = append(list, end{g.Incarnation, time.Now()})
}

// replaced is when a run of the agent last ended that isn't the given one. That one may
// have looked like it for a while, too, when it had lost the bus.
func (s *Settler) replaced(agent schemas.AgentID, current schemas.Incarnation) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := s.ends[agent]
	for i := len(list) - 1; i >= 0; i-- {
		if list[i].incarnation != current {
			return list[i].at
		}
	}
	return time.Time{}
}
