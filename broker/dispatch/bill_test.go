package dispatch_test

import (
	"context"
	"encoding/json"
	"errors"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/broker/quota"
	"github.com/ownllm/ownllm/schemas"
)

// priced is a streaming request for which the client gave no limit.
func priced() dispatch.Request {
	req := request()
	req.Prompt = 50
	return req
}

// limit waits until the agent is told another limit.
func (d *delivery) limit(want int64, more bool) {
	d.a.h.t.Helper()
	m, err := d.a.control.NextMsg(patience)
	if err != nil {
		d.a.h.t.Fatalf("%s wasn't told a limit: %v", d.a.id, err)
	}
	var c schemas.Control
	if err := json.Unmarshal(m.Data, &c); err != nil {
		d.a.h.t.Fatal(err)
	}
	if want := (schemas.Control{Operation: schemas.ControlLimit, Nonce: d.job.Nonce, Limit: want, More: more}); c != want {
		d.a.h.t.Fatalf("%s was told %+v, want %+v", d.a.id, c, want)
	}
}

// tokens sends the next line, and says how many tokens there are now.
func (d *delivery) tokens(n int) {
	d.a.h.t.Helper()
	d.seq++
	d.send(schemas.Frame{Kind: schemas.FrameChunk, Seq: d.seq, Tokens: n, Payload: []byte("x\n")})
}

func TestRefusedRequestsAreNotPublished(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a := h.agent(agentA)
	h.books.Set(func() { h.books.Refuse = books.ReasonBudget })
	_, rate, err := h.d.Start(t.Context(), request())
	if !errors.Is(err, schemas.Errorf(schemas.CodeBudgetExceeded, "")) || !rate.Known || rate.Requests != 32 {
		t.Errorf("the request got %v, %+v", err, rate)
	}
	a.idle()
	h.settled(agentA)
}

func TestTopUp(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	h.books.Set(func() { h.books.Price, h.books.Purse = 1, 3000 })
	a := h.agent(agentA)
	reply := h.start(priced())
	d := a.pull()
	if d.job.Limit != 1024 || !d.job.More || !d.job.Count {
		t.Fatalf("the job may have %d tokens, more %t, count %t", d.job.Limit, d.job.More, d.job.Count)
	}
	d.want(schemas.Frame{Kind: schemas.FrameClaim}, schemas.Verdict{Go: true, Next: 1, Limit: 1024, More: true})
	d.tokens(511)
	a.untold()
	d.tokens(512)
	d.limit(2048, true)
	d.want(schemas.Frame{Kind: schemas.FrameProgress, Seq: 2}, schemas.Verdict{Go: true, Next: 3, Limit: 2048, More: true})
	d.tokens(2048) // what is left now is less than twice as much, and then nothing
	d.limit(3000, true)
	d.limit(3000, false)
	d.seq++
	d.want(schemas.Frame{Kind: schemas.FrameDone, Seq: d.seq, Tokens: 3000, Payload: []byte("end\n"), Usage: &schemas.Usage{PromptTokens: 7, CompletionTokens: 3000}},
		schemas.Verdict{Go: true, Next: d.seq + 1})
	d.finish()
	wantText(t, reply, "x\nx\nx\nend\n")
	if s := h.books.Charged(t, d.job.Request); s.Completion != 3000 || *s.Prompt != 7 || s.Outcome != books.OutcomeDone {
		t.Errorf("charged %+v", s)
	}
}

// A reply that needs more waits for money that others hold, and ends when there is none.
func TestTopUpWaitsForOthers(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	h.books.Set(func() { h.books.Price, h.books.Purse = 1, 1024+500 })
	a := h.agent(agentA)
	h.start(priced())
	first := a.pull()
	first.want(schemas.Frame{Kind: schemas.FrameClaim}, schemas.Verdict{Go: true, Next: 1, Limit: 1024, More: true})
	limited := priced()
	limited.Limit = 500
	other := h.start(limited)
	second := a.pull()
	if second.job.Limit != 500 || second.job.More {
		t.Fatalf("the job may have %d tokens, more %t", second.job.Limit, second.job.More)
	}
	second.want(schemas.Frame{Kind: schemas.FrameClaim}, schemas.Verdict{Go: true, Next: 1, Limit: 500})
	first.tokens(600)
	a.untold()
	second.seq++
	second.want(schemas.Frame{Kind: schemas.FrameDone, Seq: 1, Tokens: 3, Payload: []byte("end\n")}, schemas.Verdict{Go: true, Next: 2})
	second.finish()
	wantText(t, other, "end\n")
	first.limit(1524, true)
}

// While the books are away, a reply that needs more waits, and goes on when they are back.
func TestTopUpWhileTheBooksAreAway(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	h.books.Set(func() { h.books.Price = 1 })
	a := h.agent(agentA)
	h.start(priced())
	d := a.pull()
	d.want(schemas.Frame{Kind: schemas.FrameClaim}, schemas.Verdict{Go: true, Next: 1, Limit: 1024, More: true})
	h.books.Set(func() { h.books.Away = true })
	d.tokens(1024)
	d.want(schemas.Frame{Kind: schemas.FrameProgress, Seq: 1}, schemas.Verdict{Go: true, Next: 2, Limit: 1024, More: true})
	h.books.Set(func() { h.books.Away = false })
	d.limit(2048, true)
}

// A whole reply can't be given more on the way: it gets as much as it can need.
func TestWholeReplyWithoutALimit(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	h.books.Set(func() { h.books.Price = 1 })
	a := h.agent(agentA)
	req := priced()
	req.Stream, req.Most = false, 32768
	h.start(req)
	if d := a.pull(); d.job.Limit != 32768 || d.job.More {
		t.Errorf("the job may have %d tokens, more %t", d.job.Limit, d.job.More)
	}
	// It is known now that the model has a price, so the books are asked once.
	req.ID = schemas.NewRequestID()
	h.start(req)
	a.pull().want(schemas.Frame{Kind: schemas.FrameClaim}, schemas.Verdict{Go: true, Next: 1, Limit: 32768})
}

// What is free has no limit, and what the window doesn't hold isn't asked for.
func TestLimitsThatNeedNoBooks(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a := h.agent(agentA)
	h.start(priced())
	if d := a.pull(); d.job.Limit != 0 || d.job.More || d.job.Count {
		t.Errorf("a free job has the limit %d, more %t, count %t", d.job.Limit, d.job.More, d.job.Count)
	}
	h.books.Set(func() { h.books.Price = 1 })
	req := priced()
	req.Most = 1500
	h.start(req)
	d := a.pull()
	d.want(schemas.Frame{Kind: schemas.FrameClaim}, schemas.Verdict{Go: true, Next: 1, Limit: 1024, More: true})
	d.tokens(600)
	d.limit(1500, true)
	d.tokens(800)
	d.limit(1500, false)
}

// An owner with plenty to pay with lets the prompt be counted late.
func TestCountLate(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	h.books.Set(func() { h.books.Price = 1 })
	a := h.agent(agentA)
	reply := h.start(priced())
	if d := a.pull(); d.job.Count || !d.job.CountLate {
		t.Errorf("count %t, late %t", d.job.Count, d.job.CountLate)
	}
	reply.Close()
	h.settled(agentA)
}

// The exact size of the prompt is noted in the books.
func TestPromptIsNoted(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	h.books.Set(func() { h.books.Price = 1 })
	a := h.agent(agentA)
	reply := h.start(priced())
	d := a.pull()
	d.want(schemas.Frame{Kind: schemas.FrameClaim}, schemas.Verdict{Go: true, Next: 1, Limit: 1024, More: true})
	d.want(schemas.Frame{Kind: schemas.FrameProgress, PromptTokens: 17}, schemas.Verdict{Go: true, Next: 1, Limit: 1024, More: true})
	until(t, "the books to know", func() bool {
		n := int64(0)
		h.books.Set(func() { n = h.books.Prompts[d.job.Request] })
		return n == 17
	})
	reply.Close()
	if s := h.books.Charged(t, d.job.Request); *s.Prompt != 17 || s.Completion != 0 || s.Outcome != books.OutcomeCancelled {
		t.Errorf("charged %+v", s)
	}
}

// The worker hears that its last frame was taken once the books have it, and not before:
// if this process died, the worker's own count would be needed.
func TestLastFrameIsAnsweredOnceSettled(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a := h.agent(agentA)
	reply := h.start(request())
	d := a.pull()
	d.claim()
	h.books.Set(func() { h.books.Deaf = true })
	last := schemas.Frame{Kind: schemas.FrameDone, Seq: 1, Tokens: 2, Payload: []byte("end\n"), Usage: &schemas.Usage{PromptTokens: 1, CompletionTokens: 2}}
	answers, err := a.nc.SubscribeSync(a.nc.NewInbox())
	if err != nil {
		t.Fatal(err)
	}
	send := func(f schemas.Frame) {
		if err := a.nc.PublishRequest(d.subject(), answers.Subject, d.encode(f)); err != nil {
			t.Fatal(err)
		}
	}
	send(last)
	wantText(t, reply, "end\n") // the client needn't wait
	reply.Close()
	send(schemas.Frame{Kind: schemas.FrameProgress, Seq: 1})
	send(last)
	a.barrier()
	if n, _, _ := answers.Pending(); n != 0 {
		t.Fatalf("there are %d answers before the settlement", n)
	}
	h.books.Set(func() { h.books.Deaf = false })
	m, err := answers.NextMsg(patience)
	if err != nil {
		t.Fatal(err)
	}
	if want := string(schemas.Verdict{Go: true, Seq: 1, Next: 2}.Encode()); string(m.Data) != want {
		t.Errorf("the answer is %s, want %s", m.Data, want)
	}
	<-reply.Settled()
	d.finish()
	h.settled(agentA)
}

func TestCharges(t *testing.T) {
	t.Parallel()
	const bound = -1 // stands for the prompt that was reserved
	failure := schemas.Errorf(schemas.CodeBackendError, "x")
	for _, c := range []struct {
		name   string
		act    func(a *agent, reply *dispatch.Reply)
		prompt int64
		tokens int64
		want   books.Outcome
	}{
		{"whole", func(a *agent, _ *dispatch.Reply) {
			d := a.pull()
			d.claim()
			d.chunk("1\n")
			d.done("2\n")
		}, 3, 2, books.OutcomeDone},
		{"client gone from the queue", func(_ *agent, reply *dispatch.Reply) {
			reply.Interrupt(dispatch.ErrClientGone)
		}, 0, 0, books.OutcomeCancelled},
		{"client gone before the first token", func(a *agent, reply *dispatch.Reply) {
			a.pull().claim()
			reply.Interrupt(dispatch.ErrClientGone)
		}, bound, 0, books.OutcomeCancelled},
		{"client gone in mid-stream", func(a *agent, reply *dispatch.Reply) {
			d := a.pull()
			d.claim()
			d.chunk("1\n")
			d.chunk("2\n")
			a.barrier()
			reply.Interrupt(dispatch.ErrClientGone)
		}, bound, 2, books.OutcomeCancelled},
		{"error before the first token", func(a *agent, _ *dispatch.Reply) {
			d := a.pull()
			d.claim()
			d.want(schemas.Frame{Kind: schemas.FrameError, Seq: 1, Error: failure}, schemas.Verdict{Go: true, Next: 2})
		}, 0, 0, books.OutcomeError},
		{"error in mid-stream", func(a *agent, _ *dispatch.Reply) {
			d := a.pull()
			d.claim()
			d.chunk("1\n")
			d.want(schemas.Frame{Kind: schemas.FrameError, Seq: 2, Tokens: 1, Error: failure}, schemas.Verdict{Go: true, Next: 3})
		}, bound, 1, books.OutcomeError},
		{"agent gone in mid-stream", func(a *agent, _ *dispatch.Reply) {
			d := a.pull()
			d.claim()
			d.chunk("1\n")
			a.barrier()
			a.lost()
		}, bound, 1, books.OutcomeError},
		{"key revoked before the claim", func(_ *agent, reply *dispatch.Reply) {
			reply.Interrupt(schemas.Errorf(schemas.CodeKeyInvalid, "x"))
		}, 0, 0, books.OutcomeError},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			h := newHouse(t, 10, nil)
			a := h.agent(agentA)
			req := priced()
			reply := h.start(req)
			c.act(a, reply)
			_, _ = read(reply)
			reply.Close()
			s := h.books.Charged(t, req.ID)
			prompt := int64(bound)
			if s.Prompt != nil {
				prompt = *s.Prompt
			}
			if prompt != c.prompt || s.Completion != c.tokens || s.Outcome != c.want {
				t.Errorf("charged a prompt of %d and %d tokens as %s, want %d, %d, %s", prompt, s.Completion, s.Outcome, c.prompt, c.tokens, c.want)
			}
			<-reply.Settled()
		})
	}
}

// What couldn't be published is void.
func TestVoidRequests(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 1, nil)
	h.agent(agentA)
	h.start(request())
	req := request()
	if _, _, err := h.d.Start(t.Context(), req); !errors.Is(err, schemas.Errorf(schemas.CodeQueueFull, "")) {
		t.Fatalf("the second request got %v", err)
	}
	if s := h.books.Charged(t, req.ID); s.Outcome != books.OutcomeVoid {
		t.Errorf("it was settled as %+v", s)
	}
}

// The books know the agent of a failover before that has the job.
func TestFailoverIsNoted(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a, b := h.agent(agentA), h.agent(agentB)
	req := request()
	reply := h.start(req)
	a.pull()
	a.lost()
	done := make(chan struct{})
	go func() {
		defer close(done)
		wantText(t, reply, "end\n")
	}()
	d := b.pull()
	h.books.Set(func() {
		if got := h.books.Agents[req.ID]; got != agentB {
			t.Errorf("the books know %s", got)
		}
	})
	d.claim()
	d.done("end\n")
	<-done
}

// Who was taken for dead delivers nothing more.
func TestLeaseThatLapsed(t *testing.T) {
	t.Parallel()
	for _, unread := range []bool{false, true} {
		h := newHouseWith(t, 10, nil, quota.Config{Lease: 2 * time.Second})
		a := h.agent(agentA)
		reply := h.start(request())
		d := a.pull()
		d.claim()
		if unread {
			d.chunk("1\n")
			a.barrier()
		}
		h.books.Set(func() { h.books.Epoch++ })
		until(t, "the lease to lapse", func() bool {
			return d.ask(schemas.Frame{Kind: schemas.FrameProgress}).Reason == schemas.ReasonCancelled
		})
		text, err := read(reply)
		if text != "" || !quota.IsEnded(err) {
			t.Errorf("the reply is %q and ends with %v", text, err)
		}
		reply.Close()
		d.told()
		if _, _, err := h.d.Start(context.Background(), request()); err != nil {
			t.Errorf("the next request got %v", err)
		}
	}
}
