package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/ownllm/ownllm/internal/load"
	"github.com/ownllm/ownllm/worker/demo"
)

// Streams is what was measured of many streams at once.
type Streams struct {
	Open  Open  `json:"open"`
	Paced Paced `json:"paced"`
}

// Paced is what many streams at a reader's pace came to, side by side.
type Paced struct {
	Streams         int          `json:"streams"` // open at once
	TokensPerSecond float64      `json:"tokens_per_second"`
	Rounds          []PacedRound `json:"rounds"`
}

// PacedRound is one round of paced streams. The sides are those of a FloorRound.
type PacedRound struct {
	Direct   Gap `json:"direct"`
	Proxy    Gap `json:"proxy"`
	Core     Gap `json:"core"`
	Queue    Gap `json:"queue,omitzero"` // of the knee, nothing
	Postgres Gap `json:"postgres"`
	Broker   Gap `json:"broker"`
}

// Gap is the time between two tokens of a stream, in milliseconds, and what the round cost
// while all streams were open.
type Gap struct {
	P50 float64 `json:"p50_ms"`
	P99 float64 `json:"p99_ms"`
	// First is the p50 of the time to the first token, in milliseconds.
	First float64 `json:"first_token_p50_ms"`
	// Cores is how many cores all processes together kept busy.
	Cores float64 `json:"cores_busy"`
	// CPU is what a token costs between client and backend, in microseconds, Postgres included.
	CPU  float64 `json:"cpu_us_per_token"`
	Torn int64   `json:"torn,omitempty"` // see Figure
}

// Open is what open streams take of memory, in bytes that are resident for each: in
// `ownllm up`, which is edge, broker, NATS and worker, in the bare proxy, and in the minimal
// paths.
type Open struct {
	Streams  int   `json:"streams"`
	Broker   int64 `json:"broker_bytes_per_stream"`
	Proxy    int64 `json:"proxy_bytes_per_stream"`
	Core     int64 `json:"core_bytes_per_stream"`
	Queue    int64 `json:"queue_bytes_per_stream"`
	Postgres int64 `json:"postgres_bytes_per_stream"`
	// Idle is how much the broker had resident before.
	Idle int64 `json:"broker_bytes_idle"`
}

// streamSide is a way from client to backend that streams take.
type streamSide struct {
	name   string
	target func(*stack) target
	gap    func(*PacedRound) *Gap
	open   func(*Open) *int64
}

// streamSides are all of them, the broker last.
var streamSides = []streamSide{
	{"direct", func(s *stack) target { return s.direct }, func(r *PacedRound) *Gap { return &r.Direct }, func(*Open) *int64 { return new(int64) }},
	{"bare proxy", func(s *stack) target { return s.bare }, func(r *PacedRound) *Gap { return &r.Proxy }, func(o *Open) *int64 { return &o.Proxy }},
	{"NATS", func(s *stack) target { return s.minimal[0].target }, func(r *PacedRound) *Gap { return &r.Core }, func(o *Open) *int64 { return &o.Core }},
	{queueSide, func(s *stack) target { return s.minimal[1].target }, func(r *PacedRound) *Gap { return &r.Queue }, func(o *Open) *int64 { return &o.Queue }},
	{"+ Postgres", func(s *stack) target { return s.minimal[2].target }, func(r *PacedRound) *Gap { return &r.Postgres }, func(o *Open) *int64 { return &o.Postgres }},
	{"broker", func(s *stack) target { return s.through }, func(r *PacedRound) *Gap { return &r.Broker }, func(o *Open) *int64 { return &o.Broker }},
}

const queueSide = "+ queue"

const (
	// tokenRate is the pace of paced streams, in tokens a second.
	tokenRate = 20
	// openPerSecond is how many streams are opened each second until all are, and openRate
	// their pace: they are open, and little else.
	openPerSecond = 500
	openRate      = 1
	// filesPerStream is how many open files the process with the most of them has for each
	// stream: `ownllm up` and the proxy have the connections to client and backend.
	filesPerStream, filesElse = 2, 500
)

// checkFiles makes sure that so many streams can be open. Go programs raise their own limit
// to the hard one, and what they start inherits that.
func checkFiles(streams int) error {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("read the limit on open files: %w", err)
	}
	need := uint64(streams*filesPerStream + filesElse)
	if limit.Max < need {
		return fmt.Errorf("%d streams need %d open files in one process, and the hard limit is %d: raise it (ulimit -Hn), or leave this part out by -only", streams, need, limit.Max)
	}
	return nil
}

// startStreams starts a stack that takes so many streams at once, minimal paths and all, in a
// folder of dir.
func startStreams(ctx context.Context, c config, dir string, streams int, stderr io.Writer) (*stack, error) {
	if err := checkFiles(streams); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(dir, "streams-")
	if err != nil {
		return nil, err
	}
	// More slots than streams, so that none of them waits for another one's end.
	room := strconv.Itoa(2 * streams)
	s, err := startStack(ctx, c.binary, dir, stderr, "--slots", room, "--queue-bound", room)
	if err != nil {
		return nil, err
	}
	if err := s.startFloor(ctx, dir, stderr); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// measureStreams measures on a stack of its own, since a process that once held many
// streams keeps some of their memory.
func measureStreams(ctx context.Context, c config, dir string, stderr io.Writer) (*Streams, error) {
	s, err := startStreams(ctx, c, dir, max(c.size.open, c.size.paced), stderr)
	if err != nil {
		return nil, err
	}
	defer s.close()
	result := &Streams{Open: Open{Streams: c.size.open}, Paced: Paced{Streams: c.size.paced, TokensPerSecond: tokenRate}}
	open := &result.Open
	for _, side := range streamSides {
		t := side.target(s)
		if t.addr == s.direct.addr {
			continue // nothing stands in between
		}
		if _, err := s.load(ctx, t, workload{true, 32, 32}, warmUp); err != nil {
			return nil, err
		}
		profile := ""
		if t.addr == s.through.addr {
			profile = c.profile
		}
		if *side.open(open), open.Idle, err = s.hold(ctx, t, c.size, profile); err != nil { // the broker is the last
			return nil, err
		}
	}
	fmt.Fprintln(stderr, "streams: opened and held")
	for round := range c.rounds {
		r, err := s.paceAll(ctx, streamSides, c.size.paced, c.size.pacedFor)
		if err != nil {
			return nil, err
		}
		result.Paced.Rounds = append(result.Paced.Rounds, r)
		fmt.Fprintf(stderr, "streams: round %d of %d\n", round+1, c.rounds)
	}
	if c.profile != "" {
		if err := s.profilePaced(ctx, c.profile, c.size.paced); err != nil {
			return nil, err
		}
	}
	return result, nil
}

// profilePaced saves profiles of the broker with n paced streams, once all of them are open.
func (s *stack) profilePaced(ctx context.Context, dir string, n int) error {
	err := s.profileWhile(ctx, dir, "paced", profileTime/2, func(ctx context.Context) error {
		_, err := s.pace(ctx, s.through, n, profileTime)
		return err
	})
	if err != nil {
		return fmt.Errorf("profile %d paced streams: %w", n, err)
	}
	return nil
}

// paceAll paces n streams through each of the sides.
func (s *stack) paceAll(ctx context.Context, sides []streamSide, n int, d time.Duration) (r PacedRound, err error) {
	for _, side := range sides {
		if *side.gap(&r), err = s.pace(ctx, side.target(s), n, d); err != nil {
			return r, err
		}
	}
	return r, nil
}

// pace keeps n streams open that bring tokenRate tokens a second each, for d and more. They
// arrive evenly, and each lasts for half of d, so that their tokens fall evenly into time.
func (s *stack) pace(ctx context.Context, t target, n int, d time.Duration) (Gap, error) {
	each := d / 2
	rate := float64(n) / each.Seconds()
	config := streamConfig(t, tokenRate, int(tokenRate*each.Seconds()))
	config.Levels, config.Open, config.Even = []load.Level{{From: rate, To: rate}}, true, true
	config.WarmUp, config.Duration = each, d
	// What is spent counts while all are open.
	var after spent
	var full bool
	var ended time.Time
	begun, before := time.Now(), s.spent(t)
	report, err := load.Run(ctx, config, func(p load.Progress) {
		switch {
		case p.WarmUp || p.Elapsed > p.Whole:
		case !full:
			full, begun, before = true, time.Now(), s.spent(t)
		case p.Elapsed > p.Whole*4/5:
			ended, after = time.Now(), s.spent(t)
		}
	})
	if err == nil && report.Interrupted {
		err = context.Cause(ctx)
	}
	if err != nil {
		return Gap{}, err
	}
	stage := report.Stages[0]
	sent := stage.Requests
	if stage.InterToken == nil || stage.FirstToken == nil || sent.OK != sent.Sent && t.addr != s.bare.addr {
		return Gap{}, fmt.Errorf("%d streams at %s: %+v, failures %+v, not whole %v", n, t.addr, sent, stage.Failures, stage.Breaches)
	}
	if ended.IsZero() { // nobody got to look in time
		ended, after = time.Now(), s.spent(t)
	}
	used, took := after.minus(before), ended.Sub(begun)
	return Gap{
		CPU: float64((used.broker + used.postgres).Microseconds()) / (float64(n) * tokenRate * took.Seconds()),
		P50: stage.InterToken.P50, P99: stage.InterToken.P99, First: stage.FirstToken.P50, Torn: sent.Sent - sent.OK,
		Cores: (used.backend + used.broker + used.postgres + used.client).Seconds() / took.Seconds(),
	}, nil
}

// Why streams that are held end.
var (
	errHeld = errors.New("held for long enough")
	errLost = errors.New("some have ended")
)

// hold opens slow streams, waits until the backend runs them all, and returns by how much what serves the target has grown for
// each, and what it had before. It ends them by leaving. With profile, a folder, what the
// broker's heap holds at that time is saved there.
func (s *stack) hold(ctx context.Context, t target, size size, profile string) (each, idle int64, err error) {
	n := size.open
	middle, _ := s.middle(t)
	pid := middle.pid()
	idle = resident(pid)
	holding, end := context.WithCancelCause(ctx)
	defer end(nil)
	var full time.Time // when all were open
	var held, grown int64
	config := streamConfig(t, openRate, 3600)
	config.Levels, config.Open, config.Even = []load.Level{{From: openPerSecond, To: openPerSecond}}, true, true
	config.Requests, config.MaxInFlight, config.Timeout = n, n, time.Hour
	report, err := load.Run(holding, config, func(p load.Progress) {
		switch {
		case p.Failed+p.Broken > 0 && t.addr != s.bare.addr:
			end(errLost)
		case p.Point.InFlight+p.Failed+p.Broken < int64(n):
		case full.IsZero():
			if active, err := s.active(ctx); err != nil {
				end(err)
			} else if active >= p.Point.InFlight {
				full = time.Now()
			}
		case held == 0 && time.Since(full) >= size.rest:
			held, grown = p.Point.InFlight, resident(pid)-idle
			if profile != "" {
				if err := s.saveHeap(ctx, profile); err != nil {
					end(err)
				}
			}
			end(errHeld)
		}
	})
	if err == nil {
		err = context.Cause(holding)
	}
	if errors.Is(err, errLost) && len(report.Stages) > 0 {
		err = fmt.Errorf("open %d streams at %s: %w: %v, not whole %v", n, t.addr, err, report.Stages[0].Failures, report.Stages[0].Breaches)
	}
	if !errors.Is(err, errHeld) {
		return 0, 0, err
	}
	return grown / max(held, 1), idle, s.settle(ctx)
}

// settle waits until the backend has ended what clients have left.
func (s *stack) settle(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startWait)
	defer cancel()
	for {
		left, err := s.active(ctx)
		if err != nil || left == 0 {
			return err
		}
		if err := pause(ctx, gatherLook); err != nil {
			return fmt.Errorf("the backend still has %d requests: %w", left, err)
		}
	}
}

// active is how many requests the backend runs.
func (s *stack) active(ctx context.Context) (int64, error) {
	b, err := get(ctx, "http://"+s.direct.addr+"/demo/stats")
	if err != nil {
		return 0, err
	}
	var stats demo.Stats
	if err := json.Unmarshal(b, &stats); err != nil {
		return 0, fmt.Errorf("stats of the backend: %w", err)
	}
	return stats.Active, nil
}

func (s *stack) saveHeap(ctx context.Context, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for name, of := range map[string]string{"open.heap": "heap", "open.goroutine": "goroutine", "open.memstats": "heap?debug=1"} {
		if err := save(ctx, s.ops+"/debug/pprof/"+of, filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return nil
}

// streamConfig asks for streams at a pace, whose tokens are checked.
func streamConfig(t target, perSecond float64, tokens int) load.Config {
	return load.Config{
		URL: &url.URL{Scheme: "http", Host: t.addr, Path: "/v1"}, Key: t.key, Model: "demo", Stream: true,
		Prompt: load.Fixed(2), Reply: load.Fixed(tokens), Verify: true, Timeout: 2 * replyWait,
		Extra: json.RawMessage(fmt.Sprintf(`{"demo":{"tokens_per_second":%g}}`, perSecond)),
	}
}

// resident is how much memory a process holds, in bytes; 0 on a system without /proc.
func resident(pid int) int64 {
	b, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	return parseResident(string(b))
}

func parseResident(status string) int64 {
	_, rest, _ := strings.Cut(status, "\nVmRSS:")
	rest, _, _ = strings.Cut(strings.TrimSpace(rest), " ")
	kb, _ := strconv.ParseInt(rest, 10, 64) // or nothing
	return kb << 10
}

// over takes one value of each round.
func (p *Paced) over(value func(*PacedRound) float64) spread {
	values := make([]float64, len(p.Rounds))
	for i := range p.Rounds {
		values[i] = value(&p.Rounds[i])
	}
	return spreadOf(values)
}

// columns are the cells of a side, as pacedColumns names them.
func (p *Paced) columns(gap func(*PacedRound) *Gap) string {
	cell := func(decimals int, value func(g, direct *Gap) float64) string {
		return p.over(func(r *PacedRound) float64 { return value(gap(r), &r.Direct) }).text(decimals)
	}
	return strings.Join([]string{
		cell(2, func(g, _ *Gap) float64 { return g.P50 }), cell(2, func(g, _ *Gap) float64 { return g.P99 }),
		cell(2, func(g, direct *Gap) float64 { return g.P99 - direct.P99 }), cell(2, func(g, _ *Gap) float64 { return g.First }),
		cell(1, func(g, _ *Gap) float64 { return g.CPU }), cell(2, func(g, _ *Gap) float64 { return g.Cores }),
	}, "\t")
}

const pacedColumns = "p50\tp99\tp99 beyond direct\tp50 to the first\tCPU in µs for each token\tcores busy"

func (s *Streams) writeText(out *bufio.Writer) {
	fmt.Fprintf(out, "\nTime between two tokens in ms, %d streams of %.0f tokens/s open at once\n\n", s.Paced.Streams, s.Paced.TokensPerSecond)
	table := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(table, "\t"+pacedColumns+"\tKB for each of the open ones")
	for _, side := range streamSides {
		fmt.Fprintf(table, "%s\t%s\t%.1f\n", side.name, s.Paced.columns(side.gap), float64(*side.open(&s.Open))/1024)
	}
	_ = table.Flush() // writes to out, whose error counts

	fmt.Fprintf(out, "\nThe CPU is of what stands between client and backend, Postgres too. The last column is resident memory for\n"+
		"each of %d open streams, of `ownllm up` that of edge, broker, NATS and worker, which had %.0f MB before; without Postgres\n",
		s.Open.Streams, float64(s.Open.Idle)/(1<<20))
}
