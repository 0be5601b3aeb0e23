package postgres

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"runtime"
	"time"
)

// process is a child that somebody waits for.
type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	err  error         // how it ended; read after done
}

// spawn starts the command. The kernel ties "signal me when my parent dies" to the
// thread that forked, not to the process, so that thread must live as long as the
// child: it does nothing else but wait for it.
func spawn(cmd *exec.Cmd) (*process, error) {
	p := &process{cmd: cmd, done: make(chan struct{})}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		p.err = cmd.Wait()
		if errors.Is(p.err, exec.ErrWaitDelay) {
			p.err = nil // it ended well; a child of it still held the pipe
		}
		close(p.done)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	return p, nil
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// stop ends a server: an orderly shutdown, then, when ctx ends, a kill.
func (p *process) stop(ctx context.Context) error {
	select {
	case <-p.done:
		return p.err
	default:
	}
	if err := interrupt(p.pid()); err != nil {
		return p.abort(err)
	}
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
		return p.abort(context.Cause(ctx))
	}
}

// abort takes a server down hard. Its children leave by themselves if it is told to
// quit, so that comes before the kill.
func (p *process) abort(cause error) error {
	err := fmt.Errorf("killed it: %w", cause)
	if quit(p.pid()) == nil {
		select {
		case <-p.done:
			return err
		case <-time.After(3 * time.Second):
		}
	}
	killed := p.cmd.Process.Kill()
	<-p.done
	return errors.Join(err, killed)
}
