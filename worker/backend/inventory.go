package backend

import (
	"slices"
	"strings"
	"time"

	"github.com/ownllm/ownllm/schemas"
)

// listed is one model as a server tells it, under the server's own id.
type listed struct {
	id           string
	capabilities schemas.Capabilities
	window       int
	size         int64 // bytes
	created      int64
	state        schemas.ModelState
	detail       string
	loadMS       int64
	continues    bool
}

// load is a load that is under way, or that failed lately.
type load struct {
	began time.Time
	part  float64 // how much of it is done, 0 to 1, as far as the server tells
	done  chan struct{}
	// err is the failure, and ended when it came; set before done is closed.
	err   error
	ended time.Time
}

// failureMemory is how long a failed load marks its model as failed; then it is
// cold again, and the next request may try.
const failureMemory = 30 * time.Second

// offer turns what a server listed into the inventory: under the ids that clients
// use, with what the operator stated and what is remembered.
func (b *Backend) offer(found []listed) []schemas.Model {
	slots := b.Slots()
	b.mu.Lock()
	defer b.mu.Unlock()
	models := make([]schemas.Model, 0, len(found))
	seen := map[string]bool{}
	for _, l := range found {
		public, ok := b.public(l.id)
		if !ok || seen[public] {
			continue
		}
		seen[public] = true
		k := b.known[l.id]
		if k == nil {
			k = &known{created: l.created}
			b.known[l.id] = k
		}
		if l.window == 0 {
			// A model that was loaded once will most likely get the same window again.
			l.window = k.window
		}
		k.window = l.window
		m := schemas.Model{
			ID:             public,
			Capabilities:   b.stated(l.capabilities, l.id, public),
			ContextWindow:  l.window,
			SizeMB:         int((l.size + 999_999) / 1_000_000),
			RuntimeProfile: "auto",
			// Some servers give the time of the question. The first answer stays.
			Created: k.created,
			State:   l.state,
			Detail:  l.detail,
			LoadMS:  l.loadMS,
			Backend: string(b.kind),
			Slots:   slots,

			Continues: l.continues,
		}
		b.weighLoad(&m, l, k)
		k.state = m.State
		models = append(models, m)
	}
	slices.SortFunc(models, func(a, b schemas.Model) int { return strings.Compare(a.ID, b.ID) })
	b.models = models
	return slices.Clone(models)
}

// stated adds what the operator stated to what the server told.
func (b *Backend) stated(c schemas.Capabilities, id, public string) schemas.Capabilities {
	list := b.config.Capabilities[public]
	if id != public {
		list = slices.Concat(list, b.config.Capabilities[id])
	}
	for _, name := range list {
		switch name {
		case "vision":
			c.Vision = true
		case "embedding":
			c.Embedding = true
			c.Completion = slices.Contains(list, "completion")
		case "tools":
			c.Tools = true
		case "thinking":
			c.Thinking = true
		case "completion":
			c.Completion = true
		}
	}
	return c
}

// statesTools reports whether the operator stated that a model can call tools.
func (b *Backend) statesTools(id string) bool {
	public, ok := b.public(id)
	return ok && b.stated(schemas.Capabilities{}, id, public).Tools
}

// lost is the inventory of a server that can't be asked.
func (b *Backend) lost(err error) []schemas.Model {
	b.mu.Lock()
	defer b.mu.Unlock()
	models := slices.Clone(b.models)
	detail := b.reason(err)
	for i := range models {
		models[i].State, models[i].Detail = schemas.ModelFailed, detail
		models[i].LoadMS, models[i].LoadPercent = 0, 0
	}
	// Whatever comes back may be another build with other settings.
	b.tools, b.noInputTokens = nil, false
	clear(b.shows)
	clear(b.props)
	clear(b.continues)
	return models
}

// reason says for people why the server can't be asked.
func (b *Backend) reason(err error) string {
	if s := status(err); s != 0 {
		return b.kind.refusal("", complaint{status: s}).Message
	}
	return b.kind.unreachable(err).Message
}

// window is the context window of a model as last heard, 0 if unknown.
func (b *Backend) window(id string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	if k := b.known[id]; k != nil {
		return k.window
	}
	return 0
}

// state is the state of a model as last heard, "" if unknown.
func (b *Backend) state(id string) schemas.ModelState {
	b.mu.Lock()
	defer b.mu.Unlock()
	if k := b.known[id]; k != nil {
		return k.state
	}
	return ""
}

func (b *Backend) setSlots(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if n > 0 {
		b.slots = n
	}
}
