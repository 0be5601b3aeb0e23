package telemetry_test

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ownllm/ownllm/internal/doctest"
)

// TestLogReference holds the table of log keys in OPERATIONS.md to the closed list.
func TestLogReference(t *testing.T) {
	var table strings.Builder
	table.WriteString("| key | what it holds |\n|---|---|\n")
	for _, key := range slices.Sorted(maps.Keys(logKeys)) {
		fmt.Fprintf(&table, "| `%s` | %s |\n", key, logKeys[key])
	}
	doctest.Section(t, filepath.Join("..", "..", "OPERATIONS.md"), "logs", table.String())
}
