package dispatch_test

import (
	"context"
	"encoding/json"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/broker/quota"
	"github.com/ownllm/ownllm/schemas"
)

// known makes the key one that was let in before, with plenty left.
func (h *house) known(a *agent) {
	h.t.Helper()
	reply := h.start(request())
	d := a.pull()
	if d.job.Hold {
		h.t.Fatal("the first request of a key is published before it is admitted")
	}
	if v := d.ask(schemas.Frame{Kind: schemas.FrameClaim}); !v.Go {
		h.t.Fatalf("the first claim got %+v", v)
	}
	d.done("end\n")
	wantText(h.t, reply, "end\n")
	reply.Close()
}

// hang holds up admissions until the function that it returns is called.
func (h *house) hang() (release func()) {
	hang := make(chan struct{})
	h.books.Set(func() { h.books.Hang = hang })
	release = sync.OnceFunc(func() {
		h.books.Set(func() { h.books.Hang = nil })
		close(hang)
	})
	h.t.Cleanup(release)
	return release
}

// started is what came of Start.
type started struct {
	reply *dispatch.Reply
	rate  quota.Rate
	err   error
}

// starting starts a request that isn't waited for.
func (h *house) starting(req dispatch.Request) <-chan started {
	done := make(chan started, 1)
	go func() {
		var s started
		s.reply, s.rate, s.err = h.d.Start(context.Background(), req)
		done <- s
	}()
	return done
}

// claiming sends a frame whose answer comes to the subscription.
func (d *delivery) claiming(f schemas.Frame) *nats.Subscription {
	d.a.h.t.Helper()
	sub, err := d.a.nc.SubscribeSync(d.a.nc.NewInbox())
	if err != nil {
		d.a.h.t.Fatal(err)
	}
	if err := d.a.nc.PublishRequest(d.subject(), sub.Subject, d.encode(f)); err != nil {
		d.a.h.t.Fatal(err)
	}
	return sub
}

func (d *delivery) verdict(sub *nats.Subscription) (v schemas.Verdict) {
	d.a.h.t.Helper()
	m, err := sub.NextMsg(patience)
	if err != nil {
		d.a.h.t.Fatalf("no verdict: %v", err)
	}
	if err := json.Unmarshal(m.Data, &v); err != nil {
		d.a.h.t.Fatal(err)
	}
	return v
}

func (h *house) wait(s <-chan started) started {
	h.t.Helper()
	select {
	case got := <-s:
		if got.reply != nil {
			h.t.Cleanup(got.reply.Close)
		}
		return got
	case <-time.After(patience):
		h.t.Fatal("Start doesn't return")
		return started{}
	}
}

// A job is published while the books are being asked, and its claim is answered once they
// have let the request in.
func TestAhead(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	h.d.HoldFor(patience)
	a := h.agent(agentA)
	h.books.Set(func() { h.books.Price = 1000 })
	h.known(a)
	release := h.hang()
	req := priced()
	s := h.starting(req)
	d := a.pull()
	if !d.job.Hold || d.job.Limit != 0 || d.job.More || d.job.Count || !d.job.CountLate {
		t.Errorf("the job is %+v", d.job)
	}
	claim := d.claiming(schemas.Frame{Kind: schemas.FrameClaim})
	a.barrier()
	d.again().want(schemas.Frame{Kind: schemas.FrameClaim}, schemas.Verdict{Reason: schemas.ReasonSuperseded})
	d.chunk("too early\n")
	d.seq = 0
	a.barrier()
	if n, _, _ := claim.Pending(); n != 0 {
		t.Fatalf("the claim was answered: %+v", d.verdict(claim))
	}
	select {
	case got := <-s:
		t.Fatalf("Start has returned %+v", got)
	default:
	}
	release()
	if v := d.verdict(claim); v != (schemas.Verdict{Go: true, Seq: 1, Next: 1, Limit: 1024, More: true}) {
		t.Fatalf("the verdict is %+v", v)
	}
	got := h.wait(s)
	if got.err != nil || !got.rate.Known {
		t.Fatalf("Start returned %+v", got)
	}
	d.chunk("1\n")
	d.done("2\n")
	wantText(t, got.reply, "1\n2\n")
	if s := h.books.Charged(t, req.ID); s.Outcome != books.OutcomeDone || s.Completion != 2 {
		t.Errorf("it was settled as %+v", s)
	}
	got.reply.Close()
	h.settled(agentA)
}

// The agent begins when the books have decided, but nobody gets anything of the reply before
// that is on disk; and if it never is, nobody gets anything at all, nor pays.
func TestForeseen(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ lost, ends bool }{
		"on disk": {ends: true}, "lost": {lost: true}, "lost behind the end": {lost: true, ends: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHouse(t, 10, nil)
			h.d.HoldFor(patience)
			a := h.agent(agentA)
			h.books.Set(func() { h.books.Price = 1000 })
			h.known(a)
			flush := make(chan struct{})
			flushed := sync.OnceFunc(func() { close(flush) })
			t.Cleanup(flushed)
			h.books.Set(func() { h.books.Flush = flush })
			req := priced()
			s := h.starting(req)
			d := a.pull()
			if v := d.verdict(d.claiming(schemas.Frame{Kind: schemas.FrameClaim})); v != (schemas.Verdict{Go: true, Next: 1, Limit: 1024, More: true}) {
				t.Fatalf("the verdict is %+v", v)
			}
			d.chunk("1\n")
			end := d.claiming(schemas.Frame{Kind: schemas.FrameProgress, Seq: 1})
			if v := d.verdict(end); v.Next != 2 {
				t.Fatalf("the verdict is %+v", v)
			}
			if test.ends {
				end = d.claiming(schemas.Frame{Kind: schemas.FrameDone, Seq: 2, Tokens: 2, Payload: []byte("2\n")})
			}
			a.barrier()
			select {
			case got := <-s:
				t.Fatalf("Start has returned %+v", got)
			default:
			}
			h.books.Set(func() { h.books.Away, h.books.Flush = test.lost, nil })
			flushed()
			got := h.wait(s)
			h.books.Set(func() { h.books.Away = false })
			if test.ends {
				if v := d.verdict(end); !v.Go || v.Next != 3 {
					t.Errorf("the last frame got %+v", v)
				}
				d.finish()
			}
			if !test.lost {
				wantText(t, got.reply, "1\n2\n")
				if s := h.books.Charged(t, req.ID); s.Outcome != books.OutcomeDone || s.Completion != 2 {
					t.Errorf("it was settled as %+v", s)
				}
				got.reply.Close()
				h.settled(agentA)
				return
			}
			if !errors.Is(got.err, schemas.Errorf(schemas.CodeInternalError, "")) || got.reply != nil {
				t.Fatalf("Start returned %+v", got)
			}
			if !test.ends {
				d.told()
			}
			h.books.Charged(t, req.ID)
			h.settled(agentA)
			h.books.Set(func() {
				if h.books.Purse != books.MaxTokens {
					t.Errorf("%d tokens are gone", books.MaxTokens-h.books.Purse)
				}
			})
		})
	}
}

// A request that is refused is taken back, and hears why. The next one goes one step after
// the other.
func TestAheadRefused(t *testing.T) {
	t.Parallel()
	for name, claims := range map[string]bool{"claimed": true, "in the queue": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHouse(t, 10, nil)
			h.d.HoldFor(patience)
			a := h.agent(agentA)
			h.known(a)
			release := h.hang()
			h.books.Set(func() { h.books.Refuse = books.ReasonBudget })
			s := h.starting(request())
			var d *delivery
			if claims {
				d = a.pull()
				d.claiming(schemas.Frame{Kind: schemas.FrameClaim})
				a.barrier()
			} else {
				until(t, "the job", func() bool { return h.depth() == 1 })
			}
			release()
			got := h.wait(s)
			if !errors.Is(got.err, schemas.Errorf(schemas.CodeBudgetExceeded, "")) || !got.rate.Known || got.reply != nil {
				t.Fatalf("Start returned %+v", got)
			}
			if claims {
				d.told()
				d.over(schemas.Frame{Kind: schemas.FrameClaim})
			}
			until(t, "an empty queue", func() bool { return h.depth() == 0 })
			a.idle()
			h.settled(agentA)

			release = h.hang()
			h.books.Set(func() { h.books.Refuse = books.Admitted })
			s = h.starting(request())
			a.idle()
			release()
			if got := h.wait(s); got.err != nil {
				t.Fatal(got.err)
			}
			if d := a.pull(); d.job.Hold {
				t.Error("a key that was just refused is believed in")
			}
		})
	}
}

// What the books say comes before what the queue says.
func TestAheadOfAFullQueue(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 1, nil)
	a := h.agent(agentA)
	h.known(a)
	until(t, "an empty queue", func() bool { return h.depth() == 0 })
	h.start(request())
	req := request()
	if _, _, err := h.d.Start(t.Context(), req); !errors.Is(err, schemas.Errorf(schemas.CodeQueueFull, "")) {
		t.Errorf("a request for which there is no room got %v", err)
	}
	if s := h.books.Charged(t, req.ID); s.Outcome != books.OutcomeVoid {
		t.Errorf("it was settled as %+v", s)
	}
	h.books.Set(func() { h.books.Refuse = books.ReasonTenantQPS })
	if _, _, err := h.d.Start(t.Context(), request()); !errors.Is(err, schemas.Errorf(schemas.CodeTenantQPSLimit, "")) {
		t.Errorf("a request that is too many for the tenant, too, got %v", err)
	}
}

// A full queue is passed over for another one, whose agent the books are told.
func TestAheadOfAnotherAgent(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 1, nil)
	a := h.agent(agentA)
	h.known(a)
	until(t, "an empty queue", func() bool { return h.depth() == 0 })
	h.start(request())
	b := h.agent(agentB)
	for range 3 { // it has more to do, and A's queue is full
		hb := heartbeat(b.incarnation, schemas.AgentUp)
		hb.Running = 5
		h.table.Observe(tenant, b.id, hb, time.Now())
	}
	req := request()
	reply := h.start(req)
	d := b.pull()
	if d.job.Hold {
		t.Error("a job is held whose request is admitted")
	}
	h.books.Set(func() {
		if got := h.books.Agents[req.ID]; got != agentB {
			t.Errorf("the books know %s", got)
		}
	})
	d.claim()
	d.done("end\n")
	wantText(t, reply, "end\n")
}

// Nobody's slot is taken for long by a request that isn't admitted yet.
func TestAheadIsTakenBack(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a := h.agent(agentA)
	h.known(a)
	release := h.hang()
	s := h.starting(request())
	d := a.pull()
	d.claiming(schemas.Frame{Kind: schemas.FrameClaim})
	d.told()
	d.over(schemas.Frame{Kind: schemas.FrameClaim})
	until(t, "an empty queue", func() bool { return h.depth() == 0 })
	release()
	got := h.wait(s)
	if got.err != nil {
		t.Fatal(got.err)
	}
	again := a.pull()
	if again.job.Hold || again.job.Attempt != 2 || again.job.Nonce == d.job.Nonce {
		t.Errorf("the second job is %+v", again.job)
	}
	again.claim()
	again.done("end\n")
	wantText(t, got.reply, "end\n")
	got.reply.Close()
	h.settled(agentA)
}

// The books are away: the client hears so, and nobody runs the job.
func TestAheadWhileTheBooksAreAway(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a := h.agent(agentA)
	h.known(a)
	h.books.Set(func() { h.books.Away = true })
	if _, _, err := h.d.Start(t.Context(), request()); !errors.Is(err, schemas.Errorf(schemas.CodeInternalError, "")) {
		t.Errorf("the request got %v", err)
	}
	until(t, "an empty queue", func() bool { return h.depth() == 0 })
	a.idle()
	h.settled(agentA)
}

// The agent goes away before the request is admitted.
func TestAheadOfALostAgent(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	h.d.HoldFor(patience)
	a := h.agent(agentA)
	h.known(a)
	release := h.hang()
	s := h.starting(request())
	d := a.pull()
	d.claiming(schemas.Frame{Kind: schemas.FrameClaim})
	a.barrier()
	b := h.agent(agentB)
	a.lost()
	release()
	got := h.wait(s)
	if got.err != nil {
		t.Fatal(got.err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		wantText(t, got.reply, "end\n")
	}()
	other := b.pull()
	other.claim()
	other.done("end\n")
	<-done
	got.reply.Close()
	h.settled(agentB)
}

// A run that has failed before it was granted is heard.
func TestAheadOfAFailure(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	h.d.HoldFor(patience)
	a := h.agent(agentA)
	h.known(a)
	release := h.hang()
	s := h.starting(request())
	d := a.pull()
	failure := schemas.Frame{Kind: schemas.FrameError, Seq: 1, Error: schemas.Errorf(schemas.CodeModelNotFound, "gone")}
	first := d.claiming(schemas.Frame{Kind: schemas.FrameClaim})
	second := d.claiming(failure)
	a.barrier()
	release()
	// Both have the same inbox at a worker; here the last one has it.
	if v := d.verdict(second); v != (schemas.Verdict{Go: true, Seq: 1, Next: 1}) {
		t.Errorf("the verdict is %+v", v)
	}
	if n, _, _ := first.Pending(); n != 0 {
		t.Errorf("two verdicts, %+v", d.verdict(first))
	}
	d.want(failure, schemas.Verdict{Go: true, Next: 2})
	wantError(t, h.wait(s).reply, schemas.CodeModelNotFound)
}

// A request that is ended before it is admitted isn't run.
func TestAheadOfAnInterrupt(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	h.d.HoldFor(patience)
	a := h.agent(agentA)
	h.known(a)
	release := h.hang()
	req := request()
	s := h.starting(req)
	d := a.pull()
	claim := d.claiming(schemas.Frame{Kind: schemas.FrameClaim})
	a.barrier()
	h.d.InterruptAll(schemas.Errorf(schemas.CodeInternalError, "shutting down"))
	release()
	if v := d.verdict(claim); v != (schemas.Verdict{Reason: schemas.ReasonCancelled}) {
		t.Errorf("the verdict is %+v", v)
	}
	got := h.wait(s)
	wantError(t, got.reply, schemas.CodeInternalError)
	got.reply.Close()
	if s := h.books.Charged(t, req.ID); s.Outcome != books.OutcomeError || s.Completion != 0 || *s.Prompt != 0 {
		t.Errorf("it was settled as %+v", s)
	}
	h.settled(agentA)
}

// A worker that wouldn't wait gets no job before its request is admitted.
func TestWorkerThatDoesNotHold(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a := h.agent(agentA)
	h.known(a)
	hb := heartbeat(a.incarnation, schemas.AgentUp)
	hb.Holds = false
	h.table.Observe(tenant, a.id, hb, time.Now())
	release := h.hang()
	s := h.starting(request())
	a.idle()
	release()
	h.wait(s)
	if d := a.pull(); d.job.Hold {
		t.Error("its job is held")
	}
}

// Whatever the books say and when: a claim is granted only if the request is admitted.
func TestAheadRaces(t *testing.T) {
	t.Parallel()
	const clients, each = 8, 25
	h := newHouse(t, 1000, nil)
	a := h.agent(agentA)
	h.known(a)
	var mu sync.Mutex
	granted, held := make(map[schemas.RequestID]bool), 0
	ctx, stop := context.WithCancel(t.Context())
	var agents, work sync.WaitGroup
	agents.Go(func() {
		sub, err := a.nc.SubscribeSync(a.nc.NewInbox())
		if err != nil {
			t.Error(err)
			return
		}
		for ctx.Err() == nil {
			ask := []byte(`{"batch":1,"expires":200000000}`)
			if err := a.nc.PublishRequest("$JS.API.CONSUMER.MSG.NEXT."+schemas.JobStream(a.id)+"."+a.consumer, sub.Subject, ask); err != nil {
				t.Error(err)
				return
			}
			m, err := sub.NextMsg(patience)
			if err != nil || len(m.Data) == 0 {
				continue
			}
			d := a.deliver(m.Data, m.Reply)
			agents.Go(func() {
				v, err := a.nc.Request(d.subject(), d.encode(schemas.Frame{Kind: schemas.FrameClaim}), patience)
				var verdict schemas.Verdict
				if err != nil || json.Unmarshal(v.Data, &verdict) != nil {
					return // it was taken back
				}
				mu.Lock()
				if d.job.Hold {
					held++
				}
				granted[d.job.Request] = granted[d.job.Request] || verdict.Go
				mu.Unlock()
				if verdict.Go {
					_, _ = a.nc.Request(d.subject(), d.encode(schemas.Frame{Kind: schemas.FrameDone, Seq: 1, Payload: []byte("x\n")}), patience)
				}
			})
		}
	})
	for c := range clients {
		work.Go(func() {
			for n := range each {
				if c == 0 {
					h.books.Set(func() {
						h.books.Refuse = books.Admitted
						if n%12 == 11 {
							h.books.Refuse = books.ReasonTenantQPS
						}
					})
				}
				req := request()
				reply, _, err := h.d.Start(context.Background(), req)
				if err == nil {
					if text, err := read(reply); text != "x\n" || err != nil {
						t.Errorf("the reply is %q, %v", text, err)
					}
					reply.Close()
					continue
				}
				mu.Lock()
				if granted[req.ID] {
					t.Errorf("a request was run that got %v", err)
				}
				granted[req.ID] = false
				mu.Unlock()
			}
		})
	}
	work.Wait()
	stop()
	agents.Wait()
	if held == 0 {
		t.Error("nothing was published ahead")
	}
	until(t, "an empty queue", func() bool { return h.d.Active() == 0 })
	h.settled(agentA)
}
