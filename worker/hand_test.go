package worker_test

import (
	"encoding/json"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/tidwall/gjson"

	"github.com/ownllm/ownllm/schemas"
)

// owner is an owner that a test plays by hand.
type owner struct {
	h      *house
	nc     *nats.Conn
	id     schemas.OwnerID
	frames *nats.Subscription
	next   map[string]uint64 // for each run, the number of the frame that is expected
}

func (h *house) owner() *owner {
	h.t.Helper()
	o := &owner{h: h, nc: h.nats.Connect("other owner"), id: schemas.NewOwnerID(), next: make(map[string]uint64)}
	var err error
	if o.frames, err = o.nc.SubscribeSync(schemas.OutWildcard(o.id)); err != nil {
		h.t.Fatal(err)
	}
	// A frame that comes before the server knows of the subscription finds nobody.
	if err := o.nc.Flush(); err != nil {
		h.t.Fatal(err)
	}
	return o
}

// job is one that the worker would run.
func (o *owner) job(deadline time.Time) *schemas.Job {
	return &schemas.Job{
		Version: schemas.ProtocolVersion, Request: schemas.NewRequestID(), Attempt: 1, Nonce: schemas.NewNonce(),
		Owner: o.id, Tenant: tenant, Operation: "chat", Model: "demo", ReplyModel: "demo",
		Deadline: deadline.UnixMilli(), Completion: "chatcmpl-1", Stream: true,
	}
}

const body = `{"model":"demo","messages":[{"role":"user","content":"Hi"}],"stream":true}`

// publish puts a job into the queue.
func (o *owner) publish(job *schemas.Job) { o.ask(job, body) }

// ask puts a job with the body into the queue.
func (o *owner) ask(job *schemas.Job, body string) {
	o.h.t.Helper()
	if _, err := o.h.queue.Publish(o.h.t.Context(), agent, job, body, nats.Header{}); err != nil {
		o.h.t.Fatal(err)
	}
}

// take waits for the next frame, and notes it if its turn has come.
func (o *owner) take(wait time.Duration) (schemas.Frame, *nats.Msg, error) {
	o.h.t.Helper()
	m, err := o.frames.NextMsg(wait)
	if err != nil {
		return schemas.Frame{}, nil, err
	}
	f, err := schemas.DecodeFrame(m.Data)
	if err != nil {
		o.h.t.Fatal(err)
	}
	o.next[f.Run] = max(o.next[f.Run], 1)
	switch f.Kind {
	case schemas.FrameClaim, schemas.FrameProgress:
	default:
		if f.Seq == o.next[f.Run] {
			o.next[f.Run]++
		}
	}
	return f, m, nil
}

// say answers a frame, if it asks for that.
func (o *owner) say(f schemas.Frame, m *nats.Msg, v schemas.Verdict) {
	o.h.t.Helper()
	if v.Seq = f.Seq; v.Go {
		v.Next = o.next[f.Run]
	}
	if m.Reply == "" {
		return
	}
	if err := m.Respond(v.Encode()); err != nil {
		o.h.t.Fatal(err)
	}
}

// answer waits for a frame of the kind and answers every frame before it, and it, too.
func (o *owner) answer(kind schemas.FrameKind, v schemas.Verdict) schemas.Frame {
	o.h.t.Helper()
	for {
		f, m, err := o.take(patience)
		if err != nil {
			o.h.t.Fatalf("no frame of kind %s: %v", kind, err)
		}
		o.say(f, m, v)
		if f.Kind == kind {
			return f
		}
	}
}

// control sends the worker a word about an attempt.
func (o *owner) control(c schemas.Control) {
	o.h.t.Helper()
	if err := o.nc.Publish(schemas.ControlSubject(agent), c.Encode()); err != nil {
		o.h.t.Fatal(err)
	}
}

func (o *owner) raise(job *schemas.Job, limit int64, more bool) {
	o.h.t.Helper()
	o.control(schemas.Control{Operation: schemas.ControlLimit, Nonce: job.Nonce, Limit: limit, More: more})
}

// heard is what an owner has heard of a reply.
type heard struct {
	t      testing.TB
	o      *owner
	lines  []string             // the chunks, or the pieces of a body
	tokens int                  // as the frames count them
	prompt int                  // as a progress frame tells it
	last   schemas.Frame        // done or error
	wanted []int                // tokens that the worker has reported to need
	limit  func() (int64, bool) // what verdicts say; nil: nothing of a limit
	mute   bool                 // nothing is answered
}

func (o *owner) hear() *heard { return &heard{t: o.h.t, o: o} }

// step takes in one frame, and returns false if none comes.
func (r *heard) step(wait time.Duration) bool {
	r.t.Helper()
	f, m, err := r.o.take(wait)
	if err != nil {
		return false
	}
	switch f.Kind {
	case schemas.FrameClaim, schemas.FrameProgress:
		if f.Tokens > r.tokens {
			r.wanted = append(r.wanted, f.Tokens)
		}
		r.prompt = max(r.prompt, f.PromptTokens)
	default:
		if f.Seq != r.o.next[f.Run]-1 {
			r.t.Errorf("frame %d comes where %d is expected", f.Seq, r.o.next[f.Run])
		}
		for line := range strings.Lines(string(f.Payload)) {
			r.lines = append(r.lines, line)
		}
		r.tokens = f.Tokens
		if f.Kind.Terminal() {
			r.last = f
		}
	}
	if r.mute {
		return true
	}
	v := schemas.Verdict{Go: true}
	if r.limit != nil {
		v.Limit, v.More = r.limit()
	}
	r.o.say(f, m, v)
	return true
}

// until hears until the condition holds.
func (r *heard) until(what string, ok func() bool) {
	r.t.Helper()
	for deadline := time.Now().Add(patience); !ok(); {
		if time.Now().After(deadline) || !r.step(patience) {
			r.t.Fatalf("waited in vain for %s, with %d tokens", what, r.tokens)
		}
	}
}

// end hears to the end of the reply.
func (r *heard) end() *heard {
	r.t.Helper()
	r.until("the end", func() bool { return r.last.Kind != "" })
	return r
}

// text is what a choice says.
func (r *heard) text(choice int) string {
	var text strings.Builder
	for _, line := range r.lines {
		if int(gjson.Get(line, "choices.0.index").Int()) == choice {
			text.WriteString(gjson.Get(line, "choices.0.delta.content").Str)
		}
	}
	return text.String()
}

// finish is how a choice ends, as often as it does.
func (r *heard) finish(choice int) (list []string) {
	for _, line := range r.lines {
		if c := gjson.Get(line, "choices.0"); c.Exists() && int(c.Get("index").Int()) == choice && c.Get("finish_reason").Str != "" {
			list = append(list, c.Get("finish_reason").Str)
		}
	}
	return list
}

// want checks the whole reply of one choice: its numbers, its end and its usage.
func (r *heard) want(tokens int, finish string) {
	r.t.Helper()
	var want strings.Builder
	for i := range tokens {
		want.WriteString(" " + strconv.Itoa(i))
	}
	if got := r.text(0); got != want.String() {
		r.t.Errorf("the reply is %q, want %d numbers", got, tokens)
	}
	if got := r.finish(0); len(got) != 1 || got[0] != finish {
		r.t.Errorf("it ends with %q, want %q", got, finish)
	}
	if r.last.Kind != schemas.FrameDone || r.last.Usage == nil || r.last.Usage.CompletionTokens != tokens || r.last.Usage.PromptTokens == 0 {
		r.t.Errorf("the last frame is %+v with usage %+v, want %d tokens", r.last, r.last.Usage, tokens)
	}
}

// wish is a body that asks for something.
func wish(t testing.TB, fields map[string]any, faults map[string]any) string {
	t.Helper()
	b := map[string]any{
		"model": "demo", "messages": []any{map[string]any{"role": "user", "content": "Hi"}}, "stream": true, "demo": faults,
	}
	for k, v := range fields {
		b[k] = v
	}
	raw, err := json.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}
