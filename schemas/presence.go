package schemas

import (
	"crypto/sha256"
	"encoding/hex"
	"slices"
)

// ModelState is whether a model can answer.
type ModelState string

const (
	// ModelReady is in memory.
	ModelReady ModelState = "ready"
	// ModelCold is installed, but not in memory: the first request loads it.
	ModelCold ModelState = "cold"
	// ModelLoading is on its way into memory.
	ModelLoading ModelState = "loading"
	// ModelFailed can't answer: its backend is down or broken.
	ModelFailed ModelState = "failed"
)

// Capabilities are what a model can do, as the backend tells it or the operator
// states it.
type Capabilities struct {
	Completion bool `json:"completion"`
	Vision     bool `json:"vision"`
	Embedding  bool `json:"embedding"`
	Tools      bool `json:"tools"`
	Thinking   bool `json:"thinking"`
}

// Model is one model of an agent, as it advertises it.
type Model struct {
	// ID is what clients ask for: the backend's own id, or the operator's alias.
	ID           string       `json:"id"`
	Capabilities Capabilities `json:"capabilities"`
	// ContextWindow is the effective window in tokens, 0 if the backend doesn't tell.
	ContextWindow  int        `json:"context_window"`
	SizeMB         int        `json:"size_mb"`
	RuntimeProfile string     `json:"runtime_profile"`
	Created        int64      `json:"created"`
	State          ModelState `json:"state"`
	// Detail says why the model is loading or failed, for people.
	Detail string `json:"detail,omitempty"`
	// LoadMS is the estimate of what is left of a load, in milliseconds; 0: unknown.
	LoadMS int64 `json:"load_ms,omitempty"`
	// LoadPercent is how much of a load is done, if the backend tells; 0: unknown.
	LoadPercent int `json:"load_percent,omitempty"`
	// Backend is the kind of server that has it: ollama, vllm, llamacpp, openai, demo.
	Backend string `json:"backend"`
	// Slots is how many requests that backend runs at once, over all its models.
	Slots int `json:"slots"`
	// Continues says that the backend goes on exactly where a given text ends, so that a
	// reply which broke off elsewhere can be continued here.
	Continues bool `json:"continues,omitempty"`
}

// Inventory is what an agent offers.
type Inventory struct {
	Models []Model `json:"models"`
	// Partial says that a backend of the agent hasn't answered since the worker was started:
	// what it has isn't known yet, and may be missing here.
	Partial bool `json:"partial,omitempty"`
}

// Keep returns the inventory together with the models of an earlier one that it can't speak
// of: if it is partial, those that are missing in it stay known, as failed.
func (inv Inventory) Keep(earlier []Model) Inventory {
	if !inv.Partial {
		return inv
	}
	inv.Models = slices.Clone(inv.Models)
	for _, m := range earlier {
		if slices.ContainsFunc(inv.Models, func(n Model) bool { return n.ID == m.ID }) {
			continue
		}
		m.State, m.Detail, m.LoadMS, m.LoadPercent = ModelFailed, unheard, 0, 0
		inv.Models = append(inv.Models, m)
	}
	return inv
}

// unheard is why a model can't answer whose backend is still away after a start of its worker.
const unheard = "its inference server hasn't answered since the worker on its GPU machine was started, and may still be starting"

// Hash identifies the content of the inventory, so that a heartbeat needn't carry it.
func (inv Inventory) Hash() string {
	sum := sha256.Sum256(mustMarshal(inv))
	return hex.EncodeToString(sum[:8])
}

// AgentState is what a heartbeat says of the worker as a whole.
type AgentState string

const (
	// AgentUp takes work.
	AgentUp AgentState = "up"
	// AgentDraining finishes what it has and takes nothing new.
	AgentDraining AgentState = "draining"
	// AgentBye is the last word of a worker that stops cleanly.
	AgentBye AgentState = "bye"
)

// Heartbeat is published by a worker once a second. Tenant and agent are in the
// subject. It is small; the inventory rides along only when it has changed, and
// whoever misses it asks on the control subject.
type Heartbeat struct {
	Version     int         `json:"v"`
	Incarnation Incarnation `json:"incarnation"`
	State       AgentState  `json:"state"`
	// Hash is the hash of the current inventory.
	Hash      string     `json:"inventory_hash"`
	Inventory *Inventory `json:"inventory,omitempty"`
	// Host is the name of the machine, for people; it comes with the inventory.
	Host string `json:"host,omitempty"`
	// Running and Waiting count the jobs at the worker, with and without a slot.
	Running int `json:"running"`
	Waiting int `json:"waiting"`
	Slots   int `json:"slots"`
	// Holds says that the worker heeds Job.Hold.
	Holds bool `json:"holds,omitempty"`
}

// Hello is how a worker introduces itself to a broker, on connecting and whenever
// its inventory changes.
type Hello struct {
	// Version is the newest version of the protocol that the worker speaks, and Oldest the
	// oldest; 0: it speaks only one.
	Version     int         `json:"v"`
	Oldest      int         `json:"oldest,omitempty"`
	Incarnation Incarnation `json:"incarnation"`
	Software    string      `json:"software"`
	Host        string      `json:"host"`
	Inventory   Inventory   `json:"inventory"`
}

// Welcome is the broker's answer to a Hello: for each model the consumer to pull
// its jobs from, or the reason why not.
type Welcome struct {
	// Version is the newest version of the protocol that both sides speak, which the worker
	// writes from now on; 0 stands for 1.
	Version   int               `json:"v,omitempty"`
	Stream    string            `json:"stream,omitempty"`
	Consumers map[string]string `json:"consumers,omitempty"` // by model id
	Error     *Error            `json:"error,omitempty"`
}

// The operations of a Control request.
const (
	// ControlCancel stops the run of one attempt.
	ControlCancel = "cancel"
	// ControlLimit tells the run of one attempt how many tokens its reply may have now.
	ControlLimit = "limit"
	// ControlReplaced names the newest run of the agent; an older one stops.
	ControlReplaced = "replaced"
	// ControlInventory asks for the full heartbeat, inventory included.
	ControlInventory = "inventory"
)

// Control is a request from an owner or a broker to a live worker.
type Control struct {
	Operation string `json:"operation"`
	Nonce     Nonce  `json:"nonce,omitempty"`
	Reason    string `json:"reason,omitempty"`
	// Incarnation is that of the newest run.
	Incarnation Incarnation `json:"incarnation,omitempty"`
	// Limit and More are those of a Verdict.
	Limit int64 `json:"limit,omitempty"`
	More  bool  `json:"more,omitempty"`
}

// Encode returns the wire form of the request.
func (c Control) Encode() []byte { return mustMarshal(c) }

// Encode returns the wire form of the heartbeat.
func (h Heartbeat) Encode() []byte { return mustMarshal(h) }

// Encode returns the wire form of the hello.
func (h Hello) Encode() []byte { return mustMarshal(h) }

// Encode returns the wire form of the answer.
func (w Welcome) Encode() []byte { return mustMarshal(w) }
