// Package floor is the least that a path of the broker's shape can cost: HTTP in, over NATS
// to a worker, to the backend, and its reply back. It is made of the same parts, in one
// process as `ownllm up` is, and has nothing on: no keys, limits, claims, heartbeats or
// telemetry, no second try, and nothing survives a death.
//
// What is already there of a stream goes on together, and nothing waits for more of it: the
// worker sends what one read of the backend's reply returns in one message, and the edge
// writes at once what has come of them. So a long stream that comes faster than it is passed
// on costs fewer messages, here as in the broker.
//
// A path may be dearer by a durable queue, and by that and a round trip to Postgres. So what
// a broker costs more than the last of them is its own, and what that one costs more than a
// bare proxy no broker of this shape can save.
package floor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/gofiber/fiber/v2"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/natsd"
	"github.com/ownllm/ownllm/internal/collector"
)

// Config says which path it is.
type Config struct {
	// Backend is the base of the API to call, http://host:port.
	Backend string `json:"backend"`
	// Dir is an empty folder for the queue.
	Dir string `json:"dir"`
	// Queue has each job stored in a work queue of JetStream, pulled and acknowledged. Without
	// it, jobs go by core NATS.
	Queue bool `json:"queue"`
	// DatabaseURL, if it is set, has each request change a row in Postgres before its job is
	// published.
	DatabaseURL string `json:"database_url"`
}

const (
	token    = "floor"
	jobs     = "floor.job"
	replies  = "floor.out."
	leaves   = "floor.leave" // the id of a reply that nobody reads any more
	queue    = "FLOOR"
	rows     = 1000 // so many that requests seldom fight for one
	poolSize = 8
	// endWait is how long running replies may take to finish.
	endWait = time.Second
	// leaveWait is for how long an answer is waited for to the word that a client has left,
	// and leavePause how long it takes until that is said again.
	leaveWait  = time.Second
	leavePause = 100 * time.Millisecond
)

// What a frame is: its first byte.
const (
	frameChunk = 's' // some of a stream, cut anywhere
	frameWhole = 'w' // a whole reply
	frameEnd   = 'e' // of a stream
	frameFail  = 'f'
)

// path is the side of the clients.
type path struct {
	nc *nats.Conn
	js jetstream.JetStream // nil: no queue
	db *pgxpool.Pool       // nil: no Postgres

	mu   sync.Mutex
	last uint64
	open map[string]*inbox // by id, what comes of the requests that wait
}

// inbox has what has come of a reply, and nobody has read yet.
type inbox struct {
	wake chan struct{} // holds one token: there is some

	mu   sync.Mutex
	text net.Buffers // of a stream
	last []byte      // the frame that ends the reply, once it has come
}

func (b *inbox) put(frame []byte) {
	b.mu.Lock()
	if frame[0] == frameChunk {
		b.text = append(b.text, frame[1:])
	} else {
		b.last = frame
	}
	b.mu.Unlock()
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// wait waits until there is some of a stream, or the frame that ends the reply has come.
func (b *inbox) wait() (streams bool, last []byte) {
	for {
		b.mu.Lock()
		streams, last = len(b.text) > 0, b.last
		b.mu.Unlock()
		if streams || last != nil {
			return streams, last
		}
		<-b.wake
	}
}

// Serve runs a path until ctx ends. It says on stdout where it listens.
func Serve(ctx context.Context, cfg Config, stdout io.Writer) error {
	collector.Tune()
	log := slog.New(slog.DiscardHandler)
	server, err := natsd.Start(ctx, natsd.Config{Listen: "127.0.0.1:0", StoreDir: cfg.Dir, Token: token, Log: log})
	if err != nil {
		return err
	}
	defer server.Stop()
	address := bus.Config{URL: server.URL(), Password: token, InProcess: server}
	p := &path{open: make(map[string]*inbox)}
	if p.nc, err = bus.Connect(address.As(bus.UserCore, "edge"), log); err != nil {
		return err
	}
	defer p.nc.Close()
	own, err := bus.Connect(address.As(bus.UserCore, "worker"), log)
	if err != nil {
		return err
	}
	defer own.Close()
	if cfg.DatabaseURL != "" {
		if p.db, err = openRows(ctx, cfg.DatabaseURL); err != nil {
			return err
		}
		defer p.db.Close()
	}
	if cfg.Queue {
		if p.js, err = makeQueue(ctx, p.nc); err != nil {
			return err
		}
	}
	if _, err := p.nc.Subscribe(replies+"*", p.heard); err != nil {
		return fmt.Errorf("listen to replies: %w", err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	app := fiber.New(fiber.Config{DisableStartupMessage: true})
	app.Post("/v1/chat/completions", p.chat)
	group, groupCtx := errgroup.WithContext(ctx)
	group.Go(func() error {
		return (&worker{nc: own, url: cfg.Backend + "/v1/chat/completions"}).run(groupCtx, cfg.Queue)
	})
	group.Go(func() error { return app.Listener(listener) })
	group.Go(func() error {
		<-groupCtx.Done()
		_ = app.ShutdownWithTimeout(endWait) // what is left is cut off with the process
		return nil
	})
	if _, err := fmt.Fprintf(stdout, "listening on http://%s\n", listener.Addr()); err != nil {
		return err
	}
	return group.Wait()
}

// makeQueue makes a stream and a consumer as the broker's are.
func makeQueue(ctx context.Context, nc *nats.Conn) (jetstream.JetStream, error) {
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, fmt.Errorf("open JetStream: %w", err)
	}
	if _, err := js.CreateStream(ctx, jetstream.StreamConfig{
		Name: queue, Subjects: []string{jobs}, Retention: jetstream.WorkQueuePolicy, Storage: jetstream.FileStorage,
	}); err != nil {
		return nil, fmt.Errorf("make the queue: %w", err)
	}
	if _, err := js.CreateConsumer(ctx, queue, jetstream.ConsumerConfig{
		Durable: queue, AckPolicy: jetstream.AckExplicitPolicy, MaxAckPending: -1, MemoryStorage: true,
	}); err != nil {
		return nil, fmt.Errorf("make the consumer: %w", err)
	}
	return js, nil
}

// openRows makes the rows that requests change.
func openRows(ctx context.Context, url string) (*pgxpool.Pool, error) {
	cfg, err := pgxpool.ParseConfig(url)
	if err != nil {
		return nil, errors.New("the address of Postgres makes no sense") // the reason may hold a password
	}
	cfg.MaxConns = poolSize
	db, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("open Postgres: %w", err)
	}
	for _, statement := range []string{
		`CREATE TABLE bench_floor (id int PRIMARY KEY, n bigint NOT NULL)`,
		`INSERT INTO bench_floor SELECT id, 0 FROM generate_series(1, ` + strconv.Itoa(rows) + `) AS id`,
	} {
		if _, err := db.Exec(ctx, statement); err != nil {
			db.Close()
			return nil, fmt.Errorf("make rows: %w", err)
		}
	}
	return db, nil
}

// chat takes a request, and waits for the first of its reply, which says what it is.
func (p *path) chat(c *fiber.Ctx) error {
	ctx := c.UserContext()
	if p.db != nil {
		if _, err := p.db.Exec(ctx, `UPDATE bench_floor SET n = n + 1 WHERE id = $1`, 1+rand.N(rows)); err != nil {
			return err
		}
	}
	id, in := p.begin()
	job := append([]byte(id+"\n"), c.Body()...)
	var err error
	if p.js != nil {
		_, err = p.js.Publish(ctx, jobs, job)
	} else {
		err = p.nc.Publish(jobs, job)
	}
	if err != nil {
		p.end(id)
		return err
	}
	switch streams, last := in.wait(); {
	case streams:
		c.Response().Header.SetContentType("text/event-stream")
		c.Context().SetBodyStream(&stream{p: p, id: id, in: in}, -1)
	case last[0] == frameWhole:
		p.end(id)
		c.Response().Header.SetContentType(fiber.MIMEApplicationJSON)
		c.Response().SetBodyRaw(last[1:])
	default:
		p.end(id)
		return fiber.ErrBadGateway
	}
	return nil
}

// begin makes room for the reply of a request.
func (p *path) begin() (string, *inbox) {
	in := &inbox{wake: make(chan struct{}, 1)}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last++
	id := strconv.FormatUint(p.last, 10)
	p.open[id] = in
	return id, in
}

func (p *path) end(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.open, id)
}

// heard gives a frame to the request that waits for it.
func (p *path) heard(m *nats.Msg) {
	p.mu.Lock()
	in := p.open[m.Subject[len(replies):]]
	p.mu.Unlock()
	if in != nil { // else nobody waits any more
		in.put(m.Data)
	}
}

// stream is the body of a reply that is streamed. The server sends what each Read returns at
// once.
type stream struct {
	p  *path
	id string
	in *inbox
}

// Read implements io.Reader. It returns what has come and fits, and waits if nothing has.
func (s *stream) Read(b []byte) (int, error) {
	streams, last := s.in.wait()
	switch {
	case streams:
		s.in.mu.Lock()
		defer s.in.mu.Unlock()
		n, _ := s.in.text.Read(b) // more may come behind its end
		return n, nil
	case last[0] == frameEnd:
		return 0, io.EOF
	default:
		return 0, io.ErrUnexpectedEOF
	}
}

// Close implements io.Closer. The server calls it at the end, and when the client has left.
func (s *stream) Close() error {
	s.p.end(s.id)
	s.in.mu.Lock()
	over := s.in.last != nil
	s.in.mu.Unlock()
	if over {
		return nil
	}
	return s.p.leave(s.id)
}

// leave tells the worker that nobody reads a reply any more, again and again until it has heard:
// on busy cores a connection may be down for a moment, and what is said then is lost.
func (p *path) leave(id string) error {
	for {
		_, err := p.nc.Request(leaves, []byte(id), leaveWait)
		if err == nil || errors.Is(err, nats.ErrConnectionClosed) {
			return err
		}
		time.Sleep(leavePause)
	}
}

// cut splits a job into the id of its request and the body.
func cut(job []byte) (id string, body []byte) {
	head, body, _ := bytes.Cut(job, []byte{'\n'})
	return string(head), body
}
