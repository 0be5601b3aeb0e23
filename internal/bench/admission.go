package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// contest is one kind of work on the books, by so many waiters at once. See
// BenchmarkAdmission in broker/books, which does the work.
type contest struct {
	Keys    int    `json:"keys"`
	Waiters int    `json:"waiters"`
	Kind    string `json:"kind"` // "admit", "alone", "update" or "select"
	// Connections is how many of them the waiters of a bare loop share.
	Connections int `json:"connections,omitempty"`
}

func (c contest) String() string {
	keys, waiters := "keys,", "waiters"
	if c.Keys == 1 {
		keys = "key,"
	}
	if c.Waiters == 1 {
		waiters = "waiter"
	}
	return fmt.Sprintf("%4d %-5s %3d %s", c.Keys, keys, c.Waiters, waiters)
}

// rival is the admission that a bare loop is held against.
func (c contest) rival() contest { return contest{Keys: c.Keys, Waiters: c.Waiters, Kind: "admit"} }

// What one waiter does on one key.
var (
	trip   = contest{1, 1, "select", 0}
	update = contest{1, 1, "update", 1}
	alone  = contest{1, 1, "alone", 0}
	behind = contest{1, 1, "admit", 0}
)

// Pace is how fast that went. Times are in microseconds: of "admit" and "alone" those
// until a request is admitted.
type Pace struct {
	PerSecond float64 `json:"per_second"`
	P50       float64 `json:"p50_us"`
	P99       float64 `json:"p99_us"`
	// Trips is how many round trips to the database there were for each request, its
	// settlement included; 0 for bare loops, which have one.
	Trips float64 `json:"round_trips,omitempty"`
}

// Contested is a contest and all its rounds.
type Contested struct {
	contest
	Rounds []Pace `json:"rounds"`
}

// Admissions is what was measured of the books, each round in the order of the list.
type Admissions struct {
	Duration string      `json:"duration"`
	Contests []Contested `json:"contests"`
}

// measureAdmissions has the benchmark of the books run once for each round, each time on
// a fresh database in dir.
func measureAdmissions(ctx context.Context, c config, dir string, stderr io.Writer) (*Admissions, error) {
	binary, err := buildBooks(ctx, dir)
	if err != nil {
		return nil, err
	}
	// A quarter: there are five times as many measurements as of requests.
	duration := c.duration / 4
	report := &Admissions{Duration: duration.String()}
	for round := range c.rounds {
		out, err := runBenchmark(ctx, binary, dir, "^BenchmarkAdmission$", duration, stderr)
		if err != nil {
			return nil, err
		}
		if err := report.add(round, out); err != nil {
			return nil, fmt.Errorf("benchmark of the books: %w\n%s", err, out)
		}
		fmt.Fprintf(stderr, "admissions: round %d of %d\n", round+1, c.rounds)
	}
	return report, nil
}

// buildBooks builds the tests of the books, with their benchmarks.
func buildBooks(ctx context.Context, dir string) (binary string, err error) {
	return build(ctx, dir, module+"/broker/books", "test", "-c")
}

// runBenchmark has a benchmark of the books run, and returns what it prints.
func runBenchmark(ctx context.Context, binary, dir, pattern string, duration time.Duration, stderr io.Writer) ([]byte, error) {
	cmd := exec.CommandContext(ctx, binary, "-test.run=^$", "-test.bench="+pattern, "-test.benchtime="+duration.String())
	cmd.Env = append(os.Environ(), "TMPDIR="+dir) // so that nothing is left if it is killed
	cmd.Stderr = stderr
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("benchmark of the books: %w\n%s", err, out)
	}
	return out, nil
}

// add adds a round: what the benchmark has printed.
func (a *Admissions) add(round int, printed []byte) error {
	n := 0
	for line := range bytes.Lines(printed) {
		if !bytes.HasPrefix(line, []byte("Benchmark")) {
			continue
		}
		c, pace, err := parseLine(string(line))
		if err != nil {
			return err
		}
		if round == 0 {
			a.Contests = append(a.Contests, Contested{contest: c})
		}
		if n >= len(a.Contests) || a.Contests[n].contest != c {
			return fmt.Errorf("round %d has %s by %s, which the first one hasn't at that place", round+1, c.Kind, c)
		}
		a.Contests[n].Rounds = append(a.Contests[n].Rounds, pace)
		n++
	}
	if n < len(a.Contests) {
		return fmt.Errorf("round %d has only %d results", round+1, n)
	}
	return a.complete()
}

// complete makes sure that there is what the tables compare.
func (a *Admissions) complete() error {
	want := []contest{trip, update, alone, behind}
	for _, c := range a.Contests {
		want = append(want, c.rival())
	}
	for _, c := range want {
		if a.find(c) == nil {
			return fmt.Errorf("there is no %s by %s", c.Kind, c)
		}
	}
	return nil
}

// resultName is the name of a benchmark, without what Go adds to it: the number of cores.
var resultName = regexp.MustCompile(`^BenchmarkAdmission/keys=(\d+)/waiters=(\d+)/([a-z]+)(?:/conns=(\d+))?(?:-\d+)?$`)

// parseLine reads a result: a name, the number of operations, and then values, each
// with its unit.
func parseLine(line string) (c contest, p Pace, err error) {
	fields := strings.Fields(line)
	var name []string
	if len(fields) > 0 {
		name = resultName.FindStringSubmatch(fields[0])
	}
	if name == nil {
		return c, p, fmt.Errorf("not a result: %q", line)
	}
	c.Kind = name[3]
	c.Keys, _ = strconv.Atoi(name[1]) // all of them are digits
	c.Waiters, _ = strconv.Atoi(name[2])
	c.Connections, _ = strconv.Atoi(name[4]) // or nothing
	for i := 2; i+1 < len(fields); i += 2 {
		v, err := strconv.ParseFloat(fields[i], 64)
		if err != nil {
			return c, p, fmt.Errorf("not a number: %q in %q", fields[i], line)
		}
		switch fields[i+1] {
		case "ops/s":
			p.PerSecond = v
		case "p50-us":
			p.P50 = v
		case "p99-us":
			p.P99 = v
		case "trips/op":
			p.Trips = v
		}
	}
	if p.PerSecond <= 0 || p.P50 <= 0 || p.P99 < p.P50 {
		return c, p, fmt.Errorf("a value is missing: %q", line)
	}
	return c, p, nil
}

// find returns the rounds of a contest.
func (a *Admissions) find(c contest) []Pace {
	for i := range a.Contests {
		if a.Contests[i].contest == c {
			return a.Contests[i].Rounds
		}
	}
	return nil
}

// against takes one value of each round, out of what two contests came to in it.
func against(bare, admit []Pace, value func(bare, admit Pace) float64) spread {
	values := make([]float64, len(bare))
	for i := range values {
		values[i] = value(bare[i], admit[i])
	}
	return spreadOf(values)
}

func (a *Admissions) writeText(out *bufio.Writer) {
	fmt.Fprintf(out, "\nAdmissions per second, each with its settlement, against a bare loop: one UPDATE of a row of the\n"+
		"key for each request, by as many waiters on a pool of connections. Every commit is flushed to disk.\n"+
		"%d rounds of %s, in turns, each on a fresh database; the ratio is taken in each round\n\n",
		len(a.Contests[0].Rounds), a.Duration)
	table := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(table, "\tconnections\tUPDATE\tadmission\tadmission/UPDATE\tround trips each")
	for _, bare := range a.Contests {
		if bare.Kind != "update" {
			continue
		}
		admit := a.find(bare.rival())
		fmt.Fprintf(table, "%s\t%d\t%s\t%s\t%s\t%s\n", bare.contest, bare.Connections,
			against(bare.Rounds, admit, func(b, _ Pace) float64 { return b.PerSecond }).text(0),
			against(bare.Rounds, admit, func(_, a Pace) float64 { return a.PerSecond }).text(0),
			against(bare.Rounds, admit, func(b, a Pace) float64 { return a.PerSecond / b.PerSecond }).text(2),
			against(bare.Rounds, admit, func(_, a Pace) float64 { return a.Trips }).text(3))
	}
	_ = table.Flush() // writes to out, whose error counts

	fmt.Fprintf(out, "\nTime in ms that one waiter waits, one key; an admission is one round trip, and its settlement\n"+
		"another, which nobody waits for and which the next admission shares if it comes at once\n\n")
	table = tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(table, "\tp50\tp99\tp50 in SELECTs\tp50 in UPDATEs")
	for _, row := range []struct {
		name string
		of   contest
	}{
		{"SELECT 1, a bare round trip", trip}, {"UPDATE", update},
		{"admission, nothing else under way", alone}, {"admission, at once after a settlement", behind},
	} {
		rounds := a.find(row.of)
		ratio := func(b, p Pace) float64 { return p.P50 / b.P50 }
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\n", row.name,
			against(rounds, rounds, func(_, p Pace) float64 { return p.P50 / 1e3 }).text(2),
			against(rounds, rounds, func(_, p Pace) float64 { return p.P99 / 1e3 }).text(2),
			against(a.find(trip), rounds, ratio).text(1), against(a.find(update), rounds, ratio).text(1))
	}
	_ = table.Flush() // likewise
}
