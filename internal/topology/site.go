package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/ownllm/ownllm/internal/port"
	"github.com/ownllm/ownllm/internal/postgres"
)

const (
	startWait = 3 * time.Minute
	lookEvery = 100 * time.Millisecond
)

// absent are the services that aren't run.
var absent = []string{"collector", "prometheus", "grafana"}

// site is docker-compose.yml on this machine.
type site struct {
	o        options
	compose  *compose
	address  *regexp.Regexp // service:port
	ports    map[string]string
	release  []func() // of the ports
	database *postgres.Server
	started  map[string]*process
	order    []*process
	ended    chan *process // those that ended by themselves, or were stopped
}

func newSite(o options, c *compose) *site {
	names := slices.Sorted(maps.Keys(c.Services))
	slices.Reverse(names) // nats-1 before nats
	return &site{
		o: o, compose: c, address: regexp.MustCompile(`\b(` + strings.Join(names, "|") + `):(\d+)\b`),
		ports: make(map[string]string), started: make(map[string]*process), ended: make(chan *process, len(names)),
	}
}

// startAll starts all services that are run without a profile.
func (s *site) startAll(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startWait)
	defer cancel()
	var names []string
	for _, name := range slices.Sorted(maps.Keys(s.compose.Services)) {
		if len(s.compose.Services[name].Profiles) == 0 {
			names = append(names, name)
		}
	}
	return s.bringUp(ctx, names)
}

// bringUp starts services and then waits for them: those of a cluster aren't healthy
// without each other.
func (s *site) bringUp(ctx context.Context, names []string) error {
	for _, name := range names {
		if err := s.start(ctx, name); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	for _, name := range names {
		if p := s.started[name]; p != nil {
			if err := s.await(ctx, p, s.compose.Services[name]); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
	}
	return nil
}

// start starts a service, once, when those that it depends on are there.
func (s *site) start(ctx context.Context, name string) error {
	if _, ok := s.started[name]; ok || slices.Contains(absent, name) {
		return nil
	}
	s.started[name] = nil
	own := s.compose.Services[name]
	if err := s.bringUp(ctx, slices.Sorted(maps.Keys(own.DependsOn))); err != nil {
		return err
	}
	var path string
	var args []string
	switch image, _, _ := strings.Cut(own.Image, ":"); {
	case image == "postgres":
		return s.startDatabase(ctx, own)
	case image == "haproxy" && s.o.haproxy == "":
		return nil
	case image == "haproxy":
		path, args = s.o.haproxy, []string{"-f", "/usr/local/etc/haproxy/haproxy.cfg"}
	case image == "nats":
		host, port, _ := net.SplitHostPort(s.at(name, "4222"))
		path, args = filepath.Join(s.o.dir, "bin", "nats-server"), slices.Concat([]string{"--addr=" + host, "--port=" + port}, own.Command)
	case len(own.Entrypoint) > 0:
		path, args = own.Entrypoint[0], slices.Concat(own.Entrypoint[1:], own.Command)
	default:
		path, args = filepath.Join(s.o.dir, "bin", "ownllm"), own.Command
	}
	here, err := s.here(name, own)
	if err != nil {
		return err
	}
	args = slices.Clone(args)
	for i := range args {
		args[i] = here(args[i])
	}
	return s.spawn(name, path, args, s.environment(name, own, here))
}

// at is the address of a service's port on this machine.
func (s *site) at(name, number string) string {
	if name == "balancer" && s.o.haproxy == "" {
		name = "edge-1"
	}
	key := name + ":" + number
	if s.ports[key] == "" {
		address, release, err := port.Reserve()
		if err != nil {
			return key // who listens there says what is wrong
		}
		s.ports[key], s.release = address, append(s.release, release)
	}
	return s.ports[key]
}

var (
	anyHost = regexp.MustCompile(`\b(?:0\.0\.0\.0|127\.0\.0\.1):(\d{4,5})\b`)
	webPort = regexp.MustCompile(`(--http_port=)(\d+)`)
	binding = regexp.MustCompile(`(?m)^(\s*bind )(?:[\d.]*):(\d+)`)
)

// here returns what translates a text of a service to this machine: addresses, and the
// paths of its volumes. Files that are mounted are translated, too.
func (s *site) here(name string, own *service) (func(string) string, error) {
	var paths []string
	addresses := func(text string) string {
		text = s.address.ReplaceAllStringFunc(text, func(m string) string {
			host, port, _ := strings.Cut(m, ":")
			if host == "collector" {
				return strings.TrimPrefix(s.o.otlp, "http://")
			}
			return s.at(host, port)
		})
		text = webPort.ReplaceAllStringFunc(text, func(m string) string {
			_, port, _ := net.SplitHostPort(s.at(name, webPort.FindStringSubmatch(m)[2]))
			return "--http_port=" + port
		})
		return text
	}
	listening := func(text string) string {
		return anyHost.ReplaceAllStringFunc(text, func(m string) string {
			_, port, _ := strings.Cut(m, ":")
			return s.at(name, port)
		})
	}
	var mounted []func() error
	for _, v := range own.Volumes {
		parts := strings.Split(v, ":")
		from, to := parts[0], parts[1]
		if !strings.HasPrefix(from, ".") {
			from = filepath.Join(s.o.dir, "volumes", from)
			if err := os.MkdirAll(from, 0o755); err != nil {
				return nil, err
			}
			paths = append(paths, to, from)
			continue
		}
		from = filepath.Join(s.compose.dir, from)
		info, err := os.Stat(from)
		if err != nil {
			return nil, err
		}
		if info.IsDir() {
			paths = append(paths, to, from)
			continue
		}
		file := filepath.Join(s.o.dir, "files", name+"-"+filepath.Base(to))
		paths = append(paths, to, file)
		mounted = append(mounted, func() error {
			b, err := os.ReadFile(from)
			if err != nil {
				return err
			}
			text := strings.NewReplacer(paths...).Replace(addresses(s.balanced(name, listening(string(b)))))
			// The only relative path: that of the accounts, which are in a volume.
			text = strings.Replace(text, "include config/", "include ../volumes/config/", 1)
			if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
				return err
			}
			return os.WriteFile(file, []byte(text), 0o600)
		})
	}
	for _, mount := range mounted {
		if err := mount(); err != nil {
			return nil, err
		}
	}
	return func(text string) string {
		return addresses(listening(strings.NewReplacer(paths...).Replace(text)))
	}, nil
}

// balanced translates what is special in the configuration of HAProxy: ports without a host,
// and a health check on another port of each server.
func (s *site) balanced(name, text string) string {
	if !strings.Contains(text, "\nbackend ") {
		return text
	}
	text = binding.ReplaceAllStringFunc(text, func(m string) string {
		parts := binding.FindStringSubmatch(m)
		return parts[1] + s.at(name, parts[2])
	})
	text = regexp.MustCompile(`check port \d+`).ReplaceAllString(text, "check")
	return regexp.MustCompile(`(?m)^(\s+server (\S+) \S+)$`).ReplaceAllStringFunc(text, func(m string) string {
		server := strings.Fields(m)[1]
		_, port, _ := net.SplitHostPort(s.at(server, "9192"))
		return m + " port " + port
	})
}

// environment is that of a service.
func (s *site) environment(name string, own *service, here func(string) string) []string {
	var env []string
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "OWNLLM_") && !strings.HasPrefix(v, "OTEL_") && !strings.HasPrefix(v, "PATH=") {
			env = append(env, v)
		}
	}
	env = append(env, "PATH="+filepath.Join(s.o.dir, "bin")+":"+os.Getenv("PATH"))
	for variable, value := range own.Environment {
		switch {
		case variable == "OWNLLM_DATABASE_URL":
			value = s.databaseURL(value, here)
		case variable == "POSTGRES_GID":
			value = databaseGroup()
		case variable == "HAPROXY_GID", strings.HasPrefix(variable, "OTEL_") && s.o.otlp == "":
			continue
		default:
			value = here(value)
		}
		env = append(env, variable+"="+value)
	}
	if s.o.otlp != "" {
		env = append(env, "OTEL_BSP_SCHEDULE_DELAY=100")
	}
	// Each service has an operations port, whether its address is given or not.
	if own.Environment["OWNLLM_OPS_LISTEN"] == "" {
		env = append(env, "OWNLLM_OPS_LISTEN="+s.at(name, "9192"))
	}
	return env
}

// startDatabase starts PostgreSQL with the settings of its service.
func (s *site) startDatabase(ctx context.Context, own *service) error {
	here, err := s.here("postgres", own)
	if err != nil {
		return err
	}
	settings := make(map[string]string)
	for _, arg := range own.Command {
		if setting, value, ok := strings.Cut(here(arg), "="); ok {
			settings[setting] = value
		}
	}
	s.database, err = postgres.Start(ctx, postgres.Config{DataDir: filepath.Join(s.o.dir, "postgres"), Settings: settings})
	return err
}

// databaseURL is the address of PostgreSQL, by the parameters of the composed one.
func (s *site) databaseURL(composed string, here func(string) string) string {
	u, err := url.Parse(s.database.URL())
	given, err2 := url.Parse(here(composed))
	if err != nil || err2 != nil {
		return composed
	}
	u.RawQuery = given.RawQuery
	return u.String()
}

// databaseGroup is the group of whom PostgreSQL runs as if root starts it, else empty.
func databaseGroup() string {
	if os.Geteuid() != 0 {
		return ""
	}
	for _, name := range []string{"postgres", "nobody"} {
		if u, err := user.Lookup(name); err == nil {
			return u.Gid
		}
	}
	return ""
}

// await waits for what a service is there for: to be healthy, or else to end well, if
// others wait for that.
func (s *site) await(ctx context.Context, p *process, own *service) error {
	check := ""
	if n := len(own.Healthcheck.Test); n > 0 {
		u, err := url.Parse(own.Healthcheck.Test[n-1])
		if err != nil || u.Port() == "" {
			return fmt.Errorf("its health check isn't a URL: %v", own.Healthcheck.Test)
		}
		u.Host = s.at(p.name, u.Port())
		check = u.String()
	}
	ends := check == "" && len(own.Entrypoint) > 0
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return fmt.Errorf("it isn't up in time: %w\n%s", context.Cause(ctx), p.tail())
		case <-p.done:
			if ends && p.err == nil {
				return nil
			}
			return fmt.Errorf("it has ended: %v\n%s", p.err, p.tail())
		case <-tick.C:
			if check != "" && answers(ctx, check) {
				return nil
			}
		}
	}
}

// answers reports whether a GET of the address gives the status 200.
func answers(ctx context.Context, address string) bool {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return false
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return false
	}
	_ = resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// describe says where everything is.
func (s *site) describe() (*Topology, error) {
	key, err := os.ReadFile(filepath.Join(s.o.dir, "volumes", "first", "key"))
	if err != nil {
		return nil, err
	}
	t := &Topology{
		PID: os.Getpid(), Ops: make(map[string]string), CAFile: filepath.Join(s.o.dir, "volumes", "certs", "ca.pem"),
		APIKey: strings.TrimSpace(string(key)), AdminToken: s.compose.values["OWNLLM_ADMIN_TOKEN"], NATSToken: s.compose.values["OWNLLM_NATS_TOKEN"],
	}
	for _, name := range slices.Sorted(maps.Keys(s.started)) {
		own := s.compose.Services[name]
		switch {
		case strings.HasPrefix(own.Image, "nats:"):
			t.NATSURLs = append(t.NATSURLs, "tls://"+s.at(name, "4222"))
		case own.Environment["OWNLLM_LISTEN"] != "":
			t.Edges = append(t.Edges, "http://"+s.at(name, "9191")+"/v1")
		case name == "balancer" && s.o.haproxy != "":
			t.Balancer = "https://" + s.at(name, "9443") + "/v1"
		}
		if own.Environment["OWNLLM_OPS_LISTEN"] != "" {
			t.Ops[name] = "http://" + s.at(name, "9192")
		}
		if composed := own.Environment["OWNLLM_DATABASE_URL"]; composed != "" {
			here, err := s.here(name, own)
			if err != nil {
				return nil, err
			}
			t.DatabaseURL = s.databaseURL(composed, here)
		}
	}
	return t, nil
}

// wait comes back when ctx ends, or when a service has ended by itself.
func (s *site) wait(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.database.Done():
			return errors.New("postgres has ended")
		case p := <-s.ended:
			if len(s.compose.Services[p.name].Healthcheck.Test) > 0 {
				return fmt.Errorf("%s has ended: %v\n%s", p.name, p.err, p.tail())
			}
		}
	}
}

// stop ends all services, those that were started last first.
func (s *site) stop() error {
	var errs []error
	for _, p := range slices.Backward(s.order) {
		errs = append(errs, p.stop())
	}
	if s.database != nil {
		ctx, cancel := context.WithTimeout(context.Background(), stopWait)
		defer cancel()
		errs = append(errs, s.database.Stop(ctx))
	}
	for _, release := range s.release {
		release()
	}
	return errors.Join(errs...)
}
