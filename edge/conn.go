package edge

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// writeWait is how long a client may take nothing of what is sent to it, and
	// writePiece how much is sent at once, in bytes; hurriedPiece is that for a client that
	// has fallen behind.
	writeWait    = 60 * time.Second
	writePiece   = 256 << 10
	hurriedPiece = 4 << 10
	// lingerWait and lingerBytes bound what is taken in of a body that nobody wants.
	lingerWait  = 3 * time.Second
	lingerBytes = 64 << 20
	// stallGrace is how long a client that has fallen behind has to take the error that
	// ends its stream, before its connection is broken off.
	stallGrace = 2 * time.Second
)

// clients are the connections of clients that are open.
type clients struct {
	mu        sync.Mutex
	open      map[*conn]struct{}
	last      chan struct{} // closed when none is open any more; nil: nobody waits for that
	writeWait time.Duration
}

func newClients() *clients {
	return &clients{open: make(map[*conn]struct{}), writeWait: writeWait}
}

// listener hands out connections of clients.
type listener struct {
	net.Listener
	clients *clients
}

// Accept implements net.Listener.
func (l listener) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	tcp, ok := nc.(*net.TCPConn)
	if !ok {
		return nc, nil
	}
	return l.clients.add(tcp), nil
}

func (cs *clients) add(tcp *net.TCPConn) *conn {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c := &conn{TCPConn: tcp, clients: cs, writeWait: cs.writeWait}
	cs.open[c] = struct{}{}
	return c
}

// finish waits until all connections are closed, and closes those that are still open
// after leave, without a word. It is called once, when nothing is accepted any more.
func (cs *clients) finish(leave time.Duration) {
	cs.mu.Lock()
	if len(cs.open) == 0 {
		cs.mu.Unlock()
		return
	}
	last := make(chan struct{})
	cs.last = last
	cs.mu.Unlock()
	timer := time.NewTimer(leave)
	defer timer.Stop()
	select {
	case <-last:
		return
	case <-timer.C:
	}
	cs.mu.Lock()
	for c := range cs.open {
		_ = c.TCPConn.Close()
	}
	cs.mu.Unlock()
	// Whoever served them ends now, but for one who is stuck somewhere else.
	timer.Reset(lingerWait)
	select {
	case <-last:
	case <-timer.C:
	}
}

// conn is the connection of a client, under TLS or not. The server sets no deadline
// for writes, since a stream may last for long; here each write has one, so that a
// client that has stopped reading doesn't hold a goroutine and a reply for ever.
type conn struct {
	*net.TCPConn
	clients   *clients
	writeWait time.Duration
	closed    atomic.Bool
	talked    bool // something has come; belongs to the reader
	// unread says that the request was answered before all of it was read.
	unread atomic.Bool
	// hurry says that the client has fallen behind once, and is waited for no longer than
	// stallGrace from then on.
	hurry atomic.Bool
}

// Read implements net.Conn. A connection on which nothing ever came is closed without a
// word when its time is up: an answer to no request would be taken for that to the first
// one, if the client sends it just then.
func (c *conn) Read(p []byte) (int, error) {
	n, err := c.TCPConn.Read(p)
	switch {
	case n > 0:
		c.talked = true
	case !c.talked && errors.Is(err, os.ErrDeadlineExceeded):
		err = io.EOF
	}
	return n, err
}

// Write implements net.Conn.
func (c *conn) Write(p []byte) (n int, err error) {
	for {
		piece := writePiece
		if err := c.SetWriteDeadline(time.Now().Add(c.writeWait)); err != nil {
			return n, err
		}
		if c.hurry.Load() { // looked at after the deadline is set: see hurryUp
			_ = c.SetWriteDeadline(time.Now().Add(stallGrace))
			piece = hurriedPiece
		}
		m, err := c.TCPConn.Write(p[n:min(len(p), n+piece)])
		n += m
		if err != nil || n == len(p) {
			return n, err
		}
	}
}

// Close implements net.Conn. To close a socket that has unread input resets the
// connection, and the client may lose the answer that is on its way to it. So what it
// still sends is taken in for a while.
func (c *conn) Close() error {
	if c.closed.Swap(true) {
		return net.ErrClosed
	}
	if !c.unread.Load() || c.CloseWrite() != nil {
		return c.end()
	}
	go func() { // ends within lingerWait, and finish waits for it
		if c.SetReadDeadline(time.Now().Add(lingerWait)) == nil {
			_, _ = io.CopyN(io.Discard, c.TCPConn, lingerBytes)
		}
		_ = c.end()
	}()
	return nil
}

func (c *conn) end() error {
	err := c.TCPConn.Close()
	c.clients.mu.Lock()
	defer c.clients.mu.Unlock()
	delete(c.clients.open, c)
	if len(c.clients.open) == 0 && c.clients.last != nil {
		close(c.clients.last)
		c.clients.last = nil
	}
	return err
}

// linger says whether a request on the connection is answered without being read whole.
func linger(nc net.Conn, unread bool) {
	if c := client(nc); c != nil {
		c.unread.Store(unread)
	}
}

// hurryUp gives a client that has fallen behind a little time to take what is being
// written to it, and whatever comes after that.
func hurryUp(nc net.Conn) {
	if c := client(nc); c != nil {
		c.hurry.Store(true) // before the deadline, so that a write that begins now has it, too
		_ = c.SetWriteDeadline(time.Now().Add(stallGrace))
	}
}

// client is the connection of a client, under TLS or not; nil for one of another kind.
func client(nc net.Conn) *conn {
	if t, ok := nc.(interface{ NetConn() net.Conn }); ok {
		nc = t.NetConn()
	}
	c, _ := nc.(*conn)
	return c
}
