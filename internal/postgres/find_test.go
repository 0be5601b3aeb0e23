package postgres

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func fakeBin(t *testing.T, version string) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"postgres", "initdb"} {
		script := "#!/bin/sh\necho 'postgres (PostgreSQL) " + version + "'\n"
		if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestFindPrefersPath(t *testing.T) {
	dir := fakeBin(t, "99.1 (Somewhere 99.1-1)")
	t.Setenv("PATH", dir)
	if got, err := Find(t.Context(), nil); err != nil || got != dir {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestFindPassesOverTheUnusable(t *testing.T) {
	for _, version := range []string{"9.6.24", "14.9", "nonsense"} {
		dir := fakeBin(t, version)
		t.Setenv("PATH", dir)
		saved := places
		places = []string{filepath.Join(fakeBin(t, "16beta2"), "..", "*")}
		got, err := Find(t.Context(), nil)
		places = saved
		if err != nil || got == dir {
			t.Errorf("version %s: got %q, %v", version, got, err)
		}
	}
}

func TestFindByVersion(t *testing.T) {
	t.Setenv("PATH", fakeBin(t, "98.1"))
	saved := places
	defer func() { places = saved }()
	want := fakeBin(t, "97.1")
	places = []string{fakeBin(t, "96.1"), want}
	if got, err := find(t.Context(), nil, 97); err != nil || got != want {
		t.Errorf("got %q, %v", got, err)
	}
	places = nil
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	if _, err := find(t.Context(), nil, 97); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "97") {
		t.Errorf("got %v", err)
	}
}

func TestNewestFirst(t *testing.T) {
	root := t.TempDir()
	for _, v := range []string{"9.6", "15", "16"} {
		if err := os.MkdirAll(filepath.Join(root, v, "bin"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	saved := places
	defer func() { places = saved }()
	places = []string{filepath.Join(root, "*", "bin")}
	t.Setenv("PATH", t.TempDir())
	got := candidates(t.Context())
	if len(got) != 3 || !strings.Contains(got[0], "16") || !strings.Contains(got[2], "9.6") {
		t.Errorf("got %v", got)
	}
}
