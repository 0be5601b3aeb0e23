//go:build !linux

package edge

// closed knows nothing on systems without POLLRDHUP: there a client that leaves is
// noticed when a write to it fails, at the next token or keep-alive.
func (w *watcher) closed() []*watchedConn { return nil }
