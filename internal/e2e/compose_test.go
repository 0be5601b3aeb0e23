package e2e

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/ownllm/ownllm/internal/command"
)

const root = "../.."

// service is what we look at of a service of docker-compose.yml.
type service struct {
	Image       string
	Restart     string
	StopSignal  string        `yaml:"stop_signal"`
	StopGrace   time.Duration `yaml:"stop_grace_period"`
	Entrypoint  []string
	Command     []string
	Environment map[string]string
	Ports       []string
	Volumes     []string
	DependsOn   map[string]struct{ Condition string } `yaml:"depends_on"`
	Healthcheck struct {
		Test    []string
		Disable bool
	}
}

// composed is docker-compose.yml.
type composed struct {
	Services map[string]service
	Volumes  map[string]any
}

// read reads a file of the repository.
func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, path))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// readCompose reads docker-compose.yml, with the name of a variable for its value.
func readCompose(t *testing.T) (c composed) {
	t.Helper()
	variable := regexp.MustCompile(`\$(\$|\{(\w+)[^}]*\})`)
	text := variable.ReplaceAllStringFunc(read(t, "docker-compose.yml"), func(m string) string {
		if m == "$$" {
			return "$"
		}
		return variable.FindStringSubmatch(m)[2]
	})
	if err := yaml.Unmarshal([]byte(text), &c); err != nil {
		t.Fatal(err)
	}
	return c
}

// ours are the services that run the program.
func (c composed) ours(t *testing.T) map[string]service {
	t.Helper()
	ours := make(map[string]service)
	for name, s := range c.Services {
		if s.Image == "ownllm" {
			ours[name] = s
		}
	}
	if len(ours) < 8 {
		t.Fatalf("only %d services are ours", len(ours))
	}
	return ours
}

// commands are the command lines of ownllm that a service runs.
func (s service) commands() [][]string {
	if len(s.Entrypoint) == 0 {
		return [][]string{s.Command}
	}
	var lines [][]string
	for _, m := range regexp.MustCompile(`ownllm ([^<>|\n]*)`).FindAllStringSubmatch(strings.Join(s.Command, "\n"), -1) {
		lines = append(lines, strings.Fields(m[1]))
	}
	return lines
}

// TestComposeStops: whoever stops a service of docker-compose.yml, to put a newer one in its
// place say, waits for as long as it takes to end well.
func TestComposeStops(t *testing.T) {
	var help, problem bytes.Buffer
	command.Main(t.Context(), []string{"edge", "--help"}, nil, &help, &problem, func(string) string { return "" })
	span := func(pattern, text string) time.Duration {
		m := regexp.MustCompile(pattern).FindStringSubmatch(text)
		if m == nil {
			t.Fatalf("no %s", pattern)
		}
		d, err := time.ParseDuration(m[1])
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	drain := span(`(?s)--drain-timeout.*?Default:\s+(\w+)`, help.String())
	check := regexp.MustCompile(`inter (\d+)s fall (\d+)`).FindStringSubmatch(read(t, "scripts/compose/haproxy.cfg"))
	if check == nil {
		t.Fatal("HAProxy doesn't check its edges")
	}
	inter, _ := strconv.Atoi(check[1])
	fall, _ := strconv.Atoi(check[2])
	sees := time.Duration(inter*fall) * time.Second
	lame := span(`(?m)^lame_duck_duration: "(\w+)"`, read(t, "scripts/compose/nats.conf"))
	c := readCompose(t)
	for name, s := range c.ours(t) {
		var delay time.Duration
		if s.commands()[0][0] == "edge" {
			if delay = span(`(.+)`, s.Environment["OWNLLM_DRAIN_DELAY"]); delay < sees+time.Second {
				t.Errorf("%s goes on for %s, and HAProxy takes %s to see that it leaves", name, delay, sees)
			}
		}
		if s.StopGrace < delay+drain+5*time.Second || s.StopSignal != "" {
			t.Errorf("%s has %s to end, and drains for %s", name, s.StopGrace, delay+drain)
		}
	}
	servers := 0
	for name, s := range c.Services {
		if !strings.HasPrefix(s.Image, "nats:") {
			continue
		}
		servers++
		if s.StopGrace < lame+10*time.Second || s.StopSignal != "SIGUSR2" {
			t.Errorf("%s has %s to end after %s, and sends its clients away for %s", name, s.StopGrace, s.StopSignal, lame)
		}
	}
	if servers != 3 {
		t.Errorf("%d nats-servers", servers)
	}
}

// TestComposeNames: the commands, flags and variables of docker-compose.yml exist.
func TestComposeNames(t *testing.T) {
	names := regexp.MustCompile(`OWNLLM_\w+|--[a-z][a-z-]*`)
	elsewhere := read(t, "scripts/compose/certificates") + read(t, "internal/telemetry/telemetry.go")
	for name, s := range readCompose(t).ours(t) {
		known := strings.Join(s.Command, "\n") + elsewhere
		for _, line := range s.commands() {
			words := slices.IndexFunc(line, func(w string) bool { return strings.HasPrefix(w, "-") })
			if words < 0 {
				words = len(line)
			}
			var help, problem bytes.Buffer
			args := append(slices.Clone(line[:words]), "--help")
			if code := command.Main(t.Context(), args, nil, &help, &problem, func(string) string { return "" }); code != command.ExitOK {
				t.Errorf("%s: there is no command %q: %s", name, line[:words], &problem)
			}
			mine := names.FindAllString(help.String(), -1)
			for _, flag := range names.FindAllString(strings.Join(line[words:], " "), -1) {
				if !slices.Contains(mine, flag) {
					t.Errorf("%s: %q has no flag %s", name, line[:words], flag)
				}
			}
			known += help.String()
		}
		for variable := range s.Environment {
			if !regexp.MustCompile(`\b` + variable + `\b`).MatchString(known) {
				t.Errorf("%s: nothing reads %s", name, variable)
			}
		}
	}
}

// TestComposeImages: every image is of one release, and those that are in go.mod, too, of
// the one there.
func TestComposeImages(t *testing.T) {
	mod, docker := read(t, "go.mod"), read(t, "Dockerfile")
	images := make(map[string]string)
	for name, s := range readCompose(t).Services {
		image, tag, _ := strings.Cut(s.Image, ":")
		if image == "ownllm" {
			continue
		}
		if !regexp.MustCompile(`^v?\d+\.\d+(\.\d+)?(-alpine)?$`).MatchString(tag) {
			t.Errorf("%s: the image %s isn't pinned", name, s.Image)
		}
		images[image] = tag
	}
	for _, m := range regexp.MustCompile(`(?m)^FROM (\w+):(\S+)`).FindAllStringSubmatch(docker, -1) {
		if !regexp.MustCompile(`^\d+\.\d+`).MatchString(m[2]) {
			t.Errorf("Dockerfile: %s isn't pinned", m[0])
		}
		images[m[1]] = m[2]
	}
	for image, in := range map[string]string{"nats": `nats-server/v2 v([\d.]+)`, "golang": `(?m)^go ([\d.]+)`} {
		want := regexp.MustCompile(in).FindStringSubmatch(mod)
		if want == nil || images[image] != want[1]+"-alpine" {
			t.Errorf("the image is %s:%s, go.mod has %v", image, images[image], want)
		}
	}
	for _, line := range []string{"CGO_ENABLED=0", "\nUSER ownllm\n", "\nHEALTHCHECK ", "EXPOSE 9191 9192"} {
		if !strings.Contains(docker, line) {
			t.Errorf("Dockerfile lacks %q", line)
		}
	}
}

// TestComposeHangsTogether: what a service waits for, asks, mounts or watches is there, at
// the port where it listens.
func TestComposeHangsTogether(t *testing.T) {
	c := readCompose(t)
	haproxy, nats, prometheus := read(t, "scripts/compose/haproxy.cfg"), read(t, "scripts/compose/nats.conf"), read(t, "scripts/compose/prometheus.yml")
	listens := make(map[string]bool) // service:port
	note := func(name, text, pattern string) {
		for _, m := range regexp.MustCompile(pattern).FindAllStringSubmatch(text, -1) {
			listens[name+":"+m[1]] = true
		}
	}
	checked := func(s service) bool { return len(s.Healthcheck.Test) > 0 }
	for name, s := range c.Services {
		switch image, _, _ := strings.Cut(s.Image, ":"); image {
		case "ownllm":
			for _, v := range []string{"OWNLLM_LISTEN", "OWNLLM_OPS_LISTEN"} {
				note(name, s.Environment[v], `^0\.0\.0\.0:(\d+)$`)
			}
		case "nats": // 4222 is nats-server's own default
			listens[name+":4222"] = true
			note(name, strings.Join(s.Command, "\n"), `--http_port=(\d+)`)
			note(name, nats, `listen: 0\.0\.0\.0:(\d+)`)
		case "haproxy":
			note(name, haproxy, `(?m)^\s*bind :(\d+)`)
		case "otel/opentelemetry-collector":
			note(name, read(t, "scripts/compose/collector.yml"), `port: (\d+)`)
			note(name, read(t, "scripts/compose/collector.yml"), `0\.0\.0\.0:(\d+)`)
		case "postgres", "prom/prometheus", "grafana/grafana", "ollama/ollama": // by their images
			listens[name+":"+map[string]string{"postgres": "5432", "prom/prometheus": "9090", "grafana/grafana": "3000", "ollama/ollama": "11434"}[image]] = true
		default:
			t.Errorf("%s: this test doesn't know %s", name, s.Image)
		}
	}
	for name, s := range c.Services {
		ends := s.Restart == "no"
		if !ends && !checked(s) && name != "collector" {
			t.Errorf("%s has no health check", name)
		}
		if n := len(s.Healthcheck.Test); n > 0 {
			if port := regexp.MustCompile(`^http://127\.0\.0\.1:(\d+)/`).FindStringSubmatch(s.Healthcheck.Test[n-1]); port != nil && !listens[name+":"+port[1]] {
				t.Errorf("%s: its health check asks port %s", name, port[1])
			}
		}
		for other, on := range s.DependsOn {
			there, ok := c.Services[other]
			want := "service_healthy"
			if there.Restart == "no" {
				want = "service_completed_successfully"
			} else if !checked(there) {
				want = "service_started"
			}
			if !ok || on.Condition != want {
				t.Errorf("%s waits for %s to be %q, want %q", name, other, on.Condition, want)
			}
		}
		for _, port := range s.Ports {
			if inside := port[strings.LastIndexByte(port, ':')+1:]; !listens[name+":"+inside] {
				t.Errorf("%s publishes %s, where it doesn't listen", name, port)
			}
		}
		for _, v := range s.Volumes {
			from, _, _ := strings.Cut(v, ":")
			_, declared := c.Volumes[from]
			_, err := os.Stat(filepath.Join(root, from))
			if strings.HasPrefix(from, ".") && err != nil || !strings.HasPrefix(from, ".") && !declared {
				t.Errorf("%s: there is no volume %s", name, from)
			}
		}
	}
	// What asks for another service, by name and port.
	texts := map[string]string{"haproxy.cfg": haproxy, "nats.conf": nats, "prometheus.yml": prometheus, "datasource.yml": read(t, "scripts/compose/grafana/datasource.yml")}
	for name, s := range c.Services {
		texts[name] = fmt.Sprint(s.Environment)
	}
	names := slices.Sorted(maps.Keys(c.Services))
	slices.Reverse(names)
	asked := 0
	for where, text := range texts {
		for _, address := range regexp.MustCompile(`\b(?:`+strings.Join(names, "|")+`):\d+\b`).FindAllString(text, -1) {
			asked++
			if !listens[address] {
				t.Errorf("%s asks for %s, where nobody listens", where, address)
			}
		}
	}
	if asked < 20 {
		t.Errorf("only %d addresses found", asked)
	}
	// Prometheus watches all roles, and the load balancer all edges.
	for name := range c.ours(t) {
		if listens[name+":9192"] && name != "worker-ollama" && !strings.Contains(prometheus, name+":9192") {
			t.Errorf("Prometheus doesn't watch %s", name)
		}
		if listens[name+":9191"] && !strings.Contains(haproxy, " "+name+":9191\n") {
			t.Errorf("the load balancer doesn't know %s", name)
		}
	}
	if !strings.Contains(haproxy, "check port 9192") || !strings.Contains(haproxy, "httpchk GET /readyz") || strings.Contains(haproxy, "http-buffer-request") {
		t.Error("the load balancer doesn't look at /readyz, or it buffers")
	}
}
