// Package load makes load for an OpenAI-compatible API, and measures how it copes. It is
// what `ownllm bench` runs.
//
// # Closed and open
//
// In a closed loop each of so many clients sends a request, reads its whole reply, and
// sends the next. So a server that slows down is asked less, and what its users would have
// waited meanwhile is in no figure. In an open loop requests arrive at a rate, whether or
// not earlier ones are done, and each is measured from the instant at which it was meant to
// be sent, not from when a client was free to send it. So a server that stops for a second
// shows a second, in the requests of that second: nothing is omitted in coordination with
// the server.
//
// # What is counted
//
// A stage has a warm-up, which is not measured, and a window. Latencies, outcomes and
// goodput's share are those of the requests that began in the window, however late they
// end; rates per second count what came to its end, and tokens that arrived, in the window.
// So the long replies at the window's edge neither vanish nor stretch the time that a rate
// is taken over. A stage of a number of requests has a window that lasts until the last of
// them has ended.
//
// Nothing is tried again: what fails, failed.
//
// # The client
//
// It shares its machine with what it measures often enough, so it is frugal: HTTP/1.1 by
// hand over one connection for each request in flight, one goroutine for it, one look at
// the clock for each read, and no JSON decoder for the usual chunk. It takes no proxy from
// the environment and follows no redirect. How much CPU it used, and how late its own
// timers came, is in the report, because latencies that the client itself made are worth
// nothing.
package load

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/ownllm/ownllm/internal/secret"
)

// Config says what load to make. All but URL, Model and Levels may be zero.
type Config struct {
	// URL is the base of the API, http://127.0.0.1:9191/v1 say.
	URL *url.URL
	Key secret.String
	// Keys, if there are any, stand in for Key: each request has one of them, by chance.
	Keys []secret.String
	// Header is added to every request.
	Header http.Header
	Model  string
	Stream bool
	// Prompt and Reply are the lengths of prompts and of replies, in tokens. The reply's is
	// the request's max_tokens.
	Prompt, Reply Length
	// Extra is laid into the body of every request, a JSON object without what this package
	// sets itself: see CheckExtra.
	Extra json.RawMessage
	// Open makes Levels requests a second instead of clients.
	Open bool
	// Even makes the requests of an open loop come at even intervals, not by chance.
	Even bool
	// Levels are the stages, one after the other.
	Levels []Level
	// Duration is that of each stage's window; if it is 0, Requests are sent instead.
	Duration time.Duration
	Requests int
	WarmUp   time.Duration
	// Timeout bounds each reply, from its request to its end; 0 stands for 2 minutes.
	Timeout time.Duration
	// MaxInFlight bounds the requests in flight of an open loop; 0 stands for 10,000. What
	// arrives beyond that waits here, and its wait counts.
	MaxInFlight int
	SLO         SLO
	// Verify asks the backend, which must be the demo model, for numbered tokens, and checks
	// that each comes once and in order.
	Verify bool
	// Seed makes the lengths, prompts and arrivals of two runs the same.
	Seed uint64
	// Dial connects to the API, if it isn't to be TCP, or TLS over it.
	Dial func(context.Context) (net.Conn, error)
}

// SLO is what a reply must keep to be good. What is 0 isn't asked for.
type SLO struct {
	// FirstToken bounds the time to the first token, InterToken the mean time between two
	// chunks of a reply, Whole the time to the end.
	FirstToken, InterToken, Whole time.Duration
}

func (s SLO) isSet() bool { return s != SLO{} }

// The defaults of a Config.
const (
	defaultTimeout     = 2 * time.Minute
	defaultMaxInFlight = 10_000
)

func (c *Config) setDefaults() error {
	switch {
	case c.URL == nil || c.Model == "" || len(c.Levels) == 0:
		return errors.New("load: URL, Model and Levels are needed")
	case c.Duration <= 0 && c.Requests <= 0:
		return errors.New("load: either Duration or Requests is needed")
	}
	if c.Timeout == 0 {
		c.Timeout = defaultTimeout
	}
	if c.MaxInFlight == 0 {
		c.MaxInFlight = defaultMaxInFlight
	}
	if c.Prompt == (Length{}) {
		c.Prompt = Fixed(16)
	}
	if c.Reply == (Length{}) {
		c.Reply = Fixed(64)
	}
	return CheckExtra(c.Extra, c.Verify)
}

// CheckExtra returns an error for an Extra that isn't a JSON object, or that sets what the
// package sets itself.
func CheckExtra(extra json.RawMessage, verify bool) error {
	if len(extra) == 0 {
		return nil
	}
	var fields map[string]json.RawMessage
	if json.Unmarshal(extra, &fields) != nil || fields == nil {
		return errors.New("it isn't a JSON object")
	}
	for _, name := range []string{"model", "messages", "max_tokens", "stream", "stream_options"} {
		if _, ok := fields[name]; ok {
			return fmt.Errorf("%s has a flag of its own", name)
		}
	}
	demo, ok := fields["demo"]
	if !ok || !verify {
		return nil
	}
	var inner map[string]json.RawMessage
	if json.Unmarshal(demo, &inner) != nil || inner == nil {
		return errors.New("demo isn't a JSON object")
	}
	for _, name := range []string{"numbered", "tokens", "text", "echo"} {
		if _, ok := inner[name]; ok {
			return fmt.Errorf("demo.%s can't be set while tokens are verified", name)
		}
	}
	return nil
}

// Progress is what is known while a stage runs.
type Progress struct {
	Level Level
	// Stage is the stage's number, from 1, of Stages.
	Stage, Stages int
	WarmUp        bool
	// Elapsed is the time since the warm-up or the window began, and Whole how long that
	// lasts, 0 if it depends on the requests.
	Elapsed, Whole time.Duration
	Point          Point
	OK, Failed     int64
	Broken         int64
}

// Run makes the load and returns what was measured. Where ctx ends before, so do requests in
// flight, which then count for nothing, and the report has what was measured until then and
// is marked as interrupted. The error is of a Config that can't work. look, if not nil, is
// called a few times a second, never by two goroutines at once.
func Run(ctx context.Context, c Config, look func(Progress)) (*Report, error) {
	if err := c.setDefaults(); err != nil {
		return nil, err
	}
	report := newReport(&c)
	text := newProse(c.Seed)
	for i, level := range c.Levels {
		s := newStage(&c, level, text)
		s.number = i + 1
		if look == nil {
			look = func(Progress) {}
		}
		s.look = look
		result, measured := s.run(ctx)
		if measured {
			report.Stages = append(report.Stages, result)
		}
		if ctx.Err() != nil {
			report.Interrupted = true
			break
		}
	}
	return report, nil
}

// newRand returns a source that gives the same for the same seed and stream.
func newRand(seed, stream uint64) *rand.Rand {
	return rand.New(rand.NewPCG(seed, stream)) //nolint:gosec // G404: nobody gains by guessing the load
}

// words make up the prompts. Each is one token for most tokenizers, with the space before it.
var words = strings.Fields(`the time year people way day man thing woman life child world school state family student
	group country problem hand part place case week company system program question work number night point home water
	room mother area money story fact month lot right study book eye job word business issue side kind head house
	service friend father power hour game line end member law car city name team minute idea body back parent face`)

// prose is a long text of which prompts are cut.
type prose struct {
	text  string
	start []int // of each word's space
}

func newProse(seed uint64) *prose {
	const length = 1 << 14
	var b strings.Builder
	p := &prose{start: make([]int, 0, length)}
	rng := newRand(seed, 0)
	for range length {
		p.start = append(p.start, b.Len())
		b.WriteByte(' ')
		b.WriteString(words[rng.IntN(len(words))])
	}
	p.text = b.String()
	return p
}

// append appends n words from a random place.
func (p *prose) append(dst []byte, n int, rng *rand.Rand) []byte {
	for n > 0 {
		from := rng.IntN(len(p.start))
		to := min(from+n, len(p.start))
		n -= to - from
		end := len(p.text)
		if to < len(p.start) {
			end = p.start[to]
		}
		dst = append(dst, p.text[p.start[from]:end]...)
	}
	return dst
}
