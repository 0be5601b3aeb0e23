package postgres

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// What lies in a data dir.
const (
	lockName     = "lock"
	passwordName = "password"
	clusterName  = "cluster"
	// unfinishedName is a cluster whose making was interrupted.
	unfinishedName = "cluster.new"
)

// home is a data dir that this process has locked.
type home struct {
	dir     string
	lock    *os.File
	account *account // whom the server runs as; nil: us
	reach   *os.File // the open data dir, where the server reaches it through that
}

// openHome makes the data dir if need be, takes its lock, and gives it to the user
// whom the server will run as.
func openHome(dir string) (_ *home, err error) {
	if dir == "" {
		return nil, errors.New("no data dir given")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	// The owner of the folder is changed below, and never that of a link.
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return nil, err
	}
	if err := ours(dir); err != nil {
		return nil, err
	}
	h := &home{dir: dir}
	if h.lock, err = lockFile(h.path(lockName)); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, h.close())
		}
	}()
	if h.account, err = serverAccount(h.path(clusterName)); err != nil {
		return nil, err
	}
	if err := h.account.own(dir); err != nil {
		return nil, err
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, err
	}
	h.reach, err = h.account.open(dir)
	return h, err
}

// ours refuses a folder that holds something else: a slip of the command line must
// not give somebody's home to another user.
func ours(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		switch e.Name() {
		case lockName, passwordName, clusterName, unfinishedName:
			return nil
		}
	}
	if len(entries) > 0 {
		return fmt.Errorf("the folder holds something else (%s): use an empty one", entries[0].Name())
	}
	return nil
}

func (h *home) close() error {
	var err error
	if h.reach != nil {
		err = h.reach.Close()
	}
	return errors.Join(err, h.lock.Close())
}

// path is where we find a file of the data dir.
func (h *home) path(name ...string) string {
	return filepath.Join(append([]string{h.dir}, name...)...)
}

// seen is where the server finds a file of the data dir.
func (h *home) seen(name string) string {
	if h.reach != nil {
		return reachPath + "/" + name
	}
	return h.path(name)
}

// environment is all that the server and initdb inherit. Variables of ours may hold
// secrets, and those of libpq and the locale would change what they do.
func environment() []string {
	env := []string{"LC_ALL=C", "TZ=UTC"}
	for _, name := range []string{"PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TEMP", "TMP"} {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	return env
}

// command is a command that runs as the server's user and reaches the data dir at
// seen.
func (h *home) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.Env = environment()
	// Our own working directory may be closed to that user.
	cmd.Dir = filepath.VolumeName(h.dir) + string(filepath.Separator)
	if h.reach != nil {
		cmd.ExtraFiles = []*os.File{h.reach} // becomes reachPath
	}
	setProcAttr(cmd, h.account)
	return cmd
}

// version is the major version that made the cluster, 0 if there is none.
func (h *home) version() (int, error) {
	b, err := os.ReadFile(h.path(clusterName, "PG_VERSION"))
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	} else if err != nil {
		return 0, err
	}
	v, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0, fmt.Errorf("%s holds %q", h.path(clusterName, "PG_VERSION"), b)
	}
	return v, nil
}

// initialize makes the cluster, unless there is one, and returns the password.
//
// Whatever is interrupted here is done again: the password takes its place before
// the cluster is begun, the cluster takes its place when it is complete and on disk.
func (h *home) initialize(ctx context.Context, bin string, noSync bool) (string, error) {
	made, err := h.version()
	if err != nil {
		return "", err
	}
	password, err := os.ReadFile(h.path(passwordName))
	switch {
	case err == nil && len(password) > 0:
	case err != nil && !errors.Is(err, os.ErrNotExist):
		return "", err
	case made != 0:
		return "", fmt.Errorf("the password of the database is gone: put %s back, or use another data dir", h.path(passwordName))
	default:
		password = []byte(rand.Text())
		if err := h.writePassword(password); err != nil {
			return "", fmt.Errorf("store the password: %w", err)
		}
	}
	if made == 0 {
		if err := h.initdb(ctx, bin, noSync); err != nil {
			return "", err
		}
	}
	return strings.TrimSpace(string(password)), nil
}

func (h *home) writePassword(password []byte) error {
	name := h.path(passwordName + ".new")
	if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	// O_EXCL follows no link that the server's user might have put there.
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(password)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := h.account.own(name); err != nil {
		return err
	}
	return os.Rename(name, h.path(passwordName))
}

func (h *home) initdb(ctx context.Context, bin string, noSync bool) error {
	if err := os.RemoveAll(h.path(unfinishedName)); err != nil {
		return fmt.Errorf("remove an unfinished cluster: %w", err)
	}
	args := []string{
		"-D", h.seen(unfinishedName),
		"--username=" + superuser,
		"--pwfile=" + h.seen(passwordName),
		"--auth=scram-sha-256",
		"--encoding=UTF8",
		"--locale=C",
		"--no-instructions",
	}
	if noSync {
		args = append(args, "--no-sync")
	}
	var out bytes.Buffer
	cmd := h.command(filepath.Join(bin, "initdb"), args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	proc, err := spawn(cmd)
	if err != nil {
		return err
	}
	select {
	case <-proc.done:
		err = proc.err
	case <-ctx.Done():
		_ = proc.cmd.Process.Kill()
		<-proc.done
		err = context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("make the cluster: %w: %s", err, bytes.TrimSpace(out.Bytes()))
	}
	if err := os.Rename(h.path(unfinishedName), h.path(clusterName)); err != nil {
		return fmt.Errorf("make the cluster: %w", err)
	}
	return syncDir(h.dir)
}

// pidFile reads what the server says of itself: its process id, and whether it takes
// connections. The id is 0 if there is no server.
func (h *home) pidFile() (pid int, ready bool) {
	b, err := os.ReadFile(h.path(clusterName, "postmaster.pid"))
	if err != nil {
		return 0, false
	}
	lines := strings.Split(string(b), "\n")
	pid, err = strconv.Atoi(strings.TrimSpace(lines[0]))
	if err != nil || pid <= 0 {
		return 0, false
	}
	const statusLine = 7
	return pid, len(lines) > statusLine && strings.TrimSpace(lines[statusLine]) == "ready"
}

// stopLeftover ends a server that outlived its owner, and removes a pid file whose
// server is gone: its number may belong to another process by now, and PostgreSQL
// would then refuse to start. Only the holder of the lock may do that.
func (h *home) stopLeftover(ctx context.Context, log *slog.Logger) error {
	pid, _ := h.pidFile()
	if pid == 0 {
		return nil
	}
	file := h.path(clusterName, "postmaster.pid")
	if !serves(pid, h.path(clusterName)) {
		if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("remove a stale pid file: %w", err)
		}
		return nil
	}
	log.Warn("stopping a postgres that an earlier run left behind", "pid", pid)
	gone := func() bool { return !serves(pid, h.path(clusterName)) }
	for _, order := range []func(int) error{interrupt, quit, kill} {
		if err := order(pid); err != nil && !gone() {
			return fmt.Errorf("stop the postgres that an earlier run left behind (pid %d): %w", pid, err)
		}
		ended, err := poll(ctx, leftoverTimeout, gone)
		if err != nil {
			return err
		}
		if ended {
			return nil
		}
	}
	return fmt.Errorf("the postgres that an earlier run left behind (pid %d) can't be stopped", pid)
}

// poll waits until the condition holds, and reports whether it did in time.
func poll(ctx context.Context, limit time.Duration, condition func() bool) (bool, error) {
	deadline := time.After(limit)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-tick.C:
		case <-deadline:
			return false, nil
		case <-ctx.Done():
			return false, context.Cause(ctx)
		}
	}
	return true, nil
}
