package worker_test

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tidwall/gjson"

	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker"
	"github.com/ownllm/ownllm/worker/backend"
	"github.com/ownllm/ownllm/worker/demo"
)

// beat is a little less than the second between two reports, before which comes what is said at
// once.
const beat = 900 * time.Millisecond

// with is what a reply is asked for, and something else.
func with(faults map[string]any, name string, value any) map[string]any {
	faults[name] = value
	return faults
}

// A limit that is final: the backend is told, and where it doesn't heed it, the reply is
// cut at the very token.
func TestFinalLimit(t *testing.T) {
	t.Parallel()
	const limit = 10
	for _, c := range []struct {
		name    string
		fields  map[string]any
		ignores bool
		tokens  int
		aborted int64
	}{
		{"told", nil, false, limit, 0},
		{"ignored", nil, true, limit, 1},
		{"the client wants more", map[string]any{"max_tokens": 30}, false, limit, 0},
		{"the client wants more, by the newer name", map[string]any{"max_completion_tokens": 30}, false, limit, 0},
		{"the client wants less", map[string]any{"max_tokens": 3}, false, 3, 0},
		{"null is no wish", map[string]any{"max_tokens": nil}, false, limit, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			h, s := one(t, demo.Options{}, 1)
			o := h.owner()
			job := o.job(time.Now().Add(time.Minute))
			job.Limit, job.IncludeUsage = limit, true
			o.ask(job, wish(t, c.fields, with(numbered(50, time.Second), "ignore_limit", c.ignores)))
			r := o.hear().end()
			r.want(c.tokens, "length")
			// The last chunk has the usage, and no other.
			for i, line := range r.lines {
				if usage := gjson.Get(line, "usage"); usage.IsObject() != (i == len(r.lines)-1) || !usage.Exists() {
					t.Errorf("chunk %d of %d is %s", i, len(r.lines), line)
				}
			}
			usage := gjson.Get(r.lines[len(r.lines)-1], "usage")
			if usage.Get("completion_tokens").Int() != int64(c.tokens) || usage.Get("prompt_tokens").Int() == 0 ||
				usage.Get("total_tokens").Int() != usage.Get("completion_tokens").Int()+usage.Get("prompt_tokens").Int() {
				t.Errorf("usage is %s", usage.Raw)
			}
			until(t, "the backend to be free", func() bool { return s.stats().Active == 0 })
			if n := s.stats(); n.Aborted != c.aborted {
				t.Errorf("the backend saw %+v, want %d that are cut off", n, c.aborted)
			}
		})
	}
}

// Several choices share the limit, and each gets an end.
func TestLimitOfSeveralChoices(t *testing.T) {
	t.Parallel()
	for name, ignores := range map[string]bool{"told": false, "ignored": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h, _ := one(t, demo.Options{}, 1)
			o := h.owner()
			job := o.job(time.Now().Add(time.Minute))
			job.Limit = 11
			o.ask(job, wish(t, map[string]any{"n": 3}, with(numbered(50, 0), "ignore_limit", ignores)))
			r := o.hear().end()
			all := 0
			for choice := range 3 {
				n := strings.Count(r.text(choice), " ")
				all += n
				if got := r.finish(choice); len(got) != 1 || got[0] != "length" || n < 3 || n > 4 {
					t.Errorf("choice %d has %d tokens and ends with %q", choice, n, got)
				}
			}
			want := 9 // three for each
			if ignores {
				want = 11
			}
			if all != want || r.last.Usage.CompletionTokens != want || r.tokens != want {
				t.Errorf("%d tokens, told as %d and %d, want %d", all, r.tokens, r.last.Usage.CompletionTokens, want)
			}
		})
	}
}

// A choice that the cut comes before has an end, too.
func TestCutBeforeTheFirstToken(t *testing.T) {
	t.Parallel()
	h, _ := one(t, demo.Options{}, 1)
	o := h.owner()
	job := o.job(time.Now().Add(time.Minute))
	job.Limit, job.IncludeUsage = 1, true
	o.ask(job, wish(t, map[string]any{"n": 2}, with(with(numbered(50, 0), "ignore_limit", true), "tokens_per_chunk", 4)))
	r := o.hear().end()
	for choice := range 2 {
		if got := r.finish(choice); r.text(choice) != "" || len(got) != 1 || got[0] != "length" {
			t.Errorf("choice %d says %q and ends with %q", choice, r.text(choice), got)
		}
		if roles := strings.Count(strings.Join(r.lines, ""), `"index":`+string(rune('0'+choice))+`,"delta":{"role":"assistant"`); roles != 1 {
			t.Errorf("choice %d has %d roles: %q", choice, roles, r.lines)
		}
	}
	if u := r.last.Usage; u == nil || u.CompletionTokens != 0 || u.PromptTokens == 0 {
		t.Errorf("usage is %+v", u)
	}
}

// A whole reply has to be left to the backend; what it counts is what is told.
func TestLimitOfAWholeReply(t *testing.T) {
	t.Parallel()
	for name, ignores := range map[string]bool{"told": false, "ignored": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h, _ := one(t, demo.Options{}, 1)
			o := h.owner()
			job := o.job(time.Now().Add(time.Minute))
			job.Limit, job.Stream = 10, false
			o.ask(job, wish(t, map[string]any{"stream": false}, with(numbered(50, 0), "ignore_limit", ignores)))
			r := o.hear().end()
			want, finish := 10, "length"
			if ignores {
				want, finish = 50, "stop"
			}
			choice := gjson.Get(strings.Join(r.lines, ""), "choices.0")
			if n := strings.Count(choice.Get("message.content").Str, " "); n != want || choice.Get("finish_reason").Str != finish {
				t.Errorf("%d tokens, and the reply is %s", n, choice.Raw)
			}
			if u := r.last.Usage; u == nil || u.CompletionTokens != want {
				t.Errorf("usage is %+v", u)
			}
		})
	}
}

// The owner is in time: the reply is whole, and never waits.
func TestLimitThatIsRaisedInTime(t *testing.T) {
	t.Parallel()
	h, s := one(t, demo.Options{}, 1)
	o := h.owner()
	job := o.job(time.Now().Add(time.Minute))
	job.Limit, job.More = 160, true // half of that lasts for 2.4 s
	o.ask(job, wish(t, nil, numbered(400, 12*time.Second)))
	r := o.hear()
	limit := job.Limit
	for r.last.Kind == "" {
		if !r.step(patience) {
			t.Fatal("nothing comes")
		}
		if int64(r.tokens)*2 >= limit {
			limit *= 2
			o.raise(job, limit, true)
		}
	}
	r.want(400, "stop")
	if len(r.wanted) > 0 {
		t.Errorf("the worker had to wait for %v tokens", r.wanted)
	}
	if n := s.stats(); n.Finished != 1 {
		t.Errorf("the backend saw %+v", n)
	}
}

// The owner is late: the worker says so at once, waits, and goes on where it was.
func TestLimitThatIsRaisedLate(t *testing.T) {
	t.Parallel()
	h, _ := one(t, demo.Options{}, 1)
	o := h.owner()
	job := o.job(time.Now().Add(time.Minute))
	job.Limit, job.More, job.IncludeUsage = 10, true, true
	o.ask(job, wish(t, nil, numbered(50, 0)))
	r := o.hear()
	r.until("ten tokens", func() bool { return r.tokens == 10 })
	reached := time.Now()
	r.until("the word that more are needed", func() bool { return len(r.wanted) > 0 })
	if took := time.Since(reached); took > beat || r.wanted[0] != 11 {
		t.Errorf("the word came after %s and says %v", took, r.wanted)
	}
	for limit := job.Limit; limit < 40; {
		for r.step(100 * time.Millisecond) {
		}
		if int64(r.tokens) != limit {
			t.Fatalf("%d tokens came where %d are allowed", r.tokens, limit)
		}
		limit += 10
		o.raise(job, limit, true)
		r.until("the next ten", func() bool { return int64(r.tokens) == limit })
	}
	o.raise(job, 1000, true)
	r.end().want(50, "stop")
}

// The word about a higher limit is lost. The answers to the reports bring it, of which some
// are lost, too.
func TestLimitThatIsRaisedByAVerdict(t *testing.T) {
	t.Parallel()
	h, _ := one(t, demo.Options{}, 1)
	o := h.owner()
	job := o.job(time.Now().Add(time.Minute))
	job.Limit, job.More = 10, true
	o.ask(job, wish(t, nil, numbered(30, 0)))
	r := o.hear()
	r.until("ten tokens", func() bool { return r.tokens == 10 })
	r.mute = true
	r.until("three reports", func() bool { return len(r.wanted) >= 3 })
	r.mute, r.limit = false, func() (int64, bool) { return 20, true }
	r.until("ten more", func() bool { return r.tokens == 20 })
	r.limit = func() (int64, bool) { return 30, false }
	r.end().want(30, "stop")
}

// No more is to be had: the reply ends at the limit.
func TestLimitThatBecomesFinal(t *testing.T) {
	t.Parallel()
	for name, late := range map[string]bool{"while the worker waits": true, "before": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h, s := one(t, demo.Options{}, 1)
			o := h.owner()
			job := o.job(time.Now().Add(time.Minute))
			job.Limit, job.More = 10, true
			o.ask(job, wish(t, nil, numbered(50, 10*time.Second)))
			r := o.hear()
			if late {
				r.until("the word that more are needed", func() bool { return len(r.wanted) > 0 })
				r.limit = func() (int64, bool) { return 10, false }
			} else {
				r.until("some tokens", func() bool { return r.tokens > 2 })
			}
			o.raise(job, 10, false)
			r.end().want(10, "length")
			if !late && len(r.wanted) > 0 {
				t.Errorf("the worker waited for %v tokens", r.wanted)
			}
			until(t, "the backend to be free", func() bool { return s.stats().Active == 0 })
			until(t, "an empty queue", func() bool { return h.depth() == 0 })
		})
	}
}

// A reply that has just as many tokens as it may waits for nothing.
func TestReplyThatJustFits(t *testing.T) {
	t.Parallel()
	h, _ := one(t, demo.Options{}, 1)
	o := h.owner()
	job := o.job(time.Now().Add(time.Minute))
	job.Limit, job.More = 10, true
	o.ask(job, wish(t, nil, numbered(10, 0)))
	r := o.hear().end()
	r.want(10, "stop")
	if len(r.wanted) > 0 {
		t.Errorf("the worker waited for %v tokens", r.wanted)
	}
}

// A chunk of many tokens waits as a whole, until all of it is allowed.
func TestLimitWithinAChunk(t *testing.T) {
	t.Parallel()
	h, _ := one(t, demo.Options{}, 1)
	o := h.owner()
	job := o.job(time.Now().Add(time.Minute))
	job.Limit, job.More = 10, true
	o.ask(job, wish(t, nil, with(numbered(24, 0), "tokens_per_chunk", 8)))
	r := o.hear()
	r.until("the word that more are needed", func() bool { return len(r.wanted) > 0 })
	if r.tokens != 8 || r.wanted[0] != 16 {
		t.Fatalf("%d tokens came, and %v are wanted, want 8 and 16", r.tokens, r.wanted)
	}
	said := time.Now()
	asked := len(r.wanted)
	o.raise(job, 15, true) // too few
	r.until("the word that this isn't enough", func() bool { return len(r.wanted) > asked })
	if took := time.Since(said); took > beat || r.tokens != 8 {
		t.Errorf("that took %s, and there are %d tokens", took, r.tokens)
	}
	o.raise(job, 16, true)
	r.until("the second chunk", func() bool { return r.tokens == 16 })
	o.raise(job, 20, false)
	r.end().want(16, "length")
}

// Who waits for more tokens can be cancelled, and its slot is free.
func TestCancelWhileWaitingForTokens(t *testing.T) {
	t.Parallel()
	h, s := one(t, demo.Options{}, 1)
	o := h.owner()
	job := o.job(time.Now().Add(time.Minute))
	job.Limit, job.More = 10, true
	o.ask(job, wish(t, nil, numbered(1000, 0)))
	r := o.hear()
	r.until("the word that more are needed", func() bool { return len(r.wanted) > 0 })
	o.control(schemas.Control{Operation: schemas.ControlCancel, Nonce: job.Nonce})
	until(t, "the backend to be free", func() bool { return s.stats().Active == 0 })
	until(t, "an empty queue", func() bool { return h.depth() == 0 })
	h.start(request("demo", true, numbered(3, 0))).wantNumbered(3)
	if r.step(100 * time.Millisecond) {
		t.Error("more comes of a reply that was cancelled")
	}
}

// A job without a limit has none, whatever verdicts say, and one word is of one attempt.
func TestLimitOfAnotherJob(t *testing.T) {
	t.Parallel()
	h, _ := one(t, demo.Options{}, 2)
	o := h.owner()
	free, bound := o.job(time.Now().Add(time.Minute)), o.job(time.Now().Add(time.Minute))
	free.Limit = 0
	o.ask(free, wish(t, nil, numbered(40, time.Second)))
	r := o.hear()
	r.limit = func() (int64, bool) { return 5, false }
	r.until("the first token", func() bool { return r.tokens > 0 })
	o.raise(free, 5, false)
	o.raise(bound, 5, false)
	r.end().want(40, "stop")
}

// An owner counts on the size of the prompt before the first token.
func TestCount(t *testing.T) {
	t.Parallel()
	h, _ := one(t, demo.Options{}, 1)
	o := h.owner()
	for _, stated := range []int{0, 12345} {
		job := o.job(time.Now().Add(time.Minute))
		job.Count = true
		o.ask(job, wish(t, nil, with(with(numbered(3, 0), "first_token_ms", 3000), "prompt_tokens", stated)))
		r := o.hear()
		r.until("the size of the prompt", func() bool { return r.prompt > 0 })
		if r.tokens > 0 {
			t.Error("it came after the first token")
		}
		r.end().want(3, "stop")
		if got := r.last.Usage.PromptTokens; got != r.prompt || stated > 0 && got != stated {
			t.Errorf("the prompt was counted as %d, and is %d, want %d", r.prompt, got, stated)
		}
	}
}

// An owner who has plenty hears of the prompt while a long reply is under way, and nothing
// of that of a short one, which tells by itself.
func TestCountLate(t *testing.T) {
	t.Parallel()
	h, _ := one(t, demo.Options{}, 1)
	o := h.owner()
	ask := func(takes time.Duration) (r *heard, took time.Duration) {
		began := time.Now()
		job := o.job(began.Add(time.Minute))
		job.CountLate = true
		o.ask(job, wish(t, nil, numbered(10, takes)))
		r = o.hear()
		if takes > 0 {
			r.until("the size of the prompt", func() bool { return r.prompt > 0 })
		}
		r.end().want(10, "stop")
		return r, time.Since(began)
	}
	r, _ := ask(time.Second)
	if told := r.last.Usage.PromptTokens; r.prompt != told {
		t.Errorf("the prompt was counted as %d, and is %d", r.prompt, told)
	}
	// On busy cores even a short reply may take as long as a long one.
	until(t, "a reply that is short", func() bool {
		r, took := ask(0)
		short := took < 100*time.Millisecond
		if short && r.prompt != 0 {
			t.Error("the prompt of a short reply was counted")
		}
		return short
	})
}

// What a backend tells of the prompt in its first chunks isn't asked of it once more.
func TestCountLateIsTold(t *testing.T) {
	t.Parallel()
	d := demo.New(demo.Options{})
	var counts atomic.Int32
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/tokenize" {
			counts.Add(1)
		}
		d.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	h := newHouse(t, worker.Config{Backends: []backend.Config{{URL: s.URL}}, Drain: patience})
	o := h.owner()
	// ask also returns how often the prompt was counted meanwhile.
	ask := func(silent bool) (*heard, int32) {
		before := counts.Load()
		job := o.job(time.Now().Add(time.Minute))
		job.CountLate, job.Limit = true, 1000 // with a bound, the usage comes with each chunk
		o.ask(job, wish(t, nil, with(numbered(10, time.Second), "no_usage", silent)))
		r := o.hear()
		r.until("the size of the prompt", func() bool { return r.prompt > 0 })
		r.end().want(10, "stop")
		return r, counts.Load() - before
	}
	// On busy cores the first chunk may come too late.
	until(t, "a reply that tells in time", func() bool {
		r, n := ask(false)
		if told := r.last.Usage.PromptTokens; r.prompt != told || told == 0 {
			t.Errorf("the owner hears of %d tokens, and the reply of %d", r.prompt, told)
		}
		return n == 0
	})
	if r, n := ask(true); n == 0 {
		t.Errorf("of a backend that tells nothing, the owner hears of %d tokens, and nobody has counted", r.prompt)
	}
}

// A count that fails is no error.
func TestCountThatFails(t *testing.T) {
	t.Parallel()
	d := demo.New(demo.Options{})
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/tokenize" {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		d.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	h := newHouse(t, worker.Config{Backends: []backend.Config{{URL: s.URL}}, Drain: patience})
	o := h.owner()
	job := o.job(time.Now().Add(time.Minute))
	job.Count = true
	o.ask(job, wish(t, nil, numbered(3, 0)))
	r := o.hear().end()
	r.want(3, "stop")
	if r.prompt != 0 {
		t.Errorf("the prompt was counted as %d", r.prompt)
	}
}

// With a real owner: a reply gets what its key can pay for, to the token, and pays for it.
func TestReplyThatIsPaidFor(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name                 string
		purse, chunk, tokens int
		finish               string
	}{
		{"all of it", 9000, 1, 4000, "stop"},
		{"what the purse has", 2500, 1, 2500, "length"},
		{"less than is given at first", 100, 1, 100, "length"},
		{"chunks of more than is given at first", 9000, 3000, 4000, "stop"},
		{"a chunk that the purse hasn't all of", 2500, 2000, 2000, "length"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			h, _ := one(t, demo.Options{}, 1)
			h.books.Set(func() { h.books.Price, h.books.Purse = 1, int64(c.purse) })
			req := request("demo", true, with(numbered(4000, 0), "tokens_per_chunk", c.chunk))
			began := time.Now()
			ch := h.start(req)
			ch.wantNumbered(c.tokens)
			if !strings.Contains(ch.body.String(), `"finish_reason":"`+c.finish+`"`) {
				t.Errorf("it doesn't end with %q", c.finish)
			}
			if took := time.Since(began); took > 8*time.Second {
				t.Errorf("it took %s", took)
			}
			if got := h.books.Charged(t, req.ID); got.Completion != int64(c.tokens) || got.Prompt == nil || *got.Prompt == 0 {
				t.Errorf("charged %+v, want %d tokens", got, c.tokens)
			}
		})
	}
}
