package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The whole benchmark, once and short, so that it works when somebody needs it.
func TestQuick(t *testing.T) {
	if testing.Short() {
		t.Skip("builds and starts the whole program")
	}
	var stdout, stderr bytes.Buffer
	if code := run(t.Context(), []string{"-quick", "-json"}, &stdout, &stderr); code != 0 {
		t.Fatalf("exit code %d\n%s", code, &stderr)
	}
	var r Report
	if err := json.Unmarshal(stdout.Bytes(), &r); err != nil {
		t.Fatal(err)
	}
	if r.Cores < 1 || r.Commit == "" || len(r.Workloads) != len(workloads) || r.Admissions == nil {
		t.Fatalf("report = %+v", r)
	}
	for _, m := range r.Workloads {
		if len(m.Rounds) != 1 {
			t.Fatalf("%s: %d rounds, want 1", m, len(m.Rounds))
		}
		for side, f := range map[string]Figure{"direct": m.Rounds[0].Direct, "proxy": m.Rounds[0].Proxy, "broker": m.Rounds[0].Broker} {
			if f.PerSecond <= 0 || f.FirstP50 <= 0 || f.FirstP99 < f.FirstP50 {
				t.Errorf("%s, %s: %+v", m, side, f)
			}
		}
	}
	if len(r.Floor) != len(floorWork) {
		t.Errorf("floor: %+v", r.Floor)
	}
	for _, m := range r.Floor {
		for _, side := range floorSides {
			if f := side.of(m.Rounds[0]); f.PerSecond <= 0 || f.FirstP50 <= 0 || f.Torn > 0 && side.name != "bare proxy" {
				t.Errorf("floor, %s, %s: %+v", m, side.name, f)
			}
		}
	}
	for _, c := range []contest{
		{1000, 1, "admit", 0}, {1000, 32, "update", 32}, {1000, 256, "update", 256}, {1, 256, "admit", 0}, {1, 256, "update", 64},
	} {
		if rounds := r.Admissions.find(c); len(rounds) != 1 {
			t.Errorf("%+v: %d rounds, want 1", c, len(rounds))
		}
	}
	if s := r.Streams; s == nil || s.Open.Streams != small.open || s.Open.Broker <= 0 || s.Open.Idle <= 0 || len(s.Paced.Rounds) != 1 {
		t.Errorf("streams: %+v", s)
	} else {
		if o := s.Open; o.Proxy == 0 || o.Core == 0 || o.Queue == 0 || o.Postgres == 0 {
			t.Errorf("open: %+v", o)
		}
		r := s.Paced.Rounds[0]
		for side, g := range map[string]Gap{
			"direct": r.Direct, "proxy": r.Proxy, "core": r.Core, "queue": r.Queue, "postgres": r.Postgres, "broker": r.Broker,
		} {
			if (g.CPU > 0) != (side != "direct") {
				t.Errorf("paced, %s: %+v", side, g)
			}
			// On a machine that is overrun tokens come in heaps, but never faster than they are made.
			if g.P99 < g.P50 || g.P99 < 1000/tokenRate/2 || g.Cores <= 0 {
				t.Errorf("paced, %s: %+v", side, g)
			}
		}
	}
	if len(r.Knee) != len(small.knee) {
		t.Errorf("knee: %+v", r.Knee)
	}
	for i, p := range r.Knee {
		if p.Streams != small.knee[i] || len(p.Rounds) != 1 {
			t.Fatalf("knee: %+v", p)
		}
		for _, side := range kneeSides {
			if g := side.gap(&p.Rounds[0]); g.P50 <= 0 || g.P99 < g.P50 {
				t.Errorf("knee, %d streams, %s: %+v", p.Streams, side.name, g)
			}
		}
	}
	if len(r.Scale) != len(small.estates) {
		t.Errorf("scale: %+v", r.Scale)
	}
	for i, s := range r.Scale {
		if s.estate != small.estates[i] || len(s.Rounds) != 1 || s.Rounds[0].CPUBroker <= 0 || s.Rounds[0].CPUPostgres <= 0 {
			t.Errorf("scale: %+v", s)
		}
	}
	if s := r.Submissions; s == nil || len(s.Backlogs) != 2 || s.Backlogs[1].Waiting != 1000 || len(s.Backlogs[1].Rounds) != 1 {
		t.Errorf("submissions: %+v", s)
	}
	// Admission alone is one round trip and its settlement another, however busy the machine.
	if p := r.Admissions.find(alone)[0]; p.Trips != 2 {
		t.Errorf("%v round trips for an admission and a settlement", p.Trips)
	}
	var text strings.Builder
	if err := r.writeText(&text); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{r.Commit, "stream, 256 tokens, 32 clients", "whole,   32 tokens,  1 client", "p99", "ownllm up", "1000 keys,  32 waiters", "   1 key,    1 waiter ",
		"100 streams of 20 tokens/s", "each of 100 open streams", "\n40        + Postgres", "1000 waiting", "cores busy when idle", "+ Postgres"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("the text lacks %q:\n%s", want, &text)
		}
	}
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{{"-rounds", "0"}, {"-duration", "1ms"}, {"-nonsense"}, {"word"}, {"-only", "word"}} {
		var stdout, stderr bytes.Buffer
		if code := run(t.Context(), args, &stdout, &stderr); code != 2 || stderr.Len() == 0 {
			t.Errorf("%q: exit code %d, says %q", args, code, &stderr)
		}
	}
}

func TestWants(t *testing.T) {
	for _, part := range parts {
		for _, c := range []struct {
			config
			want bool
		}{
			{config{}, part != knee}, {config{quick: true}, true}, {config{only: part}, true}, {config{only: "word"}, false},
		} {
			if got := c.wants(part); got != c.want {
				t.Errorf("%+v wants %s: %v", c.config, part, got)
			}
		}
	}
}

func TestParseStat(t *testing.T) {
	line := "4242 (a (odd) name) S 77 4242 4242 0 -1 4194560 1 2 3 4 150 25 7 3 20 0 1 0 100"
	want := stat{pid: 4242, parent: 77, own: 1750 * time.Millisecond, reaped: 100 * time.Millisecond}
	if got := parseStat(line); got != want {
		t.Errorf("parseStat = %+v, want %+v", got, want)
	}
	if got := parseStat("1 (cut"); got.own != 0 {
		t.Errorf("a line that was cut off gives %+v", got)
	}
}

func TestParseResident(t *testing.T) {
	for status, want := range map[string]int64{
		"Name:\townllm\nVmHWM:\t  900000 kB\nVmRSS:\t  345600 kB\nRssAnon:\t 1 kB\n": 345600 << 10,
		"Name:\tzombie\n": 0,
		"":                0,
	} {
		if got := parseResident(status); got != want {
			t.Errorf("parseResident(%q) = %d, want %d", status, got, want)
		}
	}
}

func TestCheckFiles(t *testing.T) {
	if err := checkFiles(1); err != nil {
		t.Error(err)
	}
	if err := checkFiles(1 << 40); err == nil || !strings.Contains(err.Error(), "ulimit") {
		t.Errorf("for too many streams the error is %v", err)
	}
}

func TestStatistics(t *testing.T) {
	var m Measured
	for _, n := range []float64{4, 1, 3, 2} {
		m.Rounds = append(m.Rounds, Round{Broker: Figure{PerSecond: n}})
	}
	value := func(p Round) float64 { return p.Broker.PerSecond }
	if got, want := m.over(value), (spread{1, 2.5, 4}); got != want {
		t.Errorf("over = %v, want %v", got, want)
	}
	m.Rounds = m.Rounds[:3]
	if got, want := m.over(value), (spread{1, 3, 4}); got != want {
		t.Errorf("over = %v, want %v", got, want)
	}
}
