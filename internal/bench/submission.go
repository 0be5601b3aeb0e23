package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"
	"text/tabwriter"
)

// Submissions is what a durable request costs while so many others wait. See
// BenchmarkSubmission in broker/books, which does the work.
type Submissions struct {
	Backlogs []Backlog `json:"backlogs"` // the shortest first
}

// Backlog is a number of waiting requests, and what one more cost in each round.
type Backlog struct {
	Waiting int    `json:"waiting"`
	Rounds  []Cost `json:"rounds"`
}

// Cost is how long one request took, one after the other, in microseconds: all of it, and of
// that to take it in, to pick it, and to record its end. The rest is its admission and
// settlement.
type Cost struct {
	Whole  float64 `json:"whole_us"`
	Submit float64 `json:"submit_us"`
	Claim  float64 `json:"claim_us"`
	End    float64 `json:"end_us"`
}

// measureSubmissions has the benchmark of the books run once for each round, each time on
// fresh databases in dir.
func measureSubmissions(ctx context.Context, c config, dir string, stderr io.Writer) (*Submissions, error) {
	binary, err := buildBooks(ctx, dir)
	if err != nil {
		return nil, err
	}
	report := &Submissions{}
	pattern := "^BenchmarkSubmission$/^waiting=(" + c.size.waiting + ")$"
	for round := range c.rounds {
		out, err := runBenchmark(ctx, binary, dir, pattern, c.duration/2, stderr)
		if err != nil {
			return nil, err
		}
		if err := report.add(round, out); err != nil {
			return nil, fmt.Errorf("benchmark of the books: %w\n%s", err, out)
		}
		fmt.Fprintf(stderr, "submissions: round %d of %d\n", round+1, c.rounds)
	}
	return report, nil
}

var backlogName = regexp.MustCompile(`^BenchmarkSubmission/waiting=(\d+)(?:-\d+)?$`)

// add adds a round: what the benchmark has printed.
func (s *Submissions) add(round int, printed []byte) error {
	n := 0
	for line := range bytes.Lines(printed) {
		fields := strings.Fields(string(line))
		if len(fields) == 0 || !strings.HasPrefix(fields[0], "Benchmark") {
			continue
		}
		name := backlogName.FindStringSubmatch(fields[0])
		if name == nil {
			return fmt.Errorf("not a result: %q", line)
		}
		waiting, _ := strconv.Atoi(name[1]) // all of them are digits
		cost, err := parseCost(fields[min(len(fields), 2):])
		if err != nil {
			return err
		}
		if round == 0 {
			s.Backlogs = append(s.Backlogs, Backlog{Waiting: waiting})
		}
		if n >= len(s.Backlogs) || s.Backlogs[n].Waiting != waiting {
			return fmt.Errorf("round %d has a backlog of %d, which the first one hasn't at that place", round+1, waiting)
		}
		s.Backlogs[n].Rounds = append(s.Backlogs[n].Rounds, cost)
		n++
	}
	if n < 2 || n < len(s.Backlogs) {
		return fmt.Errorf("round %d has only %d results", round+1, n)
	}
	return nil
}

// parseCost reads values, each with its unit.
func parseCost(fields []string) (c Cost, err error) {
	for i := 0; i+1 < len(fields); i += 2 {
		v, err := strconv.ParseFloat(fields[i], 64)
		if err != nil {
			return c, fmt.Errorf("not a number: %q", fields[i])
		}
		switch fields[i+1] {
		case "ns/op":
			c.Whole = v / 1e3
		case "submit-us/op":
			c.Submit = v
		case "claim-us/op":
			c.Claim = v
		case "end-us/op":
			c.End = v
		}
	}
	if c.Whole <= 0 || c.Submit <= 0 || c.Claim <= 0 || c.End <= 0 {
		return c, fmt.Errorf("a value is missing: %q", fields)
	}
	return c, nil
}

func (s *Submissions) writeText(out *bufio.Writer) {
	first := &s.Backlogs[0]
	fmt.Fprintf(out, "\nTime in ms for each durable request, one after the other, while so many others wait; every commit\n"+
		"is flushed to disk; the ratio to %d waiting is taken in each round\n\n", first.Waiting)
	table := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(table, "\tsubmit\tclaim\tend\tin all, with admission\tratio")
	for i := range s.Backlogs {
		b := &s.Backlogs[i]
		row := func(value func(c, first Cost) float64) spread {
			values := make([]float64, len(b.Rounds))
			for r := range values {
				values[r] = value(b.Rounds[r], first.Rounds[r])
			}
			return spreadOf(values)
		}
		fmt.Fprintf(table, "%d waiting\t%s\t%s\t%s\t%s\t%s\n", b.Waiting,
			row(func(c, _ Cost) float64 { return c.Submit / 1e3 }).text(2),
			row(func(c, _ Cost) float64 { return c.Claim / 1e3 }).text(2),
			row(func(c, _ Cost) float64 { return c.End / 1e3 }).text(2),
			row(func(c, _ Cost) float64 { return c.Whole / 1e3 }).text(2),
			row(func(c, first Cost) float64 { return c.Whole / first.Whole }).text(2))
	}
	_ = table.Flush() // writes to out, whose error counts
}
