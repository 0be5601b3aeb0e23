// Package chat parses and validates the body of a chat completion request.
//
// It is pure: a string goes in, and what the edge and the broker need to know comes
// out, or a *schemas.Error whose message says what is wrong, with what, and what to
// do. The body itself isn't changed: it goes on to the backend byte for byte, with
// every field that nobody here understands.
//
// # The promise
//
// What Parse reported is what every backend will read. Access is decided on the
// model that is found here, so a body that a backend could read differently is a way
// past a key's scope. Safety comes from refusing all such bodies: JSON that isn't
// strictly valid UTF-8 JSON or has lone surrogates, a field that comes twice, a key
// that differs from a field only in case. A fuzz test holds accepted bodies against
// encoding/json, which takes the last of two keys and ignores case.
//
// # Order
//
// Parse checks, in this order: that the body is JSON and an object (invalid_json),
// that its keys are unambiguous (invalid_value), that it has a model and messages
// (model_required, messages_required), and types and ranges (invalid_value). The
// caller then decides whether the key may use the model and whether the model
// exists. CheckModel has the rest: tools, vision, response_format, context length.
package chat

import (
	"math"
	"strconv"
	"strings"

	"github.com/ownllm/ownllm/schemas"
)

// Limits on what a client may ask for.
const (
	// MaxModelBytes is the longest model id.
	MaxModelBytes = 256
	// MaxN is the largest number of choices.
	MaxN = 128
	// MaxTokensLimit is the largest token limit. Backends in C++ keep it in 32 bits,
	// where more turns negative, and negative stands for no limit at all.
	MaxTokensLimit = math.MaxInt32
)

// Request is what the parts of OwnLLM need to know of a chat completion request.
// Its strings may share memory with the body, except Model.
type Request struct {
	// Body is the string that was parsed.
	Body  string
	Model string
	// Stream and IncludeUsage are stream and stream_options.include_usage.
	Stream       bool
	IncludeUsage bool
	// MaxTokens is max_completion_tokens or max_tokens; 0 stands for not given.
	MaxTokens int
	// N is the number of choices, at least 1.
	N int
	// HasTools says that tools or functions are offered.
	HasTools bool
	// ResponseFormat is response_format.type, or empty.
	ResponseFormat string
	Logprobs       bool
	// Messages counts the messages.
	Messages int
	// TextBytes bounds the text of the prompt from above, in bytes: the contents as
	// UTF-8, and the JSON of what else a message has (names, tool calls), but no media.
	// A token is at least one byte, so this also bounds the tokens of the messages;
	// what the chat template adds to each message, and the tools, come on top.
	TextBytes int
	// ToolBytes is the size of the JSON of the tools and of the response format, which
	// templates copy into the prompt, and Images counts the images.
	ToolBytes, Images int

	messages string         // the array, as JSON
	begun    bool           // the last message is the assistant's: the reply has begun there
	bound    bool           // the reply is kept to a form by other means than response_format
	format   *schemas.Error // what is wrong with response_format; CheckModel tells it
}

// Parse reads and validates the body of a chat completion request. The error is a
// *schemas.Error. The body has to be an owned string: the request keeps it.
func Parse(body string) (*Request, error) {
	if err := validate(body); err != nil {
		return nil, err
	}
	var values [fieldCount]string
	object := body[skipSpace(body, 0):]
	if f := collect(object, requestFields, values[:], nil); f != nil {
		return nil, f.err()
	}
	for i, value := range values {
		if value == "null" {
			values[i] = "" // SDKs send null for what isn't set
		}
	}
	r := &Request{Body: body, N: 1}
	if err := r.required(values[fieldModel], values[fieldMessages]); err != nil {
		return nil, err
	}
	if f := r.fields(&values); f != nil {
		return nil, f.err()
	}
	return r, nil
}

// required checks model and messages.
func (r *Request) required(model, messages string) error {
	if model == "" || model == `""` {
		return schemas.Errorf(schemas.CodeModelRequired, "The request has no model. Set model to one of the ids that GET /v1/models lists.").WithParam("model")
	}
	if messages == "" || messages[0] == '[' && messages[skipSpace(messages, 1)] == ']' {
		return schemas.Errorf(schemas.CodeMessagesRequired, "The request has no messages. Set messages to a list of at least one message.").WithParam("messages")
	}
	if model[0] != '"' {
		return wrongType("model", "a string", model).err()
	}
	// A copy, so that whoever keeps the id doesn't keep 32 MB of images with it.
	r.Model = strings.Clone(text(model))
	if len(r.Model) > MaxModelBytes {
		return invalid("model", "is longer than "+strconv.Itoa(MaxModelBytes)+" bytes. Set it to one of the ids that GET /v1/models lists.").err()
	}
	for _, c := range r.Model {
		if c < ' ' || c >= 0x7f && c < 0xa0 {
			return invalid("model", "has a control character. Set it to one of the ids that GET /v1/models lists.").err()
		}
	}
	if f := r.readMessages(messages); f != nil {
		return f.under("messages").err()
	}
	return nil
}

// fields checks everything but model and messages.
func (r *Request) fields(values *[fieldCount]string) (f *fault) {
	if r.Stream, f = boolean("stream", values[fieldStream]); f != nil {
		return f
	}
	if f = r.readStreamOptions(values[fieldStreamOptions]); f != nil {
		return f
	}
	if f = r.readLimits(values); f != nil {
		return f
	}
	for _, c := range ranges {
		if _, _, f = number(requestFields[c.field], values[c.field], c.integer, c.low, c.high); f != nil {
			return f
		}
	}
	for _, value := range values[fieldConstraints:] {
		r.bound = r.bound || value != ""
	}
	if r.Logprobs, f = boolean("logprobs", values[fieldLogprobs]); f != nil {
		return f
	}
	if f = checkStop(values[fieldStop]); f != nil {
		return f
	}
	if f = r.readTools(values); f != nil {
		return f
	}
	if user := values[fieldUser]; user != "" && user[0] != '"' {
		return wrongType("user", "a string", user)
	}
	return r.readFormat(values[fieldResponseFormat])
}

// ranges are the numbers of which only the range matters here.
var ranges = []struct {
	field     int
	integer   bool
	low, high float64
}{
	{fieldTemperature, false, 0, 2},
	{fieldTopP, false, 0, 1},
	{fieldPresencePenalty, false, -2, 2},
	{fieldFrequencyPenalty, false, -2, 2},
	{fieldTopLogprobs, true, 0, 20},
	{fieldSeed, true, -1 << 63, 1 << 63},
}

// number reads a number within [low, high]; given says whether there is one. 10.0
// and 1e1 are integers too: JSON knows one kind of number, and some languages write
// whole numbers that way.
func number(param, value string, integer bool, low, high float64) (n float64, given bool, f *fault) {
	if value == "" {
		return 0, false, nil
	}
	want := "a number"
	if integer {
		want = "an integer"
	}
	if c := value[0]; c != '-' && (c < '0' || c > '9') {
		return 0, false, wrongType(param, want, value)
	}
	// Out of range for a float64 comes back as an infinity, which is out of ours.
	n, _ = strconv.ParseFloat(value, 64)
	if n < low || n > high || integer && n != math.Trunc(n) {
		return 0, false, invalid(param, "must be "+want+" from "+strconv.FormatFloat(low, 'f', -1, 64)+
			" to "+strconv.FormatFloat(high, 'f', -1, 64)+", not "+clip(value)+".")
	}
	return n, true, nil
}

func boolean(param, value string) (bool, *fault) {
	switch value {
	case "", "false":
		return false, nil
	case "true":
		return true, nil
	}
	return false, wrongType(param, "a boolean", value)
}

func (r *Request) readStreamOptions(value string) *fault {
	if value == "" {
		return nil
	}
	if value[0] != '{' {
		return wrongType("stream_options", "an object", value)
	}
	if !r.Stream {
		return invalid("stream_options", "is only allowed when stream is true. Set stream, or leave stream_options out.")
	}
	var options [streamCount]string
	if f := collect(value, streamFields, options[:], nil); f != nil {
		return f.under("stream_options")
	}
	include := options[streamIncludeUsage]
	if include == "null" {
		include = ""
	}
	var f *fault
	r.IncludeUsage, f = boolean("include_usage", include)
	return f.under("stream_options")
}

// readLimits reads n and the token limit. Of max_tokens and max_completion_tokens
// some backends know only one, so if both are given they have to agree.
func (r *Request) readLimits(values *[fieldCount]string) *fault {
	n, given, f := number("n", values[fieldN], true, 1, MaxN)
	if f != nil {
		return f
	}
	if given {
		r.N = int(n)
	}
	old, givenOld, f := number("max_tokens", values[fieldMaxTokens], true, 1, MaxTokensLimit)
	if f != nil {
		return f
	}
	limit, given, f := number("max_completion_tokens", values[fieldMaxCompletionTokens], true, 1, MaxTokensLimit)
	if f != nil {
		return f
	}
	switch {
	case given && givenOld && limit != old:
		return invalid("max_completion_tokens", "and max_tokens are both given, and differ. Send one of them.")
	case given:
		r.MaxTokens = int(limit)
	case givenOld:
		r.MaxTokens = int(old)
	}
	return nil
}

func checkStop(value string) *fault {
	switch {
	case value == "" || value[0] == '"':
		return nil
	case value[0] != '[':
		return wrongType("stop", "a string or an array of strings", value)
	}
	return elements(value, func(i int, stop string) *fault {
		if stop[0] != '"' {
			return wrongType("["+strconv.Itoa(i)+"]", "a string", stop)
		}
		if i == 4 {
			return invalid("", "may have at most 4 strings.")
		}
		return nil
	}).under("stop")
}

func (r *Request) readTools(values *[fieldCount]string) *fault {
	for _, field := range [...]int{fieldTools, fieldFunctions} {
		name, value := requestFields[field], values[field]
		if value == "" {
			continue
		}
		if value[0] != '[' {
			return wrongType(name, "an array", value)
		}
		r.ToolBytes += len(value)
		if f := elements(value, func(i int, tool string) *fault {
			r.HasTools = true
			return checkTool(tool, field == fieldTools).under("[" + strconv.Itoa(i) + "]")
		}); f != nil {
			return f.under(name)
		}
	}
	if choice := values[fieldToolChoice]; choice != "" && choice[0] != '"' && choice[0] != '{' {
		return wrongType("tool_choice", "a string or an object", choice)
	}
	_, f := boolean("parallel_tool_calls", values[fieldParallelToolCalls])
	return f
}

func checkTool(tool string, typed bool) *fault {
	if tool[0] != '{' {
		return wrongType("", "an object", tool)
	}
	if !typed {
		return nil
	}
	var values [1]string
	if f := collect(tool, toolFields, values[:], nil); f != nil {
		return f
	}
	switch kind := values[0]; {
	case kind == "":
		return invalid("type", "is missing. Set it to \"function\".")
	case kind[0] != '"':
		return wrongType("type", "a string", kind)
	}
	return nil
}

// readFormat reads response_format. Only its own type is an invalid_value here; what
// it asks for is judged once the model is known.
func (r *Request) readFormat(value string) *fault {
	if value == "" {
		return nil
	}
	if value[0] != '{' {
		return wrongType("response_format", "an object", value)
	}
	r.ToolBytes += len(value)
	var format [formatCount]string
	if f := collect(value, formatFields, format[:], nil); f != nil {
		return f.under("response_format")
	}
	if kind := format[formatType]; kind != "" && kind[0] == '"' {
		r.ResponseFormat = text(kind)
	}
	switch schema := format[formatSchema]; r.ResponseFormat {
	case "text", "json_object":
	case "json_schema":
		if schema == "" || schema[0] != '{' {
			r.format = schemas.Errorf(schemas.CodeInvalidResponseFormat,
				"response_format.type is json_schema, but response_format.json_schema isn't an object. Set it to {\"name\": …, \"schema\": …}.").WithParam("response_format.json_schema")
		}
	default:
		given := "missing"
		if kind := format[formatType]; kind != "" {
			given = clip(kind)
		}
		r.format = schemas.Errorf(schemas.CodeInvalidResponseFormat,
			"response_format.type is %s. It must be \"text\", \"json_object\" or \"json_schema\".", given).WithParam("response_format.type")
	}
	return nil
}

// Continuable reports whether another agent could go on with the reply from its text, if
// the one that gives it goes away. What has more to it than text, or a form that began
// before, can't be.
func (r *Request) Continuable() bool {
	return r.Stream && r.N == 1 && !r.Logprobs && !r.bound && !r.begun && (r.ResponseFormat == "" || r.ResponseFormat == "text")
}
