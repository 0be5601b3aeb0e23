package load

import (
	"cmp"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// histogram holds durations of 1 µs to an hour, each to a thousandth of itself.
type histogram struct{ h *hdrhistogram.Histogram }

const longest = int64(time.Hour / time.Microsecond)

func newHistogram() histogram { return histogram{hdrhistogram.New(1, longest, 3)} }

func (h histogram) add(d time.Duration) {
	_ = h.h.RecordValue(min(max(d.Microseconds(), 1), longest)) // within its bounds
}

func (h histogram) empty() bool { return h.h.TotalCount() == 0 }

// at is a percentile, in milliseconds.
func (h histogram) at(percentile float64) float64 {
	return float64(h.h.ValueAtPercentile(percentile)) / 1e3
}

// curvePercentiles are those that a curve is drawn through, evenly in the number of nines.
var curvePercentiles = []float64{0, 10, 20, 30, 40, 50, 60, 70, 75, 80, 85, 90, 92.5, 95, 97, 98, 99, 99.25, 99.5, 99.7, 99.8, 99.9, 99.95, 99.97, 99.99, 99.995, 99.999}

func (h histogram) latency() *Latency {
	n := h.h.TotalCount()
	if n == 0 {
		return nil
	}
	l := &Latency{
		Count: n, Mean: round(h.h.Mean() / 1e3), Min: float64(h.h.Min()) / 1e3, Max: float64(h.h.Max()) / 1e3,
		P50: h.at(50), P90: h.at(90), P99: h.at(99), P999: h.at(99.9),
	}
	for _, p := range curvePercentiles {
		if (100-p)/100*float64(n) >= 1 { // else it is but the largest value
			l.Curve = append(l.Curve, [2]float64{p, h.at(p)})
		}
	}
	l.Curve = append(l.Curve, [2]float64{100, l.Max})
	return l
}

// recorder is what was measured in a stage.
type recorder struct {
	client health
	start  time.Time // of the window

	mu           sync.Mutex // guards what follows
	open         bool       // the window
	length       time.Duration
	first, gap   histogram
	whole        histogram
	tickFirst    histogram // since the last point
	tickWhole    histogram
	tickOK       int64
	tickFailed   int64
	ended        Ended
	prompt       int64 // tokens of replies that count, as the server counted them, else as they were asked for
	completion   int64
	inWindow     int64 // ok that ended in the window
	goodInWindow int64
	good         int64
	tokensBefore int64
	tokens       int64 // that arrived in the window
	failures     map[Failure]int64
	breaches     map[Breach]int64
	points       []Point
}

func (r *recorder) init() {
	for _, h := range []*histogram{&r.first, &r.gap, &r.whole, &r.tickFirst, &r.tickWhole, &r.client.late, &r.client.launches} {
		*h = newHistogram()
	}
	r.failures, r.breaches = make(map[Failure]int64), make(map[Breach]int64)
}

// begin opens the window.
func (r *recorder) begin(tokens int64) {
	r.client.cpu = cpuTime()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.start, r.open, r.tokensBefore = time.Now(), true, tokens
}

// end closes it.
func (r *recorder) end(tokens int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.length, r.open, r.tokens = time.Since(r.start), false, tokens-r.tokensBefore
	r.client.cpu = cpuTime() - r.client.cpu
}

// take takes a request that has ended. It counts if it began in the window.
func (r *recorder) take(c *Config, p *reply, prompt int, intended time.Time, err error, counts bool) {
	failure, breach := p.outcome(err)
	took, toFirst := p.end.Sub(intended), p.first.Sub(intended)
	ok := failure == Failure{} && breach == ""
	good := ok && c.SLO.kept(p, took, toFirst)
	r.mu.Lock()
	defer r.mu.Unlock()
	if ok {
		r.tickOK++
		r.tickWhole.add(took)
		if !p.first.IsZero() {
			r.tickFirst.add(toFirst)
		}
		if r.open {
			r.inWindow++
			if good {
				r.goodInWindow++
			}
		}
	} else {
		r.tickFailed++
	}
	if !counts {
		return
	}
	r.ended.Sent++
	switch {
	case breach != "":
		r.ended.Broken++
		r.breaches[breach]++
	case !ok:
		r.ended.Failed++
		r.failures[failure]++
	default:
		r.ended.OK++
		r.prompt += int64(cmp.Or(p.prompt, prompt))
		r.completion += int64(p.tokens())
		r.whole.add(took)
		if !p.first.IsZero() {
			r.first.add(toFirst)
		}
		for _, g := range p.gaps {
			r.gap.add(g)
		}
		if good {
			r.good++
		}
	}
}

// unsent counts a request that arrived and never found room.
func (r *recorder) unsent() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.tickFailed++
	r.ended.Sent++
	r.ended.Failed++
	r.failures[Failure{Cause: CauseUnsent}]++
}

// kept reports whether a reply keeps the objective.
func (s SLO) kept(p *reply, took, toFirst time.Duration) bool {
	return (s.Whole == 0 || took <= s.Whole) &&
		(s.FirstToken == 0 || !p.first.IsZero() && toFirst <= s.FirstToken) &&
		(s.InterToken == 0 || p.meanGap() <= s.InterToken)
}

// outcome is how a request failed, or in which way its reply isn't whole, or neither.
func (r *reply) outcome(err error) (Failure, Breach) {
	switch {
	case err != nil:
		started := r.status >= 200 && r.status <= 299
		why := cause(err, started)
		if why == CauseCut {
			return Failure{}, Torn
		}
		return Failure{Cause: why}, ""
	case r.refusal != nil:
		code := cmp.Or(r.refusal.code, r.refusal.kind, "http_"+strconv.Itoa(r.status))
		if b := r.numbers.end(); b != "" && b != Short {
			return Failure{}, b // it was wrong before it failed
		}
		return Failure{Status: r.status, Code: code}, ""
	}
	return Failure{}, r.check()
}

// point takes a point of the series, of the time since the last one.
func (r *recorder) point(at, since time.Duration, tokens, inFlight int64) Point {
	r.mu.Lock()
	defer r.mu.Unlock()
	each := func(n int64) float64 { return round(float64(n) / since.Seconds()) }
	p := Point{
		Seconds: round(at.Seconds()), InFlight: inFlight,
		OK: each(r.tickOK), Failed: each(r.tickFailed), Tokens: each(tokens),
		FirstToken: tick(r.tickFirst), Whole: tick(r.tickWhole),
	}
	r.tickOK, r.tickFailed = 0, 0
	return p
}

// tick is what a histogram holds, which it forgets.
func tick(h histogram) *Tick {
	if h.empty() {
		return nil
	}
	t := &Tick{P50: h.at(50), P99: h.at(99)}
	h.h.Reset()
	return t
}

// keep keeps a point of the window.
func (r *recorder) keep(p Point) (ok, failed, broken int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.open {
		r.points = append(r.points, p)
	}
	return r.ended.OK, r.ended.Failed, r.ended.Broken
}

// report sums up a stage that is over.
func (r *recorder) report(s *stage) StageReport {
	r.mu.Lock()
	defer r.mu.Unlock()
	seconds := r.length.Seconds()
	each := func(n int64) float64 { return round(float64(n) / max(seconds, 1e-9)) }
	level := Between(s.level)
	result := StageReport{
		Seconds: round(seconds), Requests: r.ended,
		RequestsPerSecond: each(r.inWindow), TokensPerSecond: each(r.tokens),
		PromptTokens: r.prompt, CompletionTokens: r.completion,
		FirstToken: r.first.latency(), InterToken: r.gap.latency(), Whole: r.whole.latency(),
		Client: r.client.report(r.length), Series: r.points, Failures: []FailureCount{},
	}
	if s.config.Open {
		result.Rate = &level
	} else {
		result.Clients = &level
	}
	if s.config.SLO.isSet() {
		g := &Goodput{RequestsPerSecond: each(r.goodInWindow)}
		if r.ended.Sent > 0 {
			g.Share = round(float64(r.good) / float64(r.ended.Sent))
		}
		result.Goodput = g
	}
	for f, n := range r.failures {
		result.Failures = append(result.Failures, FailureCount{f, n})
	}
	slices.SortFunc(result.Failures, func(a, b FailureCount) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Code, b.Code), cmp.Compare(a.Cause, b.Cause), cmp.Compare(a.Status, b.Status))
	})
	if len(r.breaches) > 0 {
		result.Breaches = r.breaches
	}
	return result
}
