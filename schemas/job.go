package schemas

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
)

// Headers of a job on the bus. Trace context travels beside them, as the W3C
// headers traceparent and tracestate.
const (
	// HeaderMsgID is JetStream's deduplication id. It holds tenant, request and
	// attempt: ids are unique in a whole stream, so without the tenant one tenant
	// could swallow another's job, and without the attempt a failover's second
	// publish would vanish as a duplicate.
	HeaderMsgID = "Nats-Msg-Id"
	// HeaderTTL is JetStream's message TTL, in whole seconds.
	HeaderTTL = "Nats-TTL"
)

// MaxInlineBody is the largest request body, in bytes, that travels inside a job.
// A larger one stays with the owner, and the worker fetches it in pieces of at most
// BodyPiece bytes.
const (
	MaxInlineBody = 512 << 10
	BodyPiece     = 128 << 10
)

// Job is the head of a job: all that a worker has to know to run one attempt of one
// request. On the wire it is one line of JSON, followed by the client's own body,
// byte for byte, unless BodySize says that the body is fetched.
type Job struct {
	Version int       `json:"v"`
	Request RequestID `json:"request"`
	Attempt int       `json:"attempt"`
	Nonce   Nonce     `json:"nonce"`
	Owner   OwnerID   `json:"owner"`
	Tenant  TenantID  `json:"tenant"`
	Key     KeyID     `json:"key,omitempty"`
	// Operation is the API operation: "chat".
	Operation string `json:"operation"`
	// Model is the id under which the agent advertises the model.
	Model string `json:"model"`
	// Deadline ends the attempt, in Unix milliseconds.
	Deadline int64 `json:"deadline_ms"`
	// ColdWait is how long, in milliseconds, a request waits for a model that has to
	// be loaded first; then it gets model_loading.
	ColdWait int64 `json:"cold_wait_ms"`
	// Stream and IncludeUsage are what the client asked for.
	Stream       bool `json:"stream,omitempty"`
	IncludeUsage bool `json:"include_usage,omitempty"`
	// Completion, Created and ReplyModel go into every chunk of the reply.
	Completion string `json:"completion"`
	Created    int64  `json:"created"`
	ReplyModel string `json:"reply_model"`
	// Limit is how many tokens the reply may have, all choices together; 0 stands for no
	// bound. The worker lets no more through, and ends a reply that is cut short with the
	// finish_reason "length".
	Limit int64 `json:"limit,omitempty"`
	// More says that the limit may yet be raised, by a Verdict or a Control: a worker
	// that has reached it waits.
	More bool `json:"more,omitempty"`
	// Count asks for the exact size of the prompt, on a progress frame, before the
	// backend is called, if the backend can tell.
	Count bool `json:"count,omitempty"`
	// CountLate asks for it once the reply has been under way for a moment: for an owner
	// who has plenty to pay with, and wants to know only what a reply costs that breaks off.
	CountLate bool `json:"count_late,omitempty"`
	// Hold says that the request isn't admitted yet: the worker calls no backend before its
	// claim is granted, and the limit is that of the verdict. It is set only for a worker
	// whose heartbeat says that it holds.
	Hold bool `json:"hold,omitempty"`
	// Bundle says that the owner takes frames in bundles, too, those of this attempt and others.
	Bundle bool `json:"bundle,omitempty"`
	// Continue is set on an attempt that goes on where another one broke off: the worker
	// lets the backend say only what comes after the text.
	Continue *Continuation `json:"continue,omitempty"`
	// BodySize is the size of a body that is fetched from the owner; 0 says that the
	// body follows the head.
	BodySize int `json:"body_size,omitempty"`
}

// MaxContinued is the longest text in bytes that a reply is continued from. However much
// JSON has to escape, its job fits a message.
const MaxContinued = 128 << 10

// Continuation is what the client has of a reply already.
type Continuation struct {
	// Text is the content so far. It may be empty: then the reply begins anew, but its
	// client has had the delta with the role.
	Text string `json:"text"`
	// Tokens is how many tokens that is. The worker counts on from there: tokens and usage
	// of its frames are those of the whole reply.
	Tokens int `json:"tokens"`
	// PromptTokens is the size of the prompt that the client sent, 0 if it isn't known.
	PromptTokens int `json:"prompt_tokens,omitempty"`
}

// MsgID is the deduplication id of the job.
func (j *Job) MsgID() string {
	return fmt.Sprintf("%s:%s:%d", j.Tenant, j.Request, j.Attempt)
}

// Encode returns the payload of the job: the head, a newline, and the body unless
// it is to be fetched.
func (j *Job) Encode(body string) ([]byte, error) {
	if j.BodySize != 0 {
		body = ""
	}
	head, err := json.Marshal(j)
	if err != nil {
		return nil, fmt.Errorf("encode job %s: %w", j.Request, err)
	}
	payload := make([]byte, 0, len(head)+1+len(body))
	payload = append(payload, head...)
	payload = append(payload, '\n')
	return append(payload, body...), nil
}

// DecodeJob reads the payload of a job. The body that it returns is a part of the
// payload, and is nil if it is to be fetched from the owner.
func DecodeJob(payload []byte) (*Job, []byte, error) {
	head, body, ok := bytes.Cut(payload, []byte{'\n'})
	if !ok {
		return nil, nil, errors.New("job has no head")
	}
	var j Job
	if err := json.Unmarshal(head, &j); err != nil {
		return nil, nil, fmt.Errorf("job head: %w", err)
	}
	switch {
	case !Protocol.Speak(j.Version):
		return nil, nil, fmt.Errorf("job has protocol version %d, and this build speaks %s", j.Version, Protocol)
	case j.Request == "" || j.Nonce == "" || j.Owner == "" || j.Tenant == "" || j.Model == "" || j.Operation == "":
		return nil, nil, errors.New("job lacks a field that it must have")
	case j.Limit < 0:
		return nil, nil, fmt.Errorf("job has a limit of %d tokens", j.Limit)
	case j.Continue != nil && (!j.Stream || j.Continue.Tokens < 0 || j.Continue.PromptTokens < 0):
		return nil, nil, errors.New("job continues what can't be continued")
	case j.BodySize < 0 || j.BodySize > 0 && len(body) > 0:
		return nil, nil, errors.New("job has a body that it says is elsewhere")
	case j.BodySize > 0:
		return &j, nil, nil
	}
	return &j, body, nil
}

// BodyRequest asks the owner of an attempt for a piece of its body.
type BodyRequest struct {
	Offset int `json:"offset"`
}

// Encode returns the wire form of the request.
func (b BodyRequest) Encode() []byte { return mustMarshal(b) }

// DecodeBodyRequest reads the wire form of a BodyRequest and returns its offset.
func DecodeBodyRequest(b []byte) (int, error) {
	var r BodyRequest
	if err := json.Unmarshal(b, &r); err != nil {
		return 0, fmt.Errorf("body request: %w", err)
	}
	if r.Offset < 0 {
		return 0, fmt.Errorf("body request: offset %d is negative", r.Offset)
	}
	return r.Offset, nil
}

// UsageReport is what a worker counted of a request whose owner is gone. Which agent
// speaks, its subject says.
type UsageReport struct {
	Version int       `json:"v"`
	Request RequestID `json:"request"`
	Attempt int       `json:"attempt"`
	Usage
}

// MsgID is the deduplication id of the report of an agent. It holds who speaks, so that
// nobody's report swallows another's.
func (u *UsageReport) MsgID(t TenantID, a AgentID) string {
	return fmt.Sprintf("%s:%s:%s:%d", t, a, u.Request, u.Attempt)
}

// Encode returns the wire form of the report.
func (u *UsageReport) Encode() []byte { return mustMarshal(u) }

// DecodeUsageReport reads the wire form of a UsageReport.
func DecodeUsageReport(b []byte) (*UsageReport, error) {
	var u UsageReport
	if err := json.Unmarshal(b, &u); err != nil {
		return nil, fmt.Errorf("usage report: %w", err)
	}
	switch {
	case !Protocol.Speak(u.Version):
		return nil, fmt.Errorf("usage report has protocol version %d, and this build speaks %s", u.Version, Protocol)
	case u.Request == "" || u.PromptTokens < 0 || u.CompletionTokens < 0:
		return nil, errors.New("usage report lacks its request, or counts less than nothing")
	}
	return &u, nil
}
