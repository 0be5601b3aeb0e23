package report

import (
	_ "embed"
	"encoding/json"
	"fmt"
	"html/template"
	"io"
	"math"
	"strconv"

	"github.com/ownllm/ownllm/internal/load"
)

//go:embed report.html
var page string

var pageTemplate = template.Must(template.New("report").Funcs(template.FuncMap{
	"rate": rate, "ms": duration, "count": count, "percent": percent, "failure": failure, "breaches": breaches,
	"latencies": latencies, "health": health, "objective": objective,
}).Parse(page))

// HTML writes a report as a page. It loads nothing: its plots are in it, and so is the
// report as JSON, in the element with the id "report".
func HTML(w io.Writer, r *load.Report) error {
	data, err := json.Marshal(r) // with <, > and & escaped, so that it can't leave its element
	if err != nil {
		return err
	}
	p := &sheet{Report: r, Settings: settings(r), Unit: unit(r), Tiles: tiles(r), Data: template.JS(data)}
	for _, n := range notes(r) {
		p.Notes = append(p.Notes, shown{n.text, n.loud})
	}
	if len(r.Stages) > 1 {
		p.Overview = overview(r)
	}
	for i := range r.Stages {
		s := &r.Stages[i]
		p.Stages = append(p.Stages, stage{s, title(r, s.Level()), stageCharts(s)})
	}
	if err := pageTemplate.Execute(w, p); err != nil {
		return fmt.Errorf("write page: %w", err)
	}
	return nil
}

func title(r *load.Report, l load.Level) string {
	switch {
	case r.Settings.Loop == "open":
		return l.String() + " requests a second"
	case l.From == 1 && l.To == 1:
		return "1 client"
	}
	return l.String() + " clients"
}

// sheet is what the template shows.
type sheet struct {
	*load.Report
	Settings, Unit string
	Notes          []shown
	Tiles          []tile
	Overview       []figure
	Stages         []stage
	Data           template.JS
}

type shown struct {
	Text string
	Loud bool
}

// tile is one large figure.
type tile struct{ Label, Value, Note string }

type stage struct {
	*load.StageReport
	Title   string
	Figures []figure
}

// figure is a chart with its legend.
type figure struct {
	Title, Note string
	Legend      []legend
	SVG         template.HTML
}

type legend struct{ Name, Class string }

func (c *chart) figure() figure {
	f := figure{Title: c.title, Note: c.note, SVG: template.HTML(c.svg())} // of numbers and escaped texts
	if len(c.lines) > 1 {
		for _, l := range c.lines {
			f.Legend = append(f.Legend, legend{l.name, l.class})
		}
	}
	return f
}

// best is the stage with the most requests per second.
func best(r *load.Report) *load.StageReport {
	var b *load.StageReport
	for i := range r.Stages {
		if s := &r.Stages[i]; b == nil || s.RequestsPerSecond > b.RequestsPerSecond {
			b = s
		}
	}
	return b
}

func tiles(r *load.Report) []tile {
	b := best(r)
	if b == nil {
		return nil
	}
	at := ""
	if len(r.Stages) > 1 {
		at = "at " + b.Level().String() + " " + unit(r)
	}
	list := []tile{{"requests/s", rate(b.RequestsPerSecond), at}, {"tokens/s", rate(b.TokensPerSecond), at}}
	for _, l := range latencies(b) {
		list = append(list, tile{l.Name + ", p50", duration(l.P50), "p99 " + duration(l.P99)})
	}
	if b.Goodput != nil {
		list = append(list, tile{"goodput", percent(b.Goodput.Share), rate(b.Goodput.RequestsPerSecond) + " good requests/s"})
	}
	sum := r.Sum()
	failed := sum.Failed + sum.Broken
	share := 0.0
	if sum.Sent > 0 {
		share = float64(failed) / float64(sum.Sent)
	}
	return append(list, tile{"failed", percent(share), count(failed) + " of " + count(sum.Sent)})
}

func plain(f float64) string {
	if f >= 10_000 {
		return strconv.FormatFloat(f/1000, 'f', -1, 64) + "k"
	}
	return strconv.FormatFloat(math.Round(f*100)/100, 'f', -1, 64)
}

// highest is the largest value of some lines, and lowest the smallest above 0.
func bounds(lines []line) (lowest, highest float64) {
	lowest = math.Inf(1)
	for _, l := range lines {
		for _, p := range l.points {
			highest = max(highest, p.y)
			if p.y > 0 {
				lowest = min(lowest, p.y)
			}
		}
	}
	return min(lowest, max(highest, 1e-3)), highest
}

// overview compares the stages.
func overview(r *load.Report) []figure {
	levels := make([]string, len(r.Stages))
	collect := func(name, class string, of func(*load.StageReport) (float64, bool)) line {
		l := line{name: name, class: class}
		for i := range r.Stages {
			if y, ok := of(&r.Stages[i]); ok {
				l.points = append(l.points, point{float64(i), y})
			}
		}
		return l
	}
	for i := range r.Stages {
		levels[i] = r.Stages[i].Level().String()
	}
	value := func(of func(*load.StageReport) *load.Latency, take func(*load.Latency) float64) func(*load.StageReport) (float64, bool) {
		return func(s *load.StageReport) (float64, bool) {
			l := of(s)
			if l == nil {
				return 0, false
			}
			return take(l), true
		}
	}
	var list []figure
	add := func(title string, latency bool, lines ...line) {
		low, high := bounds(lines)
		if high == 0 {
			return
		}
		label := plain
		if latency {
			label = duration
		}
		c := &chart{title: title, note: "by " + unit(r), x: names(levels), y: linear(0, high, label), lines: lines, dots: true}
		if latency && high > 20*low {
			c.y = logarithmic(low, high, label)
		}
		list = append(list, c.figure())
	}
	rates := []line{collect("all", "c1", func(s *load.StageReport) (float64, bool) { return s.RequestsPerSecond, true })}
	if r.Settings.SLO != nil {
		rates = append(rates, collect("good", "c3", func(s *load.StageReport) (float64, bool) {
			return s.Goodput.RequestsPerSecond, true
		}))
	}
	add("Requests per second", false, rates...)
	add("Tokens per second", false, collect("tokens/s", "c1", func(s *load.StageReport) (float64, bool) { return s.TokensPerSecond, true }))
	for _, k := range []struct {
		title string
		of    func(*load.StageReport) *load.Latency
	}{
		{"Time to first token", func(s *load.StageReport) *load.Latency { return s.FirstToken }},
		{"Inter-token latency", func(s *load.StageReport) *load.Latency { return s.InterToken }},
		{"End-to-end latency", func(s *load.StageReport) *load.Latency { return s.Whole }},
	} {
		add(k.title, true,
			collect("p50", "c1", value(k.of, func(l *load.Latency) float64 { return l.P50 })),
			collect("p90", "c3", value(k.of, func(l *load.Latency) float64 { return l.P90 })),
			collect("p99", "c2", value(k.of, func(l *load.Latency) float64 { return l.P99 })))
	}
	return list
}

// stageCharts show one stage.
func stageCharts(s *load.StageReport) []figure {
	var list []figure
	if c := percentiles(s); c != nil {
		list = append(list, c.figure())
	}
	series := func(name, class string, of func(load.Point) (float64, bool)) line {
		l := line{name: name, class: class}
		for _, p := range s.Series {
			if y, ok := of(p); ok {
				l.points = append(l.points, point{p.Seconds, y})
			}
		}
		return l
	}
	ticks := func(of func(load.Point) *load.Tick, value func(*load.Tick) float64) func(load.Point) (float64, bool) {
		return func(p load.Point) (float64, bool) {
			t := of(p)
			if t == nil {
				return 0, false
			}
			return value(t), true
		}
	}
	p50, p99 := func(t *load.Tick) float64 { return t.P50 }, func(t *load.Tick) float64 { return t.P99 }
	add := func(title string, filled bool, label func(float64) string, lines ...line) {
		if _, high := bounds(lines); high > 0 {
			c := &chart{
				title: title, note: "over time", filled: filled, lines: lines, y: linear(0, high, label),
				x: until(max(s.Seconds, 0.1), func(v float64) string { return trim(v) + " s" }),
			}
			list = append(list, c.figure())
		}
	}
	first, whole := func(p load.Point) *load.Tick { return p.FirstToken }, func(p load.Point) *load.Tick { return p.Whole }
	add("Time to first token", false, duration, series("p50", "c1", ticks(first, p50)), series("p99", "c2", ticks(first, p99)))
	add("End-to-end latency", false, duration, series("p50", "c1", ticks(whole, p50)), series("p99", "c2", ticks(whole, p99)))
	rates := []line{series("ok", "c1", func(p load.Point) (float64, bool) { return p.OK, true })}
	if s.Requests.Failed+s.Requests.Broken > 0 {
		rates = append(rates, series("failed", "bad", func(p load.Point) (float64, bool) { return p.Failed, true }))
	}
	add("Requests per second", true, plain, rates...)
	add("Tokens per second", true, plain, series("tokens/s", "c1", func(p load.Point) (float64, bool) { return p.Tokens, true }))
	add("Requests in flight", true, plain, series("in flight", "c1", func(p load.Point) (float64, bool) { return float64(p.InFlight), true }))
	return list
}

// percentiles is the chart of how latencies are distributed.
func percentiles(s *load.StageReport) *chart {
	var lines []line
	most := 0.0
	for i, l := range latencies(s) {
		curve := line{name: l.Name, class: []string{"c1", "c3", "c2"}[i%3]}
		for _, p := range l.Curve {
			if p[0] > 0 && p[0] < 100 { // the extremes would take most of the scale
				curve.points = append(curve.points, point{p[0], p[1]})
				most = max(most, p[0])
			}
		}
		if len(curve.points) > 0 {
			lines = append(lines, curve)
		}
	}
	if most == 0 {
		return nil
	}
	low, high := bounds(lines)
	return &chart{title: "Latency by percentile", x: nines(max(most, 90)), y: logarithmic(low, high, duration), lines: lines}
}
