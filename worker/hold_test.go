package worker_test

import (
	"testing"
	"time"

	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// held publishes a job whose request isn't admitted yet, and waits for its claim.
func (o *owner) held(stream bool) (job *schemas.Job, answer func(schemas.Verdict)) {
	o.h.t.Helper()
	job = o.job(time.Now().Add(time.Minute))
	job.Hold, job.Stream, job.IncludeUsage = true, stream, stream
	o.ask(job, wish(o.h.t, map[string]any{"stream": stream}, numbered(20, 0)))
	f, m, err := o.take(patience)
	if err != nil || f.Kind != schemas.FrameClaim {
		o.h.t.Fatalf("instead of a claim comes %+v, %v", f, err)
	}
	return job, func(v schemas.Verdict) { o.say(f, m, v) }
}

// A stream that is held is begun, but nothing of it is sent before its claim is granted. The claim
// is repeated, and the stream keeps to the limit that the verdict brings.
func TestHeldJob(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		verdict schemas.Verdict
		tokens  int
		finish  string
	}{
		{"no limit", schemas.Verdict{Go: true}, 20, "stop"},
		{"a limit that is final", schemas.Verdict{Go: true, Limit: 7}, 7, "length"},
		{"a limit that may rise", schemas.Verdict{Go: true, Limit: 1000, More: true}, 20, "stop"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			h, s := one(t, demo.Options{}, 1)
			o := h.owner()
			job, _ := o.held(true)
			until(t, "a backend that has said all", func() bool { n := s.stats(); return n.Started == 1 && n.Active == 0 })
			f, m, err := o.take(patience)
			if err != nil || f.Kind != schemas.FrameClaim || f.Seq != 0 {
				t.Fatalf("instead of the claim once more comes %+v, %v", f, err)
			}
			choice, err := h.table.Route(tenant, "demo", nil)
			if err != nil || !choice.Holds {
				t.Errorf("the worker doesn't say that it holds: %+v, %v", choice, err)
			}
			h.table.Release(tenant, choice.Agent, "demo")
			o.say(f, m, c.verdict)
			r := o.hear()
			r.limit = func() (int64, bool) { return c.verdict.Limit, c.verdict.More }
			r.end().want(c.tokens, c.finish)
			until(t, "an empty queue after "+string(job.Request), func() bool { return h.depth() == 0 })
		})
	}
}

// A whole reply has its bound from the verdict, so no backend is called before.
func TestHeldWholeReply(t *testing.T) {
	t.Parallel()
	h, s := one(t, demo.Options{}, 1)
	o := h.owner()
	o.held(false)
	f, m, err := o.take(patience)
	if err != nil || f.Kind != schemas.FrameClaim {
		t.Fatalf("the claim isn't repeated: %+v, %v", f, err)
	}
	if n := s.stats().Started; n != 0 {
		t.Fatalf("the backend got %d requests", n)
	}
	o.say(f, m, schemas.Verdict{Go: true, Limit: 7})
	r := o.hear().end()
	if u := r.last.Usage; r.last.Kind != schemas.FrameDone || u == nil || u.CompletionTokens != 7 {
		t.Errorf("the last frame is %+v with usage %+v, want 7 tokens", r.last, u)
	}
}

// A job that is taken back before it is granted leaves its slot to others, whichever way its worker
// hears of that; and if it is a stream that has begun, its backend stops.
func TestHeldJobThatIsTakenBack(t *testing.T) {
	t.Parallel()
	for name, stream := range map[string]bool{"a stream": true, "a whole reply": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			faults := demo.NoFaults()
			faults.TokensPerSecond = 1 // longer than the test
			h, s := one(t, demo.Options{Faults: &faults}, 1)
			o := h.owner()
			begun := func(n int64) {
				t.Helper()
				if stream {
					until(t, "a backend that has begun", func() bool { return s.stats().Started == n })
				}
			}
			over := func(what string) {
				t.Helper()
				until(t, "an empty queue after "+what, func() bool {
					n := s.stats()
					return h.depth() == 0 && n.Active == 0 && n.Aborted == n.Started
				})
			}
			_, answer := o.held(stream)
			begun(1)
			answer(schemas.Verdict{Reason: schemas.ReasonCancelled})
			over("the verdict")
			job, _ := o.held(stream)
			begun(2)
			o.control(schemas.Control{Operation: schemas.ControlCancel, Nonce: job.Nonce, Reason: schemas.ReasonCancelled})
			over("the word")
			o.held(stream)
			begun(3)
			if err := o.frames.Unsubscribe(); err != nil { // as if it were dead
				t.Fatal(err)
			}
			over("its owner")
			if n := s.stats().Started; !stream && n != 0 {
				t.Errorf("the backend got %d requests", n)
			}
			h.start(request("demo", true, numbered(1, 0))).wantNumbered(1)
		})
	}
}

// A model isn't loaded for a request that isn't admitted.
func TestHeldJobOfAColdModel(t *testing.T) {
	t.Parallel()
	faults := demo.NoFaults()
	faults.LoadMS = 100
	cold := models("demo")
	cold[0].State = schemas.ModelCold
	h, s := one(t, demo.Options{Models: cold, Faults: &faults}, 2)
	o := h.owner()
	job := o.job(time.Now().Add(time.Minute))
	job.Hold, job.ColdWait = true, patience.Milliseconds()
	o.ask(job, wish(t, nil, numbered(3, 0)))
	for range 2 {
		if f, m, err := o.take(patience); err != nil || f.Kind != schemas.FrameClaim || !f.Loading {
			t.Fatalf("instead of a claim comes %+v, %v", f, err)
		} else if n := s.stats().Started; n != 0 || h.state("demo") != schemas.ModelCold {
			t.Fatalf("the backend got %d requests", n)
		} else if m.Reply == "" {
			t.Fatal("it wants no answer")
		}
	}
	o.hear().end().want(3, "stop")
}
