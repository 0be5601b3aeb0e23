package backend

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"

	"github.com/ownllm/ownllm/schemas"
)

type event struct {
	Data   string
	Failed bool
}

func readEvents(r io.Reader, size int) ([]event, error) {
	e := events{r: bufio.NewReaderSize(r, size)}
	var got []event
	for {
		data, failed, err := e.next(true)
		if err != nil {
			return got, err
		}
		got = append(got, event{string(data), failed})
	}
}

func TestEvents(t *testing.T) {
	long := strings.Repeat("x", 5000)
	tests := []struct {
		name, in string
		want     []event
	}{
		{"one", "data: a\n\n", []event{{"a", false}}},
		{"without a space", "data:a\n\ndata: {\"b\": 1}\n\n", []event{{"a", false}, {`{"b": 1}`, false}}},
		{"only one space goes", "data:  a\n\n", []event{{" a", false}}},
		{"CRLF", "data: a\r\n\r\ndata: b\r\n\r\n", []event{{"a", false}, {"b", false}}},
		{"several lines", "data: {\ndata: \"a\":1}\ndata\n\n", []event{{"{\n\"a\":1}\n", false}}},
		{"comments, names, ids", ": ping\n\nevent: x\nid: 1\nretry: 5\ndata: a\n: in the middle\n\n:\n\n", []event{{"a", false}}},
		{"a name without data is no event", "event: ping\n\ndatabase: 1\n\ndata: a\n\n", []event{{"a", false}}},
		{"no blank line at the end", "data: a\n\ndata: [DONE]\n", []event{{"a", false}, {"[DONE]", false}}},
		{"no line end at the end", "data: a\n\ndata: [DONE]", []event{{"a", false}, {"[DONE]", false}}},
		{"an error as a field", "data: a\n\nerror: {\"code\":400}\n\n", []event{{"a", false}, {`{"code":400}`, true}}},
		{"an empty event", "data:\n\ndata: a\n\n", []event{{"", false}, {"a", false}}},
		{"blank lines", "\n\n\r\ndata: a\n\n\n\n", []event{{"a", false}}},
		{"longer than the buffer", "data: " + long + "\n\ndata: a\n\ndata: " + long + "\r\ndata: b\r\n\r\n", []event{{long, false}, {"a", false}, {long + "\nb", false}}},
		{"UTF-8", "data: žluť 🦙\n\n", []event{{"žluť 🦙", false}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for name, r := range map[string]io.Reader{
				"at once":         strings.NewReader(tt.in),
				"byte by byte":    iotest.OneByteReader(strings.NewReader(tt.in)),
				"EOF with data":   iotest.DataErrReader(strings.NewReader(tt.in)),
				"halves, EOF too": iotest.DataErrReader(iotest.HalfReader(strings.NewReader(tt.in))),
			} {
				got, err := readEvents(r, 64)
				if err != io.EOF {
					t.Errorf("%s: error %v, want io.EOF", name, err)
				}
				if diff := cmp.Diff(tt.want, got); diff != "" {
					t.Errorf("%s (-want +got):\n%s", name, diff)
				}
			}
		})
	}
}

func TestEventsBound(t *testing.T) {
	line := "data: " + strings.Repeat("x", maxEvent+1)
	if _, err := readEvents(strings.NewReader(line+"\n\n"), readBuffer); err != errTooLong {
		t.Errorf("one long line: %v, want %v", err, errTooLong)
	}
	lines := strings.Repeat("data: "+strings.Repeat("x", 1<<20)+"\n", 5)
	if _, err := readEvents(strings.NewReader(lines+"\n"), readBuffer); err != errTooLong {
		t.Errorf("many lines: %v, want %v", err, errTooLong)
	}
	if got, err := readEvents(strings.NewReader("data: "+strings.Repeat("x", maxEvent/2)+"\n\n"), readBuffer); err != io.EOF || len(got) != 1 {
		t.Errorf("half the bound: %d events, %v", len(got), err)
	}
}

// splitReader gives the two parts of a text in two reads.
type splitReader struct{ parts [][]byte }

func (s *splitReader) Read(p []byte) (int, error) {
	for len(s.parts) > 0 && len(s.parts[0]) == 0 {
		s.parts = s.parts[1:]
	}
	if len(s.parts) == 0 {
		return 0, io.EOF
	}
	n := copy(p, s.parts[0])
	s.parts[0] = s.parts[0][n:]
	return n, nil
}

func (s *splitReader) Close() error { return nil }

// replyOf is a reply whose stream is read from r.
func replyOf(kind Kind, c *Call, r io.ReadCloser) *Reply {
	ctx, cancel := context.WithCancel(context.Background())
	reply := &Reply{kind: kind, call: c, cause: ctx.Err, cancel: cancel, body: r}
	reply.events.r = bufio.NewReaderSize(r, readBuffer)
	reply.rewriter.reset(kind, c)
	return reply
}

// drain reads a reply to its end and returns all its lines.
func drain(r *Reply) (string, error) {
	var all []byte
	for {
		out, err := r.Next(nil)
		all = append(all, out...)
		if err == io.EOF {
			return string(all), nil
		}
		if err != nil {
			return string(all), err
		}
		if len(out) == 0 {
			return string(all), errors.New("Next returned neither chunk nor error")
		}
	}
}

const wholeStream = ": hello\r\n\r\n" +
	`data: {"id":"a","choices":[{"index":0,"delta":{"role":"assistant","content":null},"finish_reason":null}]}` + "\n\n" +
	`data:{"id":"a","choices":[{"index":0,"delta":{"content":"žluť 🦙"},"finish_reason":null}]}` + "\r\n\r\n" +
	"event: message\ndata: {\"id\":\"a\",\ndata: \"choices\":[{\"index\":0,\"delta\":{\"reasoning\":\"r\"},\"finish_reason\":null}]}\n\n" +
	`data: {"id":"a","choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"error":null}` + "\n\n" +
	`data: {"id":"a","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}` + "\n\n" +
	"data: [DONE]\n"

func TestSplitAnywhere(t *testing.T) {
	c := testCall(true, true)
	want, err := drain(replyOf(LlamaCPP, c, io.NopCloser(strings.NewReader(wholeStream))))
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(want, "\n"); n != 5 {
		t.Fatalf("%d lines, want 5:\n%s", n, want)
	}
	for i := range len(wholeStream) + 1 {
		text := []byte(wholeStream)
		got, err := drain(replyOf(LlamaCPP, c, &splitReader{[][]byte{bytes.Clone(text[:i]), bytes.Clone(text[i:])}}))
		if err != nil || got != want {
			t.Fatalf("split at %d: %v\n%s", i, err, cmp.Diff(want, got))
		}
	}
	got, err := drain(replyOf(LlamaCPP, c, io.NopCloser(iotest.OneByteReader(strings.NewReader(wholeStream)))))
	if err != nil || got != want {
		t.Fatalf("byte by byte: %v\n%s", err, cmp.Diff(want, got))
	}
}

// pulses gives one part per read and counts the reads.
type pulses struct {
	splitReader
	reads int
}

func (p *pulses) Read(b []byte) (int, error) {
	p.reads++
	return p.splitReader.Read(b)
}

// TestNextNeverWaitsForMore shows that Next reads until it has one chunk, adds what
// came with it, and reads no further.
func TestNextNeverWaitsForMore(t *testing.T) {
	chunk := func(s string) string {
		return `data: {"choices":[{"index":0,"delta":{"role":"assistant","content":"` + s + `"},"finish_reason":"stop"}]}` + "\n\n"
	}
	whole := chunk("d")
	p := &pulses{splitReader: splitReader{[][]byte{
		[]byte(": ping\n\n"),
		[]byte(chunk("a") + chunk("b") + chunk("c") + ": ping\n\n" + whole[:20]),
		[]byte(whole[20:] + ": ping\n\n"),
		[]byte("data: [DONE]\n\n"),
	}}}
	r := replyOf(VLLM, testCall(true, false), p)
	for i, want := range []struct{ chunks, reads int }{{3, 2}, {1, 3}} {
		out, err := r.Next(nil)
		if n := bytes.Count(out, []byte("\n")); err != nil || n != want.chunks || p.reads != want.reads {
			t.Fatalf("call %d: %d chunks after %d reads (%v), want %d after %d", i, n, p.reads, err, want.chunks, want.reads)
		}
	}
	if out, err := r.Next(nil); err != io.EOF || len(out) != 0 {
		t.Fatalf("end: %q, %v", out, err)
	}
	if _, err := r.Next(nil); err != io.EOF {
		t.Fatalf("after the end: %v", err)
	}
}

func TestNextBoundsABatch(t *testing.T) {
	chunk := `data: {"choices":[{"index":0,"delta":{"content":"` + strings.Repeat("x", 8<<10) + `"},"finish_reason":"stop"}]}` + "\n\n"
	r := replyOf(VLLM, testCall(true, false), io.NopCloser(strings.NewReader(strings.Repeat(chunk, 100))))
	r.events.r = bufio.NewReaderSize(r.body, 1<<20)
	calls := 0
	for {
		out, err := r.Next(nil)
		if len(out) > maxBatch+len(chunk)+256 {
			t.Fatalf("%d bytes at once", len(out))
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		calls++
	}
	if calls < 10 {
		t.Errorf("%d calls for 800 KB", calls)
	}
}

func TestStreamEnds(t *testing.T) {
	const (
		text   = `data: {"choices":[{"index":0,"delta":{"role":"assistant","content":"a"},"finish_reason":null}]}` + "\n\n"
		stop   = `data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}` + "\n\n"
		second = `data: {"choices":[{"index":1,"delta":{"content":"b"},"finish_reason":null}]}` + "\n\n"
		done   = "data: [DONE]\n\n"
	)
	tests := []struct {
		name, in string
		kind     Kind
		err      error
		code     schemas.Code // "" if the reply is whole
		message  string       // part of it
		lines    int
	}{
		{name: "whole", in: text + stop + done, lines: 2},
		{name: "whole without [DONE]", in: text + stop, lines: 2},
		{name: "what follows [DONE] doesn't count", in: text + stop + done + "data: rubbish\n\n", lines: 2},
		{name: "no finish_reason", in: text + done, code: schemas.CodeBackendError, message: "stopped in the middle", lines: 1},
		{name: "it just ends", in: text, code: schemas.CodeBackendError, message: "stopped in the middle", lines: 1},
		{name: "Ollama swallows a failure", kind: Ollama, in: text + `data: {"id":"chatcmpl-5","object":"chat.completion.chunk","created":1,"model":"","system_fingerprint":"fp_ollama","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}` + "\n\n",
			code: schemas.CodeBackendError, message: "The Ollama backend stopped in the middle", lines: 2},
		{name: "one of two choices is unfinished", in: text + second + stop + done, code: schemas.CodeBackendError, lines: 3},
		{name: "nothing", in: "", code: schemas.CodeBackendError},
		{name: "only [DONE]", in: done, code: schemas.CodeBackendError},
		{name: "only usage", in: `data: {"choices":[],"usage":{"prompt_tokens":1}}` + "\n\n" + done, code: schemas.CodeBackendError},
		{name: "garbage", in: text + "data: <html>\n\n" + stop + done, code: schemas.CodeBackendError, message: "isn't JSON", lines: 1},
		{name: "cut in an event", in: text + `data: {"choices":[{"ind`, code: schemas.CodeBackendError, message: "isn't JSON", lines: 1},
		{name: "connection lost", in: text + stop, err: io.ErrUnexpectedEOF, code: schemas.CodeBackendError, message: "connection was lost", lines: 2},
		{name: "too long", in: text + "data: " + strings.Repeat("x", maxEvent+1), code: schemas.CodeBackendError, message: "4 MiB", lines: 1},
		{name: "vLLM fails in the middle", kind: VLLM, in: text + `data: {"error":{"message":"EngineCore encountered an issue. secret","type":"InternalServerError","param":null,"code":500}}` + "\n\n" + done,
			code: schemas.CodeBackendError, message: "The vLLM backend failed with status 500: its engine died.", lines: 1},
		{name: "old vLLM fails", kind: VLLM, in: text + `data: {"object":"error","message":"boom secret","type":"x","code":500}` + "\n\n" + done, code: schemas.CodeBackendError, message: "status 500", lines: 1},
		{name: "llama.cpp fails in the middle", kind: LlamaCPP, in: text + `data: {"error":{"code":500,"message":"Context size has been exceeded.","type":"server_error"}}` + "\n\n", code: schemas.CodeContextLengthExceeded, lines: 1},
		{name: "old llama.cpp finds the prompt too long", kind: LlamaCPP, in: `error: {"code":400,"message":"the request exceeds the available context size. try increasing the context size or enable context shift","type":"invalid_request_error"}` + "\n\n",
			code: schemas.CodeContextLengthExceeded, message: `"m"`},
		{name: "a failure in words", in: text + `data: {"error":"secret"}` + "\n\n", code: schemas.CodeBackendError, message: "failed", lines: 1},
		{name: "still loading", kind: LlamaCPP, in: `data: {"error":{"code":503,"message":"Loading model","type":"unavailable_error"}}` + "\n\n", code: schemas.CodeModelLoading},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var body io.Reader = strings.NewReader(tt.in)
			if tt.err != nil {
				body = io.MultiReader(body, iotest.ErrReader(tt.err))
			}
			r := replyOf(tt.kind, testCall(true, false), io.NopCloser(body))
			out, err := drain(r)
			if n := strings.Count(out, "\n"); n != tt.lines {
				t.Errorf("%d lines, want %d:\n%s", n, tt.lines, out)
			}
			if tt.code == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			var e *schemas.Error
			if !errors.As(err, &e) || e.Code != tt.code || !strings.Contains(e.Message, tt.message) {
				t.Errorf("error %v, want %s with %q", err, tt.code, tt.message)
			}
			if strings.Contains(err.Error(), "secret") {
				t.Errorf("the backend's text got out: %v", err)
			}
			if _, again := r.Next(nil); again != err {
				t.Errorf("second error %v, want the first", again)
			}
		})
	}
}

func FuzzReply(f *testing.F) {
	f.Add([]byte(wholeStream), 7)
	f.Add([]byte("error: {}\n\ndata\n\ndata: {\"choices\":[{\"finish_reason\":\"x\"}]}"), 1)
	f.Fuzz(func(t *testing.T, data []byte, split int) {
		c := testCall(true, true)
		want, wantErr := drain(replyOf(VLLM, c, io.NopCloser(bytes.NewReader(data))))
		if split < 0 || split > len(data) {
			split = len(data) / 2
		}
		got, err := drain(replyOf(VLLM, c, &splitReader{[][]byte{bytes.Clone(data[:split]), bytes.Clone(data[split:])}}))
		if got != want || (err == nil) != (wantErr == nil) {
			t.Fatalf("split at %d: %q, %v; whole: %q, %v", split, got, err, want, wantErr)
		}
	})
}

// BenchmarkNext is the whole hot path of a token: from the bytes of the connection
// to the chunk for the client.
func BenchmarkNext(b *testing.B) {
	for name, in := range benchChunks {
		for _, batch := range []int{1, 16} {
			b.Run(name+map[int]string{1: "/apart", 16: "/together"}[batch], func(b *testing.B) {
				text := []byte(strings.Repeat("data: "+in+"\n\n", batch))
				r := replyOf(VLLM, testCall(true, false), io.NopCloser(&repeat{text: text}))
				var dst []byte
				b.ReportAllocs()
				for range b.N / batch {
					var err error
					if dst, err = r.Next(dst[:0]); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// repeat gives the same text at every read, for ever.
type repeat struct{ text []byte }

func (r *repeat) Read(p []byte) (int, error) { return copy(p, r.text), nil }
