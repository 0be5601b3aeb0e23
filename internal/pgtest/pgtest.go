// Package pgtest gives tests a real PostgreSQL: one private server for each test
// binary, started by the first test that asks for it, and a fresh, migrated database
// for each test. Where there is no PostgreSQL, and it can't be installed, such a test
// fails; it is never skipped.
//
// It is for tests only. The server flushes nothing to disk.
package pgtest

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/goleak"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/postgres"
)

const (
	// dirPattern is where servers have their data, below the temporary folder.
	dirPattern = "ownllm-pgtest-"
	// template is the migrated database that all others are copies of.
	template = "books_template"

	timeout = time.Minute
)

// server is the one of this process.
var server struct {
	mu      sync.Mutex
	running *postgres.Server
	dir     string
	err     error // why there is none

	databases atomic.Int64
}

// Main runs the tests of a package, stops the server, and then makes sure that no
// goroutine is left. It doesn't return. A package calls it from TestMain.
//
// m is the *testing.M, or what wraps its Run.
func Main(m goleak.TestingM, opts ...goleak.Option) {
	goleak.VerifyTestMain(tests{m}, opts...)
}

// tests are the tests of a package, and the end of the server after them.
type tests struct{ m goleak.TestingM }

// Run implements goleak.TestingM.
func (t tests) Run() int {
	code := t.m.Run()
	if err := stop(); err != nil {
		fmt.Fprintln(os.Stderr, "pgtest:", err)
		return max(code, 1)
	}
	return code
}

// New returns the address of a fresh, migrated database. It is dropped when the test
// ends, whoever is still connected.
func New(t testing.TB) string {
	t.Helper()
	return create(t, "TEMPLATE "+template)
}

// Empty returns the address of a fresh database without a schema, like New.
func Empty(t testing.TB) string {
	t.Helper()
	return create(t, "")
}

func create(t testing.TB, options string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	admin, err := start(ctx)
	if err != nil {
		t.Fatal(err)
	}
	name := "test_" + strconv.FormatInt(server.databases.Add(1), 10)
	if err := execute(ctx, admin, "CREATE DATABASE "+name+" "+options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), timeout)
		defer cancel()
		if err := execute(ctx, admin, "DROP DATABASE "+name+" WITH (FORCE)"); err != nil {
			t.Error(err)
		}
	})
	address, err := withDatabase(admin, name)
	if err != nil {
		t.Fatal(err)
	}
	return address
}

// start starts the server, unless it runs, and returns its address.
func start(ctx context.Context) (string, error) {
	server.mu.Lock()
	defer server.mu.Unlock()
	if server.running == nil && server.err == nil {
		server.err = launch(ctx)
	}
	if server.err != nil {
		return "", server.err
	}
	return server.running.URL(), nil
}

// launch starts the server and makes the template. server.mu is held.
func launch(ctx context.Context) error {
	sweep(ctx)
	dir, err := os.MkdirTemp("", dirPattern)
	if err != nil {
		return fmt.Errorf("start a postgres for tests: %w", err)
	}
	server.dir = dir
	server.running, err = postgres.Start(ctx, postgres.Config{
		DataDir:  filepath.Join(dir, "postgres"),
		NoSync:   true,
		Settings: map[string]string{"shared_buffers": "32MB", "autovacuum": "off", "max_connections": "200"},
	})
	if err != nil {
		return fmt.Errorf("start a postgres for tests: %w", err)
	}
	if err := makeTemplate(ctx, server.running.URL()); err != nil {
		return fmt.Errorf("make the template database: %w", err)
	}
	return nil
}

func makeTemplate(ctx context.Context, admin string) error {
	if err := execute(ctx, admin, "CREATE DATABASE "+template); err != nil {
		return err
	}
	address, err := withDatabase(admin, template)
	if err != nil {
		return err
	}
	store, err := books.Open(ctx, books.Config{URL: address})
	if err != nil {
		return err
	}
	defer store.Close()
	return store.Migrate(ctx)
}

// sweep removes what test binaries left that were killed. What belongs to a living
// one is locked, and stays.
func sweep(ctx context.Context) {
	old, _ := filepath.Glob(filepath.Join(os.TempDir(), dirPattern+"*")) // the pattern is well-formed
	for _, dir := range old {
		info, err := os.Stat(dir)
		if err != nil || time.Since(info.ModTime()) < timeout {
			continue // its owner may be about to lock it
		}
		// Somebody else's, or in use: then that is theirs to clean up.
		if postgres.Remove(ctx, filepath.Join(dir, "postgres")) == nil {
			_ = os.Remove(dir)
		}
	}
}

// stop stops the server and removes its data.
func stop() error {
	server.mu.Lock()
	defer server.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	var err error
	if server.running != nil {
		err = server.running.Stop(ctx)
		server.running = nil
	}
	server.err = errors.New("the tests of this package are over")
	if server.dir != "" {
		err = errors.Join(err, os.RemoveAll(server.dir))
	}
	return err
}

func execute(ctx context.Context, address, statement string) error {
	conn, err := pgx.Connect(ctx, address)
	if err != nil {
		return err
	}
	_, err = conn.Exec(ctx, statement)
	return errors.Join(err, conn.Close(ctx))
}

func withDatabase(address, name string) (string, error) {
	u, err := url.Parse(address)
	if err != nil {
		return "", err
	}
	u.Path = "/" + name
	return u.String(), nil
}
