package load

import (
	"math"
	"runtime"
	"time"
)

// Report is what a run has measured. Times are in milliseconds, shares from 0 to 1.
type Report struct {
	Target      Target        `json:"target"`
	StartedAt   time.Time     `json:"started_at"`
	Settings    Settings      `json:"settings"`
	Machine     Machine       `json:"machine"` // of the client
	Stages      []StageReport `json:"stages"`
	Interrupted bool          `json:"interrupted"`
}

// Target is what was asked.
type Target struct {
	URL   string `json:"url"`
	Model string `json:"model"`
}

// Settings are what was asked for.
type Settings struct {
	// Loop is closed or open.
	Loop     string  `json:"loop"`
	Arrivals string  `json:"arrivals,omitempty"` // poisson or even
	Stream   bool    `json:"stream"`
	Prompt   Length  `json:"prompt_tokens"`
	Reply    Length  `json:"max_tokens"`
	Duration float64 `json:"duration_seconds,omitempty"`
	Requests int     `json:"requests,omitempty"`
	WarmUp   float64 `json:"warmup_seconds"`
	Timeout  float64 `json:"timeout_seconds"`
	Verified bool    `json:"verified"` // the backend numbered its tokens
	Seed     uint64  `json:"seed"`
	SLO      *SLOms  `json:"slo,omitempty"`
}

// SLOms is an SLO in milliseconds; what is 0 wasn't asked for.
type SLOms struct {
	FirstToken float64 `json:"ttft_ms,omitempty"`
	InterToken float64 `json:"itl_ms,omitempty"`
	Whole      float64 `json:"e2e_ms,omitempty"`
}

// Machine is where the load came from.
type Machine struct {
	Cores    int    `json:"cores"`
	Platform string `json:"platform"`
}

// StageReport is one stage. Of Clients and Rate one is given.
type StageReport struct {
	Clients *Between `json:"clients,omitempty"`
	Rate    *Between `json:"rate,omitempty"`
	// Seconds is how long the window was.
	Seconds  float64 `json:"seconds"`
	Requests Ended   `json:"requests"`
	// RequestsPerSecond counts successes that ended in the window, TokensPerSecond tokens
	// that arrived in it.
	RequestsPerSecond float64 `json:"requests_per_second"`
	TokensPerSecond   float64 `json:"tokens_per_second"`
	// PromptTokens and CompletionTokens are the sums over successes, as the server counted.
	PromptTokens     int64 `json:"prompt_tokens"`
	CompletionTokens int64 `json:"completion_tokens"`
	// The latencies are of successes. FirstToken and InterToken are of streams; InterToken
	// is the time between two chunks that brought tokens.
	FirstToken *Latency         `json:"ttft_ms"`
	InterToken *Latency         `json:"itl_ms"`
	Whole      *Latency         `json:"e2e_ms"`
	Goodput    *Goodput         `json:"goodput,omitempty"`
	Failures   []FailureCount   `json:"failures"`
	Breaches   map[Breach]int64 `json:"integrity_breaches,omitempty"`
	Client     ClientHealth     `json:"client"`
	Series     []Point          `json:"series"`
}

// Level is the stage's level, whichever it is.
func (s *StageReport) Level() Level {
	if s.Rate != nil {
		return Level(*s.Rate)
	}
	return Level(*s.Clients)
}

// Between is a Level: the two are the same if it is steady.
type Between struct {
	From float64 `json:"from"`
	To   float64 `json:"to"`
}

// Ended are the requests that began in the window.
type Ended struct {
	Sent   int64 `json:"sent"`
	OK     int64 `json:"ok"`
	Failed int64 `json:"failed"`
	// Broken were said to be successes, and weren't whole.
	Broken int64 `json:"broken"`
}

// Latency sums up a histogram.
type Latency struct {
	Count int64   `json:"count"`
	Mean  float64 `json:"mean"`
	Min   float64 `json:"min"`
	P50   float64 `json:"p50"`
	P90   float64 `json:"p90"`
	P99   float64 `json:"p99"`
	P999  float64 `json:"p99_9"`
	Max   float64 `json:"max"`
	// Curve are pairs of a percentile and its value.
	Curve [][2]float64 `json:"curve,omitempty"`
}

// Goodput is what kept the SLO: how much in a second, and which share of all requests, the
// failed ones included.
type Goodput struct {
	RequestsPerSecond float64 `json:"requests_per_second"`
	Share             float64 `json:"share"`
}

// Failure is a way to fail: an error of the API, with status and code, or a cause in
// between. The status 200 is of an error in a stream.
type Failure struct {
	Status int    `json:"status,omitempty"`
	Code   string `json:"code,omitempty"`
	Cause  string `json:"cause,omitempty"`
}

// FailureCount says how often something failed in one way.
type FailureCount struct {
	Failure
	Count int64 `json:"count"`
}

// ClientHealth is how the client itself fared.
type ClientHealth struct {
	Cores      int     `json:"cores"`
	CPUSeconds float64 `json:"cpu_seconds"`
	CPUShare   float64 `json:"cpu_share"` // of all cores
	// Late is by how much its timers came late, and Launched by how much the requests of an
	// open loop were sent late.
	Late     *Latency `json:"late_ms"`
	Launched *Latency `json:"sent_late_ms,omitempty"`
	// Saturated says that the figures are the client's, or its machine's, as much as the
	// server's.
	Saturated bool `json:"saturated"`
}

// Point is a piece of a stage, from the point before it to Seconds after the start; the
// counts are per second.
type Point struct {
	Seconds    float64 `json:"seconds"`
	InFlight   int64   `json:"in_flight"`
	OK         float64 `json:"ok"`
	Failed     float64 `json:"failed"`
	Tokens     float64 `json:"tokens"`
	FirstToken *Tick   `json:"ttft_ms,omitempty"`
	Whole      *Tick   `json:"e2e_ms,omitempty"`
}

// Tick are the percentiles of a Point.
type Tick struct {
	P50 float64 `json:"p50"`
	P99 float64 `json:"p99"`
}

// round keeps three digits after the point.
func round(f float64) float64 { return math.Round(f*1e3) / 1e3 }

func milliseconds(d time.Duration) float64 { return round(d.Seconds() * 1e3) }

func newReport(c *Config) *Report {
	r := &Report{
		Target: Target{c.URL.Redacted(), c.Model}, StartedAt: time.Now().UTC().Truncate(time.Second),
		Settings: Settings{
			Loop: "closed", Stream: c.Stream, Prompt: c.Prompt, Reply: c.Reply, Duration: c.Duration.Seconds(),
			WarmUp: c.WarmUp.Seconds(), Timeout: c.Timeout.Seconds(), Verified: c.Verify, Seed: c.Seed,
		},
		Machine: Machine{runtime.GOMAXPROCS(0), runtime.GOOS + "/" + runtime.GOARCH},
		Stages:  []StageReport{},
	}
	if c.Duration == 0 {
		r.Settings.Requests = c.Requests
	}
	if c.Open {
		r.Settings.Loop, r.Settings.Arrivals = "open", "poisson"
		if c.Even {
			r.Settings.Arrivals = "even"
		}
	}
	if c.SLO.isSet() {
		r.Settings.SLO = &SLOms{milliseconds(c.SLO.FirstToken), milliseconds(c.SLO.InterToken), milliseconds(c.SLO.Whole)}
	}
	return r
}

// Sum is what all stages come to.
func (r *Report) Sum() (sum Ended) {
	for _, s := range r.Stages {
		sum.Sent += s.Requests.Sent
		sum.OK += s.Requests.OK
		sum.Failed += s.Requests.Failed
		sum.Broken += s.Requests.Broken
	}
	return sum
}
