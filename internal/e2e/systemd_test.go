package e2e

import (
	"bytes"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ownllm/ownllm/internal/command"
)

// TestSystemdUnit holds the worker's unit against the program: its flags exist, the wait
// for its end is longer than a drain, and what needs a person isn't tried again.
func TestSystemdUnit(t *testing.T) {
	b, err := os.ReadFile("../../scripts/systemd/ownllm-worker.service")
	if err != nil {
		t.Fatal(err)
	}
	setting := func(name string) string {
		m := regexp.MustCompile(`(?m)^` + name + `=(.*)$`).FindSubmatch(b)
		if m == nil {
			t.Fatalf("the unit has no %s", name)
		}
		return string(m[1])
	}
	var help, problem bytes.Buffer
	if code := command.Main(t.Context(), []string{"worker", "--help"}, nil, &help, &problem, func(string) string { return "" }); code != command.ExitOK {
		t.Fatal(problem.String())
	}
	start := strings.Fields(setting("ExecStart"))
	if len(start) < 2 || !strings.HasSuffix(start[0], "/ownllm") || start[1] != "worker" {
		t.Errorf("the unit starts %q", start)
	}
	for _, name := range regexp.MustCompile(`--[a-z-]+|OWNLLM_\w+`).FindAllString(string(b), -1) {
		if !strings.Contains(help.String(), name) {
			t.Errorf("ownllm worker knows no %s", name)
		}
	}
	drain := regexp.MustCompile(`--drain-timeout[^-]*Default:\s+(\w+)`).FindStringSubmatch(help.String())
	if drain == nil {
		t.Fatal("the help tells no default of --drain-timeout")
	}
	wait, err1 := time.ParseDuration(setting("TimeoutStopSec"))
	most, err2 := time.ParseDuration(drain[1])
	if err1 != nil || err2 != nil || wait < most+5*time.Second {
		t.Errorf("the unit waits for %s, and a drain takes up to %s", setting("TimeoutStopSec"), drain[1])
	}
	if got := setting("RestartPreventExitStatus"); got != strconv.Itoa(command.ExitUsage) {
		t.Errorf("the exit status %s isn't that of a wrong command line", got)
	}
	if setting("Restart") != "on-failure" { // a worker that was replaced ends with success
		t.Errorf("Restart is %s", setting("Restart"))
	}
}
