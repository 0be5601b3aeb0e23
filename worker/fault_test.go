package worker_test

import (
	"context"
	"encoding/json"
	"testing"
	"time"

	"github.com/tidwall/gjson"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/presence"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker"
	"github.com/ownllm/ownllm/worker/backend"
	"github.com/ownllm/ownllm/worker/demo"
)

// deleteConsumer makes JetStream forget what it has delivered, as a restart does.
func (h *house) deleteConsumer(model string) {
	h.t.Helper()
	subject := "$JS.API.CONSUMER.DELETE." + schemas.JobStream(agent) + "." + bus.ConsumerName(agent, model)
	m, err := h.core.Request(subject, nil, patience)
	if err != nil {
		h.t.Fatal(err)
	}
	var answer struct {
		Success bool `json:"success"`
	}
	if err := json.Unmarshal(m.Data, &answer); err != nil || !answer.Success {
		h.t.Fatalf("consumer not deleted: %s", m.Data)
	}
}

// delivered counts the deliveries of the consumer, and those that wait for their
// acknowledgement.
func (h *house) delivered(model string) (all, pending int) {
	m, err := h.core.Request("$JS.API.CONSUMER.INFO."+schemas.JobStream(agent)+"."+bus.ConsumerName(agent, model), nil, patience)
	if err != nil {
		return 0, 0 // not made yet
	}
	var info struct {
		Delivered struct {
			Consumer int `json:"consumer_seq"`
		} `json:"delivered"`
		Pending int `json:"num_ack_pending"`
	}
	if err := json.Unmarshal(m.Data, &info); err != nil {
		h.t.Fatal(err)
	}
	return info.Delivered.Consumer, info.Pending
}

// A consumer that is made anew delivers what runs as if for the first time. The run goes
// on, and its end takes the job out of the queue.
func TestJobThatIsDeliveredAgain(t *testing.T) {
	t.Parallel()
	h, s := one(t, demo.Options{}, 4)
	c := h.start(request("demo", true, numbered(40, 8*time.Second))).begin()
	h.deleteConsumer("demo")
	until(t, "the second delivery", func() bool { all, _ := h.delivered("demo"); return all == 1 })
	other := h.start(request("demo", true, numbered(3, 0)))
	other.wantNumbered(3)
	c.wantNumbered(40)
	ended := time.Now()
	if n := s.stats().Started; n != 2 {
		t.Errorf("the backend got %d requests, want 2", n)
	}
	until(t, "an empty queue", func() bool { return h.depth() == 0 })
	if took := time.Since(ended); took > bus.AckWait/2 {
		t.Errorf("the job left the queue after %s: the second delivery wasn't answered for", took)
	}
	until(t, "no delivery without an answer", func() bool { _, pending := h.delivered("demo"); return pending == 0 })
}

// The bus is restarted in the middle of streams, with one job waiting: each runs once, and
// nobody misses a token.
func TestRestartOfTheBus(t *testing.T) {
	t.Parallel()
	h, s := one(t, demo.Options{}, 2)
	const tokens = 300
	chats := []*chat{
		h.start(request("demo", true, numbered(tokens, 5*time.Second))).begin(),
		h.start(request("demo", true, numbered(tokens, 3*time.Second))).begin(),
		h.start(request("demo", true, numbered(tokens, 0))),
	}
	before := s.stats().Tokens
	h.nats.Restart(func() {
		until(t, "tokens that nobody hears", func() bool { return s.stats().Tokens > before+50 })
	})
	for _, c := range chats {
		c.wantNumbered(tokens)
	}
	if n := s.stats(); n.Started != 3 || n.Aborted != 0 {
		t.Errorf("the backend saw %+v, want 3 requests", n)
	}
	until(t, "an empty queue", func() bool { return h.depth() == 0 })
	h.start(request("demo", true, numbered(3, 0))).wantNumbered(3)
}

// Nobody is there any more who wants the reply: the backend is free again soon.
func TestOwnerThatDies(t *testing.T) {
	t.Parallel()
	h, s := one(t, demo.Options{}, 1)
	h.start(request("demo", true, numbered(6000, 10*time.Minute))).begin()
	h.stopOwner()
	died := time.Now()
	until(t, "the backend to be free", func() bool { return s.stats().Active == 0 })
	if took := time.Since(died); took > 8*time.Second {
		t.Errorf("that took %s", took)
	}
	until(t, "an empty queue", func() bool { return h.depth() == 0 })
}

// A job whose time is up isn't run, and its owner hears why: if the two clocks don't
// agree, it would wait in vain.
func TestLateJob(t *testing.T) {
	t.Parallel()
	h, s := one(t, demo.Options{}, 1)
	o := h.owner()
	o.publish(o.job(time.Now().Add(-time.Second)))
	f := o.answer(schemas.FrameError, schemas.Verdict{Go: true})
	if f.Error.Code != schemas.CodeAgentTimeout {
		t.Errorf("the owner hears %v", f.Error)
	}
	until(t, "an empty queue", func() bool { return h.depth() == 0 })
	if n := s.stats().Started; n != 0 {
		t.Errorf("the backend got %d requests", n)
	}
}

// An owner that refuses the claim gets nothing more, and the job is gone.
func TestRefusedClaim(t *testing.T) {
	t.Parallel()
	h, s := one(t, demo.Options{}, 1)
	o := h.owner()
	for _, reason := range []string{schemas.ReasonCancelled, schemas.ReasonSuperseded, schemas.ReasonFinished} {
		o.publish(o.job(time.Now().Add(time.Minute)))
		o.answer(schemas.FrameClaim, schemas.Verdict{Reason: reason})
		until(t, "an empty queue after "+reason, func() bool { return h.depth() == 0 && s.stats().Active == 0 })
	}
	h.start(request("demo", true, numbered(3, 0))).wantNumbered(3)
}

// What can't be read, or isn't for this worker, is taken out of the queue, and the ones
// behind it are served.
func TestJobsThatAreNone(t *testing.T) {
	t.Parallel()
	h, s := one(t, demo.Options{}, 1)
	subject := schemas.JobSubject(tenant, agent, "demo")
	o := h.owner()
	for name, change := range map[string]func(*schemas.Job){
		"another tenant":  func(j *schemas.Job) { j.Tenant = "ten_2" },
		"another version": func(j *schemas.Job) { j.Version++ },
		"no request":      func(j *schemas.Job) { j.Request = "" },
	} {
		job := o.job(time.Now().Add(time.Minute))
		change(job)
		payload, err := job.Encode(body)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := h.core.Request(subject, payload, patience); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	for _, payload := range []string{"", "\n", "{}\n{}", "no job at all"} {
		if _, err := h.core.Request(subject, []byte(payload), patience); err != nil {
			t.Fatalf("%q: %v", payload, err)
		}
	}
	until(t, "an empty queue", func() bool { return h.depth() == 0 })
	if n := s.stats().Started; n != 0 {
		t.Errorf("the backend got %d requests", n)
	}
	h.start(request("demo", true, numbered(3, 0))).wantNumbered(3)
}

// A model that the worker has lost meanwhile is said to be gone.
func TestModelThatIsGone(t *testing.T) {
	t.Parallel()
	h, s := one(t, demo.Options{Models: models("old", "stays")}, 1)
	busy := h.start(request("stays", true, numbered(10, 10*time.Second))).begin()
	var waiting []*chat
	for range 5 { // one waits for a slot, and the others in the queue
		waiting = append(waiting, h.start(request("old", true, nil)))
	}
	s.demo.Store(demo.New(demo.Options{Models: models("new", "stays")}))
	began := time.Now()
	until(t, "the new model", func() bool { return h.state("new") == schemas.ModelReady && h.state("old") == "" })
	if took := time.Since(began); took > 5*time.Second+slack {
		t.Errorf("that took %s", took)
	}
	fresh := h.start(request("new", true, numbered(3, 0)))
	busy.wantNumbered(10)
	for _, c := range waiting {
		if err := c.end(); err == nil || err.Code != schemas.CodeModelNotFound {
			t.Errorf("a request for a model that is gone ends with %v", err)
		}
	}
	fresh.wantNumbered(3)
	until(t, "an empty queue", func() bool { return h.depth() == 0 })
}

// While its server is down a model is known, as failed; then it is back.
func TestBackendThatIsDown(t *testing.T) {
	t.Parallel()
	h, s := one(t, demo.Options{}, 1)
	up := s.demo.Swap(nil)
	until(t, "the model to fail", func() bool { return h.state("demo") == schemas.ModelFailed })
	if _, _, err := h.d.Start(context.Background(), request("demo", true, nil)); err == nil || schemas.AsError(err).Code != schemas.CodeBackendError {
		t.Errorf("a request for it gets %v", err)
	}
	s.demo.Store(up)
	until(t, "the model to be back", func() bool { return h.state("demo") == schemas.ModelReady })
	h.start(request("demo", true, numbered(3, 0))).wantNumbered(3)
}

// A worker whose backend isn't up yet says that it can't know: models of before stay known, as
// failed, until the backend tells which of them it has.
func TestBackendThatIsLate(t *testing.T) {
	t.Parallel()
	early, late := newServer(t, demo.Options{Models: models("early")}), newServer(t, demo.Options{Models: models("late")})
	up := late.demo.Swap(nil)
	h := newHouse(t, worker.Config{Backends: []backend.Config{{URL: early.URL}, {URL: late.URL}}, Drain: patience})
	refused := func(model string) schemas.Code {
		_, _, err := h.d.Start(context.Background(), request(model, true, nil))
		if err == nil {
			return ""
		}
		return schemas.AsError(err).Code
	}
	if got := refused("late"); got != schemas.CodeModelNotFound {
		t.Errorf("a model that was never heard of: %q", got)
	}
	h.table.Restore(presence.Known{Tenant: tenant, Agent: agent, Inventory: schemas.Inventory{Models: models("early", "late", "gone")}})
	for _, model := range []string{"late", "gone"} {
		if got := refused(model); got != schemas.CodeBackendError {
			t.Errorf("%s, of which nothing is known yet: %q", model, got)
		}
	}
	h.start(request("early", true, numbered(3, 0))).wantNumbered(3)
	late.demo.Store(up)
	until(t, "the model to be back", func() bool { return h.state("late") == schemas.ModelReady })
	h.start(request("late", true, numbered(3, 0))).wantNumbered(3)
	if got := refused("gone"); got != schemas.CodeModelNotFound {
		t.Errorf("a model that the backend doesn't have: %q", got)
	}
}

// Many requests for a model that has to be loaded cause one load, and all are answered.
func TestColdModel(t *testing.T) {
	t.Parallel()
	faults := demo.NoFaults()
	faults.LoadMS = 4000
	cold := models("demo")
	cold[0].State = schemas.ModelCold
	h, s := one(t, demo.Options{Models: cold, Faults: &faults}, 2)
	if got := h.state("demo"); got != schemas.ModelCold {
		t.Fatalf("the model is %s", got)
	}
	const requests = 8
	var chats []*chat
	for range requests {
		chats = append(chats, h.start(request("demo", true, numbered(3, 0))))
	}
	until(t, "the load to be told", func() bool { return h.state("demo") == schemas.ModelLoading })
	o := h.owner()
	o.publish(o.job(time.Now().Add(time.Minute))) // it doesn't wait for a load
	refusal := o.answer(schemas.FrameError, schemas.Verdict{Go: true}).Error
	if after := refusal.RetryAfterSeconds(); refusal.Code != schemas.CodeModelLoading || after < 2 || after > 10 {
		t.Errorf("who can't wait gets %v and comes back after %d s", refusal, after)
	}
	for _, c := range chats {
		c.wantNumbered(3)
	}
	// The load itself is a request to the backend.
	if n := s.stats(); n.Started != requests+1 || n.Peak > 2 {
		t.Errorf("the backend saw %+v, want %d requests and one that loads", n, requests)
	}
	until(t, "the model to be ready", func() bool { return h.state("demo") == schemas.ModelReady })
	until(t, "an empty queue", func() bool { return h.depth() == 0 })
}

// A model that its backend has unloaded without the worker's knowing is loaded by the next
// request. That waits for the load like any other, for as long as it says, and no longer; the
// load goes on without it.
func TestModelUnloadedMeanwhile(t *testing.T) {
	t.Parallel()
	for _, stream := range []bool{true, false} {
		h, s := one(t, demo.Options{}, 4)
		faults := demo.NoFaults()
		faults.LoadMS = 5000
		if err := s.demo.Load().SetFaults("", faults); err != nil {
			t.Fatal(err)
		}
		if got := h.state("demo"); got != schemas.ModelReady {
			t.Fatalf("the worker knows already that the model is %s, so that nothing is shown", got)
		}
		began := time.Now()
		patient := h.start(request("demo", stream, numbered(3, 0)))
		o := h.owner()
		j := o.job(time.Now().Add(time.Minute))
		j.Stream = stream
		o.publish(j) // it doesn't wait for a load
		refusal := o.answer(schemas.FrameError, schemas.Verdict{Go: true}).Error
		after := refusal.RetryAfterSeconds()
		if took := time.Since(began); refusal.Code != schemas.CodeModelLoading || after < 2 || after > 10 || took > 4*time.Second+time.Second/2 {
			t.Errorf("stream %v: who can't wait gets %v after %s, to come back after %d s", stream, refusal, took, after)
		}
		until(t, "the word that the model is being loaded", func() bool { return h.state("demo") == schemas.ModelLoading })
		if err := patient.end(); err != nil {
			t.Errorf("stream %v: who waits gets %v", stream, err)
		} else if got := gjson.Get(patient.body.String(), "choices.0.message.content").Str; !stream && got != " 0 1 2" || stream && patient.text.String() != " 0 1 2" {
			t.Errorf("stream %v: who waits gets %q", stream, patient.body.String())
		}
		until(t, "the model to be ready", func() bool { return h.state("demo") == schemas.ModelReady })
		h.start(request("demo", true, numbered(3, 0))).wantNumbered(3)
	}
}
