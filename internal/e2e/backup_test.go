package e2e

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/internal/pgtest"
	"github.com/ownllm/ownllm/internal/postgres"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
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

// natsTool runs the nats command as the user that has JetStream. It is skipped in a short run,
// since scripts/setup has to have installed it.
func natsTool(t *testing.T, c *stack.Cluster, args ...string) {
	t.Helper()
	path := installed(t, ".venv/bin/nats")
	if _, err := os.Stat(path); err != nil {
		if testing.Short() {
			t.Skip("not in a short run: it needs what scripts/setup installs")
		}
		t.Fatalf("%v: run scripts/setup first", err)
	}
	cmd := exec.CommandContext(t.Context(), path, args...)
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir(), "NATS_URL="+c.NATSURL(), "NATS_USER="+bus.UserCore, "NATS_PASSWORD="+c.Token())
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("nats %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// TestBackupAndRestoreOfACluster does what OPERATIONS.md says of three nats-servers: streams
// and Postgres are backed up while everything runs, and put back where there is nothing, after
// all have died in the middle of their work. No request of before has an owner any more: its
// job is taken out of the queue and not run to its end, its slot and money come back, and it
// costs what its prompt does at the most. What was submitted is run, and ends once.
func TestBackupAndRestoreOfACluster(t *testing.T) {
	const running, waiting = 2, 6
	backend := stack.StartBackend(t, longDemo())
	brokerArgs := append([]string{"--queue-replicas", "3"}, chaosDeadlines...)
	old := stack.StartRouted(t, brokerArgs...)
	setPrice(t, old, demo.ModelID, books.MicroCents)
	worker := old.StartWorker(backend.URL, "--slots", fmt.Sprint(running)).Serving()
	edge := old.StartEdge(chaosDeadlines...)
	awaitModel(t, []*stack.Edge{edge}, old.Key.Reveal(), demo.ModelID)
	key, secret := newKey(t, old, books.NewKey{BudgetCents: new(int64(100_000)), Concurrency: new(running + waiting)})
	client := newClient(edge.BaseURL, secret)
	defer client.close()
	for range 3 {
		wantWhole(t, client.chat(t.Context(), true, priced(t, 10, nil)))
	}
	paid := openLedger(t, old.DatabaseURL).wantClosed(key, 10*time.Second)
	s := newSubmitter(t, old, books.NewKey{})
	s.accept("done", says("done"))
	s.done("done", "done")
	var lost sync.WaitGroup
	for range running + waiting {
		lost.Go(func() { client.chat(t.Context(), true, limited(counting(true, 1000, 20), 1000)) })
	}
	stack.Until(t, 20*time.Second, "requests to run and to wait", func() bool {
		return backend.Stats().Active == running && jobs(t, old) == running+waiting
	})
	s.accept("waits", says("waited"))

	folder := t.TempDir()
	streams := []string{schemas.UsageStream}
	for stream := range schemas.JobStreams() {
		streams = append(streams, stream)
	}
	for _, stream := range streams {
		natsTool(t, old, "backup", "stream", stream, filepath.Join(folder, stream), "--no-progress")
	}
	dump := filepath.Join(folder, "ownllm.dump")
	pgTool(t, "pg_dump", "--format=custom", "--no-owner", "--file", dump, "--dbname", old.DatabaseURL)
	for _, p := range append([]*stack.Process{edge.Process, worker.Process, old.Broker}, old.Servers...) {
		p.Kill()
	}
	lost.Wait()

	fresh := pgtest.Empty(t)
	pgTool(t, "pg_restore", "--no-owner", "--exit-on-error", "--dbname", fresh, dump)
	c := stack.RestoreRouted(t, old, fresh)
	for _, stream := range streams {
		natsTool(t, c, "backup", "restore", "stream", filepath.Join(folder, stream), "--no-progress")
	}
	if n := jobs(t, c); n < running+waiting {
		t.Errorf("%d jobs are in the restored queue, want %d at least", n, running+waiting)
	}
	c.StartBroker(brokerArgs...)
	before := backend.Stats().Tokens
	c.RestartWorker(worker.Dir, backend.URL, "--slots", fmt.Sprint(running)).Serving()
	edge = c.StartEdge(chaosDeadlines...)
	awaitModel(t, []*stack.Edge{edge}, secret, demo.ModelID)
	s.c = c
	s.done("done", "done")
	s.done("waits", "waited")
	stack.Until(t, 60*time.Second, "an empty queue", func() bool { return jobs(t, c) == 0 })
	if n := backend.Stats().Tokens - before; n > 200*(running+waiting) {
		t.Errorf("the backend has made %d tokens for requests that nobody waits for", n)
	}

	after := openLedger(t, fresh)
	client = newClient(edge.BaseURL, secret)
	defer client.close()
	wantWhole(t, client.chat(t.Context(), true, priced(t, 10, nil)))
	entries := after.wantClosed(key, 90*time.Second)
	if len(paid) != 3 || len(entries) != 3+running+waiting+1 {
		t.Errorf("the ledger had %d rows, and has %d", len(paid), len(entries))
	}
	for id, e := range paid {
		if entries[id] != e {
			t.Errorf("the ledger had %+v, and has %+v", e, entries[id])
		}
	}
	outcomes := make(map[string]int)
	for _, e := range entries {
		outcomes[e.Outcome]++
	}
	t.Logf("ends: %v; the backend made %d tokens that nobody waited for", outcomes, backend.Stats().Tokens-before)
}
