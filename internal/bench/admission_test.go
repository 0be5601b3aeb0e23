package main

import (
	"bufio"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseLine(t *testing.T) {
	for line, want := range map[string]Contested{
		"BenchmarkAdmission/keys=1/waiters=256/update/conns=64-2 \t 1566\t 413434 ns/op\t 2419 ops/s\t 95116 p50-us\t 195426 p99-us\n": {
			contest{1, 256, "update", 64}, []Pace{{PerSecond: 2419, P50: 95116, P99: 195426}},
		},
		"BenchmarkAdmission/keys=1000/waiters=32/admit-16 14514 35409 ns/op 28242.5 ops/s 8384 p50-us 21336 p99-us 0.0625 trips/op": {
			contest{1000, 32, "admit", 0}, []Pace{{PerSecond: 28242.5, P50: 8384, P99: 21336, Trips: 0.0625}},
		},
		// On one core Go adds no number to the name.
		"BenchmarkAdmission/keys=1/waiters=1/update/conns=1 9 9 ns/op 1 ops/s 2 p50-us 3 p99-us": {
			contest{1, 1, "update", 1}, []Pace{{PerSecond: 1, P50: 2, P99: 3}},
		},
	} {
		c, p, err := parseLine(line)
		if err != nil {
			t.Errorf("%q: %v", line, err)
		}
		if diff := cmp.Diff(want, Contested{c, []Pace{p}}, cmp.AllowUnexported(Contested{})); diff != "" {
			t.Errorf("%q:\n%s", line, diff)
		}
	}
	for line, want := range map[string]string{
		"":                   "not a result",
		"BenchmarkAdmission": "not a result",
		"BenchmarkOther/keys=1/waiters=1/admit 1 1 ns/op 1 ops/s 2 p50-us 3 p99-us":      "not a result",
		"BenchmarkAdmission/keys=1/waiters=1/admit 1 1 ns/op 1 ops/s 2 p50-us":           "a value is missing",
		"BenchmarkAdmission/keys=1/waiters=1/admit 1 1 ns/op one ops/s 2 p50-us 3 p99":   "not a number",
		"BenchmarkAdmission/keys=1/waiters=1/admit 1 1 ns/op NaN ops/s 2 p50-us 3 p99-u": "a value is missing",
	} {
		if _, _, err := parseLine(line); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error is %v, want %q", line, err, want)
		}
	}
}

// printed is what a round of the benchmark prints, with values that depend on n.
func printed(n string) string {
	return `goos: linux
BenchmarkAdmission/keys=1/waiters=1/select-2   9  9 ns/op  ` + n + `000 ops/s  ` + n + `0 p50-us  99 p99-us
BenchmarkAdmission/keys=1/waiters=1/update/conns=1-2   9  9 ns/op  ` + n + `00 ops/s  ` + n + `00 p50-us  900 p99-us
BenchmarkAdmission/keys=1/waiters=1/alone-2   9  9 ns/op  90 ops/s  250 p50-us  999 p99-us  2.000 trips/op
BenchmarkAdmission/keys=1/waiters=1/admit-2   9  9 ns/op  90 ops/s  400 p50-us  999 p99-us  1.000 trips/op
BenchmarkAdmission/keys=1/waiters=256/update/conns=8-2   9  9 ns/op  ` + n + `00 ops/s  200 p50-us  900 p99-us
BenchmarkAdmission/keys=1/waiters=256/update/conns=256-2   9  9 ns/op  ` + n + `0 ops/s  200 p50-us  900 p99-us
BenchmarkAdmission/keys=1/waiters=256/admit-2   9  9 ns/op  3000 ops/s  400 p50-us  999 p99-us  0.0081 trips/op
PASS
`
}

// Rounds are put together, and each ratio is that of the values of one round.
func TestAdmissionsText(t *testing.T) {
	a := Admissions{Duration: "500ms"}
	for round, n := range []string{"1", "3", "2"} {
		if err := a.add(round, []byte(printed(n))); err != nil {
			t.Fatal(err)
		}
	}
	var text strings.Builder
	out := bufio.NewWriter(&text)
	a.writeText(out)
	if err := out.Flush(); err != nil {
		t.Fatal(err)
	}
	got := strings.Join(strings.Fields(text.String()), " ")
	for _, want := range []string{
		"3 rounds of 500ms",
		"1 key, 1 waiter 1 200 (100..300) 90 (90..90) 0.45 (0.30..0.90) 1.000 (1.000..1.000)",
		"1 key, 256 waiters 8 200 (100..300) 3000 (3000..3000) 15.00 (10.00..30.00) 0.008 (0.008..0.008)",
		"1 key, 256 waiters 256 20 (10..30) 3000 (3000..3000) 150.00 (100.00..300.00)",
		"SELECT 1, a bare round trip 0.02 (0.01..0.03) 0.10 (0.10..0.10) 1.0 (1.0..1.0) 0.1 (0.1..0.1)",
		"UPDATE 0.20 (0.10..0.30) 0.90 (0.90..0.90) 10.0 (10.0..10.0) 1.0 (1.0..1.0)",
		"nothing else under way 0.25 (0.25..0.25) 1.00 (1.00..1.00) 12.5 (8.3..25.0) 1.2 (0.8..2.5)",
		"at once after a settlement 0.40 (0.40..0.40)",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("the text lacks %q:\n%s", want, &text)
		}
	}
}

// What isn't whole is no measurement.
func TestAdmissionsAdd(t *testing.T) {
	whole := printed("1")
	first, second, _ := strings.Cut(whole, "BenchmarkAdmission/keys=1/waiters=256/admit")
	for name, tc := range map[string]struct {
		rounds []string
		want   string
	}{
		"nothing":           {[]string{"PASS\n"}, "there is no select by"},
		"one is missing":    {[]string{first}, "there is no admit by    1 key,  256 waiters"},
		"a round is short":  {[]string{whole, first}, "round 2 has only 6 results"},
		"a round has more":  {[]string{whole, whole + whole}, "hasn't at that place"},
		"another order":     {[]string{whole, "BenchmarkAdmission/keys=1/waiters=256/admit" + second}, "hasn't at that place"},
		"another benchmark": {[]string{"BenchmarkOther 1 1 ns/op\n"}, "not a result"},
	} {
		t.Run(name, func(t *testing.T) {
			var a Admissions
			var err error
			for round, text := range tc.rounds {
				if err = a.add(round, []byte(text)); err != nil {
					break
				}
			}
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error is %v, want %q", err, tc.want)
			}
		})
	}
}
