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
var kneeSides = slices.DeleteFunc(slices.Clone(streamSides), func(s streamSide) bool { return s.name == queueSide })

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
			r, err := s.paceAll(ctx, kneeSides, n, c.size.pacedFor)
			if err != nil {
				return nil, err
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
		"the CPU is of what stands between client and backend, Postgres too; rounds: %d\n\n", tokenRate, len(list[0].Rounds))
	table := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(table, "streams\t\t"+pacedColumns)
	for i := range list {
		for _, side := range kneeSides {
			fmt.Fprintf(table, "%d\t%s\t%s\n", list[i].Streams, side.name, list[i].columns(side.gap))
		}
	}
	_ = table.Flush() // writes to out, whose error counts
}
