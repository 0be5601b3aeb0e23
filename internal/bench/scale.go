package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"text/tabwriter"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/credential"
	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/internal/secret"
	"github.com/ownllm/ownllm/schemas"
)

// estate is how many tenants, keys and agents there are. The agents are spread evenly over
// the tenants, or the first of them, and the keys over the tenants that have agents. All
// agents have the same model.
type estate struct {
	Tenants int `json:"tenants"`
	Keys    int `json:"keys"`
	Agents  int `json:"agents"`
}

func (e estate) String() string {
	return fmt.Sprintf("%d tenants, %d keys, %d agents", e.Tenants, e.Keys, e.Agents)
}

// Scaled is what a request costs in an estate, the workload being scaleWork with keys drawn
// by chance.
type Scaled struct {
	estate
	Rounds []Figure `json:"rounds"`
	// Idle is how many cores `ownllm up` and Postgres keep busy in each round while nobody
	// asks for anything: mostly by heartbeats and pings.
	Idle []float64 `json:"cores_idle"`
}

// scaleWork is the load on every estate.
var scaleWork = workload{true, 32, 32}

const (
	// founders is how many rows are made at once.
	founders = 16
	// gatherWait bounds the time until all agents are there.
	gatherWait = 3 * time.Minute
	gatherLook = 300 * time.Millisecond
)

// settled is an estate with a stack of its own.
type settled struct {
	*stack
	through target // with the keys of the estate
	agents  []Enlisted
	result  *Scaled
}

// measureScale measures the estates in turns, each on a stack of its own. Agents are there only while
// theirs is measured, so that they cost the others nothing.
func measureScale(ctx context.Context, c config, dir string, stderr io.Writer) ([]Scaled, error) {
	list := make([]Scaled, len(c.size.estates))
	var all []settled
	for i, e := range c.size.estates {
		s, err := startStack(ctx, c.binary, filepath.Join(dir, fmt.Sprint("estate", i)), stderr)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", e, err)
		}
		defer s.close()
		list[i].estate = e
		x := settled{stack: s, through: target{addr: s.through.addr}, result: &list[i]}
		if x.through.keys, x.agents, err = s.found(ctx, e); err != nil {
			return nil, fmt.Errorf("%s: %w", e, err)
		}
		all = append(all, x)
	}
	for round := range c.rounds {
		for i := range all {
			if round%2 == 1 {
				i = len(all) - 1 - i
			}
			if err := all[i].measure(ctx, c, stderr); err != nil {
				return nil, fmt.Errorf("%s: %w", all[i].result.estate, err)
			}
		}
		fmt.Fprintf(stderr, "scale: round %d of %d\n", round+1, c.rounds)
	}
	return list, nil
}

// measure takes a round.
func (x *settled) measure(ctx context.Context, c config, stderr io.Writer) error {
	fleet, err := x.enlist(ctx, x.agents, stderr)
	if err != nil {
		return err
	}
	defer fleet.close()
	if err := x.gather(ctx, fleet, len(x.agents)); err != nil {
		return err
	}
	if err := pause(ctx, c.size.rest); err != nil {
		return err
	}
	if _, err := x.load(ctx, x.through, scaleWork, warmUp+c.duration/2); err != nil {
		return err
	}
	idle, err := x.idle(ctx, x.through, c.size.rest)
	if err != nil {
		return err
	}
	f, err := x.load(ctx, x.through, scaleWork, c.duration)
	if err != nil {
		return err
	}
	x.result.Idle, x.result.Rounds = append(x.result.Idle, idle), append(x.result.Rounds, f)
	return nil
}

// found makes the rows of an estate, and returns its keys and agents.
func (s *stack) found(ctx context.Context, e estate) (keys []secret.String, agents []Enlisted, err error) {
	store, err := books.Open(ctx, books.Config{URL: s.ready.DatabaseURL, MaxConns: founders, Timeout: time.Minute})
	if err != nil {
		return nil, nil, err
	}
	defer store.Close()
	peopled := min(e.Tenants, e.Agents) // tenants that have agents
	tenants, users := make([]schemas.TenantID, e.Tenants), make([]string, peopled)
	err = each(ctx, e.Tenants, func(ctx context.Context, i int) error {
		t, err := store.CreateTenant(ctx, books.NewTenant{Slug: fmt.Sprintf("scale-%d", i), QPS: new(plenty)})
		tenants[i] = t.ID
		if err != nil || i >= peopled {
			return err
		}
		u, err := store.CreateUser(ctx, books.NewUser{Tenant: string(t.ID), Email: fmt.Sprintf("u%d@example.com", i)})
		users[i] = u.Email
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	keys = make([]secret.String, e.Keys)
	err = each(ctx, e.Keys, func(ctx context.Context, i int) error {
		_, key, err := store.CreateKey(ctx, books.NewKey{
			Tenant: string(tenants[i%peopled]), User: users[i%peopled], BudgetCents: new(int64(plenty)), Concurrency: new(plenty),
		})
		keys[i] = secret.String(key.Reveal())
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	agents = make([]Enlisted, e.Agents)
	err = each(ctx, e.Agents, func(ctx context.Context, i int) error {
		own := credential.NewAgent()
		a, err := store.AddAgent(ctx, string(tenants[i%peopled]), schemas.NewAgentID(), fmt.Sprintf("gpu-%d", i), own)
		agents[i] = Enlisted{Tenant: a.Tenant, Agent: a.ID, Credential: own.Reveal()}
		return err
	})
	return keys, agents, err
}

// each calls f with 0 to n-1, a few at a time.
func each(ctx context.Context, n int, f func(context.Context, int) error) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(founders)
	for i := range n {
		group.Go(func() error { return f(ctx, i) })
	}
	return group.Wait()
}

// enlist starts this program another time, as the workers of all agents.
func (s *stack) enlist(ctx context.Context, agents []Enlisted, stderr io.Writer) (*process, error) {
	input, err := json.Marshal(Fleet{NATS: s.ready.NATSURL, Backend: "http://" + s.direct.addr, Agents: agents})
	if err != nil {
		return nil, err
	}
	return startWith(ctx, bytes.NewReader(input), nil, stderr, s.self, "-fleet")
}

// gather waits until so many agents more than that of `ownllm up` are there.
func (s *stack) gather(ctx context.Context, fleet *process, agents int) error {
	client, err := adminapi.NewClient(s.ready.AdminURL, secret.String(s.ready.AdminToken))
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, gatherWait)
	defer cancel()
	look := time.NewTicker(gatherLook)
	defer look.Stop()
	for here := 0; ; here = 0 {
		list, err := client.Agents(ctx, "")
		if err != nil {
			return fmt.Errorf("%d agents didn't come: %w", agents, err)
		}
		for _, a := range list {
			if a.State != adminapi.AgentOffline && len(a.Models) > 0 {
				here++
			}
		}
		if here > agents {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("of %d agents only %d came", agents, here-1)
		case <-fleet.done:
			return errors.New("the fleet has ended")
		case <-look.C:
		}
	}
}

// idle is how many cores the broker and Postgres keep busy for nothing, seen for so long.
func (s *stack) idle(ctx context.Context, t target, d time.Duration) (float64, error) {
	before, start := s.spent(t), time.Now()
	if err := pause(ctx, d); err != nil {
		return 0, err
	}
	used := s.spent(t).minus(before)
	return (used.broker + used.postgres).Seconds() / time.Since(start).Seconds(), nil
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}

// writeScale shows what each estate costs, the first one being what the ratio is of.
func writeScale(out *bufio.Writer, list []Scaled) {
	fmt.Fprintf(out, "\nWhat a request costs among few and among many, %s with keys by chance; CPU is that of\n"+
		"ownllm up and Postgres together for each request in ms; beyond idle is what is left of it without the heartbeats\n"+
		"and pings of the same time, which cost the same however many requests there are; ratios are taken in each round\n\n", scaleWork)
	table := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(table, "tenants\tkeys\tagents\trequests/s\tfirst token p50, ms\tCPU\tratio\tbeyond idle\tratio\tcores busy when idle")
	over := func(s *Scaled, value func(s *Scaled, round int) float64) spread {
		values := make([]float64, len(s.Rounds))
		for round := range values {
			values[round] = value(s, round)
		}
		return spreadOf(values)
	}
	cost := func(s *Scaled, round int) float64 {
		return (s.Rounds[round].CPUBroker + s.Rounds[round].CPUPostgres) / 1e3
	}
	beyond := func(s *Scaled, round int) float64 {
		return cost(s, round) - s.Idle[round]*1e3/s.Rounds[round].PerSecond
	}
	ofFirst := func(value func(*Scaled, int) float64) func(*Scaled, int) float64 {
		return func(s *Scaled, round int) float64 { return value(s, round) / value(&list[0], round) }
	}
	for i := range list {
		s := &list[i]
		fmt.Fprintf(table, "%d\t%d\t%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", s.Tenants, s.Keys, s.Agents,
			over(s, func(s *Scaled, round int) float64 { return s.Rounds[round].PerSecond }).text(0),
			over(s, func(s *Scaled, round int) float64 { return s.Rounds[round].FirstP50 / 1e3 }).text(2),
			over(s, cost).text(3), over(s, ofFirst(cost)).text(2), over(s, beyond).text(3), over(s, ofFirst(beyond)).text(2),
			over(s, func(s *Scaled, round int) float64 { return s.Idle[round] }).text(3))
	}
	_ = table.Flush() // writes to out, whose error counts
}
