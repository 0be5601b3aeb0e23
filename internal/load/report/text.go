// Package report shows what a load test has measured: as text for a terminal, and as a
// page with plots that opens from disk and needs nothing but itself.
package report

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/ownllm/ownllm/internal/load"
	"github.com/ownllm/ownllm/schemas"
)

// Text writes a report for people.
func Text(w io.Writer, r *load.Report) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s, model %s\n%s\n", clean(r.Target.URL), clean(r.Target.Model), settings(r))
	if r.Interrupted {
		b.WriteString("Interrupted: this is what was measured until then.\n")
	}
	if len(r.Stages) == 0 {
		b.WriteString("\nNothing was measured.\n")
	} else {
		writeRates(&b, r)
		writeLatencies(&b, r)
		writeFailures(&b, r)
	}
	for _, n := range notes(r) {
		mark := ""
		if n.loud {
			mark = "!!! "
		}
		fmt.Fprintf(&b, "\n%s%s\n", mark, n.text)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// settings says in words what was asked for.
func settings(r *load.Report) string {
	s := r.Settings
	kind := "whole replies"
	if s.Stream {
		kind = "streams"
	}
	text := fmt.Sprintf("%s loop of %s; prompts of %s tokens, replies of %s", s.Loop, kind, s.Prompt, s.Reply)
	if s.Arrivals != "" {
		text = fmt.Sprintf("%s loop of %s, %s arrivals; prompts of %s tokens, replies of %s", s.Loop, kind, s.Arrivals, s.Prompt, s.Reply)
	}
	if s.Duration > 0 {
		text += fmt.Sprintf("; %s a stage", seconds(s.Duration))
	} else {
		text += fmt.Sprintf("; %d requests a stage", s.Requests)
	}
	if s.WarmUp > 0 {
		text += fmt.Sprintf(" after %s of warm-up", seconds(s.WarmUp))
	}
	return text
}

func seconds(f float64) string { return strconv.FormatFloat(f, 'f', -1, 64) + " s" }

// unit is what the stages differ by.
func unit(r *load.Report) string {
	if r.Settings.Loop == "open" {
		return "requests/s asked"
	}
	return "clients"
}

// table writes rows under a heading, the first so many columns to the left and the others
// to the right.
func table(b *strings.Builder, left int, rows [][]string) {
	widths := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	for _, row := range rows {
		var line strings.Builder
		for i, cell := range row {
			pad := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell))
			if i < left {
				line.WriteString(cell + pad + "  ")
			} else {
				line.WriteString(pad + cell + "  ")
			}
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
}

func writeRates(b *strings.Builder, r *load.Report) {
	heading := []string{strings.ToUpper(unit(r)), "REQUESTS/S", "TOKENS/S", "SENT", "OK", "FAILED", "BROKEN"}
	if r.Settings.SLO != nil {
		heading = append(heading, "GOOD/S", "GOOD")
	}
	rows := [][]string{heading}
	for i := range r.Stages {
		s := &r.Stages[i]
		row := []string{
			s.Level().String(), rate(s.RequestsPerSecond), rate(s.TokensPerSecond),
			count(s.Requests.Sent), count(s.Requests.OK), count(s.Requests.Failed), count(s.Requests.Broken),
		}
		if s.Goodput != nil {
			row = append(row, rate(s.Goodput.RequestsPerSecond), percent(s.Goodput.Share))
		}
		rows = append(rows, row)
	}
	b.WriteByte('\n')
	table(b, 0, rows)
	if slo := r.Settings.SLO; slo != nil {
		fmt.Fprintf(b, "good: %s\n", objective(slo))
	}
}

// objective says an SLO in words.
func objective(s *load.SLOms) string {
	var parts []string
	for _, o := range []struct {
		what  string
		bound float64
	}{{"first token within", s.FirstToken}, {"mean time between chunks within", s.InterToken}, {"end within", s.Whole}} {
		if o.bound > 0 {
			parts = append(parts, o.what+" "+duration(o.bound))
		}
	}
	return strings.Join(parts, ", ")
}

// latencies are the rows of a stage.
func latencies(s *load.StageReport) []named {
	var list []named
	for _, l := range []named{{"first token", s.FirstToken}, {"inter-token", s.InterToken}, {"end to end", s.Whole}} {
		if l.Latency != nil {
			list = append(list, l)
		}
	}
	return list
}

type named struct {
	Name string
	*load.Latency
}

func writeLatencies(b *strings.Builder, r *load.Report) {
	rows := [][]string{{strings.ToUpper(unit(r)), "LATENCY IN MS", "MEAN", "P50", "P90", "P99", "P99.9", "MAX"}}
	for i := range r.Stages {
		s := &r.Stages[i]
		for _, l := range latencies(s) {
			rows = append(rows, []string{
				s.Level().String(), l.Name, ms(l.Mean), ms(l.P50), ms(l.P90), ms(l.P99), ms(l.P999), ms(l.Max),
			})
		}
	}
	if len(rows) > 1 {
		b.WriteByte('\n')
		table(b, 2, rows)
	}
}

func writeFailures(b *strings.Builder, r *load.Report) {
	rows := [][]string{{strings.ToUpper(unit(r)), "FAILURE", "COUNT"}}
	for i := range r.Stages {
		s := &r.Stages[i]
		for _, f := range s.Failures {
			rows = append(rows, []string{s.Level().String(), failure(f.Failure), count(f.Count)})
		}
		for _, name := range breaches(s) {
			rows = append(rows, []string{s.Level().String(), "broken: " + string(name), count(s.Breaches[name])})
		}
	}
	if len(rows) > 1 {
		b.WriteByte('\n')
		table(b, 2, rows)
	}
}

// failure says a failure in words.
func failure(f load.Failure) string {
	switch {
	case f.Cause != "":
		return f.Cause
	case f.Status == 200:
		return clean(f.Code) + " in the stream"
	}
	return fmt.Sprintf("%d %s", f.Status, clean(f.Code))
}

func breaches(s *load.StageReport) []load.Breach {
	var names []load.Breach
	for name := range s.Breaches {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// note is something that a reader has to know.
type note struct {
	text string
	loud bool
}

// notes are what the figures don't say by themselves.
func notes(r *load.Report) []note {
	var list []note
	sum := r.Sum()
	what := "every reply ended with a finish_reason"
	if r.Settings.Verified {
		what = "every reply had all its numbered tokens, once and in order"
	}
	switch {
	case sum.Broken > 0:
		total := make(map[string]int64)
		for i := range r.Stages {
			for name, n := range r.Stages[i].Breaches {
				total[string(name)] += n
			}
		}
		var parts []string
		for name, n := range total {
			parts = append(parts, fmt.Sprintf("%d %s", n, name))
		}
		slices.Sort(parts)
		text := fmt.Sprintf("INTEGRITY BROKEN: %d of %d replies weren't whole, and no error said so: %s.", sum.Broken, sum.OK+sum.Broken, strings.Join(parts, ", "))
		if r.Settings.Verified && sum.OK == 0 && total[string(load.Garbled)] == sum.Broken {
			text += " Not one was right: is this the demo model? No other numbers its tokens."
		}
		list = append(list, note{text, true})
	case sum.OK > 0:
		list = append(list, note{fmt.Sprintf("integrity: %s (%s replies)", what, count(sum.OK)), false})
	}
	if sum.Sent > 0 && sum.OK+sum.Broken == 0 {
		list = append(list, note{fmt.Sprintf("ALL %d REQUESTS FAILED.", sum.Sent), true})
	}
	if n := limited(r); n*10 > sum.Sent {
		list = append(list, note{fmt.Sprintf("%d of %d requests were refused by a limit. That measures the limit. "+
			"An admin lifts it: `ownllm tenants set TENANT --qps N`, `ownllm keys set KEY --concurrency N`.", n, sum.Sent), false})
	}
	for i := range r.Stages {
		if s := &r.Stages[i]; s.Client.Saturated {
			list = append(list, note{fmt.Sprintf("THE CLIENT'S MACHINE WAS SHORT OF CPU at %s: %s. Latencies are too high by about as much: use more cores, or a machine apart from the server's.",
				title(r, s.Level()), health(s.Client)), true})
		}
	}
	if len(list) > 0 && len(r.Stages) > 0 && !list[len(list)-1].loud {
		list = append(list, note{"client: " + health(r.Stages[len(r.Stages)-1].Client), false})
	}
	return list
}

// health says in words how the client fared.
func health(c load.ClientHealth) string {
	text := fmt.Sprintf("%s of %d cores used", percent(c.CPUShare), c.Cores)
	if c.Late != nil {
		text += fmt.Sprintf(", timers %s late (p99)", duration(c.Late.P99))
	}
	if c.Launched != nil {
		text += fmt.Sprintf(", requests sent %s late (p99)", duration(c.Launched.P99))
	}
	return text
}

// limited is how many requests a limit of OwnLLM refused.
func limited(r *load.Report) (n int64) {
	for i := range r.Stages {
		for _, f := range r.Stages[i].Failures {
			if f.Code == string(schemas.CodeTenantQPSLimit) || f.Code == string(schemas.CodeConcurrencyLimit) {
				n += f.Count
			}
		}
	}
	return n
}

func count(n int64) string { return strconv.FormatInt(n, 10) }

func percent(share float64) string { return strconv.FormatFloat(share*100, 'f', 1, 64) + "%" }

// rate and ms show three or four digits that count.
func rate(f float64) string { return digits(f) }

func ms(f float64) string { return digits(f) }

func digits(f float64) string {
	switch {
	case f >= 100:
		return strconv.FormatFloat(f, 'f', 0, 64)
	case f >= 10:
		return strconv.FormatFloat(f, 'f', 1, 64)
	case f >= 1:
		return strconv.FormatFloat(f, 'f', 2, 64)
	}
	return strconv.FormatFloat(math.Round(f*1e3)/1e3, 'f', 3, 64)
}

// duration is a number of milliseconds in a unit that fits.
func duration(ms float64) string {
	switch {
	case ms >= 1000:
		return trim(ms/1000) + " s"
	case ms >= 1:
		return trim(ms) + " ms"
	case ms > 0:
		return trim(ms*1000) + " µs"
	}
	return "0"
}

// trim shows up to three digits that count, without zeros at the end.
func trim(f float64) string {
	text := strconv.FormatFloat(f, 'g', 3, 64)
	if strings.Contains(text, "e") {
		return strconv.FormatFloat(f, 'f', 0, 64)
	}
	return text
}

// clean takes control characters out of a text that a server made.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return '?'
		}
		return r
	}, s)
}
