package faultproxy_test

import (
	"errors"
	"io"
	"net"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ownllm/ownllm/internal/faultproxy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// echo returns the address of a server that says everything back, after its name.
func echo(t *testing.T, name string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer c.Close()
				if _, err := c.Write([]byte(name)); err == nil {
					_, _ = io.Copy(c, c) // until the client goes
				}
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		running.Wait()
	})
	return "tcp://" + l.Addr().String()
}

func dial(t *testing.T, p *faultproxy.Proxy) net.Conn {
	t.Helper()
	u, err := url.Parse(p.URL())
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", u.Host)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// hears reads what is expected, or returns why it doesn't come.
func hears(c net.Conn, want string, within time.Duration) error {
	if err := c.SetReadDeadline(time.Now().Add(within)); err != nil {
		return err
	}
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if string(got) != want {
		return errors.New("got " + string(got))
	}
	return nil
}

const (
	soon  = 50 * time.Millisecond // for what isn't to come
	ample = 10 * time.Second
)

func TestProxy(t *testing.T) {
	p := faultproxy.New(t, echo(t, "one"))
	if !strings.HasPrefix(p.URL(), "tcp://127.0.0.1:") {
		t.Errorf("address %s", p.URL())
	}
	say := func(c net.Conn, text string) {
		t.Helper()
		if _, err := c.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	want := func(c net.Conn, text string) {
		t.Helper()
		if err := hears(c, text, ample); err != nil {
			t.Errorf("waiting for %q: %v", text, err)
		}
	}
	silent := func(c net.Conn) {
		t.Helper()
		if err := hears(c, "x", soon); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a dead line says %v", err)
		}
	}
	first := dial(t, p)
	want(first, "one")
	say(first, "hello")
	want(first, "hello")

	p.Stall()
	second := dial(t, p) // it is taken, and hears nothing
	say(first, "late")
	silent(first)
	silent(second)
	p.Restore()
	want(first, "late")
	want(second, "one")

	p.Cut()
	third := dial(t, p)
	for _, c := range []net.Conn{first, second, third} {
		if err := hears(c, "x", ample); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a line that was cut says %v", err)
		}
	}
	p.Aim(t, echo(t, "two"))
	p.Restore()
	want(dial(t, p), "two")

	p.Stall()
	fourth := dial(t, p)
	p.Cut() // also what is stalled
	if err := hears(fourth, "x", ample); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a line that was cut says %v", err)
	}
}
