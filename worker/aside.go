package worker

import (
	"context"
	"errors"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/schemas"
)

// ErrRemoved says that the worker's agent was removed, so that it will never be let in
// again.
//
// The bus alone can't tell: it refuses in the same words whoever it doesn't know and
// everybody, while nobody can look into the books. So a worker takes it for true only if the
// server says beside the bus that it doesn't know the credential, each time that it is asked
// for as long as Config.GiveUp, while the bus refuses, too. A server that doesn't answer, or
// can't look into the books itself, says nothing; a worker that knows none never gives up.
var ErrRemoved = errors.New("the server doesn't know this machine any more: its agent was removed")

// DefaultGiveUp is for how long a worker has to be turned away before it believes it.
const DefaultGiveUp = 30 * time.Second

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
		sure  dismissal
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
				told, away, pause, sure = "", false, time.Time{}, dismissal{}
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
		if !errors.As(err, &refused) || refused.Code != schemas.CodeKeyInvalid {
			sure = dismissal{}
		}
		switch {
		case ctx.Err() != nil:
		case err == nil:
			if told == "" {
				w.log.Info("no link to the bus, the server is told over HTTP")
			}
			told, away = hash, false
		case refused != nil && refused.Code == schemas.CodeKeyInvalid:
			now := time.Now()
			pause = now.Add(w.cfg.GiveUp / askedAgain)
			if sure.times == 0 {
				w.log.Error("the server turns this worker away", "code", refused.Code, "error", refused.Message)
			}
			if sure.add(now, errors.Is(w.tokens.LastError(), nats.ErrAuthorization)) >= w.cfg.GiveUp {
				signal(w.dismissed)
			}
		case refused != nil && refused.Code != schemas.CodeInternalError:
			pause = time.Now().Add(asidePause)
			w.log.Error("the server turns this worker away", "code", refused.Code, "error", refused.Message)
		case !away:
			away = true
			w.log.Warn("no link to the bus, and the server can't be told", "error", err)
		}
	}
}

// askedAgain is how often within Config.GiveUp the server is asked again whether it means it.
const askedAgain = 3

// dismissal is what speaks for it that the agent was removed.
type dismissal struct {
	times int       // how often the server has said so without saying anything else
	since time.Time // when both the server and the bus began to turn the worker away
}

// add takes in that the server has turned the worker away, and whether the bus does, too,
// and returns for how long both have.
func (d *dismissal) add(now time.Time, bus bool) time.Duration {
	d.times++
	switch {
	case !bus:
		d.since = time.Time{}
		return 0
	case d.since.IsZero():
		d.since = now
	}
	return now.Sub(d.since)
}
