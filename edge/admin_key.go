package edge

import (
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"math/big"
	"strings"
	"time"

	"github.com/gofiber/fiber/v2"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/schemas"
)

func wireKey(k books.Key) adminapi.Key {
	state := adminapi.KeyActive
	switch {
	case k.RevokedAt != nil:
		state = adminapi.KeyRevoked
	case k.ExpiresAt != nil && k.ExpiresAt.Before(time.Now()):
		state = adminapi.KeyExpired
	}
	return adminapi.Key{
		ID: k.ID, Tenant: k.Tenant, TenantSlug: k.Slug, User: k.User, Email: k.Email, Name: k.Name,
		Prefix: k.Prefix, Scopes: k.Scopes, BudgetCents: k.BudgetCents, Concurrency: k.Concurrency, State: state,
		CreatedAt: k.CreatedAt, ExpiresAt: k.ExpiresAt, RevokedAt: k.RevokedAt,
	}
}

func (e *Edge) createKey(c *fiber.Ctx) error {
	var in adminapi.CreateKey
	if err := e.read(c, &in); err != nil {
		return err
	}
	if in.Scopes != nil && len(in.Scopes) == 0 {
		// Whoever sends an empty list doesn't mean everything.
		return refuse("scopes", "scopes must be at least one; leave it out, or give %s, to open every model.", books.ScopeAll)
	}
	n := books.NewKey{
		Tenant: in.Tenant, User: in.User, Name: in.Name, Scopes: in.Scopes,
		BudgetCents: in.BudgetCents, Concurrency: in.Concurrency, ExpiresAt: in.ExpiresAt, Secret: e.secretFor(c),
	}
	if in.TTLSeconds != 0 {
		ttl, err := seconds("ttl_seconds", in.TTLSeconds)
		if err != nil {
			return err
		}
		n.TTL = &ttl
	}
	k, secret, err := e.Books.CreateKey(named(c), n)
	return e.sendKey(c, fiber.StatusCreated, k, secret, err)
}

// seconds is a time that is given as a number of seconds.
func seconds(param string, n int64) (time.Duration, error) {
	d := time.Duration(n) * time.Second
	if n < 0 || d/time.Second != time.Duration(n) {
		return 0, refuse(param, "%s has to be a number of seconds from now.", param)
	}
	return d, nil
}

// secretFor returns the secret of a key that a request with an Idempotency-Key makes, or
// the zero Key for one without. Secrets aren't stored, and yet the same request has to
// get the same one again: so it is made of the request's name, in a way that takes the
// admin token to repeat.
func (e *Edge) secretFor(c *fiber.Ctx) apikey.Key {
	name := c.Get(adminapi.IdempotencyHeader)
	if name == "" {
		return apikey.Key{}
	}
	sum := e.derive("the secret of an API key", c.Path(), name)
	// A hash has 43 digits of base 62, of which the last 24 are all but equally likely to
	// be anything.
	const digits, kept = 43, 24
	text := new(big.Int).SetBytes(sum[:]).Text(62)
	text = strings.Repeat("0", digits-len(text)) + text
	secret, err := apikey.FromSecret(apikey.Begin + text[digits-kept:])
	if err != nil {
		panic("a derived secret isn't well-formed: " + err.Error())
	}
	return secret
}

// derive makes 32 bytes of texts, in a way that takes the admin token to repeat.
func (e *Edge) derive(texts ...string) (sum [sha256.Size]byte) {
	mac := hmac.New(sha256.New, []byte(e.cfg.AdminToken))
	for _, text := range texts {
		mac.Write([]byte(text))
		mac.Write([]byte{0}) // no text holds one
	}
	mac.Sum(sum[:0])
	return sum
}

// sendKey sends a key with its secret.
func (e *Edge) sendKey(c *fiber.Ctx, status int, k books.Key, secret apikey.Key, err error) error {
	var known *schemas.Error
	if derived := e.secretFor(c); errors.As(err, &known) && known.Param == "key" && !derived.IsZero() {
		if _, lookup := e.Books.LookupKey(c.UserContext(), derived.Hash()); lookup == nil {
			// The name has made a secret, so long ago that the books forgot the name.
			return refuse(adminapi.IdempotencyHeader, "This Idempotency-Key was used before. Use a new one for each request.")
		}
	}
	return sendOne(c, status, k, err, func(k books.Key) adminapi.CreatedKey {
		return adminapi.CreatedKey{Key: wireKey(k), Secret: secret.Reveal()}
	})
}

func (e *Edge) listKeys(c *fiber.Ctx) error {
	p, err := page(c, "tenant", "user")
	if err != nil {
		return err
	}
	list, next, err := e.Books.ListKeys(c.UserContext(), c.Query("tenant"), c.Query("user"), p)
	return sendList(c, list, next, err, wireKey)
}

func (e *Edge) changeKey(c *fiber.Ctx) error {
	var in adminapi.ChangeKey
	if err := e.read(c, &in); err != nil {
		return err
	}
	k, err := e.Books.SetKey(c.UserContext(), schemas.KeyID(c.Params("key")), books.KeyChange{
		Name: in.Name, Scopes: in.Scopes, Concurrency: in.Concurrency,
		BudgetCents: in.BudgetCents.Cents, NoBudget: in.BudgetCents.Given && in.BudgetCents.Cents == nil,
	})
	return sendOne(c, fiber.StatusOK, k, err, wireKey)
}

func (e *Edge) rotateKey(c *fiber.Ctx) error {
	var in adminapi.RotateKey
	if err := e.readIfAny(c, &in); err != nil {
		return err
	}
	overlap, err := seconds("overlap_seconds", in.OverlapSeconds)
	if err != nil {
		return err
	}
	k, secret, err := e.Books.RotateKey(named(c), schemas.KeyID(c.Params("key")), books.Rotation{Overlap: overlap, Secret: e.secretFor(c)})
	return e.sendKey(c, fiber.StatusOK, k, secret, err)
}

func (e *Edge) revokeKey(c *fiber.Ctx) error {
	k, err := e.Books.RevokeKey(c.UserContext(), schemas.KeyID(c.Params("key")))
	return sendOne(c, fiber.StatusOK, k, err, wireKey)
}
