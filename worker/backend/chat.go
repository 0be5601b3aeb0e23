package backend

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"time"

	"github.com/tidwall/gjson"

	"github.com/ownllm/ownllm/schemas"
)

const (
	// maxErrorBody bounds what is read of an error answer, maxReply of a reply that
	// isn't streamed, in bytes.
	maxErrorBody = 64 << 10
	maxReply     = 64 << 20
	// maxBatch is the size in bytes after which Next adds no further chunk.
	maxBatch = 64 << 10
	// drainWait is how long Close waits for the end of the HTTP reply, after the end of
	// the stream in it, so that the connection can serve again.
	drainWait = 100 * time.Millisecond
)

// Call is one chat completion to run.
type Call struct {
	// Model is the id under which Models offers the model.
	Model string
	// Body is the client's request, a JSON object; it isn't changed.
	Body []byte
	// Stream says whether the reply is streamed, IncludeUsage whether the stream ends
	// with a chunk that carries the usage.
	Stream, IncludeUsage bool
	// Completion, Created and ReplyModel become id, created and model of the reply.
	Completion string
	Created    int64
	ReplyModel string
	// Prompt, if it isn't nil, returns the exact size of the prompt if that was counted by
	// now, else 0; it stands in for the usage of a server that tells none.
	Prompt func() int
	// MaxTokens is how many tokens the server is allowed, all choices together, on top of
	// what the client says; 0 stands for no bound.
	MaxTokens int64
	// Allowed, if it isn't nil, says how many tokens of a stream may go to the client now,
	// all choices together.
	Allowed func() int64
	// Continue, if it isn't nil, is what there is of a stream already: the reply is what
	// comes after it, and is counted on from there. Body is as the client sent it, and the
	// limits hold for the whole.
	Continue *schemas.Continuation

	// Of a call that continues: what the server says again, to the letter, and the white
	// space that it may say again after that; and that the reply has as many tokens as it
	// may have.
	repeated, blank string
	spent           bool
}

// Chat sends the call to the server and returns once it answers: at once or when the
// first token comes for a stream, and when all is said for a reply that isn't. The
// context governs the whole reply, until Close.
//
// The error is a *schemas.Error, or, when the context ended, wraps its cause.
func (b *Backend) Chat(ctx context.Context, c *Call) (*Reply, error) {
	id, err := b.resolve(c.Model)
	if err != nil {
		return nil, err
	}
	if c.Continue != nil {
		if c, err = b.continued(ctx, id, c); err != nil {
			return nil, err
		}
		if c.spent {
			return b.ended(c), nil
		}
	}
	body, bounded, err := b.kind.requestBody(c, id, c.MaxTokens, int64(b.window(id)))
	if err != nil {
		return nil, err
	}
	reply, err := b.chat(ctx, c, body)
	if !bounded || !errors.Is(err, &schemas.Error{Code: schemas.CodeContextLengthExceeded}) {
		return reply, err
	}
	// vLLM refuses to be allowed more tokens than the window has left beside the prompt.
	// If that is why, the window is the narrower bound, and ours isn't needed.
	if body, _, err = b.kind.requestBody(c, id, 0, 0); err != nil {
		return nil, err
	}
	return b.chat(ctx, c, body)
}

func (b *Backend) chat(ctx context.Context, c *Call, body []byte) (*Reply, error) {
	ctx, cancel := context.WithCancel(ctx)
	req, err := b.newRequest(ctx, http.MethodPost, "/v1/chat/completions", body)
	if err != nil {
		cancel()
		return nil, err
	}
	if c.Stream {
		req.Header.Set("Accept", "text/event-stream")
	}
	resp, err := b.transport.RoundTrip(req)
	if err != nil {
		defer cancel()
		if ctx.Err() != nil {
			return nil, fmt.Errorf("chat with %s backend: %w", b.kind, context.Cause(ctx))
		}
		return nil, b.kind.unreachable(err)
	}
	if resp.StatusCode != http.StatusOK || c.Stream && !isStream(resp.Header) {
		defer cancel()
		return nil, b.refused(ctx, c, resp)
	}
	// The body refers to the answer, and so would an open stream to what was sent and the headers.
	resp.Request, resp.Header = nil, nil
	r := &Reply{kind: b.kind, call: c, cancel: cancel, body: resp.Body}
	r.cause = func() error { return context.Cause(ctx) }
	r.rewriter.reset(b.kind, c)
	r.bounded = c.Stream && c.Allowed != nil
	r.rewriter.hideTimings = r.bounded && b.kind == LlamaCPP && !gjson.GetBytes(c.Body, perToken).Exists()
	if c.Stream {
		r.events.begin(resp.Body)
	}
	return r, nil
}

// ended is the reply to a call that isn't allowed a single token more.
func (b *Backend) ended(c *Call) *Reply {
	r := &Reply{kind: b.kind, call: c, cancel: func() {}}
	r.cause = func() error { return nil }
	r.rewriter.reset(b.kind, c)
	return r
}

func isStream(h http.Header) bool {
	mediaType, _, err := mime.ParseMediaType(h.Get("Content-Type"))
	return err == nil && mediaType == "text/event-stream"
}

// refused is the error of an answer that isn't a reply.
func (b *Backend) refused(ctx context.Context, c *Call, resp *http.Response) error {
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("chat with %s backend: %w", b.kind, context.Cause(ctx))
	}
	status := resp.StatusCode
	if status == http.StatusOK {
		// Not a stream: an error perhaps, whose own code tells more than the status.
		reply := gjson.ParseBytes(text)
		if e := reply.Get("error"); reply.Get("object").String() != "error" && (!e.Exists() || !blames([]byte(e.Raw))) {
			return b.kind.broken("answered with something that isn't a stream.")
		}
		status = 0
	}
	complaint := readComplaint(status, text)
	complaint.retry = retryAfter(resp.Header)
	return b.kind.refusal(c.Model, complaint)
}

func (c *Call) prompt() int {
	if c.Prompt == nil {
		return 0
	}
	return c.Prompt()
}

// Reply is the reply to a Call. It is for one goroutine, and has to be closed.
type Reply struct {
	kind     Kind
	call     *Call
	cause    func() error // why the context ended; nil while it hasn't
	cancel   context.CancelFunc
	body     io.ReadCloser
	events   events
	rewriter rewriter
	whole    bool  // the reply came to its end
	err      error // what Next returns from now on
	bounded  bool  // the call says how many tokens are allowed
	// holding says that held is a chunk that isn't allowed yet; passed is the number of
	// tokens before it.
	holding bool
	held    []byte
	passed  int
}

// ErrHeld says that the next chunk has more tokens than are allowed.
var ErrHeld = errors.New("the reply has as many tokens as are allowed")

// Next appends the next chunks of a stream to dst, each one a line of JSON with its
// newline: it waits for one, and adds those that are already there.
//
// It returns io.EOF at the end of a whole reply, a *schemas.Error when the server
// failed, and what wraps the cause of the context when that ended. As with io.Reader,
// the last chunks may come together with the error, so look at dst first.
//
// ErrHeld ends nothing: the same chunk is due again when more is allowed, unless the
// reply is Cut. Until then nothing is read from the server.
func (r *Reply) Next(dst []byte) ([]byte, error) {
	start := len(dst)
	if r.call.spent && r.err == nil {
		dst = r.Cut(dst)
		r.err = io.EOF
		return dst, r.err
	}
	if r.holding && r.err == nil {
		if !r.allowed() {
			return dst, ErrHeld
		}
		r.holding = false
		dst = append(dst, r.held...)
		r.rewriter.passAll()
	}
	for r.err == nil {
		if len(dst)-start > maxBatch {
			return dst, nil
		}
		data, failed, err := r.events.next(len(dst) == start)
		switch {
		case errors.Is(err, errNotYet):
			return dst, nil
		case errors.Is(err, io.EOF):
			dst = r.finish(dst)
		case err != nil:
			r.fail(err)
		case failed:
			r.fail(&backendFailure{data})
		case string(bytes.TrimSpace(data)) == "[DONE]":
			dst = r.finish(dst)
		case len(data) > 0:
			at := len(dst)
			if r.bounded {
				r.passed = r.rewriter.tokens()
			}
			dst, err = r.rewriter.chunk(dst, data)
			switch {
			case err != nil:
				r.fail(err)
			case !r.bounded:
			case r.rewriter.said && !r.allowed():
				r.holding, r.held = true, append(r.held[:0], dst[at:]...)
				return dst[:at], ErrHeld
			default:
				r.rewriter.passAll()
			}
		}
	}
	return dst, r.err
}

// allowed reports whether all that has come from the server may go to the client.
func (r *Reply) allowed() bool { return int64(r.rewriter.tokens()) <= r.call.Allowed() }

// Wanted is how many tokens have to be allowed for Next to go on.
func (r *Reply) Wanted() int { return r.rewriter.tokens() }

// Cut ends a stream that isn't allowed more tokens: it appends, for each choice that
// hasn't come to its end, a chunk with the finish_reason "length", and the usage if the
// client asked for it. Close then makes the server stop.
func (r *Reply) Cut(dst []byte) []byte {
	r.err = errDone
	n := 1
	if r.kind != Ollama { // which makes one whatever is asked for
		n = max(n, int(gjson.GetBytes(r.call.Body, "n").Int()))
	}
	return r.rewriter.cut(dst, min(n, maxChoices), r.call.prompt(), r.Tokens())
}

// finish ends a stream: whole if every choice was finished, else with an error.
func (r *Reply) finish(dst []byte) []byte {
	if r.rewriter.repeated != "" {
		r.err = r.kind.interrupted(r.call.Model, errNotContinued)
		return dst
	}
	if !r.rewriter.finished() {
		if r.kind == Ollama {
			r.err = r.kind.broken("stopped in the middle of the reply. It doesn't tell why; its own log does.")
		} else {
			r.err = r.kind.broken("stopped in the middle of the reply.")
		}
		return dst
	}
	r.whole, r.err = true, io.EOF
	return r.rewriter.end(dst, r.call.prompt())
}

func (r *Reply) fail(err error) {
	if cause := r.cause(); cause != nil {
		r.err = fmt.Errorf("reply of %s backend: %w", r.kind, cause)
		return
	}
	r.err = r.kind.interrupted(r.call.Model, err)
}

// Body returns the whole reply of a call that isn't streamed, as one JSON object.
// Its errors are those of Next, without io.EOF.
func (r *Reply) Body() ([]byte, error) {
	if r.err != nil {
		return nil, r.err
	}
	data, err := io.ReadAll(io.LimitReader(r.body, maxReply+1))
	if err != nil {
		r.fail(err)
		return nil, r.err
	}
	if len(data) > maxReply {
		r.err = r.kind.broken("sent a reply of more than %d MiB.", maxReply>>20)
		return nil, r.err
	}
	out, err := r.rewriter.whole(make([]byte, 0, len(data)+256), data, r.call.prompt())
	switch {
	case err != nil:
		r.fail(err)
		return nil, r.err
	case !r.rewriter.finished():
		r.err = r.kind.broken("stopped in the middle of the reply.")
		return nil, r.err
	}
	r.whole, r.err = true, errDone
	return out, nil
}

// errDone is what a second call of Body returns.
var errDone = errors.New("reply was read already")

// Tokens is the number of output tokens so far, without a chunk that isn't allowed: the
// server's own figure where it tells one while it goes, else one for each chunk that
// carries text, reasoning or a piece of a tool call.
func (r *Reply) Tokens() int {
	if r.holding {
		return r.passed
	}
	return r.rewriter.tokens()
}

// Usage is what the reply burnt, final once Next has returned io.EOF, Body its reply, or
// the reply was Cut. The prompt is 0 if neither the server nor the Call told its size.
func (r *Reply) Usage() schemas.Usage {
	return schemas.Usage{PromptTokens: r.rewriter.promptSize(r.call.prompt()), CompletionTokens: r.Tokens()}
}

// Close ends the reply. A server that is still generating is cut off, which makes it
// stop.
func (r *Reply) Close() error {
	if r.body == nil {
		return nil
	}
	if r.whole {
		// What is left is at most the end mark of the HTTP reply. A server that holds it
		// back loses the connection.
		timer := time.AfterFunc(drainWait, r.cancel)
		_, _ = io.CopyN(io.Discard, r.body, maxErrorBody)
		timer.Stop()
	}
	err := r.body.Close()
	r.cancel() // not before: it would close a connection that can serve again
	r.body = nil
	r.events.end()
	if r.err == nil {
		r.err = errDone
	}
	return err
}
