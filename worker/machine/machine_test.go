package machine

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

func TestLook(t *testing.T) {
	f := Look(t.Context())
	if f.CPUCores < 1 || f.RAMMB < 16 && runtime.GOOS == "linux" || !strings.HasSuffix(f.OS, runtime.GOOS+"/"+runtime.GOARCH) {
		t.Errorf("%+v", f)
	}
	for _, text := range []string{f.GPU, f.OS} {
		if len(text) > maxFact || !utf8.ValidString(text) {
			t.Errorf("%q", text)
		}
	}
}

// A tool that tells of GPUs is believed.
func TestLookAsksTheDriver(t *testing.T) {
	dir := t.TempDir()
	script := "#!/bin/sh\necho 'NVIDIA H200, 143771'\necho 'NVIDIA H200, 143771'\necho 'NVIDIA GB10, [N/A]'\n"
	if err := os.WriteFile(filepath.Join(dir, "nvidia-smi"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+string(os.PathListSeparator)+os.Getenv("PATH"))
	if f := Look(t.Context()); f.GPU != "2 × NVIDIA H200, NVIDIA GB10" || f.VRAMMB != 2*143771 {
		t.Errorf("%+v", f)
	}
}

func TestParseNVIDIA(t *testing.T) {
	for out, want := range map[string][]gpu{
		"":                                 nil,
		"NVIDIA GeForce RTX 4090, 24564\n": {{"NVIDIA GeForce RTX 4090", 24564}},
		"A, 1\nB, -1\nC\n, 3\n":            {{"A", 1}, {"B", 0}, {"", 3}},
		"\"a\nb":                           nil,
	} {
		if diff := cmp.Diff(want, parseNVIDIA(out), cmp.AllowUnexported(gpu{})); diff != "" {
			t.Errorf("%q: %s", out, diff)
		}
	}
}

func TestID(t *testing.T) {
	dir := t.TempDir()
	first, err := ID("", dir)
	if err != nil {
		t.Fatal(err)
	}
	again, err := ID("", dir)
	if err != nil || again != first {
		t.Error("not the same the next time", err)
	}
	named, err := ID("second worker", dir)
	if err != nil || named == first || named == hashed("other") {
		t.Error("a name doesn't count", err)
	}
	if own() != "" && !contained() {
		if first != hashed(own()) {
			t.Error("the id of the system doesn't count")
		}
		return
	}
	if other, err := ID("", t.TempDir()); err != nil || other == first {
		t.Error("two random ids are the same", err)
	}
	if info, err := os.Stat(filepath.Join(dir, idFile)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	if err := os.WriteFile(filepath.Join(dir, idFile), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ID("", dir); err == nil {
		t.Error("an empty id was taken")
	}
}
