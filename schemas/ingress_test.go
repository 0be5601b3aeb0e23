package schemas

import (
	"encoding/json"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// The wire form is what the contract shows, byte for byte.
func TestAnswersOnTheWire(t *testing.T) {
	for _, c := range []struct {
		answer Answer
		want   string
	}{
		{Answer{Seq: 1, Kind: FrameProgress, Request: "req_1"}, `{"seq":1,"kind":"progress","request_id":"req_1"}`},
		{
			Answer{Seq: 2, Kind: FrameChunk, Request: "req_1", Chunk: json.RawMessage(`{"a": "<é>"}`)},
			`{"seq":2,"kind":"chunk","request_id":"req_1","chunk":{"a": "<é>"}}`,
		},
		{
			Answer{Seq: 3, Kind: FrameDone, Request: "req_1", Usage: Usage{7, 2}.Total(), Completion: json.RawMessage(`{}`)},
			`{"seq":3,"kind":"done","request_id":"req_1","usage":{"prompt_tokens":7,"completion_tokens":2,"total_tokens":9},"completion":{}}`,
		},
		{
			*ErrorAnswer(4, "req_1", Errorf(CodeConcurrencyLimit, "busy \"now\"")),
			`{"seq":4,"kind":"error","request_id":"req_1","error":{"message":"busy \"now\"","type":"rate_limit_exceeded","param":null,"code":"concurrency_limit"},"retry_after":1}`,
		},
		{
			*ErrorAnswer(1, "req_1", Errorf(CodeInvalidValue, "no").WithParam("n")),
			`{"seq":1,"kind":"error","request_id":"req_1","error":{"message":"no","type":"invalid_request_error","param":"n","code":"invalid_value"}}`,
		},
	} {
		b := c.answer.Append(nil)
		if string(b) != c.want {
			t.Errorf("%s, want %s", b, c.want)
		}
		back, err := DecodeAnswer(b)
		if err != nil {
			t.Errorf("%s: %v", b, err)
		} else if diff := cmp.Diff(&c.answer, back); diff != "" {
			t.Errorf("%s (-sent +read):\n%s", b, diff)
		}
	}
}

// The error of an answer is the one that HTTP has in its envelope.
func TestClientErrorIsThatOfHTTP(t *testing.T) {
	for _, info := range Codes {
		for _, e := range []*Error{Errorf(info.Code, "m"), Errorf(info.Code, "m").WithParam("p").WithRetryAfter(1500 * time.Millisecond)} {
			var envelope struct{ Error ClientError }
			if err := json.Unmarshal(e.AppendJSON(nil), &envelope); err != nil {
				t.Fatal(err)
			}
			answer := ErrorAnswer(1, "req_1", e)
			if diff := cmp.Diff(&envelope.Error, answer.Error); diff != "" || answer.RetryAfter != e.RetryAfterSeconds() {
				t.Errorf("%s: retry after %d (-HTTP +NATS):\n%s", info.Code, answer.RetryAfter, diff)
			}
		}
	}
}

func TestAnswersRefused(t *testing.T) {
	for _, b := range []string{
		"", "null", "[]", `"x"`, `{"kind":"progress","request_id":"req_1"}`, `{"seq":1,"kind":"progress"}`, `{"seq":1,"kind":"claim","request_id":"req_1"}`,
		`{"seq":1,"kind":"chunk","request_id":"req_1"}`, `{"seq":1,"kind":"done","request_id":"req_1"}`, `{"seq":1,"kind":"error","request_id":"req_1"}`,
		`{"seq":-1,"kind":"progress","request_id":"req_1"}`,
	} {
		if a, err := DecodeAnswer([]byte(b)); err == nil {
			t.Errorf("%s is read as %+v", b, a)
		}
	}
}

func TestCancelRequests(t *testing.T) {
	id := NewRequestID()
	if c, err := DecodeCancelRequest(CancelRequest{id}.Encode()); err != nil || c.Request != id {
		t.Errorf("%+v, %v", c, err)
	}
	for b, want := range map[string]Code{
		"":                         CodeInvalidJSON,
		"req_1":                    CodeInvalidJSON,
		`{"request_id":7}`:         CodeInvalidJSON,
		`{}`:                       CodeInvalidValue,
		`null`:                     CodeInvalidValue,
		`{"request_id":"req_1"}`:   CodeInvalidValue,
		`{"request_id":"key_01K"}`: CodeInvalidValue,
	} {
		_, err := DecodeCancelRequest([]byte(b))
		var e *Error
		if !errors.As(err, &e) || e.Code != want {
			t.Errorf("%s: %v, want %s", b, err, want)
		}
	}
}

func FuzzDecodeAnswer(f *testing.F) {
	f.Add(ErrorAnswer(1, "req_1", Errorf(CodeInvalidValue, "no").WithParam("n")).Append(nil))
	f.Add((&Answer{Seq: 3, Kind: FrameDone, Request: "req_1", Usage: Usage{7, 2}.Total(), Completion: json.RawMessage(`{}`)}).Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := DecodeAnswer(b)
		if err != nil {
			return
		}
		if wire := a.Append(nil); !json.Valid(wire) {
			t.Errorf("%q becomes %q", b, wire)
		}
	})
}
