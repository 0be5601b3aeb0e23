// Package postgres runs a private PostgreSQL server for one owner: the process
// of "ownllm up", or of a test. It finds the binaries, makes a cluster, starts the
// server on a free port of the loopback interface, and stops it again. It speaks
// no SQL.
//
// # What it promises
//
// A crash, at any moment, leaves nothing that stops the next start. The cluster is
// made in a folder of its own and takes its place by one rename. The right to a
// data dir is a file lock, which the kernel gives back when its holder dies. On
// Linux the server gets a signal to shut down when its owner dies. Whoever holds
// the lock therefore knows that a server which still runs in the data dir is a
// leftover, and stops it before it starts its own.
//
// Two owners never share a data dir: the second gets ErrInUse.
//
// PostgreSQL refuses to run as root, so for root it runs as another user, who owns
// the data dir. On Linux the server reaches its data through an open file
// descriptor, not through the path, so that the data dir may lie below folders that
// are closed to that user, /root for one.
//
// Nobody but the owner gets in: the server listens on 127.0.0.1 alone and asks for
// a random password (scram-sha-256), which is kept in the data dir with mode 0600.
package postgres

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// MinVersion is the oldest major version of PostgreSQL that will do.
const MinVersion = 15

// ErrInUse says that another live process owns the data dir.
var ErrInUse = errors.New("the data dir is in use by another process")

const (
	// superuser owns the cluster and is who URL logs in as.
	superuser = "ownllm"
	// database exists in every new cluster.
	database = "postgres"

	// startTimeout is generous: after a crash the server replays its log first.
	startTimeout = 2 * time.Minute
	// leftoverTimeout is how long a leftover may take to shut down by itself, and
	// then again to die when told so.
	leftoverTimeout = 20 * time.Second
	// attempts bounds the tries to start: each may lose its port to somebody else.
	attempts = 5
)

// Config says how to run a server.
type Config struct {
	// DataDir is a folder for this server alone; it is made if it doesn't exist.
	DataDir string
	// BinDir is the folder of the binaries initdb and postgres. Empty: they are
	// looked for, see Find, in the version that made the data dir.
	BinDir string
	// Log gets what the server logs. Nil: nothing is logged.
	Log *slog.Logger
	// Settings are added to the defaults and win over them ("max_connections": "50").
	Settings map[string]string
	// NoSync trades all crash safety for speed: nothing is flushed to disk. For tests.
	NoSync bool
}

// defaults keep every promise of durability and little else, to suit one process on
// one machine: no replication, and little memory. PostgreSQL's own log must not
// give away what is in a statement, so it names neither statements nor details.
func (c Config) settings() map[string]string {
	s := map[string]string{
		"listen_addresses":           "127.0.0.1",
		"unix_socket_directories":    "",
		"shared_buffers":             "64MB",
		"max_connections":            "100",
		"fsync":                      "on",
		"synchronous_commit":         "on",
		"wal_level":                  "minimal",
		"max_wal_senders":            "0",
		"max_wal_size":               "512MB",
		"min_wal_size":               "80MB",
		"jit":                        "off",
		"timezone":                   "UTC",
		"logging_collector":          "off",
		"log_destination":            "stderr",
		"log_line_prefix":            "",
		"log_error_verbosity":        "terse",
		"log_min_error_statement":    "panic",
		"log_checkpoints":            "off",
		"log_min_duration_statement": "-1",
		"log_statement":              "none",
	}
	if c.NoSync {
		s["fsync"] = "off"
		s["synchronous_commit"] = "off"
		s["full_page_writes"] = "off"
	}
	maps.Copy(s, c.Settings)
	return s
}

// Server is a running server. It must be stopped.
type Server struct {
	log  *slog.Logger
	home *home
	url  string
	proc *process
}

// Start makes the cluster if there is none yet and starts a server on it. It comes
// back when the server takes connections. ctx bounds the start, not the life of
// the server; the caller must call Stop.
func Start(ctx context.Context, cfg Config) (*Server, error) {
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	home, err := openHome(cfg.DataDir)
	if err != nil {
		return nil, fmt.Errorf("postgres in %s: %w", cfg.DataDir, err)
	}
	s := &Server{log: log, home: home}
	if err := s.start(ctx, cfg); err != nil {
		return nil, errors.Join(fmt.Errorf("postgres in %s: %w", cfg.DataDir, err), home.close())
	}
	return s, nil
}

func (s *Server) start(ctx context.Context, cfg Config) error {
	if err := s.home.stopLeftover(ctx, s.log); err != nil {
		return err
	}
	version, err := s.home.version()
	if err != nil {
		return err
	}
	bin := cfg.BinDir
	if bin == "" {
		if bin, err = find(ctx, s.log, version); err != nil {
			return err
		}
	}
	// What comes before may have installed PostgreSQL, which takes its time.
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := checkVersion(ctx, bin, version); err != nil {
		return err
	}
	password, err := s.home.initialize(ctx, bin, cfg.NoSync)
	if err != nil {
		return err
	}
	for try := 1; ; try++ {
		port, err := freePort()
		if err != nil {
			return err
		}
		s.proc, err = s.launch(ctx, bin, port, cfg.settings())
		if err == nil {
			u := url.URL{
				Scheme:   "postgres",
				User:     url.UserPassword(superuser, password),
				Host:     net.JoinHostPort("127.0.0.1", strconv.Itoa(port)),
				Path:     "/" + database,
				RawQuery: "sslmode=disable",
			}
			s.url = u.String()
			s.log.Debug("postgres started", "pid", s.proc.pid(), "port", port, "data_dir", s.home.dir)
			return nil
		}
		if try == attempts || ctx.Err() != nil || !passing(err) {
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// passing reports whether another try to start may help: the port was taken in the
// meantime, or the children of a killed server haven't noticed its death yet.
func passing(err error) bool {
	text := err.Error()
	return strings.Contains(text, "could not bind") ||
		strings.Contains(text, "could not create any TCP/IP sockets") ||
		strings.Contains(text, "pre-existing shared memory block")
}

func freePort() (int, error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("find a free port: %w", err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

// launch starts the server process and waits until it takes connections.
func (s *Server) launch(ctx context.Context, bin string, port int, settings map[string]string) (*process, error) {
	args := []string{"-D", s.home.seen(clusterName), "-p", strconv.Itoa(port)}
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		args = append(args, "-c", name+"="+settings[name])
	}
	output := &serverLog{log: s.log}
	cmd := s.home.command(filepath.Join(bin, "postgres"), args...)
	cmd.Stdout, cmd.Stderr = output, output
	// Children of a server that was killed hold the pipe open for a moment longer.
	cmd.WaitDelay = 2 * time.Second
	proc, err := spawn(cmd)
	if err != nil {
		return nil, err
	}
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-proc.done:
			return nil, fmt.Errorf("the server ended while starting: %v: %s", proc.err, output.tail())
		case <-ctx.Done():
			stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), leftoverTimeout)
			defer cancel()
			return nil, errors.Join(fmt.Errorf("wait until the server is up: %w", context.Cause(ctx)), proc.stop(stop))
		case <-tick.C:
			if pid, ready := s.home.pidFile(); ready && pid == proc.pid() {
				return proc, nil
			}
		}
	}
}

// URL is the address of the database, password included: postgres://….
func (s *Server) URL() string { return s.url }

// Done is closed when the server process has ended, on purpose or not.
func (s *Server) Done() <-chan struct{} { return s.proc.done }

// Wait blocks until the server process has ended, and says how. It is nil after an
// orderly shutdown.
func (s *Server) Wait() error {
	<-s.proc.done
	return s.proc.err
}

// Stop shuts the server down: open transactions are rolled back, and everything is
// on disk. If ctx ends first, the server is killed, which its next start repairs.
// The data dir is free for another owner afterwards.
func (s *Server) Stop(ctx context.Context) error {
	err := s.proc.stop(ctx)
	if err != nil {
		err = fmt.Errorf("stop postgres in %s: %w", s.home.dir, err)
	}
	return errors.Join(err, s.home.close())
}

// Remove deletes a data dir, and stops a server that a dead owner left running in
// it. A data dir with a living owner is left alone: ErrInUse.
func Remove(ctx context.Context, dataDir string) error {
	if _, err := os.Stat(dataDir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	home, err := openHome(dataDir)
	if err != nil {
		return fmt.Errorf("remove %s: %w", dataDir, err)
	}
	if err := home.stopLeftover(ctx, slog.New(slog.DiscardHandler)); err != nil {
		return errors.Join(fmt.Errorf("remove %s: %w", dataDir, err), home.close())
	}
	return errors.Join(os.RemoveAll(home.dir), home.close())
}

// checkVersion refuses binaries that are too old, or that didn't make the cluster
// (made is 0 if there is none yet).
func checkVersion(ctx context.Context, bin string, made int) error {
	have, err := versionOf(ctx, bin)
	switch {
	case err != nil:
		return err
	case have < MinVersion:
		return fmt.Errorf("%s has PostgreSQL %d; version %d or later is needed", bin, have, MinVersion)
	case made != 0 && have != made:
		return fmt.Errorf("the data was written by PostgreSQL %d, and %s has %d: install PostgreSQL %d, or use another data dir",
			made, bin, have, made)
	}
	return nil
}

// versionOf asks the binaries for their major version.
func versionOf(ctx context.Context, bin string) (int, error) {
	out, err := exec.CommandContext(ctx, filepath.Join(bin, "postgres"), "--version").Output()
	if err != nil {
		return 0, fmt.Errorf("ask %s for its version: %w", filepath.Join(bin, "postgres"), err)
	}
	// "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)", "… 18beta1"
	_, rest, _ := strings.Cut(string(out), "(PostgreSQL) ")
	end := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' })
	if end < 0 {
		end = len(rest)
	}
	major, err := strconv.Atoi(rest[:end])
	if err != nil {
		return 0, fmt.Errorf("%s --version says %q", filepath.Join(bin, "postgres"), out)
	}
	return major, nil
}
