package dispatch_test

import (
	"testing"
	"unsafe"

	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/schemas"
)

// bundled is a chunk frame of a delivery.
func (d *delivery) bundled(seq uint64, text string) schemas.Frame {
	return schemas.Frame{Kind: schemas.FrameChunk, Seq: seq, Tokens: int(seq), Payload: []byte(text)}
}

// entry is a frame as it is in a bundle.
func (d *delivery) entry(f schemas.Frame) []byte {
	return schemas.AppendEntry(nil, d.job.Nonce, d.encode(f))
}

// bundle sends entries to the owner.
func (a *agent) bundle(entries ...[]byte) {
	a.h.t.Helper()
	var data []byte
	for _, e := range entries {
		data = append(data, e...)
	}
	if err := a.nc.Publish(schemas.BundleSubject(a.id, a.h.d.Owner()), data); err != nil {
		a.h.t.Fatal(err)
	}
}

// Frames that come in bundles are taken as if they came one by one: in order, once, among
// those that do come one by one, each for its own reply.
func TestBundle(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a := h.agent(agentA)
	one, two := h.start(request()), h.start(request())
	d, e := a.pull(), a.pull()
	if d.job.Request > e.job.Request {
		d, e = e, d
	}
	if !d.job.Bundle {
		t.Error("the job doesn't say that its owner takes bundles")
	}
	d.claim()
	a.bundle(d.entry(d.bundled(1, "1\n")), e.entry(e.bundled(1, "too early\n")))
	e.claim()
	a.bundle(
		e.entry(e.bundled(1, "a\n")),
		d.entry(d.bundled(2, "2\n")),
		d.entry(d.bundled(2, "a duplicate\n")),
		e.entry(e.bundled(3, "behind a gap\n")),
		schemas.AppendEntry(nil, schemas.NewNonce(), d.encode(d.bundled(3, "of nobody\n"))),
		d.again().entry(d.bundled(3, "of another run\n")),
		d.entry(d.bundled(3, "3\n")),
	)
	d.want(schemas.Frame{Kind: schemas.FrameProgress, Seq: 3}, schemas.Verdict{Go: true, Next: 4})
	e.want(schemas.Frame{Kind: schemas.FrameProgress, Seq: 3}, schemas.Verdict{Go: true, Next: 2})
	e.want(e.bundled(2, "b\n"), schemas.Verdict{Go: true, Next: 3})
	a.bundle(e.entry(e.bundled(3, "c\n")), d.entry(d.bundled(4, "4\n")))
	d.seq, e.seq = 4, 3
	d.done("5\n")
	e.done("d\n")
	wantText(t, one, "1\n2\n3\n4\n5\n")
	wantText(t, two, "a\nb\nc\nd\n")
	one.Close()
	a.bundle(d.entry(d.bundled(6, "after the end\n")))
	a.barrier()
}

// A bundle opens nothing that its agent couldn't open frame by frame, and what can't be read
// in it, or should be answered, is left out.
func TestBundleIsFenced(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a, b := h.agent(agentA), h.agent(agentB)
	reply := h.start(request())
	d := a.pull()
	a.bundle(d.entry(schemas.Frame{Kind: schemas.FrameClaim}))
	a.bundle(d.entry(d.bundled(1, "not claimed\n")))
	a.barrier()
	if !reply.Timing().Claimed.IsZero() {
		t.Error("a claim that nobody can answer was granted")
	}
	d.claim()
	b.bundle(d.entry(d.bundled(1, "forged\n")))
	b.barrier()
	a.bundle(
		d.entry(schemas.Frame{Kind: schemas.FrameDone, Seq: 1, Payload: []byte("unanswered\n")}),
		d.entry(schemas.Frame{Kind: schemas.FrameError, Seq: 1, Error: schemas.Errorf(schemas.CodeBackendError, "x")}),
		schemas.AppendEntry(nil, d.job.Nonce, []byte("no frame")),
		d.entry(d.bundled(1, "one\n")),
		[]byte(`{"nonce":"`+string(d.job.Nonce)+`","size":1000}`+"\nshort"),
	)
	a.bundle([]byte("nothing"), d.entry(d.bundled(2, "behind what can't be read\n")))
	a.bundle()
	d.want(schemas.Frame{Kind: schemas.FrameProgress, Seq: 2}, schemas.Verdict{Go: true, Next: 2})
	// A bundle isn't answered, whoever asks for it.
	inbox, err := a.nc.SubscribeSync(a.nc.NewInbox())
	if err != nil {
		t.Fatal(err)
	}
	if err := a.nc.PublishRequest(schemas.BundleSubject(agentA, h.d.Owner()), inbox.Subject, d.entry(d.bundled(2, "two\n"))); err != nil {
		t.Fatal(err)
	}
	a.barrier()
	if n, _, err := inbox.Pending(); n != 0 || err != nil {
		t.Errorf("a bundle got %d answers, %v", n, err)
	}
	d.seq = 2
	d.done("three\n")
	wantText(t, reply, "one\ntwo\nthree\n")
}

// What a slow reader leaves unread mustn't keep what others got in the same bundles.
func TestBundleIsNotKept(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a := h.agent(agentA)
	slow := h.start(request())
	d := a.pull()
	d.claim()
	first, second := d.bundled(1, "one\n"), d.bundled(2, "two\n")
	a.bundle(d.entry(first), d.entry(second))
	d.want(schemas.Frame{Kind: schemas.FrameProgress, Seq: 2}, schemas.Verdict{Go: true, Next: 3})
	ev := next(slow)
	if ev.Kind != dispatch.EventChunk || len(ev.Payload) != 2 {
		t.Fatalf("event is %+v", ev)
	}
	apart := uintptr(unsafe.Pointer(&ev.Payload[1][0])) - uintptr(unsafe.Pointer(&ev.Payload[0][0]))
	if apart == uintptr(len(d.entry(second))) {
		t.Error("the payloads are still parts of the bundle")
	}
}
