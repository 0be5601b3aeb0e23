package backend

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/tidwall/gjson"

	"github.com/ownllm/ownllm/schemas"
)

// vllmModel is a ModelCard. The card of a LoRA adapter names its parent, and has no
// window of its own.
type vllmModel struct {
	ID      string `json:"id"`
	Created int64  `json:"created"`
	Parent  string `json:"parent"`
	Window  int    `json:"max_model_len"`
}

// toolTrial is the outcome of trying a server with a tool.
type toolTrial struct {
	at          time.Time
	known       bool // otherwise it is tried again later
	tools, chat bool
}

const (
	// trialTimeout bounds the trial, trialPause is the wait before an inconclusive one
	// is repeated.
	trialTimeout = 5 * time.Second
	trialPause   = 30 * time.Second
)

func (b *Backend) vllmModels(ctx context.Context) ([]listed, error) {
	var list struct {
		Data []vllmModel `json:"data"`
	}
	if err := b.get(ctx, "/v1/models", &list); err != nil {
		return nil, err
	}
	// The list comes from memory, and comes from a server whose engine is dead too.
	a, err := b.do(ctx, http.MethodGet, "/health", nil)
	if err != nil {
		return nil, err
	}
	if a.status == http.StatusServiceUnavailable {
		return nil, &statusError{"/health", answer{status: http.StatusInternalServerError}}
	}
	windows := map[string]int{}
	for _, m := range list.Data {
		windows[m.ID] = m.Window
	}
	var found []listed
	for _, m := range list.Data {
		if _, ok := b.public(m.ID); !ok {
			continue
		}
		trial := b.tryTools(ctx, m.ID)
		continues := trial.chat && b.vllmContinues(ctx, m.ID)
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		l := listed{id: m.ID, created: m.Created, window: m.Window, state: schemas.ModelReady, continues: continues}
		l.capabilities = schemas.Capabilities{Completion: trial.chat, Tools: trial.tools}
		if l.window == 0 {
			l.window = windows[m.Parent]
		}
		found = append(found, l)
	}
	return found, nil
}

// tryTools finds out whether the server takes tools, which it doesn't tell: a
// request of one token with a tool is refused at once where it doesn't. The answer
// is the server's, the same for the model and its adapters, so one trial serves all,
// until the server goes away.
func (b *Backend) tryTools(ctx context.Context, id string) toolTrial {
	if b.statesTools(id) {
		return toolTrial{tools: true, chat: true}
	}
	b.mu.Lock()
	last := b.tools
	b.mu.Unlock()
	if last != nil && (last.known || time.Since(last.at) < trialPause) {
		return *last
	}
	trial := toolTrial{at: time.Now(), chat: true}
	limited, cancel := context.WithTimeout(ctx, trialTimeout)
	defer cancel()
	var reply rawJSON
	err := b.post(limited, "/v1/chat/completions", map[string]any{
		"model":       id,
		"messages":    []any{map[string]string{"role": "user", "content": "Hi"}},
		"max_tokens":  1,
		"tool_choice": "auto",
		"tools": []any{map[string]any{"type": "function", "function": map[string]any{
			"name": "now", "description": "Tells the time.", "parameters": map[string]any{"type": "object", "properties": map[string]any{}},
		}}},
	}, &reply)
	switch status := status(err); {
	case err == nil:
		trial.known, trial.tools = true, true
	case status >= 400 && status < 500 && status != http.StatusTooManyRequests:
		trial.known = true
		c := complaintOf(err)
		trial.chat = !c.says("does not support chat completions")
	}
	b.mu.Lock()
	b.tools = &trial
	b.mu.Unlock()
	return trial
}

// vllmCount counts the tokens of a prompt as vLLM, or the demo model, will see it.
func (b *Backend) vllmCount(ctx context.Context, id string, body []byte) (int, error) {
	request := map[string]any{"model": id}
	names := []string{"messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs", "chat_template"}
	if b.kind == Demo {
		names = append(names, "demo") // which may say how long the prompt is
	}
	for _, name := range names {
		if v := gjson.GetBytes(body, name); v.Exists() && v.Type != gjson.Null {
			request[name] = rawJSON(v.Raw)
		}
	}
	var counted struct {
		Count *int `json:"count"`
	}
	if err := b.post(ctx, "/tokenize", request, &counted); err != nil {
		return 0, err
	}
	if counted.Count == nil {
		return 0, errNotJSON
	}
	return *counted.Count, nil
}

// modelOf returns the model that a body names.
func modelOf(body []byte) string { return gjson.GetBytes(body, "model").String() }

// complaintOf returns what a server said in the answer that err stands for.
func complaintOf(err error) complaint {
	var e *statusError
	if !errors.As(err, &e) {
		return complaint{}
	}
	return readComplaint(e.status, e.body)
}
