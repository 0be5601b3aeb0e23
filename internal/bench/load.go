package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/ownllm/ownllm/internal/load"
	"github.com/ownllm/ownllm/internal/secret"
)

// workload is one kind of load.
type workload struct {
	Stream  bool `json:"stream"`
	Clients int  `json:"clients"`
	Tokens  int  `json:"tokens"` // of each reply
}

func (w workload) String() string {
	kind, plural := "whole, ", "s"
	if w.Stream {
		kind = "stream,"
	}
	if w.Clients == 1 {
		plural = ""
	}
	return fmt.Sprintf("%s %3d tokens, %2d client%s", kind, w.Tokens, w.Clients, plural)
}

// workloads are what is measured.
var workloads = []workload{{true, 1, 32}, {true, 32, 32}, {true, 32, 256}, {false, 1, 32}, {false, 32, 32}}

// Figure is one measurement. Times of first tokens are in microseconds, CPU times in
// microseconds for each request; Broker is what stands between client and backend.
type Figure struct {
	PerSecond   float64 `json:"requests_per_second"`
	FirstP50    float64 `json:"first_token_p50_us"`
	FirstP99    float64 `json:"first_token_p99_us"`
	CPUBackend  float64 `json:"cpu_backend_us"`
	CPUBroker   float64 `json:"cpu_broker_us"`
	CPUPostgres float64 `json:"cpu_postgres_us"`
	CPUClient   float64 `json:"cpu_client_us"`
	// Torn counts replies that broke off, which the bare proxy is forgiven: on a machine
	// that is overrun, net/http now and then closes a connection under a reply.
	Torn int64 `json:"torn,omitempty"`
}

// replyWait bounds one reply.
const replyWait = 30 * time.Second

// target is an API to send requests to.
type target struct {
	addr string        // host:port
	key  secret.String // empty for the backend
	// keys stand in for key if there are any.
	keys []secret.String
}

// load sends requests for a while, and says how that went. One that fails is an error, but
// for the bare proxy's.
func (s *stack) load(ctx context.Context, t target, w workload, d time.Duration) (Figure, error) {
	clients := float64(w.Clients)
	before := s.spent(t)
	report, err := load.Run(ctx, load.Config{
		URL: &url.URL{Scheme: "http", Host: t.addr, Path: "/v1"}, Key: t.key, Keys: t.keys, Model: "demo", Stream: w.Stream,
		Prompt: load.Fixed(2), Reply: load.Fixed(w.Tokens), Verify: true,
		Levels: []load.Level{{From: clients, To: clients}}, Duration: d, Timeout: replyWait,
	}, nil)
	used := s.spent(t).minus(before)
	if err == nil && report.Interrupted {
		err = context.Cause(ctx)
	}
	if err != nil {
		return Figure{}, err
	}
	stage := report.Stages[0]
	took := stage.FirstToken
	if !w.Stream {
		took = stage.Whole
	}
	n := stage.Requests
	if took == nil || n.OK != n.Sent && t.addr != s.bare.addr {
		return Figure{}, fmt.Errorf("%s at %s: %+v, failures %+v, not whole %v", w, t.addr, n, stage.Failures, stage.Breaches)
	}
	each := func(d time.Duration) float64 { return float64(d.Microseconds()) / float64(n.OK) }
	return Figure{
		Torn:      n.Sent - n.OK,
		PerSecond: stage.RequestsPerSecond, FirstP50: took.P50 * 1e3, FirstP99: took.P99 * 1e3,
		CPUBackend: each(used.backend), CPUBroker: each(used.broker), CPUPostgres: each(used.postgres), CPUClient: each(used.client),
	}, nil
}

const module = "github.com/ownllm/ownllm"

// warmUp is how long each side gets to fill its caches before it is measured.
const warmUp = 300 * time.Millisecond

// measure measures what the flags ask for, and returns the report.
func measure(ctx context.Context, c config, stderr io.Writer) (*Report, error) {
	dir, err := os.MkdirTemp("", "ownllm-bench-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }() // what is left is in the temporary folder
	if c.binary == "" {
		if c.binary, err = build(ctx, dir, module, "build", "-buildvcs=auto"); err != nil {
			return nil, err
		}
	}
	report := newReport(c)
	report.Commit = commit(ctx, c.binary)
	for _, p := range []struct {
		name    string
		measure func() error
	}{
		{"requests", func() error { report.Workloads, err = measureRequests(ctx, c, dir, stderr); return err }},
		{"floor", func() error { report.Floor, err = measureFloor(ctx, c, dir, stderr); return err }},
		{"streams", func() error { report.Streams, err = measureStreams(ctx, c, dir, stderr); return err }},
		{knee, func() error { report.Knee, err = measureKnee(ctx, c, dir, stderr); return err }},
		{"admissions", func() error { report.Admissions, err = measureAdmissions(ctx, c, dir, stderr); return err }},
		{"scale", func() error { report.Scale, err = measureScale(ctx, c, dir, stderr); return err }},
		{"submissions", func() error { report.Submissions, err = measureSubmissions(ctx, c, dir, stderr); return err }},
	} {
		if !c.wants(p.name) {
			continue
		}
		if err := p.measure(); err != nil {
			return nil, fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return report, nil
}

// build has the go command make a program of a package, in dir, and returns its path.
func build(ctx context.Context, dir, of string, args ...string) (binary string, err error) {
	binary = filepath.Join(dir, path.Base(of))
	if out, err := exec.CommandContext(ctx, "go", append(args, "-o", binary, of)...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w\n%s", of, err, out)
	}
	return binary, nil
}

// measureRequests starts everything, and measures all workloads in turns.
func measureRequests(ctx context.Context, c config, dir string, stderr io.Writer) ([]Measured, error) {
	s, err := startStack(ctx, c.binary, dir, stderr)
	if err != nil {
		return nil, err
	}
	defer s.close()
	list := make([]Measured, len(workloads))
	for i, w := range workloads {
		list[i].workload = w
		for _, t := range []target{s.direct, s.bare, s.through} {
			if _, err := s.load(ctx, t, w, warmUp); err != nil {
				return nil, err
			}
		}
	}
	for round := range c.rounds {
		for i, w := range workloads {
			var r Round
			for _, side := range []struct {
				of target
				to *Figure
			}{{s.direct, &r.Direct}, {s.bare, &r.Proxy}, {s.through, &r.Broker}} {
				if *side.to, err = s.load(ctx, side.of, w, c.duration); err != nil {
					return nil, err
				}
			}
			list[i].Rounds = append(list[i].Rounds, r)
		}
		fmt.Fprintf(stderr, "requests: round %d of %d\n", round+1, c.rounds)
	}
	if c.profile != "" {
		if err := s.profile(ctx, c.profile); err != nil {
			return nil, err
		}
	}
	return list, nil
}

// profileTime is how long a profile is taken for.
const profileTime = 10 * time.Second

// profile saves what the broker process does under load with 32 clients.
func (s *stack) profile(ctx context.Context, dir string) error {
	for _, w := range workloads {
		if w.Clients == 1 || w.Tokens != 32 {
			continue
		}
		name := "whole"
		if w.Stream {
			name = "stream"
		}
		if err := s.profileWhile(ctx, dir, name, 0, func(ctx context.Context) error {
			_, err := s.load(ctx, s.through, w, profileTime+time.Second)
			return err
		}); err != nil {
			return fmt.Errorf("profile %s: %w", w, err)
		}
	}
	return nil
}

// profileWhile saves CPU and allocation profiles of the broker process in dir, under a name,
// while something is done that takes at least profileTime once after has passed.
func (s *stack) profileWhile(ctx context.Context, dir, name string, after time.Duration, do func(context.Context) error) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return do(ctx) })
	for suffix, of := range map[string]string{".cpu": "profile", ".allocs": "allocs"} {
		group.Go(func() error {
			if err := pause(ctx, after); err != nil {
				return err
			}
			url := fmt.Sprintf("%s/debug/pprof/%s?seconds=%d", s.ops, of, int(profileTime.Seconds()))
			return save(ctx, url, filepath.Join(dir, name+suffix))
		})
	}
	return group.Wait()
}

// save writes what an address answers into a file.
func save(ctx context.Context, url, path string) error {
	b, err := get(ctx, url)
	if err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o644)
}

// get returns what an address answers.
func get(ctx context.Context, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	transport := &http.Transport{DisableKeepAlives: true}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answers with status %d", url, resp.StatusCode)
	}
	return io.ReadAll(resp.Body)
}
