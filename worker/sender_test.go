package worker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"pgregory.net/rapid"

	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/broker/presence"
	"github.com/ownllm/ownllm/broker/quota"
	"github.com/ownllm/ownllm/internal/natstest"
	"github.com/ownllm/ownllm/internal/quotatest"
	"github.com/ownllm/ownllm/schemas"
)

const (
	testTenant = schemas.TenantID("ten_1")
	testAgent  = schemas.AgentID("agt_1")
	testModel  = "demo"
	patience   = 10 * time.Second
)

// badLine is a line between the senders of a worker and a real owner on which the test
// decides what arrives, in which order, and how often. Nothing on it moves by itself, so
// that a run of the test can be repeated.
type badLine struct {
	w        *Worker
	nc       *nats.Conn // between the two
	d        *dispatch.Dispatcher
	jobs     *nats.Subscription
	frames   *nats.Subscription // of the senders, to an owner that doesn't exist
	inbox    string
	verdicts *nats.Subscription // of the real owner
	bundles  []message          // on their way to the owner
}

const nobody = schemas.OwnerID("own_nobody")

func newBadLine(t *testing.T) *badLine {
	t.Helper()
	server := natstest.Start(t)
	core, queue := server.Queue(1e6)
	table := presence.NewTable()
	owner := server.Connect("owner")
	d := dispatch.New(dispatch.Parts{
		Tokens: owner, Bulk: owner, Queue: queue, Agents: table, Feed: presence.NewFeed(owner, table, natstest.Log),
		Gate: quotatest.New().Gate(t, quota.Config{}), Log: natstest.Log,
	}, dispatch.DefaultConfig())
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	line := server.Config("line")
	line.InboxPrefix = schemas.AgentInboxPrefix(testAgent)
	l := &badLine{
		w:  newTestWorker(t, server, server.Agent(testTenant, testAgent, testModel)),
		nc: server.Open(line), d: d,
	}
	l.inbox = l.nc.NewInbox()
	var err error
	if l.jobs, err = core.SubscribeSync(schemas.JobSubjects); err != nil {
		t.Fatal(err)
	}
	for subject, sub := range map[string]**nats.Subscription{
		schemas.OutWildcard(nobody): &l.frames, l.inbox + ".*": &l.verdicts,
	} {
		if *sub, err = l.nc.SubscribeSync(subject); err != nil {
			t.Fatal(err)
		}
	}
	inventory := schemas.Inventory{Models: []schemas.Model{{ID: testModel, State: schemas.ModelReady}}}
	table.Observe(testTenant, testAgent, &schemas.Heartbeat{
		Version: schemas.ProtocolVersion, Incarnation: schemas.NewIncarnation(), State: schemas.AgentUp, Inventory: &inventory, Hash: inventory.Hash(),
	}, time.Now())
	for deadline := time.Now().Add(patience); l.barrier() != nil; {
		if time.Now().After(deadline) {
			t.Fatal("nobody listens to frames")
		}
	}
	return l
}

// barrier waits until the owner has looked at all that has reached it.
func (l *badLine) barrier() error {
	_, err := l.nc.Request(schemas.OutSubject(testAgent, l.d.Owner(), "barrier"), nil, patience)
	return err
}

// message is a frame or a verdict on its way.
type message struct {
	data   []byte
	answer bool // of a frame: it wants an answer
}

// arrived takes what has come out at one end, by subject.
func arrived(t *rapid.T, sub *nats.Subscription) map[string][]message {
	list := make(map[string][]message)
	for {
		n, _, err := sub.Pending()
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			return list
		}
		m, err := sub.NextMsg(patience)
		if err != nil {
			t.Fatal(err)
		}
		list[m.Subject] = append(list[m.Subject], message{m.Data, m.Reply != ""})
	}
}

// passage is one reply on its way over the bad line.
type passage struct {
	*badLine
	s        *sender
	reply    *dispatch.Reply
	out      string // the subject of frames at the real owner
	back     string // the subject of its verdicts
	now      time.Time
	heard    time.Time // when the sender last got a verdict
	frames   []message // on their way to the owner
	verdicts []message // on their way back
	sent     strings.Builder
	tokens   int
	failure  *schemas.Error
	ended    bool // the last frame was sent
	stopped  error
}

func (l *badLine) open(t *rapid.T) *passage {
	p := &passage{badLine: l, now: time.Now(), heard: time.Now()}
	var err error
	p.reply, _, err = l.d.Start(context.Background(), dispatch.Request{
		ID: schemas.NewRequestID(), Tenant: testTenant, Operation: "chat", Model: testModel, Body: "{}", Stream: true, Received: p.now,
	})
	if err != nil {
		t.Fatal(err)
	}
	m, err := l.jobs.NextMsg(patience)
	if err != nil {
		t.Fatal(err)
	}
	job, _, err := schemas.DecodeJob(m.Data)
	if err != nil {
		t.Fatal(err)
	}
	p.out = schemas.OutSubject(testAgent, job.Owner, job.Nonce)
	p.back = l.inbox + "." + string(job.Nonce)
	job.Owner = nobody
	p.s = newSender(l.w, job, "ack", func(cause error) { p.stopped = cause })
	p.s.claim(false)
	return p
}

// collect waits until everything that was sent is on the line. What is of a reply before is
// left out.
func (l *badLine) collect(t *rapid.T, passages []*passage) {
	if err := errors.Join(l.w.tokens.Flush(), l.barrier()); err != nil {
		t.Fatal(err)
	}
	frames, verdicts := arrived(t, l.frames), arrived(t, l.verdicts)
	l.bundles = append(l.bundles, frames[schemas.BundleSubject(testAgent, nobody)]...)
	for _, p := range passages {
		p.frames = append(p.frames, frames[p.s.subject]...)
		p.verdicts = append(p.verdicts, verdicts[p.back]...)
	}
}

// deliverBundle lets a bundle reach the owner.
func (l *badLine) deliverBundle(t *rapid.T, m message) {
	if m.answer {
		t.Fatal("a bundle wants an answer")
	}
	if err := l.nc.Publish(schemas.BundleSubject(testAgent, l.d.Owner()), m.data); err != nil {
		t.Fatal(err)
	}
}

// deliver lets a frame reach the owner.
func (p *passage) deliver(t *rapid.T, m message) {
	var err error
	if m.answer {
		err = p.nc.PublishRequest(p.out, p.back, m.data)
	} else {
		err = p.nc.Publish(p.out, m.data)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// answer lets a verdict reach the sender.
func (p *passage) answer(t *rapid.T, m message) {
	var v schemas.Verdict
	if err := json.Unmarshal(m.data, &v); err != nil {
		t.Fatal(err)
	}
	p.heard = p.now
	p.s.answered(v, p.now)
}

func (p *passage) chunk(t *rapid.T) {
	lines := ""
	for range rapid.IntRange(1, 3).Draw(t, "lines") {
		lines += fmt.Sprintf("%d\n", p.tokens)
		p.tokens++
	}
	p.sent.WriteString(lines)
	if err := p.s.chunk(t.Context(), []byte(lines), p.tokens); err != nil {
		t.Fatal(err)
	}
}

func (p *passage) end(t *rapid.T) {
	p.ended = true
	if rapid.Bool().Draw(t, "fails") {
		p.failure = schemas.Errorf(schemas.CodeBackendError, "broken")
		p.s.fail(p.failure)
		return
	}
	last := "last\n"
	p.sent.WriteString(last)
	p.s.done([]byte(last), p.tokens, schemas.Usage{PromptTokens: 7, CompletionTokens: p.tokens})
}

// pick takes a message off the line, most often the oldest, or leaves it there, too. It
// returns false if nothing is on the line.
func pick(t *rapid.T, list *[]message, keep bool) (message, bool) {
	if len(*list) == 0 {
		return message{}, false
	}
	i := 0
	if rapid.Bool().Draw(t, "out of order") {
		i = rapid.IntRange(0, len(*list)-1).Draw(t, "which")
	}
	m := (*list)[i]
	if !keep {
		*list = append((*list)[:i:i], (*list)[i+1:]...)
	}
	return m, true
}

// consistent checks what the sender keeps: all frames from the first that it doesn't know
// to be taken to the last, each whole.
func (p *passage) consistent(t *rapid.T) {
	s := p.s
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, k := range s.kept {
		end := len(s.buf)
		if i+1 < len(s.kept) {
			end = s.kept[i+1].start
		}
		f, err := schemas.DecodeFrame(s.buf[k.start:end])
		if err != nil {
			t.Fatal(err)
		}
		if f.Seq != k.seq || f.Run != s.id || f.Kind.Terminal() != k.final || f.Seq != s.last-uint64(len(s.kept)-1-i) {
			t.Fatalf("frame %d of %d that end with %d is %+v, noted as %+v", i, len(s.kept), s.last, f, k)
		}
	}
	if len(s.kept) == 0 && len(s.buf) != 0 {
		t.Fatalf("%d bytes of no frame are kept", len(s.buf))
	}
}

// The heart of the protocol: whatever is lost, repeated and reordered between a worker and
// the owner of a request, the client gets what the worker sent, in order, each line once;
// and once the line is good again, the worker learns of it within a few reports.
func TestNothingIsLostOrRepeatedOnABadLine(t *testing.T) {
	line := newBadLine(t)
	for range 4 {
		rapid.Check(t, func(t *rapid.T) { line.pass(t, 1) })
	}
}

// It is so, too, for replies whose frames share bundles.
func TestNothingIsLostOrRepeatedInBundles(t *testing.T) {
	line := newBadLine(t)
	for range 2 {
		rapid.Check(t, func(t *rapid.T) { line.pass(t, 2) })
	}
}

// pass brings replies over the line; several may share bundles.
func (l *badLine) pass(t *rapid.T, replies int) {
	l.w.bundles.many.Store(false)
	l.w.bundles.sendAll()
	var all []*passage
	for range replies {
		p := l.open(t)
		defer p.reply.Close()
		all = append(all, p)
	}
	l.collect(t, all)
	l.bundles = nil
	one := func(act func(t *rapid.T, p *passage)) func(*rapid.T) {
		return func(t *rapid.T) { act(t, all[rapid.IntRange(0, len(all)-1).Draw(t, "reply")]) }
	}
	actions := map[string]func(*rapid.T){
		"send": one(func(t *rapid.T, p *passage) {
			if !p.ended {
				p.chunk(t)
			}
		}),
		"end": one(func(t *rapid.T, p *passage) {
			if !p.ended && rapid.IntRange(0, 9).Draw(t, "not yet") == 0 {
				p.end(t)
			}
		}),
		"report": one(func(t *rapid.T, p *passage) {
			p.now = p.now.Add(time.Duration(rapid.IntRange(1, 1000).Draw(t, "ms")) * time.Millisecond)
			if p.now.Sub(p.heard) > ownerSilence/2 {
				// The owner would count as dead, if the line didn't.
				p.heard = p.now
				p.s.tick(p.now, false, true)
			}
			p.s.tick(p.now, true, true)
		}),
		"deliver": one(func(t *rapid.T, p *passage) {
			if m, ok := pick(t, &p.frames, rapid.Bool().Draw(t, "repeat")); ok {
				p.deliver(t, m)
			}
		}),
		"lose": one(func(t *rapid.T, p *passage) { pick(t, &p.frames, false) }),
		"answer": one(func(t *rapid.T, p *passage) {
			if m, ok := pick(t, &p.verdicts, rapid.Bool().Draw(t, "repeat")); ok {
				p.answer(t, m)
			}
		}),
		"lose an answer": one(func(t *rapid.T, p *passage) { pick(t, &p.verdicts, false) }),
		"": func(t *rapid.T) {
			l.collect(t, all)
			for _, p := range all {
				p.consistent(t)
				if p.stopped != nil && !p.ended {
					t.Fatalf("the run was stopped: %v", p.stopped)
				}
			}
		},
	}
	if replies > 1 {
		actions["gather or not"] = func(t *rapid.T) { l.w.bundles.many.Store(rapid.IntRange(0, 3).Draw(t, "gather") > 0) }
		actions["send the bundle"] = func(*rapid.T) { l.w.bundles.sendAll() }
		actions["deliver a bundle"] = func(t *rapid.T) {
			if m, ok := pick(t, &l.bundles, rapid.Bool().Draw(t, "repeat")); ok {
				l.deliverBundle(t, m)
			}
		}
		actions["lose a bundle"] = func(t *rapid.T) { pick(t, &l.bundles, false) }
	}
	t.Repeat(actions)
	for _, p := range all {
		if !p.ended {
			p.end(t)
		}
	}
	l.goodAgain(t, all)
	for _, p := range all {
		p.arrivedWhole(t)
	}
}

// goodAgain makes the line a good one: what is still on it arrives, late and in order.
func (l *badLine) goodAgain(t *rapid.T, all []*passage) {
	const rounds = 6
	for round := 0; slices.ContainsFunc(all, func(p *passage) bool { return !closed(p.s.heard) }); round++ {
		if round == rounds {
			t.Fatalf("after %d rounds on a good line the owner hasn't all", rounds)
		}
		for _, p := range all {
			p.now = p.now.Add(progressEvery)
			p.s.tick(p.now, true, true)
		}
		l.w.bundles.sendAll()
		l.collect(t, all)
		for _, m := range l.bundles {
			l.deliverBundle(t, m)
		}
		l.bundles = nil
		for _, p := range all {
			for _, m := range p.frames {
				p.deliver(t, m)
			}
			p.frames = nil
		}
		// The last frame is answered when the books have it, which no barrier waits for.
		for deadline := time.Now().Add(time.Second); ; {
			l.collect(t, all)
			unanswered := func(p *passage) bool { return !closed(p.s.heard) && len(p.verdicts) == 0 }
			if !slices.ContainsFunc(all, unanswered) || time.Now().After(deadline) {
				break
			}
		}
		for _, p := range all {
			for _, m := range p.verdicts {
				p.answer(t, m)
			}
			p.verdicts = nil
			p.consistent(t)
		}
	}
}

func closed(c chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// arrivedWhole checks what the client gets.
func (p *passage) arrivedWhole(t *rapid.T) {
	timer := time.AfterFunc(patience, func() { p.reply.Interrupt(schemas.Errorf(schemas.CodeInternalError, "the test waited in vain")) })
	defer timer.Stop()
	var got strings.Builder
	for {
		ev := p.reply.Next()
		for _, lines := range ev.Payload {
			got.Write(lines)
		}
		if ev.Kind != dispatch.EventDone && ev.Kind != dispatch.EventError {
			continue
		}
		if got.String() != p.sent.String() {
			t.Fatalf("the client got %q of %q", got.String(), p.sent.String())
		}
		if (ev.Err == nil) != (p.failure == nil) || ev.Err != nil && *ev.Err != *p.failure {
			t.Fatalf("the reply ends with %v, want %v", ev.Err, p.failure)
		}
		want := schemas.Usage{CompletionTokens: p.tokens}
		if p.failure == nil {
			want.PromptTokens = 7
		}
		if u := p.reply.Usage(); u != want {
			t.Fatalf("usage is %+v, want %+v", u, want)
		}
		return
	}
}
