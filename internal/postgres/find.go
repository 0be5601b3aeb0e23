package postgres

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
)

// ErrNotFound says that this machine has no usable PostgreSQL.
var ErrNotFound = errors.New("PostgreSQL " + strconv.Itoa(MinVersion) + " or later is needed and wasn't found: " + advice())

func advice() string {
	switch runtime.GOOS {
	case "darwin":
		return "install it (brew install postgresql) or give the address of a database with --database-url"
	case "linux":
		return "install it (as root, apt-get install postgresql) or give the address of a database with --database-url"
	default:
		return "install it or give the address of a database with --database-url"
	}
}

// Find returns the folder that holds initdb and postgres, of MinVersion or later. It
// looks in PATH, asks pg_config, and then looks where distributions put them, newest
// first. If there is none, and we are root on a system with apt-get, it installs
// the distribution's package; else it returns ErrNotFound.
func Find(ctx context.Context, log *slog.Logger) (string, error) {
	return find(ctx, log, 0)
}

// find is Find for one major version; 0 stands for any.
func find(ctx context.Context, log *slog.Logger, want int) (string, error) {
	bin, other := search(ctx, want)
	if bin != "" {
		return bin, nil
	}
	if want != 0 {
		if other != "" {
			return other, nil // the caller says what is wrong with it
		}
		return "", fmt.Errorf("the data was written by PostgreSQL %d: %w", want, ErrNotFound)
	}
	if err := install(ctx, log); err != nil {
		return "", err
	}
	if bin, _ = search(ctx, want); bin == "" {
		return "", ErrNotFound
	}
	return bin, nil
}

// search returns the first folder with the wanted version, and the first with another
// one.
func search(ctx context.Context, want int) (bin, other string) {
	for _, dir := range candidates(ctx) {
		if !executable(filepath.Join(dir, "postgres")) || !executable(filepath.Join(dir, "initdb")) {
			continue
		}
		v, err := versionOf(ctx, dir)
		switch {
		case err != nil:
		case v == want || want == 0 && v >= MinVersion:
			return dir, ""
		case other == "":
			other = dir
		}
	}
	return "", other
}

// places are where distributions put the binaries, by glob.
var places = []string{
	"/usr/lib/postgresql/*/bin", // Debian
	"/usr/pgsql-*/bin",          // Red Hat
	"/usr/local/pgsql/bin",
	"/opt/homebrew/opt/postgresql@*/bin",
	"/usr/local/opt/postgresql@*/bin",
	"/Applications/Postgres.app/Contents/Versions/*/bin",
	`C:\Program Files\PostgreSQL\*\bin`,
}

func candidates(ctx context.Context) []string {
	var dirs []string
	if path, err := exec.LookPath("postgres"); err == nil {
		// A link to one binary may lack the neighbours that the binary itself has.
		if target, err := filepath.EvalSymlinks(path); err == nil {
			dirs = append(dirs, filepath.Dir(target))
		}
		dirs = append(dirs, filepath.Dir(path))
	}
	if out, err := exec.CommandContext(ctx, "pg_config", "--bindir").Output(); err == nil {
		dirs = append(dirs, strings.TrimSpace(string(out)))
	}
	for _, pattern := range places {
		found, _ := filepath.Glob(pattern) // the patterns are well-formed
		slices.SortFunc(found, func(a, b string) int { return cmp.Compare(number(b), number(a)) })
		dirs = append(dirs, found...)
	}
	return dirs
}

var pathVersion = regexp.MustCompile(`(\d+)[\d.]*[/\\]bin$`)

// number is the major version in a path, by which newer ones come first; 0: none.
func number(path string) int {
	m := pathVersion.FindStringSubmatch(path)
	if m == nil {
		return 0
	}
	n, _ := strconv.Atoi(m[1]) // digits
	return n
}

func executable(path string) bool {
	if runtime.GOOS == "windows" {
		path += ".exe"
	}
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && (runtime.GOOS == "windows" || info.Mode()&0o111 != 0)
}
