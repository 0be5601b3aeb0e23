package schemas

import (
	"bytes"
	"encoding/json"
	"time"
)

// The kinds of the answers to submit and result.
const (
	KindAccepted = "accepted"
	KindResult   = "result"
)

// SubmissionState is how far a submission has come.
type SubmissionState string

const (
	// SubmissionWaiting is one that will be run.
	SubmissionWaiting SubmissionState = "waiting"
	// SubmissionRunning is one that is being run.
	SubmissionRunning SubmissionState = "running"
	// SubmissionDone has ended with a completion.
	SubmissionDone SubmissionState = "done"
	// SubmissionError has ended with an error.
	SubmissionError SubmissionState = "error"
)

// Ended reports whether the state is a last one.
func (s SubmissionState) Ended() bool { return s == SubmissionDone || s == SubmissionError }

// SubmitRequest asks that a request be run once, whenever that can be.
type SubmitRequest struct {
	// ID is the publisher's own, 1 to 128 printable ASCII characters.
	ID string `json:"id"`
	// Request is the body of an OpenAI chat completion request.
	Request json.RawMessage `json:"request"`
	// DeadlineSeconds is how long it may wait for its run; nil: a day.
	DeadlineSeconds *int `json:"deadline_seconds,omitempty"`
}

// Encode returns the wire form of the request.
func (r SubmitRequest) Encode() []byte { return mustMarshal(r) }

// DecodeSubmitRequest reads the wire form of a SubmitRequest. Its error is a *Error for the
// publisher. Ranges are for the caller to check.
func DecodeSubmitRequest(b []byte) (SubmitRequest, error) {
	var r SubmitRequest
	if err := json.Unmarshal(b, &r); err != nil {
		return r, Errorf(CodeInvalidJSON, `The payload has to be a JSON object like {"id":"…","request":{…}}.`)
	}
	if r.ID == "" {
		return r, Errorf(CodeInvalidValue, "The field id has to be an id of your own, by which you will know the result.").WithParam("id")
	}
	if object := bytes.TrimLeft(r.Request, " \t\r\n"); len(object) == 0 || object[0] != '{' {
		return r, Errorf(CodeInvalidValue, "The field request has to be a chat completion request, as a JSON object.").WithParam("request")
	}
	return r, nil
}

// Accepted answers submit, once the submission is recorded.
type Accepted struct {
	Kind  string          `json:"kind"` // KindAccepted
	ID    string          `json:"id"`
	State SubmissionState `json:"state"`
	// Duplicate says that it had been submitted before.
	Duplicate bool `json:"duplicate"`
}

// ResultRequest asks how a submission of the same key has ended.
type ResultRequest struct {
	ID string `json:"id"`
	// WaitSeconds is how long to wait for its end, from 0 to 60.
	WaitSeconds int `json:"wait_seconds,omitempty"`
}

// MaxResultWait is the longest that a ResultRequest may wait.
const MaxResultWait = 60 * time.Second

// Encode returns the wire form of the request.
func (r ResultRequest) Encode() []byte { return mustMarshal(r) }

// DecodeResultRequest reads the wire form of a ResultRequest. Its error is a *Error for the
// publisher.
func DecodeResultRequest(b []byte) (ResultRequest, error) {
	var r ResultRequest
	if err := json.Unmarshal(b, &r); err != nil {
		return r, Errorf(CodeInvalidJSON, `The payload has to be a JSON object like {"id":"…"}.`)
	}
	if most := int(MaxResultWait / time.Second); r.WaitSeconds < 0 || r.WaitSeconds > most {
		return r, Errorf(CodeInvalidValue, "The field wait_seconds has to be from 0 to %d.", most).WithParam("wait_seconds")
	}
	if r.ID == "" {
		return r, Errorf(CodeInvalidValue, "The field id has to be the id under which the request was submitted.").WithParam("id")
	}
	return r, nil
}

// Result says how a submission stands: it answers result, and is pushed to the
// submission's ResultSubject at its end. Times are in Unix seconds.
type Result struct {
	Kind  string          `json:"kind"` // KindResult
	ID    string          `json:"id"`
	State SubmissionState `json:"state"`
	// Request is the run that ended it.
	Request RequestID `json:"request_id,omitempty"`
	// Completion is the whole reply, byte for byte as HTTP would give it, until it is
	// forgotten.
	Completion json.RawMessage `json:"completion,omitempty"`
	Usage      *TotalUsage     `json:"usage,omitempty"`
	Error      *ClientError    `json:"error,omitempty"`
	Created    int64           `json:"created"`
	Finished   int64           `json:"finished,omitempty"`
	// Expires is when completion and error are forgotten.
	Expires int64 `json:"expires,omitempty"`
}

// Encode returns the wire form of the result.
func (r *Result) Encode() []byte {
	rest := *r
	rest.Completion = nil
	b := mustMarshal(rest)
	if len(r.Completion) == 0 {
		return b
	}
	// It is JSON already, and goes in as it is.
	b = append(b[:len(b)-1], `,"completion":`...)
	return append(append(b, r.Completion...), '}')
}
