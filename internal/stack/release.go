package stack

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ownllm/ownllm/schemas"
)

// NextVersion is the version that NextRelease says it has.
const NextVersion = "v99.0.0-next"

// NextRelease builds, once, what could be the next release: this source, but with a version
// of its own and the next version of the bus protocol, so that it and the present one have
// only the present protocol in common. It returns the path of the binary.
func NextRelease(t testing.TB) string {
	t.Helper()
	return build(t, "ownllm-next", OwnLLM, func(dir string) []string {
		out, err := exec.CommandContext(t.Context(), "go", "list", "-f", "{{.Dir}}", OwnLLM+"/schemas").Output()
		if err != nil {
			t.Fatalf("find the package schemas: %v", err)
		}
		path := filepath.Join(strings.TrimSpace(string(out)), "version.go")
		source, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		line := func(version int) string { return fmt.Sprintf("const ProtocolVersion = %d\n", version) }
		next := strings.Replace(string(source), line(schemas.ProtocolVersion), line(schemas.ProtocolVersion+1), 1)
		if next == string(source) {
			t.Fatalf("%s doesn't say %q", path, line(schemas.ProtocolVersion))
		}
		replacement, overlay := filepath.Join(dir, "version.go"), filepath.Join(dir, "overlay.json")
		b, err := json.Marshal(map[string]any{"Replace": map[string]string{path: replacement}})
		if err == nil {
			err = os.WriteFile(replacement, []byte(next), 0o600)
		}
		if err == nil {
			err = os.WriteFile(overlay, b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		return []string{"-overlay", overlay, "-ldflags", "-X " + OwnLLM + "/internal/command.version=" + NextVersion}
	})
}
