package edge

import (
	"strconv"
	"time"

	"github.com/gofiber/fiber/v2"
)

// The headers that tell where a key stands.
const (
	headerLimitRequests     = "X-RateLimit-Limit-Requests"
	headerRemainingRequests = "X-RateLimit-Remaining-Requests"
	headerResetRequests     = "X-RateLimit-Reset-Requests"
	headerLimitTokens       = "X-RateLimit-Limit-Tokens-Monthly"
	headerRemainingTokens   = "X-RateLimit-Remaining-Tokens-Monthly"
)

// tellLimits tells a client where its key stands, once the key is known: how many
// requests may be in flight, how many more, and when it is worth while to try again, in
// Unix seconds; and, if the key has a budget and the model a price, how many tokens of
// that model the budget pays for in a month, and how many are left. It does so once.
func (e *Edge) tellLimits(c *fiber.Ctx, in *call) {
	if in.identity.Key == "" || len(c.Response().Header.Peek(headerLimitRequests)) > 0 {
		return
	}
	rate := in.rate
	if !rate.Known {
		rate = e.Gate.Rate(c.UserContext(), in.identity.Key, in.model)
	}
	if !rate.Known {
		c.Set(headerLimitRequests, strconv.Itoa(in.identity.Concurrency))
		return
	}
	reset := time.Now()
	if rate.RequestsLeft == 0 {
		reset = reset.Add(time.Second)
	}
	c.Set(headerLimitRequests, strconv.Itoa(rate.Requests))
	c.Set(headerRemainingRequests, strconv.Itoa(rate.RequestsLeft))
	c.Set(headerResetRequests, strconv.FormatInt(reset.Unix(), 10))
	if rate.HasBudget {
		c.Set(headerLimitTokens, strconv.FormatInt(rate.Tokens, 10))
		c.Set(headerRemainingTokens, strconv.FormatInt(rate.TokensLeft, 10))
	}
}
