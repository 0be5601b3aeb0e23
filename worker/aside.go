package worker

import (
	"context"
	"errors"
	"time"

	"github.com/ownllm/ownllm/schemas"
)

// Aside tells the broker's side over another way than the bus that this worker lives. Beat
// returns a *schemas.Error if the worker was turned away.
type Aside interface {
	Beat(ctx context.Context, hb schemas.Heartbeat) error
}

const (
	// asideWait bounds one beat over that way.
	asideWait = 3 * time.Second
	// asidePause is how long a worker that was turned away waits before it tries again.
	asidePause = 30 * time.Second
	// asideBye bounds the last word.
	asideBye = time.Second
)

// beatAside sends a heartbeat once a second while there is no link to the bus, and a last
// word if the worker ends so. It does nothing else, so it may wait as it likes.
func (w *Worker) beatAside(ctx context.Context) error {
	if w.cfg.Aside == nil {
		return nil
	}
	tick := time.NewTicker(beatEvery)
	defer tick.Stop()
	var (
		told  string // the hash of the inventory that was sent in this outage
		away  bool   // nobody has answered
		pause time.Time
	)
	for {
		select {
		case <-ctx.Done():
			if !w.tokens.IsConnected() {
				last, cancel := context.WithTimeout(context.WithoutCancel(ctx), asideBye)
				defer cancel()
				_ = w.cfg.Aside.Beat(last, w.heartbeat(schemas.AgentBye, nil)) // silence says the same
			}
			return nil
		case now := <-tick.C:
			if w.tokens.IsConnected() {
				told, away = "", false
				continue
			}
			if now.Before(pause) {
				continue
			}
		}
		hash, inventory := w.stock.inventory()
		if hash == told {
			inventory = nil
		}
		bounded, cancel := context.WithTimeout(ctx, asideWait)
		err := w.cfg.Aside.Beat(bounded, w.heartbeat(w.currentState(), inventory))
		cancel()
		var refused *schemas.Error
		switch {
		case ctx.Err() != nil:
		case err == nil:
			if told == "" {
				w.log.Info("no link to the bus, the server is told over HTTP")
			}
			told, away = hash, false
		case errors.As(err, &refused) && refused.Code != schemas.CodeInternalError:
			pause = time.Now().Add(asidePause)
			w.log.Error("the server turns this worker away", "code", refused.Code, "error", refused.Message)
		case !away:
			away = true
			w.log.Warn("no link to the bus, and the server can't be told", "error", err)
		}
	}
}
