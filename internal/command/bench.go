package command

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/internal/load"
	"github.com/ownllm/ownllm/internal/load/report"
	"github.com/ownllm/ownllm/internal/secret"
	"github.com/ownllm/ownllm/worker/demo"
)

// benchCommand is `ownllm bench`.
type benchCommand struct {
	URL     string        `name:"url" placeholder:"URL" help:"Base URL of an OpenAI-compatible API, http://127.0.0.1:9191/v1 say; without it, that of a running ownllm up is taken from its ready.json, with its key."`
	Key     secret.String `placeholder:"KEY" help:"API key. Others on this machine may see it as a flag: rather give it by the environment or --key-file."`
	KeyFile string        `placeholder:"FILE" help:"File with the API key, - for standard input."`
	Model   string        `placeholder:"MODEL" help:"Model to ask; without it, the first that the API lists."`
	Header  []string      `sep:"none" placeholder:"NAME:VALUE" help:"Further header of every request. May be repeated."`

	Clients  []load.Level  `placeholder:"N" help:"Closed loop of so many clients, each with one request at a time. Several with commas are stages one after the other: 1,8,32,128. A ramp: 1..128. Default: 8."`
	Rate     []load.Level  `placeholder:"N" help:"Open loop of so many requests a second, whether or not earlier ones are done; stages and ramps as with --clients."`
	Arrivals string        `default:"poisson" enum:"poisson,even" placeholder:"KIND" help:"How the requests of an open loop arrive: poisson, by chance, or even. Default: poisson."`
	Duration time.Duration `placeholder:"DURATION" help:"How long each stage is measured. Default: 10s."`
	Requests int           `placeholder:"N" help:"Measure so many requests in each stage, instead of a time."`
	Warmup   time.Duration `default:"1s" placeholder:"DURATION" help:"Load before each stage that isn't measured. Default: 1s."`

	PromptTokens load.Length `default:"16" placeholder:"LENGTH" help:"Length of prompts, in words that most tokenizers make one token of: 128, 100..800 (all alike), normal:400,100 or lognormal:400,300 (mean and standard deviation). Default: 16."`
	MaxTokens    load.Length `default:"64" placeholder:"LENGTH" help:"Most tokens of a reply, in the same notation. Default: 64."`
	Stream       bool        `default:"true" negatable:"" help:"Ask for streams; --no-stream asks for whole replies."`
	ExtraBody    string      `placeholder:"JSON" help:"Fields to lay into the body of every request: {\"temperature\":0,\"ignore_eos\":true} say."`
	Timeout      Span        `default:"2m" placeholder:"DURATION" help:"Longest time for a reply. Default: 2m."`
	MaxInFlight  int         `default:"10000" placeholder:"N" help:"Most requests in flight in an open loop; what arrives beyond them waits, and its wait counts. Default: 10000."`
	Seed         uint64      `placeholder:"N" help:"Makes prompts, lengths and arrivals of two runs the same."`

	SLO    Objective `name:"slo" placeholder:"BOUNDS" help:"What makes a reply good: ttft=500ms,itl=50ms,e2e=5s, or some of them; itl is the mean time between two chunks."`
	Verify string    `default:"auto" enum:"auto,on,off" placeholder:"WHEN" help:"Ask the demo model for numbered tokens and check that each comes once and in order: on, off, or auto, which is on if the model is called demo. Default: auto."`
	HTML   string    `name:"html" placeholder:"FILE" help:"Write a page with plots, which opens from disk."`
	DataOptions
	Output
}

// Help shows examples.
func (benchCommand) Help() string {
	return `Load tests an OpenAI-compatible API: OwnLLM or any other. It prints requests and tokens
per second, the time to the first token, between tokens and to the end, failures by code or
cause, and says so loudly if a stream isn't whole. Nothing is tried again.

In a closed loop (--clients) a slow server is asked less. In an open loop (--rate) latency is
counted from when a request was due, so nothing that users would wait for is left out.

Examples:

    ownllm bench
    ownllm bench --clients 1,8,32,128 --duration 30s --html report.html
    ownllm bench --rate 5..50 --prompt-tokens lognormal:400,300 --max-tokens 50..300 --slo ttft=500ms,itl=50ms
    OWNLLM_KEY=… ownllm bench --url https://llm.example.com/v1 --model llama-3.3-70b --requests 200
    ownllm demo & ownllm bench --url http://127.0.0.1:9195/v1 --json | jq .stages[0].ttft_ms`
}

// Objective is what makes a reply good. Its text form is ttft=500ms,itl=50ms,e2e=5s, or
// some of these.
type Objective load.SLO

// UnmarshalText implements encoding.TextUnmarshaler.
func (o *Objective) UnmarshalText(text []byte) error {
	var slo load.SLO
	bounds := map[string]*time.Duration{"ttft": &slo.FirstToken, "itl": &slo.InterToken, "e2e": &slo.Whole}
	for part := range strings.SplitSeq(string(text), ",") {
		name, value, _ := strings.Cut(part, "=")
		d, err := time.ParseDuration(value)
		bound := bounds[name]
		if err != nil || d <= 0 || bound == nil || *bound != 0 {
			return fmt.Errorf("%q isn't like ttft=500ms,itl=50ms,e2e=5s", text)
		}
		*bound = d
	}
	*o = Objective(slo)
	return nil
}

// Validate reports all problems of the flags at once.
func (c *benchCommand) Validate() error {
	var p problems
	if u, err := url.Parse(c.URL); c.URL != "" && (err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https") {
		p.add("--url: %q isn't like http://127.0.0.1:9191/v1", c.URL)
	}
	if len(c.Clients) > 0 && len(c.Rate) > 0 {
		p.add("--clients and --rate exclude each other: a loop is closed or open")
	}
	for _, l := range c.Clients {
		if !l.Whole() {
			p.add("--clients: there are no %s clients", l)
		}
	}
	switch {
	case c.Duration != 0 && c.Requests != 0:
		p.add("--duration and --requests exclude each other")
	case c.Duration < 0 || c.Duration != 0 && c.Duration < shortest:
		p.add("--duration: %s is too short, it takes %s", c.Duration, shortest)
	case c.Requests < 0:
		p.add("--requests: %d is less than none", c.Requests)
	}
	for _, l := range slices.Concat(c.Clients, c.Rate) {
		if l.From != l.To && c.Requests != 0 {
			p.add("--requests: the ramp %s needs a time, --duration", l)
		}
	}
	if c.Warmup < 0 {
		p.add("--warmup: %s isn't a time", c.Warmup)
	}
	if c.Timeout <= 0 {
		p.add("--timeout: no reply comes in 0s")
	}
	if c.MaxInFlight < 1 {
		p.add("--max-in-flight: %d is too few", c.MaxInFlight)
	}
	if err := load.CheckExtra(json.RawMessage(c.ExtraBody), c.Verify != "off"); err != nil {
		p.add("--extra-body: %w", err)
	}
	if _, err := c.header(); err != nil {
		p.add("--header: %w", err)
	}
	return p.err()
}

// shortest is the shortest stage that there is something to see in.
const shortest = 100 * time.Millisecond

func (c *benchCommand) header() (http.Header, error) {
	header := make(http.Header)
	for _, h := range c.Header {
		name, value, ok := strings.Cut(h, ":")
		if !ok || name == "" || strings.ContainsAny(h, "\r\n") || strings.ContainsAny(name, " \t") {
			return nil, fmt.Errorf("%q isn't NAME:VALUE", name)
		}
		header.Add(name, strings.TrimSpace(value))
	}
	return header, nil
}

// Run makes the load and prints what was measured.
func (c *benchCommand) Run(ctx context.Context, env *Environment) error {
	config, err := c.config(env)
	if err != nil {
		return err
	}
	if err := findModel(ctx, &config); err != nil {
		return err
	}
	config.Verify = c.Verify == "on" || c.Verify == "auto" && config.Model == demo.ModelID
	var page *os.File
	if c.HTML != "" { // before the load, so that a path that can't be written costs no time
		if page, err = os.Create(c.HTML); err != nil {
			return fmt.Errorf("--html: %w", err)
		}
		defer page.Close()
	}
	// Memory is cheap here, and the collector would be measured.
	defer debug.SetGCPercent(debug.SetGCPercent(400))
	status := newStatusLine(env.Stderr)
	result, err := load.Run(ctx, config, status.show)
	status.clear()
	if err != nil {
		return err
	}
	if page != nil {
		if err := errors.Join(report.HTML(page, result), page.Sync()); err != nil {
			return fmt.Errorf("--html: %w", err)
		}
	}
	if err := c.print(env, result, func(w io.Writer) error { return report.Text(w, result) }); err != nil {
		return err
	}
	return benchError(result)
}

// benchError is why a run didn't succeed, or nil.
func benchError(r *load.Report) error {
	sum := r.Sum()
	switch {
	case sum.Broken > 0:
		return fmt.Errorf("%d replies weren't whole", sum.Broken)
	case r.Interrupted:
		return context.Canceled
	case sum.OK == 0:
		return errors.New("no request succeeded")
	}
	return nil
}

// config is what load to make, but for the model.
func (c *benchCommand) config(env *Environment) (load.Config, error) {
	key, err := env.secret("OWNLLM_KEY", c.KeyFile)
	if err != nil {
		return load.Config{}, err
	}
	header, err := c.header()
	config := load.Config{
		Key: cmp.Or(c.Key, key), Header: header, Model: c.Model, Stream: c.Stream, Prompt: c.PromptTokens, Reply: c.MaxTokens,
		Extra: json.RawMessage(c.ExtraBody), Open: len(c.Rate) > 0, Even: c.Arrivals == "even", Levels: slices.Concat(c.Clients, c.Rate),
		Duration: c.Duration, Requests: c.Requests, WarmUp: c.Warmup, Timeout: time.Duration(c.Timeout),
		MaxInFlight: c.MaxInFlight, SLO: load.SLO(c.SLO), Seed: c.Seed,
	}
	if err != nil {
		return config, err
	}
	if c.KeyFile != "" {
		config.Key = key
	}
	if len(config.Levels) == 0 {
		config.Levels = []load.Level{{From: 8, To: 8}}
	}
	if config.Requests == 0 {
		config.Duration = cmp.Or(config.Duration, 10*time.Second)
	}
	base := c.URL
	if base == "" {
		ready, err := c.ready(env)
		if err != nil {
			return config, err
		}
		base = ready.BaseURL
		config.Key = cmp.Or(config.Key, secret.String(ready.APIKey))
		if config.Model == "" && len(ready.Models) > 0 {
			config.Model = ready.Models[0]
		}
	}
	if config.URL, err = url.Parse(base); err != nil {
		return config, usageError{fmt.Errorf("--url: %w", err)}
	}
	if strings.Trim(config.URL.Path, "/") == "" {
		config.URL.Path = "/v1"
	}
	return config, nil
}

// ready reads the ready.json of a running `ownllm up`.
func (c *benchCommand) ready(env *Environment) (adminapi.Ready, error) {
	dir, err := c.dir(env)
	if err != nil {
		return adminapi.Ready{}, err
	}
	ready, err := adminapi.ReadReady(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return ready, unreachableError{fmt.Errorf("no running OwnLLM found: there is no %s\n"+
			"Start one with `ownllm up`, or name an API by --url and OWNLLM_KEY.", filepath.Join(dir, adminapi.ReadyFile))}
	}
	return ready, err
}

// lookWait bounds the look at the list of models.
const lookWait = 10 * time.Second

// findModel sees that the API is there and takes the key, and chooses the model if none is
// named. An API without a list of models will do if one is.
func findModel(ctx context.Context, config *load.Config) error {
	ctx, cancel := context.WithTimeout(ctx, lookWait)
	defer cancel()
	list := config.URL.JoinPath("models")
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, list.String(), nil)
	if err != nil {
		return usageError{err}
	}
	req.Header = config.Header.Clone()
	if config.Key != "" {
		req.Header.Set("Authorization", "Bearer "+config.Key.Reveal())
	}
	transport := &http.Transport{DisableKeepAlives: true} // as the load: no proxy, no redirect
	resp, err := transport.RoundTrip(req)
	if err != nil {
		if errors.Is(err, context.Canceled) {
			return err
		}
		return unreachableError{fmt.Errorf("can't reach %s: %w", list.Redacted(), err)}
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden {
		return fmt.Errorf("%s answers with status %d: give its key in OWNLLM_KEY, or by --key-file", list.Redacted(), resp.StatusCode)
	}
	if config.Model != "" {
		return nil
	}
	var models struct {
		Data []struct {
			ID string `json:"id"`
		} `json:"data"`
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err == nil && resp.StatusCode == http.StatusOK {
		err = json.Unmarshal(body, &models)
	}
	if err != nil || len(models.Data) == 0 {
		return fmt.Errorf("%s lists no model (status %d): name one by --model", list.Redacted(), resp.StatusCode)
	}
	config.Model = models.Data[0].ID
	return nil
}

// statusLine shows on a terminal how the load goes, in one line that is written again and
// again.
type statusLine struct {
	w io.Writer // nil: not a terminal
}

func newStatusLine(w io.Writer) *statusLine {
	f, ok := w.(*os.File)
	if !ok {
		return &statusLine{}
	}
	if info, err := f.Stat(); err != nil || info.Mode()&os.ModeCharDevice == 0 {
		return &statusLine{}
	}
	return &statusLine{f}
}

func (s *statusLine) show(p load.Progress) {
	if s.w != nil {
		fmt.Fprintf(s.w, "\r\x1b[?7l\x1b[K%s\x1b[?7h", progress(p)) // cut off at the edge, not wrapped
	}
}

func (s *statusLine) clear() {
	if s.w != nil {
		fmt.Fprint(s.w, "\r\x1b[K")
	}
}

// progress is the line.
func progress(p load.Progress) string {
	var b strings.Builder
	if p.Stages > 1 {
		fmt.Fprintf(&b, "stage %d of %d, at %s  ", p.Stage, p.Stages, p.Level)
	}
	switch {
	case p.WarmUp:
		b.WriteString("warm-up ")
	case p.Whole > 0 && p.Elapsed > p.Whole:
		b.WriteString("waiting for the last replies  ")
	}
	b.WriteString(p.Elapsed.Round(time.Second).String())
	if p.Whole > 0 {
		fmt.Fprintf(&b, "/%s", p.Whole)
	}
	fmt.Fprintf(&b, "  %d in flight  %.0f requests/s  %.0f tokens/s", p.Point.InFlight, p.Point.OK, p.Point.Tokens)
	if t := p.Point.FirstToken; t != nil {
		fmt.Fprintf(&b, "  first token p50 %.1f ms, p99 %.1f ms", t.P50, t.P99)
	} else if t := p.Point.Whole; t != nil {
		fmt.Fprintf(&b, "  p50 %.1f ms, p99 %.1f ms", t.P50, t.P99)
	}
	if p.Failed > 0 {
		fmt.Fprintf(&b, "  %d failed", p.Failed)
	}
	if p.Broken > 0 {
		fmt.Fprintf(&b, "  %d BROKEN", p.Broken)
	}
	return b.String()
}
