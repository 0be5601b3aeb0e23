// Package port picks ports for servers that are told theirs before they listen, or that listen
// on theirs again after an end.
//
// A port that the system chooses isn't safe for that: as soon as nobody listens on it, the
// system may choose it for the next who asks, or for a connection that goes out. So these are
// from below the range from which it chooses, and each is marked, for every process that asks
// this package, by a UDP socket of the same number.
package port

import (
	"errors"
	"net"
	"os"
	"strconv"
	"sync/atomic"
)

// Linux chooses from 32768 on, and others from 49152.
const first, last = 10_000, 32_767

// next counts the ports that this process has looked at. Each process begins elsewhere.
var next atomic.Int64

// tries is how many ports are looked at before the machine counts as full.
const tries = 1000

// Reserve returns an address, host and port, of the loopback interface on which nobody
// listens, and which this package gives to nobody else before release is called.
func Reserve() (address string, release func(), err error) {
	for range tries {
		n := int64(os.Getpid())*tries + next.Add(1)
		address = net.JoinHostPort("127.0.0.1", strconv.FormatInt(first+n%(last-first+1), 10))
		mark, taken := net.ListenPacket("udp4", address)
		if taken != nil {
			continue
		}
		if listener, taken := net.Listen("tcp4", address); taken == nil {
			_ = listener.Close()
			return address, func() { _ = mark.Close() }, nil
		}
		_ = mark.Close()
	}
	return "", nil, errors.New("find a free port: all are taken")
}
