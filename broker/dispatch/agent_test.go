package dispatch_test

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/schemas"
)

// agent is a worker that a test plays by hand.
type agent struct {
	h           *house
	id          schemas.AgentID
	nc          *nats.Conn
	incarnation schemas.Incarnation
	consumer    string
	control     *nats.Subscription
}

// agent makes an agent known, with a queue if there is a stream.
func (h *house) agent(id schemas.AgentID) *agent {
	h.t.Helper()
	a := &agent{h: h, id: id, nc: h.server.Agent(tenant, id, model)}
	if h.queue != nil {
		name, err := h.queue.EnsureConsumer(h.t.Context(), tenant, id, model)
		if err != nil {
			h.t.Fatal(err)
		}
		a.consumer = name
	}
	control, err := a.nc.SubscribeSync(schemas.ControlSubject(id))
	if err != nil {
		h.t.Fatal(err)
	}
	a.control = control
	if err := a.nc.Flush(); err != nil {
		h.t.Fatal(err)
	}
	a.restart()
	return a
}

// restart makes the agent known as a new run.
func (a *agent) restart() {
	a.incarnation = schemas.NewIncarnation()
	a.beat(schemas.AgentUp)
}

func (a *agent) beat(s schemas.AgentState) {
	a.h.table.Observe(tenant, a.id, heartbeat(a.incarnation, s), time.Now())
}

// lost makes the agent's run end.
func (a *agent) lost() { a.h.table.Lost(tenant, a.id, a.incarnation) }

// delivery is a job that was delivered to an agent: a run.
type delivery struct {
	a    *agent
	ack  string
	job  *schemas.Job
	body []byte
	run  string
	seq  uint64 // of the last frame
}

// pull waits for a job.
func (a *agent) pull() *delivery {
	a.h.t.Helper()
	m := a.request(patience)
	if len(m.Data) == 0 {
		a.h.t.Fatalf("%s got no job, but %v", a.id, m.Header)
	}
	return a.deliver(m.Data, m.Reply)
}

// idle checks that no job is there for the agent.
func (a *agent) idle() {
	a.h.t.Helper()
	if m := a.request(0); len(m.Data) != 0 {
		a.h.t.Errorf("%s got the job %s", a.id, m.Data)
	}
}

// request asks the consumer for a job; 0 says not to wait for one.
func (a *agent) request(wait time.Duration) *nats.Msg {
	a.h.t.Helper()
	sub, err := a.nc.SubscribeSync(a.nc.NewInbox())
	if err != nil {
		a.h.t.Fatal(err)
	}
	defer sub.Unsubscribe()
	ask := fmt.Sprintf(`{"batch":1,"expires":%d,"no_wait":%t}`, wait.Nanoseconds(), wait == 0)
	if err := a.nc.PublishRequest("$JS.API.CONSUMER.MSG.NEXT."+schemas.JobStream(a.id)+"."+a.consumer, sub.Subject, []byte(ask)); err != nil {
		a.h.t.Fatal(err)
	}
	m, err := sub.NextMsg(wait + patience)
	if err != nil {
		a.h.t.Fatalf("%s asked for a job: %v", a.id, err)
	}
	return m
}

func (a *agent) deliver(payload []byte, ack string) *delivery {
	a.h.t.Helper()
	job, body, err := schemas.DecodeJob(payload)
	if err != nil {
		a.h.t.Fatal(err)
	}
	return &delivery{a: a, ack: ack, job: job, body: body, run: string(schemas.NewNonce())}
}

// again is another run of the same delivery.
func (d *delivery) again() *delivery {
	other := *d
	other.run, other.seq = string(schemas.NewNonce()), 0
	return &other
}

func (d *delivery) subject() string { return schemas.OutSubject(d.a.id, d.job.Owner, d.job.Nonce) }

func (d *delivery) encode(f schemas.Frame) []byte {
	d.a.h.t.Helper()
	f.Run = d.run
	b, err := schemas.AppendFrame(nil, &f)
	if err != nil {
		d.a.h.t.Fatal(err)
	}
	return b
}

// send publishes a frame that wants no answer.
func (d *delivery) send(f schemas.Frame) {
	d.a.h.t.Helper()
	if err := d.a.nc.Publish(d.subject(), d.encode(f)); err != nil {
		d.a.h.t.Fatal(err)
	}
}

// ask sends a frame and returns the owner's verdict.
func (d *delivery) ask(f schemas.Frame) schemas.Verdict {
	d.a.h.t.Helper()
	return d.a.verdict(d.subject(), d.encode(f))
}

func (a *agent) verdict(subject string, frame []byte) schemas.Verdict {
	a.h.t.Helper()
	m, err := a.nc.Request(subject, frame, patience)
	if err != nil {
		a.h.t.Fatalf("no verdict: %v", err)
	}
	var v schemas.Verdict
	if err := json.Unmarshal(m.Data, &v); err != nil {
		a.h.t.Fatal(err)
	}
	return v
}

// unanswered checks that the owner doesn't answer a frame. Frames are answered one after
// the other, so what comes before the answer to a later one is all.
func (d *delivery) unanswered(f schemas.Frame) {
	d.a.h.t.Helper()
	sub, err := d.a.nc.SubscribeSync(d.a.nc.NewInbox())
	if err != nil {
		d.a.h.t.Fatal(err)
	}
	defer sub.Unsubscribe()
	if err := d.a.nc.PublishRequest(d.subject(), sub.Subject, d.encode(f)); err != nil {
		d.a.h.t.Fatal(err)
	}
	d.a.barrier()
	if n, _, _ := sub.Pending(); n != 0 {
		m, err := sub.NextMsg(patience)
		d.a.h.t.Fatalf("the frame was answered: %s, %v", m.Data, err)
	}
}

// barrier waits until the owner has looked at all frames that were sent before.
func (a *agent) barrier() {
	a.h.t.Helper()
	if v := a.verdict(schemas.OutSubject(a.id, a.h.d.Owner(), "barrier"), nil); v.Reason != schemas.ReasonFinished {
		a.h.t.Fatalf("an unknown nonce got %+v", v)
	}
}

// claim claims the job, which has to be granted.
func (d *delivery) claim() {
	d.a.h.t.Helper()
	d.want(schemas.Frame{Kind: schemas.FrameClaim}, schemas.Verdict{Go: true, Next: 1})
}

// want sends a frame as a request and compares the verdict.
func (d *delivery) want(f schemas.Frame, v schemas.Verdict) {
	d.a.h.t.Helper()
	v.Seq = f.Seq
	if got := d.ask(f); got != v {
		d.a.h.t.Fatalf("frame %+v got the verdict %+v, want %+v", f, got, v)
	}
}

// over sends a frame as a request, of which the owner has to say that all is over.
func (d *delivery) over(f schemas.Frame) {
	d.a.h.t.Helper()
	if got := d.ask(f); got != (schemas.Verdict{Reason: schemas.ReasonFinished}) {
		d.a.h.t.Fatalf("frame %+v got the verdict %+v, want none but that it is over", f, got)
	}
}

// chunk sends the next lines.
func (d *delivery) chunk(lines string) {
	d.a.h.t.Helper()
	d.seq++
	d.send(schemas.Frame{Kind: schemas.FrameChunk, Seq: d.seq, Tokens: int(d.seq), Payload: []byte(lines)})
}

// done sends the last frame, and acknowledges the job.
func (d *delivery) done(lines string) {
	d.a.h.t.Helper()
	d.seq++
	f := schemas.Frame{Kind: schemas.FrameDone, Seq: d.seq, Tokens: int(d.seq), Payload: []byte(lines), Usage: &schemas.Usage{PromptTokens: 3, CompletionTokens: int(d.seq)}}
	d.want(f, schemas.Verdict{Go: true, Next: d.seq + 1})
	d.finish()
}

// finish acknowledges the job.
func (d *delivery) finish() {
	d.a.h.t.Helper()
	if d.ack == "" {
		return
	}
	if _, err := d.a.nc.Request(d.ack, []byte("+ACK"), patience); err != nil {
		d.a.h.t.Fatal(err)
	}
}

// told waits for the word that an attempt is over.
func (d *delivery) told() {
	d.a.h.t.Helper()
	m, err := d.a.control.NextMsg(patience)
	if err != nil {
		d.a.h.t.Fatalf("%s wasn't told: %v", d.a.id, err)
	}
	var c schemas.Control
	if err := json.Unmarshal(m.Data, &c); err != nil {
		d.a.h.t.Fatal(err)
	}
	if want := (schemas.Control{Operation: schemas.ControlCancel, Nonce: d.job.Nonce, Reason: schemas.ReasonCancelled}); c != want {
		d.a.h.t.Fatalf("%s was told %+v, want %+v", d.a.id, c, want)
	}
}

// untold checks that the agent was told nothing.
func (a *agent) untold() {
	a.h.t.Helper()
	a.barrier()
	if n, _, _ := a.control.Pending(); n != 0 {
		m, err := a.control.NextMsg(patience)
		a.h.t.Errorf("%s was told %s, %v", a.id, m.Data, err)
	}
}
