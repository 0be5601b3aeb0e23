package metric

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/ownllm/ownllm/internal/doctest"
)

// TestReference holds the table of metrics in OPERATIONS.md to what is measured.
func TestReference(t *testing.T) {
	names := make(map[string]string)
	var source string
	for _, file := range []string{"metric.go", "genai.go", "agents.go"} {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		source += string(b)
	}
	for _, m := range regexp.MustCompile(`(Name\w+)\s+= "([^"]+)"`).FindAllStringSubmatch(source, -1) {
		names[m[1]] = m[2]
	}
	kinds := map[string]string{"counter": "counter", "level": "level", "seconds": "histogram, seconds", "m.Int64Histogram": "histogram", "m.Int64Gauge": "gauge", "m.Float64Gauge": "gauge, seconds", "Int64ObservableGauge": "gauge"}
	var table strings.Builder
	table.WriteString("| metric | kind | what |\n|---|---|---|\n")
	rows := 0
	made := regexp.MustCompile(`(counter|level|seconds|m\.Int64Histogram|m\.Int64Gauge|m\.Float64Gauge|Int64ObservableGauge)\((Name\w+),[^\n]*?(?:\n\s*otelmetric\.(?:WithUnit\("[^"]+"\), otelmetric\.)?WithDescription\()?"([^"{][^"]+\.)"`)
	for _, m := range made.FindAllStringSubmatch(source, -1) {
		fmt.Fprintf(&table, "| `%s` | %s | %s |\n", names[m[2]], kinds[m[1]], m[3])
		rows++
	}
	if rows != len(names) {
		t.Errorf("%d names, and %d of them are found where instruments are made", len(names), rows)
	}
	doctest.Section(t, filepath.Join("..", "..", "OPERATIONS.md"), "metrics", table.String())
}
