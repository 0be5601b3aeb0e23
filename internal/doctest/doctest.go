// Package doctest holds a part of a document to what the code says.
package doctest

import (
	"flag"
	"os"
	"regexp"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write what documents have of the code")

// Section holds the text between the comments "<!-- name: … -->" and "<!-- end -->" of a
// file to want. With the flag -update it writes it there.
func Section(t testing.TB, file, name, want string) {
	t.Helper()
	have, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	part := regexp.MustCompile(`(?s)(<!-- ` + regexp.QuoteMeta(name) + `: [^\n]*-->\n).*?(<!-- end -->)`)
	if !part.Match(have) {
		t.Fatalf("%s has no section %q", file, name)
	}
	text := part.ReplaceAllString(string(have), "${1}"+strings.ReplaceAll(want, "$", "$$")+"${2}")
	switch {
	case text == string(have):
	case !*update:
		t.Errorf("the section %q of %s isn't what the code says: run this test with -update", name, file)
	default:
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
