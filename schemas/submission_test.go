package schemas

import (
	"encoding/json"
	"errors"
	"testing"
)

func TestDecodeSubmitRequest(t *testing.T) {
	for body, want := range map[string]struct {
		code  Code
		param string
	}{
		`{"id":"a","request":{"x":1}}`:       {},
		`{"id":"a","request": {}} `:          {},
		`{"id":"a","request":{}`:             {CodeInvalidJSON, ""},
		`[]`:                                 {CodeInvalidJSON, ""},
		``:                                   {CodeInvalidJSON, ""},
		`{"id":1,"request":{}}`:              {CodeInvalidJSON, ""},
		`{"id":"a","deadline_seconds":"1"}`:  {CodeInvalidJSON, ""},
		`{"request":{}}`:                     {CodeInvalidValue, "id"},
		`{"id":"a"}`:                         {CodeInvalidValue, "request"},
		`{"id":"a","request":null}`:          {CodeInvalidValue, "request"},
		`{"id":"a","request":"{}"}`:          {CodeInvalidValue, "request"},
		`{"id":"a","request":{},"more":[1]}`: {},
	} {
		_, err := DecodeSubmitRequest([]byte(body))
		checkRefusal(t, body, err, want.code, want.param)
	}
}

func TestDecodeResultRequest(t *testing.T) {
	for body, want := range map[string]struct {
		code  Code
		param string
	}{
		`{"id":"a"}`:                   {},
		`{"id":"a","wait_seconds":60}`: {},
		`{"id":"a","wait_seconds":61}`: {CodeInvalidValue, "wait_seconds"},
		`{"id":"a","wait_seconds":-1}`: {CodeInvalidValue, "wait_seconds"},
		`{}`:                           {CodeInvalidValue, "id"},
		`nonsense`:                     {CodeInvalidJSON, ""},
	} {
		_, err := DecodeResultRequest([]byte(body))
		checkRefusal(t, body, err, want.code, want.param)
	}
}

func checkRefusal(t *testing.T, body string, err error, code Code, param string) {
	t.Helper()
	var refusal *Error
	if code == "" {
		if err != nil {
			t.Errorf("%s: %v", body, err)
		}
		return
	}
	if !errors.As(err, &refusal) || refusal.Code != code || refusal.Param != param {
		t.Errorf("%s: %v, want %s of %q", body, err, code, param)
	}
}

// A completion goes out byte for byte, and what is written by hand is what encoding/json would
// read.
func TestResultEncode(t *testing.T) {
	const completion = `{"a": "<b>\u00e9", "n":1.0}`
	r := &Result{Kind: KindResult, ID: "a\"<", State: SubmissionDone, Completion: json.RawMessage(completion), Created: 1, Finished: 2, Expires: 3}
	b := r.Encode()
	var raw map[string]json.RawMessage
	if err := json.Unmarshal(b, &raw); err != nil || string(raw["completion"]) != completion {
		t.Errorf("%s: %v", b, err)
	}
	var back Result
	if err := json.Unmarshal(b, &back); err != nil || back.ID != r.ID || back.State != r.State || back.Expires != 3 {
		t.Errorf("%+v, %v", back, err)
	}
	r.Completion = nil
	if b := r.Encode(); !json.Valid(b) {
		t.Errorf("%s", b)
	}
}

func FuzzDecodeSubmitRequest(f *testing.F) {
	f.Add([]byte(`{"id":"a","request":{"model":"m"},"deadline_seconds":1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := DecodeSubmitRequest(b)
		if err != nil {
			var refusal *Error
			if !errors.As(err, &refusal) {
				t.Errorf("%v isn't for a publisher", err)
			}
			return
		}
		if again, err := DecodeSubmitRequest(r.Encode()); err != nil || again.ID != r.ID {
			t.Errorf("%+v, %v", again, err)
		}
	})
}
