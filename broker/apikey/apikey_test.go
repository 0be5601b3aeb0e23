package apikey

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"strings"
	"testing"

	"github.com/ownllm/ownllm/schemas"
)

const secret = "sk-ownllm-AbCdEfGhIjKlMnOpQrStUvWx"

var wellFormed = regexp.MustCompile(`^sk-ownllm-[A-Za-z0-9_-]{16,128}$`)

func TestNew(t *testing.T) {
	seen := map[string]bool{}
	counts := map[rune]int{}
	const n = 20000
	for range n {
		k := New()
		s := k.Reveal()
		if !regexp.MustCompile(`^sk-ownllm-[A-Za-z0-9]{24}$`).MatchString(s) || seen[s] {
			t.Fatalf("key %q", s)
		}
		seen[s] = true
		for _, c := range s[len(Begin):] {
			counts[c]++
		}
		if back, err := FromSecret(s); err != nil || back.Hash() != k.Hash() {
			t.Fatal("a new key doesn't parse", err)
		}
	}
	// With plain b%62 the first 8 characters would come a quarter more often.
	mean := float64(n*newRest) / float64(len(base62))
	for _, c := range base62 {
		if got := float64(counts[c]); got < 0.94*mean || got > 1.06*mean {
			t.Errorf("character %q came %v times, expected about %v", c, got, mean)
		}
	}
}

func TestParse(t *testing.T) {
	rest := strings.Repeat("a", 16)
	good := map[string]string{
		"Bearer " + secret:                             secret,
		"bearer " + secret:                             secret,
		"BEARER   " + secret:                           secret,
		"Bearer sk-ownllm-" + rest:                     "sk-ownllm-" + rest,
		"Bearer sk-ownllm-user-0123456789ab_":          "sk-ownllm-user-0123456789ab_",
		"Bearer sk-ownllm-" + strings.Repeat("z", 128): "sk-ownllm-" + strings.Repeat("z", 128),
	}
	for header, want := range good {
		k, err := Parse(header)
		if err != nil || k.Reveal() != want || k.IsZero() {
			t.Errorf("Parse(%q) = %q, %v", header, k.Reveal(), err)
		}
	}
	bad := []string{
		"", " ", "Bearer", "Bearer ", secret, "Basic " + secret, "Token " + secret, "Bearer\t" + secret,
		"Bearer" + secret, " Bearer " + secret, "Bearer " + secret + " ", "Bearer " + secret + "\n", "Bearer " + secret + "\x00",
		"Bearer sk-ownllm-" + rest[1:], "Bearer sk-ownllm-" + strings.Repeat("z", 129),
		"Bearer sk-OwnLLM-" + rest, "Bearer sk-" + rest, "Bearer sk-ownllm-" + rest + "é", "Bearer sk-ownllm-" + rest + ".",
		"Bearer " + secret + "," + secret, "Bearer \"" + secret + "\"", "Bearer " + secret + " " + secret,
	}
	for _, header := range bad {
		k, err := Parse(header)
		var e *schemas.Error
		if !errors.As(err, &e) || e.Code != schemas.CodeKeyMalformed || e.Status() != 401 || !k.IsZero() {
			t.Errorf("Parse(%q) = %v, %v", header, k, err)
		} else if strings.Contains(e.Message, secret[len(Begin):]) || strings.Contains(e.Message, rest) {
			t.Errorf("the message repeats what was sent: %s", e.Message)
		}
	}
}

func TestParts(t *testing.T) {
	k, err := FromSecret(secret)
	if err != nil {
		t.Fatal(err)
	}
	if k.Hash() != sha256.Sum256([]byte(secret)) {
		t.Error("hash")
	}
	if k.Prefix() != "sk-ownllm-AbCd" {
		t.Errorf("prefix %q", k.Prefix())
	}
	var none Key
	if !none.IsZero() || none.Prefix() != "" || none.Reveal() != "" || none.String() != "no key" {
		t.Error("the zero key")
	}
}

func TestKeepsItsSecret(t *testing.T) {
	k, err := FromSecret(secret)
	if err != nil {
		t.Fatal(err)
	}
	type exported struct{ K Key }
	type hidden struct{ k Key }
	holders := []any{k, &k, exported{k}, &exported{k}, hidden{k}, &hidden{k}, []Key{k}, map[string]Key{"k": k}, map[Key]int{k: 1}, []any{hidden{k}}}
	hidden1 := secret[14:]
	check := func(how, got string) {
		t.Helper()
		if strings.Contains(got, hidden1) || strings.Contains(got, fmt.Sprintf("%x", hidden1)) || strings.Contains(got, fmt.Sprintf("%X", hidden1)) {
			t.Errorf("%s gives the key away: %s", how, got)
		}
	}
	for _, h := range holders {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%t", "%p", "%U", "%c", "%60v"} {
			check(fmt.Sprintf("%s of %T", verb, h), fmt.Sprintf(verb, h))
		}
		if b, err := json.Marshal(h); err == nil {
			check(fmt.Sprintf("JSON of %T", h), string(b))
		}
		var text, js bytes.Buffer
		slog.New(slog.NewTextHandler(&text, nil)).Info("x", "k", h)
		slog.New(slog.NewJSONHandler(&js, nil)).Info("x", "k", h)
		check(fmt.Sprintf("log of %T", h), text.String()+js.String())
	}
	check("an error", fmt.Errorf("key %w", fmt.Errorf("%v", k)).Error())
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"", "Bearer " + secret, "bearer  " + secret, "Basic x", "Bearer sk-ownllm-", "Bearer " + secret + "\r\nX: y"} {
		f.Add(s)
	}
	form := regexp.MustCompile(`^(?i:bearer) +(sk-ownllm-[A-Za-z0-9_-]{16,128})$`)
	f.Fuzz(func(t *testing.T, header string) {
		k, err := Parse(header)
		m := form.FindStringSubmatch(header)
		if strings.HasSuffix(header, "\n") {
			m = nil // unlike in a shell, nothing may follow the key
		}
		if (err == nil) != (m != nil) {
			t.Fatalf("Parse(%q) = %v", header, err)
		}
		if err == nil {
			if k.Reveal() != m[1] || !wellFormed.MatchString(k.Reveal()) || !strings.HasPrefix(m[1], k.Prefix()) {
				t.Fatalf("Parse(%q) = %q", header, k.Reveal())
			}
			return
		}
		var e *schemas.Error
		if !errors.As(err, &e) || e.Code != schemas.CodeKeyMalformed || !k.IsZero() {
			t.Fatalf("Parse(%q): %v", header, err)
		}
	})
}

func BenchmarkParse(b *testing.B) {
	header := "Bearer " + secret
	b.ReportAllocs()
	for b.Loop() {
		k, err := Parse(header)
		if err != nil || k.Hash() == (Hash{}) {
			b.Fatal(err)
		}
	}
}
