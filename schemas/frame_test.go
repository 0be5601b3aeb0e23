package schemas

import (
	"bytes"
	"encoding/json"
	"math"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"
)

var sampleFrames = map[string]Frame{
	"claim":             {Run: "r", Kind: FrameClaim},
	"claim, all of it":  {Run: "r", Kind: FrameClaim, Seq: 4, Tokens: 9, PromptTokens: 12, Loading: true},
	"progress":          {Run: "r", Seq: 7, Kind: FrameProgress, Tokens: 70},
	"progress, loading": {Run: "r", Kind: FrameProgress, Loading: true},
	"chunk":             {Run: "zzFmVtrSBXpn2qRyTJhJ3w", Seq: 1, Kind: FrameChunk, Tokens: 1, Payload: []byte(`{"choices":[]}`)},
	"chunk, no tokens":  {Run: "r", Seq: 2, Kind: FrameChunk, Payload: []byte("{}\n{}")},
	"chunk, no payload": {Run: "r", Seq: 2, Kind: FrameChunk, Tokens: 5},
	"chunk, raw bytes":  {Run: "r", Seq: 2, Kind: FrameChunk, Payload: []byte("\n\n\xff\x00}\"")},
	"chunk, largest":    {Run: "r", Seq: math.MaxUint64, Kind: FrameChunk, Tokens: math.MaxInt, Payload: []byte("x")},
	"chunk, 18 digits":  {Run: "r", Seq: 999999999999999999, Kind: FrameChunk, Tokens: 999999999999999999},
	"chunk, 19 digits":  {Run: "r", Seq: 1000000000000000000, Kind: FrameChunk},
	"chunk, odd run":    {Run: "a\",\"seq\":9,\"x\":\"", Seq: 1, Kind: FrameChunk},
	"chunk, newline":    {Run: "a\nb\\c\x01é ", Seq: 1, Kind: FrameChunk, Payload: []byte("p")},
	"chunk, loading":    {Run: "r", Seq: 1, Kind: FrameChunk, Loading: true, PromptTokens: 3},
	"chunk, usage":      {Run: "r", Seq: 1, Kind: FrameChunk, Usage: &Usage{1, 2}},
	"chunk, error":      {Run: "r", Seq: 1, Kind: FrameChunk, Error: Errorf(CodeBackendError, "x")},
	"done":              {Run: "r", Seq: 9, Kind: FrameDone, Tokens: 256, Usage: &Usage{17, 256}, Payload: []byte("last")},
	"done, no usage":    {Run: "r", Seq: 1, Kind: FrameDone},
	"error": {Run: "r", Seq: 3, Kind: FrameError, Error: &Error{
		Code: CodeModelLoading, Message: "a \"model\"\nis loading <&>", Param: "model", RetryAfter: 2500 * time.Millisecond,
	}},
}

func TestFrameRoundTrip(t *testing.T) {
	for name, f := range sampleFrames {
		t.Run(name, func(t *testing.T) {
			b, err := AppendFrame([]byte("before"), &f)
			if err != nil {
				t.Fatal(err)
			}
			b, ok := bytes.CutPrefix(b, []byte("before"))
			if !ok {
				t.Fatal("what was in dst is gone")
			}
			checkFrame(t, b, f)
		})
	}
}

// checkFrame fails the test unless b is the wire form of f, both as DecodeFrame and as
// encoding/json read it.
func checkFrame(t interface {
	Helper()
	Fatalf(string, ...any)
}, b []byte, f Frame) {
	t.Helper()
	got, err := DecodeFrame(b)
	if err != nil {
		t.Fatalf("decode %q: %v", b, err)
	}
	if diff := cmp.Diff(f, got, cmpopts.EquateEmpty()); diff != "" {
		t.Fatalf("frame %q came back changed (-sent +got):\n%s", b, diff)
	}
	head, payload, _ := bytes.Cut(b, []byte{'\n'})
	var plain Frame
	if err := json.Unmarshal(head, &plain); err != nil {
		t.Fatalf("head %q isn't JSON: %v", head, err)
	}
	plain.Payload = payload
	if diff := cmp.Diff(f, plain, cmpopts.EquateEmpty()); diff != "" {
		t.Fatalf("head %q means something else to encoding/json (-sent +got):\n%s", head, diff)
	}
}

func TestFrameRoundTripOfAnything(t *testing.T) {
	count := rapid.IntMin(0)
	frames := rapid.Custom(func(t *rapid.T) Frame {
		f := Frame{
			Run:          rapid.OneOf(rapid.StringMatching(`[A-Za-z0-9_-]{1,22}`), rapid.StringN(1, 10, -1)).Draw(t, "run"),
			Seq:          rapid.Uint64().Draw(t, "seq"),
			Kind:         rapid.SampledFrom([]FrameKind{FrameClaim, FrameChunk, FrameProgress, FrameDone, FrameError}).Draw(t, "kind"),
			Tokens:       count.Draw(t, "tokens"),
			PromptTokens: rapid.SampledFrom([]int{0, 0, 1, 4096}).Draw(t, "prompt"),
			Loading:      rapid.Bool().Draw(t, "loading"),
			Payload:      rapid.SliceOf(rapid.Byte()).Draw(t, "payload"),
		}
		if rapid.Bool().Draw(t, "has usage") {
			f.Usage = &Usage{count.Draw(t, "prompt tokens"), count.Draw(t, "completion tokens")}
		}
		if f.Kind == FrameError || rapid.Bool().Draw(t, "has error") {
			f.Error = &Error{
				Code: rapid.SampledFrom(Codes).Draw(t, "code").Code, Message: rapid.String().Draw(t, "message"),
				Param:      rapid.String().Draw(t, "param"),
				RetryAfter: time.Duration(rapid.Int64Range(0, maxRetryAfter.Milliseconds()).Draw(t, "wait")) * time.Millisecond,
			}
		}
		return f
	})
	rapid.Check(t, func(t *rapid.T) {
		f := frames.Draw(t, "frame")
		b, err := AppendFrame(nil, &f)
		if err != nil {
			t.Fatalf("encode: %v", err)
		}
		checkFrame(t, b, f)
	})
}

// The bytes of a chunk are a part of the contract: worker and owner may be of
// different builds, and the fast path is fast only if both write the same.
func TestChunkFrameBytes(t *testing.T) {
	f := Frame{Run: "Ab-_9", Seq: 12, Kind: FrameChunk, Tokens: 34, Payload: []byte(`{"a":1}`)}
	b, err := AppendFrame(nil, &f)
	if want := `{"kind":"chunk","run":"Ab-_9","seq":12,"tokens":34}` + "\n" + `{"a":1}`; err != nil || string(b) != want {
		t.Errorf("chunk frame is %q, %v, want %q", b, err, want)
	}
	head, _, _ := bytes.Cut(b, []byte{'\n'})
	if _, ok := decodeChunkHead(head); !ok {
		t.Error("what AppendFrame writes by hand isn't read by hand")
	}
}

func TestChunkFrameAllocates(t *testing.T) {
	f := Frame{Run: string(NewNonce()), Seq: 12, Kind: FrameChunk, Tokens: 34, Payload: []byte(`{"a":1}`)}
	buf, err := AppendFrame(nil, &f)
	if err != nil {
		t.Fatal(err)
	}
	if n := testing.AllocsPerRun(100, func() {
		f := f // so is what is sent
		buf, _ = AppendFrame(buf[:0], &f)
	}); n != 0 {
		t.Errorf("a chunk into a buffer costs %v allocations", n)
	}
	if n := testing.AllocsPerRun(100, func() { _, _ = DecodeFrame(buf) }); n > 1 {
		t.Errorf("reading a chunk costs %v allocations, want one for the run", n)
	}
}

func TestDecodeFrameOfAnotherWriter(t *testing.T) {
	want := Frame{Run: "r", Seq: 3, Kind: FrameChunk, Tokens: 5, Payload: []byte("p\nq")}
	for _, head := range []string{
		`{"kind":"chunk","run":"r","seq":3,"tokens":5}`,
		`{"seq":3,"tokens":5,"run":"r","kind":"chunk"}`,
		`{"tokens":5,"kind":"chunk","run":"r","seq":3}`,
		`{"kind":"chunk","run":"r","tokens":5,"seq":3}`,
		`{"kind":"chunk","run":"r","seq":3,"tokens":5,"later":{"x":[1]}}`,
		`{"kind":"chunk","run":"r","seq":3,"tokens":5,"usage":null,"error":null}`,
		` { "kind" : "chunk" , "run" : "r" , "seq" : 3 , "tokens" : 5 } `,
		"\t{\"kind\":\"chunk\",\r\"run\":\"r\",\"seq\":3,\"tokens\":5}\r",
		`{"kind":"chunk","run":"\u0072","seq":3,"tokens":5}`,
		`{"kind":"\u0063hunk","run":"r","seq":3,"tokens":5}`,
		`{"kind":"chunk","run":"r","seq":3,"tokens":5}` + " ",
	} {
		got, err := DecodeFrame([]byte(head + "\np\nq"))
		if diff := cmp.Diff(want, got); err != nil || diff != "" {
			t.Errorf("head %q: %v (-want +got):\n%s", head, err, diff)
		}
	}
}

func TestDecodeFrameRefuses(t *testing.T) {
	for about, b := range map[string]string{
		"nothing":                 "",
		"no newline":              `{"kind":"chunk","run":"r","seq":1,"tokens":1}`,
		"an empty head":           "\n{}",
		"null":                    "null\n",
		"a list":                  "[]\n",
		"cut off":                 `{"kind":"chunk","run":"r","seq":1,"tokens":1` + "\n",
		"something after it":      `{"kind":"chunk","run":"r","seq":1,"tokens":1}x` + "\n",
		"two heads":               `{"kind":"chunk","run":"r","seq":1,"tokens":1}{}` + "\n",
		"no run":                  `{"kind":"chunk","seq":1,"tokens":1}` + "\n",
		"an empty run":            `{"kind":"chunk","run":"","seq":1,"tokens":1}` + "\n",
		"no kind":                 `{"run":"r","seq":1}` + "\n",
		"an unknown kind":         `{"run":"r","seq":1,"kind":"Chunk"}` + "\n",
		"an error without one":    `{"run":"r","seq":1,"kind":"error"}` + "\n",
		"a null error":            `{"run":"r","seq":1,"kind":"error","error":null}` + "\n",
		"a leading zero":          `{"kind":"chunk","run":"r","seq":01,"tokens":1}` + "\n",
		"a leading plus":          `{"kind":"chunk","run":"r","seq":+1,"tokens":1}` + "\n",
		"no number":               `{"kind":"chunk","run":"r","seq":,"tokens":1}` + "\n",
		"a negative seq":          `{"kind":"chunk","run":"r","seq":-1,"tokens":1}` + "\n",
		"a fraction":              `{"kind":"chunk","run":"r","seq":1.5,"tokens":1}` + "\n",
		"a seq over 64 bits":      `{"kind":"chunk","run":"r","seq":18446744073709551616,"tokens":1}` + "\n",
		"tokens over 63 bits":     `{"kind":"chunk","run":"r","seq":1,"tokens":9223372036854775808}` + "\n",
		"a control character":     "{\"kind\":\"chunk\",\"run\":\"a\x01b\",\"seq\":1,\"tokens\":1}\n",
		"negative tokens":         `{"kind":"chunk","run":"r","seq":1,"tokens":-1}` + "\n",
		"negative prompt tokens":  `{"kind":"claim","run":"r","seq":0,"prompt_tokens":-1}` + "\n",
		"negative usage":          `{"kind":"done","run":"r","seq":1,"usage":{"prompt_tokens":-1,"completion_tokens":1}}` + "\n",
		"negative usage, of both": `{"kind":"done","run":"r","seq":1,"usage":{"prompt_tokens":1,"completion_tokens":-1}}` + "\n",
	} {
		if f, err := DecodeFrame([]byte(b)); err == nil {
			t.Errorf("%s: %q is taken for %+v", about, b, f)
		} else if diff := cmp.Diff(Frame{}, f); diff != "" {
			t.Errorf("%s: an error comes with a frame: %+v", about, f)
		}
	}
}

func TestFrameKindTerminal(t *testing.T) {
	for kind, want := range map[FrameKind]bool{
		FrameClaim: false, FrameChunk: false, FrameProgress: false, FrameDone: true, FrameError: true, "": false,
	} {
		if kind.Terminal() != want {
			t.Errorf("Terminal() of %q is %v", kind, !want)
		}
	}
}

func TestVerdictEncode(t *testing.T) {
	for want, v := range map[string]Verdict{
		`{"go":true,"seq":3,"next":4}`:                    {Go: true, Seq: 3, Next: 4},
		`{"go":false,"reason":"superseded","seq":0}`:      {Reason: ReasonSuperseded},
		`{"go":false,"reason":"cancelled","seq":7}`:       {Reason: ReasonCancelled, Seq: 7},
		`{"go":true,"seq":18446744073709551615,"next":1}`: {Go: true, Seq: math.MaxUint64, Next: 1},
	} {
		if got := string(v.Encode()); got != want {
			t.Errorf("verdict %s, want %s", got, want)
		}
	}
}

func FuzzDecodeFrame(f *testing.F) {
	for _, frame := range sampleFrames {
		b, err := AppendFrame(nil, &frame)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{"seq":3,"tokens":5,"run":"r","kind":"chunk"}` + "\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		head, payload, hasHead := bytes.Cut(b, []byte{'\n'})
		got, err := DecodeFrame(b)
		// What the fast path reads, encoding/json reads the same.
		if fast, ok := decodeChunkHead(head); ok {
			var plain Frame
			if err := json.Unmarshal(head, &plain); err != nil {
				t.Fatalf("head %q isn't JSON: %v", head, err)
			}
			if diff := cmp.Diff(plain, fast); diff != "" {
				t.Fatalf("head %q (-encoding/json +by hand):\n%s", head, diff)
			}
		}
		if err != nil {
			return
		}
		if !hasHead || !bytes.Equal(got.Payload, payload) {
			t.Fatalf("payload %q of %q", got.Payload, b)
		}
		if got.Run == "" || got.Tokens < 0 || got.Kind == FrameError && got.Error == nil {
			t.Fatalf("%q was taken for %+v", b, got)
		}
		again, err := AppendFrame(nil, &got)
		if err != nil {
			t.Fatal(err)
		}
		checkFrame(t, again, got)
	})
}

// FuzzChunkHead writes heads of any run, however hostile, and reads them back.
func FuzzChunkHead(f *testing.F) {
	f.Add("r", uint64(1), 1)
	f.Add(`a","seq":9,"b":"`, uint64(0), -1)
	f.Add("\n\x00\\", uint64(math.MaxUint64), math.MaxInt)
	f.Fuzz(func(t *testing.T, run string, seq uint64, tokens int) {
		frame := Frame{Run: run, Seq: seq, Kind: FrameChunk, Tokens: tokens, Payload: []byte("p\n")}
		b, err := AppendFrame(nil, &frame)
		if err != nil {
			t.Fatal(err)
		}
		if run == "" || tokens < 0 {
			if _, err := DecodeFrame(b); err == nil {
				t.Fatalf("%q was taken", b)
			}
			return
		}
		frame.Run = strings.ToValidUTF8(run, "\ufffd")
		got, err := DecodeFrame(b)
		// Bytes that aren't UTF-8 can't be said in JSON; only then is the run another.
		if got.Run = strings.ToValidUTF8(got.Run, ""); err != nil || strings.ToValidUTF8(run, "") == run && got.Run != run {
			t.Fatalf("run %q came back as %q, %v", run, got.Run, err)
		}
		if got.Seq != seq || got.Tokens != tokens || string(got.Payload) != "p\n" {
			t.Fatalf("%q came back as %+v", b, got)
		}
	})
}

func BenchmarkChunkFrame(b *testing.B) {
	f := Frame{Run: string(NewNonce()), Seq: 12345, Kind: FrameChunk, Tokens: 34, Payload: bytes.Repeat([]byte("x"), 200)}
	var buf []byte
	b.Run("append", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			buf, _ = AppendFrame(buf[:0], &f)
		}
	})
	b.Run("decode", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_, _ = DecodeFrame(buf)
		}
	})
	slow := []byte(`{"seq":` + strconv.Itoa(12345) + `,"kind":"chunk","run":"r","tokens":34}` + "\n")
	b.Run("decode of another writer", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_, _ = DecodeFrame(slow)
		}
	})
}
