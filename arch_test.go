package main_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/ownllm/ownllm/internal/command"
	"github.com/ownllm/ownllm/schemas"
)

const module = "github.com/ownllm/ownllm"

// listed is what `go list -json` says of a package.
type listed struct {
	ImportPath string
	ForTest    string
	Name       string
	Imports    []string
	Deps       []string
	Module     *struct {
		Path string
		Main bool
	}
}

// path is the import path without the mark of a test variant, and within the module
// relative to it: "broker/bus", and "." for the root.
func path(importPath string) string {
	importPath, _, _ = strings.Cut(importPath, " ")
	if importPath == module {
		return "."
	}
	return strings.TrimPrefix(importPath, module+"/")
}

func (p listed) ours() bool { return p.Module != nil && p.Module.Main }

func list(t *testing.T, args ...string) []listed {
	t.Helper()
	var stderr bytes.Buffer
	cmd := exec.CommandContext(t.Context(), "go", append([]string{"list", "-json=ImportPath,ForTest,Name,Imports,Deps,Module"}, args...)...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, &stderr)
	}
	var packages []listed
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return packages
		} else if err != nil {
			t.Fatal(err)
		}
		packages = append(packages, p)
	}
}

// within reports whether a path is one of the given ones or lies below one.
func within(path string, of ...string) bool {
	return slices.ContainsFunc(of, func(o string) bool { return path == o || strings.HasPrefix(path, o+"/") })
}

// helpers are packages for tests only.
var helpers = []string{"internal/doctest", "internal/faultproxy", "internal/logtest", "internal/pgtest", "internal/natstest", "internal/quotatest", "internal/sentrytest", "internal/stack"}

// Arrows point only downward: what each floor may import of the module. The first
// entry that holds a package counts.
var floors = []struct {
	of  []string
	may []string
}{
	{[]string{"schemas"}, nil},
	{[]string{"broker"}, []string{"broker", "schemas"}},
	{[]string{"edge"}, []string{"edge", "broker", "schemas", "internal/adminapi"}},
	{[]string{"worker"}, []string{"worker", "broker", "schemas", "internal/secret"}},
	{[]string{"internal/collector", "internal/port", "internal/secret", "internal/postgres", "internal/telemetry"}, nil},
	{[]string{"internal/adminapi"}, []string{"internal/secret", "schemas"}},
	{[]string{"internal/load"}, []string{"internal/load", "internal/secret", "schemas"}},
	{[]string{"internal/command"}, []string{"edge", "worker", "broker", "schemas", "internal/adminapi", "internal/collector", "internal/load", "internal/postgres", "internal/secret", "internal/telemetry"}},
	{[]string{"."}, []string{"internal/command"}},
	// It founds tenants by the thousand, and runs workers by the thousand in one process.
	{[]string{"internal/bench"}, []string{"worker", "broker", "schemas", "internal/adminapi", "internal/bench", "internal/collector", "internal/load", "internal/secret"}},
	{[]string{"internal/topology"}, []string{"internal/port", "internal/postgres"}},
	{helpers, []string{"worker", "broker", "schemas", "internal"}},
}

func TestArrowsPointDown(t *testing.T) {
	for _, p := range list(t, "./...") {
		name := path(p.ImportPath)
		floor := slices.IndexFunc(floors, func(f struct{ of, may []string }) bool { return within(name, f.of...) })
		for _, i := range p.Imports {
			if i != module && !strings.HasPrefix(i, module+"/") {
				continue
			}
			switch {
			case floor < 0:
				t.Errorf("%s imports %s, and stands on no floor: add it to the floors of this test", name, path(i))
			case !within(path(i), floors[floor].may...):
				t.Errorf("%s must not import %s", name, path(i))
			}
		}
	}
}

// One vendor, one place. What is the least that such parts can cost is measured beside them.
var vendors = []struct {
	of    []string
	where []string
}{
	{[]string{"github.com/jackc/pgx", "github.com/pressly/goose", "database/sql"}, []string{"broker/books", "internal/pgtest", "internal/bench/floor"}},
	{[]string{"github.com/gofiber", "github.com/valyala/fasthttp"}, []string{"edge", "internal/bench/floor"}},
	{[]string{"github.com/nats-io/nats-server"}, []string{"broker/natsd"}},
	{[]string{"go.opentelemetry.io/otel/sdk", "go.opentelemetry.io/otel/exporters", "github.com/prometheus"}, []string{"internal/telemetry"}},
	{[]string{"github.com/getsentry"}, []string{"internal/telemetry"}},
	{[]string{"github.com/alecthomas/kong"}, []string{"internal/command"}},
	{[]string{"github.com/HdrHistogram"}, []string{"internal/load"}},
	{[]string{"testing", "go.uber.org/goleak", "github.com/google/go-cmp", "pgregory.net/rapid"}, helpers},
}

func TestOneVendorOnePlace(t *testing.T) {
	used := make(map[string]bool)
	for _, p := range list(t, "./...") {
		for _, i := range p.Imports {
			for _, v := range vendors {
				if !within(i, v.of...) {
					continue
				}
				used[v.of[0]] = true
				if !within(path(p.ImportPath), v.where...) {
					t.Errorf("%s must not import %s: only %s may", path(p.ImportPath), i, strings.Join(v.where, ", "))
				}
			}
		}
	}
	for _, v := range vendors {
		if !used[v.of[0]] {
			t.Errorf("nothing imports %s any more", v.of[0])
		}
	}
}

// What must not even be reached by way of other packages: a worker is small, and the
// program carries no test helper.
func TestOutOfReach(t *testing.T) {
	database := []string{"github.com/jackc/pgx", "github.com/pressly/goose"}
	http := []string{"github.com/gofiber", "github.com/valyala/fasthttp"}
	server := []string{"github.com/nats-io/nats-server"}
	rules := []struct {
		from []string
		not  []string
	}{
		{[]string{"worker"}, slices.Concat(database, http, server)},
		{[]string{"broker/chat", "broker/presence", "broker/bus"}, slices.Concat(database, http, server)},
		{[]string{"edge"}, server},
		{[]string{"."}, []string{"go.uber.org/goleak", module + "/internal/doctest", module + "/internal/faultproxy", module + "/internal/logtest", module + "/internal/pgtest", module + "/internal/natstest", module + "/internal/quotatest", module + "/internal/sentrytest", module + "/internal/stack"}},
	}
	for _, p := range list(t, "./...") {
		for _, rule := range rules {
			if name := path(p.ImportPath); name == rule.from[0] || name != "." && within(name, rule.from...) {
				for _, d := range p.Deps {
					if within(d, rule.not...) {
						t.Errorf("%s reaches %s", name, d)
					}
				}
			}
		}
	}
}

func read(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// Every module that our code imports is explained in CONTRIBUTING.md, and nothing
// else is.
func TestDependenciesAreExplained(t *testing.T) {
	packages := list(t, "-deps", "-test", "./...")
	modules := make(map[string]string) // of packages
	for _, p := range packages {
		if p.Module != nil && !p.Module.Main {
			modules[p.ImportPath] = p.Module.Path
		}
	}
	direct := make(map[string]bool)
	for _, p := range packages {
		if !p.ours() || strings.HasSuffix(p.ImportPath, ".test") {
			continue
		}
		for _, i := range p.Imports {
			if m := modules[i]; m != "" {
				direct[m] = true
			}
		}
	}
	if len(direct) < 10 {
		t.Fatalf("only %d modules found: %v", len(direct), direct)
	}
	explained := make(map[string]bool)
	for _, row := range regexp.MustCompile("(?m)^\\| `([^`]+\\.[^`]+/[^`]+)` \\|").FindAllStringSubmatch(read(t, "CONTRIBUTING.md"), -1) {
		explained[row[1]] = true
	}
	for _, m := range slices.Sorted(maps.Keys(direct)) {
		if !explained[m] {
			t.Errorf("CONTRIBUTING.md doesn't say why %s is needed", m)
		}
	}
	for _, m := range slices.Sorted(maps.Keys(explained)) {
		if !direct[m] {
			t.Errorf("CONTRIBUTING.md explains %s, which nothing imports", m)
		}
	}
}

// Every package is in the folder map, and every test that the documents name is there.
func TestArchitectureIsTrue(t *testing.T) {
	text := read(t, "ARCHITECTURE.md")
	for _, p := range list(t, "./...") {
		if name := path(p.ImportPath); name != "." && !regexp.MustCompile(`(?m)^`+regexp.QuoteMeta(name)+`/?\s`).MatchString(text) {
			t.Errorf("the folder map of ARCHITECTURE.md lacks %s", name)
		}
	}
	var tests strings.Builder
	for _, file := range tracked(t) {
		if strings.HasSuffix(file, "_test.go") {
			tests.WriteString(read(t, file))
		}
	}
	for _, doc := range documents {
		for _, name := range regexp.MustCompile(`\b(?:Test|Fuzz|Benchmark)[A-Z]\w+`).FindAllString(read(t, doc), -1) {
			if !strings.Contains(tests.String(), "\nfunc "+name+"(") {
				t.Errorf("%s names %s, which doesn't exist", doc, name)
			}
		}
	}
}

// The runbook has an entry for every code that a user may bring, and names no other.
func TestRunbookHasEveryCode(t *testing.T) {
	_, text, ok := strings.Cut(read(t, "OPERATIONS.md"), "## Runbook: by code")
	text, _, _ = strings.Cut(text, "\n## ")
	if !ok {
		t.Fatal("OPERATIONS.md has no runbook by code")
	}
	entries := make(map[string]bool)
	for _, row := range regexp.MustCompile("(?m)^\\| (`[^|]+) \\|").FindAllStringSubmatch(text, -1) {
		for _, code := range regexp.MustCompile("`([a-z_]+)`").FindAllStringSubmatch(row[1], -1) {
			entries[code[1]] = true
		}
	}
	for _, info := range schemas.Codes {
		if !entries[string(info.Code)] {
			t.Errorf("the runbook of OPERATIONS.md lacks %s", info.Code)
		}
		delete(entries, string(info.Code))
	}
	for code := range entries {
		t.Errorf("the runbook of OPERATIONS.md has %s, which isn't a code", code)
	}
}

// The runbook has an entry for every alert, and names no other.
func TestRunbookHasEveryAlert(t *testing.T) {
	_, text, _ := strings.Cut(read(t, "OPERATIONS.md"), "## Runbook: by alert")
	text, _, _ = strings.Cut(text, "\n## ")
	names := func(pattern, text string) (list []string) {
		for _, m := range regexp.MustCompile(pattern).FindAllStringSubmatch(text, -1) {
			list = append(list, m[1])
		}
		slices.Sort(list)
		return list
	}
	alerts := names(`(?m)^ +- alert: (\w+)$`, read(t, "scripts/compose/alerts.yml"))
	if entries := names("(?m)^\\| `(\\w+)` \\|", text); len(alerts) == 0 || !slices.Equal(alerts, entries) {
		t.Errorf("the alerts are %v, and the runbook has %v", alerts, entries)
	}
}

// documents are for people who come to the project.
var documents = []string{"README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "BENCHMARKS.md", "ERRORS.md", "OPERATIONS.md", "SECURITY.md"}

func TestLinksLeadSomewhere(t *testing.T) {
	for _, doc := range documents {
		for _, link := range regexp.MustCompile(`\]\(([^)#]+)[^)]*\)`).FindAllStringSubmatch(read(t, doc), -1) {
			if strings.Contains(link[1], "://") {
				continue
			}
			if _, err := os.Stat(link[1]); err != nil {
				t.Errorf("%s links to %s: %v", doc, link[1], err)
			}
		}
	}
}

// help returns the help text of a command, and false if there is no such command.
var help = sync.OnceValue(func() func(words string) (string, bool) {
	known := make(map[string]string)
	return func(words string) (string, bool) {
		if text, ok := known[words]; ok {
			return text, text != ""
		}
		var out bytes.Buffer
		args := append(strings.Fields(words), "--help")
		if command.Main(context.Background(), args, strings.NewReader(""), &out, io.Discard, func(string) string { return "" }) != command.ExitOK {
			out.Reset()
		}
		known[words] = out.String()
		return known[words], out.Len() > 0
	}
})()

// Every command line of the documents is one: its command exists, and so do its flags.
func TestCommandLinesExist(t *testing.T) {
	leaf := regexp.MustCompile(`(?m)^  ([a-z-]+(?: [a-z]+)?)   `)
	overview, _ := help("")
	commands := make(map[string]bool)
	for _, m := range leaf.FindAllStringSubmatch(overview, -1) {
		commands[m[1]] = true
	}
	if !commands["up"] || !commands["keys create"] {
		t.Fatalf("commands not found in the help text: %v", commands)
	}
	lines := 0
	for _, doc := range documents {
		for _, line := range shellLines(read(t, doc)) {
			words := commandWords(line)
			if words == nil {
				continue
			}
			lines++
			name := words[0]
			if len(words) > 1 && commands[name+" "+words[1]] {
				name += " " + words[1]
			}
			if !commands[name] {
				t.Errorf("%s: no command %q in %q", doc, name, line)
				continue
			}
			text, _ := help(name)
			for _, w := range words {
				flag, _, _ := strings.Cut(w, "=")
				if strings.HasPrefix(flag, "--") && !regexp.MustCompile(regexp.QuoteMeta(flag)+`[ =\[\n]`).MatchString(text) {
					t.Errorf("%s: %s has no flag %s, in %q", doc, name, flag, line)
				}
			}
		}
	}
	if lines < 10 {
		t.Errorf("only %d command lines found", lines)
	}
}

// shellLines are the lines of the shell blocks of a document, those that go on in the
// next line joined.
func shellLines(text string) []string {
	var lines []string
	for _, block := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(text, -1) {
		lines = append(lines, strings.Split(strings.ReplaceAll(block[1], "\\\n", " "), "\n")...)
	}
	return lines
}

// commandWords are the words of a line behind `ownllm` or `go run .`, or nil for a
// line that runs something else. Comments and pipes end a command.
func commandWords(line string) []string {
	line, _, _ = strings.Cut(line, " #")
	line, _, _ = strings.Cut(line, " | ")
	line = strings.TrimRight(strings.TrimSpace(line), ")\"")
	for _, start := range []string{"go run . ", "ownllm ", "$(ownllm "} {
		if i := strings.Index(line, start); i == 0 || i > 0 && (line[i-1] == ' ' || line[i] == '$') {
			return strings.Fields(line[i+len(start):])
		}
	}
	return nil
}

// Every make target of the documents is in the Makefile.
func TestMakeTargetsExist(t *testing.T) {
	makefile := read(t, "Makefile")
	for _, doc := range documents {
		for _, m := range regexp.MustCompile("(?m)(?:^|`)make ([a-z][a-z-]*)").FindAllStringSubmatch(read(t, doc), -1) {
			if !regexp.MustCompile(`(?m)^` + m[1] + `:`).MatchString(makefile) {
				t.Errorf("%s: the Makefile has no target %s", doc, m[1])
			}
		}
	}
}

// tracked are the files of the repository, and those that aren't ignored.
func tracked(t *testing.T) []string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "git", "ls-files", "--cached", "--others", "--exclude-standard", "-z").Output()
	if err != nil {
		t.Fatalf("git ls-files: %v", err)
	}
	files := strings.Split(strings.Trim(string(out), "\x00"), "\x00")
	return slices.DeleteFunc(files, func(f string) bool {
		info, err := os.Stat(f)
		return err != nil || !info.Mode().IsRegular() // removed, but not yet from the index
	})
}

// What is left to be done stands in the issues, not in the files.
func TestNothingIsPutOff(t *testing.T) {
	marks := regexp.MustCompile(`\b(TO` + `DO|FIX` + `ME|XX` + `X)\b`)
	for _, file := range tracked(t) {
		switch filepath.Ext(file) {
		case ".go", ".md", ".sql", ".py", ".mjs", ".json", ".yml", ".yaml", ".sh", "":
		default:
			continue
		}
		for i, line := range strings.Split(read(t, file), "\n") {
			if m := marks.FindString(line); m != "" {
				t.Errorf("%s:%d: %s", file, i+1, m)
			}
		}
	}
}
