package load

import (
	"bytes"
	"context"
	"encoding/json"
	"math"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// stage is one level of load: its warm-up, its window, and what was measured in it.
type stage struct {
	config         *Config
	level          Level
	number         int
	look           func(Progress)
	text           *prose
	heads          [][]byte // of requests, one for each key
	extra          []byte   // fields of the body, each after a comma
	extraDemo      []byte   // likewise, of its field demo
	dial           func(context.Context) (net.Conn, error)
	conns          conns
	record         recorder
	inFlight       atomic.Int64
	tokens         atomic.Int64 // that have arrived
	left           atomic.Int64 // requests that may still begin, where their number is given
	requestsAreOut chan struct{}
}

func newStage(c *Config, level Level, text *prose) *stage {
	s := &stage{
		config: c, level: level, text: text, heads: requestHeads(c), dial: dialer(c), requestsAreOut: make(chan struct{}),
	}
	s.extra, s.extraDemo = splitExtra(c.Extra, c.Verify)
	s.record.init()
	return s
}

// splitExtra returns the fields of Extra as they are laid into a body; the field demo for
// itself where it is to be merged.
func splitExtra(extra json.RawMessage, verify bool) (fields, demo []byte) {
	if len(extra) == 0 {
		return nil, nil
	}
	var all map[string]json.RawMessage
	_ = json.Unmarshal(extra, &all) // CheckExtra has
	if inner, ok := all["demo"]; ok && verify {
		demo = commaFields(inner)
		delete(all, "demo")
	}
	b, _ := json.Marshal(all) // what was JSON is
	return commaFields(b), demo
}

// commaFields is the inside of an object after a comma, or nothing if it is empty.
func commaFields(object []byte) []byte {
	object = bytes.TrimSpace(object)
	inside := bytes.TrimSpace(object[1 : len(object)-1])
	if len(inside) == 0 {
		return nil
	}
	return append([]byte{','}, inside...)
}

// conns are the open connections, so that all can be closed at once.
type conns struct {
	mu     sync.Mutex // guards what follows
	all    map[net.Conn]struct{}
	closed bool
}

func (c *conns) add(conn net.Conn) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return false
	}
	if c.all == nil {
		c.all = make(map[net.Conn]struct{})
	}
	c.all[conn] = struct{}{}
	return true
}

func (c *conns) remove(conn net.Conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.all, conn)
}

func (c *conns) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	for conn := range c.all {
		_ = conn.Close()
	}
}

// run runs the stage. measured is false if it ended before there was anything to measure.
func (s *stage) run(ctx context.Context) (result StageReport, measured bool) {
	// Whoever waits in a read learns by its connection that the run is over.
	stop := context.AfterFunc(ctx, s.conns.close)
	defer stop()
	defer s.conns.close()
	if s.config.Open {
		measured = s.open(ctx)
	} else {
		measured = s.closed(ctx)
	}
	if !measured {
		return StageReport{}, false
	}
	return s.record.report(s), true
}

// window runs fn between the start of the window and its end, and looks at what happens
// meanwhile. fn returns when the window ends; after that, wait returns when all requests
// have ended.
func (s *stage) window(fn func(start time.Time), wait func()) {
	s.record.begin(s.tokens.Load())
	start := s.record.start
	ended := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() { s.record.client.probe(ended) })
	watching.Go(func() { s.watch(ended, start, false) })
	fn(start)
	if s.config.Duration > 0 {
		s.record.end(s.tokens.Load())
		wait()
	} else {
		wait()
		s.record.end(s.tokens.Load())
	}
	close(ended)
	watching.Wait()
}

// watchEvery is how often progress is shown, and a point of the series taken.
const watchEvery = 500 * time.Millisecond

func (s *stage) interval() time.Duration {
	if d := s.config.Duration; d > 0 {
		return min(max(d/60, 100*time.Millisecond), time.Second)
	}
	return watchEvery
}

// watch takes a point of the series each interval, and shows it.
func (s *stage) watch(ended <-chan struct{}, start time.Time, warmUp bool) {
	whole := s.config.Duration
	if warmUp {
		whole = s.config.WarmUp
	}
	ticker := time.NewTicker(s.interval())
	defer ticker.Stop()
	before, tokens := start, s.tokens.Load()
	for {
		select {
		case <-ended:
			return
		case now := <-ticker.C:
			total := s.tokens.Load()
			p := s.record.point(now.Sub(start), now.Sub(before), total-tokens, s.inFlight.Load())
			before, tokens = now, total
			if warmUp {
				s.look(Progress{Level: s.level, Stage: s.number, Stages: len(s.config.Levels), WarmUp: true, Elapsed: now.Sub(start), Whole: whole, Point: p})
				continue
			}
			ok, failed, broken := s.record.keep(p)
			s.look(Progress{
				Level: s.level, Stage: s.number, Stages: len(s.config.Levels), Elapsed: now.Sub(start), Whole: whole, Point: p,
				OK: ok, Failed: failed, Broken: broken,
			})
		}
	}
}

// warmUp shows progress while fn runs.
func (s *stage) warmUp(fn func(start time.Time)) {
	if s.config.WarmUp <= 0 {
		return
	}
	start, ended := time.Now(), make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() { s.watch(ended, start, true) })
	fn(start)
	close(ended)
	watching.Wait()
}

// claim reports whether a further request may begin. Where the window has a duration, it
// always may.
func (s *stage) claim() bool {
	if s.config.Duration > 0 {
		return true
	}
	n := s.left.Add(-1)
	if n == 0 {
		close(s.requestsAreOut)
	}
	return n >= 0
}

// pause waits, and reports whether it was long enough.
func pause(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// connectPause is how long a client of a closed loop waits after it couldn't connect, so
// that a server that isn't there doesn't cost a core.
const connectPause = 100 * time.Millisecond

// closed runs clients, each of which sends one request after the other.
func (s *stage) closed(ctx context.Context) bool {
	measuring, stopping := make(chan struct{}), make(chan struct{})
	from, until := s.level.clients(s.config.Duration)
	var (
		group sync.WaitGroup
		start time.Time // of the window; read once measuring is closed
	)
	loop, cancel := context.WithCancel(ctx) // ends the pauses of clients, not their requests
	defer cancel()
	for i := range from {
		c := newClient(s, uint64(i)+1)
		group.Go(func() {
			defer c.close()
			if from[i] > 0 || s.config.WarmUp <= 0 {
				select {
				case <-measuring:
				case <-loop.Done():
					return
				}
				if !pause(loop, time.Until(start.Add(from[i]))) {
					return
				}
			}
			c.loop(ctx, loop, measuring, stopping, func(now time.Time) bool { return now.Sub(start) >= until[i] })
		})
	}
	s.warmUp(func(time.Time) { pause(ctx, s.config.WarmUp) })
	measured := ctx.Err() == nil
	if measured {
		s.left.Store(int64(s.config.Requests))
		s.window(func(at time.Time) {
			start = at
			close(measuring)
			if s.config.Duration > 0 {
				pause(ctx, s.config.Duration)
			} else {
				select {
				case <-s.requestsAreOut:
				case <-ctx.Done():
				}
			}
			close(stopping)
			cancel()
		}, group.Wait)
	}
	cancel()
	group.Wait()
	return measured
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// loop sends requests until it is to stop, by stopping or by gone, which may be asked once
// measuring is closed.
func (c *client) loop(ctx, loop context.Context, measuring, stopping <-chan struct{}, gone func(time.Time) bool) {
	counts := false
	for loop.Err() == nil && !isClosed(stopping) {
		if !counts {
			counts = isClosed(measuring)
		}
		now := time.Now()
		if counts && (gone(now) || !c.stage.claim()) {
			return
		}
		c.do(ctx, now, counts)
		if c.conn == nil && c.reply.status == 0 && !pause(loop, connectPause) {
			return
		}
	}
}

// open sends requests when they arrive, however many are in flight.
func (s *stage) open(ctx context.Context) bool {
	flight := &flight{stage: s, room: make(chan struct{}, s.config.MaxInFlight)}
	s.warmUp(func(start time.Time) {
		flight.launch(ctx, start, s.config.WarmUp, math.MaxInt, s.arrivals(1, s.level.From, s.level.From, 0), false)
	})
	measured := ctx.Err() == nil
	if measured {
		most, d := math.MaxInt, s.config.Duration
		ramp := d
		if d == 0 {
			most, d, ramp = s.config.Requests, math.MaxInt64, 0
		}
		if s.level.From == s.level.To {
			ramp = 0
		}
		s.window(func(start time.Time) {
			flight.launch(ctx, start, d, most, s.arrivals(2, s.level.From, s.level.To, ramp), true)
		}, flight.group.Wait)
	}
	flight.group.Wait()
	flight.close()
	return measured
}

func (s *stage) arrivals(stream uint64, from, to float64, ramp time.Duration) *arrivals {
	return &arrivals{from: from, to: to, ramp: ramp, even: s.config.Even, rng: newRand(s.config.Seed, math.MaxUint64-stream)}
}

// flight are the requests of an open loop.
type flight struct {
	stage *stage
	room  chan struct{} // holds a place for each request in flight
	group sync.WaitGroup

	mu   sync.Mutex // guards what follows
	idle []*client
	made uint64
}

// launch sends what arrives from start on, for a time or a number. Requests that came late
// into the air, because the client was or too many were in it, still count from when they
// arrived.
func (f *flight) launch(ctx context.Context, start time.Time, d time.Duration, most int, a *arrivals, counts bool) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for range most {
		after := a.next()
		if after >= d {
			pause(ctx, time.Until(start.Add(d)))
			return
		}
		intended := start.Add(after)
		if wait := time.Until(intended); wait > 0 {
			timer.Reset(wait)
			select {
			case <-timer.C:
			case <-ctx.Done():
				return
			}
		}
		if ctx.Err() != nil {
			return
		}
		if !f.board(ctx, intended, counts) {
			if ctx.Err() != nil {
				return
			}
			if counts {
				f.stage.record.unsent()
			}
			continue
		}
		c := f.take()
		f.group.Go(func() {
			c.do(ctx, intended, counts)
			f.give(c)
			<-f.room
		})
	}
}

// board waits for a place in flight, at most as long as a reply may take.
func (f *flight) board(ctx context.Context, intended time.Time, counts bool) bool {
	select {
	case f.room <- struct{}{}:
		if counts {
			f.stage.record.client.launched(time.Since(intended))
		}
		return true
	default:
	}
	timer := time.NewTimer(max(time.Until(intended.Add(f.stage.config.Timeout)), 0))
	defer timer.Stop()
	select {
	case f.room <- struct{}{}:
		return true
	case <-timer.C:
	case <-ctx.Done():
	}
	return false
}

// take takes the client that was used last, whose connection is the freshest.
func (f *flight) take() *client {
	f.mu.Lock()
	defer f.mu.Unlock()
	if n := len(f.idle); n > 0 {
		c := f.idle[n-1]
		f.idle = f.idle[:n-1]
		return c
	}
	f.made++
	return newClient(f.stage, f.made)
}

func (f *flight) give(c *client) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.idle = append(f.idle, c)
}

func (f *flight) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.idle {
		c.close()
	}
}
