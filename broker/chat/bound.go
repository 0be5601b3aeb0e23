package chat

import "github.com/ownllm/ownllm/schemas"

// What a prompt can have beyond its text, in tokens. Templates put a few special
// tokens around each message, and some begin with a text of their own, longer if there
// are tools. The largest image of the models in use is 16,384 tokens (Qwen2.5-VL); most
// are below 2,000.
const (
	tokensPerMessage = 16
	tokensPerPrompt  = 64
	tokensForTools   = 512
	tokensPerImage   = 4096
)

// PromptBound is the most tokens that the prompt has, but for what no edge can know: a
// token stands for at least one byte of text, so the bytes bound the tokens; chat
// template, tools and images are added as above. It is about four times what English
// text comes to. A prompt that is longer all the same, say of large images, is charged
// no more than was reserved for the request.
func (r *Request) PromptBound() int64 {
	n := r.TextBytes + r.ToolBytes + tokensPerMessage*r.Messages + tokensPerPrompt + tokensPerImage*r.Images
	if r.HasTools {
		n += tokensForTools
	}
	return int64(n)
}

// ReplyLimit is the most tokens that all choices together may have by what the client
// says; 0 if it says nothing.
func (r *Request) ReplyLimit() int64 { return int64(r.MaxTokens) * int64(r.N) }

// MostTokens is the most tokens that all choices together can have because of the
// model's context window; 0 if that isn't known.
func (r *Request) MostTokens(m schemas.Model) int64 { return int64(m.ContextWindow) * int64(r.N) }
