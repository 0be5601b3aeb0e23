package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/internal/secret"
)

const (
	startWait = 90 * time.Second
	// stopWait is longer than the drain of `ownllm up`.
	stopWait  = 45 * time.Second
	lookEvery = 20 * time.Millisecond
)

// process is a program that is measured.
type process struct {
	cmd  *exec.Cmd
	stop context.CancelFunc
	done chan struct{} // closed when it has ended
}

// start runs the program until stop is called or ctx ends. Its log goes to stderr.
func start(ctx context.Context, stdout, stderr io.Writer, binary string, args ...string) (*process, error) {
	return startWith(ctx, nil, stdout, stderr, binary, args...)
}

// startWith is start for a program that reads stdin.
func startWith(ctx context.Context, stdin io.Reader, stdout, stderr io.Writer, binary string, args ...string) (*process, error) {
	ctx, cancel := context.WithCancel(ctx)
	cmd := exec.CommandContext(ctx, binary, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, stdout, stderr
	// In a group of its own, so that an interrupt at the terminal comes once, from us.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = stopWait
	if err := cmd.Start(); err != nil {
		cancel()
		return nil, fmt.Errorf("start %s %s: %w", binary, args[0], err)
	}
	p := &process{cmd, cancel, make(chan struct{})}
	go func() {
		_ = cmd.Wait() // its log says why
		close(p.done)
	}()
	return p, nil
}

// close ends the program and waits until it has.
func (p *process) close() {
	p.stop()
	<-p.done
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// stack is what is measured: a backend, and a broker and a bare proxy in front of it.
type stack struct {
	backend *process
	broker  *process
	proxy   *process
	minimal []minimal
	direct  target
	bare    target
	through target
	ops     string // URL of the broker's operations port
	ready   adminapi.Ready
	self    string // path of this program, built anew
}

// startStack starts the program twice, with its data in dir. up are more flags of
// `ownllm up`.
func startStack(ctx context.Context, binary, dir string, stderr io.Writer, up ...string) (*stack, error) {
	s := &stack{}
	err := s.startBackend(ctx, binary, stderr)
	if err == nil {
		err = s.startProxy(ctx, dir, stderr)
	}
	if err == nil {
		err = s.startBroker(ctx, binary, filepath.Join(dir, "data"), stderr, up)
	}
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *stack) startBackend(ctx context.Context, binary string, stderr io.Writer) (err error) {
	s.backend, s.direct.addr, err = startListening(ctx, nil, stderr, binary, "demo", "--listen", "127.0.0.1:0")
	return err
}

// startProxy starts this program another time, as a proxy.
func (s *stack) startProxy(ctx context.Context, dir string, stderr io.Writer) error {
	var err error
	if s.self, err = build(ctx, dir, module+"/internal/bench", "build"); err != nil {
		return err
	}
	s.proxy, s.bare.addr, err = startListening(ctx, nil, stderr, s.self, "-proxy", "http://"+s.direct.addr)
	return err
}

// startListening starts a program whose first line says where it listens.
func startListening(ctx context.Context, stdin io.Reader, stderr io.Writer, binary string, args ...string) (p *process, addr string, err error) {
	out, in, err := os.Pipe()
	if err != nil {
		return nil, "", err
	}
	defer out.Close()
	p, err = startWith(ctx, stdin, in, stderr, binary, args...)
	_ = in.Close()
	if err != nil {
		return nil, "", err
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		return p, "", fmt.Errorf("%s didn't start: %w", args[0], err)
	}
	_, addr, ok := strings.Cut(strings.TrimSpace(line), "http://")
	if !ok {
		return p, "", fmt.Errorf("%s says %q, and no address", args[0], line)
	}
	return p, addr, nil
}

// startBroker starts `ownllm up` in front of the backend, and waits until it serves.
func (s *stack) startBroker(ctx context.Context, binary, data string, stderr io.Writer, flags []string) (err error) {
	flags = append([]string{
		"up", "--data-dir", data, "--backend", "http://" + s.direct.addr,
		"--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0", "--nats-listen", "127.0.0.1:0", "--log-level", "warn",
	}, flags...)
	s.broker, err = start(ctx, nil, stderr, binary, flags...)
	if err != nil {
		return err
	}
	give := time.NewTimer(startWait)
	defer give.Stop()
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-s.broker.done:
			return errors.New("ownllm up ended before it served")
		case <-give.C:
			return fmt.Errorf("ownllm up didn't serve within %s", startWait)
		case <-look.C:
		}
		ready, err := adminapi.ReadReady(data)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		addr := strings.TrimSuffix(strings.TrimPrefix(ready.BaseURL, "http://"), "/v1")
		s.through, s.ops, s.ready = target{addr: addr, key: secret.String(ready.APIKey)}, ready.OpsURL, ready
		return setLimits(ctx, ready)
	}
}

const (
	// price of 1,000 tokens, in micro-cents: a cent.
	price = 1_000_000
	// plenty is more of anything than is measured: requests a second, requests at once, cents.
	plenty = 1_000_000
)

// setLimits gives every model a price and every key a budget, so that every request is
// admitted and settled in full, and lifts all limits above what is measured.
func setLimits(ctx context.Context, ready adminapi.Ready) error {
	client, err := adminapi.NewClient(ready.AdminURL, secret.String(ready.AdminToken))
	if err != nil {
		return err
	}
	defer client.Close()
	for _, model := range ready.Models {
		if _, err := client.SetPrice(ctx, adminapi.SetPrice{Model: model, CentsPer1kTokens: new(adminapi.Cents(price))}); err != nil {
			return fmt.Errorf("set the price of %s: %w", model, err)
		}
	}
	tenants, err := client.Tenants(ctx)
	if err != nil {
		return fmt.Errorf("list the tenants: %w", err)
	}
	for _, t := range tenants {
		if _, err := client.ChangeTenant(ctx, t.Slug, adminapi.ChangeTenant{QPS: new(plenty)}); err != nil {
			return fmt.Errorf("lift the limit of tenant %s: %w", t.Slug, err)
		}
		keys, err := client.Keys(ctx, t.Slug, "")
		if err != nil {
			return fmt.Errorf("list the keys of tenant %s: %w", t.Slug, err)
		}
		for _, k := range keys {
			if _, err := client.ChangeKey(ctx, k.ID, adminapi.ChangeKey{
				BudgetCents: adminapi.Budget{Given: true, Cents: new(int64(plenty))}, Concurrency: new(plenty),
			}); err != nil {
				return fmt.Errorf("lift the limits of key %s: %w", k.ID, err)
			}
		}
	}
	return nil
}

// close ends everything.
func (s *stack) close() {
	for _, m := range s.minimal {
		m.close() // before the broker, whose Postgres one of them uses
	}
	for _, p := range []*process{s.broker, s.proxy, s.backend} {
		if p != nil {
			p.close()
		}
	}
}

// spent is the CPU time that was used so far.
type spent struct {
	backend, broker, postgres, client time.Duration
}

func (a spent) minus(b spent) spent {
	return spent{a.backend - b.backend, a.broker - b.broker, a.postgres - b.postgres, a.client - b.client}
}

// spent reads from /proc the CPU times of what serves the target. On a system without it
// they are 0.
func (s *stack) spent(t target) spent {
	used := spent{backend: readStat(s.backend.pid()).own, client: readStat(os.Getpid()).own}
	middle, database := s.middle(t)
	if middle == nil {
		return used
	}
	used.broker = readStat(middle.pid()).own
	if database {
		for _, p := range descendants(s.broker.pid()) {
			used.postgres += p.own + p.reaped
		}
	}
	return used
}

// middle is what stands between client and backend, nil if there is nothing, and whether it
// uses Postgres.
func (s *stack) middle(t target) (p *process, database bool) {
	switch t.addr {
	case s.direct.addr:
		return nil, false
	case s.bare.addr:
		return s.proxy, false
	}
	for _, m := range s.minimal {
		if m.addr == t.addr {
			return m.process, m.database
		}
	}
	return s.broker, true
}

// stat is what /proc/<pid>/stat says of a process.
type stat struct {
	pid, parent int
	own         time.Duration // in user and kernel mode
	reaped      time.Duration // of its children that have ended
}

// tick is the unit of the times: USER_HZ, which is 100 on every Linux.
const tick = time.Second / 100

func readStat(pid int) stat {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return stat{}
	}
	return parseStat(string(b))
}

func parseStat(line string) stat {
	var s stat
	id, _, _ := strings.Cut(line, " ")
	s.pid, _ = strconv.Atoi(id)
	// The name is in parentheses, and may hold some itself. The state is field 3.
	fields := strings.Fields(line[strings.LastIndexByte(line, ')')+1:])
	at := func(field int) int {
		if field-3 >= len(fields) {
			return 0
		}
		n, _ := strconv.Atoi(fields[field-3])
		return n
	}
	s.parent = at(4)
	s.own = time.Duration(at(14)+at(15)) * tick
	s.reaped = time.Duration(at(16)+at(17)) * tick
	return s
}

// descendants are the children of a process, and theirs.
func descendants(pid int) []stat {
	paths, _ := filepath.Glob("/proc/[0-9]*/stat")
	children := make(map[int][]stat)
	for _, path := range paths {
		if b, err := os.ReadFile(path); err == nil { // else it has just ended
			s := parseStat(string(b))
			children[s.parent] = append(children[s.parent], s)
		}
	}
	var found []stat
	for next := []int{pid}; len(next) > 0; next = next[1:] {
		for _, c := range children[next[0]] {
			found = append(found, c)
			next = append(next, c.pid)
		}
	}
	return found
}
