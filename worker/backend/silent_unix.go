//go:build unix

package backend

import (
	"errors"
	"syscall"
)

// nothingToRead reports whether the socket is open and has nothing to read.
func nothingToRead(fd uintptr) bool {
	var b [1]byte
	_, err := syscall.Read(int(fd), b[:])
	return errors.Is(err, syscall.EAGAIN)
}
