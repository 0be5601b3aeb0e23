package natsd

import "net"

// The server reads each connection through a buffer that it doubles when a read fills it, and
// halves when some didn't: for each of these it makes a new one. On a connection that brings a
// bundle of frames each millisecond, and small messages in between, it would do so all the
// time, up and down from some hundred bytes to 32 KiB: that was a fifth of all garbage of
// `ownllm up` with 2,000 streams. An in-process connection brings a read exactly what a write
// has, so writes in small pieces keep the buffer small.

const (
	// pieceSize is the size of a piece, in bytes.
	pieceSize = 1 << 10
	// maxPieces is what is still cut up, in bytes. Of what is larger, a large body say, the
	// pieces would cost more than the buffers.
	maxPieces = 64 << 10
)

// pieces is a connection that is written to in pieces.
type pieces struct{ net.Conn }

// Write implements net.Conn.
func (c pieces) Write(p []byte) (n int, err error) {
	size := pieceSize
	if len(p) > maxPieces {
		size = len(p)
	}
	for first := true; first || n < len(p) && err == nil; first = false {
		var m int
		m, err = c.Conn.Write(p[n:min(n+size, len(p))])
		n += m
	}
	return n, err
}
