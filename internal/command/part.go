package command

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/ownllm/ownllm/internal/collector"
)

// part is something that runs until its context ends.
type part struct {
	name string
	run  func(context.Context) error
}

// runParts starts the parts in their order, and stops them in the opposite order,
// each once the one before has stopped, so that nothing loses what it stands on: the
// edge drains while its bus is there. They are stopped when ctx ends, or when any of
// them ends by itself.
func runParts(ctx context.Context, parts ...part) error {
	collector.Tune()
	type running struct {
		cancel context.CancelFunc
		done   chan error
	}
	ended := make(chan struct{}, len(parts))
	started := make([]running, 0, len(parts))
	for _, p := range parts {
		partCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		r := running{cancel, make(chan error, 1)}
		go func() {
			r.done <- p.run(partCtx)
			ended <- struct{}{}
		}()
		started = append(started, r)
	}
	select {
	case <-ctx.Done():
	case <-ended:
	}
	var errs []error
	for i := len(started) - 1; i >= 0; i-- {
		started[i].cancel()
		if err := <-started[i].done; err != nil && !errors.Is(err, context.Canceled) {
			errs = append(errs, fmt.Errorf("%s: %w", parts[i].name, err))
		}
	}
	return errors.Join(errs...)
}

// ended logs why a role has ended, if that was by itself.
func ended(log *slog.Logger, err error) error {
	if err != nil {
		log.Error("this process ends", "error", err)
	}
	return err
}

// together makes one part of several, which stop at the same time: doors that drain.
func together(parts ...part) part {
	names := make([]string, len(parts))
	for i, p := range parts {
		names[i] = p.name
	}
	return part{strings.Join(names, " and "), func(ctx context.Context) error {
		group, ctx := errgroup.WithContext(ctx)
		for _, p := range parts {
			group.Go(func() error {
				err := p.run(ctx)
				if err == nil && ctx.Err() == nil {
					err = errors.New(p.name + " has stopped by itself")
				}
				return err
			})
		}
		return group.Wait()
	}}
}
