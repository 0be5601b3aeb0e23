package secret_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/ownllm/ownllm/internal/secret"
)

const canary = "hunter2-canary"

func TestNothingPrintsTheValue(t *testing.T) {
	s := secret.String(canary)
	type holder struct {
		Token secret.String `json:"token"`
		List  []secret.String
	}
	h := holder{Token: s, List: []secret.String{s}}
	for _, verb := range []string{"%s", "%v", "%+v", "%#v", "%q", "%x", "%d", "%10s"} {
		for _, v := range []any{s, &s, h, &h, []secret.String{s}, map[secret.String]secret.String{s: s}} {
			if out := fmt.Sprintf(verb, v); leaks(out) {
				t.Errorf("Sprintf(%q, %T) = %s", verb, v, out)
			}
		}
	}
	b, err := json.Marshal(h)
	if err != nil {
		t.Fatal(err)
	}
	if leaks(string(b)) || !strings.Contains(string(b), `"token":"[redacted]"`) {
		t.Errorf("json: %s", b)
	}
	for _, format := range []func(*bytes.Buffer) slog.Handler{
		func(w *bytes.Buffer) slog.Handler { return slog.NewTextHandler(w, nil) },
		func(w *bytes.Buffer) slog.Handler { return slog.NewJSONHandler(w, nil) },
	} {
		var out bytes.Buffer
		slog.New(format(&out)).Info("started", "token", s, "any", h, "err", errors.New(s.String()))
		if leaks(out.String()) || !strings.Contains(out.String(), "[redacted]") {
			t.Errorf("slog: %s", out.String())
		}
	}
}

// leaks looks for the value, as text and as the hexadecimal that %x would make.
func leaks(out string) bool {
	return strings.Contains(out, canary) || strings.Contains(out, fmt.Sprintf("%x", canary))
}

func TestRoundTrip(t *testing.T) {
	var s secret.String
	if err := s.UnmarshalText([]byte(canary)); err != nil {
		t.Fatal(err)
	}
	if s.Reveal() != canary {
		t.Errorf("Reveal() = %q", s.Reveal())
	}
	if got := secret.String("").String(); got != "" {
		t.Errorf("an empty secret prints %q", got)
	}
}
