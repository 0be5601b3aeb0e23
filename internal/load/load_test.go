package load

import (
	"context"
	"errors"
	"io"
	"log"
	"math"
	"net/http/httptest"
	"net/url"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ownllm/ownllm/internal/port"
	"github.com/ownllm/ownllm/worker/demo"
)

// about reports whether a value is within a thousandth, the histogram's step, and a bit.
func about(got, want float64) bool { return math.Abs(got-want) <= want*0.002+0.002 }

// A closed loop asks a server as often as it answers, and measures what it takes.
func TestClosedLoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := only(t, run(t, Config{
			Dial: inMemory(counting(100*time.Millisecond, 10*time.Millisecond)), Stream: true, Verify: true, Reply: Fixed(11),
			// The window's ends lie where nothing else happens.
			Levels: []Level{{5, 5}}, WarmUp: 1050 * time.Millisecond, Duration: 10 * time.Second,
			SLO: SLO{FirstToken: 100 * time.Millisecond, InterToken: 10 * time.Millisecond, Whole: 200 * time.Millisecond},
		}))
		// 5 clients, each with a reply of 100 ms and 10 gaps of 10 ms.
		if s.Requests != (Ended{Sent: 250, OK: 250}) || !about(s.RequestsPerSecond, 25) || !about(s.TokensPerSecond, 275) {
			t.Errorf("%+v, %v requests/s, %v tokens/s", s.Requests, s.RequestsPerSecond, s.TokensPerSecond)
		}
		if !about(s.FirstToken.P50, 100) || !about(s.InterToken.P99, 10) || !about(s.Whole.Max, 200) || s.InterToken.Count != 2500 {
			t.Errorf("first token %+v\ninter-token %+v\nwhole %+v", s.FirstToken, s.InterToken, s.Whole)
		}
		if s.Goodput.Share != 1 || !about(s.Goodput.RequestsPerSecond, 25) {
			t.Errorf("goodput %+v", s.Goodput)
		}
		if s.CompletionTokens != 2750 || s.PromptTokens != 250*16 || len(s.Series) < 30 || s.Client.Saturated {
			t.Errorf("%d tokens, %d points, %+v", s.CompletionTokens, len(s.Series), s.Client)
		}
	})
}

// Requests that an objective's bound misses are no goodput.
func TestGoodput(t *testing.T) {
	for name, tc := range map[string]struct {
		slo  SLO
		want float64
	}{
		"first token": {SLO{FirstToken: 99 * time.Millisecond}, 0},
		"inter-token": {SLO{InterToken: 9 * time.Millisecond}, 0},
		"whole":       {SLO{Whole: 199 * time.Millisecond}, 0},
		"kept":        {SLO{FirstToken: time.Second}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := only(t, run(t, Config{
					Dial: inMemory(counting(100*time.Millisecond, 10*time.Millisecond)), Stream: true, Reply: Fixed(11),
					Levels: []Level{{1, 1}}, Requests: 5, SLO: tc.slo,
				}))
				if s.Requests.OK != 5 || s.Goodput.Share != tc.want {
					t.Errorf("%+v, %+v", s.Requests, s.Goodput)
				}
			})
		})
	}
}

// A number of requests is sent, no more and no fewer, however many clients there are.
func TestRequests(t *testing.T) {
	for _, open := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			var asked atomic.Int64
			answer := counting(time.Millisecond, 0)
			s := only(t, run(t, Config{
				Dial: inMemory(func(body string, w io.Writer) { asked.Add(1); answer(body, w) }), Stream: true,
				Open: open, Levels: []Level{{7, 7}}, Requests: 100,
			}))
			if s.Requests != (Ended{Sent: 100, OK: 100}) || asked.Load() != 100 {
				t.Errorf("open %t: %+v, the server saw %d", open, s.Requests, asked.Load())
			}
		})
	}
}

// A ramp of clients ends with as many as it says.
func TestClientRamp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := only(t, run(t, Config{
			Dial: inMemory(counting(100*time.Millisecond, 0)), Stream: true, Reply: Fixed(1), Levels: []Level{{1, 20}}, Duration: 20 * time.Second,
		}))
		if last := s.Series[len(s.Series)-1].InFlight; last < 18 || last > 20 {
			t.Errorf("%d in flight at the end", last)
		}
		// 10.5 clients on average, 10 requests a second each.
		if s.RequestsPerSecond < 95 || s.RequestsPerSecond > 110 {
			t.Errorf("%v requests/s", s.RequestsPerSecond)
		}
	})
}

// stalling is a server that answers at once, but for a time in which it answers nothing.
type stalling struct{ from, until time.Time }

func (s *stalling) answer(body string, w io.Writer) {
	if now := time.Now(); now.After(s.from) && now.Before(s.until) {
		time.Sleep(s.until.Sub(now))
	}
	counting(time.Millisecond, 0)(body, w)
}

// A server that stops for two of ten seconds: in an open loop a fifth of all requests
// waited, up to two seconds, and the percentiles show it, even where a single client has to
// send one after the other. A closed loop shows a request for each client, and hides what
// all others would have waited.
func TestCoordinatedOmission(t *testing.T) {
	stage := func(t *testing.T, c Config) (s *StageReport) {
		synctest.Test(t, func(t *testing.T) {
			start := time.Now()
			server := &stalling{start.Add(4 * time.Second), start.Add(6 * time.Second)}
			c.Dial, c.Stream, c.Reply, c.Duration = inMemory(server.answer), true, Fixed(1), 10*time.Second
			s = only(t, run(t, c))
		})
		return s
	}
	for name, c := range map[string]Config{
		"even":           {Open: true, Even: true, Levels: []Level{{100, 100}}},
		"poisson":        {Open: true, Levels: []Level{{100, 100}}},
		"one connection": {Open: true, Even: true, Levels: []Level{{100, 100}}, MaxInFlight: 1},
	} {
		t.Run(name, func(t *testing.T) {
			s := stage(t, c)
			if s.Requests.Sent < 900 || s.Requests.Failed > 0 {
				t.Fatalf("%+v", s.Requests)
			}
			if s.Whole.P50 > 3 || s.Whole.P90 < 700 || s.Whole.P99 < 1700 || s.Whole.Max < 1950 || s.Whole.Max > 2100 {
				t.Errorf("p50 %v, p90 %v, p99 %v, max %v ms", s.Whole.P50, s.Whole.P90, s.Whole.P99, s.Whole.Max)
			}
			if s.FirstToken.P99 < 1700 {
				t.Errorf("first token p99 %v ms", s.FirstToken.P99)
			}
		})
	}
	t.Run("closed", func(t *testing.T) {
		if s := stage(t, Config{Levels: []Level{{1, 1}}}); s.Whole.P99 > 3 || s.Whole.Max < 1950 {
			t.Errorf("p99 %v, max %v ms: is the loop still closed?", s.Whole.P99, s.Whole.Max)
		}
	})
}

// What arrives while too many are in flight, and finds no room in the time that a reply may
// take, is a failure of its own.
func TestNeverSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := only(t, run(t, Config{
			Dial: inMemory(counting(time.Minute, 0)), Stream: true, Open: true, Even: true, Levels: []Level{{1, 1}},
			Requests: 3, MaxInFlight: 1, Timeout: time.Second,
		}))
		if s.Requests.Failed != 3 {
			t.Errorf("%+v", s.Requests)
		}
		for _, f := range s.Failures {
			if f.Cause != CauseTimeout && f.Cause != CauseUnsent {
				t.Errorf("%+v", f)
			}
		}
	})
}

// An interrupt ends requests in flight, and keeps what was measured.
func TestInterrupt(t *testing.T) {
	for _, open := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 10500*time.Millisecond)
			defer cancel()
			r, err := Run(ctx, Config{
				URL: &url.URL{Scheme: "http", Host: "server.test"}, Model: "demo", Stream: true, Open: open, Even: true,
				Dial: inMemory(counting(2*time.Second, 0)), Levels: []Level{{1, 1}, {2, 2}}, Duration: time.Minute,
			}, nil)
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(serversEnd)
			s := only(t, r)
			if !r.Interrupted || s.Requests.OK < 4 || s.Requests.Failed > 0 || s.Seconds < 10 || s.Seconds > 11 {
				t.Errorf("open %t: interrupted %t after %v s, %+v, %+v", open, r.Interrupted, s.Seconds, s.Requests, s.Failures)
			}
		})
	}
}

// Two runs with the same seed ask the same.
func TestSeed(t *testing.T) {
	bodies := func(seed uint64) (all string) {
		synctest.Test(t, func(t *testing.T) {
			answer := counting(0, 0)
			run(t, Config{
				Dial: inMemory(func(body string, w io.Writer) { all += body; answer(body, w) }), Seed: seed, Stream: true,
				Levels: []Level{{1, 1}}, Requests: 5, Prompt: Length{uniform, 1, 50}, Reply: Length{lognormal, 20, 10},
			})
		})
		return all
	}
	first, again, other := bodies(1), bodies(1), bodies(2)
	if first != again || first == other || len(first) < 500 {
		t.Error("the seed doesn't decide what is asked")
	}
}

// Against the demo model over TCP: every fault is found and called by its name.
func TestFaults(t *testing.T) {
	server := httptest.NewServer(demo.New(demo.Options{}))
	defer server.Close()
	u, err := url.Parse(server.URL + "/v1")
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		fault   string
		whole   bool
		breach  Breach
		failure Failure
	}{
		"none":           {},
		"cut":            {fault: `"die_after":5`, breach: Torn},
		"ends silently":  {fault: `"end_after":5`, breach: Torn},
		"lost":           {fault: `"lose_at":5`, breach: Lost},
		"first lost":     {fault: `"lose_at":0`, breach: Lost},
		"last lost":      {fault: `"lose_at":31`, breach: Short},
		"repeated":       {fault: `"repeat_at":5`, breach: Repeated},
		"last repeated":  {fault: `"repeat_at":31`, breach: Repeated},
		"coalesced":      {fault: `"tokens_per_chunk":7`},
		"cut up":         {fault: `"split_utf8":true`},
		"error in it":    {fault: `"error_after":5`, failure: Failure{Status: 200, Code: "500"}},
		"error after":    {fault: `"lose_at":3,"error_after":5`, breach: Lost},
		"garbage":        {fault: `"garbage_after":5`, failure: Failure{Status: 200, Code: "not_json"}},
		"stall":          {fault: `"stall_after":5`, failure: Failure{Cause: CauseTimeout}},
		"refused":        {fault: `"status":429`, failure: Failure{Status: 429, Code: "429"}},
		"no JSON":        {fault: `"status":503,"error_body":"<html>"`, failure: Failure{Status: 503, Code: "http_503"}},
		"whole":          {whole: true},
		"whole, cut":     {whole: true, fault: `"die_after":5`, failure: Failure{Cause: CauseClosed}},
		"whole, short":   {whole: true, fault: `"end_after":5`, breach: Torn},
		"whole, lost":    {whole: true, fault: `"lose_at":5`, breach: Lost},
		"whole, garbage": {whole: true, fault: `"garbage_after":5`, failure: Failure{Status: 200, Code: "not_json"}},
	} {
		t.Run(name, func(t *testing.T) {
			timeout := time.Minute
			if tc.failure.Cause == CauseTimeout {
				timeout = 500 * time.Millisecond
			}
			s := only(t, run(t, Config{
				URL: u, Stream: !tc.whole, Verify: true, Reply: Fixed(32), Levels: []Level{{10, 10}}, Requests: 10, Timeout: timeout,
				Extra: []byte(`{"temperature":0,"demo":{` + tc.fault + `}}`),
			}))
			want := Ended{Sent: 10, OK: 10}
			switch {
			case tc.breach != "":
				want = Ended{Sent: 10, Broken: 10}
				if s.Breaches[tc.breach] != 10 {
					t.Errorf("breaches %v, want %s", s.Breaches, tc.breach)
				}
			case tc.failure != Failure{}:
				want = Ended{Sent: 10, Failed: 10}
				if len(s.Failures) != 1 || s.Failures[0] != (FailureCount{tc.failure, 10}) {
					t.Errorf("failures %+v, want %+v", s.Failures, tc.failure)
				}
			}
			if s.Requests != want {
				t.Errorf("%+v, want %+v; %+v, %v", s.Requests, want, s.Failures, s.Breaches)
			}
		})
	}
}

func TestNobodyThere(t *testing.T) {
	addr, release, err := port.Reserve()
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	s := only(t, run(t, Config{URL: &url.URL{Scheme: "http", Host: addr}, Levels: []Level{{1, 1}}, Requests: 2}))
	if len(s.Failures) != 1 || s.Failures[0].Cause != CauseRefused || s.Failures[0].Count != 2 {
		t.Errorf("%+v", s.Failures)
	}
}

func TestTLS(t *testing.T) {
	server := httptest.NewUnstartedServer(demo.New(demo.Options{}))
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	defer server.Close()
	u, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	s := only(t, run(t, Config{URL: u, Levels: []Level{{1, 1}}, Requests: 1})) // nobody vouches for it
	if len(s.Failures) != 1 || s.Failures[0].Cause != CauseTLS {
		t.Errorf("%+v", s.Failures)
	}
}

func TestConfigErrors(t *testing.T) {
	u := &url.URL{Scheme: "http", Host: "server.test"}
	level := []Level{{1, 1}}
	for name, c := range map[string]Config{
		"nothing":      {},
		"no time":      {URL: u, Model: "m", Levels: level},
		"not JSON":     {URL: u, Model: "m", Levels: level, Requests: 1, Extra: []byte("[]")},
		"our field":    {URL: u, Model: "m", Levels: level, Requests: 1, Extra: []byte(`{"stream":true}`)},
		"our demo":     {URL: u, Model: "m", Levels: level, Requests: 1, Verify: true, Extra: []byte(`{"demo":{"tokens":1}}`)},
		"demo is null": {URL: u, Model: "m", Levels: level, Requests: 1, Verify: true, Extra: []byte(`{"demo":null}`)},
	} {
		if _, err := Run(t.Context(), c, nil); err == nil || errors.Is(err, context.Canceled) {
			t.Errorf("%s: error is %v", name, err)
		}
	}
}
