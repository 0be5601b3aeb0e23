package schemas

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
)

// The operations of a publisher, the last token of an InSubject.
const (
	OperationChat   = "chat"
	OperationModels = "models"
	OperationWhoami = "whoami"
	OperationCancel = "cancel"
	OperationSubmit = "submit"
	OperationResult = "result"
)

// HeaderWait is how a publisher says for how long its request waits for a model that isn't
// in memory: "30s", or a number of seconds.
const HeaderWait = "OwnLLM-Wait"

// The kinds of what a publisher gets that isn't a part of a reply, beside the FrameKinds.
const (
	KindModels    = "models"
	KindWhoami    = "whoami"
	KindCancelled = "cancelled"
)

// Answer is one message of a reply to a publisher, and the error of any operation: one
// JSON object. Answers are numbered from 1 without gaps, and exactly one done or error
// answer ends them.
type Answer struct {
	Seq     uint64    `json:"seq"`
	Kind    FrameKind `json:"kind"` // any but claim
	Request RequestID `json:"request_id"`
	// Chunk is an OpenAI chunk, byte for byte as it is streamed over HTTP.
	Chunk json.RawMessage `json:"chunk,omitempty"`
	// Usage is set on a done answer.
	Usage *TotalUsage `json:"usage,omitempty"`
	// Completion is the whole reply, on a done answer of one that isn't streamed.
	Completion json.RawMessage `json:"completion,omitempty"`
	// Error is set on an error answer.
	Error *ClientError `json:"error,omitempty"`
	// RetryAfter is the advice to wait, in seconds; 0: none.
	RetryAfter int `json:"retry_after,omitempty"`
}

// TotalUsage is Usage as OpenAI shows it.
type TotalUsage struct {
	PromptTokens     int `json:"prompt_tokens"`
	CompletionTokens int `json:"completion_tokens"`
	TotalTokens      int `json:"total_tokens"`
}

// Total returns the usage as OpenAI shows it.
func (u Usage) Total() *TotalUsage {
	return &TotalUsage{u.PromptTokens, u.CompletionTokens, u.PromptTokens + u.CompletionTokens}
}

// ClientError is an Error as clients get it.
type ClientError struct {
	Message string  `json:"message"`
	Type    string  `json:"type"`
	Param   *string `json:"param"` // the field of the request that is wrong, or nil
	Code    Code    `json:"code"`
}

// Client returns the error as clients get it.
func (e *Error) Client() *ClientError {
	info := e.Code.Info()
	c := &ClientError{Message: e.Message, Type: info.Type, Code: info.Code}
	if e.Param != "" {
		c.Param = &e.Param
	}
	return c
}

// ErrorAnswer is the answer that ends a reply, or any other operation, with an error.
func ErrorAnswer(seq uint64, r RequestID, e *Error) *Answer {
	return &Answer{Seq: seq, Kind: FrameError, Request: r, Error: e.Client(), RetryAfter: e.RetryAfterSeconds()}
}

// Append appends the wire form of the answer. Chunks and completions, which are JSON
// already, go in as they are.
func (a *Answer) Append(dst []byte) []byte {
	dst = append(dst, `{"seq":`...)
	dst = strconv.AppendUint(dst, a.Seq, 10)
	dst = append(dst, `,"kind":`...)
	dst = AppendString(dst, string(a.Kind))
	dst = append(dst, `,"request_id":`...)
	dst = AppendString(dst, string(a.Request))
	if len(a.Chunk) > 0 {
		dst = append(dst, `,"chunk":`...)
		dst = append(dst, a.Chunk...)
	}
	if u := a.Usage; u != nil {
		dst = append(dst, `,"usage":`...)
		dst = append(dst, mustMarshal(u)...)
	}
	if len(a.Completion) > 0 {
		dst = append(dst, `,"completion":`...)
		dst = append(dst, a.Completion...)
	}
	if e := a.Error; e != nil {
		dst = append(dst, `,"error":`...)
		dst = append(dst, mustMarshal(e)...)
	}
	if a.RetryAfter > 0 {
		dst = append(dst, `,"retry_after":`...)
		dst = strconv.AppendInt(dst, int64(a.RetryAfter), 10)
	}
	return append(dst, '}')
}

// DecodeAnswer reads the wire form of an Answer.
func DecodeAnswer(b []byte) (*Answer, error) {
	var a Answer
	if err := json.Unmarshal(b, &a); err != nil {
		return nil, fmt.Errorf("answer: %w", err)
	}
	switch {
	case a.Seq == 0 || a.Request == "":
		return nil, errors.New("answer has no number, or no request")
	case a.Kind == FrameChunk && len(a.Chunk) > 0, a.Kind == FrameProgress, a.Kind == FrameDone && a.Usage != nil, a.Kind == FrameError && a.Error != nil:
		return &a, nil
	case a.Kind == FrameChunk || a.Kind == FrameDone || a.Kind == FrameError:
		return nil, fmt.Errorf("%s answer is empty", a.Kind)
	}
	return nil, fmt.Errorf("answer has unknown kind %q", a.Kind)
}

// ModelEntry is a model as clients see it: OpenAI's fields and ours.
type ModelEntry struct {
	ID             string       `json:"id"`
	Object         string       `json:"object"` // "model"
	Created        int64        `json:"created"`
	OwnedBy        string       `json:"owned_by"` // "ownllm"
	Capabilities   Capabilities `json:"capabilities"`
	ContextWindow  int          `json:"context_window"`
	SizeMB         int          `json:"size_mb"`
	RuntimeProfile string       `json:"runtime_profile"`
}

// Entry returns the model as clients see it.
func (m Model) Entry() ModelEntry {
	return ModelEntry{
		ID: m.ID, Object: "model", Created: m.Created, OwnedBy: "ownllm", Capabilities: m.Capabilities,
		ContextWindow: m.ContextWindow, SizeMB: m.SizeMB, RuntimeProfile: m.RuntimeProfile,
	}
}

// ModelsAnswer answers models.
type ModelsAnswer struct {
	Kind   string       `json:"kind"`   // KindModels
	Object string       `json:"object"` // "list"
	Data   []ModelEntry `json:"data"`
}

// Whoami answers whoami: what the brokers know of the key.
type Whoami struct {
	Kind   string   `json:"kind"` // KindWhoami
	Key    KeyID    `json:"key_id"`
	Name   string   `json:"name"`
	Prefix string   `json:"prefix"` // the part of the secret that may be seen
	Tenant TenantID `json:"tenant_id"`
	Slug   string   `json:"tenant"`
	User   UserID   `json:"user_id"`
	Scopes []string `json:"scopes"`
	// BudgetCents is the budget of a month; nil: no bound.
	BudgetCents *int64 `json:"budget_cents,omitempty"`
	// Concurrency is how many requests of the key may be in flight, QPS how many of the
	// tenant may come each second.
	Concurrency int `json:"concurrency"`
	QPS         int `json:"tenant_qps"`
	// Expires is when the key ends, in Unix seconds; 0: never.
	Expires int64 `json:"expires,omitempty"`
}

// CancelRequest asks for the end of a request of the same key.
type CancelRequest struct {
	Request RequestID `json:"request_id"`
}

// Encode returns the wire form of the request.
func (c CancelRequest) Encode() []byte { return mustMarshal(c) }

// DecodeCancelRequest reads the wire form of a CancelRequest. Its error is a *Error for the
// publisher.
func DecodeCancelRequest(b []byte) (CancelRequest, error) {
	var c CancelRequest
	if err := json.Unmarshal(b, &c); err != nil {
		return c, Errorf(CodeInvalidJSON, `The payload has to be a JSON object like {"request_id":"req_…"}.`)
	}
	if err := ValidateID(string(c.Request), "req_"); err != nil {
		return c, Errorf(CodeInvalidValue, `The field request_id has to be the id of a request, "req_…".`).WithParam("request_id")
	}
	return c, nil
}

// Cancelled answers cancel: the request is being ended.
type Cancelled struct {
	Kind    string    `json:"kind"` // KindCancelled
	Request RequestID `json:"request_id"`
}
