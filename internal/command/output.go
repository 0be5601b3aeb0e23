package command

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf8"
)

// Output is embedded by every command that prints a result.
type Output struct {
	JSON bool `name:"json" help:"Print JSON, for programs."`
}

// print writes the result: v as one line of JSON, or what people prints.
func (o Output) print(env *Environment, v any, people func(io.Writer) error) error {
	if !o.JSON {
		return people(env.Stdout)
	}
	encoder := json.NewEncoder(env.Stdout)
	encoder.SetEscapeHTML(false)
	return encoder.Encode(v)
}

// table writes rows under a heading. An empty cell is shown as "-".
func table(w io.Writer, heading []string, rows [][]string) error {
	out := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, row := range append([][]string{heading}, rows...) {
		cells := make([]string, len(row))
		for i, cell := range row {
			if cells[i] = clean(cell, false); cells[i] == "" {
				cells[i] = "-"
			}
		}
		// Without a tab after the last cell there is no padding at the end of the line.
		fmt.Fprintln(out, strings.Join(cells, "\t"))
	}
	return out.Flush()
}

// grid writes rows under a heading, the first columns to the left and the others, which
// are numbers, to the right, and a last line with their totals.
func grid(w io.Writer, left int, heading []string, rows [][]string, total []string) error {
	lines := append(append([][]string{heading}, rows...), total)
	widths := make([]int, len(heading))
	for i, line := range lines {
		for j, cell := range line {
			if cell = clean(cell, false); cell == "" && i != len(lines)-1 {
				cell = "-"
			}
			line[j], widths[j] = cell, max(widths[j], utf8.RuneCountInString(cell))
		}
	}
	for _, line := range lines {
		var out strings.Builder
		for j, cell := range line {
			pad := strings.Repeat(" ", widths[j]-utf8.RuneCountInString(cell))
			if j < left {
				out.WriteString(cell + pad + "  ")
			} else {
				out.WriteString(pad + cell + "  ")
			}
		}
		if _, err := fmt.Fprintln(w, strings.TrimRight(out.String(), " ")); err != nil {
			return err
		}
	}
	return nil
}

// clean takes control characters out of a text that comes from elsewhere, so that
// it can neither break a table nor talk to the terminal.
func clean(s string, lines bool) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) && (r != '\n' || !lines) {
			return '?'
		}
		return r
	}, s)
}

// date is a point in time for people, or the word for none.
func date(t *time.Time, none string) string {
	if t == nil {
		return none
	}
	return t.UTC().Format("2006-01-02 15:04:05 UTC")
}

// ago is how long ago t was, coarsely.
func ago(t *time.Time) string {
	if t == nil {
		return "never"
	}
	switch d := max(time.Since(*t), 0); {
	case d < time.Minute:
		return fmt.Sprintf("%ds ago", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm ago", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh ago", int(d.Hours()))
	default:
		return fmt.Sprintf("%dd ago", int(d.Hours()/24))
	}
}
