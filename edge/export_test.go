package edge

import "time"

// SetWriteWait sets how long a client may take nothing, for connections to come.
func (e *Edge) SetWriteWait(d time.Duration) {
	e.clients.mu.Lock()
	defer e.clients.mu.Unlock()
	e.clients.writeWait = d
}

// Open counts the open connections.
func (e *Edge) Open() int {
	e.clients.mu.Lock()
	defer e.clients.mu.Unlock()
	return len(e.clients.open)
}

// Watched counts the connections that are watched.
func (e *Edge) Watched() int {
	e.watch.mu.Lock()
	defer e.watch.mu.Unlock()
	return len(e.watch.conns)
}
