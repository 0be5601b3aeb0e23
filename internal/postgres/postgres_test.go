package postgres

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ownllm/ownllm/internal/logtest"
)

// asOwner is the environment variable that makes the test binary an owner of a
// server in the named data dir: it prints the URL and waits to be killed.
const asOwner = "POSTGRES_TEST_OWNER"

func TestMain(m *testing.M) {
	if dir := os.Getenv(asOwner); dir != "" {
		s, err := Start(context.Background(), Config{DataDir: dir})
		if err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		fmt.Println(s.URL())
		_, _ = io.Copy(io.Discard, os.Stdin)
		_ = s.Stop(context.Background())
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func start(t *testing.T, cfg Config) *Server {
	t.Helper()
	s, err := Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	stopped := false
	t.Cleanup(func() {
		select {
		case <-s.Done():
			stopped = true
		default:
		}
		if err := s.Stop(context.Background()); err != nil && !stopped {
			t.Error(err)
		}
	})
	return s
}

func stop(t *testing.T, s *Server) {
	t.Helper()
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// query runs a statement with psql, which comes with the server.
func query(t *testing.T, address, statement string) (string, error) {
	t.Helper()
	bin, err := Find(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), filepath.Join(bin, "psql"), "-X", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", statement, address).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

func mustQuery(t *testing.T, address, statement string) string {
	t.Helper()
	out, err := query(t, address, statement)
	if err != nil {
		t.Fatalf("%s: %v: %s", statement, err, out)
	}
	return out
}

func TestStartStop(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b") // as root: below folders closed to the server's user
	s := start(t, Config{DataDir: dir, Settings: map[string]string{"max_connections": "42"}})
	for setting, want := range map[string]string{
		"max_connections": "42", "fsync": "on", "synchronous_commit": "on", "full_page_writes": "on",
		"listen_addresses": "127.0.0.1", "server_encoding": "UTF8", "password_encryption": "scram-sha-256",
	} {
		if got := mustQuery(t, s.URL(), "show "+setting); got != want {
			t.Errorf("%s = %q, want %q", setting, got, want)
		}
	}
	mustQuery(t, s.URL(), "create table kept as select 7 as n")
	mustQuery(t, s.URL(), "create database another")
	first := s.URL()
	stop(t, s)
	if err := s.Wait(); err != nil {
		t.Errorf("Wait after an orderly stop: %v", err)
	}
	if _, err := query(t, first, "select 1"); err == nil {
		t.Error("the server still answers after Stop")
	}

	s = start(t, Config{DataDir: dir})
	if got := mustQuery(t, s.URL(), "select n from kept"); got != "7" {
		t.Errorf("after a restart: %q", got)
	}
	password := func(s string) string { u, _ := url.Parse(s); p, _ := u.User.Password(); return p }
	if password(first) != password(s.URL()) || len(password(first)) < 20 {
		t.Error("the password must stay, and be long")
	}
}

func TestAccess(t *testing.T) {
	dir := t.TempDir()
	s := start(t, Config{DataDir: dir, NoSync: true})
	u, err := url.Parse(s.URL())
	if err != nil {
		t.Fatal(err)
	}
	for _, user := range []*url.Userinfo{url.User(superuser), url.UserPassword(superuser, "wrong"), url.User("postgres")} {
		v := *u
		v.User = user
		if out, err := query(t, v.String(), "select 1"); err == nil {
			t.Errorf("user %s got in: %s", user, out)
		}
	}
	for _, name := range []string{"", passwordName, clusterName, lockName} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%q has mode %v", name, info.Mode())
		}
	}
}

// The owner dies without a word; its server must follow, and the next owner starts
// at once, whatever is left by then.
func TestOwnerKilled(t *testing.T) {
	dir := t.TempDir()
	address, owner := startOwner(t, os.Args[0], dir, nil)
	mustQuery(t, address, "create table kept as select 7 as n")
	pid := serverPID(t, dir)

	if _, err := Start(t.Context(), Config{DataDir: dir}); !errors.Is(err, ErrInUse) {
		t.Fatalf("start beside a living owner: %v", err)
	}
	if err := Remove(t.Context(), dir); !errors.Is(err, ErrInUse) {
		t.Fatalf("remove beside a living owner: %v", err)
	}
	if got := mustQuery(t, address, "select n from kept"); got != "7" {
		t.Fatal("the living owner's server was disturbed")
	}

	if err := owner.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = owner.Wait()
	s := start(t, Config{DataDir: dir})
	if got := mustQuery(t, s.URL(), "select n from kept"); got != "7" {
		t.Errorf("after the crash: %q", got)
	}
	if serves(pid, filepath.Join(dir, clusterName)) {
		t.Error("the old server still runs")
	}
}

// Without another start the server of a dead owner ends by itself (on Linux).
func TestServerFollowsOwner(t *testing.T) {
	dir := t.TempDir()
	_, owner := startOwner(t, os.Args[0], dir, nil)
	pid := serverPID(t, dir)
	if err := owner.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = owner.Wait()
	gone, err := poll(t.Context(), 20*time.Second, func() bool { return !serves(pid, filepath.Join(dir, clusterName)) })
	if err != nil || !gone {
		t.Fatalf("the server outlives its owner: %v", err)
	}
	if err := Remove(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Error("Remove left the data dir")
	}
	if err := Remove(t.Context(), dir); err != nil {
		t.Errorf("Remove twice: %v", err)
	}
}

func startOwner(t *testing.T, binary, dir string, prepare func(*exec.Cmd)) (string, *exec.Cmd) {
	t.Helper()
	cmd := exec.Command(binary)
	cmd.Env = append(os.Environ(), asOwner+"="+dir)
	cmd.Stderr = os.Stderr
	if prepare != nil {
		prepare(cmd)
	}
	stdin, err := cmd.StdinPipe() // its end lets the owner stop its server
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = stdin.Close(); _ = cmd.Wait() })
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil || strings.HasPrefix(line, "error:") {
		t.Fatalf("owner: %s %v", line, err)
	}
	return strings.TrimSpace(line), cmd
}

func serverPID(t *testing.T, dir string) int {
	t.Helper()
	h := home{dir: dir}
	pid, ready := h.pidFile()
	if !ready {
		t.Fatal("no server")
	}
	return pid
}

// A server may outlive its owner after all (not Linux, or it hangs).
func TestLeftover(t *testing.T) {
	dir := t.TempDir()
	left := start(t, Config{DataDir: dir, NoSync: true})
	if err := left.home.close(); err != nil { // as the kernel does for the dead
		t.Fatal(err)
	}
	var log logtest.Book
	s := start(t, Config{DataDir: dir, NoSync: true, Log: slog.New(slog.NewTextHandler(&log, nil))})
	mustQuery(t, s.URL(), "select 1")
	if err := left.Wait(); err != nil {
		t.Errorf("the leftover wasn't shut down in order: %v", err)
	}
	if !strings.Contains(log.String(), "left behind") {
		t.Error("nothing was logged")
	}
}

// The number in a stale pid file may belong to anybody by now.
func TestStalePIDFile(t *testing.T) {
	dir := t.TempDir()
	s := start(t, Config{DataDir: dir, NoSync: true})
	// A process of the server's own user, which PostgreSQL would take for its like.
	sleep := s.home.command("/bin/sleep", "60")
	stop(t, s)
	sleep.ExtraFiles = nil
	if err := sleep.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		// Had it been told to stop before, it would have ended of that.
		_ = sleep.Process.Kill()
		if err := sleep.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
			t.Errorf("an innocent process was stopped: %v", err)
		}
	}()
	for _, content := range []string{
		strconv.Itoa(sleep.Process.Pid) + "\n/x\n1\n1\n\n\n  1 1\nready\n",
		strconv.Itoa(os.Getpid()) + "\n",
		"1\n",
	} {
		file := filepath.Join(dir, clusterName, "postmaster.pid")
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := Start(t.Context(), Config{DataDir: dir, NoSync: true})
		if err != nil {
			t.Fatalf("pid file %q: %v", content, err)
		}
		stop(t, s)
	}
}

func TestOneOwner(t *testing.T) {
	dir := t.TempDir()
	const n = 6
	var wg sync.WaitGroup
	servers, errs := make([]*Server, n), make([]error, n)
	for i := range n {
		wg.Go(func() { servers[i], errs[i] = Start(t.Context(), Config{DataDir: dir, NoSync: true}) })
	}
	wg.Wait()
	won := 0
	for i := range n {
		switch {
		case errs[i] == nil:
			won++
			mustQuery(t, servers[i].URL(), "select 1")
			defer stop(t, servers[i])
		case !errors.Is(errs[i], ErrInUse):
			t.Errorf("loser %d: %v", i, errs[i])
		}
	}
	if won != 1 {
		t.Errorf("%d owners", won)
	}
}

// Whenever the making of the cluster is cut off, the next start makes it whole.
func TestInterruptedInitdb(t *testing.T) {
	bin, err := Find(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, after := range []time.Duration{0, 20 * time.Millisecond, 150 * time.Millisecond, 400 * time.Millisecond} {
		h, err := openHome(dir)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), after)
		_, err = h.initialize(ctx, bin, true)
		cancel()
		if err != nil && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("interrupted after %v: %v", after, err)
		}
		if err := h.close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(filepath.Join(dir, unfinishedName, "base", "1"), 0o700); err != nil {
		t.Fatal(err)
	}
	s := start(t, Config{DataDir: dir, NoSync: true})
	mustQuery(t, s.URL(), "select 1")
}

func TestCancelledStart(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	dir := t.TempDir()
	if _, err := Start(ctx, Config{DataDir: dir, NoSync: true}); !errors.Is(err, context.Canceled) {
		t.Fatalf("cancelled: %v", err)
	}
	start(t, Config{DataDir: dir, NoSync: true}) // and the lock is free again
}

// A stop that may not take its time kills, and the next start repairs.
func TestKilledServer(t *testing.T) {
	dir := t.TempDir()
	s := start(t, Config{DataDir: dir})
	mustQuery(t, s.URL(), "create table kept as select 7 as n")
	if err := kill(s.proc.pid()); err != nil {
		t.Fatal(err)
	}
	<-s.Done()
	if err := s.Wait(); err == nil {
		t.Error("Wait calls a killed server's end orderly")
	}
	if err := s.Stop(t.Context()); err == nil {
		t.Error("Stop is silent about a server that was killed")
	}

	s = start(t, Config{DataDir: dir})
	if got := mustQuery(t, s.URL(), "select n from kept"); got != "7" {
		t.Errorf("after the kill: %q", got)
	}
	expired, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Stop(expired); !errors.Is(err, context.Canceled) {
		t.Errorf("Stop in no time: %v", err)
	}
	s = start(t, Config{DataDir: dir})
	if got := mustQuery(t, s.URL(), "select n from kept"); got != "7" {
		t.Errorf("after the hard stop: %q", got)
	}
}

func TestRefusals(t *testing.T) {
	t.Run("a folder with something else", func(t *testing.T) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "thesis.tex"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		before, _ := os.Stat(dir)
		_, err := Start(t.Context(), Config{DataDir: dir})
		if err == nil || !strings.Contains(err.Error(), "thesis.tex") {
			t.Errorf("got %v", err)
		}
		if after, _ := os.Stat(dir); after.Mode() != before.Mode() {
			t.Error("the folder was changed")
		}
	})
	t.Run("no folder", func(t *testing.T) {
		if _, err := Start(t.Context(), Config{}); err == nil {
			t.Error("no error")
		}
	})
	t.Run("another version's data", func(t *testing.T) {
		dir := t.TempDir()
		stop(t, start(t, Config{DataDir: dir, NoSync: true}))
		if err := os.WriteFile(filepath.Join(dir, clusterName, "PG_VERSION"), []byte("9\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := Start(t.Context(), Config{DataDir: dir})
		if err == nil || !strings.Contains(err.Error(), "written by PostgreSQL 9") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("password gone", func(t *testing.T) {
		dir := t.TempDir()
		stop(t, start(t, Config{DataDir: dir, NoSync: true}))
		if err := os.Remove(filepath.Join(dir, passwordName)); err != nil {
			t.Fatal(err)
		}
		_, err := Start(t.Context(), Config{DataDir: dir})
		if err == nil || !strings.Contains(err.Error(), "password") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a setting that doesn't exist", func(t *testing.T) {
		_, err := Start(t.Context(), Config{DataDir: t.TempDir(), NoSync: true, Settings: map[string]string{"no_such_setting": "1"}})
		if err == nil || !strings.Contains(err.Error(), "no_such_setting") {
			t.Errorf("the server's own words are missing: %v", err)
		}
	})
}

// A port that was free a moment ago may be taken: that error must be known as one
// that another try gets over.
func TestPortTaken(t *testing.T) {
	s := start(t, Config{DataDir: t.TempDir(), NoSync: true})
	bin, err := Find(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	stop := s.proc.stop(t.Context())
	if stop != nil {
		t.Fatal(stop)
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, err = s.launch(t.Context(), bin, l.Addr().(*net.TCPAddr).Port, Config{NoSync: true}.settings())
	if err == nil || !passing(err) {
		t.Errorf("got %v", err)
	}
}

// What a statement holds is nobody's business but its sender's.
func TestLogKeepsSecrets(t *testing.T) {
	var log bytes.Buffer
	s := start(t, Config{
		DataDir: t.TempDir(), NoSync: true,
		Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	mustQuery(t, s.URL(), "create table t (v text primary key)")
	mustQuery(t, s.URL(), "insert into t values ('canary')")
	if _, err := query(t, s.URL(), "insert into t values ('canary')"); err == nil {
		t.Fatal("no error")
	}
	u, _ := url.Parse(s.URL())
	password, _ := u.User.Password()
	stop(t, s)
	if !strings.Contains(log.String(), "duplicate key") {
		t.Error("the server's log didn't get through")
	}
	if strings.Contains(log.String(), "canary") || strings.Contains(log.String(), password) {
		t.Error("the log gives secrets away")
	}
}

func TestServerLog(t *testing.T) {
	var out bytes.Buffer
	l := &serverLog{log: slog.New(slog.NewTextHandler(&out, nil))}
	for _, piece := range []string{"LOG:  hidden\nFAT", "AL:  seen\n\n", "WARNING:  too", "\n" + strings.Repeat("x", 2*maxLine)} {
		if n, err := io.WriteString(l, piece); n != len(piece) || err != nil {
			t.Fatal(n, err)
		}
	}
	got := out.String()
	if strings.Contains(got, "hidden") || !strings.Contains(got, "level=ERROR") || !strings.Contains(got, "text=seen") || !strings.Contains(got, "level=WARN") {
		t.Error(got)
	}
	if len(l.rest) > maxLine {
		t.Error("an endless line is kept")
	}
	if tail := l.tail(); !strings.HasPrefix(tail, "LOG:  hidden; FATAL:  seen; WARNING:  too") {
		t.Errorf("tail %q", tail)
	}
}
