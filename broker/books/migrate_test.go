package books_test

import (
	"errors"
	"flag"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/faultproxy"
	"github.com/ownllm/ownllm/internal/pgtest"
	"github.com/ownllm/ownllm/schemas"
)

// shape is the schema as text: every column, constraint, index, storage option, sequence
// and function.
const shape = `
	SELECT coalesce(string_agg(line, E'\n' ORDER BY line COLLATE "C"), '') FROM (
		SELECT format('column %s.%s %s %s %s', table_name, column_name, data_type,
			CASE is_nullable WHEN 'YES' THEN 'NULL' ELSE 'NOT NULL' END, coalesce('DEFAULT ' || column_default, '')) AS line
		FROM information_schema.columns WHERE table_schema = 'public' AND table_name NOT LIKE 'goose%'
		UNION ALL SELECT format('constraint %s %s', conrelid::regclass, pg_get_constraintdef(oid)) FROM pg_constraint
		WHERE connamespace = 'public'::regnamespace AND conrelid::regclass::text NOT LIKE 'goose%' AND contype <> 'n'
		UNION ALL SELECT 'index ' || indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename NOT LIKE 'goose%'
		UNION ALL SELECT format('options %s %s', relname, reloptions) FROM pg_class
		WHERE relnamespace = 'public'::regnamespace AND reloptions IS NOT NULL
		UNION ALL SELECT format('sequence %s', relname) FROM pg_class
		WHERE relnamespace = 'public'::regnamespace AND relkind = 'S' AND relname NOT LIKE 'goose%'
		UNION ALL SELECT format('function %s(%s) RETURNS %s %s', proname, pg_get_function_arguments(oid), pg_get_function_result(oid), proconfig)
		FROM pg_proc WHERE pronamespace = 'public'::regnamespace
	) AS lines`

var update = flag.Bool("update", false, "write testdata/schema.txt")

// The schema is what is written down: a change of it is seen in a review.
func TestSchema(t *testing.T) {
	const file = "testdata/schema.txt"
	got, err := books.Query[string](t.Context(), open(t), shape)
	if err != nil {
		t.Fatal(err)
	}
	got += "\n"
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(got, "\n")); diff != "" {
		t.Errorf("the schema isn't that of %s (-file +schema); see -update:\n%s", file, diff)
	}
}

func TestMigrateUpDownUp(t *testing.T) {
	s := openAt(t, books.Config{URL: pgtest.Empty(t)})
	look := func() string {
		t.Helper()
		text, err := books.Query[string](t.Context(), s, shape)
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	if err := s.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	up := look()
	household(t, s, "acme")
	if err := s.Migrate(t.Context()); err != nil {
		t.Fatal("again: ", err)
	}
	if _, err := s.GetTenant(t.Context(), "acme"); err != nil {
		t.Error("migrating again lost something: ", err)
	}
	shapes := []string{up}
	for version := lastVersion - 1; version >= 0; version-- {
		if err := s.DownTo(t.Context(), version); err != nil {
			t.Fatalf("down to %d: %v", version, err)
		}
		shapes = append(shapes, look())
	}
	if down := look(); down != "" {
		t.Errorf("left after all the way down:\n%s", down)
	}
	// Each way down is the inverse of the way up.
	for version := int64(1); version <= lastVersion; version++ {
		if err := s.UpTo(t.Context(), version); err != nil {
			t.Fatalf("up to %d: %v", version, err)
		}
		if diff := cmp.Diff(strings.Split(look(), "\n"), strings.Split(shapes[lastVersion-version], "\n")); diff != "" {
			t.Errorf("version %d (-up +down):\n%s", version, diff)
		}
	}
}

// lastVersion is that of the last migration.
const lastVersion = int64(13)

// A key is the same key in either form of the schema, and there and back.
func TestMigrateSecrets(t *testing.T) {
	s := open(t)
	tenant, user := household(t, s, "acme")
	const n = 5
	var keys []books.Key
	var first, second [n]apikey.Key
	for i := range n {
		k, secret, err := s.CreateKey(t.Context(), books.NewKey{Tenant: "acme", User: user.Email, TTL: new(time.Hour)})
		if err != nil {
			t.Fatal(err)
		}
		first[i], second[i] = secret, secret
		if i%2 == 0 {
			if k, second[i], err = s.RotateKey(t.Context(), k.ID, books.Rotation{Overlap: time.Hour}); err != nil {
				t.Fatal(err)
			}
		}
		keys = append(keys, k)
	}
	check := func() {
		t.Helper()
		list, _, err := s.ListKeys(t.Context(), "acme", "", books.Page{})
		if diff := cmp.Diff(keys, list); diff != "" || err != nil {
			t.Error(err, diff)
		}
		for i, k := range keys {
			if id, err := s.LookupKey(t.Context(), second[i].Hash()); err != nil || id.Key != k.ID || id.Tenant != tenant.ID || id.Prefix != second[i].Prefix() || !id.ExpiresAt.Equal(*k.ExpiresAt) {
				t.Errorf("%+v, %v", id, err)
			}
		}
	}
	check()
	if err := s.DownTo(t.Context(), 5); err != nil {
		t.Fatal(err)
	}
	for i, k := range keys {
		hash := second[i].Hash()
		got, err := books.Query[string](t.Context(), s, `SELECT id || ' ' || prefix FROM api_keys WHERE hash = $1`, hash[:])
		if err != nil || got != string(k.ID)+" "+second[i].Prefix() {
			t.Errorf("key %s in the old form: %s, %v", k.ID, got, err)
		}
	}
	if err := s.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	check()
	// What was on its way out is out.
	_, err := s.LookupKey(t.Context(), first[0].Hash())
	wantError(t, err, schemas.CodeKeyInvalid, "")
}

func TestMigrateAtOnce(t *testing.T) {
	address := pgtest.Empty(t)
	var wg sync.WaitGroup
	for range 8 {
		s := openAt(t, books.Config{URL: address, MaxConns: 1})
		wg.Go(func() {
			if err := s.Migrate(t.Context()); err != nil {
				t.Error(err)
			}
			if _, err := s.Changes(t.Context(), -1); err != nil {
				t.Error("migrated, and yet: ", err)
			}
		})
	}
	wg.Wait()
}

func TestMigrateNewerSchema(t *testing.T) {
	s := open(t)
	if err := s.Exec(t.Context(), `INSERT INTO goose_db_version (version_id, is_applied) VALUES (999, true)`); err != nil {
		t.Fatal(err)
	}
	if err := s.Migrate(t.Context()); !errors.Is(err, books.ErrNewerSchema) {
		t.Errorf("got %v", err)
	}
	// The lock is free again.
	if err := s.Exec(t.Context(), `DELETE FROM goose_db_version WHERE version_id = 999`); err != nil {
		t.Fatal(err)
	}
	if err := s.Migrate(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestMigrateUnavailable(t *testing.T) {
	proxy := faultproxy.New(t, pgtest.New(t))
	s := openAt(t, books.Config{URL: proxy.URL()})
	proxy.Cut()
	if err := s.Migrate(t.Context()); !errors.Is(err, books.ErrUnavailable) {
		t.Errorf("got %v", err)
	}
}
