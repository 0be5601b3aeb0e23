package edge

import "golang.org/x/sys/unix"

// closed returns the connections that their clients have closed, and stops watching
// them. POLLRDHUP tells of a close even when the client has sent more before it, a
// pipelined request or the goodbye of TLS.
func (w *watcher) closed() []*watchedConn {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.conns) == 0 {
		return nil
	}
	conns := make([]*watchedConn, 0, len(w.conns))
	fds := make([]unix.PollFd, 0, len(w.conns))
	for c := range w.conns {
		conns = append(conns, c)
		fds = append(fds, unix.PollFd{Fd: int32(c.fd), Events: unix.POLLRDHUP})
	}
	n, err := unix.Poll(fds, 0)
	if err != nil || n == 0 { // interrupted: the next round is soon
		return nil
	}
	gone := conns[:0]
	for i := range fds {
		if fds[i].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) != 0 {
			gone = append(gone, conns[i])
			delete(w.conns, conns[i])
		}
	}
	return gone
}
