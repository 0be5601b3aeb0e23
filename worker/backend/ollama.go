package backend

import (
	"context"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tidwall/gjson"

	"github.com/ownllm/ownllm/schemas"
)

type ollamaTag struct {
	Name         string        `json:"name"`
	Model        string        `json:"model"`
	ModifiedAt   string        `json:"modified_at"`
	Size         int64         `json:"size"`
	Digest       string        `json:"digest"`
	RemoteHost   string        `json:"remote_host"`
	Capabilities []string      `json:"capabilities"`
	Details      ollamaDetails `json:"details"`
}

type ollamaDetails struct {
	Family        string   `json:"family"`
	Families      []string `json:"families"`
	ContextLength int      `json:"context_length"`
}

// ollamaShow is what /api/show adds to the list, which doesn't change while the
// digest stays.
type ollamaShow struct {
	capabilities []string
	numCtx       int // from the Modelfile, 0 if it isn't set
	trained      int // the window that the model was trained for
}

func (b *Backend) ollamaModels(ctx context.Context) ([]listed, error) {
	var tags struct {
		Models []ollamaTag `json:"models"`
	}
	if err := b.get(ctx, "/api/tags", &tags); err != nil {
		return nil, err
	}
	var ps struct {
		Models []struct {
			Name          string `json:"name"`
			Model         string `json:"model"`
			ContextLength int    `json:"context_length"`
		} `json:"models"`
	}
	if err := b.get(ctx, "/api/ps", &ps); err != nil {
		return nil, err
	}
	running := map[string]int{} // window by name, 0 on old builds that don't tell
	for _, m := range ps.Models {
		running[m.Name], running[m.Model] = m.ContextLength, m.ContextLength
	}
	shows := make(map[string]ollamaShow, len(tags.Models))
	found := make([]listed, 0, len(tags.Models))
	for _, tag := range tags.Models {
		if _, ok := b.public(tag.Name); !ok {
			continue
		}
		show := b.ollamaShow(ctx, tag)
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		shows[tag.Name+"@"+tag.Digest] = show
		l := listed{
			id:           tag.Name,
			capabilities: ollamaCapabilities(show.capabilities),
			window:       show.numCtx,
			size:         tag.Size,
			state:        schemas.ModelCold,
		}
		if t, err := time.Parse(time.RFC3339, tag.ModifiedAt); err == nil {
			l.created = t.Unix()
		}
		if window, ok := running[tag.Name]; ok {
			l.state = schemas.ModelReady
			if window > 0 {
				l.window = window
			}
			if l.capabilities.Completion && tag.RemoteHost == "" {
				b.ollamaContinues(ctx, tag.Name, tag.Name+"@"+tag.Digest, window)
			}
		}
		l.continues = b.proved(tag.Name + "@" + tag.Digest)
		if tag.RemoteHost != "" {
			l.state = schemas.ModelReady // it runs elsewhere, there is nothing to load
			l.window = show.trained
		}
		if show.trained > 0 && l.window > show.trained {
			l.window = show.trained
		}
		found = append(found, l)
	}
	b.mu.Lock()
	b.shows = shows
	b.mu.Unlock()
	return found, nil
}

// ollamaShow returns what is remembered of a model, or asks. A model that can't be
// asked about is taken for what the list says, and asked about again next time.
func (b *Backend) ollamaShow(ctx context.Context, tag ollamaTag) ollamaShow {
	b.mu.Lock()
	show, ok := b.shows[tag.Name+"@"+tag.Digest]
	b.mu.Unlock()
	if ok && show.capabilities != nil {
		return show
	}
	var answer struct {
		Capabilities []string       `json:"capabilities"`
		ModelInfo    map[string]any `json:"model_info"`
		Parameters   string         `json:"parameters"`
		Details      ollamaDetails  `json:"details"`
		Template     string         `json:"template"`
	}
	if err := b.post(ctx, "/api/show", map[string]string{"model": tag.Name}, &answer); err != nil {
		// Without capabilities it doesn't count as remembered.
		return ollamaShow{trained: tag.Details.ContextLength}
	}
	show = ollamaShow{capabilities: answer.Capabilities, trained: tag.Details.ContextLength}
	if len(show.capabilities) == 0 {
		show.capabilities = tag.Capabilities
	}
	if len(show.capabilities) == 0 {
		show.capabilities = guessCapabilities(answer.Details, answer.Template)
	}
	if arch, ok := answer.ModelInfo["general.architecture"].(string); ok {
		if n, ok := answer.ModelInfo[arch+".context_length"].(float64); ok {
			show.trained = int(n)
		}
	}
	for line := range strings.Lines(answer.Parameters) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == "num_ctx" {
			show.numCtx, _ = strconv.Atoi(f[1])
		}
	}
	return show
}

// guessCapabilities serves builds from before Ollama told capabilities.
func guessCapabilities(d ollamaDetails, template string) []string {
	families := append(slices.Clone(d.Families), d.Family)
	for _, f := range families {
		if strings.Contains(f, "bert") {
			return []string{"embedding"}
		}
	}
	list := []string{"completion"}
	if strings.Contains(template, ".Tools") {
		list = append(list, "tools")
	}
	if slices.Contains(families, "clip") || slices.Contains(families, "mllama") {
		list = append(list, "vision")
	}
	return list
}

func ollamaCapabilities(list []string) schemas.Capabilities {
	return schemas.Capabilities{
		Completion: len(list) == 0 || slices.Contains(list, "completion"),
		Vision:     slices.Contains(list, "vision"),
		Embedding:  slices.Contains(list, "embedding"),
		Tools:      slices.Contains(list, "tools"),
		Thinking:   slices.Contains(list, "thinking"),
	}
}

// ollamaLoad has a model loaded by a request without a prompt, which Ollama answers
// once the model is in memory. It stops loading when the request is cut off.
func (b *Backend) ollamaLoad(ctx context.Context, id string) error {
	var answer struct {
		Error string `json:"error"`
	}
	err := b.post(ctx, "/api/generate", map[string]any{"model": id, "stream": false}, &answer)
	if err == nil && answer.Error != "" {
		return &statusError{"/api/generate", answerOf(answer.Error)}
	}
	return err
}

func answerOf(message string) answer {
	return answer{status: 500, body: schemas.AppendString(nil, message)}
}

// ollamaMessage is a message of Ollama's own protocol.
type ollamaMessage struct {
	Role      string           `json:"role"`
	Content   string           `json:"content"`
	Thinking  string           `json:"thinking,omitempty"`
	ToolCalls []ollamaToolCall `json:"tool_calls,omitempty"`
	ToolName  string           `json:"tool_name,omitempty"`
}

type ollamaToolCall struct {
	Function struct {
		Name      string `json:"name"`
		Arguments any    `json:"arguments"`
	} `json:"function"`
}

// ollamaFits asks Ollama whether a request fits the window, by its own protocol,
// where it can be told not to truncate. It costs the reading of the prompt, which
// the real request then finds in the cache.
func (b *Backend) ollamaFits(ctx context.Context, id string, body []byte) (complaint, error) {
	request := map[string]any{
		"model":    id,
		"messages": ollamaMessages(gjson.GetBytes(body, "messages")),
		"stream":   false,
		"truncate": false,
		// 0 stands for no limit.
		"options": map[string]any{"num_predict": 1},
	}
	if tools := gjson.GetBytes(body, "tools"); tools.IsArray() {
		request["tools"] = rawJSON(tools.Raw)
	}
	if effort := gjson.GetBytes(body, "reasoning_effort").String(); effort == "none" {
		request["think"] = false
	} else if effort != "" {
		request["think"] = effort
	}
	var ignored rawJSON
	err := b.post(ctx, "/api/chat", request, &ignored)
	return complaintOf(err), err
}

// ollamaMessages turns OpenAI's messages into Ollama's, as its own OpenAI endpoint
// does: a message of several parts becomes several messages.
func ollamaMessages(messages gjson.Result) []ollamaMessage {
	var out []ollamaMessage
	names := map[string]string{} // of functions, by id of the call
	for _, m := range messages.Array() {
		message := ollamaMessage{Role: m.Get("role").String(), Thinking: m.Get("reasoning").String(), ToolName: m.Get("name").String()}
		if message.Role != "tool" {
			message.ToolName = ""
		} else if message.ToolName == "" {
			message.ToolName = names[m.Get("tool_call_id").String()]
		}
		for _, call := range m.Get("tool_calls").Array() {
			var c ollamaToolCall
			c.Function.Name = call.Get("function.name").String()
			names[call.Get("id").String()] = c.Function.Name
			if arguments := call.Get("function.arguments").String(); gjson.Valid(arguments) {
				c.Function.Arguments = rawJSON(arguments)
			}
			message.ToolCalls = append(message.ToolCalls, c)
		}
		content := m.Get("content")
		if !content.IsArray() {
			message.Content = content.String()
			out = append(out, message)
			continue
		}
		for i, part := range content.Array() {
			piece := ollamaMessage{Role: message.Role, Content: part.Get("text").String()}
			if i == len(content.Array())-1 && len(message.ToolCalls) > 0 {
				piece.ToolCalls, piece.ToolName, piece.Thinking = message.ToolCalls, message.ToolName, message.Thinking
			}
			out = append(out, piece)
		}
	}
	return out
}
