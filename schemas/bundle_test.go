package schemas

import (
	"bytes"
	"encoding/json"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

type entry struct {
	nonce Nonce
	frame []byte
}

func cutAll(b []byte) (list []entry, err error) {
	for len(b) > 0 {
		var e entry
		if e.nonce, e.frame, b, err = CutEntry(b); err != nil {
			return list, err
		}
		list = append(list, e)
	}
	return list, nil
}

func TestBundleRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var b []byte
		var want []entry
		for range rapid.IntRange(0, 5).Draw(t, "entries") {
			e := entry{NewNonce(), rapid.SliceOf(rapid.Byte()).Draw(t, "frame")}
			b = AppendEntry(b, e.nonce, e.frame)
			want = append(want, e)
		}
		got, err := cutAll(b)
		if err != nil || !slices.EqualFunc(got, want, func(a, b entry) bool { return a.nonce == b.nonce && bytes.Equal(a.frame, b.frame) }) {
			t.Fatalf("%q came back as %q, %v, want %q", b, got, err, want)
		}
	})
}

// The bytes are a part of the contract, as those of a chunk are.
func TestEntryBytes(t *testing.T) {
	const n = Nonce("zzFmVtrSBXpn2qRyTJhJ3w")
	b := AppendEntry([]byte("before"), n, []byte("{}\n12"))
	if want := "before" + `{"nonce":"zzFmVtrSBXpn2qRyTJhJ3w","size":5}` + "\n{}\n12"; string(b) != want {
		t.Errorf("an entry is %q, want %q", b, want)
	}
	line, _, _ := bytes.Cut(b[len("before"):], []byte{'\n'})
	head, ok := decodeBundleHead(line)
	var plain BundleHead
	if err := json.Unmarshal(line, &plain); err != nil || !ok || head != plain || plain != (BundleHead{n, 5}) {
		t.Errorf("%q is %+v, %t by hand and %+v, %v by encoding/json", line, head, ok, plain, err)
	}
	if allocs := testing.AllocsPerRun(100, func() { b = AppendEntry(b[:0], n, b[:0]) }); allocs != 0 {
		t.Errorf("an entry into a buffer costs %v allocations", allocs)
	}
	if allocs := testing.AllocsPerRun(100, func() { _, _, _, _ = CutEntry(b) }); allocs > 1 {
		t.Errorf("reading an entry costs %v allocations, want one for the nonce", allocs)
	}
}

// What another program writes, or a broken one, is read as JSON or refused.
func TestCutEntry(t *testing.T) {
	for _, tc := range []struct {
		bundle string
		want   entry
		left   string
		ok     bool
	}{
		{`{"size":2,"more":[],"nonce":"n"}` + "\nabc", entry{"n", []byte("ab")}, "c", true},
		{`{"nonce":"a.b\"","size":0}` + "\nabc", entry{`a.b"`, nil}, "abc", true},
		{`{"nonce":"n","size":3}` + "\nabc", entry{"n", []byte("abc")}, "", true},
		{`{"nonce":"n","size":4}` + "\nabc", entry{}, "", false},
		{`{"nonce":"n","size":-1}` + "\nabc", entry{}, "", false},
		{`{"nonce":"n","size":01}` + "\nabc", entry{}, "", false},
		{`{"nonce":"n","size":1e99}` + "\nabc", entry{}, "", false},
		{`{"nonce":"n","size":9999999999999999999999}` + "\nabc", entry{}, "", false},
		{`{"nonce":"n","size":1}`, entry{}, "", false},
		{"\nabc", entry{}, "", false},
		{"", entry{}, "", false},
	} {
		n, frame, left, err := CutEntry([]byte(tc.bundle))
		if (err == nil) != tc.ok || n != tc.want.nonce || !bytes.Equal(frame, tc.want.frame) || string(left) != tc.left {
			t.Errorf("%q: %q, %q, %q, %v", tc.bundle, n, frame, left, err)
		}
	}
}

// Whatever an agent sends, no entry reaches beyond the message, and reading it ends.
func FuzzCutEntry(f *testing.F) {
	f.Add(AppendEntry(AppendEntry(nil, "n", []byte("abc")), "m", nil))
	f.Add([]byte(`{"nonce":"n","size":4}` + "\nabc"))
	f.Fuzz(func(t *testing.T, b []byte) {
		rest := b
		for len(rest) > 0 {
			_, frame, left, err := CutEntry(rest)
			if err != nil {
				return
			}
			if len(frame)+len(left) >= len(rest) || cap(frame) != len(frame) {
				t.Fatalf("of %q, %q and %q are cut", rest, frame, left)
			}
			rest = left
		}
	})
}
