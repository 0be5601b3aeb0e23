package backend

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/tidwall/gjson"

	"github.com/ownllm/ownllm/schemas"
)

// A reply that broke off elsewhere is continued by giving the server what there is of it
// as the last message, the assistant's. Whether a server goes on from there, or takes the
// message for a finished one and says something new, depends on its version, its settings
// and the chat template of the model. So it is proved before a model is offered for it:
//
//   - vLLM refuses to continue what its template can't. Asked to count the tokens of such
//     a prompt it does all that the real request would, and no GPU is needed.
//   - llama.cpp shows the prompt that it would make, which has to end in the text.
//   - Ollama does, too, in newer builds, but only with the model in memory. It is asked
//     when the model is there anyway, and as it was loaded, so that nothing is loaded anew.
//   - The demo model says of itself that it can.
//
// Of other servers nothing is known, and nothing is tried on them.
//
// Some builds of llama.cpp repeat the text that they go on from before they do. That shows
// only in a reply, so that one token is asked for before the first continuation.

// continuing is how a model goes on from a text, as far as that is known.
type continuing struct {
	at    time.Time // of the proof, or of the last try
	known bool
	can   bool
	// flags says that the server has to be told to continue, trims that the template cuts
	// off white space at the end.
	flags, trims bool
	// repeats says whether the server repeats the text; nil: not known yet.
	repeats *bool
}

const (
	// proofWait bounds a proof. An inconclusive one is repeated after trialPause.
	proofWait = 2 * time.Second
	// proofText is what a reply to proofPrompt is taken to have begun with.
	proofPrompt = "Tell me a story."
	proofText   = "Well, then: once upon a time,"
)

var errNotContinued = errors.New("it didn't go on from where the reply broke off")

// prove returns whether a model can continue a text, and proves it if that is due. The key
// names the model and its version. ask is inconclusive if it returns an error that isn't an
// answer of the server.
func (b *Backend) prove(ctx context.Context, key string, ask func(context.Context) (continuing, error)) bool {
	b.mu.Lock()
	c := b.continues[key]
	b.mu.Unlock()
	if c.known || !c.at.IsZero() && time.Since(c.at) < trialPause {
		return c.can
	}
	limited, cancel := context.WithTimeout(ctx, proofWait)
	defer cancel()
	c, err := ask(limited)
	s := status(err)
	c.at, c.known = time.Now(), err == nil || s >= 400 && s < 500 && s != http.StatusTooManyRequests
	if ctx.Err() != nil {
		return false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.continues[key] = c
	return c.can
}

func proofMessages(tail string) []any {
	return []any{
		map[string]string{"role": "user", "content": proofPrompt},
		map[string]string{"role": "assistant", "content": proofText + tail},
	}
}

// vllmContinues proves that vLLM can continue a text. Whether the template keeps white
// space at the end, the count would only hint at, so it isn't relied on.
func (b *Backend) vllmContinues(ctx context.Context, id string) bool {
	return b.prove(ctx, id, func(ctx context.Context) (continuing, error) {
		c := continuing{flags: true, trims: true}
		var counted struct {
			Count int `json:"count"`
		}
		err := b.post(ctx, "/tokenize", map[string]any{
			"model": id, "messages": proofMessages(""), "add_generation_prompt": false, "continue_final_message": true,
		}, &counted)
		c.can = err == nil && counted.Count > 0
		return c, err
	})
}

// llamaContinues proves that llama.cpp can continue a text. query is what keeps a router
// from loading a model for that.
func (b *Backend) llamaContinues(ctx context.Context, id, query string) bool {
	return b.prove(ctx, id, func(ctx context.Context) (continuing, error) {
		const tail = " \n"
		var c continuing
		for _, c.flags = range []bool{false, true} {
			request := map[string]any{"model": id, "messages": proofMessages(tail)}
			if c.flags {
				request["add_generation_prompt"], request["continue_final_message"] = false, true
			}
			var template struct {
				Prompt string `json:"prompt"`
			}
			if err := b.post(ctx, "/apply-template"+query, request, &template); err != nil {
				return c, err
			}
			if c.can, c.trims = endsIn(template.Prompt, tail); c.can {
				break
			}
		}
		return c, nil
	})
}

// ollamaContinues proves that Ollama can continue a text, with a model that is in memory
// with the given window.
func (b *Backend) ollamaContinues(ctx context.Context, id, key string, window int) bool {
	return b.prove(ctx, key, func(ctx context.Context) (continuing, error) {
		const tail = " \n"
		// Builds that don't know the first field answer, by one token.
		options := map[string]any{"num_predict": 1}
		if window > 0 {
			options["num_ctx"] = window
		}
		var answer struct {
			Debug struct {
				Prompt string `json:"rendered_template"`
			} `json:"_debug_info"`
		}
		err := b.post(ctx, "/api/chat", map[string]any{
			"_debug_render_only": true, "model": id, "messages": proofMessages(tail), "stream": false, "options": options,
		}, &answer)
		var c continuing
		c.can, c.trims = endsIn(answer.Debug.Prompt, tail)
		return c, err
	})
}

// endsIn reports whether a prompt ends in the text, and whether without the tail of it.
func endsIn(prompt, tail string) (can, trims bool) {
	if strings.HasSuffix(prompt, proofText+tail) {
		return true, false
	}
	return strings.HasSuffix(prompt, proofText), true
}

// way is how the model with the server's own id goes on from a text.
func (b *Backend) way(id string) continuing {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.kind == Demo {
		return continuing{can: true, flags: true}
	}
	if b.kind == Ollama {
		for key, c := range b.continues {
			if name, _, ok := strings.Cut(key, "@"); ok && c.can && (name == id || name == id+":latest") {
				return c
			}
		}
	}
	return b.continues[id]
}

// repeats finds out whether a llama.cpp server repeats the text that it goes on from.
func (b *Backend) repeats(ctx context.Context, id string, c continuing) (bool, error) {
	if c.repeats != nil {
		return *c.repeats, nil
	}
	request := map[string]any{"model": id, "messages": proofMessages(""), "max_tokens": 1, "stream": true}
	if c.flags {
		request["add_generation_prompt"], request["continue_final_message"] = false, true
	}
	body, err := json.Marshal(request)
	if err != nil {
		return false, err
	}
	reply, err := b.chat(ctx, &Call{Model: id, Body: body, Stream: true}, body)
	if err != nil {
		return false, err
	}
	defer reply.Close()
	var lines []byte
	for err == nil {
		lines, err = reply.Next(lines)
	}
	if !reply.whole {
		return false, err
	}
	var said strings.Builder
	for line := range bytes.Lines(lines) {
		said.WriteString(gjson.GetBytes(line, "choices.0.delta.content").String())
	}
	does := strings.HasPrefix(said.String(), proofText)
	b.mu.Lock()
	defer b.mu.Unlock()
	if c, ok := b.continues[id]; ok {
		c.repeats = &does
		b.continues[id] = c
	}
	return does, nil
}

// continued returns the call that makes the server go on with a reply.
func (b *Backend) continued(ctx context.Context, id string, c *Call) (*Call, error) {
	way := b.way(id)
	next, text := *c, c.Continue.Text
	if text != "" && !way.can {
		return nil, b.kind.broken("can't continue a reply.")
	}
	if way.trims {
		// What the template cuts off, the model would say again.
		text = strings.TrimRight(text, " \t\r\n")
		next.blank = c.Continue.Text[len(text):]
	}
	if b.kind == LlamaCPP && text != "" {
		repeats, err := b.repeats(ctx, id, way)
		if err != nil {
			return nil, err
		}
		if repeats {
			next.repeated = text
		}
	}
	if next.MaxTokens > 0 {
		next.MaxTokens = max(next.MaxTokens-int64(c.Continue.Tokens), 0)
		next.spent = next.MaxTokens == 0
	}
	var err error
	next.Body, err = edit(c.Body, func(e *editor) {
		next.spent = e.lower(b.kind, c.Continue.Tokens) || next.spent
		if text == "" {
			return
		}
		e.say(text)
		if way.flags {
			e.set("add_generation_prompt", []byte("false"))
			e.set("continue_final_message", []byte("true"))
		}
		if e.has("echo") {
			e.set("echo", []byte("false"))
		}
	})
	if err != nil {
		return nil, err
	}
	if b.kind == Ollama && text != "" {
		if _, err := b.CheckContext(ctx, c.Model, next.Body, false); err != nil {
			return nil, err
		}
	}
	return &next, nil
}

// say adds a last message, the assistant's.
func (e *editor) say(text string) {
	for _, m := range e.members {
		raw := m.value.of(e.b)
		if m.key != "messages" || raw[0] != '[' {
			continue
		}
		list := append([]byte(nil), raw[:len(raw)-1]...)
		if len(bytes.TrimSpace(list)) > 1 {
			list = append(list, ',')
		}
		list = append(list, `{"role":"assistant","content":`...)
		e.replace(m.value, append(schemas.AppendString(list, text), `}]`...))
	}
}

// lower takes off the token limits what there is already, and reports whether nothing is
// left.
func (e *editor) lower(k Kind, by int) (spent bool) {
	for _, m := range e.members {
		least := false
		switch {
		case m.key == "max_tokens", m.key == "max_completion_tokens", m.key == "n_predict" && k == LlamaCPP:
		case m.key == "min_tokens":
			least = true
		default:
			continue
		}
		// 10.0 and 1e1 are whole numbers, too; null and -1 are no limits.
		n, err := strconv.ParseFloat(string(m.value.of(e.b)), 64)
		if err != nil || n <= 0 {
			continue
		}
		left := max(int64(n)-int64(by), 0)
		spent = spent || left == 0 && !least
		e.replace(m.value, strconv.AppendInt(nil, left, 10))
	}
	return spent
}

// skip cuts off a piece of the reply what the client has already: the text that the server
// repeats, and then the white space that its template has cut off. raw is a JSON string;
// changed says that the string in its place is another one.
func (w *rewriter) skip(raw []byte) (left string, changed bool, err error) {
	var s string
	if err := json.Unmarshal(raw, &s); err != nil {
		return "", false, errNotJSON
	}
	left = s
	if w.repeated != "" {
		n := min(len(w.repeated), len(left))
		if left[:n] != w.repeated[:n] {
			return "", false, errNotContinued
		}
		w.repeated, left = w.repeated[n:], left[n:]
	}
	for w.blank != "" && left != "" {
		if left[0] != w.blank[0] {
			w.blank = "" // the model has other ideas
			break
		}
		w.blank, left = w.blank[1:], left[1:]
	}
	return left, left != s, nil
}

// proved reports what is known of a model without asking.
func (b *Backend) proved(key string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.continues[key].can
}
