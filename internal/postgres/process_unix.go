//go:build unix && !linux

package postgres

import (
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
)

const reachPath = ""

// setProcAttr makes the child run as the account, in a process group of its own, so
// that an interrupt at the terminal goes to us alone.
func setProcAttr(cmd *exec.Cmd, a *account) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: a.credential(), Setpgid: true}
}

// open does nothing: here the server needs a path that its user can go.
func (a *account) open(string) (*os.File, error) { return nil, nil }

// serves reports whether the process is a server of that cluster, going by its
// command line, where we put the path.
func serves(pid int, cluster string) bool {
	out, err := exec.Command("ps", "-ww", "-o", "command=", "-p", strconv.Itoa(pid)).Output()
	return err == nil && strings.Contains(string(out), "-D "+cluster+" ")
}
