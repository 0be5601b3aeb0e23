// Package adminapi is the admin HTTP API of an edge: its wire types, its paths, and
// a client. The edge serves these types, the command line and the tests call them.
//
//	POST /api/v1/tenants                    CreateTenant → Tenant
//	GET  /api/v1/tenants                    → List[Tenant]
//	POST /api/v1/tenants/{tenant}/suspend   → Tenant
//	POST /api/v1/tenants/{tenant}/resume    → Tenant
//	POST /api/v1/users                      CreateUser → User
//	GET  /api/v1/users?tenant=              → List[User]
//	POST /api/v1/users/{id}/deactivate      → User
//	POST /api/v1/users/{id}/activate        → User
//	POST /api/v1/keys                       CreateKey → CreatedKey
//	GET  /api/v1/keys?tenant=&user=         → List[Key]
//	POST /api/v1/keys/{id}/revoke           → Key
//	GET  /api/v1/agents?tenant=             → List[Agent]
//	GET  /api/v1/models?tenant=             → List[Model]
//	GET  /api/v1/status                     → Status
//
// Every request carries "Authorization: Bearer <admin token>". Wherever a tenant is
// asked for, its id and its slug will do. What creates answers 201, all else 200;
// every failure is the OpenAI error envelope with a code of the contract: not_found
// for an object that isn't there, invalid_value with its param for a field that is
// wrong, key_invalid for a wrong admin token. To suspend, resume, deactivate,
// activate or revoke what already is so is no error.
//
// Lists are pages, oldest first: ?limit= (1 to MaxLimit, default DefaultLimit) and
// ?after= with the next of the page before.
//
// The names are stable: fields may be added, so a client ignores what it doesn't
// know.
package adminapi

import (
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
	// State is TenantActive or TenantSuspended; the keys of a suspended tenant get
	// tenant_disabled.
	State     string    `json:"state"`
	CreatedAt time.Time `json:"created_at"`
}

// CreateTenant asks for a tenant.
type CreateTenant struct {
	Slug string `json:"slug"`
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
	// TTLSeconds is the lifetime of the key; 0: no end.
	TTLSeconds int64 `json:"ttl_seconds,omitempty"`
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
