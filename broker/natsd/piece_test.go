package natsd

import (
	"bytes"
	"io"
	"net"
	"testing"
)

// What is written arrives as it is, in pieces unless it is large, and an error says how much
// has arrived.
func TestPieces(t *testing.T) {
	for _, size := range []int{0, 1, pieceSize, pieceSize + 1, 10*pieceSize - 1, maxPieces, maxPieces + 1} {
		ours, theirs := net.Pipe()
		sent := bytes.Repeat([]byte("0123456"), size/7+1)[:size]
		wrote := make(chan error, 1)
		go func() {
			n, err := pieces{ours}.Write(sent)
			if n != size {
				t.Errorf("%d bytes: %d were written", size, n)
			}
			wrote <- err
			_ = ours.Close()
		}()
		var got []byte
		largest := 0
		buf := make([]byte, 2*maxPieces)
		for {
			n, err := theirs.Read(buf)
			got, largest = append(got, buf[:n]...), max(largest, n)
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := <-wrote; err != nil || !bytes.Equal(got, sent) {
			t.Errorf("%d bytes: %d came, %v", size, len(got), err)
		}
		if want := min(size, pieceSize); size <= maxPieces && largest != want {
			t.Errorf("%d bytes: a piece has %d", size, largest)
		} else if size > maxPieces && largest != size {
			t.Errorf("%d bytes: they came in pieces of %d", size, largest)
		}
	}
	ours, theirs := net.Pipe()
	go func() {
		_, _ = io.ReadFull(theirs, make([]byte, pieceSize))
		_ = theirs.Close()
	}()
	if n, err := (pieces{ours}).Write(make([]byte, 3*pieceSize)); n != pieceSize || err == nil {
		t.Errorf("of a connection that broke: %d, %v", n, err)
	}
}
