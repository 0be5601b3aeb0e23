package edge

import (
	"io"
	"net"
	"testing"
	"time"
)

// A connection that nobody has spoken on ends without an answer; one on which something has
// come has its time up like any other.
func TestSilentConnection(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cs := newClients()
	for _, said := range []string{"", "GET"} {
		peer, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		c, err := listener{l, cs}.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := peer.Write([]byte(said)); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 8)
		if said != "" {
			if _, err := io.ReadFull(c, buf[:len(said)]); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.SetReadDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(buf); (err == io.EOF) != (said == "") {
			t.Errorf("after %q the read ends with %v", said, err)
		}
		_ = peer.Close()
		_ = c.Close()
	}
}
