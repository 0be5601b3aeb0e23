package quota

import (
	"context"
	"log/slog"
	"time"

	"github.com/ownllm/ownllm/broker/books"
)

// Sweepable is what a Sweeper needs of the books.
type Sweepable interface {
	Ping(ctx context.Context) error
	Sweep(ctx context.Context) (books.Swept, error)
	Heal(ctx context.Context) (int, error)
}

const (
	sweepEvery = time.Second
	healEvery  = time.Minute
)

// Sweeper returns the slots of owners that died, and ends requests that nobody settles.
// Any number may run.
//
// It judges nobody before it has been in touch with the books for as long as a lease,
// without a break: when they have been away, whoever lives gets the time to renew. With
// a lease of 10 s, the slots of an owner that dies are back after 12 s, or 12 s after
// the start of the first sweeper.
type Sweeper struct {
	books Sweepable
	lease time.Duration
	log   *slog.Logger
}

// NewSweeper returns a sweeper. lease is that of the owners; 0 stands for the default of
// Config.
func NewSweeper(b Sweepable, lease time.Duration, log *slog.Logger) *Sweeper {
	return &Sweeper{books: b, lease: Config{Lease: lease}.withDefaults().Lease, log: log}
}

// Run sweeps until ctx ends.
func (s *Sweeper) Run(ctx context.Context) error {
	tick := time.NewTicker(min(sweepEvery, s.lease/4))
	defer tick.Stop()
	var since, healed time.Time // since when there was contact without a break
	for {
		now := time.Now()
		err := s.pass(ctx, !since.IsZero() && now.Sub(since) >= s.lease)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			since = time.Time{}
			s.log.Warn("the books weren't swept", "error", err)
		case since.IsZero():
			since = now
		}
		if err == nil && now.Sub(healed) >= healEvery {
			healed = now
			s.heal(ctx)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (s *Sweeper) pass(ctx context.Context, judge bool) error {
	if !judge {
		return s.books.Ping(ctx)
	}
	swept, err := s.books.Sweep(ctx)
	if swept != (books.Swept{}) {
		s.log.Info("swept the books", "leases", swept.Leases, "slots", swept.Slots, "expired", swept.Expired)
	}
	return err
}

func (s *Sweeper) heal(ctx context.Context) {
	n, err := s.books.Heal(ctx)
	switch {
	case err != nil && ctx.Err() == nil:
		s.log.Warn("the books weren't healed", "error", err)
	case n > 0:
		s.log.Error("sums in the books were wrong, and were put right", "keys", n)
	}
}
