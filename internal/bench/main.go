// Command bench measures what the broker costs. It sends the same requests to the demo
// backend directly, through a bare httputil.ReverseProxy and through `ownllm up`, in turns,
// and prints them side by side, and once more with minimal programs of the broker's shape
// among them; it does the same with thousands of streams at a reader's pace, and looks at the
// memory that open ones take; then with admissions and bare UPDATEs. Last it sees what a
// request costs among many tenants, keys and agents, and a durable one behind many that wait.
// How paced streams fare as the machine fills is measured only when it is asked for.
//
//	go run ./internal/bench                    five rounds of two seconds for each figure
//	go run ./internal/bench -quick             one short round, to see that it works
//	go run ./internal/bench -only admissions   one of the parts
//	go run ./internal/bench -only knee         the part that a whole run leaves out
//	go run ./internal/bench -profile DIR       CPU and allocation profiles of the broker too
//
// # Requests
//
// The backend is `ownllm demo`, a process of its own, and so is `ownllm up` with its
// NATS and Postgres. The proxy is this program, started again: it has no keys, no limits,
// no queue and no metrics, and keeps its connections to the backend. Client, broker and backend share the machine, as they did in every
// earlier measurement: so the ratio of broker to direct says how much of the machine
// goes to the broker, not how many requests a broker with a machine to itself can
// take. There are no thresholds.
//
// # The client
//
// The load comes from internal/load, as that of `ownllm bench`: closed loops, each with a
// connection of its own. It speaks HTTP/1.1 over a net.Conn by hand, because client and
// servers share the cores: for a reply that isn't streamed the client of net/http took about
// twice the CPU time (0.024 ms against 0.013). For streams the two were alike.
//
// Every reply is checked: status, the numbered tokens each once and in order,
// finish_reason, and [DONE] at the end of a stream. One that is wrong ends the benchmark.
//
// Every request is admitted and settled in full: the model has a price, the key a budget,
// and tenant and key have limits, all of them higher than anything that is measured.
//
// # The floor
//
// Package floor has minimal paths of the broker's shape, with nothing on: Fiber, core NATS, a
// worker and back; the same with a durable queue; and that with an UPDATE in Postgres. They
// are measured beside the rest, in turns, each a process of its own. The difference of two
// sides is what the part costs that one has and the other hasn't.
//
// # Streams
//
// Streams arrive evenly and last equally long, so that as many are open at any time, and
// their tokens fall evenly into time. An inter-token latency counts if its stream began in
// the window. What is spent counts while all are open, and not while the first come and the last end.
// Those that are held open bring a token a second; memory is looked at once the
// backend runs all of them and 5 s more have passed. `ownllm up` has the agent's slots and
// queue raised above their number. It takes two open files in one process for each of them.
// With -profile, the heap is saved while they are held, and what the broker does with the
// paced ones in a round of its own.
//
// # The knee
//
// Near a full machine the p99 between two tokens says more of how full it is than of what
// stands in the way. So `-only knee` measures 500, 1,000, 1,500 and 2,000 paced streams, in
// turns as ever, with the cores that they keep busy. A round takes 7 minutes: so there is
// one unless -rounds says otherwise, and none in a whole run that isn't a quick one.
//
// # Scale
//
// Each estate has a stack of its own, so its rounds aren't in turns with those of others:
// compare CPU times rather than rates. Its agents are workers as they are, in one process
// apart, each with its connection, its heartbeats, its consumer and its pulls; all of
// them have the same model, on one backend. None is sent a large body, so none has its second
// connection open. With 10 tenants and 1,000 agents each tenant has
// 100; with 10,000 tenants the first 1,000 have one, and the keys.
//
// # Durable requests
//
// BenchmarkSubmission in broker/books submits, claims, admits, settles and ends one request
// after the other, behind a backlog of 1, 1,000 and 100,000 of up to 50 keys.
//
// # Admissions
//
// What PostgreSQL can take is measured without the rest: BenchmarkAdmission in
// broker/books admits and settles through broker/quota, as the edge does, from 1, 32 and
// 256 goroutines, for one key and for 1,000. An admission counts with its settlement.
//
// The bare loop is what a gateway would do that counts in the database without more ado:
// one UPDATE for each request, half of what admission and settlement come to. On one row
// it depends much on how many sessions fight for the row, so it is tried with one
// connection for each waiter and with fewer.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// config is what the flags say.
type config struct {
	rounds   int
	duration time.Duration // of one measurement
	only     string        // one of parts or, for all, ""
	size     size
	proxy    string // where to, if this is to be a proxy and nothing else
	fleet    bool   // this is to be a fleet of agents and nothing else
	minimal  bool   // this is to be a minimal path and nothing else
	quick    bool
	binary   string
	profile  string
	json     bool
}

// size is how much of everything there is.
type size struct {
	open     int           // streams that are held open
	paced    int           // streams at a reader's pace
	pacedFor time.Duration // how long each side has them
	knee     []int         // how many of these there are, as the machine fills
	waiting  string        // backlogs of durable requests, those of BenchmarkSubmission
	estates  []estate
	// rest is how long what is open, or new, or idle, is left alone: until memory is looked
	// at, say, so that there was time for a collection of garbage.
	rest time.Duration
}

var (
	full = size{
		open: 5_000, paced: 2_000, pacedFor: 10 * time.Second, waiting: "1|1000|100000", rest: 5 * time.Second,
		knee:    []int{500, 1_000, 1_500, 2_000},
		estates: []estate{{10, 10, 10}, {10, 10, 1_000}, {10_000, 10_000, 10}, {10_000, 10_000, 1_000}},
	}
	small = size{
		open: 100, paced: 100, pacedFor: 1500 * time.Millisecond, waiting: "1|1000", rest: 500 * time.Millisecond,
		knee:    []int{10, 40},
		estates: []estate{{2, 2, 2}, {20, 20, 10}},
	}
)

// parts are what can be measured alone.
var parts = []string{"requests", "floor", "streams", knee, "scale", "admissions", "submissions"}

// knee is the part that a whole run leaves out, for the time it takes.
const knee = "knee"

// wants tells whether a part is to be measured.
func (c *config) wants(part string) bool {
	if c.only != "" {
		return part == c.only
	}
	return part != knee || c.quick
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// shared is a writer for several: the processes that are measured, and us.
type shared struct {
	mu sync.Mutex
	w  io.Writer
}

// Write implements io.Writer.
func (s *shared) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.w.Write(b)
}

// run is the whole program; it returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	var c config
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.IntVar(&c.rounds, "rounds", 5, "how often each figure is measured; without it the "+knee+" is measured once")
	flags.DurationVar(&c.duration, "duration", 2*time.Second, "how long one measurement takes")
	flags.BoolVar(&c.quick, "quick", false, "one round of 300 ms, to see that it works")
	flags.StringVar(&c.only, "only", "", "measure `part` alone: "+strings.Join(parts, ", ")+"; a whole run leaves the "+knee+" out, but for a quick one")
	flags.StringVar(&c.proxy, "proxy", "", "measure nothing: be the bare proxy in front of this `URL`")
	flags.BoolVar(&c.fleet, "fleet", false, "measure nothing: be the agents that standard input describes")
	flags.BoolVar(&c.minimal, "minimal", false, "measure nothing: be the minimal path that standard input describes")
	flags.StringVar(&c.binary, "binary", "", "the ownllm that takes the requests; without it, it is built; admissions are always of this checkout")
	flags.StringVar(&c.profile, "profile", "", "folder for CPU and allocation profiles of the broker process")
	flags.BoolVar(&c.json, "json", false, "print JSON, for programs")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	c.size = full
	if c.only == knee && !isSet(flags, "rounds") {
		c.rounds = 1
	}
	if c.quick {
		c.rounds, c.duration, c.size = 1, 300*time.Millisecond, small
	}
	if c.only != "" && !slices.Contains(parts, c.only) {
		fmt.Fprintln(stderr, "bench: -only takes one of", strings.Join(parts, ", "))
		return 2
	}
	if c.rounds < 1 || c.duration < 100*time.Millisecond || flags.NArg() > 0 {
		fmt.Fprintln(stderr, "bench: it takes at least 1 round, of at least 100ms, and no arguments")
		return 2
	}
	if c.proxy != "" {
		if err := serveProxy(ctx, c.proxy, stdout); err != nil {
			fmt.Fprintf(stderr, "bench: %v\n", err)
			return 1
		}
		return 0
	}
	if c.fleet {
		if err := serveFleet(ctx, os.Stdin, stderr); err != nil {
			fmt.Fprintf(stderr, "bench: %v\n", err)
			return 1
		}
		return 0
	}
	if c.minimal {
		if err := serveMinimal(ctx, os.Stdin, stdout); err != nil {
			fmt.Fprintf(stderr, "bench: %v\n", err)
			return 1
		}
		return 0
	}
	report, err := measure(ctx, c, &shared{w: stderr})
	if err == nil {
		if c.json {
			err = report.writeJSON(stdout)
		} else {
			err = report.writeText(stdout)
		}
	}
	if err != nil {
		fmt.Fprintf(stderr, "bench: %v\n", err)
		return 1
	}
	return 0
}

// isSet tells whether a flag was given.
func isSet(flags *flag.FlagSet, name string) (given bool) {
	flags.Visit(func(f *flag.Flag) { given = given || f.Name == name })
	return given
}
