package edge

import (
	"context"
	"net"
	"sync"
	"syscall"
	"time"
)

// watcher notices clients that close their connection. Neither Fiber nor fasthttp
// tells: a handler that waits isn't told at all, and of a stream only the second
// write after the close fails. One goroutine asks the kernel about all sockets at
// once, a few times a second.
type watcher struct {
	mu    sync.Mutex // also held while the kernel is asked, so that no socket is closed and its number reused meanwhile
	conns map[*watchedConn]struct{}
}

type watchedConn struct {
	fd   int
	gone func()
}

// watchEvery is how fast a client that leaves is noticed.
const watchEvery = 200 * time.Millisecond

func newWatcher() *watcher { return &watcher{conns: make(map[*watchedConn]struct{})} }

// add watches a connection and calls gone, once and from another goroutine, when the
// client has closed it. The function it returns ends the watch; it must be called
// before the connection is closed.
func (w *watcher) add(conn net.Conn, gone func()) (remove func()) {
	fd, ok := descriptor(conn)
	if !ok {
		return func() {}
	}
	c := &watchedConn{fd, gone}
	w.mu.Lock()
	w.conns[c] = struct{}{}
	w.mu.Unlock()
	return func() {
		w.mu.Lock()
		delete(w.conns, c)
		w.mu.Unlock()
	}
}

// run watches until ctx ends.
func (w *watcher) run(ctx context.Context) {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			for _, c := range w.closed() {
				c.gone()
			}
		}
	}
}

// descriptor returns the file descriptor of a TCP connection, under TLS or not.
func descriptor(conn net.Conn) (int, bool) {
	if t, ok := conn.(interface{ NetConn() net.Conn }); ok {
		conn = t.NetConn()
	}
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return 0, false
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return 0, false
	}
	fd := -1
	if err := raw.Control(func(n uintptr) { fd = int(n) }); err != nil {
		return 0, false
	}
	return fd, fd >= 0
}
