package backend

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/tidwall/gjson"
)

const (
	// A chat template adds to the messages: a system prompt of its own, the markers of
	// each message, and instructions where there are tools, whose JSON it may indent.
	templateBytes = 1024
	messageBytes  = 16
	toolFactor    = 3
	// leastWindow is the window that Ollama gives a model if nothing says otherwise and
	// the GPU is small.
	leastWindow = 4096
	// countWait bounds the wait for a count.
	countWait = 5 * time.Second
)

// CountPrompt returns how many tokens the prompt of a request has, exactly, by the
// server's own tokenizer and chat template. It costs a few milliseconds and no GPU
// time. A server that has no tokenizer to ask, and a prompt with images or audio,
// give errors.ErrUnsupported.
func (b *Backend) CountPrompt(ctx context.Context, model string, body []byte) (int, error) {
	id, err := b.resolve(model)
	if err != nil {
		return 0, err
	}
	if hasMedia(body) {
		return 0, fmt.Errorf("count prompt with media: %w", errors.ErrUnsupported)
	}
	var n int
	switch b.kind {
	case VLLM, Demo:
		n, err = b.vllmCount(ctx, id, body)
	case LlamaCPP:
		if body, err = withModel(body, id); err == nil {
			n, err = b.llamaCount(ctx, body)
		}
	default:
		return 0, fmt.Errorf("count prompt on %s backend: %w", b.kind, errors.ErrUnsupported)
	}
	if err != nil {
		return 0, fmt.Errorf("count prompt on %s backend: %w", b.kind, err)
	}
	return n, nil
}

// CheckContext finds out before a run whether the prompt fits the model's context
// window, and returns the size of the prompt in tokens where it was counted, else 0. A
// prompt of so few bytes that it fits in any case isn't counted, unless it is to be
// counted whatever it costs: no tokenizer makes two tokens of one byte.
//
// It matters for Ollama, which cuts a prompt that is too long without a word. It has
// no tokenizer to ask, so it is given the prompt to read, and told not to cut it. The
// other servers refuse by themselves; here they are asked so that the client hears
// by how much it is too long.
//
// The error is context_length_exceeded, or, when the context ended, wraps its cause.
// A count that fails is no error: the run will show.
func (b *Backend) CheckContext(ctx context.Context, model string, body []byte, exactly bool) (int, error) {
	id, err := b.resolve(model)
	if err != nil {
		return 0, err
	}
	window := b.window(id)
	if window == 0 && b.kind == Ollama {
		window = leastWindow
	}
	fits := window == 0 || mostTokensOf(len(body)) < window || hasMedia(body) || mostTokens(body) < window
	switch {
	case !fits && b.kind == Ollama:
		return 0, b.checkOllama(ctx, id, model, body)
	case fits && !exactly:
		return 0, nil
	}
	limited, cancel := context.WithTimeout(ctx, countWait)
	defer cancel()
	n, err := b.CountPrompt(limited, model, body)
	switch {
	case ctx.Err() != nil:
		return 0, fmt.Errorf("check context: %w", context.Cause(ctx))
	case err != nil:
		return 0, nil
	case window > 0 && n >= window:
		// A prompt as long as the window leaves no room for a single token.
		return n, exceeded(model, n, window)
	}
	return n, nil
}

func (b *Backend) checkOllama(ctx context.Context, id, model string, body []byte) error {
	c, err := b.ollamaFits(ctx, id, body)
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("check context: %w", context.Cause(ctx))
	case err != nil && c.overflow():
		c.message, c.lower = "", "" // says less than we do
		return tooLong(model, &c)
	}
	return nil
}

// mostTokens is a bound that the tokens of a prompt can't pass: the bytes of its
// messages and tools, as JSON, and what a template adds. JSON escapes only make it
// longer.
func mostTokens(body []byte) int {
	messages := gjson.GetBytes(body, "messages")
	n := templateBytes + len(messages.Raw) + messageBytes*int(messages.Get("#").Int())
	if tools := gjson.GetBytes(body, "tools"); tools.IsArray() {
		n += templateBytes + toolFactor*len(tools.Raw)
	}
	for _, name := range []string{"functions", "response_format", "chat_template_kwargs", "documents"} {
		n += toolFactor * len(gjson.GetBytes(body, name).Raw)
	}
	return n
}

// mostTokensOf bounds mostTokens for any body of so many bytes, unread. A message has at least
// two of them.
func mostTokensOf(size int) int { return 2*templateBytes + (toolFactor+messageBytes/2)*size }

// hasMedia reports whether a message has a part that isn't text: an image, audio or
// a file, whose tokens can't be told from its bytes.
func hasMedia(body []byte) bool {
	found := false
	gjson.GetBytes(body, "messages").ForEach(func(_, message gjson.Result) bool {
		if content := message.Get("content"); content.IsArray() {
			content.ForEach(func(_, part gjson.Result) bool {
				switch part.Get("type").String() {
				case "", "text", "refusal", "thinking":
				default:
					found = true
				}
				return !found
			})
		}
		return !found
	})
	return found
}
