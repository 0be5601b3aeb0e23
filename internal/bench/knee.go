package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
)

// kneeSides are the sides that paced streams are measured through as the machine fills. A
// queue is left out: it takes part in the start of a stream alone.
var kneeSides = []struct {
	name   string
	target func(*stack) target
	of     func(*PacedRound) *Gap
}{
	{"direct", func(s *stack) target { return s.direct }, func(r *PacedRound) *Gap { return &r.Direct }},
	{"bare proxy", func(s *stack) target { return s.bare }, func(r *PacedRound) *Gap { return &r.Proxy }},
	{"NATS", func(s *stack) target { return s.minimal[0].target }, func(r *PacedRound) *Gap { return &r.Core }},
	{"+ Postgres", func(s *stack) target { return s.minimal[2].target }, func(r *PacedRound) *Gap { return &r.Postgres }},
	{"broker", func(s *stack) target { return s.through }, func(r *PacedRound) *Gap { return &r.Broker }},
}

// measureKnee measures paced streams, few and then more, on a stack of its own.
func measureKnee(ctx context.Context, c config, dir string, stderr io.Writer) ([]Paced, error) {
	s, err := startStreams(ctx, c, dir, slices.Max(c.size.knee), stderr)
	if err != nil {
		return nil, err
	}
	defer s.close()
	for _, side := range kneeSides {
		if _, err := s.load(ctx, side.target(s), workload{true, 32, 32}, warmUp); err != nil {
			return nil, err
		}
	}
	list := make([]Paced, len(c.size.knee))
	for round := range c.rounds {
		for i, n := range c.size.knee {
			var r PacedRound
			for _, side := range kneeSides {
				if *side.of(&r), err = s.pace(ctx, side.target(s), n, c.size.pacedFor); err != nil {
					return nil, err
				}
			}
			list[i].Streams, list[i].TokensPerSecond = n, tokenRate
			list[i].Rounds = append(list[i].Rounds, r)
			fmt.Fprintf(stderr, "knee: %d streams, round %d of %d\n", n, round+1, c.rounds)
		}
	}
	return list, nil
}

func writeKnee(out *bufio.Writer, list []Paced) {
	fmt.Fprintf(out, "\nThe knee: time between two tokens in ms, the more streams of %d tokens/s are open at once, in turns;\n"+
		"CPU is in µs for each token, of what stands between client and backend, Postgres too; rounds: %d\n\n", tokenRate, len(list[0].Rounds))
	table := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(table, "streams\t\tcores busy\tp50\tp99\tp99 beyond direct\tp50 to the first\tCPU")
	for i := range list {
		p := &list[i]
		for _, side := range kneeSides {
			fmt.Fprintf(table, "%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", p.Streams, side.name,
				p.over(func(r *PacedRound) float64 { return side.of(r).Cores }).text(2),
				p.over(func(r *PacedRound) float64 { return side.of(r).P50 }).text(2),
				p.over(func(r *PacedRound) float64 { return side.of(r).P99 }).text(2),
				p.over(func(r *PacedRound) float64 { return side.of(r).P99 - r.Direct.P99 }).text(2),
				p.over(func(r *PacedRound) float64 { return side.of(r).First }).text(2),
				p.over(func(r *PacedRound) float64 { return side.of(r).CPU }).text(1))
		}
	}
	_ = table.Flush() // writes to out, whose error counts
}
