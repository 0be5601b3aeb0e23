package report

import (
	"fmt"
	"html"
	"math"
	"strconv"
	"strings"
)

// line is one line of a chart, and class the name of its colour.
type line struct {
	name, class string
	points      []point
}

type point struct{ x, y float64 }

// axis says where a value lies between two ends, and which ones are labelled.
type axis struct {
	at    func(v float64) float64 // from 0 to 1
	ticks []float64
	label func(v float64) string
}

// linear is an axis from low to at least high.
func linear(low, high float64, label func(float64) string) axis {
	if !(high > low) {
		high = low + 1
	}
	step := nice((high - low) / 4)
	high = low + math.Ceil((high-low)/step-1e-9)*step
	a := axis{at: func(v float64) float64 { return (v - low) / (high - low) }, label: label}
	for i := 0; low+float64(i)*step <= high+step/2; i++ {
		a.ticks = append(a.ticks, low+float64(i)*step)
	}
	return a
}

// until is an axis from 0 to just high.
func until(high float64, label func(float64) string) axis {
	a := linear(0, high, label)
	a.at = func(v float64) float64 { return v / high }
	for len(a.ticks) > 1 && a.ticks[len(a.ticks)-1] > high*1.001 {
		a.ticks = a.ticks[:len(a.ticks)-1]
	}
	return a
}

// nice is the next of 1, 2, 5, 10, … that is not below f.
func nice(f float64) float64 {
	power := math.Pow(10, math.Floor(math.Log10(f)))
	for _, n := range []float64{1, 2, 2.5, 5} {
		if n*power >= f*(1-1e-9) {
			return n * power
		}
	}
	return 10 * power
}

// logarithmic is an axis of powers of ten.
func logarithmic(low, high float64, label func(float64) string) axis {
	from := math.Floor(math.Log10(max(low, 1e-3)))
	to := max(math.Ceil(math.Log10(max(high, 1e-3))), from+1)
	a := axis{at: func(v float64) float64 { return (math.Log10(max(v, 1e-3)) - from) / (to - from) }, label: label}
	for e := from; e <= to; e++ {
		a.ticks = append(a.ticks, math.Pow(10, e))
	}
	return a
}

// nines is an axis of percentiles, on which 90, 99 and 99.9 are equally far apart. A
// percentile of 100 is at most.
func nines(most float64) axis {
	far := func(p float64) float64 { return -math.Log10(1 - p/100) }
	a := axis{at: func(v float64) float64 { return min(far(v)/far(most), 1) }, label: func(v float64) string { return "p" + strconv.FormatFloat(v, 'f', -1, 64) }}
	for _, p := range []float64{50, 90, 99, 99.9, 99.99, 99.999} {
		if p <= most {
			a.ticks = append(a.ticks, p)
		}
	}
	return a
}

// names is an axis of texts, evenly spread.
func names(texts []string) axis {
	a := axis{at: func(v float64) float64 { return (v + 0.5) / float64(len(texts)) }, label: func(v float64) string { return texts[int(v)] }}
	for i := range texts {
		a.ticks = append(a.ticks, float64(i))
	}
	return a
}

// The size of a chart, and of the room around its plot.
const (
	width, height            = 560.0, 250.0
	left, right, top, bottom = 62.0, 14.0, 12.0, 34.0
)

// chart is a plot of some lines.
type chart struct {
	title, note string
	x, y        axis
	lines       []line
	filled      bool // below the first line
	dots        bool // at each point
}

func (c *chart) place(p point) (x, y float64) {
	return left + c.x.at(p.x)*(width-left-right), top + (1-min(max(c.y.at(p.y), 0), 1))*(height-top-bottom)
}

// svg draws the chart. Everything in it is a number, or escaped.
func (c *chart) svg() string {
	var b strings.Builder
	fmt.Fprintf(&b, `<svg viewBox="0 0 %g %g" role="img" aria-label="%s">`, width, height, html.EscapeString(c.title))
	for _, v := range c.y.ticks {
		_, y := c.place(point{0, v})
		fmt.Fprintf(&b, `<line class="grid" x1="%g" x2="%g" y1="%.1f" y2="%.1f"/>`, left, width-right, y, y)
		fmt.Fprintf(&b, `<text class="tick" x="%g" y="%.1f" text-anchor="end">%s</text>`, left-8, y+3.5, html.EscapeString(c.y.label(v)))
	}
	for _, v := range c.x.ticks {
		x, _ := c.place(point{v, 0})
		anchor := "middle"
		if x > width-right-20 {
			anchor = "end"
		}
		fmt.Fprintf(&b, `<text class="tick" x="%.1f" y="%g" text-anchor="%s">%s</text>`, x, height-bottom+18, anchor, html.EscapeString(c.x.label(v)))
	}
	fmt.Fprintf(&b, `<line class="axis" x1="%g" x2="%g" y1="%g" y2="%g"/>`, left, width-right, height-bottom, height-bottom)
	for i, l := range c.lines {
		c.draw(&b, l, c.filled && i == 0)
	}
	b.WriteString(`</svg>`)
	return b.String()
}

func (c *chart) draw(b *strings.Builder, l line, filled bool) {
	if len(l.points) == 0 {
		return
	}
	var path strings.Builder
	for i, p := range l.points {
		x, y := c.place(p)
		letter := 'L'
		if i == 0 {
			letter = 'M'
		}
		fmt.Fprintf(&path, "%c%.1f %.1f", letter, x, y)
	}
	if filled {
		from, _ := c.place(l.points[0])
		to, _ := c.place(l.points[len(l.points)-1])
		fmt.Fprintf(b, `<path class="area %s" d="%sL%.1f %g L%.1f %g Z"/>`, l.class, path.String(), to, height-bottom, from, height-bottom)
	}
	fmt.Fprintf(b, `<path class="line %s" d="%s"/>`, l.class, path.String())
	kind := "spot"
	if c.dots || len(l.points) == 1 {
		kind = "dot"
	}
	for _, p := range l.points {
		x, y := c.place(p)
		fmt.Fprintf(b, `<circle class="%s %s" cx="%.1f" cy="%.1f" r="3.5"><title>%s</title></circle>`,
			kind, l.class, x, y, html.EscapeString(l.name+" "+c.y.label(p.y)+" at "+c.x.label(p.x)))
	}
}
