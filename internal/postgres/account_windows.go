package postgres

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
)

const reachPath = ""

// account is unused: on Windows the server runs as whoever we are, and gives up
// administrator rights by itself.
type account struct{}

func serverAccount(string) (*account, error)     { return nil, nil }
func (a *account) own(string) error              { return nil }
func (a *account) open(string) (*os.File, error) { return nil, nil }

// setProcAttr keeps an interrupt at the console from the server.
func setProcAttr(cmd *exec.Cmd, _ *account) {
	cmd.SysProcAttr = &syscall.SysProcAttr{CreationFlags: syscall.CREATE_NEW_PROCESS_GROUP}
}

func interrupt(pid int) error { return signal(pid, syscall.SIGINT) }  // fast shutdown
func quit(pid int) error      { return signal(pid, syscall.SIGQUIT) } // immediate shutdown

// signal sends a signal the way PostgreSQL does on Windows: as a byte through a pipe
// that each of its processes listens on.
func signal(pid int, s syscall.Signal) error {
	pipe, err := os.OpenFile(fmt.Sprintf(`\\.\pipe\pgsignal_%d`, pid), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	_, err = pipe.Write([]byte{byte(s)})
	return errors.Join(err, pipe.Close())
}

func kill(pid int) error {
	p, err := os.FindProcess(pid)
	if err != nil {
		return err
	}
	return p.Kill()
}

// serves reports whether the process is a server. Which cluster it has can't be
// told; the pid file that named it can.
func serves(pid int, _ string) bool {
	out, err := exec.Command("tasklist", "/NH", "/FI", "PID eq "+strconv.Itoa(pid)).Output()
	return err == nil && strings.Contains(string(out), "postgres")
}

// lockFile takes a lock that ends with the process: an open file that nobody else
// may open.
func lockFile(path string) (*os.File, error) {
	name, err := syscall.UTF16PtrFromString(path)
	if err != nil {
		return nil, err
	}
	const share = 0
	handle, err := syscall.CreateFile(name, syscall.GENERIC_READ|syscall.GENERIC_WRITE, share, nil,
		syscall.OPEN_ALWAYS, syscall.FILE_ATTRIBUTE_NORMAL, 0)
	if err != nil {
		const sharingViolation = syscall.Errno(32)
		if errors.Is(err, sharingViolation) {
			return nil, ErrInUse
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return os.NewFile(uintptr(handle), path), nil
}

// syncDir does nothing: a folder can't be synced here.
func syncDir(string) error { return nil }
