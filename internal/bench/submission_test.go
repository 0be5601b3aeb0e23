package main

import (
	"bufio"
	"strings"
	"testing"
)

// backlogs is what a round prints in which a request costs so much.
func backlogs(short, long string) string {
	line := func(waiting, cost string) string {
		return "BenchmarkSubmission/waiting=" + waiting + "-2  9  " + cost + "000000 ns/op  500 claim-us/op  250 end-us/op  125 submit-us/op\n"
	}
	return "goos: linux\n" + line("1", short) + line("100000", long) + "PASS\n"
}

// Rounds are put together, and each ratio is that of the values of one round.
func TestSubmissionsText(t *testing.T) {
	var s Submissions
	for round, costs := range [][2]string{{"2", "3"}, {"4", "2"}, {"5", "5"}} {
		if err := s.add(round, []byte(backlogs(costs[0], costs[1]))); err != nil {
			t.Fatal(err)
		}
	}
	var text strings.Builder
	out := bufio.NewWriter(&text)
	s.writeText(out)
	if err := out.Flush(); err != nil {
		t.Fatal(err)
	}
	got := strings.Join(strings.Fields(text.String()), " ")
	for _, want := range []string{
		"1 waiting 0.12 (0.12..0.12) 0.50 (0.50..0.50) 0.25 (0.25..0.25) 4.00 (2.00..5.00) 1.00 (1.00..1.00)",
		"100000 waiting 0.12 (0.12..0.12) 0.50 (0.50..0.50) 0.25 (0.25..0.25) 3.00 (2.00..5.00) 1.00 (0.50..1.50)",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("the text lacks %q:\n%s", want, &text)
		}
	}
}

// What isn't whole is no measurement.
func TestSubmissionsAdd(t *testing.T) {
	whole := backlogs("2", "3")
	for name, tc := range map[string]struct {
		rounds []string
		want   string
	}{
		"nothing":           {[]string{"PASS\n"}, "only 0 results"},
		"one is missing":    {[]string{whole[:strings.LastIndex(whole, "Benchmark")]}, "only 1 results"},
		"a round has more":  {[]string{whole, whole + whole}, "hasn't at that place"},
		"another benchmark": {[]string{"BenchmarkOther 1 1 ns/op\n"}, "not a result"},
		"cut off":           {[]string{"BenchmarkSubmission/waiting=1-2 1\n"}, "a value is missing"},
		"no number":         {[]string{strings.Replace(whole, "500 claim", "five claim", 1)}, "not a number"},
	} {
		t.Run(name, func(t *testing.T) {
			var s Submissions
			var err error
			for round, text := range tc.rounds {
				if err = s.add(round, []byte(text)); err != nil {
					break
				}
			}
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error is %v, want %q", err, tc.want)
			}
		})
	}
}
