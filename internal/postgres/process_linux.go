package postgres

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
)

// reachPath is the data dir as a child sees it that inherited it as its fourth file.
const reachPath = "/proc/self/fd/3"

// setProcAttr makes the child run as the account, in a process group of its own, so
// that an interrupt at the terminal goes to us alone, who then shut it down when we
// no longer need it, and makes the kernel interrupt it when we die.
func setProcAttr(cmd *exec.Cmd, a *account) {
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential: a.credential(),
		Setpgid:    true,
		Pdeathsig:  syscall.SIGINT,
	}
}

// open opens the data dir for a server of another user: that descriptor works
// whatever the folders above it allow.
func (a *account) open(dir string) (*os.File, error) {
	if a == nil {
		return nil, nil
	}
	return os.Open(dir)
}

// serves reports whether the process is a server of that cluster: a server, and
// only a server, has the cluster for its working directory.
func serves(pid int, cluster string) bool {
	cwd, err := os.Stat(filepath.Join("/proc", strconv.Itoa(pid), "cwd"))
	if err != nil {
		return false
	}
	dir, err := os.Stat(cluster)
	return err == nil && os.SameFile(cwd, dir)
}
