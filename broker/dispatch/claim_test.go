package dispatch_test

import (
	"fmt"
	"testing"

	"github.com/ownllm/ownllm/schemas"
)

var superseded = schemas.Verdict{Reason: schemas.ReasonSuperseded}

func TestFirstRunIsGrantedAndAnyOtherIsRefused(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a := h.agent(agentA)
	reply := h.start(request())
	first := a.pull()
	first.claim()
	first.claim() // the answer got lost
	second := first.again()
	second.want(schemas.Frame{Kind: schemas.FrameClaim}, superseded)

	// Nothing that the refused run says counts, not even its errors.
	second.send(schemas.Frame{Kind: schemas.FrameChunk, Seq: 1, Payload: []byte("forged\n")})
	second.want(schemas.Frame{Kind: schemas.FrameProgress, Loading: true}, superseded)
	second.want(schemas.Frame{Kind: schemas.FrameError, Seq: 1, Error: schemas.Errorf(schemas.CodeBackendError, "forged")}, superseded)
	second.want(schemas.Frame{Kind: schemas.FrameDone, Seq: 1, Usage: &schemas.Usage{CompletionTokens: 1e6}}, superseded)
	first.chunk("one\n")
	second.want(schemas.Frame{Kind: schemas.FrameDone, Seq: 2}, superseded)
	first.done("two\n")
	wantText(t, reply, "one\ntwo\n")
	if u := reply.Usage(); u != (schemas.Usage{PromptTokens: 3, CompletionTokens: 2}) {
		t.Errorf("usage is %+v", u)
	}
	reply.Close()
	h.settled(agentA)
}

// A claim that got lost is sent again, after frames have gone by: the worker goes back to
// its first.
func TestFramesBeforeTheClaimAreNotTaken(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a := h.agent(agentA)
	reply := h.start(request())
	d := a.pull()
	d.unanswered(schemas.Frame{Kind: schemas.FrameChunk, Seq: 1, Payload: []byte("one\n")})
	d.unanswered(schemas.Frame{Kind: schemas.FrameProgress, Seq: 1})
	d.unanswered(schemas.Frame{Kind: schemas.FrameDone, Seq: 2, Payload: []byte("two\n")})
	d.want(schemas.Frame{Kind: schemas.FrameClaim, Seq: 2}, schemas.Verdict{Go: true, Next: 1})
	d.chunk("one\n")
	d.done("two\n")
	wantText(t, reply, "one\ntwo\n")
}

// The worker's claim can overtake JetStream's answer to the publish.
func TestClaimBeforeTheAcknowledgementOfThePublish(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 0, nil)
	a := h.agent(agentA)
	jobs := h.slowStream()
	started := h.startLater(request())
	m := <-jobs
	d := a.deliver(m.Data, "")
	d.claim()
	d.chunk("one\n")
	d.done("two\n")
	acknowledge(t, m, 7)
	reply := <-started
	defer reply.Close()
	wantText(t, reply, "one\ntwo\n")
}

func TestNonceOpensNothingElse(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a, b := h.agent(agentA), h.agent(agentB)
	reply := h.start(request())
	d := a.pull()
	frame := d.encode(schemas.Frame{Kind: schemas.FrameClaim})
	guessed := schemas.OutSubject(agentA, d.job.Owner, schemas.NewNonce())
	if v := a.verdict(guessed, frame); v != (schemas.Verdict{Reason: schemas.ReasonFinished}) {
		t.Errorf("a guessed nonce got %+v", v)
	}
	// Another agent can only publish under its own name.
	stolen := schemas.OutSubject(agentB, d.job.Owner, d.job.Nonce)
	if v := b.verdict(stolen, frame); v != superseded {
		t.Errorf("another agent got %+v", v)
	}
	d.claim()
	if v := b.verdict(stolen, d.encode(schemas.Frame{Kind: schemas.FrameDone, Seq: 1, Payload: []byte("forged\n")})); v.Go {
		t.Errorf("a frame of another agent got %+v", v)
	}
	// What can't be read is dropped, and hurts nobody.
	for _, garbage := range []string{"", "\n", "{}\n", "no frame", fmt.Sprintf(`{"run":%q,"seq":1,"kind":"chunk","tokens":-1}`, d.run) + "\nx\n"} {
		if err := a.nc.Publish(d.subject(), []byte(garbage)); err != nil {
			t.Fatal(err)
		}
	}
	d.done("one\n")
	wantText(t, reply, "one\n")
	reply.Close()
	if v := d.ask(schemas.Frame{Kind: schemas.FrameProgress, Seq: 1}); v != (schemas.Verdict{Reason: schemas.ReasonFinished}) {
		t.Errorf("after the end the verdict is %+v", v)
	}
}

func TestJobSaysWhatTheClientAsked(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a := h.agent(agentA)
	req := request()
	h.start(req)
	d := a.pull()
	if string(d.body) != req.Body {
		t.Errorf("body is %q", d.body)
	}
	want := schemas.Job{
		Version: schemas.ProtocolVersion, Request: req.ID, Attempt: 1, Nonce: d.job.Nonce, Owner: h.d.Owner(),
		Tenant: tenant, Key: req.Key, Operation: "chat", Model: model,
		Deadline: req.Received.Add(10 * 60 * 1e9).UnixMilli(), ColdWait: 5000, Stream: true, IncludeUsage: true,
		Bundle: true, Completion: req.ID.CompletionID(), Created: req.Received.Unix(), ReplyModel: model,
	}
	if *d.job != want {
		t.Errorf("job is %+v, want %+v", *d.job, want)
	}
}
