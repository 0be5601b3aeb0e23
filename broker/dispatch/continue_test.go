package dispatch_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/schemas"
)

// continuable is a streaming request whose reply may be gone on with.
func continuable() dispatch.Request {
	req := request()
	req.Continuable, req.Prompt = true, 50
	return req
}

// delta is a line of a stream.
func delta(members string) string {
	return `{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{` + members + `},"finish_reason":null}],"usage":null}` + "\n"
}

func word(s string) string { return delta(`"content":"` + s + `"`) }

const (
	role = `"role":"assistant","content":""`
	last = `{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}` + "\n"
)

// say sends the next lines, and says how many tokens there are now.
func (d *delivery) say(tokens int, lines ...string) {
	d.a.h.t.Helper()
	d.seq++
	d.send(schemas.Frame{Kind: schemas.FrameChunk, Seq: d.seq, Tokens: tokens, Payload: []byte(strings.Join(lines, ""))})
	d.a.barrier()
}

// end sends the last frame, and acknowledges the job.
func (d *delivery) end(prompt, tokens int) {
	d.a.h.t.Helper()
	d.seq++
	f := schemas.Frame{Kind: schemas.FrameDone, Seq: d.seq, Tokens: tokens, Payload: []byte(last), Usage: &schemas.Usage{PromptTokens: prompt, CompletionTokens: tokens}}
	d.want(f, schemas.Verdict{Go: true, Next: d.seq + 1})
	d.finish()
}

// breaks sends an error that ends the run.
func (d *delivery) breaks(code schemas.Code) {
	d.a.h.t.Helper()
	d.seq++
	if v := d.ask(schemas.Frame{Kind: schemas.FrameError, Seq: d.seq, Error: schemas.Errorf(code, "The worker's words.")}); !v.Go {
		d.a.h.t.Errorf("the error got the verdict %+v", v)
	}
	d.finish()
}

// ending is how a reply ended.
type ending struct {
	lines string
	err   *schemas.Error
}

// reading reads a reply to its end.
func reading(reply *dispatch.Reply) <-chan ending {
	ended := make(chan ending, 1)
	go func() {
		lines, err := read(reply)
		ended <- ending{lines, err}
	}()
	return ended
}

// text joins the contents of lines, of which only the first may have a role.
func text(t *testing.T, lines string) string {
	t.Helper()
	var b strings.Builder
	for i, line := range strings.Split(strings.TrimSuffix(lines, "\n"), "\n") {
		var chunk struct {
			Choices []struct {
				Delta struct{ Role, Content string }
			}
		}
		if err := json.Unmarshal([]byte(line), &chunk); err != nil {
			t.Fatalf("line %q: %v", line, err)
		}
		for _, c := range chunk.Choices {
			b.WriteString(c.Delta.Content)
			if (c.Delta.Role != "") != (i == 0) {
				t.Errorf("line %d is %s", i, line)
			}
		}
	}
	return b.String()
}

func TestContinue(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a, b := h.agent(agentA), h.agent(agentB)
	reply := h.start(continuable())
	first := a.pull()
	if first.job.Continue != nil {
		t.Errorf("the first attempt continues %+v", first.job.Continue)
	}
	first.claim()
	// Nobody reads yet: what was taken in counts as delivered.
	first.say(2, delta(role), word("Once"), word(" upon"))
	first.say(3, word(` a \"`))
	a.lost()
	ended := reading(reply)
	second := b.pull()
	if diff := cmp.Diff(&schemas.Continuation{Text: `Once upon a "`, Tokens: 3}, second.job.Continue); diff != "" {
		t.Errorf("the second attempt continues what it shouldn't, -want +got:\n%s", diff)
	}
	if second.job.Completion != first.job.Completion || second.job.Created != first.job.Created || second.job.Nonce == first.job.Nonce || string(second.body) != string(first.body) {
		t.Errorf("second job %+v, first %+v", second.job, first.job)
	}
	first.told()
	// The first one isn't dead after all.
	first.say(4, word(" forged"))
	first.over(schemas.Frame{Kind: schemas.FrameDone, Seq: first.seq + 1, Payload: []byte(last)})
	second.claim()
	second.say(4, word(" time"))
	second.end(9, 5)
	got := <-ended
	if said := text(t, got.lines); got.err != nil || said != `Once upon a " time` {
		t.Errorf("reply is %q and ends with %v", said, got.err)
	}
	if u := reply.Usage(); u != (schemas.Usage{PromptTokens: 9, CompletionTokens: 5}) {
		t.Errorf("usage is %+v", u)
	}
	reply.Close()
	if s := h.books.Charged(t, first.job.Request); *s.Prompt != 9 || s.Completion != 5 || s.Outcome != books.OutcomeDone {
		t.Errorf("charged %+v", s)
	}
	b.untold()
	a.restart()
	h.settled(agentA, agentB)
	if n := h.depth(); n != 0 {
		t.Errorf("%d jobs are left in the queue", n)
	}
}

// One agent after the other goes away, and is back as a new run.
func TestContinueManyTimes(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a, b := h.agent(agentA), h.agent(agentB)
	reply := h.start(continuable())
	ended := reading(reply)
	agents := []*agent{a, b}
	var want strings.Builder
	for n := range 20 {
		if n == 10 {
			b.beat(schemas.AgentBye) // from here on there is one
			agents = []*agent{a, a}
		}
		on := agents[n%2]
		d := on.pull()
		if from := d.job.Continue; n > 0 && (from == nil || from.Text != want.String() || from.Tokens != 2*n) {
			t.Fatalf("attempt %d continues %+v, not %q", n+1, from, want.String())
		}
		d.claim()
		lines := []string{word(fmt.Sprintf(" %d", 2*n)), word(fmt.Sprintf(" %d", 2*n+1))}
		fmt.Fprintf(&want, " %d %d", 2*n, 2*n+1)
		if n == 0 {
			lines = append([]string{delta(role)}, lines...)
		}
		d.say(2*n+2, lines...)
		if n < 19 {
			on.restart() // in the place of the run that was
			continue
		}
		d.end(9, 40)
	}
	got := <-ended
	if said := text(t, got.lines); got.err != nil || said != want.String() {
		t.Errorf("reply is %q and ends with %v", said, got.err)
	}
	reply.Close()
	h.settled(agentA)
}

// What can't be gone on with ends with an error, and what came before it is the client's.
func TestCannotContinue(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*dispatch.Request)
		lines  string
	}{
		{name: "not by this request", change: func(r *dispatch.Request) { r.Continuable = false }},
		{name: "reasoning", lines: delta(`"reasoning_content":"hm"`)},
		{name: "tool call", lines: delta(`"tool_calls":[{"index":0,"function":{"arguments":"{"}}]`)},
		{name: "another choice", lines: `{"choices":[{"index":1,"delta":{"content":"x"}}]}` + "\n"},
		{name: "too long", lines: word(strings.Repeat("x", schemas.MaxContinued))},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			h := newHouse(t, 10, nil)
			a, b := h.agent(agentA), h.agent(agentB)
			req := continuable()
			if c.change != nil {
				c.change(&req)
			}
			reply := h.start(req)
			d := a.pull()
			d.claim()
			d.say(1, delta(role), word("Once"), c.lines)
			a.lost()
			lines, err := read(reply)
			if err == nil || err.Code != schemas.CodeAgentOffline || !strings.Contains(err.Message, "middle") || !strings.HasPrefix(lines, delta(role)+word("Once")) {
				t.Errorf("reply is %q and ends with %v", lines, err)
			}
			b.idle()
			reply.Close()
			if s := h.books.Charged(t, d.job.Request); s.Completion != 1 || s.Outcome != books.OutcomeError {
				t.Errorf("charged %+v", s)
			}
			a.restart()
			h.settled(agentA, agentB)
		})
	}
}

// continues makes the agent known as one that continues replies, or doesn't.
func (a *agent) continues(can bool) {
	hb := heartbeat(a.incarnation, schemas.AgentUp)
	hb.Inventory.Models[0].Continues = can
	hb.Hash = hb.Inventory.Hash()
	a.h.table.Observe(tenant, a.id, hb, time.Now())
}

// Who can't go on from a text doesn't get one; but where there is no text yet, anybody can.
func TestContinueWhereItCanBe(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a, b := h.agent(agentA), h.agent(agentB)
	b.continues(false)
	reply := h.start(continuable())
	d := a.pull()
	d.claim()
	d.say(1, delta(role), word("Once"))
	a.lost()
	if lines, err := read(reply); err == nil || err.Code != schemas.CodeAgentOffline || text(t, lines) != "Once" {
		t.Errorf("reply is %q and ends with %v", lines, err)
	}
	b.idle()
	a.restart()

	reply = h.start(continuable())
	d = a.pull()
	d.claim()
	d.say(0, delta(role))
	a.lost()
	ended := reading(reply)
	d = b.pull()
	if d.job.Continue == nil || *d.job.Continue != (schemas.Continuation{}) {
		t.Errorf("after the role came %+v", d.job.Continue)
	}
	d.claim()
	d.say(1, word("Once"))
	d.end(9, 1)
	if got := <-ended; got.err != nil || text(t, got.lines) != "Once" {
		t.Errorf("reply is %q and ends with %v", got.lines, got.err)
	}
}

// An agent that goes away between the end of the text and its last word has said all.
func TestAgentGoesAfterTheLastToken(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a, b := h.agent(agentA), h.agent(agentB)
	req := continuable()
	reply := h.start(req)
	d := a.pull()
	d.claim()
	d.say(1, delta(role), word("Once"), last)
	a.lost()
	lines, err := read(reply)
	usage := lines[strings.LastIndexByte(strings.TrimSuffix(lines, "\n"), '\n')+1:]
	want := fmt.Sprintf(`{"id":%q,"object":"chat.completion.chunk","created":%d,"model":%q,"choices":[],"usage":{"prompt_tokens":50,"completion_tokens":1,"total_tokens":51}}`+"\n",
		req.ID.CompletionID(), req.Received.Unix(), model)
	if err != nil || text(t, lines) != "Once" || usage != want {
		t.Errorf("reply is %q and ends with %v", lines, err)
	}
	b.idle()
	reply.Close()
	if s := h.books.Charged(t, req.ID); *s.Prompt != 50 || s.Completion != 1 || s.Outcome != books.OutcomeDone {
		t.Errorf("charged %+v", s)
	}
	a.restart()
	h.settled(agentA, agentB)
}

// A worker that says itself that it can't go on is as good as gone: another one goes on, but
// not the same again.
func TestContinueAfterAnError(t *testing.T) {
	for _, code := range []schemas.Code{schemas.CodeBackendError, schemas.CodeAgentOffline} {
		t.Run(string(code), func(t *testing.T) {
			t.Parallel()
			h := newHouse(t, 10, nil)
			a, b := h.agent(agentA), h.agent(agentB)
			for _, others := range []bool{true, false} {
				if !others {
					b.beat(schemas.AgentBye)
				}
				reply := h.start(continuable())
				d := a.pull()
				d.claim()
				d.say(1, delta(role), word("Once"))
				d.breaks(code)
				if !others {
					lines, err := read(reply)
					if err == nil || err.Code != code || err.Message != "The worker's words." || text(t, lines) != "Once" {
						t.Errorf("reply is %q and ends with %v", lines, err)
					}
					a.idle()
					reply.Close()
					continue
				}
				ended := reading(reply)
				d = b.pull()
				d.claim()
				d.end(9, 1)
				if got := <-ended; got.err != nil || text(t, got.lines) != "Once" {
					t.Errorf("reply is %q and ends with %v", got.lines, got.err)
				}
				reply.Close()
			}
			h.settled(agentA)
		})
	}
}

// An error that blames the request makes no sense in the middle of its reply.
func TestContinuationIsRefused(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a, b := h.agent(agentA), h.agent(agentB)
	reply := h.start(continuable())
	d := a.pull()
	d.claim()
	d.say(1, delta(role), word("Once"))
	a.lost()
	ended := reading(reply)
	d = b.pull()
	d.claim()
	d.breaks(schemas.CodeInvalidValue)
	if got := <-ended; got.err == nil || got.err.Code != schemas.CodeAgentOffline || !strings.Contains(got.err.Message, "middle") {
		t.Errorf("reply ends with %v", got.err)
	}
	b.idle()
	reply.Close()
	a.restart()
	h.settled(agentA, agentB)
}

// A request that its agent never began, because its worker is being stopped, moves on; a
// complaint about it doesn't.
func TestStoppingWorkerHandsOver(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a, b := h.agent(agentA), h.agent(agentB)
	reply := h.start(request())
	d := a.pull()
	d.claim()
	d.breaks(schemas.CodeAgentOffline)
	ended := reading(reply)
	d = b.pull()
	d.claim()
	d.done("one\n")
	if got := <-ended; got.err != nil || got.lines != "one\n" {
		t.Errorf("reply is %q and ends with %v", got.lines, got.err)
	}
	reply.Close()
	reply = h.start(continuable())
	d = a.pull()
	d.claim()
	d.seq++
	var complaint sync.WaitGroup
	complaint.Go(func() {
		d.ask(schemas.Frame{Kind: schemas.FrameError, Seq: d.seq, Error: schemas.Errorf(schemas.CodeBackendError, "no")})
	})
	wantError(t, reply, schemas.CodeBackendError)
	b.idle()
	reply.Close()
	complaint.Wait()
}

// The text takes room in the job, so that a body that would have fitted is fetched.
func TestContinueBesideALargeBody(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a, b := h.agent(agentA), h.agent(agentB)
	req := continuable()
	req.Body = strings.Repeat("b", schemas.MaxInlineBody)
	reply := h.start(req)
	d := a.pull()
	if d.job.BodySize != 0 {
		t.Fatal("the body isn't in the job")
	}
	d.claim()
	said := strings.Repeat(`\u0001`, schemas.MaxContinued/6-1)
	d.say(1, delta(role), word(said))
	a.lost()
	ended := reading(reply)
	d = b.pull()
	if want := strings.Repeat("\x01", schemas.MaxContinued/6-1); d.job.BodySize != len(req.Body) || d.job.Continue.Text != want {
		t.Errorf("the job has a body of %d bytes elsewhere, and continues %d bytes", d.job.BodySize, len(d.job.Continue.Text))
	}
	d.claim()
	d.end(9, 2)
	if got := <-ended; got.err != nil {
		t.Error(got.err)
	}
}

// An attempt that goes on gets the time for its first token that any attempt has, and
// doesn't owe it while it is queued.
func TestContinuationsHaveTheirTime(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, func(c *dispatch.Config) { c.Idle, c.FirstToken = time.Second, 1500*time.Millisecond })
	a, b := h.agent(agentA), h.agent(agentB)
	reply := h.start(continuable())
	d := a.pull()
	d.claim()
	d.say(1, delta(role), word("Once"))
	a.lost()
	ended := reading(reply)
	time.Sleep(2 * time.Second)
	d = b.pull()
	claimed := time.Now()
	d.claim()
	got := <-ended
	if took := time.Since(claimed); got.err == nil || !strings.Contains(got.err.Message, "first token") || took < 1500*time.Millisecond {
		t.Errorf("after %s the reply ended with %v", took, got.err)
	}
}
