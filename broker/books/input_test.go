package books_test

import (
	"context"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/schemas"
)

// everything is a digest of all that is stored.
func everything(t *testing.T, s *books.Store) string {
	t.Helper()
	all := ""
	for _, table := range []string{
		"tenants", "users", "api_keys", "key_secrets", "change_counter", "changes", "model_prices", "audit", "idempotency", "ledger", "budgets", "key_accounts",
		"agents", "pairings",
	} {
		sum, err := books.Query[string](t.Context(), s, `SELECT count(*) || ' ' || coalesce(md5(string_agg(x::text, '|' ORDER BY x::text)), '') FROM `+table+` AS x`)
		if err != nil {
			t.Fatal(err)
		}
		all += table + " " + sum + "\n"
	}
	return all
}

// What can't be stored is refused by the name of its field, and nothing is written.
func TestBadInput(t *testing.T) {
	s := open(t)
	_, user := household(t, s, "acme")
	k, secret, err := s.CreateKey(t.Context(), books.NewKey{Tenant: "acme", User: user.Email})
	if err != nil {
		t.Fatal(err)
	}
	household(t, s, "other")
	if _, err := s.SetPrice(t.Context(), "", "m", 1); err != nil {
		t.Fatal(err)
	}

	tenant := func(n books.NewTenant) func(context.Context) error {
		return func(ctx context.Context) error { _, err := s.CreateTenant(ctx, n); return err }
	}
	setTenant := func(c books.TenantChange) func(context.Context) error {
		return func(ctx context.Context) error { _, err := s.SetTenant(ctx, "acme", c); return err }
	}
	person := func(tenant, email string) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := s.CreateUser(ctx, books.NewUser{Tenant: tenant, Email: email})
			return err
		}
	}
	key := func(change func(*books.NewKey)) func(context.Context) error {
		n := books.NewKey{Tenant: "acme", User: user.Email}
		change(&n)
		return func(ctx context.Context) error { _, _, err := s.CreateKey(ctx, n); return err }
	}
	setKey := func(c books.KeyChange) func(context.Context) error {
		return func(ctx context.Context) error { _, err := s.SetKey(ctx, k.ID, c); return err }
	}
	rotate := func(r books.Rotation) func(context.Context) error {
		return func(ctx context.Context) error { _, _, err := s.RotateKey(ctx, k.ID, r); return err }
	}
	price := func(tenant, model string, price int64) func(context.Context) error {
		return func(ctx context.Context) error { _, err := s.SetPrice(ctx, tenant, model, price); return err }
	}
	usage := func(q books.UsageQuery) func(context.Context) error {
		return func(ctx context.Context) error { _, _, err := s.Usage(ctx, q); return err }
	}
	named := func(name string) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := s.CreateTenant(books.WithIdempotency(ctx, name), books.NewTenant{Slug: "fresh"})
			return err
		}
	}
	now := time.Now()
	const sql = `x'); DROP TABLE tenants; --`
	none := schemas.NewKeyID()
	for name, c := range map[string]struct {
		call  func(context.Context) error
		code  schemas.Code
		param string
	}{
		"duplicate slug":            {tenant(books.NewTenant{Slug: "acme"}), schemas.CodeInvalidValue, "slug"},
		"SQL as slug":               {tenant(books.NewTenant{Slug: sql}), schemas.CodeInvalidValue, "slug"},
		"control character in name": {tenant(books.NewTenant{Slug: "x", Name: "a\x07"}), schemas.CodeInvalidValue, "name"},
		"text turned around":        {tenant(books.NewTenant{Slug: "x", Name: "a\u202eb"}), schemas.CodeInvalidValue, "name"},
		"qps of 0":                  {tenant(books.NewTenant{Slug: "x", QPS: new(0)}), schemas.CodeInvalidValue, "qps"},
		"qps that overflows":        {tenant(books.NewTenant{Slug: "x", QPS: new(math.MaxInt)}), schemas.CodeInvalidValue, "qps"},
		"set qps negative":          {setTenant(books.TenantChange{QPS: new(-1)}), schemas.CodeInvalidValue, "qps"},
		"set qps too high":          {setTenant(books.TenantChange{QPS: new(1_000_001)}), schemas.CodeInvalidValue, "qps"},
		"set qps least integer":     {setTenant(books.TenantChange{QPS: new(math.MinInt)}), schemas.CodeInvalidValue, "qps"},
		"set name with newline":     {setTenant(books.TenantChange{Name: new("a\nb"), QPS: new(5)}), schemas.CodeInvalidValue, "name"},
		"set name too long":         {setTenant(books.TenantChange{Name: new(strings.Repeat("a", 201))}), schemas.CodeInvalidValue, "name"},

		"duplicate email":        {person("acme", strings.ToUpper(user.Email)), schemas.CodeInvalidValue, "email"},
		"SQL as email":           {person("acme", sql), schemas.CodeInvalidValue, "email"},
		"NUL in email":           {person("acme", "a\x00@b.c"), schemas.CodeInvalidValue, "email"},
		"user of no tenant":      {person(sql, "a@b.c"), schemas.CodeNotFound, ""},
		"user of a NUL's tenant": {person("a\x00", "a@b.c"), schemas.CodeNotFound, ""},

		"negative budget":            {key(func(n *books.NewKey) { n.BudgetCents = new(int64(-1)) }), schemas.CodeInvalidValue, "budget_cents"},
		"budget that overflows":      {key(func(n *books.NewKey) { n.BudgetCents = new(int64(math.MaxInt64)) }), schemas.CodeInvalidValue, "budget_cents"},
		"concurrency that overflows": {key(func(n *books.NewKey) { n.Concurrency = new(math.MaxInt32 + 1) }), schemas.CodeInvalidValue, "concurrency"},
		"negative concurrency":       {key(func(n *books.NewKey) { n.Concurrency = new(-5) }), schemas.CodeInvalidValue, "concurrency"},
		"lifetime in the past":       {key(func(n *books.NewKey) { n.TTL = new(-time.Hour) }), schemas.CodeInvalidValue, "ttl_seconds"},
		"lifetime that overflows":    {key(func(n *books.NewKey) { n.TTL = new(time.Duration(math.MaxInt64)) }), schemas.CodeInvalidValue, "ttl_seconds"},
		"end in the past":            {key(func(n *books.NewKey) { n.ExpiresAt = new(now.Add(-time.Second)) }), schemas.CodeInvalidValue, "expires_at"},
		"end in the year 1":          {key(func(n *books.NewKey) { n.ExpiresAt = new(time.Time{}) }), schemas.CodeInvalidValue, "expires_at"},
		"end too far away":           {key(func(n *books.NewKey) { n.ExpiresAt = new(now.AddDate(200, 0, 0)) }), schemas.CodeInvalidValue, "expires_at"},
		"end beyond all dates":       {key(func(n *books.NewKey) { n.ExpiresAt = new(time.Unix(1<<55, 0)) }), schemas.CodeInvalidValue, "expires_at"},
		"two ends":                   {key(func(n *books.NewKey) { n.TTL, n.ExpiresAt = new(time.Hour), new(now.Add(time.Hour)) }), schemas.CodeInvalidValue, "expires_at"},
		"scope without form":         {key(func(n *books.NewKey) { n.Scopes = []string{"admin"} }), schemas.CodeInvalidValue, "scopes"},
		"scope of another form":      {key(func(n *books.NewKey) { n.Scopes = []string{"agent:x"} }), schemas.CodeInvalidValue, "scopes"},
		"scope with a pattern":       {key(func(n *books.NewKey) { n.Scopes = []string{"model:qwen*"} }), schemas.CodeInvalidValue, "scopes"},
		"scope in capitals":          {key(func(n *books.NewKey) { n.Scopes = []string{"MODEL:*"} }), schemas.CodeInvalidValue, "scopes"},
		"secret that there is":       {key(func(n *books.NewKey) { n.Secret = secret }), schemas.CodeInvalidValue, "key"},
		"control character in a key": {key(func(n *books.NewKey) { n.Name = "a\x1b[2J" }), schemas.CodeInvalidValue, "name"},
		"SQL as user":                {key(func(n *books.NewKey) { n.User = sql }), schemas.CodeNotFound, ""},
		"another tenant's user":      {key(func(n *books.NewKey) { n.Tenant = "other" }), schemas.CodeNotFound, ""},

		"set both budgets":           {setKey(books.KeyChange{BudgetCents: new(int64(1)), NoBudget: true}), schemas.CodeInvalidValue, "budget_cents"},
		"set negative budget":        {setKey(books.KeyChange{BudgetCents: new(int64(-1))}), schemas.CodeInvalidValue, "budget_cents"},
		"set budget that overflows":  {setKey(books.KeyChange{BudgetCents: new(int64(1_000_000_000_001))}), schemas.CodeInvalidValue, "budget_cents"},
		"set concurrency of 0":       {setKey(books.KeyChange{Concurrency: new(0)}), schemas.CodeInvalidValue, "concurrency"},
		"set concurrency too high":   {setKey(books.KeyChange{Name: new("fine"), Concurrency: new(1_000_001)}), schemas.CodeInvalidValue, "concurrency"},
		"set no scopes":              {setKey(books.KeyChange{Scopes: []string{}}), schemas.CodeInvalidValue, "scopes"},
		"set a scope with a pattern": {setKey(books.KeyChange{Scopes: []string{"model:*", "model:a*"}}), schemas.CodeInvalidValue, "scopes"},
		"set a name with a tab":      {setKey(books.KeyChange{Name: new("a\tb")}), schemas.CodeInvalidValue, "name"},
		"set a key that isn't": {
			func(ctx context.Context) error {
				_, err := s.SetKey(ctx, none, books.KeyChange{Name: new("x")})
				return err
			}, schemas.CodeNotFound, "",
		},
		"set by secret": {
			func(ctx context.Context) error {
				_, err := s.SetKey(ctx, schemas.KeyID(secret.Reveal()), books.KeyChange{})
				return err
			}, schemas.CodeNotFound, "",
		},

		"negative overlap":   {rotate(books.Rotation{Overlap: -time.Second}), schemas.CodeInvalidValue, "overlap_seconds"},
		"overlap of 2 years": {rotate(books.Rotation{Overlap: 2 * 365 * 24 * time.Hour}), schemas.CodeInvalidValue, "overlap_seconds"},
		"rotate to the same": {rotate(books.Rotation{Secret: secret}), schemas.CodeInvalidValue, "key"},
		"rotate by secret": {
			func(ctx context.Context) error {
				_, _, err := s.RotateKey(ctx, schemas.KeyID(secret.Reveal()), books.Rotation{})
				return err
			}, schemas.CodeNotFound, "",
		},
		"rotate a key that isn't": {
			func(ctx context.Context) error {
				_, _, err := s.RotateKey(ctx, none, books.Rotation{})
				return err
			}, schemas.CodeNotFound, "",
		},

		"negative price":       {price("", "m", -1), schemas.CodeInvalidValue, "cents_per_1k_tokens"},
		"price too high":       {price("", "m", books.MaxPrice+1), schemas.CodeInvalidValue, "cents_per_1k_tokens"},
		"price of no model":    {price("", "", 1), schemas.CodeInvalidValue, "model"},
		"price of a NUL":       {price("", "a\x00", 1), schemas.CodeInvalidValue, "model"},
		"price of no tenant":   {price("nobody", "m", 1), schemas.CodeNotFound, ""},
		"price of a bad text":  {price("acme", "\xff", 1), schemas.CodeInvalidValue, "model"},
		"price of a long name": {price("acme", strings.Repeat("m", 257), 1), schemas.CodeInvalidValue, "model"},

		"name with a newline": {named("a\nb"), schemas.CodeInvalidValue, "Idempotency-Key"},
		"name too long":       {named(strings.Repeat("a", 256)), schemas.CodeInvalidValue, "Idempotency-Key"},
		"name not UTF-8":      {named("\xff"), schemas.CodeInvalidValue, "Idempotency-Key"},

		"usage by nothing known":   {usage(books.UsageQuery{By: []string{"hour"}}), schemas.CodeInvalidValue, "by"},
		"usage by SQL":             {usage(books.UsageQuery{By: []string{sql}}), schemas.CodeInvalidValue, "by"},
		"usage by the same twice":  {usage(books.UsageQuery{By: []string{"day", "day"}}), schemas.CodeInvalidValue, "by"},
		"usage of no tenant":       {usage(books.UsageQuery{Tenant: sql}), schemas.CodeNotFound, ""},
		"usage of nobody":          {usage(books.UsageQuery{Tenant: "acme", User: sql}), schemas.CodeNotFound, ""},
		"usage of an address":      {usage(books.UsageQuery{User: user.Email}), schemas.CodeInvalidValue, "user"},
		"usage of another's user":  {usage(books.UsageQuery{Tenant: "other", User: string(user.ID)}), schemas.CodeNotFound, ""},
		"usage of another's key":   {usage(books.UsageQuery{Tenant: "other", Key: k.ID}), schemas.CodeNotFound, ""},
		"usage of no key":          {usage(books.UsageQuery{Key: none}), schemas.CodeNotFound, ""},
		"usage of a secret":        {usage(books.UsageQuery{Key: schemas.KeyID(secret.Reveal())}), schemas.CodeNotFound, ""},
		"usage of a NUL":           {usage(books.UsageQuery{Model: "a\x00"}), schemas.CodeInvalidValue, "model"},
		"usage since the year 0":   {usage(books.UsageQuery{Since: time.Date(0, 1, 1, 0, 0, 0, 0, time.UTC)}), schemas.CodeInvalidValue, "since"},
		"usage until the year 1e5": {usage(books.UsageQuery{Until: time.Date(100_000, 1, 1, 0, 0, 0, 0, time.UTC)}), schemas.CodeInvalidValue, "until"},
		"usage backwards":          {usage(books.UsageQuery{Since: now, Until: now.Add(-1)}), schemas.CodeInvalidValue, "until"},
		"usage with a bad page":    {usage(books.UsageQuery{Page: books.Page{Limit: -1}}), schemas.CodeInvalidValue, "limit"},
		"usage with a large page":  {usage(books.UsageQuery{Page: books.Page{Limit: 1001}}), schemas.CodeInvalidValue, "limit"},
		"usage after SQL":          {usage(books.UsageQuery{By: []string{"day"}, Page: books.Page{After: sql}}), schemas.CodeInvalidValue, "after"},
		"usage after too few":      {usage(books.UsageQuery{By: []string{"day", "model"}, Page: books.Page{After: "WyJhIl0"}}), schemas.CodeInvalidValue, "after"},
		"usage after a NUL":        {usage(books.UsageQuery{By: []string{"model"}, Page: books.Page{After: "WyJcdTAwMDAiXQ"}}), schemas.CodeInvalidValue, "after"},
		"total after something":    {usage(books.UsageQuery{Page: books.Page{After: "WyJhIl0"}}), schemas.CodeInvalidValue, "after"},
		"audit of no tenant":       {func(ctx context.Context) error { _, _, err := s.ListAudit(ctx, sql, books.Page{}); return err }, schemas.CodeNotFound, ""},
		"audit after SQL":          {func(ctx context.Context) error { _, _, err := s.ListAudit(ctx, "", books.Page{After: sql}); return err }, schemas.CodeInvalidValue, "after"},
		"audit after less than 0": {func(ctx context.Context) error {
			_, _, err := s.ListAudit(ctx, "", books.Page{After: "-1"})
			return err
		}, schemas.CodeInvalidValue, "after"},
		"audit after an overflow": {func(ctx context.Context) error {
			_, _, err := s.ListAudit(ctx, "", books.Page{After: "9223372036854775808"})
			return err
		}, schemas.CodeInvalidValue, "after"},
		"audit with a bad page": {func(ctx context.Context) error {
			_, _, err := s.ListAudit(ctx, "", books.Page{Limit: 1001})
			return err
		}, schemas.CodeInvalidValue, "limit"},
		"prices after SQL": {func(ctx context.Context) error {
			_, _, err := s.ListPrices(ctx, "", books.Page{After: sql})
			return err
		}, schemas.CodeInvalidValue, "after"},
		"prices with a bad page":   {func(ctx context.Context) error { _, _, err := s.ListPrices(ctx, "", books.Page{Limit: -1}); return err }, schemas.CodeInvalidValue, "limit"},
		"prices of no tenant":      {func(ctx context.Context) error { _, _, err := s.ListPrices(ctx, "nobody", books.Page{}); return err }, schemas.CodeNotFound, ""},
		"state of nothing known":   {func(ctx context.Context) error { _, err := s.SetTenantState(ctx, "acme", "gone"); return err }, schemas.CodeInvalidValue, "state"},
		"state of an unknown user": {func(ctx context.Context) error { _, err := s.SetUserState(ctx, sql, books.UserActive); return err }, schemas.CodeNotFound, ""},
		"set a tenant that isn't":  {func(ctx context.Context) error { _, err := s.SetTenant(ctx, sql, books.TenantChange{}); return err }, schemas.CodeNotFound, ""},
		"set a tenant of a NUL":    {func(ctx context.Context) error { _, err := s.SetTenant(ctx, "a\x00", books.TenantChange{}); return err }, schemas.CodeNotFound, ""},
		"revoke a key that isn't":  {func(ctx context.Context) error { _, err := s.RevokeKey(ctx, none); return err }, schemas.CodeNotFound, ""},
		"revoke a key by its SQL":  {func(ctx context.Context) error { _, err := s.RevokeKey(ctx, sql); return err }, schemas.CodeNotFound, ""},
		"revoke a key by its name": {func(ctx context.Context) error { _, err := s.RevokeKey(ctx, schemas.KeyID(k.Prefix)); return err }, schemas.CodeNotFound, ""},
		"rotate a key by its email": {func(ctx context.Context) error {
			_, _, err := s.RotateKey(ctx, schemas.KeyID(user.Email), books.Rotation{})
			return err
		}, schemas.CodeNotFound, ""},
	} {
		t.Run(name, func(t *testing.T) {
			before := everything(t, s)
			for _, ctx := range []context.Context{t.Context(), books.WithIdempotency(t.Context(), "of a failure")} {
				err := c.call(ctx)
				wantError(t, err, c.code, c.param)
				if err != nil && strings.Contains(err.Error(), secret.Reveal()) {
					t.Error("the error repeats a secret")
				}
			}
			if after := everything(t, s); after != before {
				t.Errorf("something was written:\n%s", after)
			}
		})
	}
}

// SQL in a name is text like any other.
func TestSQLIsText(t *testing.T) {
	s := open(t)
	const sql = `Robert'); DROP TABLE api_keys; -- \ " $1 %s 'quoted'`
	household(t, s, "acme")
	if tenant, err := s.SetTenant(t.Context(), "acme", books.TenantChange{Name: new(sql)}); err != nil || tenant.Name != sql {
		t.Errorf("%+v, %v", tenant, err)
	}
	user, err := s.CreateUser(t.Context(), books.NewUser{Tenant: "acme", Email: "o'neil--x$1@acme.example"})
	if err != nil {
		t.Fatal(err)
	}
	k, _, err := s.CreateKey(books.WithIdempotency(t.Context(), sql), books.NewKey{
		Tenant: "acme", User: user.Email, Name: sql, Scopes: []string{"model:" + sql}, Secret: apikey.New(),
	})
	if err != nil || k.Name != sql || k.Scopes[0] != "model:"+sql {
		t.Errorf("%+v, %v", k, err)
	}
	if k, err = s.SetKey(t.Context(), k.ID, books.KeyChange{Name: new(sql + "'")}); err != nil || k.Name != sql+"'" {
		t.Errorf("%+v, %v", k, err)
	}
	if p, err := s.SetPrice(t.Context(), "acme", sql, 3); err != nil || p.Model != sql {
		t.Errorf("%+v, %v", p, err)
	}
	if _, _, err := s.Usage(t.Context(), books.UsageQuery{Tenant: "acme", Model: sql, By: []string{"model"}}); err != nil {
		t.Error(err)
	}
	ctx := books.WithActor(t.Context(), books.Actor{Name: sql, Request: "a\x00\x1b[31mb\xffc\u202e" + sql, Address: strings.Repeat("é", 150)})
	if _, err := s.SetTenantState(ctx, "acme", books.TenantSuspended); err != nil {
		t.Fatal(err)
	}
	list := audits(t, s, "acme")
	last := list[len(list)-1]
	if want := (books.Actor{Name: sql, Request: "a[31mbc" + sql, Address: strings.Repeat("é", 100)}); last.Actor != want {
		t.Errorf("actor %+v", last.Actor)
	}
	if keys, _, err := s.ListKeys(t.Context(), "acme", user.Email, books.Page{}); err != nil || len(keys) != 1 || keys[0].Name != sql+"'" {
		t.Errorf("%+v, %v", keys, err)
	}
}
