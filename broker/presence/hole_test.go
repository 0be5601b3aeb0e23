package presence

import (
	"net"
	"net/url"
	"sync"
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/internal/natstest"
)

// hole is a proxy in front of a nats-server that can swallow everything, in both
// directions and of new connections too, without closing any.
type hole struct {
	listener net.Listener
	target   string
	cfg      bus.Config

	mu      sync.Mutex
	open    *sync.Cond
	blocked bool
	ended   bool
	conns   []net.Conn
	wg      sync.WaitGroup
}

func newHole(t *testing.T, server *natstest.Server) *hole {
	t.Helper()
	cfg := server.Config("feed")
	u, err := url.Parse(cfg.URL)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h := &hole{listener: listener, target: u.Host, cfg: cfg}
	h.open = sync.NewCond(&h.mu)
	h.cfg.URL = "nats://" + listener.Addr().String()
	h.wg.Go(h.accept)
	t.Cleanup(h.close)
	return h
}

func (h *hole) connect(t *testing.T) *nats.Conn {
	t.Helper()
	// The server tells clients its own address, past the hole.
	nc, err := bus.Connect(h.cfg, natstest.Log, nats.IgnoreDiscoveredServers())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return nc
}

func (h *hole) accept() {
	for {
		client, err := h.listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", h.target)
		if err != nil {
			client.Close()
			continue
		}
		h.mu.Lock()
		h.conns = append(h.conns, client, server)
		ended := h.ended
		h.mu.Unlock()
		if ended {
			client.Close()
			server.Close()
		}
		h.wg.Go(func() { h.pass(client, server) })
		h.wg.Go(func() { h.pass(server, client) })
	}
}

// pass copies until either end closes, which closes the other.
func (h *hole) pass(from, to net.Conn) {
	defer from.Close()
	defer to.Close()
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		h.mu.Lock()
		for h.blocked && !h.ended {
			h.open.Wait()
		}
		h.mu.Unlock()
		if n > 0 {
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

func (h *hole) swallow(on bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.blocked = on
	h.open.Broadcast()
}

func (h *hole) close() {
	h.listener.Close()
	h.mu.Lock()
	h.ended = true
	h.open.Broadcast()
	for _, c := range h.conns {
		c.Close()
	}
	h.mu.Unlock()
	h.wg.Wait()
}
