package dispatch

import (
	"bytes"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// What was handed out is what came, in its order, and stays as it is until the reader
// is done with it, whatever comes meanwhile and whatever becomes of the memory that it came in.
func TestUnread(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var u unread
		var want, handed []string
		var got [][]byte
		check := func() {
			if len(got) != len(handed) {
				t.Fatalf("%d payloads were handed out, want %d", len(got), len(handed))
			}
			for i, payload := range got {
				if string(payload) != handed[i] {
					t.Fatalf("payload %d of %d has changed", i, len(got))
				}
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"copy": func(t *rapid.T) {
				size := rapid.OneOf(rapid.IntRange(1, 400), rapid.IntRange(1, 3*maxText)).Draw(t, "size")
				payload := bytes.Repeat([]byte{rapid.Byte().Draw(t, "byte")}, size)
				want = append(want, string(payload))
				u.copy(payload)
				clear(payload)
			},
			"add": func(t *rapid.T) {
				payload := []byte{rapid.Byte().Draw(t, "byte")}
				want = append(want, string(payload))
				u.add(payload)
			},
			"hand": func(*rapid.T) {
				got, handed, want = u.hand(), want, nil
			},
			"back": func(*rapid.T) {
				u.back()
				got, handed = nil, nil
			},
			"drop": func(*rapid.T) {
				u.drop()
				want = nil
			},
			"": func(t *rapid.T) {
				check()
				size := 0
				for _, payload := range want {
					size += len(payload)
				}
				if u.size != size {
					t.Fatalf("size is %d, want %d", u.size, size)
				}
				if cap(u.text) > maxText && !slices.ContainsFunc(want, func(p string) bool { return len(p) > maxText }) {
					t.Fatalf("%d bytes are kept for nothing", cap(u.text))
				}
			},
		})
	})
}

// A reader that keeps up costs no memory for each token.
func TestUnreadAllocatesNothing(t *testing.T) {
	var u unread
	payload := bytes.Repeat([]byte("x"), 200)
	for _, prompt := range []bool{true, false} {
		token := func() {
			u.copy(payload)
			if _ = u.hand(); prompt {
				u.back()
			}
		}
		token()
		token()
		if n := testing.AllocsPerRun(100, token); n > 0 {
			t.Errorf("a token costs %v allocations", n)
		}
		if second := u.handed.text != nil; second == prompt {
			t.Errorf("there is a second memory: %t", second)
		}
	}
}
