package worker_test

import (
	"testing"
	"time"

	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// held publishes a job whose request isn't admitted yet, and waits for its claim.
func (o *owner) held() (job *schemas.Job, answer func(schemas.Verdict)) {
	o.h.t.Helper()
	job = o.job(time.Now().Add(time.Minute))
	job.Hold, job.IncludeUsage = true, true
	o.ask(job, wish(o.h.t, nil, numbered(20, 0)))
	f, m, err := o.take(patience)
	if err != nil || f.Kind != schemas.FrameClaim {
		o.h.t.Fatalf("instead of a claim comes %+v, %v", f, err)
	}
	return job, func(v schemas.Verdict) { o.say(f, m, v) }
}

// A job that is held calls no backend before its claim is granted, repeats the claim, and
// keeps to the limit that the verdict brings.
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
			job, _ := o.held()
			f, m, err := o.take(patience)
			if err != nil || f.Kind != schemas.FrameClaim {
				t.Fatalf("the claim isn't repeated: %+v, %v", f, err)
			}
			if n := s.stats().Started; n != 0 {
				t.Fatalf("the backend got %d requests", n)
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

// A job that is taken back before it is granted never reaches the backend, whichever way its
// worker hears of that, and leaves its slot to others.
func TestHeldJobThatIsTakenBack(t *testing.T) {
	t.Parallel()
	h, s := one(t, demo.Options{}, 1)
	o := h.owner()
	_, answer := o.held()
	answer(schemas.Verdict{Reason: schemas.ReasonCancelled})
	until(t, "an empty queue after the verdict", func() bool { return h.depth() == 0 })
	job, _ := o.held()
	o.control(schemas.Control{Operation: schemas.ControlCancel, Nonce: job.Nonce, Reason: schemas.ReasonCancelled})
	until(t, "an empty queue after the word", func() bool { return h.depth() == 0 })
	o.held()
	if err := o.frames.Unsubscribe(); err != nil { // as if it were dead
		t.Fatal(err)
	}
	until(t, "an empty queue without an owner", func() bool { return h.depth() == 0 })
	if n := s.stats().Started; n != 0 {
		t.Errorf("the backend got %d requests", n)
	}
	h.start(request("demo", true, numbered(3, 0))).wantNumbered(3)
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
