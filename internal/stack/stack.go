// Package stack runs OwnLLM as its users do, from the built binary, for tests that
// look at it from outside: all in one process, or each role in a process of its own
// against a real nats-server and a real PostgreSQL.
//
// It is for tests only. Every process ends with the test.
package stack

import (
	"bufio"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/internal/port"
)

// startWait bounds how long a process may take to be ready, and stopWait how long to
// end after a signal.
const (
	startWait = 60 * time.Second
	stopWait  = 45 * time.Second
	lookEvery = 20 * time.Millisecond
)

// built are the binaries of this test process, by their names.
var built struct {
	mu   sync.Mutex
	dir  string
	path map[string]string
}

// Binary builds the main package with the given import path, once, and returns the
// path of the binary.
func Binary(t testing.TB, pkg string) string {
	t.Helper()
	return build(t, filepath.Base(pkg), pkg, func(string) []string { return nil })
}

// build builds a main package once for each name. flags are further ones of the compiler;
// what they need lies in the folder.
func build(t testing.TB, name, pkg string, flags func(dir string) []string) string {
	t.Helper()
	built.mu.Lock()
	defer built.mu.Unlock()
	if p := built.path[name]; p != "" {
		return p
	}
	if built.dir == "" {
		dir, err := os.MkdirTemp("", "ownllm-bin-")
		if err != nil {
			t.Fatal(err)
		}
		built.dir, built.path = dir, make(map[string]string)
	}
	path := filepath.Join(built.dir, name)
	args := append([]string{"build", "-o", path}, flags(built.dir)...)
	if pkg == OwnLLM {
		args = append(args, buildFlags...)
	}
	if out, err := exec.CommandContext(t.Context(), "go", append(args, pkg)...).CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", pkg, err, out)
	}
	built.path[name] = path
	return path
}

// OwnLLM is the import path of the program.
const OwnLLM = "github.com/ownllm/ownllm"

// Cleanup removes the binaries. It belongs at the end of TestMain.
func Cleanup() {
	built.mu.Lock()
	defer built.mu.Unlock()
	_ = os.RemoveAll(built.dir)
}

// Tests wraps the tests of a package, and removes the binaries after them.
type Tests struct{ M *testing.M }

// Run implements goleak.TestingM.
func (t Tests) Run() int {
	defer Cleanup()
	return t.M.Run()
}

// Process is a process that a test started.
type Process struct {
	// OpsURL is the address for operators of a role of a Cluster.
	OpsURL string

	t    testing.TB
	name string
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended

	mu  sync.Mutex
	log []string
	err error // how it ended
}

// Run starts a program. What it prints is shown if the test fails.
func Run(t testing.TB, name string, env []string, path string, args ...string) *Process {
	t.Helper()
	p := &Process{t: t, name: name, cmd: exec.Command(path, args...), done: make(chan struct{})}
	// The race detector would have each of our processes sleep for a second at its end.
	p.cmd.Env = slices.Concat([]string{"GORACE=atexit_sleep_ms=50"}, os.Environ(), env)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p.cmd.Stdout, p.cmd.Stderr = in, in
	if err := p.cmd.Start(); err != nil {
		t.Fatalf("start %s: %v", name, err)
	}
	_ = in.Close()
	read := make(chan struct{})
	go func() {
		defer close(read)
		defer out.Close()
		lines := bufio.NewScanner(out)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			p.mu.Lock()
			p.log = append(p.log, lines.Text())
			p.mu.Unlock()
		}
	}()
	go func() {
		err := p.cmd.Wait()
		<-read
		p.mu.Lock()
		p.err = err
		p.mu.Unlock()
		close(p.done)
	}()
	t.Cleanup(func() {
		_ = p.Stop()
		for _, line := range p.Log() {
			if strings.Contains(line, "DATA RACE") {
				t.Errorf("%s has a data race", name)
			}
		}
		if t.Failed() {
			t.Logf("--- output of %s:\n%s", name, strings.Join(p.Log(), "\n"))
		}
	})
	return p
}

// PID is the id of the process.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Log returns the lines that the process has printed.
func (p *Process) Log() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.log...)
}

// Signal sends a signal.
func (p *Process) Signal(s syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		p.t.Errorf("signal %v to %s: %v", s, p.name, err)
	}
}

// Kill ends the process without a warning, and waits until it is gone.
func (p *Process) Kill() {
	p.t.Helper()
	p.Signal(syscall.SIGKILL)
	<-p.done
}

// Stop asks the process to end, waits, and returns how it ended.
func (p *Process) Stop() error {
	p.t.Helper()
	p.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(stopWait):
		p.t.Errorf("%s didn't stop within %s", p.name, stopWait)
		p.Kill()
	}
	return p.Err()
}

// Err is how the process ended, once it has.
func (p *Process) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// Alive reports whether the process runs.
func (p *Process) Alive() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Until looks again and again until ok, and fails the test after wait.
func Until(t testing.TB, wait time.Duration, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(wait)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited %s for %s", wait, what)
		}
		time.Sleep(lookEvery)
	}
}

// Up is a running `ownllm up`.
type Up struct {
	*Process
	adminapi.Ready
	DataDir string
}

// FreePorts are the flags by which everything listens on free ports.
var FreePorts = []string{"--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0", "--nats-listen", "127.0.0.1:0"}

// StartUp runs `ownllm up` with a data dir and further flags, on free ports, and waits
// until it is ready.
func StartUp(t testing.TB, dir string, args ...string) *Up {
	t.Helper()
	args = append(append([]string{"up", "--data-dir", dir}, FreePorts...), args...)
	p := Run(t, "up", nil, Binary(t, OwnLLM), args...)
	u := &Up{Process: p, DataDir: dir}
	Until(t, startWait, "ready.json", func() bool {
		if !p.Alive() {
			t.Fatalf("ownllm up has ended: %v", p.Err())
		}
		r, err := adminapi.ReadReady(dir)
		u.Ready = r
		return err == nil && r.PID == p.PID()
	})
	store, err := books.Open(t.Context(), books.Config{URL: u.DatabaseURL})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	key, err := apikey.FromSecret(u.APIKey)
	if err != nil {
		t.Fatal(err)
	}
	lift(t, store, key)
	return u
}

// lift gives the first tenant and its key limits that no test comes near, since most
// tests aren't about limits, and returns them.
func lift(t testing.TB, store *books.Store, secret apikey.Key) (books.Tenant, books.User, books.Key) {
	t.Helper()
	const plenty = 1_000_000
	tenant, user, key, err := store.EnsureFirst(t.Context(), secret)
	if err == nil {
		tenant, err = store.SetTenant(t.Context(), string(tenant.ID), books.TenantChange{QPS: new(plenty)})
	}
	if err == nil && key.RevokedAt == nil {
		key, err = store.SetKey(t.Context(), key.ID, books.KeyChange{Concurrency: new(plenty)})
	}
	if err != nil {
		t.Fatal(err)
	}
	return tenant, user, key
}

// FreeAddr is an address on which nobody listens, and which nobody else is given before the
// end of the test.
func FreeAddr(t testing.TB) string {
	t.Helper()
	address, release, err := port.Reserve()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(release)
	return address
}

// Answers reports whether a GET of the address gives the status 200.
func Answers(url string) bool {
	client := http.Client{Timeout: time.Second}
	resp, err := client.Get(url)
	if err != nil {
		return false
	}
	_ = resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// Flag makes NAME=VALUE flags readable in tests.
func Flag(name string, value any) string { return fmt.Sprintf("--%s=%v", name, value) }
