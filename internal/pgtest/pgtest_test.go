package pgtest

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

func TestMain(m *testing.M) { Main(m) }

func connect(t *testing.T, address string) *pgx.Conn {
	t.Helper()
	c, err := pgx.Connect(t.Context(), address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close(context.Background()) })
	return c
}

func TestNew(t *testing.T) {
	var first string
	t.Run("a database of its own", func(t *testing.T) {
		first = New(t)
		a, b := connect(t, first), connect(t, New(t))
		if _, err := a.Exec(t.Context(), `INSERT INTO tenants (id, slug, name) VALUES ('a', 'a', 'a')`); err != nil {
			t.Fatal(err)
		}
		var n int
		if err := b.QueryRow(t.Context(), `SELECT count(*) FROM tenants`).Scan(&n); err != nil || n != 0 {
			t.Errorf("tenants in the other database: %d, %v", n, err)
		}
	})
	if c, err := pgx.Connect(t.Context(), first); err == nil {
		_ = c.Close(t.Context())
		t.Error("the database outlives its test")
	}
}

func TestEmpty(t *testing.T) {
	var n int
	c := connect(t, Empty(t))
	if err := c.QueryRow(t.Context(), `SELECT count(*) FROM pg_tables WHERE schemaname = 'public'`).Scan(&n); err != nil || n != 0 {
		t.Errorf("tables: %d, %v", n, err)
	}
}

func TestSweep(t *testing.T) {
	New(t) // so that this process has a living one
	t.Setenv("TMPDIR", t.TempDir())
	dir := filepath.Join(os.TempDir(), dirPattern+"x")
	if err := os.MkdirAll(filepath.Join(dir, "postgres"), 0o700); err != nil {
		t.Fatal(err)
	}
	sweep(t.Context())
	if _, err := os.Stat(dir); err != nil {
		t.Error("a young one was removed", err)
	}
	old := time.Now().Add(-2 * timeout)
	if err := os.Chtimes(dir, old, old); err != nil {
		t.Fatal(err)
	}
	sweep(t.Context())
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Error("an old one was left", err)
	}
}

func BenchmarkNew(b *testing.B) {
	New(b)
	for b.Loop() {
		New(b)
	}
}
