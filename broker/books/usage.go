package books

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/ownllm/ownllm/schemas"
)

// usagePatience is how many times the timeout of other calls a sum over the ledger may
// take.
const usagePatience = 6

// UsageQuery asks what was used.
type UsageQuery struct {
	// Tenant, User, Key and Model cut it down to what they name, if they aren't empty:
	// a tenant by id or slug, a user by id or, if there is a tenant too, e-mail address.
	Tenant, User string
	Key          schemas.KeyID
	Model        string
	// Since and Until bound when the requests were settled: from Since on, and before
	// Until. A zero time is no bound.
	Since, Until time.Time
	// By are the dimensions to sum up by, and in this order to sort by: "tenant",
	// "user", "key", "model" and "day", each at most once. With none there is one row.
	By []string
	// Page.After is the cursor that came with the page before of the same query.
	Page Page
}

// UsageRow is what was used, with one set of values of the dimensions that were asked
// for. The others are empty.
type UsageRow struct {
	Tenant     schemas.TenantID `json:"tenant_id,omitempty"`
	TenantSlug string           `json:"tenant_slug,omitempty"`
	User       schemas.UserID   `json:"user_id,omitempty"`
	Email      string           `json:"email,omitempty"`
	Key        schemas.KeyID    `json:"key_id,omitempty"`
	KeyName    string           `json:"key_name,omitempty"`
	KeyPrefix  string           `json:"key_prefix,omitempty"`
	Model      string           `json:"model,omitempty"`
	// Day is when the requests were settled, in UTC: 2026-11-30.
	Day string `json:"day,omitempty"`

	// Requests are all that have a row in the ledger, however they ended.
	Requests         int64 `json:"requests"`
	PromptTokens     int64 `json:"prompt_tokens"`
	CompletionTokens int64 `json:"completion_tokens"`
	CostMicroCents   int64 `json:"cost_micro_cents"`
}

// dimension is something to sum up by.
type dimension struct {
	name, column string
	value        func(UsageRow) string
}

// dimensions are all of them, in the order in which the query lists them.
var dimensions = []dimension{
	{"tenant", `l.tenant_id`, func(r UsageRow) string { return string(r.Tenant) }},
	{"user", `l.user_id`, func(r UsageRow) string { return string(r.User) }},
	{"key", `l.key_id`, func(r UsageRow) string { return string(r.Key) }},
	{"model", `l.model`, func(r UsageRow) string { return r.Model }},
	{"day", `to_char(l.at AT TIME ZONE 'UTC', 'YYYY-MM-DD') COLLATE "C"`, func(r UsageRow) string { return r.Day }},
}

// by returns the dimensions that the query names.
func (q UsageQuery) by() (list []dimension, err error) {
	for i, name := range q.By {
		at := slices.IndexFunc(dimensions, func(d dimension) bool { return d.name == name })
		if at < 0 || slices.Contains(q.By[:i], name) {
			return nil, invalid("by", "by must be any of tenant, user, key, model and day, each once.")
		}
		list = append(list, dimensions[at])
	}
	return list, nil
}

// inYears reports whether the database knows the time, if it isn't zero.
func inYears(t time.Time) bool { return t.IsZero() || t.Year() >= 1 && t.Year() <= 9999 }

func (q UsageQuery) check() error {
	switch {
	case q.Model != "" && !validModel(q.Model):
		return invalid("model", "A model's id must have 1 to %d bytes, without control characters or spaces at its ends.", maxModel)
	case !inYears(q.Since):
		return invalid("since", "since must lie in the years 1 to 9999.")
	case !inYears(q.Until):
		return invalid("until", "until must lie in the years 1 to 9999.")
	case !q.Since.IsZero() && !q.Until.IsZero() && q.Until.Before(q.Since):
		return invalid("until", "until must not lie before since.")
	}
	return nil
}

// where collects conditions and their arguments.
type where struct {
	conditions []string
	args       []any
}

func (w *where) and(format string, args ...any) {
	places := make([]any, len(args))
	for i, arg := range args {
		w.args = append(w.args, arg)
		places[i] = fmt.Sprintf("$%d", len(w.args))
	}
	w.conditions = append(w.conditions, fmt.Sprintf(format, places...))
}

// filter turns what the query names into conditions.
func (q UsageQuery) filter(ctx context.Context, db querier) (w where, err error) {
	w.and(`true`)
	tenant := schemas.TenantID("")
	if q.Tenant != "" {
		t, err := getTenant(ctx, db, q.Tenant)
		if err != nil {
			return where{}, err
		}
		tenant = t.ID
	}
	if q.User != "" {
		u, err := userNamed(ctx, db, tenant, q.User)
		if err != nil {
			return where{}, err
		}
		tenant = u.Tenant // its index is of use
		w.and(`l.user_id = %s`, u.ID)
	}
	if q.Key != "" {
		k, err := getKey(ctx, db, q.Key)
		if err == nil && tenant != "" && k.Tenant != tenant {
			err = notFound("key", string(q.Key))
		}
		if err != nil {
			return where{}, err
		}
		w.and(`l.key_id = %s`, k.ID)
	}
	if tenant != "" {
		w.and(`l.tenant_id = %s`, tenant)
	}
	if q.Model != "" {
		w.and(`l.model = %s`, q.Model)
	}
	if !q.Since.IsZero() {
		w.and(`l.at >= %s`, q.Since)
	}
	if !q.Until.IsZero() {
		w.and(`l.at < %s`, q.Until)
	}
	return w, nil
}

// Usage sums up the ledger, and returns a page of the rows and the cursor of the next
// page. Sums that no bigint holds are the largest that one does.
func (s *Store) Usage(ctx context.Context, q UsageQuery) (list []UsageRow, next string, err error) {
	limit, err := q.Page.limit()
	if err != nil {
		return nil, "", err
	}
	by, err := q.by()
	if err != nil {
		return nil, "", err
	}
	if err := q.check(); err != nil {
		return nil, "", err
	}
	after, err := openCursor(q.Page.After, len(by))
	if err != nil {
		return nil, "", err
	}
	err = s.readFor(ctx, usagePatience*s.timeout, "sum up the usage", func(ctx context.Context) error {
		w, err := q.filter(ctx, s.pool)
		if err != nil {
			return err
		}
		rows, err := s.pool.Query(ctx, usageQuery(by, after, &w, limit), w.args...)
		if err != nil {
			return err
		}
		list, err = pgx.CollectRows(rows, pgx.RowToStructByPos[UsageRow])
		return err
	})
	if err != nil {
		return nil, "", err
	}
	list, next = cut(list, limit, func(r UsageRow) string {
		values := make([]string, len(by))
		for i, d := range by {
			values[i] = d.value(r)
		}
		return cursor(values...)
	})
	return list, next, nil
}

// usageQuery returns the query, and adds to w what is left of its arguments.
func usageQuery(by []dimension, after []string, w *where, limit int) string {
	var columns, group, order []string
	for _, d := range dimensions {
		if slices.ContainsFunc(by, func(b dimension) bool { return b.name == d.name }) {
			columns = append(columns, fmt.Sprintf(`%s AS "%s"`, d.column, d.name))
		} else {
			columns = append(columns, fmt.Sprintf(`'' AS "%s"`, d.name))
		}
	}
	for _, d := range by {
		group, order = append(group, d.column), append(order, `"`+d.name+`"`)
	}
	if len(after) > 0 {
		values := make([]any, len(after))
		for i, v := range after {
			values[i] = v
		}
		w.and(`(`+strings.Join(group, ", ")+`) > (%s`+strings.Repeat(`, %s`, len(after)-1)+`)`, values...)
	}
	grouped, sorted := "", ""
	if len(by) > 0 {
		grouped = ` GROUP BY ` + strings.Join(group, ", ") + ` ORDER BY ` + strings.Join(order, ", ")
		sorted = ` ORDER BY ` + strings.Join(order, ", ")
	}
	const most = `9223372036854775807`
	w.args = append(w.args, limit)
	return fmt.Sprintf(`
		SELECT "tenant", coalesce(t.slug, ''), "user", coalesce(u.email, ''), "key", coalesce(k.name, ''), coalesce(p.prefix, ''), "model", "day",
			requests, prompt_tokens, completion_tokens, cost
		FROM (
			SELECT %[1]s, count(*) AS requests, least(coalesce(sum(prompt_tokens), 0), %[2]s)::bigint AS prompt_tokens,
				least(coalesce(sum(completion_tokens), 0), %[2]s)::bigint AS completion_tokens, least(coalesce(sum(cost), 0), %[2]s)::bigint AS cost
			FROM ledger l WHERE %[3]s%[4]s LIMIT $%[5]d
		) AS x
		LEFT JOIN tenants t ON t.id = "tenant"
		LEFT JOIN users u ON u.id = "user"
		LEFT JOIN api_keys k ON k.id = "key"
		LEFT JOIN key_secrets p ON p.key_id = "key" AND p.expires_at IS NULL%[6]s`,
		strings.Join(columns, ", "), most, strings.Join(w.conditions, " AND "), grouped, len(w.args), sorted)
}
