package telemetry_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// logKeys are all keys that the log has, with what they hold. Whoever needs a
// further one adds it here, after a look whether one of these will do: a log is only
// as searchable as its keys are few. No key is for prompts, completions or secrets.
var logKeys = map[string]string{
	"active":            "number of requests in flight",
	"account":           "NATS account",
	"address":           "network address that is listened on or connected to",
	"agent":             "agent id",
	"attempt":           "number of the attempt of a request, from 1",
	"code":              "code of the contract, or ok, or client_gone",
	"completion_tokens": "number of tokens of a reply",
	"component":         "part of the program that speaks",
	"connection":        "which of several NATS connections",
	"consumer":          "name of a JetStream consumer",
	"count":             "how many",
	"data_dir":          "data directory",
	"duration":          "how long something took",
	"error":             "text of an error",
	"expired":           "number of reservations that nobody settled",
	"host":              "name of a machine",
	"key":               "key id, never the key",
	"keys":              "number of API keys",
	"kind":              "kind of a backend or of a frame",
	"leases":            "number of owners' leases that lapsed",
	"model":             "model id",
	"operation":         "operation of the API, or of a control request",
	"operations":        "network address of /metrics and the like",
	"owner":             "owner id",
	"path":              "path of a file, or pattern of a route",
	"pid":               "process id",
	"port":              "network port",
	"ready":             "how to reach a running process, without secrets",
	"reason":            "why something was done",
	"request":           "request id",
	"running":           "number of jobs that run",
	"server":            "address of a NATS server, without secrets",
	"severity":          "severity of a line of Postgres's own log",
	"signal":            "signal of the operating system",
	"slots":             "number of requests that may be, or were, in flight",
	"span_id":           "id of the current span",
	"stack":             "stack of a panic",
	"state":             "state that something is in now",
	"status":            "HTTP status",
	"stream":            "name of a JetStream stream",
	"subject":           "NATS subject",
	"tenant":            "tenant id",
	"text":              "a line of Postgres's own log",
	"trace_id":          "id of the current trace",
	"url":               "address of an inference server, without secrets",
	"user":              "user id",
	"version":           "version of a program or a schema",
	"waiting":           "number of jobs that wait",
}

// logCalls are the methods of a logger, with the number of arguments before the
// pairs of keys and values.
var logCalls = map[string]int{
	"Debug": 1, "Info": 1, "Warn": 1, "Error": 1, "With": 0, "Log": 3, "LogAttrs": 3,
	"DebugContext": 2, "InfoContext": 2, "WarnContext": 2, "ErrorContext": 2,
}

// relays pass on what another program says, so their messages aren't constants.
var relays = []string{filepath.Join("broker", "natsd", "natsd.go")}

// The keys of the log are a closed list and its messages are constants, in every
// package of the project.
func TestLogKeysAndMessages(t *testing.T) {
	files, calls := token.NewFileSet(), 0
	err := filepath.WalkDir(filepath.Join("..", ".."), func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && strings.HasPrefix(d.Name(), ".") && d.Name() != "..":
			return fs.SkipDir
		case d.IsDir() && d.Name() == "node_modules":
			return fs.SkipDir
		case !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go"):
			return nil
		}
		file, err := parser.ParseFile(files, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			if call, ok := n.(*ast.CallExpr); ok && checkCall(t, files, call) {
				calls++
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if calls == 0 {
		t.Error("the project logs nothing, or this test doesn't see it")
	}
}

// checkCall checks a call if it is one of a logger.
func checkCall(t *testing.T, files *token.FileSet, call *ast.CallExpr) bool {
	method, ok := call.Fun.(*ast.SelectorExpr)
	if !ok {
		return false
	}
	before, ok := logCalls[method.Sel.Name]
	name := lastName(method.X)
	if !ok || !strings.HasSuffix(strings.ToLower(name), "log") && !strings.HasSuffix(strings.ToLower(name), "logger") {
		return false
	}
	if before > len(call.Args) {
		return false
	}
	where := files.Position(call.Pos())
	if before > 0 {
		relay := slices.ContainsFunc(relays, func(file string) bool { return strings.HasSuffix(where.Filename, file) })
		if _, ok := call.Args[before-1].(*ast.BasicLit); !ok && !relay {
			t.Errorf("%s: the message isn't a constant", where)
		}
	}
	for i := before; i < len(call.Args); {
		switch arg := call.Args[i].(type) {
		case *ast.BasicLit:
			key, err := strconv.Unquote(arg.Value)
			if logKeys[key] == "" || err != nil {
				t.Errorf("%s: the key %s isn't in the list", where, arg.Value)
			}
			i += 2
		case *ast.CallExpr: // slog.String("key", value)
			if len(arg.Args) > 0 {
				if lit, ok := arg.Args[0].(*ast.BasicLit); ok {
					if key, err := strconv.Unquote(lit.Value); err != nil || logKeys[key] == "" {
						t.Errorf("%s: the key %s isn't in the list", where, lit.Value)
					}
				}
			}
			i++
		default: // a list that was built elsewhere
			i++
		}
	}
	return true
}

// lastName is the name that an expression ends with: log of w.config.log.
func lastName(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.Ident:
		return e.Name
	case *ast.SelectorExpr:
		return e.Sel.Name
	case *ast.CallExpr:
		return lastName(e.Fun)
	}
	return ""
}
