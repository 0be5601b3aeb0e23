package backend

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/ownllm/ownllm/schemas"
)

// loadPoll is how often a server that loads by itself is asked whether it is done.
const loadPoll = 250 * time.Millisecond

// errGone says that the server doesn't have the model.
var errGone = errors.New("model is gone")

// errLoadDropped ends a load whose caller went away.
var errLoadDropped = errors.New("load was dropped")

// Load brings a model into memory and returns once it is there. Of several calls for
// one model, the first does the work, and the others wait for it. While a load is
// under way, Models shows the model as loading.
//
// The context is what keeps the load going: Ollama gives up a load whose request is
// cut off. So it should be the worker's, not that of one request, which may not want
// to wait as long.
//
// The error is a *schemas.Error, or, when the context ended, wraps its cause.
func (b *Backend) Load(ctx context.Context, model string) error {
	id, err := b.resolve(model)
	if err != nil {
		return err
	}
	for {
		b.mu.Lock()
		running := b.loads[id]
		if running == nil || !running.ended.IsZero() {
			mine := &load{began: time.Now(), done: make(chan struct{})}
			b.loads[id] = mine
			b.mu.Unlock()
			return b.run(ctx, mine, id, model)
		}
		b.mu.Unlock()
		select {
		case <-running.done:
			if !errors.Is(running.err, errLoadDropped) {
				return running.err
			}
		case <-ctx.Done():
			return fmt.Errorf("load %s: %w", model, context.Cause(ctx))
		}
	}
}

// run does the work of a load and publishes its outcome.
func (b *Backend) run(ctx context.Context, l *load, id, model string) error {
	err := b.load(ctx, id)
	told := err
	switch {
	case err == nil:
	case ctx.Err() != nil:
		err = fmt.Errorf("load %s: %w", model, context.Cause(ctx))
		told = errLoadDropped
	case errors.Is(err, errGone):
		err = gone(model)
		told = err
	case status(err) != 0:
		err = b.kind.refusal(model, complaintOf(err))
		told = err
	default:
		var e *schemas.Error
		if !errors.As(err, &e) {
			err = b.kind.unreachable(err)
		}
		told = err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	l.err, l.ended = told, time.Now()
	if told == nil || errors.Is(told, errLoadDropped) {
		delete(b.loads, id)
	}
	if k := b.known[id]; k != nil && told == nil {
		k.loaded = l.ended.Sub(l.began)
	}
	close(l.done)
	return err
}

func (b *Backend) load(ctx context.Context, id string) error {
	switch {
	case b.kind == Ollama:
		return b.ollamaLoad(ctx, id)
	case b.kind == LlamaCPP:
		var reply rawJSON
		following, stop := context.WithCancel(ctx)
		var follower sync.WaitGroup
		defer follower.Wait()
		defer stop()
		follower.Go(func() { b.watch(following, id) })
		err := b.post(ctx, "/models/load", map[string]string{"model": id}, &reply)
		c := complaintOf(err)
		switch {
		case err == nil:
		case c.status == http.StatusBadRequest && c.says("already"):
		case c.status == http.StatusNotFound && !c.says("model"), c.status == http.StatusNotImplemented, c.status == http.StatusMethodNotAllowed:
			// One model and no router: it loads by itself, and wakes when it is asked.
			if b.state(id) == schemas.ModelCold {
				return b.wake(ctx, id)
			}
		default:
			return err
		}
	case b.state(id) == schemas.ModelCold:
		return b.wake(ctx, id)
	}
	return b.await(ctx, id)
}

// wake has a server that loads on demand load, by a request of one token.
func (b *Backend) wake(ctx context.Context, id string) error {
	var reply rawJSON
	return b.post(ctx, "/v1/chat/completions", map[string]any{
		"model":      id,
		"messages":   []any{map[string]string{"role": "user", "content": "Hi"}},
		"max_tokens": 1,
	}, &reply)
}

// await waits until the server says that the model is ready, or failed.
func (b *Backend) await(ctx context.Context, id string) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		found, err := b.list(ctx)
		if err == nil {
			missing := true
			for _, l := range found {
				if l.id != id {
					continue
				}
				missing = false
				switch l.state {
				case schemas.ModelReady:
					return nil
				case schemas.ModelFailed:
					return b.kind.broken("couldn't load the model. Its own log on the agent's machine says why.")
				}
			}
			if missing && len(found) > 0 {
				return errGone
			}
		}
		timer.Reset(loadPoll)
	}
}
