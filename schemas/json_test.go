package schemas

import (
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"

	"pgregory.net/rapid"
)

func TestAppendString(t *testing.T) {
	for s, want := range map[string]string{
		"":                     `""`,
		"plain, é, 模, 🙂":       `"plain, é, 模, 🙂"`,
		`"\/`:                  `"\"\\/"`,
		"\n\r\t\b\f\x00\x1f":   `"\n\r\t\u0008\u000c\u0000\u001f"`,
		"\x7f":                 `"\u007f"`,
		"<script>&amp;":        `"<script>&amp;"`,
		"a\u2028b\u2029c":      `"a\u2028b\u2029c"`,
		"\xff":                 `"\ufffd"`,
		"a\xc3":                `"a\ufffd"`,
		"\xed\xa0\x80":         `"\ufffd\ufffd\ufffd"`,
		"\xf0\x9f\x99x":        `"\ufffd\ufffd\ufffdx"`,
		"\ufffd":               `"` + "\ufffd" + `"`,
		"\xe2\x80\xa8\xe2\x80": `"\u2028\ufffd\ufffd"`,
	} {
		if got := string(AppendString(nil, s)); got != want {
			t.Errorf("AppendString(%q) = %s, want %s", s, got, want)
		}
		if got := string(AppendString([]byte("x"), s)); got != "x"+want {
			t.Errorf("what was in dst is gone: %s", got)
		}
	}
}

// checkString holds AppendString to encoding/json: it reads back what it would have
// made of the string itself.
func checkString(t interface {
	Helper()
	Fatalf(string, ...any)
}, s string) {
	t.Helper()
	b := AppendString(nil, s)
	var got, want string
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatalf("%q became %q: %v", s, b, err)
	}
	theirs, err := json.Marshal(s)
	if err != nil {
		t.Fatalf("%q: %v", s, err)
	}
	if err := json.Unmarshal(theirs, &want); err != nil {
		t.Fatalf("%q: %v", s, err)
	}
	if got != want || utf8.ValidString(s) && got != s {
		t.Fatalf("%q came back as %q, want %q", s, got, want)
	}
	// One line of plain text, whatever goes in: a stream's event and a log line hold it.
	if !utf8.Valid(b) || strings.ContainsAny(string(b), "\n\r\x00\u2028\u2029") {
		t.Fatalf("%q became %q", s, b)
	}
}

func TestAppendStringLikeEncodingJSON(t *testing.T) {
	for i := range 256 {
		checkString(t, string([]byte{byte(i)}))
		checkString(t, string([]byte{'a', byte(i), 'b'}))
		checkString(t, string([]byte{0xe2, 0x80, byte(i)}))
	}
	rapid.Check(t, func(t *rapid.T) {
		checkString(t, rapid.String().Draw(t, "text"))
		checkString(t, string(rapid.SliceOf(rapid.Byte()).Draw(t, "bytes")))
	})
}

func FuzzAppendString(f *testing.F) {
	for _, s := range []string{"", "\"\\\n\x00", "a\u2028b", "\xff\xed\xa0\x80", "🙂\xf0\x9f"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) { checkString(t, s) })
}
