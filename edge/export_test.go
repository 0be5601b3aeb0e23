package edge

import (
	"time"

	"github.com/ownllm/ownllm/schemas"
)

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

// Uploads counts the bodies of a key that are on their way.
func (e *Edge) Uploads(key schemas.KeyID) int {
	e.uploads.mu.Lock()
	defer e.uploads.mu.Unlock()
	return e.uploads.count[key]
}

// Watched counts the connections that are watched.
func (e *Edge) Watched() int {
	e.watch.mu.Lock()
	defer e.watch.mu.Unlock()
	return len(e.watch.conns)
}
