package machine

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseMeminfo(t *testing.T) {
	for text, want := range map[string]int64{
		"": 0, "MemTotal:       65536000 kB\nMemFree: 1 kB\n": 64000, "MemFree: 1 kB\nMemTotal: 2048 kB": 2, "MemTotal: x kB": 0, "MemTotal: 5": 0,
	} {
		if got := parseMeminfo(text); got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
	}
}

func TestAMD(t *testing.T) {
	root := t.TempDir()
	for path, text := range map[string]string{
		"card0/device/mem_info_vram_total": "25753026560\n",
		"card0/device/product_name":        "Radeon RX 7900 XTX\n",
		"card1/device/mem_info_vram_total": "1073741824\n",
		"card2/device/mem_info_vram_total": "much\n",
		"card3/device/vendor":              "0x8086\n",
	} {
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want := []gpu{{"Radeon RX 7900 XTX", 24560}, {"AMD GPU", 1024}}
	if diff := cmp.Diff(want, amd(root), cmp.AllowUnexported(gpu{})); diff != "" {
		t.Error(diff)
	}
}
