package chat

import (
	"strings"

	"github.com/ownllm/ownllm/schemas"
)

// fault is what is wrong with a request. Its param is relative to the value that
// was looked at, and grows on the way up.
type fault struct {
	code    schemas.Code
	param   string
	problem string // the rest of a sentence that begins with the param
}

func invalid(param, problem string) *fault {
	return &fault{code: schemas.CodeInvalidValue, param: param, problem: problem}
}

// wrongType says that the value of param should have been something else.
func wrongType(param, want, value string) *fault {
	return invalid(param, "must be "+want+", not "+kindOf(value)+".")
}

// under puts the fault of a nested value into its place.
func (f *fault) under(param string) *fault {
	if f == nil {
		return nil
	}
	c := *f
	switch {
	case c.param == "":
		c.param = param
	case c.param[0] == '[':
		c.param = param + c.param
	default:
		c.param = param + "." + c.param
	}
	return &c
}

func (f *fault) err() *schemas.Error {
	return &schemas.Error{Code: f.code, Message: f.param + " " + f.problem, Param: f.param}
}

// kindOf names the kind of a JSON value for people.
func kindOf(value string) string {
	switch value[0] {
	case '"':
		return "a string"
	case '{':
		return "an object"
	case '[':
		return "an array"
	case 't', 'f':
		return "a boolean"
	case 'n':
		return "null"
	}
	return "a number"
}

// clip makes a value of the client fit for a message.
func clip(s string) string {
	const most = 64
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}

// The fields that we understand, of all objects that we look into. Each kind of
// object has its own list; a key that isn't in it is the backend's business.
const (
	fieldModel = iota
	fieldMessages
	fieldStream
	fieldStreamOptions
	fieldN
	fieldMaxTokens
	fieldMaxCompletionTokens
	fieldTemperature
	fieldTopP
	fieldPresencePenalty
	fieldFrequencyPenalty
	fieldLogprobs
	fieldTopLogprobs
	fieldStop
	fieldSeed
	fieldTools
	fieldFunctions
	fieldToolChoice
	fieldParallelToolCalls
	fieldResponseFormat
	fieldUser
	fieldConstraints
	fieldCount = fieldConstraints + 8
)

const (
	messageRole = iota
	messageContent
	messageToolCalls
	messageCount
)

const (
	partType = iota
	partText
	partImageURL
	partCount
)

const (
	streamIncludeUsage = iota
	streamCount
)

const (
	formatType = iota
	formatSchema
	formatCount
)

var (
	requestFields = []string{
		fieldModel:               "model",
		fieldMessages:            "messages",
		fieldStream:              "stream",
		fieldStreamOptions:       "stream_options",
		fieldN:                   "n",
		fieldMaxTokens:           "max_tokens",
		fieldMaxCompletionTokens: "max_completion_tokens",
		fieldTemperature:         "temperature",
		fieldTopP:                "top_p",
		fieldPresencePenalty:     "presence_penalty",
		fieldFrequencyPenalty:    "frequency_penalty",
		fieldLogprobs:            "logprobs",
		fieldTopLogprobs:         "top_logprobs",
		fieldStop:                "stop",
		fieldSeed:                "seed",
		fieldTools:               "tools",
		fieldFunctions:           "functions",
		fieldToolChoice:          "tool_choice",
		fieldParallelToolCalls:   "parallel_tool_calls",
		fieldResponseFormat:      "response_format",
		fieldUser:                "user",
		// How backends are told to keep a reply to a form, beside response_format.
		fieldConstraints:     "grammar",
		fieldConstraints + 1: "json_schema",
		fieldConstraints + 2: "format",
		fieldConstraints + 3: "guided_json",
		fieldConstraints + 4: "guided_regex",
		fieldConstraints + 5: "guided_choice",
		fieldConstraints + 6: "guided_grammar",
		fieldConstraints + 7: "structured_outputs",
	}
	messageFields = []string{messageRole: "role", messageContent: "content", messageToolCalls: "tool_calls"}
	partFields    = []string{partType: "type", partText: "text", partImageURL: "image_url"}
	streamFields  = []string{streamIncludeUsage: "include_usage"}
	formatFields  = []string{formatType: "type", formatSchema: "json_schema"}
	toolFields    = []string{"type"}
)

// collect puts the values of the fields that names lists into values, which is as
// long; "" stands for a field that is absent. other, if not nil, hears of the rest.
//
// It refuses what two readers could read in two ways: a field that comes twice (we
// would check one and the backend might obey the other, past the key's scope), and
// a key that differs from a field only in case, which backends written in Go take
// for the field. Keys are compared after their escapes are decoded.
func collect(object string, names, values []string, other func(value string)) *fault {
	return members(object, func(literal, value string) *fault {
		key := text(literal)
		for i, name := range names {
			if name != key {
				continue
			}
			if values[i] != "" {
				return invalid(name, "is given twice. Send it once.")
			}
			values[i] = value
			return nil
		}
		if name := foldedMatch(key, names); name != "" {
			return invalid(name, "is written "+string(schemas.AppendString(nil, key))+": did you mean "+string(schemas.AppendString(nil, name))+"? Keys are case-sensitive.")
		}
		if other != nil {
			other(value)
		}
		return nil
	})
}

// foldedMatch returns the name that key equals but for case, as encoding/json sees
// it: 'ſ' and the Kelvin sign are letters there too.
func foldedMatch(key string, names []string) string {
	if key == "" {
		return ""
	}
	for _, name := range names {
		if (key[0]|0x20 == name[0] || key[0] >= 0x80) && strings.EqualFold(key, name) {
			return name
		}
	}
	return ""
}
