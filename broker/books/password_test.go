package books_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
)

// The password of Postgres may stand in a file that the address names, and no error shows it.
func TestPasswordInAFile(t *testing.T) {
	const canary = "canary-of-the-password"
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	shown := make(chan string, 1)
	go func() { // a server that asks for a password, and refuses whatever comes
		defer close(shown)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
		var size [4]byte
		if _, err := io.ReadFull(conn, size[:]); err != nil {
			return
		}
		if _, err := io.CopyN(io.Discard, conn, int64(binary.BigEndian.Uint32(size[:]))-4); err != nil {
			return
		}
		if _, err := conn.Write([]byte("R\x00\x00\x00\x08\x00\x00\x00\x03")); err != nil { // in clear text
			return
		}
		var head [5]byte
		if _, err := io.ReadFull(conn, head[:]); err != nil || head[0] != 'p' {
			return
		}
		password := make([]byte, binary.BigEndian.Uint32(head[1:])-4)
		if _, err := io.ReadFull(conn, password); err == nil {
			shown <- string(bytes.TrimSuffix(password, []byte{0}))
		}
	}()
	file := filepath.Join(t.TempDir(), "passwords")
	if err := os.WriteFile(file, []byte("*:*:ownllm:ada:"+canary+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	s, err := books.Open(ctx, books.Config{URL: "postgres://ada@" + l.Addr().String() + "/ownllm?sslmode=disable&passfile=" + url.QueryEscape(file)})
	if err == nil {
		err = s.Ping(ctx)
		s.Close()
	}
	if err == nil || strings.Contains(err.Error(), canary) {
		t.Errorf("the error is %v", err)
	}
	if got := <-shown; got != canary {
		t.Errorf("the password is %q", got)
	}
}
