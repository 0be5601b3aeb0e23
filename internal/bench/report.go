package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
)

// Round is one round of one workload: the backend itself, behind a bare
// httputil.ReverseProxy, and behind the broker.
type Round struct {
	Direct Figure `json:"direct"`
	Proxy  Figure `json:"proxy"`
	Broker Figure `json:"broker"`
}

// Measured is a workload and all its rounds.
type Measured struct {
	workload
	Rounds []Round `json:"rounds"`
}

// Report is what was measured, and where.
type Report struct {
	Cores     int        `json:"cores"`
	CPU       string     `json:"cpu"`
	Platform  string     `json:"platform"`
	Go        string     `json:"go"`
	Commit    string     `json:"commit"`       // of the program that is measured
	Load      string     `json:"load_average"` // of the last minute, at the start
	Duration  string     `json:"duration"`
	Workloads []Measured `json:"workloads,omitempty"`
	// Floor is the least that a path of the broker's shape can cost.
	Floor []Floored `json:"floor,omitempty"`
	// Streams is what many streams at once come to.
	Streams *Streams `json:"streams,omitempty"`
	// Knee is what paced streams come to, the more of them there are.
	Knee []Paced `json:"knee,omitempty"`
	// Scale is what a request costs among few and among many.
	Scale []Scaled `json:"scale,omitempty"`
	// Admissions is what the books can take.
	Admissions *Admissions `json:"admissions,omitempty"`
	// Submissions is what durable requests cost while others wait.
	Submissions *Submissions `json:"submissions,omitempty"`
}

func newReport(c config) *Report {
	return &Report{
		Cores: runtime.NumCPU(), CPU: cpuModel(), Platform: runtime.GOOS + "/" + runtime.GOARCH, Go: runtime.Version(),
		Load: loadAverage(), Duration: c.duration.String(),
	}
}

func cpuModel() string {
	b, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(b)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return "unknown CPU"
}

func loadAverage() string {
	b, _ := os.ReadFile("/proc/loadavg")
	load, _, _ := strings.Cut(string(b), " ")
	return load
}

// commit is what the program that is measured was built from, which the checkout need
// not be.
func commit(ctx context.Context, binary string) string {
	var v struct {
		Commit string `json:"commit"`
	}
	out, err := exec.CommandContext(ctx, binary, "version", "--json").Output()
	if err != nil || json.Unmarshal(out, &v) != nil || v.Commit == "" {
		return "unknown"
	}
	return v.Commit
}

func (r *Report) writeJSON(w io.Writer) error {
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	return encoder.Encode(r)
}

// spread is the median of some values, and their bounds.
type spread struct{ low, mid, high float64 }

// over takes one value of each round.
func (m *Measured) over(value func(Round) float64) spread {
	values := make([]float64, len(m.Rounds))
	for i, p := range m.Rounds {
		values[i] = value(p)
	}
	return spreadOf(values)
}

// spreadOf sorts values, of which there is at least one.
func spreadOf(values []float64) spread {
	slices.Sort(values)
	mid := values[len(values)/2]
	if len(values)%2 == 0 {
		mid = (mid + values[len(values)/2-1]) / 2
	}
	return spread{values[0], mid, values[len(values)-1]}
}

// text shows the values with so many digits after the point.
func (s spread) text(digits int) string {
	return fmt.Sprintf("%.*f (%.*f..%.*f)", digits, s.mid, digits, s.low, digits, s.high)
}

func (r *Report) writeText(w io.Writer) error {
	out := bufio.NewWriter(w)
	fmt.Fprintf(out, "OwnLLM, what the broker costs; median (min..max) of all rounds\n\n")
	fmt.Fprintf(out, "machine  %d cores, %s, %s, %s; load average %s at the start\n", r.Cores, r.CPU, r.Platform, r.Go, r.Load)
	fmt.Fprintf(out, "commit   %s\n", r.Commit)
	if len(r.Workloads) > 0 {
		r.writeRequests(out)
	}
	if len(r.Floor) > 0 {
		writeFloor(out, r.Duration, r.Floor)
	}
	if r.Streams != nil {
		r.Streams.writeText(out)
	}
	if len(r.Knee) > 0 {
		writeKnee(out, r.Knee)
	}
	if len(r.Scale) > 0 {
		writeScale(out, r.Scale)
	}
	if r.Admissions != nil {
		r.Admissions.writeText(out)
	}
	if r.Submissions != nil {
		r.Submissions.writeText(out)
	}
	return out.Flush()
}

func (r *Report) writeRequests(out *bufio.Writer) {
	fmt.Fprintf(out, "\nRequests per second, direct to the demo backend, through a bare httputil.ReverseProxy, and through\n"+
		"the broker, with a price, a budget and limits; %d rounds of %s, in turns; ratios are taken in each round\n\n",
		len(r.Workloads[0].Rounds), r.Duration)
	table := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(table, "\tdirect\tbare proxy\tbroker\tproxy/direct\tbroker/direct")
	for i := range r.Workloads {
		m := &r.Workloads[i]
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\n", m,
			m.over(func(p Round) float64 { return p.Direct.PerSecond }).text(0),
			m.over(func(p Round) float64 { return p.Proxy.PerSecond }).text(0),
			m.over(func(p Round) float64 { return p.Broker.PerSecond }).text(0),
			m.over(func(p Round) float64 { return p.Proxy.PerSecond / p.Direct.PerSecond }).text(2),
			m.over(func(p Round) float64 { return p.Broker.PerSecond / p.Direct.PerSecond }).text(2))
	}
	_ = table.Flush() // writes to out, whose error counts
	torn := int64(0)
	for _, m := range r.Workloads {
		for _, p := range m.Rounds {
			torn += p.Proxy.Torn
		}
	}
	if torn > 0 {
		fmt.Fprintf(out, "The bare proxy broke %d replies off; they don't count.\n", torn)
	}

	fmt.Fprintf(out, "\nTime to the first token in ms, one client that streams\n\n")
	table = tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(table, "\tdirect\tbroker\tadded by it\tby a bare proxy")
	lone := &r.Workloads[0]
	for _, q := range []struct {
		name string
		of   func(Figure) float64
	}{{"p50", func(f Figure) float64 { return f.FirstP50 / 1e3 }}, {"p99", func(f Figure) float64 { return f.FirstP99 / 1e3 }}} {
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\n", q.name,
			lone.over(func(p Round) float64 { return q.of(p.Direct) }).text(2),
			lone.over(func(p Round) float64 { return q.of(p.Broker) }).text(2),
			lone.over(func(p Round) float64 { return q.of(p.Broker) - q.of(p.Direct) }).text(2),
			lone.over(func(p Round) float64 { return q.of(p.Proxy) - q.of(p.Direct) }).text(2))
	}
	_ = table.Flush() // likewise

	fmt.Fprintf(out, "\nCPU time in ms for each request (user and kernel); ownllm up is edge, broker, NATS and\n"+
		"worker in one process, Postgres its children, client this program\n\n")
	table = tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(table, "\tdirect: backend\tclient\tproxy: backend\tproxy\tclient\tbroker: backend\townllm up\tPostgres\tclient")
	for i := range r.Workloads {
		m := &r.Workloads[i]
		cpu := func(of func(Round) float64) string { return fmt.Sprintf("%.3f", m.over(of).mid/1e3) }
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", m,
			cpu(func(p Round) float64 { return p.Direct.CPUBackend }), cpu(func(p Round) float64 { return p.Direct.CPUClient }),
			cpu(func(p Round) float64 { return p.Proxy.CPUBackend }), cpu(func(p Round) float64 { return p.Proxy.CPUBroker }),
			cpu(func(p Round) float64 { return p.Proxy.CPUClient }),
			cpu(func(p Round) float64 { return p.Broker.CPUBackend }), cpu(func(p Round) float64 { return p.Broker.CPUBroker }),
			cpu(func(p Round) float64 { return p.Broker.CPUPostgres }), cpu(func(p Round) float64 { return p.Broker.CPUClient }))
	}
	_ = table.Flush() // likewise
}
