package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"text/tabwriter"

	"github.com/ownllm/ownllm/internal/bench/floor"
)

// minimal is a minimal path, a process of its own. See package floor.
type minimal struct {
	*process
	target
	database bool
}

// FloorRound is one round of one workload: the backend itself, a bare proxy, the minimal
// paths, each with all that the one before has, and the broker.
type FloorRound struct {
	Direct   Figure `json:"direct"`
	Proxy    Figure `json:"proxy"`
	Core     Figure `json:"core"`     // HTTP to NATS to a worker
	Queue    Figure `json:"queue"`    // with a durable queue
	Postgres Figure `json:"postgres"` // with a round trip to Postgres
	Broker   Figure `json:"broker"`
}

// Floored is a workload and all its rounds.
type Floored struct {
	workload
	Rounds []FloorRound `json:"rounds"`
}

// floorWork is what the aims for requests speak of.
var floorWork = []workload{{true, 1, 32}, {true, 32, 32}, {true, 32, 256}, {false, 32, 32}}

// measureFloor measures the minimal paths beside everything else, in turns.
func measureFloor(ctx context.Context, c config, dir string, stderr io.Writer) ([]Floored, error) {
	dir = filepath.Join(dir, "floor")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	s, err := startStack(ctx, c.binary, dir, stderr)
	if err != nil {
		return nil, err
	}
	defer s.close()
	if err := s.startFloor(ctx, dir, stderr); err != nil {
		return nil, err
	}
	list := make([]Floored, len(floorWork))
	for round := range c.rounds {
		for i, w := range floorWork {
			list[i].workload = w
			var r FloorRound
			for _, side := range []struct {
				of target
				to *Figure
			}{
				{s.direct, &r.Direct}, {s.bare, &r.Proxy}, {s.minimal[0].target, &r.Core},
				{s.minimal[1].target, &r.Queue}, {s.minimal[2].target, &r.Postgres}, {s.through, &r.Broker},
			} {
				if round == 0 {
					if _, err := s.load(ctx, side.of, w, warmUp); err != nil {
						return nil, err
					}
				}
				if *side.to, err = s.load(ctx, side.of, w, c.duration); err != nil {
					return nil, err
				}
			}
			list[i].Rounds = append(list[i].Rounds, r)
		}
		fmt.Fprintf(stderr, "floor: round %d of %d\n", round+1, c.rounds)
	}
	return list, nil
}

// startFloor starts the minimal paths, each with all that the one before has, in folders of dir.
func (s *stack) startFloor(ctx context.Context, dir string, stderr io.Writer) error {
	for _, cfg := range []floor.Config{{}, {Queue: true}, {Queue: true, DatabaseURL: s.ready.DatabaseURL}} {
		cfg.Backend, cfg.Dir = "http://"+s.direct.addr, filepath.Join(dir, fmt.Sprint("path", len(s.minimal)))
		if err := s.startMinimal(ctx, cfg, stderr); err != nil {
			return err
		}
	}
	return nil
}

// startMinimal starts this program another time, as a minimal path.
func (s *stack) startMinimal(ctx context.Context, cfg floor.Config, stderr io.Writer) error {
	input, err := json.Marshal(cfg)
	if err != nil {
		return err
	}
	p, addr, err := startListening(ctx, bytes.NewReader(input), stderr, s.self, "-minimal")
	if p != nil {
		s.minimal = append(s.minimal, minimal{p, target{addr: addr}, cfg.DatabaseURL != ""})
	}
	return err
}

// serveMinimal is the minimal path that stdin describes until ctx ends.
func serveMinimal(ctx context.Context, stdin io.Reader, stdout io.Writer) error {
	var cfg floor.Config
	if err := json.NewDecoder(stdin).Decode(&cfg); err != nil {
		return fmt.Errorf("read the path: %w", err)
	}
	return floor.Serve(ctx, cfg, stdout)
}

// floorSides are the sides in their order.
var floorSides = []struct {
	name string
	of   func(FloorRound) Figure
}{
	{"direct", func(r FloorRound) Figure { return r.Direct }},
	{"bare proxy", func(r FloorRound) Figure { return r.Proxy }},
	{"NATS", func(r FloorRound) Figure { return r.Core }},
	{"+ queue", func(r FloorRound) Figure { return r.Queue }},
	{"+ Postgres", func(r FloorRound) Figure { return r.Postgres }},
	{"broker", func(r FloorRound) Figure { return r.Broker }},
}

func (m *Floored) over(value func(FloorRound) float64) spread {
	values := make([]float64, len(m.Rounds))
	for i, r := range m.Rounds {
		values[i] = value(r)
	}
	return spreadOf(values)
}

func writeFloor(out *bufio.Writer, c string, list []Floored) {
	fmt.Fprintf(out, "\nThe floor: the least that a path of this shape costs, with nothing on. NATS is Fiber, core NATS, a worker\n"+
		"and back in one process; the next has a durable queue, and the one after it an UPDATE in Postgres for each\n"+
		"request; %d rounds of %s, in turns; ratios are taken in each round\n", len(list[0].Rounds), c)
	for _, kind := range []struct {
		title  string
		digits int
		of     func(r FloorRound, side func(FloorRound) Figure) float64
	}{
		{"Requests per second", 0, func(r FloorRound, side func(FloorRound) Figure) float64 { return side(r).PerSecond }},
		{"Requests per second, of direct", 2, func(r FloorRound, side func(FloorRound) Figure) float64 {
			return side(r).PerSecond / r.Direct.PerSecond
		}},
		{"Requests per second of the broker, of each", 2, func(r FloorRound, side func(FloorRound) Figure) float64 {
			return r.Broker.PerSecond / side(r).PerSecond
		}},
		{"CPU time in ms for each request of what stands between client and backend, Postgres too", 3,
			func(r FloorRound, side func(FloorRound) Figure) float64 {
				return (side(r).CPUBroker + side(r).CPUPostgres) / 1e3
			}},
		{"Time to the first token in ms, p50; of a whole reply, to its end", 2,
			func(r FloorRound, side func(FloorRound) Figure) float64 { return side(r).FirstP50 / 1e3 }},
	} {
		fmt.Fprintf(out, "\n%s\n\n", kind.title)
		table := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
		for _, side := range floorSides {
			fmt.Fprintf(table, "\t%s", side.name)
		}
		fmt.Fprintln(table)
		for i := range list {
			m := &list[i]
			fmt.Fprint(table, m)
			for _, side := range floorSides {
				fmt.Fprintf(table, "\t%s", m.over(func(r FloorRound) float64 { return kind.of(r, side.of) }).text(kind.digits))
			}
			fmt.Fprintln(table)
		}
		_ = table.Flush() // writes to out, whose error counts
	}
}
