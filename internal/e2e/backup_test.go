package e2e

import (
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/pgtest"
	"github.com/ownllm/ownllm/internal/postgres"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/worker/demo"
)

// pgTool runs a program that comes with PostgreSQL.
func pgTool(t *testing.T, name string, args ...string) {
	t.Helper()
	bin, err := postgres.Find(t.Context(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), filepath.Join(bin, name), args...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
}

// TestBackupAndRestore does what OPERATIONS.md says: Postgres is dumped while everything runs,
// the folder of nats-server copied while that is stopped, and both are put back on machines
// that have nothing. Keys open what they opened, what was used and paid is there, what the dead
// held is free, and what was submitted and waited is run.
func TestBackupAndRestore(t *testing.T) {
	backend := stack.StartBackend(t, demo.Options{})
	store := t.TempDir()
	old := stack.StartClusterIn(t, store)
	setPrice(t, old, demo.ModelID, books.MicroCents)
	worker := old.StartWorker(backend.URL).Serving()
	edge := old.StartEdge()
	awaitModel(t, []*stack.Edge{edge}, old.Key.Reveal(), demo.ModelID)
	key, secret := newKey(t, old, books.NewKey{BudgetCents: new(int64(1000)), Concurrency: new(2)})
	client := newClient(edge.BaseURL, secret)
	defer client.close()
	for range 3 {
		wantWhole(t, client.chat(t.Context(), true, priced(t, 10, nil)))
	}
	before := openLedger(t, old.DatabaseURL)
	paid := before.wantClosed(key, 30*time.Second)
	s := newSubmitter(t, old, books.NewKey{})
	s.accept("done", says("done"))
	s.done("done", "done")
	if err := worker.Stop(); err != nil {
		t.Fatal(err)
	}
	s.accept("waits", says("waited"))

	dump := filepath.Join(t.TempDir(), "ownllm.dump")
	pgTool(t, "pg_dump", "--format=custom", "--no-owner", "--file", dump, "--dbname", old.DatabaseURL)
	edge.Kill()
	old.Broker.Kill()
	_ = old.NATS.Stop()
	copied := t.TempDir()
	if err := os.CopyFS(copied, os.DirFS(store)); err != nil {
		t.Fatal(err)
	}

	fresh := pgtest.Empty(t)
	pgTool(t, "pg_restore", "--no-owner", "--exit-on-error", "--dbname", fresh, dump)
	c := stack.RestoreCluster(t, old, fresh, copied)
	c.RestartWorker(worker.Dir, backend.URL).Serving()
	edge = c.StartEdge()
	awaitModel(t, []*stack.Edge{edge}, secret, demo.ModelID)
	after := openLedger(t, fresh)
	if got := after.wantClosed(key, 30*time.Second); len(got) != len(paid) || len(paid) != 3 {
		t.Errorf("the ledger had %d rows, and has %d", len(paid), len(got))
	}
	client = newClient(edge.BaseURL, secret)
	defer client.close()
	wantWhole(t, client.chat(t.Context(), true, priced(t, 10, nil)))
	if got := after.wantClosed(key, 30*time.Second); len(got) != 4 {
		t.Errorf("the ledger has %d rows after one more request", len(got))
	}
	s.c = c
	s.done("done", "done")
	s.done("waits", "waited")
	stack.Until(t, 30*time.Second, "an empty queue", func() bool { return jobs(t, c) == 0 })
}
