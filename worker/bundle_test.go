package worker

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/internal/natstest"
	"github.com/ownllm/ownllm/schemas"
)

// wire is what the runs of a worker send, as it goes over the bus. Nothing gathers or sends by
// itself.
type wire struct {
	w    *Worker
	nc   *nats.Conn // of all owners
	sent *nats.Subscription
}

func newWire(t *testing.T) *wire {
	t.Helper()
	server := natstest.Start(t)
	l := &wire{w: newTestWorker(t, server, server.Connect("worker")), nc: server.Connect("owners")}
	var err error
	if l.sent, err = l.nc.SubscribeSync(schemas.Prefix + "out.>"); err != nil {
		t.Fatal(err)
	}
	if err := l.nc.Flush(); err != nil {
		t.Fatal(err)
	}
	return l
}

// open opens a run, under the name of its nonce. Its claim and first chunk are sent.
func (l *wire) open(t *testing.T, owner schemas.OwnerID, name string, bundles bool) *sender {
	t.Helper()
	s := newSender(l.w, &schemas.Job{Nonce: schemas.Nonce(name), Owner: owner, Bundle: bundles}, "ack", func(error) {})
	s.claim(false)
	send(t, s, "x")
	return s
}

func send(t *testing.T, s *sender, payloads ...string) {
	t.Helper()
	for _, payload := range payloads {
		if err := s.chunk(t.Context(), []byte(payload), 1); err != nil {
			t.Fatal(err)
		}
	}
}

// messages lists what was sent since the last call, a message each: "a1 b2" is a bundle for
// the owner that has the frames number 1 and 2 of the runs a and b, "a claim" a frame.
func (l *wire) messages(t *testing.T) (list []string) {
	t.Helper()
	if err := errors.Join(l.w.tokens.Flush(), l.nc.Flush()); err != nil {
		t.Fatal(err)
	}
	for {
		n, _, err := l.sent.Pending()
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			return list
		}
		m, err := l.sent.NextMsg(patience)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, describe(t, m))
	}
}

func describe(t *testing.T, m *nats.Msg) string {
	t.Helper()
	tokens := strings.Split(m.Subject, ".")
	if !schemas.IsBundle(m.Subject) {
		f, err := schemas.DecodeFrame(m.Data)
		if err != nil {
			t.Fatal(err)
		}
		if f.Kind == schemas.FrameChunk {
			return fmt.Sprintf("%s%d", tokens[5], f.Seq)
		}
		return tokens[5] + " " + string(f.Kind)
	}
	if m.Reply != "" {
		t.Errorf("a bundle asks for an answer")
	}
	text := "to " + tokens[4] + ":"
	for left := m.Data; len(left) > 0; {
		var nonce schemas.Nonce
		var frame []byte
		var err error
		if nonce, frame, left, err = schemas.CutEntry(left); err != nil {
			t.Fatal(err)
		}
		f, err := schemas.DecodeFrame(frame)
		if err != nil || f.Kind != schemas.FrameChunk {
			t.Fatalf("a bundle has the frame %+v, %v", f, err)
		}
		text += fmt.Sprintf(" %s%d", nonce, f.Seq)
	}
	return text
}

func (l *wire) want(t *testing.T, what string, want ...string) {
	t.Helper()
	if diff := cmp.Diff(want, l.messages(t)); diff != "" {
		t.Errorf("%s (-want +sent):\n%s", what, diff)
	}
}

// Frames wait for each other only where many come, and what a run sends by itself comes behind
// what it sent before.
func TestBundles(t *testing.T) {
	l := newWire(t)
	a, b := l.open(t, "own_1", "a", true), l.open(t, "own_1", "b", true)
	send(t, a, "x")
	l.want(t, "few frames", "a claim", "a1", "b claim", "b1", "a2")

	l.w.bundles.many.Store(true)
	c, old := l.open(t, "own_2", "c", true), l.open(t, "own_1", "old", false)
	send(t, old, "x")
	l.want(t, "first tokens, and an owner that doesn't take bundles", "c claim", "c1", "old claim", "old1", "old2")
	for _, s := range []*sender{a, b, c, a} {
		send(t, s, "x")
	}
	l.want(t, "while they wait")
	send(t, old, "x")
	c.tick(c.reported.Add(progressEvery), true, false)
	l.want(t, "a report", "old3", "to own_2: c2", "c claim")
	l.w.bundles.sendAll()
	l.w.bundles.sendAll()
	l.want(t, "once they have waited", "to own_1: a3 b2 a4")

	send(t, a, "x")
	send(t, b, "x")
	a.done([]byte("x"), 1, schemas.Usage{})
	send(t, b, "x")
	b.fail(schemas.Errorf(schemas.CodeBackendError, "x"))
	l.want(t, "ends", "to own_1: a5 b3", "a done", "to own_1: b4", "b error")

	send(t, c, "x")
	l.w.bundles.many.Store(false)
	send(t, c, "x", "x")
	l.want(t, "few frames again", "to own_2: c3", "c4", "c5")
}

// What is sent again goes the same way.
func TestSentAgainInABundle(t *testing.T) {
	l := newWire(t)
	a := l.open(t, "own_1", "a", true)
	l.w.bundles.many.Store(true)
	send(t, a, "x", "x")
	l.w.bundles.sendAll()
	l.messages(t)
	a.answered(schemas.Verdict{Go: true, Seq: 3, Next: 2}, time.Now())
	send(t, a, "x")
	l.w.bundles.sendAll()
	l.want(t, "after a gap", "to own_1: a2 a3 a4")
}

// Large frames go by themselves, and a bundle stays below the limit of the bus.
func TestSizeOfBundles(t *testing.T) {
	l := newWire(t)
	a, b := l.open(t, "own_1", "a", true), l.open(t, "own_1", "b", true)
	l.w.bundles.many.Store(true)
	l.messages(t)
	send(t, a, "x")
	send(t, b, "x")
	send(t, a, strings.Repeat("x", maxEntry))
	l.want(t, "a large frame", "to own_1: a2 b2", "a3")

	const most = maxEntry - 100
	for range 2 * maxBundle / most {
		send(t, a, strings.Repeat("x", most))
	}
	l.w.bundles.sendAll()
	if err := errors.Join(l.w.tokens.Flush(), l.nc.Flush()); err != nil {
		t.Fatal(err)
	}
	n, bytes, err := l.sent.Pending()
	if err != nil || n < 2 || n > 3 || bytes > n*maxBundle {
		t.Errorf("%d bundles have %d bytes, %v", n, bytes, err)
	}
}

// What counts are the frames for each owner, and the runs that are at hand.
func TestManyFrames(t *testing.T) {
	for _, tc := range []struct {
		runs, owners int
		frames       int64 // in passed
		passed       time.Duration
		want         bool
	}{
		{0, 1, 0, pumpEvery, false},
		{1, 1, 1e6, pumpEvery, false},
		{bundleRuns - 1, 1, 1e6, pumpEvery, false},
		{bundleRuns, 1, 199, pumpEvery, false},
		{bundleRuns, 1, 200, pumpEvery, true},
		{bundleRuns, 1, 200, 2 * pumpEvery, false},
		{2000, 1, 200, pumpEvery, true},
		{2000, 3, 599, pumpEvery, false},
		{2000, 3, 600, pumpEvery, true},
	} {
		b := newBundles(testAgent, nil, natstest.Log)
		var runs []*run
		for i := range tc.runs {
			runs = append(runs, &run{sender: &sender{owner: schemas.OwnerID(fmt.Sprint("own_", i%tc.owners))}})
		}
		now := time.Now()
		b.sent.Store(1e6)
		b.look(now, nil) // what was before doesn't count
		b.sent.Store(tc.frames)
		b.look(now.Add(pumpEvery/3), runs) // nor does what comes in no time
		b.look(now.Add(tc.passed), runs)
		if b.many.Load() != tc.want {
			t.Errorf("%+v: frames are gathered: %t", tc, !tc.want)
		}
	}
}

// Nobody has to send a bundle by hand, nor waits for one when the worker ends.
func TestBundlesAreSent(t *testing.T) {
	l := newWire(t)
	a := l.open(t, "own_1", "a", true)
	l.w.bundles.many.Store(true)
	l.messages(t)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- l.w.bundles.run(ctx) }()
	for seq := 2; seq < 5; seq++ {
		send(t, a, "x")
		m, err := l.sent.NextMsg(patience)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := describe(t, m), fmt.Sprintf("to own_1: a%d", seq); got != want {
			t.Errorf("%s was sent, want %s", got, want)
		}
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	send(t, a, "x")
	if err := l.w.bundles.run(ctx); err != nil {
		t.Error(err)
	}
	l.want(t, "at the end", "to own_1: a5")
}

// While a bundle waits for the bus, the next one is filled, and nobody waits for it but who has
// to come behind it, or has nowhere to put a frame.
func TestBundlesAreFilledMeanwhile(t *testing.T) {
	l := newWire(t)
	a, b := l.open(t, "own_1", "a", true), l.open(t, "own_1", "b", true)
	l.w.bundles.many.Store(true)
	l.messages(t)
	begin := func(f func()) (done chan struct{}) {
		done = make(chan struct{})
		go func() {
			defer close(done)
			f()
		}()
		return done
	}
	leaving := func() int {
		l.w.bundles.mu.Lock()
		defer l.w.bundles.mu.Unlock()
		return len(l.w.bundles.leaving)
	}

	send(t, a, "x")
	l.w.bundles.out.Lock() // as if the bus took its time
	sending := begin(l.w.bundles.sendAll)
	for leaving() == 0 {
		runtime.Gosched()
	}
	send(t, b, "x")
	send(t, a, "x")
	ending := begin(func() { a.done([]byte("x"), 1, schemas.Usage{}) })
	for leaving() < 2 {
		runtime.Gosched()
	}
	send(t, b, "x")
	l.want(t, "while the bus takes its time")
	l.w.bundles.out.Unlock()
	<-sending
	<-ending
	l.w.bundles.sendAll()
	l.want(t, "after that", "to own_1: a2", "to own_1: b2 a3", "a done", "to own_1: b3")

	l.w.bundles.out.Lock()
	for n := range maxLeaving {
		send(t, b, "x")
		begin(l.w.bundles.sendAll)
		for leaving() <= n {
			runtime.Gosched()
		}
	}
	filling := begin(func() { send(t, b, "x") })
	select {
	case <-filling:
		t.Error("what waits for the bus has no bound")
	case <-time.After(50 * time.Millisecond):
	}
	l.w.bundles.out.Unlock()
	<-filling
	l.w.bundles.sendAll()
}
