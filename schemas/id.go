package schemas

import (
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"strings"

	"github.com/oklog/ulid/v2"
)

// Identifiers are a prefix and a ULID: they sort by the time they were made, and
// one can't be taken for another.
type (
	// TenantID names a tenant ("ten_…").
	TenantID string
	// UserID names a user of a tenant ("usr_…").
	UserID string
	// KeyID names an API key ("key_…"); it is not secret.
	KeyID string
	// AgentID names a paired GPU machine ("agt_…").
	AgentID string
	// PairingID names a pairing key ("pai_…"); it is not secret.
	PairingID string
	// RequestID names a request ("req_…"); it is the x-request-id.
	RequestID string
	// OwnerID names one run of an edge or broker process ("own_…").
	OwnerID string
	// Incarnation names one run of a worker process ("inc_…"); a later one sorts
	// after an earlier one.
	Incarnation string
	// Nonce names one attempt of a request on the bus: 128 random bits that nobody
	// can guess.
	Nonce string
)

func newID(prefix string) string { return prefix + ulid.Make().String() }

// NewTenantID returns a fresh TenantID.
func NewTenantID() TenantID { return TenantID(newID("ten_")) }

// NewUserID returns a fresh UserID.
func NewUserID() UserID { return UserID(newID("usr_")) }

// NewKeyID returns a fresh KeyID.
func NewKeyID() KeyID { return KeyID(newID("key_")) }

// NewAgentID returns a fresh AgentID.
func NewAgentID() AgentID { return AgentID(newID("agt_")) }

// NewPairingID returns a fresh PairingID.
func NewPairingID() PairingID { return PairingID(newID("pai_")) }

// NewRequestID returns a fresh RequestID.
func NewRequestID() RequestID { return RequestID(newID("req_")) }

// NewOwnerID returns a fresh OwnerID.
func NewOwnerID() OwnerID { return OwnerID(newID("own_")) }

// NewIncarnation returns a fresh Incarnation.
func NewIncarnation() Incarnation { return Incarnation(newID("inc_")) }

// CompletionID returns the id that the client sees on every chunk of a reply. It
// is derived from the request's, so that one leads to the other.
func (id RequestID) CompletionID() string {
	return "chatcmpl-" + strings.TrimPrefix(string(id), "req_")
}

// NewNonce returns a fresh Nonce of 22 characters that are safe in a subject.
func NewNonce() Nonce {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails, see crypto/rand
	return Nonce(base64.RawURLEncoding.EncodeToString(b[:]))
}

// ValidateID checks the shape of an identifier with the given prefix ("ten_").
func ValidateID(id, prefix string) error {
	rest, ok := strings.CutPrefix(id, prefix)
	if !ok {
		return fmt.Errorf("id %q doesn't begin with %q", id, prefix)
	}
	if _, err := ulid.ParseStrict(rest); err != nil {
		return fmt.Errorf("id %q: %w", id, err)
	}
	return nil
}
