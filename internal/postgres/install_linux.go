package postgres

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"regexp"
	"syscall"
)

// clusterConfig is where Debian says what a new server package brings with it.
const clusterConfig = "/etc/postgresql-common/createcluster.conf"

// install gets PostgreSQL from the distribution, for root on Debian and its kin.
// The package would also make and start a server of its own on port 5432, which
// nobody asked for, so it is told not to, unless the machine already says otherwise.
func install(ctx context.Context, log *slog.Logger) (err error) {
	apt, lookErr := exec.LookPath("apt-get")
	if lookErr != nil || os.Geteuid() != 0 {
		return ErrNotFound
	}
	// Several processes may come here at once, test binaries for one. A folder can be
	// locked too, and apt's own locks are of another kind.
	lists, err := os.Open("/var/lib/apt")
	if err != nil {
		return ErrNotFound
	}
	defer func() { err = errors.Join(err, lists.Close()) }()
	if err := flock(lists, syscall.LOCK_EX); err != nil {
		return fmt.Errorf("wait for other installations: %w", err)
	}
	if bin, _ := search(ctx, 0); bin != "" {
		return nil
	}
	if log != nil {
		log.Info("installing postgresql with apt-get, once; this takes a minute")
	}
	run := func(args ...string) error {
		cmd := exec.CommandContext(ctx, apt, append([]string{"-q", "-o", "DPkg::Lock::Timeout=300"}, args...)...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%w; apt-get %s failed: %w: %s", ErrNotFound, args[0], err, lastLines(out))
		}
		return nil
	}
	if err := run("update"); err != nil {
		return err
	}
	if err := run("install", "-y", "--no-install-recommends", "postgresql-common"); err != nil {
		return err
	}
	if err := keepClusterAway(clusterConfig); err != nil {
		return err
	}
	return run("install", "-y", "--no-install-recommends", "postgresql")
}

var createMain = regexp.MustCompile(`(?m)^#\s*create_main_cluster\s*=.*$`)

// keepClusterAway turns Debian's default cluster off in the configuration, where it
// is still the commented default.
func keepClusterAway(config string) error {
	old, err := os.ReadFile(config)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	text := createMain.ReplaceAll(old, []byte("create_main_cluster = false"))
	if bytes.Equal(text, old) {
		return nil
	}
	return os.WriteFile(config, text, 0o644)
}

// lastLines is the end of what a command printed.
func lastLines(out []byte) []byte {
	const limit = 400
	out = bytes.TrimSpace(out)
	return out[max(0, len(out)-limit):]
}
