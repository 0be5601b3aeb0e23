package credential_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"regexp"
	"strings"
	"testing"

	"github.com/ownllm/ownllm/broker/credential"
)

func TestNew(t *testing.T) {
	seen := map[string]bool{}
	for range 1000 {
		pairing, agent := credential.NewPairing(), credential.NewAgent()
		if !regexp.MustCompile(`^ownllm_pair_[0-9a-f]{32}$`).MatchString(pairing.Reveal()) {
			t.Fatal(len(pairing.Reveal()))
		}
		if !regexp.MustCompile(`^ownllm_agent_[0-9A-Za-z]{40}$`).MatchString(agent.Reveal()) {
			t.Fatal(len(agent.Reveal()))
		}
		for _, s := range []credential.Secret{pairing, agent} {
			if seen[s.Reveal()] || s.IsZero() {
				t.Fatal("made twice, or none")
			}
			seen[s.Reveal()] = true
		}
		if got, err := credential.ParsePairing(pairing.Reveal()); err != nil || got.Hash() != pairing.Hash() {
			t.Fatal(err)
		}
		if got, err := credential.ParseAgent(agent.Reveal()); err != nil || got.Hash() != agent.Hash() {
			t.Fatal(err)
		}
	}
	var zero [32]byte
	if got := credential.DeriveAgent(zero).Reveal(); got != "ownllm_agent_"+strings.Repeat("0", 40) {
		t.Error(got)
	}
	if a, b := credential.DerivePairing([32]byte{1}), credential.DerivePairing([32]byte{2}); a.Hash() == b.Hash() {
		t.Error("derived alike")
	}
}

func TestParse(t *testing.T) {
	hexadecimal, letters := strings.Repeat("0a", 16), strings.Repeat("aZ0", 11)
	for text, want := range map[string][2]bool{
		"ownllm_pair_" + hexadecimal:                  {true, false},
		"ownllm_pair_" + hexadecimal[1:]:              {},
		"ownllm_pair_" + hexadecimal + "0":            {},
		"ownllm_pair_" + strings.ToUpper(hexadecimal): {},
		" ownllm_pair_" + hexadecimal:                 {},
		"ownllm_agent_" + letters:                     {false, true},
		"ownllm_agent_" + letters[:31]:                {},
		"ownllm_agent_" + letters + "-":               {},
		"ownllm_agent_" + strings.Repeat("x", 128):    {false, true},
		"ownllm_agent_" + strings.Repeat("x", 129):    {},
		"":                     {},
		"sk-ownllm-" + letters: {},
	} {
		for i, parse := range []func(string) (credential.Secret, error){credential.ParsePairing, credential.ParseAgent} {
			s, err := parse(text)
			if (err == nil) != want[i] || s.IsZero() == want[i] {
				t.Errorf("%d of %q: %v", i, text, err)
			}
			if err != nil && text != "" && strings.Contains(err.Error(), text) {
				t.Errorf("the error repeats it: %v", err)
			}
		}
	}
}

// Nothing prints a secret but Reveal.
func TestNothingPrintsASecret(t *testing.T) {
	for _, s := range []credential.Secret{credential.NewPairing(), credential.NewAgent(), {}} {
		var out bytes.Buffer
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%T %p"} {
			fmt.Fprintf(&out, verb+"\n", s)
			fmt.Fprintf(&out, verb+"\n", struct{ s credential.Secret }{s})
			fmt.Fprintf(&out, verb+"\n", &struct{ S *credential.Secret }{&s})
		}
		slog.New(slog.NewTextHandler(&out, nil)).Info("x", "s", s, "in", struct{ S credential.Secret }{s})
		slog.New(slog.NewJSONHandler(&out, nil)).Info("x", "s", s, "in", struct{ S credential.Secret }{s})
		b, err := json.Marshal(map[string]any{"s": s, "list": []credential.Secret{s}})
		if err != nil {
			t.Fatal(err)
		}
		out.Write(b)
		if s.IsZero() {
			continue
		}
		rest := s.Reveal()[strings.LastIndex(s.Reveal(), "_")+1:]
		for _, form := range []string{rest, fmt.Sprintf("%x", rest), fmt.Sprintf("%X", rest)} {
			if strings.Contains(out.String(), form) {
				t.Errorf("printed: %s", &out)
			}
		}
	}
}
