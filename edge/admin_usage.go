package edge

import (
	"bytes"
	"context"
	"strings"
	"time"

	"github.com/gofiber/fiber/v2"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/schemas"
)

func (e *Edge) setPrice(c *fiber.Ctx) error {
	var in adminapi.SetPrice
	if err := e.read(c, &in); err != nil {
		return err
	}
	if in.CentsPer1kTokens == nil {
		return refuse("cents_per_1k_tokens", "cents_per_1k_tokens is missing: what do 1,000 tokens cost? 0 makes the model free.")
	}
	p, err := e.Books.SetPrice(c.UserContext(), in.Tenant, in.Model, int64(*in.CentsPer1kTokens))
	return sendOne(c, fiber.StatusOK, p, err, e.wirePrice(c.UserContext(), p))
}

func (e *Edge) listPrices(c *fiber.Ctx) error {
	p, err := page(c, "tenant")
	if err != nil {
		return err
	}
	list, next, err := e.Books.ListPrices(c.UserContext(), c.Query("tenant"), p)
	return sendList(c, list, next, err, e.wirePrice(c.UserContext(), list...))
}

// wirePrice returns the function that makes the wire form of some prices.
func (e *Edge) wirePrice(ctx context.Context, prices ...books.Price) func(books.Price) adminapi.Price {
	slugs := slugsOf(ctx, e, prices, func(p books.Price) schemas.TenantID { return p.Tenant })
	return func(p books.Price) adminapi.Price {
		return adminapi.Price{
			Model: p.Model, Tenant: p.Tenant, TenantSlug: slugs[p.Tenant],
			CentsPer1kTokens: adminapi.Cents(p.MicroCents), UpdatedAt: p.UpdatedAt,
		}
	}
}

func wireUsage(u books.UsageRow) adminapi.Usage {
	return adminapi.Usage{
		Tenant: u.Tenant, TenantSlug: u.TenantSlug, User: u.User, Email: u.Email,
		Key: u.Key, KeyName: u.KeyName, KeyPrefix: u.KeyPrefix, Model: u.Model, Day: u.Day,
		Requests: u.Requests, PromptTokens: u.PromptTokens, CompletionTokens: u.CompletionTokens,
		CostCents: adminapi.Cents(u.CostMicroCents),
	}
}

// usage answers with what was used: a page as JSON, or all of it as CSV.
func (e *Edge) usage(c *fiber.Ctx) error {
	p, err := page(c, "tenant", "user", "key", "model", "since", "until", "by", "format")
	if err != nil {
		return err
	}
	q := books.UsageQuery{
		Tenant: c.Query("tenant"), User: c.Query("user"), Key: schemas.KeyID(c.Query("key")), Model: c.Query("model"), Page: p,
	}
	if q.Since, err = moment(c, "since"); err != nil {
		return err
	}
	if q.Until, err = moment(c, "until"); err != nil {
		return err
	}
	if by := c.Query("by"); by != "" {
		q.By = strings.Split(by, ",")
	}
	switch format := c.Query("format"); {
	case format == "csv", format == "" && c.Accepts(fiber.MIMEApplicationJSON, mimeCSV) == mimeCSV:
		return e.usageCSV(c, q)
	case format != "" && format != "json":
		return refuse("format", "format must be json or csv.")
	}
	list, next, err := e.Books.Usage(c.UserContext(), q)
	return sendList(c, list, next, err, wireUsage)
}

// moment reads a time of the query: the zero time if it isn't given.
func moment(c *fiber.Ctx, param string) (time.Time, error) {
	text := c.Query(param)
	if text == "" {
		return time.Time{}, nil
	}
	if t, err := time.Parse(time.DateOnly, text); err == nil {
		return t, nil
	}
	t, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return time.Time{}, refuse(param, "%s must be an RFC 3339 time or a date, like 2026-11-01T18:00:00Z or 2026-11-01.", param)
	}
	return t, nil
}

const (
	mimeCSV = "text/csv"
	// csvRows bounds a CSV file, which is made in memory.
	csvRows = 100_000
	// csvPage is how many rows of it are asked for at a time.
	csvPage = 1000
)

// usageCSV sends all rows: half a file would look like a whole one.
func (e *Edge) usageCSV(c *fiber.Ctx, q books.UsageQuery) error {
	for _, param := range []string{"limit", "after"} {
		if c.Query(param) != "" {
			return refuse(param, "CSV comes as a whole, so there is no %s.", param)
		}
	}
	var rows []adminapi.Usage
	for q.Page.Limit = csvPage; ; {
		list, next, err := e.Books.Usage(c.UserContext(), q)
		if err != nil {
			return err
		}
		for _, u := range list {
			rows = append(rows, wireUsage(u))
		}
		if next == "" {
			break
		}
		if len(rows) >= csvRows {
			return refuse("by", "That is more than %d rows. Ask for fewer dimensions, or for a shorter time by since and until.", csvRows)
		}
		q.Page.After = next
	}
	var out bytes.Buffer
	if err := adminapi.WriteUsageCSV(&out, q.By, rows); err != nil {
		return err
	}
	c.Set(fiber.HeaderContentType, mimeCSV+"; charset=utf-8; header=present")
	c.Set(fiber.HeaderContentDisposition, `attachment; filename="usage.csv"`)
	return c.Send(out.Bytes())
}

func (e *Edge) listAudit(c *fiber.Ctx) error {
	p, err := page(c, "tenant")
	if err != nil {
		return err
	}
	list, next, err := e.Books.ListAudit(c.UserContext(), c.Query("tenant"), p)
	slugs := slugsOf(c.UserContext(), e, list, func(a books.AuditEntry) schemas.TenantID { return a.Tenant })
	return sendList(c, list, next, err, func(a books.AuditEntry) adminapi.AuditEntry {
		return adminapi.AuditEntry{
			ID: a.ID, At: a.At, Actor: a.Actor.Name, Request: a.Actor.Request, Address: a.Actor.Address,
			Action: a.Action, Kind: string(a.Kind), Object: a.Object, Tenant: a.Tenant, TenantSlug: slugs[a.Tenant], Detail: a.Detail,
		}
	})
}
