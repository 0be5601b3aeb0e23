// Package adminapi is the admin HTTP API of an edge: its wire types, its paths, and
// a client. The edge serves these types, the command line and the tests call them.
// schemas/openapi.json describes it for other languages.
//
//	POST  /api/v1/tenants                    CreateTenant → Tenant
//	GET   /api/v1/tenants                    → List[Tenant]
//	PATCH /api/v1/tenants/{tenant}           ChangeTenant → Tenant
//	POST  /api/v1/tenants/{tenant}/suspend   → Tenant
//	POST  /api/v1/tenants/{tenant}/resume    → Tenant
//	POST  /api/v1/users                      CreateUser → User
//	GET   /api/v1/users?tenant=              → List[User]
//	POST  /api/v1/users/{id}/deactivate      → User
//	POST  /api/v1/users/{id}/activate        → User
//	POST  /api/v1/keys                       CreateKey → CreatedKey
//	GET   /api/v1/keys?tenant=&user=         → List[Key]
//	PATCH /api/v1/keys/{id}                  ChangeKey → Key
//	POST  /api/v1/keys/{id}/rotate           RotateKey → CreatedKey
//	POST  /api/v1/keys/{id}/revoke           → Key
//	GET   /api/v1/agents?tenant=             → List[Agent]
//	POST  /api/v1/agents/pairings            CreatePairing → Pairing
//	DELETE /api/v1/agents/{id}               → Agent, as it was
//	POST  /api/v1/agents/pair                PairAgent → PairedAgent; no admin token
//	POST  /api/v1/agents/heartbeat           schemas.Heartbeat → HeartbeatReply; the agent's credential
//	GET   /api/v1/models?tenant=             → List[Model]
//	PUT   /api/v1/prices                     SetPrice → Price
//	GET   /api/v1/prices?tenant=             → List[Price]
//	GET   /api/v1/usage?…                    → List[Usage], or CSV; see UsageFilter
//	GET   /api/v1/audit?tenant=              → List[AuditEntry]
//	GET   /api/v1/status                     → Status
//	GET   /api/v1/openapi.json               → the OpenAPI document
//
// Every request carries "Authorization: Bearer <admin token>", but for the two that machines
// make: one to be paired shows a pairing key in its body, and a heartbeat carries the
// credential that the machine got for it. Wherever a tenant is
// asked for, its id and its slug will do. What creates answers 201, all else 200;
// every failure is the OpenAI error envelope with a code of the contract: not_found
// for an object that isn't there, invalid_value with its param for a field or query
// parameter that is wrong or that nobody knows, key_invalid for a wrong admin token.
// To suspend, resume, deactivate, activate or revoke what already is so is no error.
//
// Lists are pages, oldest first: ?limit= (1 to MaxLimit, default DefaultLimit) and
// ?after= with the next of the page before.
//
// A create or rotation that carries an Idempotency-Key header can be sent again: the
// same request under the same name makes nothing new, and gets the same answer, the
// secret of a key included. Another request under that name is refused. Names are
// remembered for at least 24 hours.
//
// Money is in cents, see Cents. Times are RFC 3339.
//
// The names are stable: fields may be added, so a client ignores what it doesn't
// know.
package adminapi

import (
	"bytes"
	"encoding/json"
	"time"

	"github.com/ownllm/ownllm/schemas"
)

// Prefix begins every path of the API.
const Prefix = "/api/v1"

// The number of entries of a page, when ?limit= isn't given, and at most.
const (
	DefaultLimit = 100
	MaxLimit     = 500
)

// IdempotencyHeader names a create or a rotation, so that it can be sent again.
const IdempotencyHeader = "Idempotency-Key"

// List is a page of a list.
type List[T any] struct {
	Data []T `json:"data"`
	// HasMore says that Next leads to a further page.
	HasMore bool `json:"has_more"`
	// Next is the cursor of the next page, opaque.
	Next string `json:"next,omitempty"`
}

// The states of a Tenant.
const (
	TenantActive    = "active"
	TenantSuspended = "suspended"
)

// Tenant is an organisation: it owns agents, users and keys.
type Tenant struct {
	ID schemas.TenantID `json:"id"`
	// Slug is the name of the tenant in host names; unique.
	Slug string `json:"slug"`
	// Name is for people.
	Name string `json:"name"`
	// State is TenantActive or TenantSuspended; the keys of a suspended tenant get
	// tenant_disabled.
	State string `json:"state"`
	// QPS is how many requests all its keys together may make each second.
	QPS       int       `json:"qps"`
	CreatedAt time.Time `json:"created_at"`
}

// CreateTenant asks for a tenant.
type CreateTenant struct {
	Slug string `json:"slug"`
	// Name is the slug if none is given.
	Name string `json:"name,omitempty"`
	// QPS is 32 if none is given.
	QPS *int `json:"qps,omitempty"`
}

// ChangeTenant changes a tenant: what isn't given stays.
type ChangeTenant struct {
	Name *string `json:"name,omitempty"`
	QPS  *int    `json:"qps,omitempty"`
}

// The states of a User.
const (
	UserActive      = "active"
	UserDeactivated = "deactivated"
)

// User is a person of a tenant; every key belongs to one.
type User struct {
	ID         schemas.UserID   `json:"id"`
	Tenant     schemas.TenantID `json:"tenant"`
	TenantSlug string           `json:"tenant_slug"`
	// Email is unique within the tenant.
	Email string `json:"email"`
	// State is UserActive or UserDeactivated; the keys of a deactivated user get
	// user_deactivated.
	State     string    `json:"state"`
	CreatedAt time.Time `json:"created_at"`
}

// CreateUser asks for a user.
type CreateUser struct {
	// Tenant is the id or slug of the tenant.
	Tenant string `json:"tenant"`
	Email  string `json:"email"`
}

// The states of a Key.
const (
	KeyActive  = "active"
	KeyExpired = "expired"
	KeyRevoked = "revoked"
)

// Key is an API key as it can be shown again: without its secret.
type Key struct {
	ID         schemas.KeyID    `json:"id"`
	Tenant     schemas.TenantID `json:"tenant"`
	TenantSlug string           `json:"tenant_slug"`
	User       schemas.UserID   `json:"user"`
	Email      string           `json:"email"`
	Name       string           `json:"name"`
	// Prefix is the beginning of the secret, by which people tell keys apart.
	Prefix string `json:"prefix"`
	// Scopes are what the key opens: "model:<id>" or "model:*".
	Scopes []string `json:"scopes"`
	// BudgetCents is what the key may spend in a calendar month (UTC); null: no bound.
	BudgetCents *int64 `json:"budget_cents"`
	// Concurrency is how many of its requests may be in flight.
	Concurrency int `json:"concurrency"`
	// State is KeyActive, KeyExpired or KeyRevoked. It says nothing of the tenant's
	// and the user's.
	State     string     `json:"state"`
	CreatedAt time.Time  `json:"created_at"`
	ExpiresAt *time.Time `json:"expires_at"`
	RevokedAt *time.Time `json:"revoked_at"`
}

// CreateKey asks for a key.
type CreateKey struct {
	// Tenant is the id or slug of the tenant.
	Tenant string `json:"tenant"`
	// User is the id or email of the user.
	User string `json:"user"`
	Name string `json:"name,omitempty"`
	// Scopes are what the key opens; none given: every model.
	Scopes []string `json:"scopes,omitempty"`
	// BudgetCents is what the key may spend in a month; none given: no bound.
	BudgetCents *int64 `json:"budget_cents,omitempty"`
	// Concurrency is 32 if none is given.
	Concurrency *int `json:"concurrency,omitempty"`
	// TTLSeconds is the lifetime of the key, and ExpiresAt its end; only one may be
	// given. 0 and none: no end.
	TTLSeconds int64      `json:"ttl_seconds,omitempty"`
	ExpiresAt  *time.Time `json:"expires_at,omitempty"`
}

// ChangeKey changes a key: what isn't given stays.
type ChangeKey struct {
	Name *string `json:"name,omitempty"`
	// Scopes are all that the key opens from now on.
	Scopes      []string `json:"scopes,omitempty"`
	BudgetCents Budget   `json:"budget_cents,omitzero"`
	Concurrency *int     `json:"concurrency,omitempty"`
}

// Budget is a change of a budget: the zero value leaves it as it is.
type Budget struct {
	// Given says that the budget is to be set: to Cents, or to none if Cents is nil.
	Given bool
	Cents *int64
}

// MarshalJSON implements json.Marshaler: null stands for no bound.
func (b Budget) MarshalJSON() ([]byte, error) { return json.Marshal(b.Cents) }

// UnmarshalJSON implements json.Unmarshaler.
func (b *Budget) UnmarshalJSON(text []byte) error {
	*b = Budget{Given: true}
	if bytes.Equal(text, []byte("null")) {
		return nil
	}
	b.Cents = new(int64)
	return json.Unmarshal(text, b.Cents)
}

// RotateKey asks for a new secret of a key. Id, limits and spend stay.
type RotateKey struct {
	// OverlapSeconds is for how long the old secret goes on working; 0: it ends now.
	OverlapSeconds int64 `json:"overlap_seconds,omitempty"`
}

// CreatedKey is a Key and, this once, its secret.
type CreatedKey struct {
	Key
	// Secret is the whole key, "sk-ownllm-…". It is not stored and can't be shown again.
	Secret string `json:"key"`
}

// The states of an Agent.
const (
	// AgentUp takes work.
	AgentUp = "up"
	// AgentDraining finishes what it has and takes nothing new.
	AgentDraining = "draining"
	// AgentStale missed its last heartbeats.
	AgentStale = "stale"
	// AgentTunnelDown is heard of over HTTPS, and has no connection to the bus.
	AgentTunnelDown = "tunnel_down"
	// AgentOffline is silent, or said goodbye.
	AgentOffline = "offline"
)

// Agent is a GPU machine of a tenant.
type Agent struct {
	ID         schemas.AgentID  `json:"id"`
	Tenant     schemas.TenantID `json:"tenant"`
	TenantSlug string           `json:"tenant_slug,omitempty"`
	Name       string           `json:"name"`
	// Host is the machine's own name for itself.
	Host string `json:"host,omitempty"`
	// State is one of the four above.
	State string `json:"state"`
	// LastSeen is when its last heartbeat came, null if none ever did.
	LastSeen *time.Time `json:"last_seen"`
	// Running and Waiting count the jobs at the worker, with and without a slot;
	// Slots is how many it runs at once.
	Running int          `json:"running"`
	Waiting int          `json:"waiting"`
	Slots   int          `json:"slots"`
	Models  []AgentModel `json:"models"`
	// Machine is what the machine said of itself when it was paired, if it was.
	Machine *Machine `json:"machine,omitempty"`
}

// Machine is what a GPU machine is.
type Machine struct {
	// VRAMMB is the memory of all GPUs, RAMMB the machine's, in MiB; 0: unknown, or none.
	VRAMMB   int64 `json:"vram_mb"`
	RAMMB    int64 `json:"ram_mb"`
	CPUCores int   `json:"cpu_cores"`
	// GPU is the type of the GPUs; empty: unknown, or none.
	GPU string `json:"gpu"`
	OS  string `json:"os"`
}

// CreatePairing asks for a pairing key.
type CreatePairing struct {
	// Tenant is the id or slug of the tenant.
	Tenant string `json:"tenant"`
	// TTLSeconds is the lifetime of the pairing key; 7 days if none is given.
	TTLSeconds int64 `json:"ttl_seconds,omitempty"`
}

// Pairing is a pairing key: it makes one machine an agent of the tenant.
type Pairing struct {
	ID         schemas.PairingID `json:"id"`
	Tenant     schemas.TenantID  `json:"tenant"`
	TenantSlug string            `json:"tenant_slug"`
	// Secret is the key, "ownllm_pair_…". It is not stored and can't be shown again.
	Secret    string    `json:"pairing_key"`
	CreatedAt time.Time `json:"created_at"`
	ExpiresAt time.Time `json:"expires_at"`
}

// The paths, below Prefix, of what machines ask for.
const (
	PairPath      = "/agents/pair"
	HeartbeatPath = "/agents/heartbeat"
)

// PairAgent asks to become an agent.
type PairAgent struct {
	PairingKey string `json:"pairing_key"`
	// MachineIDHash is the SHA-256, in hexadecimal, of what the machine is known by.
	MachineIDHash string `json:"machine_id_hash"`
	// Name is for people.
	Name string `json:"name,omitempty"`
	// The fields of Machine.
	VRAMMB   int64  `json:"vram_mb"`
	RAMMB    int64  `json:"ram_mb"`
	CPUCores int    `json:"cpu_cores"`
	GPU      string `json:"gpu"`
	OS       string `json:"os"`
}

// PairedAgent is what a machine needs to know to serve.
type PairedAgent struct {
	Agent  schemas.AgentID  `json:"agent_id"`
	Tenant schemas.TenantID `json:"tenant_id"`
	// Credential is the agent's, "ownllm_agent_…". It is not stored and can't be had again.
	Credential string `json:"credential"`
	// NATSURL is where the bus is; absent if the edge doesn't tell.
	NATSURL string `json:"nats_url,omitempty"`
}

// HeartbeatReply says whose heartbeat was taken in.
type HeartbeatReply struct {
	Agent schemas.AgentID `json:"agent_id"`
}

// AgentModel is a model as one agent offers it.
type AgentModel struct {
	ID    string             `json:"id"`
	State schemas.ModelState `json:"state"`
	// Backend is the kind of server that has it: ollama, vllm, llamacpp, openai, demo.
	Backend       string               `json:"backend"`
	Capabilities  schemas.Capabilities `json:"capabilities"`
	ContextWindow int                  `json:"context_window"`
	SizeMB        int                  `json:"size_mb"`
	// Queued counts the jobs for this model at this agent, in flight included.
	Queued int `json:"queued"`
	// Detail says why the model is loading or failed.
	Detail string `json:"detail,omitempty"`
}

// Model is a model of a tenant, over all its agents.
type Model struct {
	ID         string           `json:"id"`
	Tenant     schemas.TenantID `json:"tenant"`
	TenantSlug string           `json:"tenant_slug,omitempty"`
	// State is the best that any agent offers.
	State         schemas.ModelState   `json:"state"`
	Capabilities  schemas.Capabilities `json:"capabilities"`
	ContextWindow int                  `json:"context_window"`
	SizeMB        int                  `json:"size_mb"`
	// Agents are those that have the model, reachable or not.
	Agents []schemas.AgentID `json:"agents"`
	// CentsPer1kTokens is the price that holds for the tenant; null: none is set, so the
	// model is free.
	CentsPer1kTokens *Cents `json:"cents_per_1k_tokens"`
}

// Price is what 1,000 tokens of a model cost, of prompt and reply alike. A model
// without one is free.
type Price struct {
	Model string `json:"model"`
	// Tenant is whose price it is; absent: that of every tenant without one of its own.
	Tenant           schemas.TenantID `json:"tenant,omitempty"`
	TenantSlug       string           `json:"tenant_slug,omitempty"`
	CentsPer1kTokens Cents            `json:"cents_per_1k_tokens"`
	UpdatedAt        time.Time        `json:"updated_at"`
}

// SetPrice sets a price. Requests in flight keep the one that they began with.
type SetPrice struct {
	Model string `json:"model"`
	// Tenant is the id or slug of a tenant; none given: every tenant without a price of
	// its own.
	Tenant string `json:"tenant,omitempty"`
	// CentsPer1kTokens must be given; 0 makes the model free.
	CentsPer1kTokens *Cents `json:"cents_per_1k_tokens"`
}

// The dimensions of usage.
const (
	ByTenant = "tenant"
	ByUser   = "user"
	ByKey    = "key"
	ByModel  = "model"
	ByDay    = "day"
)

// UsageFilter asks what was used: the query of GET /usage, as tenant, user, key, model,
// since, until and by. Empty fields are no bounds.
type UsageFilter struct {
	// Tenant is an id or slug; User an id or, if there is a tenant, an email; Key an id.
	Tenant, User, Key, Model string
	// Since and Until bound when the requests ended: from Since on, and before Until. On
	// the wire each is an RFC 3339 time, or a date, which stands for its beginning in UTC.
	Since, Until time.Time
	// By are the dimensions to sum up by, and in this order to sort by; on the wire with
	// commas in between. With none there is one row.
	By []string
}

// Usage is what was used, summed up from the ledger, which has one row for each request
// that was admitted. Of the dimensions, the row has those that were asked for.
type Usage struct {
	Tenant     schemas.TenantID `json:"tenant,omitempty"`
	TenantSlug string           `json:"tenant_slug,omitempty"`
	User       schemas.UserID   `json:"user,omitempty"`
	Email      string           `json:"email,omitempty"`
	Key        schemas.KeyID    `json:"key,omitempty"`
	KeyName    string           `json:"key_name,omitempty"`
	// KeyPrefix is the beginning of the key's present secret.
	KeyPrefix string `json:"key_prefix,omitempty"`
	Model     string `json:"model,omitempty"`
	// Day is in UTC, 2026-11-30, and that on which the requests ended.
	Day string `json:"day,omitempty"`

	Requests         int64 `json:"requests"`
	PromptTokens     int64 `json:"prompt_tokens"`
	CompletionTokens int64 `json:"completion_tokens"`
	CostCents        Cents `json:"cost_cents"`
}

// AuditEntry says that somebody changed something.
type AuditEntry struct {
	// ID rises in the order in which the changes took effect.
	ID int64     `json:"id"`
	At time.Time `json:"at"`
	// Actor is "admin" for whoever has the admin token, "agent" for a machine that was paired,
	// "system" for OwnLLM itself.
	Actor string `json:"actor"`
	// Request is the x-request-id, and Address that of the client.
	Request string `json:"request,omitempty"`
	Address string `json:"address,omitempty"`
	// Action is what was done: "tenant.create", "key.rotate".
	Action string `json:"action"`
	// Kind is the kind of the object, and Object its id, or the model of a price.
	Kind   string `json:"kind"`
	Object string `json:"object"`
	// Tenant is whose object it is; absent for a price that is everybody's.
	Tenant     schemas.TenantID `json:"tenant,omitempty"`
	TenantSlug string           `json:"tenant_slug,omitempty"`
	// Detail is an object of what was set. It never holds a secret.
	Detail json.RawMessage `json:"detail"`
}

// The states of a dependency.
const (
	DependencyOK   = "ok"
	DependencyDown = "down"
)

// Status is how an edge and all that it can see are.
type Status struct {
	// Version is the version of the edge.
	Version string `json:"version"`
	// Ready says that the edge takes requests.
	Ready bool `json:"ready"`
	// Postgres and NATS are DependencyOK or DependencyDown.
	Postgres string  `json:"postgres"`
	NATS     string  `json:"nats"`
	Agents   []Agent `json:"agents"`
}
