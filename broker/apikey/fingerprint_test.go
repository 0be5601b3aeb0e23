package apikey

import (
	"strings"
	"testing"
)

func TestFingerprint(t *testing.T) {
	hash := New().Hash()
	text := hash.Fingerprint()
	if back, err := ParseFingerprint(text); err != nil || back != hash || len(text) != 64 {
		t.Errorf("%q is %x, %v", text, back, err)
	}
	for _, bad := range []string{"", text[1:], text + "0", strings.Repeat("g", 64), strings.Repeat("A", 64), "key_01", secret} {
		if h, err := ParseFingerprint(bad); err == nil || h != (Hash{}) || strings.Contains(err.Error(), secret) {
			t.Errorf("%q is %x, %v", bad, h, err)
		}
	}
}
