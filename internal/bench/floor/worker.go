package floor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	// backendConns is more than there are clients, see net/http.Transport.
	backendConns = 256
	// readSize is as much of a stream as net/http has of it, and the broker's worker reads.
	readSize = 4 << 10
)

// worker is the side of the backend.
type worker struct {
	nc     *nats.Conn
	url    string
	client http.Client
	jobs   sync.WaitGroup

	mu      sync.Mutex
	running map[string]context.CancelFunc // by id
}

// run takes jobs until ctx ends.
func (w *worker) run(ctx context.Context, queued bool) error {
	transport := &http.Transport{MaxIdleConnsPerHost: backendConns, DisableCompression: true}
	defer transport.CloseIdleConnections()
	w.client.Transport = transport
	w.running = make(map[string]context.CancelFunc)
	if _, err := w.nc.Subscribe(leaves, w.left); err != nil {
		return fmt.Errorf("listen to those who leave: %w", err)
	}
	take := w.listen
	if queued {
		take = w.pull
	}
	stop, err := take(ctx)
	if err != nil {
		return fmt.Errorf("take jobs: %w", err)
	}
	<-ctx.Done()
	stop()
	w.jobs.Wait()
	return nil
}

// listen takes jobs from core NATS.
func (w *worker) listen(ctx context.Context) (stop func(), err error) {
	sub, err := w.nc.QueueSubscribe(jobs, "workers", func(m *nats.Msg) { w.jobs.Go(func() { w.serve(ctx, m.Data) }) })
	return func() { _ = sub.Unsubscribe() }, err // the connection ends, too
}

// pull takes jobs from the queue, and acknowledges each when it is done.
func (w *worker) pull(ctx context.Context) (stop func(), err error) {
	js, err := jetstream.New(w.nc)
	if err != nil {
		return nil, err
	}
	consumer, err := js.Consumer(ctx, queue, queue)
	if err != nil {
		return nil, err
	}
	pulling, err := consumer.Consume(func(m jetstream.Msg) {
		w.jobs.Go(func() {
			w.serve(ctx, m.Data())
			_ = m.Ack() // else it is delivered again
		})
	})
	if err != nil {
		return nil, err
	}
	return func() {
		pulling.Stop()
		<-pulling.Closed()
	}, nil
}

// serve does a job.
func (w *worker) serve(ctx context.Context, job []byte) {
	id, body := cut(job)
	ctx, cancel := context.WithCancel(ctx)
	w.mu.Lock()
	w.running[id] = cancel
	w.mu.Unlock()
	defer w.cancel(id)
	subject := replies + id
	last := []byte{frameEnd}
	if err := w.call(ctx, subject, body); errors.Is(err, errWhole) {
		return
	} else if err != nil {
		last[0] = frameFail
	}
	_ = w.nc.Publish(subject, last) // there is nobody to tell
}

// left ends the job of a client who has left, and says that it has heard.
func (w *worker) left(m *nats.Msg) {
	w.cancel(string(m.Data))
	_ = m.Respond(nil) // else it is said again
}

// cancel ends a job, if it runs.
func (w *worker) cancel(id string) {
	w.mu.Lock()
	cancel := w.running[id]
	delete(w.running, id)
	w.mu.Unlock()
	if cancel != nil {
		cancel()
	}
}

// errWhole says that the reply was not a stream, and needs no end.
var errWhole = errors.New("whole")

// call asks the backend, and sends its reply on: a frame for what each read of a stream returns.
func (w *worker) call(ctx context.Context, subject string, body []byte) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, w.url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := w.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	if !strings.HasPrefix(resp.Header.Get("Content-Type"), "text/event-stream") {
		whole, err := io.ReadAll(resp.Body)
		if err == nil {
			err = w.nc.Publish(subject, append([]byte{frameWhole}, whole...))
		}
		if err != nil {
			return err
		}
		return errWhole
	}
	frame := make([]byte, 1+readSize)
	frame[0] = frameChunk
	for {
		n, err := resp.Body.Read(frame[1:])
		if n > 0 {
			if err := w.nc.Publish(subject, frame[:1+n]); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
