package command

import (
	"context"
	"fmt"

	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// demoCommand is `ownllm demo`.
type demoCommand struct {
	Listen    string   `default:"127.0.0.1:9195" placeholder:"ADDR" help:"Address to serve at; port 0 picks a free one. Default: 127.0.0.1:9195."`
	DemoModel []string `placeholder:"ID" help:"Serve models of these names, instead of the one that is called demo. May be repeated."`
}

// Help shows examples.
func (demoCommand) Help() string {
	return `Serves the demo model by itself: an OpenAI-compatible backend with no model in it, for
load tests and fault tests. A request asks for length, pace and faults in a field "demo".

Examples:

    ownllm demo --listen 127.0.0.1:9195
    curl http://127.0.0.1:9195/v1/chat/completions -d '{"model":"demo","stream":true,
      "messages":[{"role":"user","content":"hi"}],"demo":{"tokens":64,"tokens_per_second":20,"numbered":true}}'
    curl -X PUT http://127.0.0.1:9195/demo/faults -d '{"die_after":5}'`
}

// Run serves until ctx ends.
func (c *demoCommand) Run(ctx context.Context, env *Environment) error {
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
	return demo.Serve(ctx, l, demo.Options{Models: models})
}
