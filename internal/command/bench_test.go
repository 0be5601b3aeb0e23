package command

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/internal/load"
	"github.com/ownllm/ownllm/internal/port"
	"github.com/ownllm/ownllm/worker/demo"
)

const benchKey = "sk-ownllm-canarycanarycanarycan"

// nowhere is the address of a server that nobody starts.
func nowhere(t *testing.T) string {
	t.Helper()
	address, release, err := port.Reserve()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(release)
	return "http://" + address
}

// demoAPI serves the demo model, which asks for a key.
func demoAPI(t *testing.T, f demo.Faults) string {
	t.Helper()
	server := httptest.NewServer(demo.New(demo.Options{Key: benchKey, Faults: &f}))
	t.Cleanup(server.Close)
	return server.URL
}

func TestBench(t *testing.T) {
	good := demoAPI(t, demo.NoFaults())
	cut := demo.NoFaults()
	cut.DieAfter = 3
	refuse := demo.NoFaults()
	refuse.Status = 503
	torn, refusing := demoAPI(t, cut), demoAPI(t, refuse)
	notThere := httptest.NewServer(http.NotFoundHandler())
	defer notThere.Close()
	nobody := nowhere(t)
	key := map[string]string{"OWNLLM_KEY": benchKey}
	for name, tc := range map[string]struct {
		env  map[string]string
		args string
		code int
		want []string // parts of what is printed
	}{
		"requests":          {key, "--url " + good + " --requests 20", ExitOK, []string{"model demo", "closed loop of streams", "first token", "inter-token", "all its numbered tokens, once and in order (20 replies)"}},
		"time":              {key, "--url " + good + "/v1/ --duration 200ms --warmup 0s --clients 1,2", ExitOK, []string{"CLIENTS", "REQUESTS/S"}},
		"whole":             {key, "--url " + good + " --requests 20 --no-stream", ExitOK, []string{"whole replies", "end to end"}},
		"open":              {key, "--url " + good + " --requests 20 --rate 500 --arrivals even", ExitOK, []string{"open loop", "even arrivals"}},
		"slo":               {key, "--url " + good + " --requests 20 --slo ttft=1m,e2e=1h", ExitOK, []string{"GOOD/S", "100.0%", "first token within 60 s"}},
		"not verified":      {key, "--url " + good + " --requests 5 --verify off", ExitOK, []string{"every reply ended with a finish_reason"}},
		"broken":            {key, "--url " + torn + " --requests 20", ExitFailed, []string{"!!! INTEGRITY BROKEN", "20 torn", "20 replies weren't whole"}},
		"failed":            {key, "--url " + refusing + " --requests 20", ExitFailed, []string{"!!! ALL 20 REQUESTS FAILED", "503", "no request succeeded"}},
		"wrong key":         {map[string]string{"OWNLLM_KEY": "wrong"}, "--url " + good, ExitFailed, []string{"status 401", "OWNLLM_KEY"}},
		"no models":         {key, "--url " + notThere.URL, ExitFailed, []string{"lists no model", "--model"}},
		"model named":       {key, "--url " + notThere.URL + " --model x --requests 2", ExitFailed, []string{"404", "no request succeeded"}},
		"nobody":            {key, "--url " + nobody, ExitUnreachable, []string{"can't reach", nobody}},
		"no ready.json":     {map[string]string{"HOME": t.TempDir()}, "", ExitUnreachable, []string{".ownllm/ready.json", "--url"}},
		"not a URL":         {nil, "--url localhost:9191", ExitUsage, []string{"--url"}},
		"open and closed":   {nil, "--clients 1 --rate 1", ExitUsage, []string{"--clients and --rate"}},
		"half a client":     {nil, "--clients 0.5", ExitUsage, []string{"no 0.5 clients"}},
		"no clients":        {nil, "--clients 0", ExitUsage, []string{"--clients"}},
		"two ends":          {nil, "--duration 1s --requests 5", ExitUsage, []string{"--duration and --requests"}},
		"no time":           {nil, "--duration 1ms", ExitUsage, []string{"too short"}},
		"ramp without time": {nil, "--clients 1..5 --requests 5", ExitUsage, []string{"ramp 1..5"}},
		"bad length":        {nil, "--prompt-tokens 5..1", ExitUsage, []string{"100..800"}},
		"bad slo":           {nil, "--slo ttft=5", ExitUsage, []string{"ttft=500ms"}},
		"slo twice":         {nil, "--slo ttft=5ms,ttft=6ms", ExitUsage, []string{"ttft=500ms"}},
		"bad body":          {nil, "--extra-body {", ExitUsage, []string{"--extra-body"}},
		"our field":         {nil, `--extra-body {"stream":false}`, ExitUsage, []string{"flag of its own"}},
		"bad header":        {nil, "--header X", ExitUsage, []string{"--header"}},
		"bad verify":        {nil, "--verify maybe", ExitUsage, []string{"--verify"}},
		"no page":           {key, "--url " + good + " --html /nonexistent/page.html", ExitFailed, []string{"--html"}},
	} {
		t.Run(name, func(t *testing.T) {
			args := strings.Fields(tc.args)
			if tc.code == ExitOK || tc.code == ExitFailed {
				args = append(args, "--warmup", "10ms")
			}
			got := run(t, tc.env, append([]string{"bench"}, args...)...)
			all := got.stdout + got.stderr
			if got.code != tc.code {
				t.Errorf("exit code %d, want %d\n%s", got.code, tc.code, all)
			}
			for _, part := range tc.want {
				if !strings.Contains(all, part) {
					t.Errorf("it doesn't say %q:\n%s", part, all)
				}
			}
			if strings.Contains(all, "canary") || strings.Contains(got.stderr, "\x1b") {
				t.Errorf("it gives the key away, or writes to no terminal:\n%s", all)
			}
		})
	}
}

// It finds a running `ownllm up`, and prints JSON; the page holds the same.
func TestBenchFindsUp(t *testing.T) {
	dir := t.TempDir()
	ready := adminapi.Ready{PID: 1, BaseURL: demoAPI(t, demo.NoFaults()) + "/v1", APIKey: benchKey, Models: []string{"demo", "other"}}
	if err := ready.Write(dir); err != nil {
		t.Fatal(err)
	}
	page := filepath.Join(dir, "report.html")
	got := run(t, nil, "bench", "--data-dir", dir, "--json", "--requests", "30", "--warmup", "0s", "--clients", "3,1", "--html", page,
		"--prompt-tokens", "lognormal:40,20", "--max-tokens", "5..9", "--seed", "7", "--header", "X-Test: a,b",
		"--extra-body", `{"temperature":0,"demo":{"first_token_ms":2}}`)
	if got.code != ExitOK || got.stderr != "" {
		t.Fatalf("exit code %d: %s", got.code, got.stderr)
	}
	var r load.Report
	if err := json.Unmarshal([]byte(got.stdout), &r); err != nil {
		t.Fatal(err)
	}
	if r.Target.Model != "demo" || len(r.Stages) != 2 || !r.Settings.Verified || r.Settings.Seed != 7 {
		t.Fatalf("%+v", r)
	}
	for _, s := range r.Stages {
		if s.Requests != (load.Ended{Sent: 30, OK: 30}) || s.FirstToken.P50 < 2 || s.CompletionTokens < 150 || s.CompletionTokens > 270 {
			t.Errorf("%+v", s)
		}
	}
	if b, err := os.ReadFile(page); err != nil || !strings.Contains(string(b), "<svg") {
		t.Errorf("the page: %v", err)
	}
}

// An interrupt prints what there is.
func TestBenchInterrupted(t *testing.T) {
	slow := demo.NoFaults()
	slow.TokensPerSecond = 100
	server := demoAPI(t, slow)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	// The bound of a test's context stands for the signal, which cancels.
	interrupted, stop := context.WithCancel(context.Background())
	defer stop()
	context.AfterFunc(ctx, stop)
	got := runIn(interrupted, map[string]string{"OWNLLM_KEY": benchKey}, "", "bench", "--url", server, "--duration", "1h", "--warmup", "0s", "--max-tokens", "5")
	if got.code != ExitFailed || got.stderr != "ownllm: interrupted\n" || !strings.Contains(got.stdout, "Interrupted") || !strings.Contains(got.stdout, "first token") {
		t.Errorf("exit code %d, %s\n%s", got.code, got.stderr, got.stdout)
	}
}

func TestProgress(t *testing.T) {
	line := progress(load.Progress{
		Level: load.Level{From: 1, To: 32}, Stage: 2, Stages: 3, Elapsed: 4400 * time.Millisecond, Whole: 10 * time.Second,
		Point: load.Point{InFlight: 32, OK: 100, Tokens: 6400, FirstToken: &load.Tick{P50: 1, P99: 2}}, Failed: 3, Broken: 1,
	})
	if want := "stage 2 of 3, at 1..32  4s/10s  32 in flight  100 requests/s  6400 tokens/s  first token p50 1.0 ms, p99 2.0 ms  3 failed  1 BROKEN"; line != want {
		t.Errorf("%s", line)
	}
}

func TestDemoFlags(t *testing.T) {
	for name, tc := range map[string]struct {
		args []string
		want string
	}{
		"bad pace":   {[]string{"--tokens-per-second=-1"}, "tokens_per_second"},
		"bad fault":  {[]string{"--faults", `{"dye_after":5}`}, "dye_after"},
		"bad time":   {[]string{"--ttft=-1s"}, "first_token_ms"},
		"bad listen": {[]string{"--listen", "x"}, "--listen"},
	} {
		if got := run(t, nil, append([]string{"demo"}, tc.args...)...); got.code != ExitUsage || !strings.Contains(got.stderr, tc.want) {
			t.Errorf("%s: %d, %s", name, got.code, got.stderr)
		}
	}
	c := demoCommand{TTFT: time.Second, TokensPerSecond: 50, Tokens: 9, Faults: `{"jitter":0.5,"tokens":3}`}
	want := demo.NoFaults()
	want.FirstTokenMS, want.TokensPerSecond, want.Tokens, want.Jitter = 1000, 50, 9, 0.5
	if got, err := c.faults(); err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
}
