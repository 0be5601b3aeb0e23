package worker

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/internal/natstest"
	"github.com/ownllm/ownllm/schemas"
)

// lone is a sender whose owner the test plays.
type lone struct {
	*sender
	nc      *nats.Conn // of the owner
	frames  *nats.Subscription
	stopped error
}

// newTestWorker returns a worker that doesn't run.
func newTestWorker(t *testing.T, server *natstest.Server, tokens *nats.Conn) *Worker {
	t.Helper()
	bulk := bus.NewSideline(server.Config("bulk"), BulkRest, natstest.Log)
	t.Cleanup(bulk.Close)
	return New(tokens, bulk, Config{Tenant: testTenant, Agent: testAgent}, natstest.Log)
}

func newLone(t *testing.T) *lone {
	t.Helper()
	server := natstest.Start(t)
	w := newTestWorker(t, server, server.Connect("worker"))
	job := &schemas.Job{Request: "req_1", Nonce: schemas.NewNonce(), Owner: "own_1", Tenant: testTenant, Model: testModel}
	l := &lone{nc: server.Connect("owner")}
	l.sender = newSender(w, job, "ack", func(cause error) { l.stopped = cause })
	var err error
	if l.frames, err = l.nc.SubscribeSync(l.subject); err != nil {
		t.Fatal(err)
	}
	if err := l.nc.Flush(); err != nil {
		t.Fatal(err)
	}
	return l
}

// sent counts the frames of each kind that have been sent since the last call.
func (l *lone) sent(t *testing.T) map[schemas.FrameKind]int {
	t.Helper()
	if err := errors.Join(l.w.tokens.Flush(), l.nc.Flush()); err != nil {
		t.Fatal(err)
	}
	kinds := make(map[schemas.FrameKind]int)
	for {
		n, _, err := l.frames.Pending()
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			return kinds
		}
		m, err := l.frames.NextMsg(patience)
		if err != nil {
			t.Fatal(err)
		}
		f, err := schemas.DecodeFrame(m.Data)
		if err != nil {
			t.Fatal(err)
		}
		if f.Kind != schemas.FrameChunk && m.Reply == "" {
			t.Errorf("a frame of kind %s doesn't ask for an answer", f.Kind)
		}
		kinds[f.Kind]++
	}
}

// An owner that answers nothing is given up after ownerSilence, but not for the time in
// which nobody could be heard.
func TestSilentOwner(t *testing.T) {
	l := newLone(t)
	l.claim(false)
	now := l.spoke
	l.answered(schemas.Verdict{Go: true, Next: 1}, now)
	l.tick(now.Add(ownerSilence), true, true)
	l.tick(now.Add(ownerSilence+time.Hour), false, true)
	now = now.Add(ownerSilence + time.Hour)
	l.tick(now.Add(ownerSilence), true, true)
	if l.stopped != nil {
		t.Fatalf("the run was stopped too early: %v", l.stopped)
	}
	l.tick(now.Add(ownerSilence+1), true, true)
	if !errors.Is(l.stopped, errOwnerGone) || !closed(l.heard) {
		t.Errorf("the run goes on for an owner that is silent: %v", l.stopped)
	}
	l.sent(t)
	l.tick(now.Add(ownerSilence+time.Second), true, true)
	if kinds := l.sent(t); len(kinds) != 0 {
		t.Errorf("it goes on to report: %v", kinds)
	}
}

// An owner that the bus doesn't find is given up after ownerWait. The time without a bus
// doesn't count: both come back at their own pace, and the worker may be first.
func TestMissingOwner(t *testing.T) {
	l := newLone(t)
	l.claim(false)
	now := time.Now()
	l.ownerSilent(now)
	l.ownerSilent(now.Add(ownerWait))
	l.answered(schemas.Verdict{Go: true, Next: 1}, now.Add(ownerWait)) // it was reconnecting
	l.ownerSilent(now.Add(ownerWait + time.Second))
	l.tick(now.Add(ownerWait+2*time.Second), false, true)
	now = now.Add(time.Minute)
	l.ownerSilent(now)
	l.ownerSilent(now.Add(ownerWait))
	if l.stopped != nil {
		t.Fatalf("the run was stopped too early: %v", l.stopped)
	}
	l.ownerSilent(now.Add(ownerWait + 1))
	if !errors.Is(l.stopped, errOwnerGone) || !closed(l.heard) {
		t.Errorf("the run goes on for an owner that isn't there: %v", l.stopped)
	}
}

// Once an owner was found to be gone, nothing else of it is waited for; one that is heard of
// again gets its time again.
func TestDepartedOwner(t *testing.T) {
	l := newLone(t)
	l.claim(false)
	now := time.Now()
	l.w.departed.add(l.owner)
	l.answered(schemas.Verdict{Go: true, Next: 1}, now)
	l.ownerSilent(now)
	if l.stopped != nil {
		t.Fatalf("an owner that was heard of again gets no time: %v", l.stopped)
	}
	l.w.departed.add(l.owner)
	l.ownerSilent(now.Add(time.Millisecond))
	if !errors.Is(l.stopped, errOwnerGone) {
		t.Errorf("the run goes on for an owner that is gone: %v", l.stopped)
	}
}

// What isn't taken is kept up to a bound; then the backend waits until the owner has taken
// something, or the run has ended.
func TestOwnerThatFallsBehind(t *testing.T) {
	l := newLone(t)
	l.claim(false)
	l.answered(schemas.Verdict{Go: true, Next: 1}, time.Now())
	line := bytes.Repeat([]byte("x"), 512<<10)
	frames := 0
	for len(l.buf)+len(line) <= maxKept {
		if err := l.chunk(t.Context(), line, frames); err != nil {
			t.Fatal(err)
		}
		frames++
	}
	// Long before, the owner is asked what it has.
	if kinds := l.sent(t); kinds[schemas.FrameChunk] != frames || kinds[schemas.FrameProgress] < frames/4 {
		t.Errorf("sent %v, want %d chunks and a report for every few", kinds, frames)
	}
	next := make(chan error, 1)
	go func() { next <- l.chunk(t.Context(), line, frames) }()
	select {
	case err := <-next:
		t.Fatalf("%d bytes are kept, and more was taken: %v", len(l.buf), err)
	case <-time.After(50 * time.Millisecond):
	}
	l.answered(schemas.Verdict{Go: true, Next: 2, Seq: 1}, time.Now())
	if err := <-next; err != nil {
		t.Fatal(err)
	}
	if len(l.buf) > maxKept {
		t.Errorf("%d bytes are kept", len(l.buf))
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	go func() { next <- l.chunk(ctx, line, frames) }()
	cancel(errCancelled)
	if err := <-next; !errors.Is(err, errCancelled) {
		t.Errorf("a run that ends while it waits says %v", err)
	}
	// A line that is larger than the bound isn't waited for in vain.
	l.answered(schemas.Verdict{Go: true, Next: l.last + 1, Seq: l.last}, time.Now())
	if err := l.chunk(t.Context(), line, frames); err != nil {
		t.Error(err)
	}
}

// A gap that doesn't close is gone back to now and then, and not with every verdict, of
// which one may follow the other as fast as the line is.
func TestGapThatStays(t *testing.T) {
	l := newLone(t)
	l.claim(false)
	for range 3 {
		if err := l.chunk(t.Context(), []byte("x\n"), 1); err != nil {
			t.Fatal(err)
		}
	}
	l.done(nil, 1, schemas.Usage{})
	l.sent(t)
	now := time.Now()
	gap := schemas.Verdict{Go: true, Next: 2, Seq: 4}
	for range 100 {
		l.answered(gap, now)
	}
	if kinds := l.sent(t); kinds[schemas.FrameChunk] != 2 || kinds[schemas.FrameDone] != 1 {
		t.Errorf("a hundred verdicts about one gap caused %v", kinds)
	}
	gap.Next = 3 // it was filled, and there is another
	l.answered(gap, now)
	if kinds := l.sent(t); kinds[schemas.FrameChunk] != 1 || kinds[schemas.FrameDone] != 1 {
		t.Errorf("another gap caused %v", kinds)
	}
	l.answered(gap, now.Add(backEvery))
	if kinds := l.sent(t); kinds[schemas.FrameChunk] != 1 || kinds[schemas.FrameDone] != 1 {
		t.Errorf("a gap that is still there caused %v", kinds)
	}
}

// A body is fetched although its owner is away for a moment, and not when it has ended the
// attempt.
func TestFetchBody(t *testing.T) {
	server := natstest.Start(t)
	owner := server.Connect("owner")
	w := newTestWorker(t, server, server.Connect("worker"))
	body := strings.Repeat("0123456789", 40_000)
	job := &schemas.Job{Request: "req_1", Nonce: schemas.NewNonce(), Owner: "own_1", Tenant: testTenant, Model: testModel, BodySize: len(body)}
	r := &run{w: w, job: job}
	type result struct {
		body []byte
		err  error
	}
	fetch := func(ctx context.Context) <-chan result {
		got := make(chan result, 1)
		go func() {
			b, err := r.fetchBody(ctx)
			got <- result{b, err}
		}()
		return got
	}
	later := fetch(t.Context())
	// That nobody was there at first shows in an answer that an earlier request got.
	if _, err := w.askBulk(t.Context(), schemas.BodySubject(testAgent, job.Owner, job.Nonce), nil); !bus.Down(err) {
		t.Fatalf("somebody is there: %v", err)
	}
	asked := 0
	sub, err := owner.Subscribe(schemas.BodySubject(testAgent, job.Owner, job.Nonce), func(m *nats.Msg) {
		offset, err := schemas.DecodeBodyRequest(m.Data)
		if err != nil {
			t.Error(err)
		}
		asked++
		if err := m.Respond([]byte(body[offset:min(offset+schemas.BodyPiece, len(body))])); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := <-later; got.err != nil || string(got.body) != body {
		t.Fatalf("got %d bytes, %v", len(got.body), got.err)
	}
	if err := sub.Unsubscribe(); err != nil {
		t.Fatal(err)
	}
	for name, answer := range map[string][]byte{"nothing": nil, "too much": make([]byte, len(body)+1)} {
		sub, err := owner.Subscribe(schemas.BodySubject(testAgent, job.Owner, job.Nonce), func(m *nats.Msg) {
			if err := m.Respond(answer); err != nil {
				t.Error(err)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := owner.Flush(); err != nil {
			t.Fatal(err)
		}
		if got := <-fetch(t.Context()); !errors.Is(got.err, errCancelled) {
			t.Errorf("%s: got %d bytes, %v", name, len(got.body), got.err)
		}
		if err := sub.Unsubscribe(); err != nil {
			t.Fatal(err)
		}
	}
	// Nobody comes back: then the claim, which is repeated, ends the run.
	if err := owner.Flush(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	pending := fetch(ctx)
	cancel(errOwnerGone)
	if got := <-pending; !errors.Is(got.err, errOwnerGone) {
		t.Errorf("got %d bytes, %v", len(got.body), got.err)
	}
}
