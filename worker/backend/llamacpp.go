package backend

import (
	"context"
	"encoding/json"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/ownllm/ownllm/schemas"
)

// rawJSON is JSON that is passed on as it is.
type rawJSON = json.RawMessage

// routerSlots is how many requests a router is given at once: each of its models has
// slots of its own, and queues what is too much.
const routerSlots = 4

// llamaProps is what /props tells of the model in memory.
type llamaProps struct {
	Role     string `json:"role"` // "router" for a server that runs others
	Defaults struct {
		Window int `json:"n_ctx"` // of one slot
	} `json:"default_generation_settings"`
	TotalSlots int    `json:"total_slots"`
	ModelPath  string `json:"model_path"`
	ModelAlias string `json:"model_alias"`
	BuildInfo  string `json:"build_info"`
	Modalities struct {
		Vision bool `json:"vision"`
	} `json:"modalities"`
	Template string          `json:"chat_template"`
	Caps     map[string]bool `json:"chat_template_caps"`
	Sleeping bool            `json:"is_sleeping"`
}

// llamaModel is an entry of the list of models, of one server or of a router.
type llamaModel struct {
	ID      string `json:"id"`
	Created int64  `json:"created"`
	Meta    *struct {
		Size   int64 `json:"size"`
		Window int   `json:"n_ctx"`
	} `json:"meta"`
	Status *struct {
		Value    string   `json:"value"`
		Args     []string `json:"args"`
		Failed   bool     `json:"failed"`
		ExitCode int      `json:"exit_code"`
	} `json:"status"`
	Architecture struct {
		Input []string `json:"input_modalities"`
	} `json:"architecture"`
	Template string `json:"chat_template"`
}

type llamaList struct {
	Data []llamaModel `json:"data"`
}

func (p *llamaProps) capabilities() schemas.Capabilities {
	c := schemas.Capabilities{Completion: true, Vision: p.Modalities.Vision}
	if p.Caps != nil {
		c.Tools = p.Caps["supports_tools"] || p.Caps["supports_tool_calls"]
	} else {
		c.Tools = templateTools(p.Template)
	}
	c.Thinking = p.Caps["supports_preserve_reasoning"] || templateThinks(p.Template)
	return c
}

// templateTools and templateThinks read what old builds don't tell from the chat
// template.
func templateTools(template string) bool { return strings.Contains(template, "tools") }

func templateThinks(template string) bool {
	return strings.Contains(template, "<think>") || strings.Contains(template, "enable_thinking") ||
		strings.Contains(template, "reasoning_content") || strings.Contains(template, "<|channel|>")
}

func (b *Backend) llamaModels(ctx context.Context) ([]listed, error) {
	var props llamaProps
	err := b.get(ctx, "/props", &props)
	loading := status(err) == http.StatusServiceUnavailable
	if err != nil && !loading {
		return nil, err
	}
	if props.Role == "router" {
		return b.routerModels(ctx)
	}
	var list llamaList
	if err := b.get(ctx, "/v1/models", &list); err != nil {
		if status(err) == http.StatusServiceUnavailable {
			return b.stillLoading(), nil
		}
		return nil, err
	}
	b.setSlots(props.TotalSlots)
	var found []listed
	for _, m := range list.Data {
		l := listed{id: m.ID, created: m.Created, capabilities: props.capabilities(), window: props.Defaults.Window, state: schemas.ModelReady}
		if m.Meta != nil {
			l.size = m.Meta.Size
		}
		switch {
		case loading:
			l.state, l.detail = schemas.ModelLoading, "llama.cpp is loading the model."
			l.capabilities = b.remembered(m.ID)
		case props.Sleeping:
			l.state = schemas.ModelCold
		default:
			b.llamaContinues(ctx, m.ID, "")
		}
		l.continues = b.way(m.ID).can
		found = append(found, l)
	}
	return found, nil
}

// remembered returns the capabilities that a model last had; one that was never seen
// completes.
func (b *Backend) remembered(id string) schemas.Capabilities {
	public, _ := b.public(id)
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, m := range b.models {
		if m.ID == public {
			return m.Capabilities
		}
	}
	return schemas.Capabilities{Completion: true}
}

// stillLoading lists what was known before a server that names nothing while it
// loads began to.
func (b *Backend) stillLoading() []listed {
	b.mu.Lock()
	defer b.mu.Unlock()
	var found []listed
	for id := range b.known {
		public, _ := b.public(id)
		for _, m := range b.models {
			if m.ID == public {
				found = append(found, listed{
					id: id, capabilities: m.Capabilities, size: int64(m.SizeMB) * 1_000_000,
					state: schemas.ModelLoading, detail: "llama.cpp is loading the model.",
				})
			}
		}
	}
	return found
}

func (b *Backend) routerModels(ctx context.Context) ([]listed, error) {
	var list llamaList
	if err := b.get(ctx, "/models", &list); err != nil {
		return nil, err
	}
	b.setSlots(routerSlots)
	loaded := map[string]llamaProps{}
	var found []listed
	for _, m := range list.Data {
		if _, ok := b.public(m.ID); !ok {
			continue
		}
		l := listed{id: m.ID, created: m.Created, state: schemas.ModelCold}
		if m.Meta != nil {
			l.size, l.window = m.Meta.Size, m.Meta.Window
		}
		l.capabilities = b.remembered(m.ID)
		l.capabilities.Vision = l.capabilities.Vision || slices.Contains(m.Architecture.Input, "image")
		if m.Template != "" {
			l.capabilities.Tools = l.capabilities.Tools || templateTools(m.Template)
			l.capabilities.Thinking = l.capabilities.Thinking || templateThinks(m.Template)
		}
		if m.Status != nil {
			if l.window == 0 {
				l.window = argument(m.Status.Args, "--ctx-size", "-c")
			}
			switch {
			case m.Status.Failed:
				l.state, l.detail = schemas.ModelFailed, "llama.cpp couldn't load the model (exit code "+strconv.Itoa(m.Status.ExitCode)+")."
			case m.Status.Value == "loaded":
				l.state = schemas.ModelReady
			case m.Status.Value == "loading":
				l.state, l.detail = schemas.ModelLoading, "llama.cpp is loading the model."
			case m.Status.Value == "downloading":
				l.state, l.detail = schemas.ModelLoading, "llama.cpp is downloading the model."
			}
		}
		if l.state == schemas.ModelReady {
			if props, ok := b.routerProps(ctx, m.ID); ok {
				loaded[m.ID] = props
				l.capabilities = props.capabilities()
				if props.Defaults.Window > 0 {
					l.window = props.Defaults.Window
				}
			}
		}
		if l.state == schemas.ModelReady {
			b.llamaContinues(ctx, m.ID, "?autoload=false")
		}
		l.continues = b.way(m.ID).can
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		found = append(found, l)
	}
	b.mu.Lock()
	b.props = loaded
	b.mu.Unlock()
	return found, nil
}

// routerProps asks a router for the properties of a model that is loaded, once per
// load, and never so that it would load one.
func (b *Backend) routerProps(ctx context.Context, id string) (llamaProps, bool) {
	b.mu.Lock()
	props, ok := b.props[id]
	b.mu.Unlock()
	if ok {
		return props, true
	}
	err := b.get(ctx, "/props?autoload=false&model="+url.QueryEscape(id), &props)
	return props, err == nil
}

// argument returns the number that follows one of the flags, or 0.
func argument(args []string, flags ...string) int {
	for i, a := range args {
		name, value, joined := strings.Cut(a, "=")
		if !slices.Contains(flags, name) {
			continue
		}
		if !joined && i+1 < len(args) {
			value = args[i+1]
		}
		if n, err := strconv.Atoi(value); err == nil && n > 0 {
			return n
		}
	}
	return 0
}

// llamaCount counts the tokens of a prompt as llama.cpp will see it.
func (b *Backend) llamaCount(ctx context.Context, body []byte) (int, error) {
	b.mu.Lock()
	old := b.noInputTokens
	b.mu.Unlock()
	if !old {
		var counted struct {
			Tokens *int `json:"input_tokens"`
		}
		err := b.post(ctx, "/v1/chat/completions/input_tokens", body, &counted)
		if err == nil && counted.Tokens != nil {
			return *counted.Tokens, nil
		}
		if s := status(err); err != nil && s != http.StatusNotFound && s != http.StatusMethodNotAllowed && s != http.StatusNotImplemented {
			return 0, err
		}
		b.mu.Lock()
		b.noInputTokens = true
		b.mu.Unlock()
	}
	var template struct {
		Prompt string `json:"prompt"`
	}
	if err := b.post(ctx, "/apply-template", body, &template); err != nil {
		return 0, err
	}
	tokenize := map[string]any{"content": template.Prompt, "add_special": true, "parse_special": true}
	if model := modelOf(body); model != "" {
		tokenize["model"] = model
	}
	var tokens struct {
		Tokens []rawJSON `json:"tokens"`
	}
	if err := b.post(ctx, "/tokenize", tokenize, &tokens); err != nil {
		return 0, err
	}
	return len(tokens.Tokens), nil
}
