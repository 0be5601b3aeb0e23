package command

import (
	"context"
	"fmt"
	"time"

	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// demoCommand is `ownllm demo`.
type demoCommand struct {
	Listen          string        `default:"127.0.0.1:9195" placeholder:"ADDR" help:"Address to serve at; port 0 picks a free one. Default: 127.0.0.1:9195."`
	DemoModel       []string      `placeholder:"ID" help:"Serve models of these names, instead of the one that is called demo. May be repeated."`
	TTFT            time.Duration `name:"ttft" placeholder:"DURATION" help:"Time to the first token. Default: none."`
	TokensPerSecond float64       `placeholder:"N" help:"Pace of each reply after that; without it, as fast as possible."`
	Tokens          int           `placeholder:"N" help:"Length of each reply; without it, as long as what there is to say."`
	Faults          string        `placeholder:"JSON" help:"Further wishes and faults: {\"jitter\":0.2,\"die_after\":50} say. A PUT /demo/faults replaces all of this; what a request asks for itself goes before it."`
}

// Help shows examples.
func (demoCommand) Help() string {
	return `Serves the demo model by itself: an OpenAI-compatible backend with no model in it, so that
a broker can be load tested without a GPU. How long, how fast and how wrong its replies are
is said by flags, while it runs by PUT /demo/faults, and for one request by a field "demo".

Examples:

    ownllm demo --ttft 200ms --tokens-per-second 40 --tokens 256
    curl http://127.0.0.1:9195/v1/chat/completions -d '{"model":"demo","stream":true,
      "messages":[{"role":"user","content":"hi"}],"demo":{"tokens":64,"tokens_per_second":20,"numbered":true}}'
    curl -X PUT http://127.0.0.1:9195/demo/faults -d '{"die_after":5,"times":10}'

` + demo.Help
}

// Validate reports all problems of the flags at once.
func (c *demoCommand) Validate() error {
	var p problems
	address(&p, "--listen", c.Listen)
	if _, err := c.faults(); err != nil {
		p.add("--faults, --ttft, --tokens-per-second, --tokens: %w", err)
	}
	return p.err()
}

// faults are what the flags ask for.
func (c *demoCommand) faults() (demo.Faults, error) {
	object := c.Faults
	if object == "" {
		object = "{}"
	}
	f, err := demo.ParseFaults([]byte(object))
	if err != nil {
		return f, err
	}
	if c.TTFT != 0 {
		f.FirstTokenMS = int(c.TTFT.Milliseconds())
	}
	if c.TokensPerSecond != 0 {
		f.TokensPerSecond = c.TokensPerSecond
	}
	if c.Tokens != 0 {
		f.Tokens = c.Tokens
	}
	return f, f.Validate()
}

// Run serves until ctx ends.
func (c *demoCommand) Run(ctx context.Context, env *Environment) error {
	faults, err := c.faults()
	if err != nil {
		return usageError{err}
	}
	l, err := listen("--listen", c.Listen)
	if err != nil {
		return err
	}
	var models []schemas.Model
	for _, id := range c.DemoModel {
		m := demo.DefaultModel()
		m.ID = id
		models = append(models, m)
	}
	fmt.Fprintf(env.Stdout, "demo backend at http://%s\n", l.Addr())
	return demo.Serve(ctx, l, demo.Options{Models: models, Faults: &faults})
}
