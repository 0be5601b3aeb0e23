package report

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ownllm/ownllm/internal/load"
)

var update = flag.Bool("update", false, "write the golden files")

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s, -want +got:\n%s", name, diff)
	}
}

func latency(ms float64) *load.Latency {
	return &load.Latency{
		Count: 1000, Mean: ms * 1.1, Min: ms / 2, P50: ms, P90: ms * 2, P99: ms * 4, P999: ms * 8, Max: ms * 10,
		Curve: [][2]float64{{0, ms / 2}, {50, ms}, {90, ms * 2}, {99, ms * 4}, {99.9, ms * 8}, {100, ms * 10}},
	}
}

func aStage() load.StageReport {
	return load.StageReport{
		Clients: &load.Between{From: 8, To: 8}, Seconds: 10, Requests: load.Ended{Sent: 1000, OK: 1000},
		RequestsPerSecond: 100, TokensPerSecond: 6400, PromptTokens: 16_000, CompletionTokens: 64_000,
		FirstToken: latency(0.25), InterToken: latency(5), Whole: latency(400), Failures: []load.FailureCount{},
		Client: load.ClientHealth{Cores: 2, CPUSeconds: 1, CPUShare: 0.05, Late: &load.Latency{Count: 1000, P99: 0.5}},
		Series: []load.Point{
			{Seconds: 1, InFlight: 8, OK: 100, Tokens: 6400, FirstToken: &load.Tick{P50: 0.25, P99: 1}, Whole: &load.Tick{P50: 400, P99: 1600}},
			{Seconds: 2, InFlight: 8, Failed: 3},
			{Seconds: 3, InFlight: 8, OK: 90, Tokens: 6000, FirstToken: &load.Tick{P50: 0.3, P99: 2}, Whole: &load.Tick{P50: 410, P99: 1500}},
		},
	}
}

// calm is a run in which nothing went wrong.
func calm() *load.Report {
	return &load.Report{
		Target:    load.Target{URL: "http://127.0.0.1:9191/v1", Model: "demo"},
		StartedAt: time.Date(2026, 11, 22, 18, 4, 5, 0, time.UTC),
		Settings: load.Settings{
			Loop: "closed", Stream: true, Prompt: load.Fixed(16), Reply: load.Fixed(64), Duration: 10, WarmUp: 1, Timeout: 120, Verified: true,
		},
		Machine: load.Machine{Cores: 2, Platform: "linux/amd64"},
		Stages:  []load.StageReport{aStage()},
	}
}

// rough is one of an open loop, in which all sorts of things did.
func rough() *load.Report {
	r := calm()
	r.Interrupted = true
	r.Target.Model = `evil</script><img src="http://evil.test/x">`
	r.Settings.Loop, r.Settings.Arrivals, r.Settings.Verified = "open", "poisson", true
	r.Settings.SLO = &load.SLOms{FirstToken: 500, InterToken: 50, Whole: 5000}
	a, b := aStage(), aStage()
	for i, s := range []*load.StageReport{&a, &b} {
		s.Clients, s.Rate = nil, &load.Between{From: 10, To: 10 + 90*float64(i)}
		s.Goodput = &load.Goodput{RequestsPerSecond: 80, Share: 0.8}
		s.Client.Launched = &load.Latency{Count: 1000, P99: 1.2}
	}
	b.Requests = load.Ended{Sent: 1000, OK: 600, Failed: 380, Broken: 20}
	b.Failures = []load.FailureCount{
		{Failure: load.Failure{Status: 429, Code: "tenant_qps_limit"}, Count: 300},
		{Failure: load.Failure{Status: 200, Code: "agent_offline\x1b[31m"}, Count: 50},
		{Failure: load.Failure{Cause: load.CauseTimeout}, Count: 30},
	}
	b.Breaches = map[load.Breach]int64{load.Torn: 15, load.Lost: 5}
	b.Client.Saturated, b.Client.CPUShare, b.Client.Late.P99 = true, 0.97, 25
	r.Stages = []load.StageReport{a, b}
	return r
}

func empty() *load.Report {
	r := calm()
	r.Stages = []load.StageReport{}
	r.Interrupted = true
	return r
}

var reports = map[string]func() *load.Report{"calm": calm, "rough": rough, "empty": empty}

func TestText(t *testing.T) {
	for name, report := range reports {
		var b bytes.Buffer
		if err := Text(&b, report()); err != nil {
			t.Fatal(err)
		}
		golden(t, name+".txt", b.Bytes())
	}
}

// The JSON is for programs: its shape must not change by accident.
func TestJSON(t *testing.T) {
	for name, report := range reports {
		b, err := json.MarshalIndent(report(), "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		golden(t, name+".json", append(b, '\n'))
	}
}

func pageOf(t *testing.T, r *load.Report) string {
	t.Helper()
	var b bytes.Buffer
	if err := HTML(&b, r); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// The page needs nothing but itself, and nothing that a server said becomes a part of it.
func TestPageIsSelfContained(t *testing.T) {
	for name, report := range reports {
		page := pageOf(t, report())
		for _, loads := range []string{`(?i)\ssrc\s*=\s*"?http`, `(?i)<(link|img|iframe|object|embed|base)\b`, `(?i)@import`, `(?i)url\(`, `(?i)\s(href|action|data|poster)\s*=`, `(?i)\son[a-z]+\s*=`} {
			if found := regexp.MustCompile(loads).FindString(page); found != "" {
				t.Errorf("%s: the page has %q", name, found)
			}
		}
		if strings.Contains(page, "<img") || strings.Count(page, "<script") != 1 || strings.Count(page, "</script>") != 1 {
			t.Errorf("%s: the model's name got out of its place", name)
		}
	}
}

// The plots are well-formed, and no number in them is none.
func TestPlots(t *testing.T) {
	want := map[string]int{"calm": 6, "rough": 5 + 12, "empty": 0}
	for name, report := range reports {
		page := pageOf(t, report())
		plots := regexp.MustCompile(`(?s)<svg.*?</svg>`).FindAllString(page, -1)
		if len(plots) != want[name] {
			t.Errorf("%s: %d plots, want %d", name, len(plots), want[name])
		}
		for _, plot := range plots {
			for d := xml.NewDecoder(strings.NewReader(plot)); ; {
				if _, err := d.Token(); errors.Is(err, io.EOF) {
					break
				} else if err != nil {
					t.Fatalf("%s: %v\n%s", name, err, plot)
				}
			}
			if strings.Contains(plot, "NaN") || strings.Contains(plot, "Inf") {
				t.Errorf("%s: a number is none:\n%s", name, plot)
			}
		}
	}
}

// The report is in the page, whole.
func TestPageHoldsTheReport(t *testing.T) {
	for name, report := range reports {
		_, data, _ := strings.Cut(pageOf(t, report()), `<script type="application/json" id="report">`)
		data, _, _ = strings.Cut(data, "</script>")
		var got load.Report
		if err := json.Unmarshal([]byte(data), &got); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if diff := cmp.Diff(report(), &got, cmp.AllowUnexported(load.Length{})); diff != "" {
			t.Errorf("%s, -want +got:\n%s", name, diff)
		}
	}
}

func TestAxes(t *testing.T) {
	for _, tc := range []struct {
		high float64
		want []float64
	}{{0, []float64{0, 0.25, 0.5, 0.75, 1}}, {97, []float64{0, 25, 50, 75, 100}}, {100, []float64{0, 25, 50, 75, 100}}, {101, []float64{0, 50, 100, 150}}, {3800, []float64{0, 1000, 2000, 3000, 4000}}} {
		if got := linear(0, tc.high, plain).ticks; !cmp.Equal(got, tc.want) {
			t.Errorf("to %v: %v, want %v", tc.high, got, tc.want)
		}
	}
	if a := logarithmic(0.2, 30, duration); !cmp.Equal(a.ticks, []float64{0.1, 1, 10, 100}) || a.at(0.1) > 1e-9 || a.at(100) < 1-1e-9 {
		t.Errorf("logarithmic: %v", a.ticks)
	}
	if a := nines(99.9); a.at(0) != 0 || a.at(99.9) != 1 || a.at(100) != 1 || a.at(90) < 0.33 || a.at(90) > 0.34 {
		t.Errorf("nines: p90 lies at %v", a.at(90))
	}
	if a := until(6, plain); a.at(6) != 1 || !cmp.Equal(a.ticks, []float64{0, 2, 4, 6}) {
		t.Errorf("until: %v", a.ticks)
	}
}

func TestNumbers(t *testing.T) {
	for f, want := range map[float64]string{0: "0", 0.0004: "0.4 µs", 0.25: "250 µs", 1: "1 ms", 12.34: "12.3 ms", 999: "999 ms", 1500: "1.5 s", 120_000: "120 s", 1_234_567: "1235 s"} {
		if got := duration(f); got != want {
			t.Errorf("%v ms is %q, want %q", f, got, want)
		}
	}
}
