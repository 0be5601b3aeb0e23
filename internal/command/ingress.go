package command

import (
	"context"
	"errors"
	"log/slog"
	"sync"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/ingress"
)

// publisherDoor is the NATS door of an owner. When the nats-server that it is connected to is
// about to end, it opens a second door at another one, and lets the first take nothing new and
// finish what runs there: else those replies would end with an error, since nobody knows what
// a connection that is lost takes with it.
type publisherDoor struct {
	open  func() (*openDoor, error)
	first *openDoor
	log   *slog.Logger
}

// openDoor is an ingress with a connection of its own. lame holds a token once the server of
// that is about to end.
type openDoor struct {
	*ingress.Ingress
	conn *nats.Conn
	lame chan struct{}
}

// newIngress returns the NATS door of an owner, which has connected.
func newIngress(w *owner, natsConfig bus.Config, tel *tele, submissions ingress.Submissions, cfg ingress.Config, log *slog.Logger) (*publisherDoor, error) {
	cfg.Version = Version()
	d := &publisherDoor{log: log}
	d.open = func() (*openDoor, error) {
		lame := make(chan struct{}, 1)
		conn, err := bus.Connect(natsConfig.As(bus.UserIngress, "ownllm-ingress"), log, nats.LameDuckModeHandler(func(*nats.Conn) {
			select {
			case lame <- struct{}{}:
			default:
			}
		}))
		if err != nil {
			return nil, unreachableError{err}
		}
		return &openDoor{ingress.New(cfg, ingress.Parts{
			Conn: conn, Keys: w.keys, Desk: w.desk, Dispatcher: w.dispatcher, Submissions: submissions,
			Metrics: tel.metrics, Tracer: tel.tracer, Log: log,
		}), conn, lame}, nil
	}
	var err error
	d.first, err = d.open()
	return d, err
}

// close ends the connection of a door that was never run.
func (d *publisherDoor) close() { d.first.conn.Close() }

// Run answers publishers until ctx ends, and drains then.
func (d *publisherDoor) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var handing sync.WaitGroup
	defer handing.Wait()
	defer cancel()
	ended := make(chan error)
	running := 0
	start := func(door *openDoor) (leave context.CancelFunc) {
		running++
		doorCtx, leave := context.WithCancel(ctx)
		go func() {
			err := door.Ingress.Run(doorCtx)
			door.conn.Close()
			if err == nil && doorCtx.Err() == nil {
				err = errors.New("the door has closed by itself")
			}
			ended <- err
		}()
		return leave
	}
	door := d.first
	leave := start(door)
	defer func() { leave() }()
	var errs []error
	for running > 0 {
		select {
		case err := <-ended:
			running--
			if err != nil {
				errs = append(errs, err)
				cancel()
			}
		case <-door.lame:
			next, err := d.open()
			if err != nil {
				d.log.Warn("no other server for publishers", "error", err)
				continue
			}
			d.log.Info("the server of publishers is about to end, another one is used", "server", next.conn.ConnectedUrlRedacted())
			last := leave
			door, leave = next, start(next)
			handing.Go(func() {
				select {
				case <-next.Opened():
				case <-ctx.Done():
				}
				last()
			})
		}
	}
	return errors.Join(errs...)
}
