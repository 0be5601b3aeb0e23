package worker_test

import (
	"testing"
	"time"

	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker"
	"github.com/ownllm/ownllm/worker/backend"
	"github.com/ownllm/ownllm/worker/demo"
)

// die takes an owner off the bus.
func (o *owner) die() {
	o.h.t.Helper()
	if err := o.frames.Unsubscribe(); err != nil {
		o.h.t.Fatal(err)
	}
	if err := o.nc.Flush(); err != nil {
		o.h.t.Fatal(err)
	}
}

// reports returns the usage reports that are stored.
func (h *house) reports() (list []*schemas.UsageReport) {
	h.t.Helper()
	js, err := h.core.JetStream()
	if err != nil {
		h.t.Fatal(err)
	}
	info, err := js.StreamInfo(schemas.UsageStream)
	if err != nil {
		return nil // the server isn't back yet
	}
	for seq := max(1, info.State.FirstSeq); seq <= info.State.LastSeq; seq++ {
		m, err := js.GetMsg(schemas.UsageStream, seq)
		if err != nil {
			h.t.Fatal(err)
		}
		if m.Subject != schemas.UsageSubject(tenant, agent) {
			h.t.Errorf("a report is on %s", m.Subject)
		}
		u, err := schemas.DecodeUsageReport(m.Data)
		if err != nil {
			h.t.Fatal(err)
		}
		list = append(list, u)
	}
	return list
}

// wantReport waits for the report on a job, the only one, and returns its usage.
func (h *house) wantReport(job *schemas.Job) schemas.Usage {
	h.t.Helper()
	until(h.t, "the report", func() bool { return len(h.reports()) > 0 })
	list := h.reports()
	if u := list[0]; len(list) != 1 || u.Request != job.Request || u.Attempt != job.Attempt || u.Version != schemas.ProtocolVersion {
		h.t.Fatalf("%d reports, the first is %+v", len(list), u)
	}
	return list[0].Usage
}

// A worker whose owner dies says what it has sent.
func TestReportOfAStream(t *testing.T) {
	t.Parallel()
	for name, counts := range map[string]bool{"of an unknown prompt": false, "of a counted prompt": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h, s := one(t, demo.Options{}, 1)
			o := h.owner()
			job := o.job(time.Now().Add(10 * time.Minute))
			job.Count, job.Attempt = counts, 2
			o.ask(job, wish(t, nil, numbered(6000, 10*time.Minute)))
			r := o.hear()
			r.until("some tokens", func() bool { return r.tokens > 4 })
			o.die()
			died := time.Now()
			usage := h.wantReport(job)
			if took := time.Since(died); took > 8*time.Second {
				t.Errorf("the report came after %s", took)
			}
			if usage.CompletionTokens < r.tokens || usage.CompletionTokens > r.tokens+100 || usage.PromptTokens != r.prompt || counts != (r.prompt > 0) {
				t.Errorf("%+v is reported where at least %d tokens came, of a prompt of %d", usage, r.tokens, r.prompt)
			}
			until(t, "the backend to be free", func() bool { return s.stats().Active == 0 })
			until(t, "an empty queue", func() bool { return h.depth() == 0 })
		})
	}
}

// An owner that dies before it has the last frame leaves the whole usage to the worker.
func TestReportOfAWholeReply(t *testing.T) {
	t.Parallel()
	h, _ := one(t, demo.Options{}, 1)
	o := h.owner()
	job := o.job(time.Now().Add(time.Minute))
	job.Stream = false
	o.ask(job, wish(t, map[string]any{"stream": false}, with(numbered(20, time.Second), "prompt_tokens", 77)))
	o.answer(schemas.FrameClaim, schemas.Verdict{Go: true})
	o.die()
	if usage := h.wantReport(job); usage != (schemas.Usage{PromptTokens: 77, CompletionTokens: 20}) {
		t.Errorf("%+v is reported", usage)
	}
}

// An owner that takes the last frame, and dies before it says so, is dead.
func TestReportOfAReplyWithoutThanks(t *testing.T) {
	t.Parallel()
	h, _ := one(t, demo.Options{}, 1)
	o := h.owner()
	job := o.job(time.Now().Add(time.Minute))
	o.ask(job, wish(t, nil, with(numbered(20, 0), "prompt_tokens", 77)))
	r := o.hear()
	r.mute = true
	r.end()
	o.die()
	if usage := h.wantReport(job); usage != (schemas.Usage{PromptTokens: 77, CompletionTokens: 20}) {
		t.Errorf("%+v is reported", usage)
	}
}

// Of an owner that is content nothing is reported, nor of one that has cancelled.
func TestNoReport(t *testing.T) {
	t.Parallel()
	h, s := one(t, demo.Options{}, 2)
	h.start(request("demo", true, numbered(3, 0))).wantNumbered(3)
	h.start(request("demo", true, numbered(6000, 10*time.Minute))).begin().reply.Close()
	o := h.owner()
	job := o.job(time.Now().Add(10 * time.Minute))
	o.ask(job, wish(t, nil, numbered(6000, 10*time.Minute)))
	o.answer(schemas.FrameChunk, schemas.Verdict{Go: true})
	o.answer(schemas.FrameProgress, schemas.Verdict{Reason: schemas.ReasonSuperseded})
	o.die()
	until(t, "the backend to be free", func() bool { return s.stats().Active == 0 })
	until(t, "an empty queue", func() bool { return h.depth() == 0 })
	h.stop()
	if list := h.reports(); len(list) != 0 {
		t.Errorf("%d reports, the first is %+v", len(list), list[0])
	}
}

// The bus goes away with the owner: the report is stored when it is back, and once.
func TestReportWithoutABus(t *testing.T) {
	t.Parallel()
	h, s := one(t, demo.Options{}, 1)
	o := h.owner()
	job := o.job(time.Now().Add(10 * time.Minute))
	o.ask(job, wish(t, nil, numbered(6000, 10*time.Minute)))
	r := o.hear()
	r.until("some tokens", func() bool { return r.tokens > 4 })
	o.die()
	h.nats.Restart(func() {
		until(t, "the loss of the bus", func() bool { return !h.tokens.IsConnected() })
	})
	// It is given time to come back, too.
	until(t, "the backend to be free", func() bool { return s.stats().Active == 0 })
	h.nats.Restart(func() { until(t, "the loss of the bus", func() bool { return !h.tokens.IsConnected() }) })
	if usage := h.wantReport(job); usage.CompletionTokens < r.tokens {
		t.Errorf("%+v is reported where %d tokens came", usage, r.tokens)
	}
}

// A worker that is stopped has a last word.
func TestReportOfAWorkerThatStops(t *testing.T) {
	t.Parallel()
	s := newServer(t, demo.Options{})
	h := newHouse(t, worker.Config{Backends: []backend.Config{{URL: s.URL}}, Drain: 100 * time.Millisecond})
	o := h.owner()
	job := o.job(time.Now().Add(10 * time.Minute))
	o.ask(job, wish(t, nil, numbered(6000, 10*time.Minute)))
	r := o.hear()
	r.until("some tokens", func() bool { return r.tokens > 4 })
	o.die()
	h.stop() // long before the owner counts as dead
	if usage := h.wantReport(job); usage.CompletionTokens < r.tokens {
		t.Errorf("%+v is reported where %d tokens came", usage, r.tokens)
	}
}
