package adminapi

import (
	"encoding/csv"
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode"
)

// usageColumns are the columns of each dimension, named as the fields of Usage.
var usageColumns = map[string][]struct {
	name  string
	value func(Usage) string
}{
	ByTenant: {
		{"tenant", func(u Usage) string { return string(u.Tenant) }},
		{"tenant_slug", func(u Usage) string { return u.TenantSlug }},
	},
	ByUser: {
		{"user", func(u Usage) string { return string(u.User) }},
		{"email", func(u Usage) string { return u.Email }},
	},
	ByKey: {
		{"key", func(u Usage) string { return string(u.Key) }},
		{"key_name", func(u Usage) string { return u.KeyName }},
		{"key_prefix", func(u Usage) string { return u.KeyPrefix }},
	},
	ByModel: {{"model", func(u Usage) string { return u.Model }}},
	ByDay:   {{"day", func(u Usage) string { return u.Day }}},
}

// WriteUsageCSV writes rows that were summed up by the dimensions: a line of the names
// of the columns, which are those of the fields of Usage, and a line for each row.
// Texts that a spreadsheet would take for formulas begin with an apostrophe, which
// spreadsheets take for "this is text".
func WriteUsageCSV(w io.Writer, by []string, rows []Usage) error {
	out := csv.NewWriter(w)
	var line []string
	for _, dimension := range by {
		for _, c := range usageColumns[dimension] {
			line = append(line, c.name)
		}
	}
	line = append(line, "requests", "prompt_tokens", "completion_tokens", "cost_cents")
	if err := out.Write(line); err != nil {
		return fmt.Errorf("write CSV: %w", err)
	}
	for _, u := range rows {
		line = line[:0]
		for _, dimension := range by {
			for _, c := range usageColumns[dimension] {
				line = append(line, inert(c.value(u)))
			}
		}
		line = append(line, strconv.FormatInt(u.Requests, 10), strconv.FormatInt(u.PromptTokens, 10),
			strconv.FormatInt(u.CompletionTokens, 10), u.CostCents.String())
		if err := out.Write(line); err != nil {
			return fmt.Errorf("write CSV: %w", err)
		}
	}
	out.Flush()
	if err := out.Error(); err != nil {
		return fmt.Errorf("write CSV: %w", err)
	}
	return nil
}

// formula begins what some spreadsheet runs as a formula; the last four are the wide
// forms of the first.
const formula = "=+-@＝＋－＠"

// inert makes a cell of a text that others have chosen. Where lists are separated by
// semicolons or tabs, a spreadsheet begins a new cell after one of them, too.
func inert(text string) string {
	if !strings.ContainsAny(text, formula) {
		return text
	}
	var out strings.Builder
	begins := true
	for _, r := range text {
		if begins && strings.ContainsRune(formula, r) {
			out.WriteByte('\'')
		}
		out.WriteRune(r)
		begins = r == ';' || unicode.IsControl(r) || begins && (unicode.IsSpace(r) || r == '"')
	}
	return out.String()
}
