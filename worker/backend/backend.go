// Package backend is all that a worker knows of inference servers: it finds out what
// kind of server answers at an address, what it has and whether that can answer now,
// and runs chat completions on it.
//
// Whatever the server, the caller sees one: models in the form of the contract,
// replies as OpenAI chunks with our id, created and model, one name for reasoning,
// the role in the first delta and the usage where the client asked for it. And one
// kind of failure: every way in which a server refuses, breaks off or talks nonsense
// becomes a *schemas.Error whose message is for people.
//
// # What it promises
//
// A reply that ends without an error is whole: the server said so, by a
// finish_reason for each choice, and not merely by closing the connection. That
// matters because Ollama swallows a failure in mid-stream and just ends, and the
// SDKs take a stream that just ends for complete.
//
// A request reaches the server as the client wrote it. What has to change, the
// model's id, stream and stream_options, and for Ollama the name of the token limit,
// is spliced into the client's own bytes.
//
// A stream is never held back: Next returns what is there as soon as one chunk is,
// and never waits for a second.
//
// Nothing here logs, and no error message quotes a prompt or a completion, with one
// exception that its reader has to know: an invalid_value passes on the server's own
// explanation of what is wrong with a request, which may quote the request. It is
// for the client, not for a log.
package backend

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/ownllm/ownllm/schemas"
)

// Kind is a kind of inference server.
type Kind string

// The kinds that Probe tells apart.
const (
	Ollama   Kind = "ollama"
	VLLM     Kind = "vllm"
	LlamaCPP Kind = "llamacpp"
	// OpenAI is any other server that speaks OpenAI's protocol: LM Studio, SGLang, …
	OpenAI Kind = "openai"
	// Demo is OwnLLM's own demo model.
	Demo Kind = "demo"
)

// Label is the name of the kind in a message for people.
func (k Kind) Label() string {
	switch k {
	case Ollama:
		return "Ollama"
	case VLLM:
		return "vLLM"
	case LlamaCPP:
		return "llama.cpp"
	case Demo:
		return "demo"
	}
	return "inference"
}

// slots is how many requests a server of this kind is given at once if neither it
// nor the operator says.
func (k Kind) slots() int {
	switch k {
	case Ollama:
		// OLLAMA_NUM_PARALLEL, 1 unless set, can't be asked for. Ollama queues by itself,
		// per model, so a few too many cost waiting and no failure, while 1 would stop a
		// second model from running beside the first.
		return 4
	case VLLM, Demo:
		return 64
	case LlamaCPP:
		// Only until the server tells its total_slots.
		return 1
	}
	return 8
}

// Backend is one inference server. It is safe for concurrent use.
type Backend struct {
	kind      Kind
	base      string // without /v1 and trailing slash
	config    Config
	upstream  map[string]string // public id → the server's own, if models were listed
	transport *transport
	// lmStudio says that the server has LM Studio's own list of models, which tells
	// more than OpenAI's.
	lmStudio bool

	mu    sync.Mutex
	slots int
	// models is the last inventory, known the same by the server's own ids.
	models []schemas.Model
	known  map[string]*known
	loads  map[string]*load
	// shows keeps what Ollama tells of a model, by name and digest; props what a
	// llama.cpp router tells of one, while it is loaded.
	shows map[string]ollamaShow
	props map[string]llamaProps
	// tools keeps what vLLM answered when it was tried with a tool.
	tools *toolTrial
	// continues keeps how models go on from a text; of Ollama by name and digest.
	continues map[string]continuing
	// noInputTokens says that a llama.cpp server is too old to count tokens itself.
	noInputTokens bool
}

// known is what has to be remembered of a model from one inventory to the next.
type known struct {
	created int64
	window  int
	size    int64         // bytes
	loaded  time.Duration // how long the last load took
	loading time.Time     // since when the server loads it by itself; zero: it doesn't
	begun   bool          // the beginning of that was seen
	told    time.Duration // what the server itself says is left of a load, and when it did
	toldAt  time.Time
	state   schemas.ModelState
}

// Kind is the kind of server that Probe found.
func (b *Backend) Kind() Kind { return b.kind }

// URL is the server's address, without /v1.
func (b *Backend) URL() string { return b.base }

// Slots is how many requests the server may be given at once, over all its models:
// what the operator said, else what the server tells, else a default of its kind.
func (b *Backend) Slots() int {
	if b.config.Slots > 0 {
		return b.config.Slots
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.slots > 0 {
		return b.slots
	}
	return b.kind.slots()
}

// Close closes the connections that are idle.
func (b *Backend) Close() { b.transport.CloseIdleConnections() }

// resolve returns the server's own id of a model.
func (b *Backend) resolve(model string) (string, error) {
	if len(b.config.Models) == 0 {
		return model, nil
	}
	if id, ok := b.upstream[model]; ok {
		return id, nil
	}
	return "", schemas.Errorf(schemas.CodeModelNotFound, "The model %q isn't offered by this agent.", model).WithParam("model")
}

// public returns the id under which a model of the server is offered, and false if
// it isn't.
func (b *Backend) public(id string) (string, bool) {
	if len(b.config.Models) == 0 {
		return id, true
	}
	if p, ok := b.config.Models[id]; ok {
		return p, true
	}
	if b.kind == Ollama {
		// For Ollama a name without a tag is that name with the tag "latest".
		if short, ok := strings.CutSuffix(id, ":latest"); ok {
			p, ok := b.config.Models[short]
			return p, ok
		}
	}
	return "", false
}

// Models returns what the server offers now, sorted by id. It is made to be called
// every two seconds: what doesn't change is asked once.
//
// When the server can't be asked, Models returns the models that it last had, each
// one marked failed with the reason, together with the error.
func (b *Backend) Models(ctx context.Context) ([]schemas.Model, error) {
	found, err := b.list(ctx)
	if err != nil {
		if ctx.Err() != nil {
			// Nobody has asked the server, so nothing is known against it.
			return nil, fmt.Errorf("models of %s backend: %w", b.kind, context.Cause(ctx))
		}
		return b.lost(err), fmt.Errorf("models of %s backend: %w", b.kind, err)
	}
	return b.offer(found), nil
}

// list asks the server for its models.
func (b *Backend) list(ctx context.Context) ([]listed, error) {
	switch b.kind {
	case Ollama:
		return b.ollamaModels(ctx)
	case VLLM:
		return b.vllmModels(ctx)
	case LlamaCPP:
		return b.llamaModels(ctx)
	}
	return b.openaiModels(ctx)
}
