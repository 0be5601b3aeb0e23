package backend

import (
	"fmt"
	"strings"
	"testing"
)

// likely are chunks in the forms of several servers, to be mixed. %s is the text, %d a count.
var likely = []string{
	`{"id":"x","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":%s},"logprobs":null,"finish_reason":null}],"usage":{"prompt_tokens":3,"total_tokens":9,"completion_tokens":%d}}`,
	`{"id":"x","choices":[{"index":0,"delta":{"content":%s},"finish_reason":null}],"usage":null}`,
	`{"id":"x","choices":[{"index":1,"delta":{"content":%s,"reasoning":null},"finish_reason":null}],"usage":{"completion_tokens":%d}}`,
	`{"choices":[{"index":0,"delta":{"role":"assistant","content":%s},"finish_reason":null}],"x":"y"}`,
	`{"choices":[{"finish_reason":null,"index":0,"delta":{"content":%s}}],"timings":{"predicted_n":%d}}`,
	`{"choices":[{"finish_reason":"","delta":{"content":"a","content":%s}}]}`,
	`{"choices":[{"index":0,"delta":{"content":%s},"finish_reason":"stop"}],"usage":{"completion_tokens":%d}}`,
	`{"usage":{"completion_tokens":%[2]d},"choices":[{"index":0,"delta":{"content":%[1]s},"finish_reason":null}]}`,
	"{\n\"choices\":[{\"index\":0,\"delta\":{\"content\":%s},\n\"finish_reason\":null}],\"usage\":{\"completion_tokens\":%d\n}}\n",
	`{"choices":[{"index":0,"delta":{"content":%s},"finish_reason":null},{"index":1,"delta":{"content":"b"},"finish_reason":null}]}`,
	`{"choices":[{"index":0,"delta":{"content":%s},"finish_reason":null}],"usage":%d}`,
}

// texts are values of a content, some of them none.
var texts = []string{`"a"`, `"bc"`, `""`, `"\u00e9\n"`, `" \"quoted\" "`, `null`, `"é"`, `"\x"`, `"open`, `"a","content":"b"`, `{"a":"b"}`, `"`, "\"a\nb\"", `"a"}]}`}

func likeness(form, text byte, n int) string {
	f := likely[int(form)%len(likely)]
	if !strings.Contains(f, "d") || strings.Count(f, "%") == 1 {
		return fmt.Sprintf(f, texts[int(text)%len(texts)])
	}
	return fmt.Sprintf(f, texts[int(text)%len(texts)], n)
}

// FuzzPattern shows that a chunk comes out the same, whether it is known by its likeness to
// the last one or taken apart.
func FuzzPattern(f *testing.F) {
	for form := range likely {
		f.Add([]byte{byte(form), 0, byte(form), 1, byte(form), 3, byte(form), 2, byte(form), 4, byte(form), 9}, form%2 == 0, form%3 == 0)
	}
	f.Add([]byte{0, 0, 0, 1, 0, 0, 2, 0, 2, 0, 0, 1, 6, 0, 0, 0}, true, false)
	f.Add([]byte{3, 0, 3, 0, 3, 0, 3, 8, 3, 7, 3, 1}, false, true)
	f.Fuzz(func(t *testing.T, steps []byte, includeUsage, continued bool) {
		var fast, slow rewriter
		for _, w := range []*rewriter{&fast, &slow} {
			w.reset(VLLM, testCall(true, includeUsage))
			if continued {
				w.continued, w.textual, w.base, w.repeated = true, true, 2, "a"
			}
		}
		for i := 0; i+1 < len(steps); i += 2 {
			data := likeness(steps[i], steps[i+1], i)
			slow.pattern = pattern{}
			want, wantErr := slow.chunk([]byte("x"), []byte(data))
			got, err := fast.chunk([]byte("x"), []byte(data))
			if string(got) != string(want) || fmt.Sprint(err) != fmt.Sprint(wantErr) {
				t.Fatalf("%s\nbecame %q, %v\nwant   %q, %v", data, got, err, want, wantErr)
			}
			if fast.tokens() != slow.tokens() || fast.said != slow.said || fast.closing != slow.closing || fast.finished() != slow.finished() ||
				fast.prompt != slow.prompt || string(fast.end(nil, 1)) != string(slow.end(nil, 1)) {
				t.Fatalf("%s: what is known differs: %+v, %+v", data, fast, slow)
			}
		}
	})
}

// TestPatternIsUsed shows that the chunks of a common stream are known by their likeness.
func TestPatternIsUsed(t *testing.T) {
	for form, known := range []bool{true, true, true, true, false, true, false, false, true, false, true} {
		var w rewriter
		w.reset(VLLM, testCall(true, true))
		for _, text := range []byte{0, 1} { // the first has the role, the second is learnt
			if _, err := w.chunk(nil, []byte(likeness(byte(form), text, 1))); err != nil {
				t.Fatal(err)
			}
		}
		if _, ok := w.again(nil, []byte(likeness(byte(form), 0, 1))); ok != known {
			t.Errorf("%s: known %v", likely[form], ok)
		}
	}
}
