package dispatch_test

import (
	"strings"
	"testing"

	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/schemas"
)

func TestFramesAreTakenInOrderAndOnce(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a := h.agent(agentA)
	reply := h.start(request())
	d := a.pull()
	d.claim()
	chunk := func(seq uint64, text string) schemas.Frame {
		return schemas.Frame{Kind: schemas.FrameChunk, Seq: seq, Tokens: int(seq), Payload: []byte(text)}
	}
	d.want(chunk(1, "1\n"), schemas.Verdict{Go: true, Next: 2})
	d.want(chunk(1, "1\n"), schemas.Verdict{Go: true, Next: 2}) // a duplicate
	d.want(chunk(1, "other\n"), schemas.Verdict{Go: true, Next: 2})
	d.want(chunk(0, "0\n"), schemas.Verdict{Go: true, Next: 2})
	d.want(chunk(3, "3\n"), schemas.Verdict{Go: true, Next: 2}) // a gap
	d.want(schemas.Frame{Kind: schemas.FrameProgress, Seq: 3}, schemas.Verdict{Go: true, Next: 2})
	d.want(schemas.Frame{Kind: schemas.FrameDone, Seq: 4, Payload: []byte("4\n")}, schemas.Verdict{Go: true, Next: 2})
	d.want(schemas.Frame{Kind: schemas.FrameError, Seq: 4, Error: schemas.Errorf(schemas.CodeBackendError, "x")}, schemas.Verdict{Go: true, Next: 2})
	d.want(chunk(2, "2\n2b\n"), schemas.Verdict{Go: true, Next: 3}) // two lines in one frame
	d.want(chunk(3, "3\n"), schemas.Verdict{Go: true, Next: 4})
	d.want(schemas.Frame{Kind: schemas.FrameDone, Seq: 4, Tokens: 5, Payload: []byte("4\n")}, schemas.Verdict{Go: true, Next: 5})

	// After the end nothing is taken, and the worker hears that it is over.
	d.over(schemas.Frame{Kind: schemas.FrameDone, Seq: 4, Payload: []byte("4\n")})
	d.over(chunk(5, "5\n"))
	d.over(schemas.Frame{Kind: schemas.FrameProgress, Seq: 5})
	wantText(t, reply, "1\n2\n2b\n3\n4\n")
	if got := reply.Usage().CompletionTokens; got != 5 {
		t.Errorf("%d output tokens, want the 5 that the last frame counted", got)
	}
	timing := reply.Timing()
	for _, step := range []bool{
		!timing.Claimed.Before(timing.Received), !timing.FirstChunk.Before(timing.Claimed), !timing.Ended.Before(timing.FirstChunk),
	} {
		if !step {
			t.Errorf("timing is out of order: %+v", timing)
		}
	}
	// Whoever asks after the end gets the end.
	if ev := next(reply); ev.Kind != dispatch.EventDone || len(ev.Payload) != 0 {
		t.Errorf("after the end comes %+v", ev)
	}
}

// What came before an error is the client's, and is handed out with it or before it.
func TestErrorComesAfterWhatWasDelivered(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a := h.agent(agentA)
	reply := h.start(request())
	d := a.pull()
	d.claim()
	d.chunk("one\n")
	if ev := next(reply); ev.Kind != dispatch.EventChunk || len(ev.Payload) != 1 || string(ev.Payload[0]) != "one\n" {
		t.Fatalf("first event is %+v", ev)
	}
	d.chunk("two\n")
	d.chunk("three\n")
	failure := schemas.Errorf(schemas.CodeContextLengthExceeded, "too long").WithParam("messages")
	d.want(schemas.Frame{Kind: schemas.FrameError, Seq: 4, Error: failure}, schemas.Verdict{Go: true, Next: 5})
	d.over(schemas.Frame{Kind: schemas.FrameError, Seq: 4, Error: failure})
	text, err := read(reply)
	if text != "two\nthree\n" || err == nil || *err != *failure {
		t.Errorf("got %q and %v, want the rest and %v", text, err, failure)
	}
	d.finish()
	reply.Close()
	a.untold() // it has said by itself that it is over
	h.settled(agentA)
}

// A failure before the first token reaches the client as it is: its status is open yet.
func TestErrorBeforeTheFirstToken(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a := h.agent(agentA)
	reply := h.start(request())
	d := a.pull()
	d.claim()
	failure := schemas.Errorf(schemas.CodeModelLoading, "loading").WithRetryAfter(5e9)
	d.want(schemas.Frame{Kind: schemas.FrameError, Seq: 1, Error: failure}, schemas.Verdict{Go: true, Next: 2})
	ev := next(reply)
	if ev.Kind != dispatch.EventError || len(ev.Payload) != 0 || *ev.Err != *failure {
		t.Errorf("event is %+v, want %v alone", ev, failure)
	}
	if !reply.Timing().FirstChunk.IsZero() {
		t.Error("there was no first chunk")
	}
}

// A reply that isn't streamed comes in pieces of its body, and may be larger than what a
// stream may leave unread.
func TestWholeReplyInPieces(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, func(c *dispatch.Config) { c.MaxUnread = 1000 })
	a := h.agent(agentA)
	req := request()
	req.Stream = false
	reply := h.start(req)
	d := a.pull()
	d.claim()
	piece := strings.Repeat("x", 900)
	for range 10 {
		d.chunk(piece)
	}
	d.done("}")
	wantText(t, reply, strings.Repeat(piece, 10)+"}")
}
