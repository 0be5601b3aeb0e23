package adminapi

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/ownllm/ownllm/internal/secret"
	"github.com/ownllm/ownllm/schemas"
)

const (
	callTimeout = 30 * time.Second
	maxReply    = 64 << 20
)

// pauses are between the tries of a create whose connection failed.
var pauses = []time.Duration{100 * time.Millisecond, 400 * time.Millisecond}

// Client calls the admin API of an edge. Its methods may be called from several
// goroutines. Creates and rotations carry a fresh Idempotency-Key, and are tried again
// under it if the connection fails: nothing is made twice. The errors that the methods
// return are:
//
//   - *UnreachableError: nothing answers at the address;
//   - *schemas.Error: the edge refused, with its code and message;
//   - the error of the context;
//   - any other: something answers, but not as this API does.
type Client struct {
	base  string
	token secret.String
	http  *http.Client
}

// UnreachableError says that nothing answers at the address of the API.
type UnreachableError struct {
	Address string
	Err     error
}

// Error implements error.
func (e *UnreachableError) Error() string {
	return fmt.Sprintf("can't reach the admin API at %s: %v", e.Address, e.Err)
}

// Unwrap returns what went wrong on the network.
func (e *UnreachableError) Unwrap() error { return e.Err }

// NewClient returns a client for the edge at server, "http://127.0.0.1:9191" say,
// with or without Prefix. Close it after use.
func NewClient(server string, token secret.String) (*Client, error) {
	u, err := url.Parse(server)
	if err != nil {
		return nil, fmt.Errorf("server address: %w", err)
	}
	if u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("server address %q doesn't look like https://host or http://host:port", u.Redacted())
	}
	if u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("server address %q has more than a scheme, a host and a path", u.Redacted())
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	return &Client{
		base:  strings.TrimSuffix(strings.TrimRight(u.String(), "/"), Prefix) + Prefix,
		token: token,
		http: &http.Client{
			Transport: transport,
			Timeout:   callTimeout,
			// A redirect would turn a POST into a GET; the address is to be named right.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

// Close closes the connections that are idle.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Address is the URL of the API.
func (c *Client) Address() string { return c.base }

// CreateTenant makes a tenant.
func (c *Client) CreateTenant(ctx context.Context, in CreateTenant) (Tenant, error) {
	return create[Tenant](ctx, c, "/tenants", in)
}

// ChangeTenant changes a tenant, named by id or slug.
func (c *Client) ChangeTenant(ctx context.Context, tenant string, in ChangeTenant) (Tenant, error) {
	return call[Tenant](ctx, c, http.MethodPatch, "/tenants/"+url.PathEscape(tenant), in)
}

// Tenants lists all tenants.
func (c *Client) Tenants(ctx context.Context) ([]Tenant, error) {
	return list[Tenant](ctx, c, "/tenants", nil)
}

// SuspendTenant suspends a tenant, named by id or slug.
func (c *Client) SuspendTenant(ctx context.Context, tenant string) (Tenant, error) {
	return call[Tenant](ctx, c, http.MethodPost, "/tenants/"+url.PathEscape(tenant)+"/suspend", nil)
}

// ResumeTenant ends the suspension of a tenant, named by id or slug.
func (c *Client) ResumeTenant(ctx context.Context, tenant string) (Tenant, error) {
	return call[Tenant](ctx, c, http.MethodPost, "/tenants/"+url.PathEscape(tenant)+"/resume", nil)
}

// CreateUser makes a user.
func (c *Client) CreateUser(ctx context.Context, in CreateUser) (User, error) {
	return create[User](ctx, c, "/users", in)
}

// Users lists the users of a tenant, or of all for an empty one.
func (c *Client) Users(ctx context.Context, tenant string) ([]User, error) {
	return list[User](ctx, c, "/users", filter("tenant", tenant))
}

// DeactivateUser deactivates a user.
func (c *Client) DeactivateUser(ctx context.Context, id schemas.UserID) (User, error) {
	return call[User](ctx, c, http.MethodPost, "/users/"+url.PathEscape(string(id))+"/deactivate", nil)
}

// ActivateUser activates a user again.
func (c *Client) ActivateUser(ctx context.Context, id schemas.UserID) (User, error) {
	return call[User](ctx, c, http.MethodPost, "/users/"+url.PathEscape(string(id))+"/activate", nil)
}

// CreateKey makes a key. The reply holds the secret, this once.
func (c *Client) CreateKey(ctx context.Context, in CreateKey) (CreatedKey, error) {
	return create[CreatedKey](ctx, c, "/keys", in)
}

// ChangeKey changes a key.
func (c *Client) ChangeKey(ctx context.Context, id schemas.KeyID, in ChangeKey) (Key, error) {
	return call[Key](ctx, c, http.MethodPatch, "/keys/"+url.PathEscape(string(id)), in)
}

// RotateKey gives a key a new secret. The reply holds it, this once.
func (c *Client) RotateKey(ctx context.Context, id schemas.KeyID, in RotateKey) (CreatedKey, error) {
	return create[CreatedKey](ctx, c, "/keys/"+url.PathEscape(string(id))+"/rotate", in)
}

// Keys lists the keys of a tenant and a user; empty ones stand for all.
func (c *Client) Keys(ctx context.Context, tenant, user string) ([]Key, error) {
	return list[Key](ctx, c, "/keys", filter("tenant", tenant, "user", user))
}

// RevokeKey revokes a key for good.
func (c *Client) RevokeKey(ctx context.Context, id schemas.KeyID) (Key, error) {
	return call[Key](ctx, c, http.MethodPost, "/keys/"+url.PathEscape(string(id))+"/revoke", nil)
}

// Agents lists the agents of a tenant, or of all for an empty one.
func (c *Client) Agents(ctx context.Context, tenant string) ([]Agent, error) {
	return list[Agent](ctx, c, "/agents", filter("tenant", tenant))
}

// CreatePairing makes a pairing key. The reply holds it, this once.
func (c *Client) CreatePairing(ctx context.Context, in CreatePairing) (Pairing, error) {
	return create[Pairing](ctx, c, "/agents/pairings", in)
}

// RemoveAgent removes an agent for good, and returns what it was.
func (c *Client) RemoveAgent(ctx context.Context, id schemas.AgentID) (Agent, error) {
	return call[Agent](ctx, c, http.MethodDelete, "/agents/"+url.PathEscape(string(id)), nil)
}

// PairAgent makes an agent of a machine. The client needs no token for it.
func (c *Client) PairAgent(ctx context.Context, in PairAgent) (PairedAgent, error) {
	return create[PairedAgent](ctx, c, PairPath, in)
}

// Heartbeat says how a worker is, to which no bus leads. The client's token is the agent's
// credential.
func (c *Client) Heartbeat(ctx context.Context, hb schemas.Heartbeat) (HeartbeatReply, error) {
	return call[HeartbeatReply](ctx, c, http.MethodPost, HeartbeatPath, hb)
}

// Models lists the models of a tenant, or of all for an empty one.
func (c *Client) Models(ctx context.Context, tenant string) ([]Model, error) {
	return list[Model](ctx, c, "/models", filter("tenant", tenant))
}

// SetPrice sets the price of a model.
func (c *Client) SetPrice(ctx context.Context, in SetPrice) (Price, error) {
	return call[Price](ctx, c, http.MethodPut, "/prices", in)
}

// Prices lists the prices that hold for a tenant, or all that are set for an empty one.
func (c *Client) Prices(ctx context.Context, tenant string) ([]Price, error) {
	return list[Price](ctx, c, "/prices", filter("tenant", tenant))
}

// Usage sums up what was used.
func (c *Client) Usage(ctx context.Context, f UsageFilter) ([]Usage, error) {
	moment := func(t time.Time) string {
		if t.IsZero() {
			return ""
		}
		return t.UTC().Format(time.RFC3339Nano)
	}
	return list[Usage](ctx, c, "/usage", filter(
		"tenant", f.Tenant, "user", f.User, "key", f.Key, "model", f.Model,
		"since", moment(f.Since), "until", moment(f.Until), "by", strings.Join(f.By, ","),
	))
}

// Audit lists what was changed of a tenant, or of everything for an empty one.
func (c *Client) Audit(ctx context.Context, tenant string) ([]AuditEntry, error) {
	return list[AuditEntry](ctx, c, "/audit", filter("tenant", tenant))
}

// Status asks how the edge is.
func (c *Client) Status(ctx context.Context) (Status, error) {
	return call[Status](ctx, c, http.MethodGet, "/status", nil)
}

// filter makes a query of names and values, without the empty values.
func filter(pairs ...string) url.Values {
	query := url.Values{}
	for i := 0; i < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			query.Set(pairs[i], pairs[i+1])
		}
	}
	return query
}

// list follows the pages of a list to its end.
func list[T any](ctx context.Context, c *Client, path string, query url.Values) ([]T, error) {
	if query == nil {
		query = url.Values{}
	}
	query.Set("limit", strconv.Itoa(MaxLimit))
	all := []T{}
	for after := ""; ; {
		page, err := call[List[T]](ctx, c, http.MethodGet, path+"?"+query.Encode(), nil)
		if err != nil {
			return nil, err
		}
		all = append(all, page.Data...)
		if !page.HasMore {
			return all, nil
		}
		if page.Next == "" || page.Next == after {
			return nil, fmt.Errorf("GET %s%s: the list has more, but its cursor leads nowhere", c.base, path)
		}
		after = page.Next
		query.Set("after", after)
	}
}

// create sends what makes something, under a name of its own, until an answer comes.
func create[T any](ctx context.Context, c *Client, path string, in any) (T, error) {
	name := rand.Text()
	for try := 0; ; try++ {
		out, err := do[T](ctx, c, http.MethodPost, path, name, in)
		var away *UnreachableError
		if try == len(pauses) || !errors.As(err, &away) {
			return out, err
		}
		select {
		case <-ctx.Done():
			return out, context.Cause(ctx)
		case <-time.After(pauses[try]):
		}
	}
}

func call[T any](ctx context.Context, c *Client, method, path string, in any) (T, error) {
	return do[T](ctx, c, method, path, "", in)
}

func do[T any](ctx context.Context, c *Client, method, path, name string, in any) (T, error) {
	var out, none T
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return none, fmt.Errorf("encode %s %s: %w", method, path, err)
		}
		body = bytes.NewReader(b)
	}
	request, err := http.NewRequestWithContext(ctx, method, c.base+path, body)
	if err != nil {
		return none, fmt.Errorf("%s %s: %w", method, path, err)
	}
	if c.token != "" {
		request.Header.Set("Authorization", "Bearer "+c.token.Reveal())
	}
	request.Header.Set("Accept", "application/json")
	if name != "" {
		request.Header.Set(IdempotencyHeader, name)
	}
	if in != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	reply, err := c.http.Do(request)
	if err != nil {
		return none, c.networkError(ctx, err)
	}
	defer reply.Body.Close()
	b, err := io.ReadAll(io.LimitReader(reply.Body, maxReply))
	if err != nil {
		return none, c.networkError(ctx, err)
	}
	where := method + " " + c.base + path
	if reply.StatusCode/100 != 2 {
		return none, refusal(where, reply, b)
	}
	if !isJSON(reply) {
		return none, notOurs(where, reply)
	}
	if err := json.Unmarshal(b, &out); err != nil {
		return none, fmt.Errorf("%s: reply: %w", where, err)
	}
	return out, nil
}

func (c *Client) networkError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	// The address is in the message already, and http repeats it in a *url.Error.
	if u := (*url.Error)(nil); errors.As(err, &u) {
		err = u.Err
	}
	return &UnreachableError{c.base, err}
}

// refusal makes the error of a reply that isn't a success.
func refusal(where string, reply *http.Response, body []byte) error {
	var envelope struct {
		Error *schemas.Error `json:"error"`
	}
	if !isJSON(reply) || json.Unmarshal(body, &envelope) != nil || envelope.Error == nil {
		return notOurs(where, reply)
	}
	return envelope.Error
}

// notOurs is for a reply of something that isn't an edge: a proxy, another program.
func notOurs(where string, reply *http.Response) error {
	return fmt.Errorf("%s: %s, and the reply isn't of OwnLLM: is the address right?", where, reply.Status)
}

func isJSON(reply *http.Response) bool {
	kind, _, err := mime.ParseMediaType(reply.Header.Get("Content-Type"))
	return err == nil && kind == "application/json"
}
