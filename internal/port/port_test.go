package port_test

import (
	"net"
	"strconv"
	"sync"
	"testing"

	"github.com/ownllm/ownllm/internal/port"
)

// Nobody gets what another has reserved, though nobody listens there yet, and it can be
// listened on, again and again.
func TestReserve(t *testing.T) {
	const each = 200
	var all sync.Map
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			for range each {
				address, release, err := port.Reserve()
				if err != nil {
					t.Error(err)
					return
				}
				t.Cleanup(release)
				if _, twice := all.LoadOrStore(address, true); twice {
					t.Errorf("%s was given twice", address)
				}
				for range 2 {
					l, err := net.Listen("tcp", address)
					if err != nil {
						t.Error(err)
						return
					}
					_, number, _ := net.SplitHostPort(address)
					if n, err := strconv.Atoi(number); err != nil || n >= 32768 {
						t.Errorf("the system itself may choose %s", address)
					}
					if err := l.Close(); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	group.Wait()
}

// What was released can be had by others.
func TestRelease(t *testing.T) {
	address, release, err := port.Reserve()
	if err != nil {
		t.Fatal(err)
	}
	mark := func() error {
		c, err := net.ListenPacket("udp4", address)
		if err == nil {
			_ = c.Close()
		}
		return err
	}
	if mark() == nil {
		t.Error("it isn't marked")
	}
	release()
	if err := mark(); err != nil {
		t.Error(err)
	}
}
