package schemas

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"
)

// Code is a machine-readable error code, the "code" of the OpenAI error envelope.
type Code string

// The codes of the product's error page.
const (
	CodeModelRequired             Code = "model_required"
	CodeMessagesRequired          Code = "messages_required"
	CodeModelDoesNotSupportTools  Code = "model_does_not_support_tools"
	CodeModelDoesNotSupportVision Code = "model_does_not_support_vision"
	CodeContextLengthExceeded     Code = "context_length_exceeded"
	CodeInvalidResponseFormat     Code = "invalid_response_format"
	CodeKeyInvalid                Code = "key_invalid"
	CodeKeyExpired                Code = "key_expired"
	CodeKeyMalformed              Code = "key_malformed"
	CodeScopeRequired             Code = "scope_required"
	CodeTenantDisabled            Code = "tenant_disabled"
	CodeUserDeactivated           Code = "user_deactivated"
	CodeBudgetExceeded            Code = "budget_exceeded"
	CodeConcurrencyLimit          Code = "concurrency_limit"
	CodeTenantQPSLimit            Code = "tenant_qps_limit"
	CodeAgentOffline              Code = "agent_offline"
	CodeTunnelDown                Code = "tunnel_down"
	CodeModelLoading              Code = "model_loading"
	CodeInternalError             Code = "internal_error"
)

// The extensions: codes that the error page doesn't have, for failures that it
// has no name for.
const (
	CodeInvalidJSON      Code = "invalid_json"
	CodeInvalidValue     Code = "invalid_value"
	CodeModelNotFound    Code = "model_not_found"
	CodeNotFound         Code = "not_found"
	CodeMethodNotAllowed Code = "method_not_allowed"
	CodeRequestTooLarge  Code = "request_too_large"
	CodeTooManyFailures  Code = "too_many_failures"
	CodeQueueFull        Code = "queue_full"
	CodeAgentTimeout     Code = "agent_timeout"
	CodeBackendError     Code = "backend_error"
)

// The types of the OpenAI error envelope.
const (
	typeInvalidRequest   = "invalid_request_error"
	typeAuthentication   = "authentication_error"
	typePermission       = "permission_error"
	typeRateLimit        = "rate_limit_exceeded"
	typeAgentUnavailable = "agent_unavailable"
	typeInternal         = "internal_error"
)

// CodeInfo is what the contract says of one code.
type CodeInfo struct {
	Code      Code
	Status    int    // HTTP status
	Type      string // "type" of the envelope
	Extension bool   // not on the product's error page
	When      string // one sentence for the reader of an error reference
}

// Codes is the whole table, in the order of the error page, extensions last.
// Everything that maps a code to a status or a type reads it here.
var Codes = []CodeInfo{
	{CodeModelRequired, 400, typeInvalidRequest, false, "The request has no model."},
	{CodeMessagesRequired, 400, typeInvalidRequest, false, "The request has no messages, or an empty list."},
	{CodeModelDoesNotSupportTools, 400, typeInvalidRequest, false, "The request has tools, and the model can't call tools."},
	{CodeModelDoesNotSupportVision, 400, typeInvalidRequest, false, "The request has image parts, and the model can't see."},
	{CodeContextLengthExceeded, 400, typeInvalidRequest, false, "The request doesn't fit the model's context window."},
	{CodeInvalidResponseFormat, 400, typeInvalidRequest, false, "response_format.type isn't text, json_object or json_schema."},
	{CodeKeyInvalid, 401, typeAuthentication, false, "The API key doesn't exist or has been revoked."},
	{CodeKeyExpired, 401, typeAuthentication, false, "The API key's TTL elapsed."},
	{CodeKeyMalformed, 401, typeAuthentication, false, "The Authorization header isn't Bearer sk-ownllm-…."},
	{CodeScopeRequired, 403, typePermission, false, "The key isn't scoped for the requested model."},
	{CodeTenantDisabled, 403, typePermission, false, "The tenant is suspended."},
	{CodeUserDeactivated, 403, typePermission, false, "The user who owns the key was deactivated."},
	{CodeBudgetExceeded, 429, typeRateLimit, false, "The key's monthly budget is spent."},
	{CodeConcurrencyLimit, 429, typeRateLimit, false, "Too many requests of this key are in flight."},
	{CodeTenantQPSLimit, 429, typeRateLimit, false, "The tenant's request rate is at its limit."},
	{CodeAgentOffline, 503, typeAgentUnavailable, false, "No GPU machine that serves the model is reachable."},
	{CodeTunnelDown, 503, typeAgentUnavailable, false, "The GPU machine is reachable, but its bus link is down."},
	{CodeModelLoading, 503, typeAgentUnavailable, false, "The model isn't ready yet."},
	{CodeInternalError, 500, typeInternal, false, "Something failed on our side."},

	{CodeInvalidJSON, 400, typeInvalidRequest, true, "The body isn't a JSON object."},
	{CodeInvalidValue, 400, typeInvalidRequest, true, "A field has a wrong type or is out of range; param names it."},
	{CodeModelNotFound, 404, typeInvalidRequest, true, "No agent of the tenant has the model."},
	{CodeNotFound, 404, typeInvalidRequest, true, "There is no such route or object."},
	{CodeMethodNotAllowed, 405, typeInvalidRequest, true, "The route exists, but not for this method."},
	{CodeRequestTooLarge, 413, typeInvalidRequest, true, "The body is over the limit."},
	{CodeTooManyFailures, 429, typeRateLimit, true, "Too many bad requests came from this address."},
	{CodeQueueFull, 503, typeAgentUnavailable, true, "The agent's queue for this model is at its bound."},
	{CodeAgentTimeout, 504, typeAgentUnavailable, true, "The request was accepted, but nothing came in time."},
	{CodeBackendError, 502, typeInternal, true, "The inference backend itself failed."},
}

var codeIndex = func() map[Code]*CodeInfo {
	index := make(map[Code]*CodeInfo, len(Codes))
	for i := range Codes {
		index[Codes[i].Code] = &Codes[i]
	}
	return index
}()

// Info returns what the contract says of the code. A code that isn't in the table
// is an internal error.
func (c Code) Info() CodeInfo {
	if info, ok := codeIndex[c]; ok {
		return *info
	}
	return *codeIndex[CodeInternalError]
}

// Known reports whether the code is in the table.
func (c Code) Known() bool {
	_, ok := codeIndex[c]
	return ok
}

// Error is the one error that crosses a boundary of the product: an HTTP reply,
// an event inside a stream, a frame on the bus. Its code decides status, type and
// the advice to retry; its message is for people.
type Error struct {
	Code    Code
	Message string
	// Param names the field of the request that is wrong, or is empty.
	Param string
	// RetryAfter is the advice to wait; 0 stands for the default of the code.
	RetryAfter time.Duration
}

// Errorf returns an *Error with a formatted message.
func Errorf(code Code, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// WithParam returns a copy of the error that names a field of the request.
func (e *Error) WithParam(param string) *Error {
	c := *e
	c.Param = param
	return &c
}

// WithRetryAfter returns a copy of the error that advises to wait for d.
func (e *Error) WithRetryAfter(d time.Duration) *Error {
	c := *e
	c.RetryAfter = d
	return &c
}

// Error implements error.
func (e *Error) Error() string { return string(e.Code) + ": " + e.Message }

// Is matches another *Error with the same code, so that errors.Is can ask for one.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Code == e.Code
}

// Status is the HTTP status of the error.
func (e *Error) Status() int { return e.Code.Info().Status }

// RetryAfterSeconds is the value of the Retry-After header, in whole seconds
// rounded up, and 0 for an error that carries none. Every 429 and every 503 has
// one; others only where it was asked for.
func (e *Error) RetryAfterSeconds() int {
	d := e.RetryAfter
	if d <= 0 {
		switch e.Status() {
		case 429:
			d = time.Second
		case 503:
			d = 2 * time.Second
		default:
			return 0
		}
	}
	return int((d-1)/time.Second) + 1
}

// Retryable reports whether trying again can help: the x-should-retry header that
// the OpenAI SDKs obey is "false" where the status alone would make them retry in
// vain.
func (e *Error) Retryable() bool { return e.Code != CodeBudgetExceeded }

// AppendJSON appends the OpenAI error envelope: {"error":{message,type,param,code}}.
// param is null when no field is to blame, code is never null.
func (e *Error) AppendJSON(dst []byte) []byte {
	info := e.Code.Info()
	dst = append(dst, `{"error":{"message":`...)
	dst = AppendString(dst, e.Message)
	dst = append(dst, `,"type":"`...)
	dst = append(dst, info.Type...)
	dst = append(dst, `","param":`...)
	if e.Param == "" {
		dst = append(dst, "null"...)
	} else {
		dst = AppendString(dst, e.Param)
	}
	dst = append(dst, `,"code":"`...)
	dst = append(dst, info.Code...)
	return append(dst, `"}}`...)
}

// errorJSON is the wire form of an Error between the parts, where the advice to
// wait travels with it.
type errorJSON struct {
	Code         Code   `json:"code"`
	Message      string `json:"message"`
	Param        string `json:"param,omitempty"`
	RetryAfterMS int64  `json:"retry_after_ms,omitempty"`
}

// maxRetryAfter bounds the advice that is taken from another part: more than a month
// is nothing that a code of the contract can mean.
const maxRetryAfter = 31 * 24 * time.Hour

// MarshalJSON implements json.Marshaler with the form that the parts of OwnLLM
// exchange; clients get AppendJSON.
func (e *Error) MarshalJSON() ([]byte, error) {
	return json.Marshal(errorJSON{e.Code, e.Message, e.Param, e.RetryAfter.Milliseconds()})
}

// UnmarshalJSON implements json.Unmarshaler. An unknown code, say of a newer
// version, becomes internal_error, so that nothing outside the table gets out.
func (e *Error) UnmarshalJSON(b []byte) error {
	var w errorJSON
	if err := json.Unmarshal(b, &w); err != nil {
		return err
	}
	if !w.Code.Known() {
		w.Message = "unknown code " + strconv.Quote(string(w.Code)) + ": " + w.Message
		w.Code = CodeInternalError
	}
	wait := min(max(w.RetryAfterMS, 0), maxRetryAfter.Milliseconds())
	*e = Error{w.Code, w.Message, w.Param, time.Duration(wait) * time.Millisecond}
	return nil
}

// AsError returns err as an *Error. Any other error becomes internal_error with a
// message that gives nothing of it away: the details belong in the log.
func AsError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return Errorf(CodeInternalError, "Something failed on our side. Try again; if it persists, report the x-request-id.").WithRetryAfter(time.Second)
}
