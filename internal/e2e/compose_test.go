package e2e

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/ownllm/ownllm/internal/command"
	"github.com/ownllm/ownllm/internal/pgtest"
	"github.com/ownllm/ownllm/internal/stack"
)

// service is what we look at of a service of docker-compose.yml.
type service struct {
	Image       string
	Entrypoint  []string
	Command     []string
	Environment map[string]string
	Healthcheck struct{ Test []string }
}

// composed reads docker-compose.yml, with the given values of its variables.
func composed(t *testing.T, values map[string]string) map[string]service {
	t.Helper()
	b, err := os.ReadFile("../../docker-compose.yml")
	if err != nil {
		t.Fatal(err)
	}
	variable := regexp.MustCompile(`\$(\$|\{(\w+)[^}]*\})`)
	b = variable.ReplaceAllFunc(b, func(m []byte) []byte {
		name := string(variable.FindSubmatch(m)[2])
		if name == "" {
			return []byte("$")
		}
		if values[name] == "" {
			t.Errorf("docker-compose.yml asks for a variable %s", name)
		}
		return []byte(values[name])
	})
	var file struct{ Services map[string]service }
	if err := yaml.Unmarshal(b, &file); err != nil {
		t.Fatal(err)
	}
	return file.Services
}

var composeValues = map[string]string{
	"OWNLLM_ADMIN_TOKEN": stack.AdminToken, "OWNLLM_NATS_TOKEN": "bus-secret", "POSTGRES_PASSWORD": "secret",
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

// TestComposeNames: the commands, flags and variables of docker-compose.yml exist.
func TestComposeNames(t *testing.T) {
	names := regexp.MustCompile(`OWNLLM_\w+|--[a-z][a-z-]*`)
	ours := 0
	for name, s := range composed(t, composeValues) {
		if s.Image != "ownllm" {
			continue
		}
		ours++
		var known []string
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
			known = append(known, mine...)
		}
		for variable := range s.Environment {
			if !slices.Contains(known, variable) {
				t.Errorf("%s: nothing reads %s", name, variable)
			}
		}
	}
	if ours < 4 {
		t.Errorf("%d services are ours", ours)
	}
}

// TestComposeRuns runs docker-compose.yml without Docker: the same programs with the
// same arguments and variables, but for addresses and folders, which are this
// machine's.
func TestComposeRuns(t *testing.T) {
	services := composed(t, composeValues)
	natsAddr, natsWeb, listen := stack.FreeAddr(t), stack.FreeAddr(t), stack.FreeAddr(t)
	databaseURL, first, config := pgtest.New(t), t.TempDir(), t.TempDir()
	bin := filepath.Dir(stack.Binary(t, stack.OwnLLM))

	// start runs a service, and waits until it is healthy.
	start := func(name, web, path string, args []string) *stack.Process {
		s := services[name]
		env := []string{"PATH=" + bin + ":" + os.Getenv("PATH"), "OWNLLM_OPS_LISTEN=" + web}
		for variable, value := range s.Environment {
			switch variable {
			case "OWNLLM_DATABASE_URL":
				value = databaseURL
			case "OWNLLM_LISTEN":
				value = listen
			case "OWNLLM_DATA_DIR":
				if value = first; name != "first" {
					value = t.TempDir()
				}
			}
			value = strings.NewReplacer("nats:4222", natsAddr, "edge:9191", listen).Replace(value)
			env = append(env, variable+"="+value)
		}
		p := stack.Run(t, name, env, path, args...)
		if check := s.Healthcheck.Test; len(check) > 0 {
			url := regexp.MustCompile(`^http://127\.0\.0\.1:\d+`).ReplaceAllString(check[len(check)-1], "http://"+web)
			stack.Until(t, 30*time.Second, name+" to be healthy", func() bool { return stack.Answers(url) })
		}
		return p
	}
	role := func(name string) {
		start(name, stack.FreeAddr(t), filepath.Join(bin, "ownllm"), services[name].Command)
	}
	script := func(name string) *stack.Process {
		s := services[name]
		text := strings.NewReplacer("/first/", first+"/", "/config/", config+"/").Replace(s.Command[0])
		return start(name, stack.FreeAddr(t), s.Entrypoint[0], append(slices.Clone(s.Entrypoint[1:]), text))
	}

	host, port, _ := strings.Cut(natsAddr, ":")
	_, webPort, _ := strings.Cut(natsWeb, ":")
	natsArgs := []string{"--addr=" + host, "--port=" + port}
	for _, arg := range services["nats"].Command {
		arg = strings.NewReplacer("/data", t.TempDir(), "/config/", config+"/").Replace(arg)
		natsArgs = append(natsArgs, strings.Replace(arg, "8222", webPort, 1))
	}
	made := script("config")
	stack.Until(t, 30*time.Second, "the configuration", func() bool { return !made.Alive() })
	if err := made.Err(); err != nil {
		t.Fatalf("making the configuration: %v", err)
	}
	start("nats", natsWeb, stack.Binary(t, "github.com/nats-io/nats-server/v2"), natsArgs)
	role("broker")
	role("edge")
	var keys []string
	for range 2 { // `docker compose up` runs it each time
		p := script("first")
		stack.Until(t, 30*time.Second, "the first key", func() bool { return !p.Alive() })
		if err := p.Err(); err != nil {
			t.Fatalf("making the first key: %v", err)
		}
		log := p.Log()
		keys = append(keys, strings.TrimSpace(strings.TrimPrefix(log[len(log)-1], "API key")))
	}
	if keys[0] != keys[1] {
		t.Errorf("the key changes: %q", keys)
	}
	script("worker")
	c := newClient("http://"+listen+"/v1", keys[0])
	defer c.close()
	var r reply
	stack.Until(t, 30*time.Second, "the demo model", func() bool {
		r = c.chat(t.Context(), true, nil)
		return r.err == nil
	})
	wantWhole(t, r)
}

// TestComposeVersion: the nats-server of docker-compose.yml is the one that the tests
// run.
func TestComposeVersion(t *testing.T) {
	mod, err := os.ReadFile("../../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`nats-server/v2 v([\d.]+)`).FindSubmatch(mod)
	if m == nil {
		t.Fatal("go.mod has no nats-server")
	}
	if image := composed(t, composeValues)["nats"].Image; !strings.HasPrefix(image, "nats:"+string(m[1])) {
		t.Errorf("docker-compose.yml has %s, go.mod %s", image, m[1])
	}
}
