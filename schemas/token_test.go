package schemas

import (
	"strings"
	"testing"
)

func TestEncodeToken(t *testing.T) {
	for s, want := range map[string]string{
		"":                        "=",
		"=":                       "=3D",
		"==":                      "=3D=3D",
		"a":                       "a",
		"Az09_-":                  "Az09_-",
		"ten_01K0000000000000000": "ten_01K0000000000000000",
		"llama-3.3-70b":           "llama-3=2E3-70b",
		"qwen/qwen2.5:32b":        "qwen=2Fqwen2=2E5=3A32b",
		"a.b>*":                   "a=2Eb=3E=2A",
		" ":                       "=20",
		"\r\n":                    "=0D=0A",
		"\x00\x7f":                "=00=7F",
		"é":                       "=C3=A9",
		"\xff":                    "=FF",
		"$SYS":                    "=24SYS",
	} {
		got := EncodeToken(s)
		if got != want {
			t.Errorf("EncodeToken(%q) = %q, want %q", s, got, want)
		}
		if back, err := DecodeToken(got); err != nil || back != s {
			t.Errorf("DecodeToken(%q) = %q, %v, want %q", got, back, err, s)
		}
	}
}

func TestEncodeTokenOfEveryByte(t *testing.T) {
	seen := map[string]int{}
	for i := range 256 {
		token := EncodeToken(string([]byte{byte(i)}))
		checkToken(t, token)
		if other, ok := seen[token]; ok {
			t.Errorf("bytes %d and %d have the same token %q", other, i, token)
		}
		seen[token] = i
		if back, err := DecodeToken(token); err != nil || back != string([]byte{byte(i)}) {
			t.Errorf("DecodeToken(%q) = %q, %v", token, back, err)
		}
	}
}

func TestDecodeTokenRefuses(t *testing.T) {
	for _, token := range []string{
		"",         // a subject has no empty tokens
		"==",       // the empty string is one '='
		"a=", "=2", // an escape that is cut off
		"a=2", "=2E=", "=2E=4",
		"=2e",          // lower case
		"=41", "a=2Db", // what needs no escape: A and -
		"=5F", "=30",
		"=GG", "= 2", "=-1",
		".", "a.b", "*", ">", "a b", "a\tb", "a\nb", "a\x00", "a/b", "é", "\xff", "$SYS",
	} {
		if s, err := DecodeToken(token); err == nil {
			t.Errorf("DecodeToken(%q) = %q, want an error", token, s)
		}
	}
}

// checkToken fails the test if the token can change a subject.
func checkToken(t *testing.T, token string) {
	t.Helper()
	if token == "" {
		t.Error("token is empty")
	}
	for i := range len(token) {
		if c := token[i]; c <= ' ' || c >= 0x7f || strings.IndexByte(".*>$/\\\"", c) >= 0 {
			t.Errorf("token %q has byte %#x at %d", token, c, i)
		}
	}
}

func FuzzEncodeToken(f *testing.F) {
	for _, s := range []string{"", "=", "qwen/qwen2.5:32b", "a.b>*", "\r\n \t\x00", "Ünï", "\xff\xfe", "=2E"} {
		f.Add(s, s+"x")
	}
	f.Fuzz(func(t *testing.T, a, b string) {
		ta, tb := EncodeToken(a), EncodeToken(b)
		checkToken(t, ta)
		if back, err := DecodeToken(ta); err != nil || back != a {
			t.Errorf("%q became %q and then %q, %v", a, ta, back, err)
		}
		if (a == b) != (ta == tb) {
			t.Errorf("%q and %q became %q and %q", a, b, ta, tb)
		}
	})
}

func FuzzDecodeToken(f *testing.F) {
	for _, s := range []string{"", "=", "==", "a", "=2E", "=2e", "=41", "a=", "=C3=A9", "a.b", "*", "=3D"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, token string) {
		s, err := DecodeToken(token)
		if err != nil {
			return
		}
		checkToken(t, token)
		if again := EncodeToken(s); again != token {
			t.Errorf("token %q means %q, whose token is %q", token, s, again)
		}
	})
}
