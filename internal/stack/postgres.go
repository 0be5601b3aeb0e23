package stack

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/faultproxy"
	"github.com/ownllm/ownllm/internal/postgres"
)

// Postgres is a PostgreSQL server for one test alone, which can be stopped and started
// again under the same address.
type Postgres struct {
	t       testing.TB
	cfg     postgres.Config
	server  *postgres.Server // nil: it is stopped
	proxy   *faultproxy.Proxy
	Address string // of a migrated database
}

// StartPostgres starts a server, which gives what it commits to the kernel and no further.
// It ends with the test.
func StartPostgres(t testing.TB) *Postgres {
	t.Helper()
	return startPostgres(t, t.TempDir(), true)
}

// StartPostgresIn is StartPostgres with the data in a folder of the caller's.
func StartPostgresIn(t testing.TB, dir string) *Postgres {
	t.Helper()
	return startPostgres(t, dir, true)
}

// StartMortalPostgres starts a server that flushes what it commits to the disk.
func StartMortalPostgres(t testing.TB) *Postgres {
	t.Helper()
	return startPostgres(t, t.TempDir(), false)
}

func startPostgres(t testing.TB, dir string, noSync bool) *Postgres {
	t.Helper()
	p := &Postgres{t: t, cfg: postgres.Config{
		DataDir: filepath.Join(dir, "postgres"), NoSync: noSync,
		// What is committed has to outlive Kill.
		Settings: map[string]string{"shared_buffers": "32MB", "max_connections": "200", "synchronous_commit": "on"},
	}}
	t.Cleanup(func() {
		if p.server != nil {
			p.Stop()
		}
	})
	p.Start()
	store, err := books.Open(t.Context(), books.Config{URL: p.Address})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	if err := store.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	return p
}

// Start starts the server, with the data that it had.
func (p *Postgres) Start() {
	p.t.Helper()
	var err error
	if p.server, err = postgres.Start(p.t.Context(), p.cfg); err != nil {
		p.t.Fatal(err)
	}
	// It listens on another port each time.
	if p.proxy == nil {
		p.proxy = faultproxy.New(p.t, p.server.URL())
		p.Address = p.proxy.URL()
		return
	}
	p.proxy.Aim(p.t, p.server.URL())
	p.proxy.Restore()
}

// Stop shuts the server down. It ends every connection.
func (p *Postgres) Stop() {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), stopWait)
	defer cancel()
	if err := p.server.Stop(ctx); err != nil {
		p.t.Error(err)
	}
	p.server = nil
	p.proxy.Cut()
}

// Ended reports whether the server has ended by itself.
func (p *Postgres) Ended() bool {
	select {
	case <-p.server.Done():
		return true
	default:
		return false
	}
}

// Kill ends the server by SIGKILL, if it hasn't ended by itself, and with it every
// connection. It ends the server process itself; the others of the cluster see that and go.
func (p *Postgres) Kill() {
	p.t.Helper()
	alive := !p.Ended()
	if alive {
		p.kill()
	}
	ctx, cancel := context.WithTimeout(context.Background(), stopWait)
	defer cancel()
	if err := p.server.Stop(ctx); err == nil && alive { // which gives the data back
		p.t.Error("a server that was killed has ended in an orderly way")
	}
	p.server = nil
	p.proxy.Cut()
}

func (p *Postgres) kill() {
	p.t.Helper()
	files, err := filepath.Glob(filepath.Join(p.cfg.DataDir, "*", "postmaster.pid"))
	if err != nil || len(files) != 1 {
		p.t.Fatalf("the server has %q, %v", files, err)
	}
	text, err := os.ReadFile(files[0])
	if err != nil {
		p.t.Fatal(err)
	}
	line, _, _ := strings.Cut(string(text), "\n")
	pid, err := strconv.Atoi(line)
	if err != nil || pid <= 1 {
		p.t.Fatalf("the server has process id %q", line)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		p.t.Fatal(err)
	}
}
