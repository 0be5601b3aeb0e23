package telemetry_test

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the table of OPERATIONS.md")

// TestLogReference holds the table of log keys in OPERATIONS.md to the closed list.
func TestLogReference(t *testing.T) {
	var table strings.Builder
	table.WriteString("| key | what it holds |\n|---|---|\n")
	for _, key := range slices.Sorted(maps.Keys(logKeys)) {
		fmt.Fprintf(&table, "| `%s` | %s |\n", key, logKeys[key])
	}
	file := filepath.Join("..", "..", "OPERATIONS.md")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	part := regexp.MustCompile(`(?s)(<!-- logs: [^\n]*-->\n).*?(<!-- end -->)`)
	want := part.ReplaceAllString(string(b), "${1}"+strings.ReplaceAll(table.String(), "$", "$$")+"${2}")
	if *update {
		if err := os.WriteFile(file, []byte(want), 0o600); err != nil {
			t.Fatal(err)
		}
		return
	}
	if string(b) != want || !part.Match(b) {
		t.Error("OPERATIONS.md doesn't have the keys of the log: run go test ./internal/telemetry -run TestLogReference -update")
	}
}
