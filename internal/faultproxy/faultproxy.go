// Package faultproxy is a TCP proxy that fails as a test wants it to: it stands between a
// client and PostgreSQL, or a worker and the bus, and cuts the line or lets it go dead.
//
// It is for tests only.
package faultproxy

import (
	"context"
	"errors"
	"io"
	"net"
	"net/url"
	"sync"
	"testing"
)

// Proxy stands between a client and the server, and fails as a test wants it to.
type Proxy struct {
	url string

	mu       sync.Mutex
	target   string
	listener net.Listener
	stalled  chan struct{} // open while nothing is passed on; nil: all is passed on
	down     bool
	conns    map[net.Conn]bool

	running sync.WaitGroup
}

// New returns a proxy to the server at the address, a URL whose host and port count. It
// ends with the test.
func New(t testing.TB, address string) *Proxy {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &Proxy{target: u.Host, listener: l, conns: map[net.Conn]bool{}}
	u.Host = l.Addr().String()
	p.url = u.String()
	p.running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			p.running.Go(func() { p.serve(c) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		p.Cut()
		p.running.Wait()
	})
	return p
}

// URL is the address of the server by way of the proxy.
func (p *Proxy) URL() string { return p.url }

// Aim makes the server at the address the target of new connections.
func (p *Proxy) Aim(t testing.TB, address string) {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.target = u.Host
}

// Cut closes every connection, and new ones as soon as they come.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.down = true
	p.flow()
	for c := range p.conns {
		_ = c.Close()
	}
}

// Stall keeps connections open, takes new ones, and passes nothing on, as a network that
// swallows every packet does. What it has taken comes late, after Restore.
func (p *Proxy) Stall() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stalled == nil {
		p.stalled = make(chan struct{})
	}
}

// Restore undoes Cut and Stall.
func (p *Proxy) Restore() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.down = false
	p.flow()
}

// flow ends a stall. p.mu is held.
func (p *Proxy) flow() {
	if p.stalled != nil {
		close(p.stalled)
		p.stalled = nil
	}
}

// gate blocks while the proxy is stalled.
func (p *Proxy) gate() {
	p.mu.Lock()
	stalled := p.stalled
	p.mu.Unlock()
	if stalled != nil {
		<-stalled
	}
}

// keep notes a connection, so that Cut can close it, or refuses it.
func (p *Proxy) keep(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.down {
		_ = c.Close()
		return false
	}
	p.conns[c] = true
	return true
}

func (p *Proxy) drop(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
	_ = c.Close()
}

func (p *Proxy) serve(client net.Conn) {
	if !p.keep(client) {
		return
	}
	defer p.drop(client)
	p.gate()
	p.mu.Lock()
	target := p.target
	p.mu.Unlock()
	server, err := new(net.Dialer).DialContext(context.Background(), "tcp", target)
	if err != nil || !p.keep(server) {
		return
	}
	defer p.drop(server)
	var both sync.WaitGroup
	pass := func(to, from net.Conn) {
		_, err := io.Copy(gated{to, p}, from)
		if err == nil || !errors.Is(err, net.ErrClosed) {
			_ = to.Close()
			_ = from.Close()
		}
	}
	both.Go(func() { pass(server, client) })
	both.Go(func() { pass(client, server) })
	both.Wait()
}

// gated is a writer that waits while the proxy is stalled.
type gated struct {
	to    io.Writer
	proxy *Proxy
}

func (g gated) Write(b []byte) (int, error) {
	g.proxy.gate()
	return g.to.Write(b)
}
