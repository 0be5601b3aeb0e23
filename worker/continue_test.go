package worker_test

import (
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tidwall/gjson"

	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// A reply is continued to the token, within the limits of the whole, and counted as one.
func TestContinue(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		fields map[string]any
		limit  int64
		prompt int // as the owner knows it
		end    int // the last token is that before
		finish string
	}{
		{"to its end", nil, 0, 0, 50, "stop"},
		{"the prompt is known", nil, 0, 77, 50, "stop"},
		{"to the client's limit", map[string]any{"max_tokens": 30}, 0, 0, 30, "length"},
		{"to the allowance", nil, 25, 0, 25, "length"},
		{"no further", map[string]any{"max_completion_tokens": 20}, 0, 0, 20, "length"},
		{"no further by the allowance", nil, 20, 0, 20, "length"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			h, _ := one(t, demo.Options{}, 1)
			o := h.owner()
			job := o.job(time.Now().Add(time.Minute))
			job.Limit, job.IncludeUsage = c.limit, true
			job.Continue = &schemas.Continuation{Text: numbers(0, 20), Tokens: 20, PromptTokens: c.prompt}
			o.ask(job, wish(t, c.fields, numbered(50, time.Second)))
			r := o.hear().end()
			if got := r.text(0); got != numbers(20, c.end) {
				t.Errorf("the reply goes on with %q", got)
			}
			if got := r.finish(0); len(got) != 1 || got[0] != c.finish {
				t.Errorf("it ends with %q, want %q", got, c.finish)
			}
			want := schemas.Usage{PromptTokens: 4, CompletionTokens: c.end} // as the demo counts "Hi"
			if c.prompt > 0 {
				want.PromptTokens = c.prompt
			}
			if r.last.Usage == nil || *r.last.Usage != want || r.last.Tokens != c.end {
				t.Errorf("%d tokens, usage %+v, want %+v", r.last.Tokens, r.last.Usage, want)
			}
			told := gjson.Get(r.lines[len(r.lines)-1], "usage")
			if told.Get("completion_tokens").Int() != int64(c.end) || told.Get("prompt_tokens").Int() != int64(want.PromptTokens) {
				t.Errorf("the client is told %s", told.Raw)
			}
			for _, line := range r.lines {
				if strings.Contains(line, "role") {
					t.Errorf("the role comes again: %s", line)
				}
			}
			if len(r.wanted) > 0 && r.wanted[0] < 20 {
				t.Errorf("it counted %d tokens", r.wanted[0])
			}
		})
	}
}

// numbers are the tokens of a numbered reply from one to before another.
func numbers(from, to int) string {
	var b strings.Builder
	for i := from; i < to; i++ {
		b.WriteString(" " + strconv.Itoa(i))
	}
	return b.String()
}
