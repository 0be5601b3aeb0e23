package demo

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"unicode"

	"github.com/tidwall/gjson"

	"github.com/ownllm/ownllm/schemas"
)

// The size of a prompt, in tokens beyond its words.
const (
	tokensPerMessage = 3
	tokensPerImage   = 85
)

const maxBody = 128 << 20 // bytes

// request is a chat completion request, as far as the demo model understands it.
type request struct {
	body                        string
	model                       string
	stream, usage               bool
	continuous                  bool // a usage with every chunk
	n                           int
	maxTokens                   int // 0: not given
	logprobs                    bool
	topLogprobs                 int
	seed                        int64
	messages, tools, toolChoice gjson.Result
	format, demo                gjson.Result

	prompt    []message // what the reply answers
	continues bool      // the reply goes on after prefix
	prefix    string
	tokens    int // of the prompt
	images    []string
}

type message struct {
	role, text string
}

func readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	const small = 1 << 20
	if r.ContentLength >= 0 && r.ContentLength <= small {
		body := make([]byte, r.ContentLength)
		_, err := io.ReadFull(r.Body, body)
		return body, err
	}
	return io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
}

// parseRequest reads the body of a chat completion request. Its errors are a 400.
func parseRequest(body []byte) (*request, error) {
	// Of the standard library, because it is safe on input of any depth.
	if !json.Valid(body) {
		return nil, errors.New("the body isn't valid JSON")
	}
	q := &request{body: string(body), n: 1}
	root := gjson.Parse(q.body)
	if !root.IsObject() {
		return nil, errors.New("the body isn't a JSON object")
	}
	var limit, newLimit gjson.Result
	continueFinal, addPrompt := false, true
	root.ForEach(func(key, value gjson.Result) bool {
		if value.Type == gjson.Null {
			return true
		}
		switch key.Str {
		case "model":
			q.model = value.Str
		case "messages":
			q.messages = value
		case "stream":
			q.stream = value.Bool()
		case "stream_options":
			q.usage = value.Get("include_usage").Bool()
			q.continuous = q.usage && value.Get("continuous_usage_stats").Bool()
		case "n":
			q.n = int(value.Int())
		case "max_tokens":
			limit = value
		case "max_completion_tokens":
			newLimit = value
		case "logprobs":
			q.logprobs = value.Bool()
		case "top_logprobs":
			q.topLogprobs = int(value.Int())
		case "seed":
			q.seed = value.Int()
		case "tools":
			q.tools = value
		case "tool_choice":
			q.toolChoice = value
		case "response_format":
			q.format = value
		case "continue_final_message":
			continueFinal = value.Bool()
		case "add_generation_prompt":
			addPrompt = value.Bool()
		case "demo":
			q.demo = value
		}
		return true
	})
	if newLimit.Exists() {
		limit = newLimit
	}
	if limit.Exists() {
		if q.maxTokens = int(limit.Int()); q.maxTokens < 1 {
			return nil, fmt.Errorf("max_tokens must be at least 1, not %s", limit.Raw)
		}
	}
	switch {
	case q.n < 1 || q.n > 128:
		return nil, fmt.Errorf("n must be from 1 to 128, not %d", q.n)
	case q.topLogprobs < 0 || q.topLogprobs > len(filler):
		return nil, fmt.Errorf("top_logprobs must be from 0 to %d, not %d", len(filler), q.topLogprobs)
	case !q.messages.IsArray():
		return nil, errors.New("messages must be an array")
	case continueFinal && addPrompt:
		return nil, errors.New("cannot set both `continue_final_message` and `add_generation_prompt` to true")
	}
	q.readMessages(q.messages)
	if len(q.prompt) == 0 {
		return nil, errors.New("messages must not be empty")
	}
	last := len(q.prompt) - 1
	if q.prompt[last].role == "assistant" {
		q.continues, q.prefix, q.prompt = true, q.prompt[last].text, q.prompt[:last]
	} else if continueFinal {
		return nil, errors.New("continue_final_message is set, but the last message isn't the assistant's")
	}
	return q, nil
}

// readMessages reads and counts the messages.
func (q *request) readMessages(messages gjson.Result) {
	messages.ForEach(func(_, value gjson.Result) bool {
		m := message{role: value.Get("role").Str}
		q.tokens += tokensPerMessage
		content := value.Get("content")
		if content.IsArray() {
			content.ForEach(func(_, part gjson.Result) bool {
				q.readPart(&m, part)
				return true
			})
		} else {
			m.text = content.Str
		}
		q.tokens += words(m.text)
		q.prompt = append(q.prompt, m)
		return true
	})
}

func (q *request) readPart(m *message, part gjson.Result) {
	switch part.Get("type").Str {
	case "text":
		if m.text != "" {
			m.text += "\n"
		}
		m.text += part.Get("text").Str
	case "image_url":
		url := part.Get("image_url")
		if url.IsObject() {
			url = url.Get("url")
		}
		q.images = append(q.images, describe(url.Str))
		q.tokens += tokensPerImage
	}
}

// describe says what can be known of an image without looking at it.
func describe(url string) string {
	data, inline := strings.CutPrefix(url, "data:")
	if !inline {
		return "an image at " + clip(url)
	}
	kind, encoded, _ := strings.Cut(data, ";base64,")
	return fmt.Sprintf("%s of %d bytes", clip(kind), len(strings.TrimRight(encoded, "="))*3/4)
}

// clip shortens a text of the client to what fits a sentence.
func clip(s string) string {
	const most = 200
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}

// words counts the words of a text.
func words(s string) int {
	n, inside := 0, false
	for _, r := range s {
		space := unicode.IsSpace(r)
		if !space && !inside {
			n++
		}
		inside = !space
	}
	return n
}

// stated gives the prompt the length that the faults state.
func (q *request) stated(f *Faults) {
	if f.PromptTokens > 0 {
		q.tokens = f.PromptTokens
	}
}

// check refuses what the model can't do, in the words of vLLM.
func (q *request) check(m *schemas.Model) error {
	c := m.Capabilities
	switch {
	case !c.Completion:
		return fmt.Errorf("the model `%s` does not support Chat Completions API", m.ID)
	case q.hasTools() && !c.Tools:
		return errors.New(`"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set`)
	case len(q.images) > 0 && !c.Vision:
		return fmt.Errorf("%s is not a multimodal model", m.ID)
	case m.ContextWindow <= 0:
		return nil
	case q.tokens >= m.ContextWindow:
		return fmt.Errorf("This model's maximum context length is %d tokens. However, your request has %d input tokens. Please reduce the length of the input messages.",
			m.ContextWindow, q.tokens)
	case q.maxTokens > m.ContextWindow-q.tokens:
		return fmt.Errorf("'max_tokens' or 'max_completion_tokens' is too large: %d. This model's maximum context length is %d tokens and your request has %d input tokens (%d > %d - %d).",
			q.maxTokens, m.ContextWindow, q.tokens, q.maxTokens, m.ContextWindow, q.tokens)
	}
	return nil
}

func (q *request) hasTools() bool { return q.tools.Get("#").Int() > 0 }

// lastUser is what the user said last.
func (q *request) lastUser() string {
	for i := len(q.prompt) - 1; i >= 0; i-- {
		if q.prompt[i].role == "user" {
			return q.prompt[i].text
		}
	}
	return ""
}

func (s *Server) serveTokenize(w http.ResponseWriter, r *http.Request) {
	body, err := readBody(w, r)
	if err != nil {
		writeError(w, 400, err.Error())
		return
	}
	if !json.Valid(body) {
		writeError(w, 400, "the body isn't valid JSON")
		return
	}
	root := gjson.ParseBytes(body)
	id := root.Get("model").Str
	if id == "" {
		id = s.options.Models[0].ID
	}
	m, ok := s.snapshot(id)
	if !ok {
		writeError(w, 404, noModel(id))
		return
	}
	var q request
	if prompt := root.Get("prompt"); prompt.Type == gjson.String {
		q.tokens = words(prompt.Str)
	} else if messages := root.Get("messages"); messages.IsArray() {
		q.readMessages(messages)
	} else {
		writeError(w, 400, "either prompt or messages is needed")
		return
	}
	faults := s.peek(id)
	if own := root.Get("demo"); own.Exists() {
		if err := faults.overlay([]byte(own.Raw)); err != nil {
			writeError(w, 400, err.Error())
			return
		}
	}
	// What the tokens are doesn't matter; that there are as many as counted does.
	tokens := make([]int, q.tokens)
	for i := range tokens {
		tokens[i] = i
	}
	q.stated(&faults)
	writeJSON(w, 200, struct {
		Count       int   `json:"count"`
		MaxModelLen int   `json:"max_model_len"`
		Tokens      []int `json:"tokens"`
		TokenStrs   []int `json:"token_strs"`
	}{q.tokens, m.ContextWindow, tokens, nil})
}

func noModel(id string) string { return "The model `" + clip(id) + "` does not exist." }
