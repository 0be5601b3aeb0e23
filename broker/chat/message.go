package chat

import (
	"strconv"
	"strings"

	"github.com/ownllm/ownllm/schemas"
)

// readMessages checks the messages and measures them.
func (r *Request) readMessages(value string) *fault {
	if value[0] != '[' {
		return wrongType("", "an array", value)
	}
	r.messages = value
	return elements(value, func(i int, message string) *fault {
		r.Messages++
		if f := r.readMessage(message); f != nil {
			return f.under("[" + strconv.Itoa(i) + "]")
		}
		return nil
	})
}

func (r *Request) readMessage(message string) *fault {
	if message[0] != '{' {
		return wrongType("", "an object", message)
	}
	var values [messageCount]string
	f := collect(message, messageFields, values[:], func(other string) { r.TextBytes += len(other) })
	if f != nil {
		return f
	}
	role, content, calls := values[messageRole], values[messageContent], values[messageToolCalls]
	if f := checkRole(role); f != nil {
		return f
	}
	r.begun = text(role) == "assistant"
	if calls != "" && calls != "null" {
		if calls[0] != '[' {
			return wrongType("tool_calls", "an array", calls)
		}
		r.TextBytes += len(calls)
	}
	switch {
	case content == "" || content == "null":
		if contentOptional(role) {
			return nil
		}
		if content == "" {
			return invalid("content", "is missing. Set it to a string or an array of parts.")
		}
		return wrongType("content", "a string or an array of parts", content)
	case content[0] == '"':
		r.TextBytes += textLen(content)
		return nil
	case content[0] == '[':
		return elements(content, func(i int, part string) *fault {
			if f := r.readPart(part); f != nil {
				return f.under("[" + strconv.Itoa(i) + "]")
			}
			return nil
		}).under("content")
	}
	return wrongType("content", "a string or an array of parts", content)
}

const roles = "system, developer, user, assistant, tool or function"

func checkRole(role string) *fault {
	switch {
	case role == "":
		return invalid("role", "is missing. Set it to "+roles+".")
	case role[0] != '"':
		return wrongType("role", "a string", role)
	}
	switch text(role) {
	case "system", "developer", "user", "assistant", "tool", "function":
		return nil
	}
	return invalid("role", "is "+clip(role)+". It must be "+roles+".")
}

// contentOptional says whose message may come without content: an assistant's that
// only calls tools, and the result of a function that returned nothing.
func contentOptional(role string) bool {
	role = text(role)
	return role == "assistant" || role == "function"
}

// readPart checks one part of a content. Kinds of parts that we don't know go on to
// the backend.
func (r *Request) readPart(part string) *fault {
	if part[0] != '{' {
		return wrongType("", "an object", part)
	}
	var values [partCount]string
	if f := collect(part, partFields, values[:], nil); f != nil {
		return f
	}
	kind, words, image := values[partType], values[partText], values[partImageURL]
	switch {
	case kind == "":
		return invalid("type", "is missing. Set it to \"text\", \"image_url\" or another kind of part.")
	case kind[0] != '"':
		return wrongType("type", "a string", kind)
	}
	name := text(kind)
	// An image is an image under any of the names that backends take one by, and some
	// look for the field rather than the type.
	if strings.HasPrefix(name, "image") || name == "input_image" || image != "" && image != "null" {
		r.Images++
	}
	switch {
	case words != "" && words[0] == '"':
		r.TextBytes += textLen(words)
	case name == "text" && words == "":
		return invalid("text", "is missing. Set it to a string.")
	case name == "text":
		return wrongType("text", "a string", words)
	}
	if name != "image_url" {
		return nil
	}
	switch {
	case image == "":
		return invalid("image_url", "is missing. Set it to {\"url\": …}.")
	case image[0] != '{' && image[0] != '"':
		return wrongType("image_url", "an object with a url", image)
	}
	return nil
}

// leastText returns how many bytes of text the prompt has at least, whatever the
// chat template does: templates trim contents, and some drop the thoughts of earlier
// replies, so that what the assistant said doesn't count.
func (r *Request) leastText() int {
	total := 0
	count := func(literal string) { total += len(strings.TrimSpace(text(literal))) }
	elements(r.messages, func(_ int, message string) *fault {
		var values [messageCount]string
		collect(message, messageFields, values[:], nil)
		content := values[messageContent]
		switch {
		case content == "" || text(values[messageRole]) == "assistant":
		case content[0] == '"':
			count(content)
		case content[0] == '[':
			elements(content, func(_ int, part string) *fault {
				var values [partCount]string
				collect(part, partFields, values[:], nil)
				if words := values[partText]; words != "" && text(values[partType]) == "text" {
					count(words)
				}
				return nil
			})
		}
		return nil
	})
	return total
}

// maxTokenBytes is more than one token of text can stand for, in bytes. The longest
// tokens of the vocabularies in use are runs of 128 spaces or dashes; four times that
// leaves room for vocabularies to come.
const maxTokenBytes = 512

// CheckModel checks that the model can do what the request asks for. The error is a
// *schemas.Error.
//
// Of the context length it refuses only what certainly can't fit, as exact counts
// belong to the worker: a token limit above the window, more messages than the window
// has tokens, or more than 512 bytes of text for each token of the window. A window
// of 0 is unknown, and not checked.
func (r *Request) CheckModel(m schemas.Model) error {
	if r.HasTools && !m.Capabilities.Tools {
		return schemas.Errorf(schemas.CodeModelDoesNotSupportTools,
			"The model %q can't call tools. Leave tools out, or use a model whose capabilities.tools is true in GET /v1/models.", m.ID).WithParam("tools")
	}
	if r.Images > 0 && !m.Capabilities.Vision {
		return schemas.Errorf(schemas.CodeModelDoesNotSupportVision,
			"The model %q can't see images. Send text only, or use a model whose capabilities.vision is true in GET /v1/models.", m.ID).WithParam("messages")
	}
	if r.format != nil {
		return r.format
	}
	return r.checkContext(m)
}

func (r *Request) checkContext(m schemas.Model) error {
	window := m.ContextWindow
	if window <= 0 {
		return nil
	}
	if r.MaxTokens > window {
		return schemas.Errorf(schemas.CodeContextLengthExceeded,
			"The request asks for up to %d tokens, but the context window of %q has %d for prompt and reply together. Lower max_tokens.", r.MaxTokens, m.ID, window).WithParam("max_tokens")
	}
	if r.Messages > window {
		return schemas.Errorf(schemas.CodeContextLengthExceeded,
			"The request has %d messages, but the context window of %q has %d tokens. Trim the messages.", r.Messages, m.ID, window).WithParam("messages")
	}
	if r.TextBytes/maxTokenBytes < window {
		return nil
	}
	if least := r.leastText(); least/maxTokenBytes >= window {
		return schemas.Errorf(schemas.CodeContextLengthExceeded,
			"The messages have %d bytes of text, which can't fit the %d tokens of the context window of %q. Trim the messages.", least, window, m.ID).WithParam("messages")
	}
	return nil
}
