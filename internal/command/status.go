package command

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/ownllm/ownllm/internal/adminapi"
)

// clearScreen moves a terminal's cursor to the top and clears what is below it.
const clearScreen = "\x1b[H\x1b[2J"

// statusCommand is `ownllm status`.
type statusCommand struct {
	Watch    bool          `help:"Show it again and again, until interrupted."`
	Interval time.Duration `default:"2s" placeholder:"DURATION" help:"How often to look with --watch. Default: 2s."`
	AdminOptions
	Output
}

// Help shows examples.
func (statusCommand) Help() string {
	return "The exit code is 0 if the edge takes requests, and 3 if it, its Postgres or its NATS can't be reached.\n\n" +
		"Examples:\n\n    ownllm status\n    ownllm status --watch\n" +
		"    ownllm status --json | jq -r '.agents[] | select(.state != \"up\") | .name'\n" +
		"    OWNLLM_ADMIN_TOKEN=… ownllm status --server https://llm.example.com"
}

// Validate checks the flags.
func (c *statusCommand) Validate() error {
	if c.Interval <= 0 {
		return fmt.Errorf("--interval: %s isn't a time to wait", c.Interval)
	}
	return nil
}

// Run shows the status, once or until ctx is done.
func (c *statusCommand) Run(ctx context.Context, env *Environment) error {
	api, err := c.client(env)
	if err != nil {
		return err
	}
	defer api.Close()
	status, err := api.Status(ctx)
	if err != nil {
		return err
	}
	if !c.Watch {
		if err := c.show(env, api.Address(), status); err != nil {
			return err
		}
		return verdict(status)
	}
	ticker := time.NewTicker(c.Interval)
	defer ticker.Stop()
	for {
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil: // it may come back, so the watch goes on
			fmt.Fprintf(env.Stderr, "ownllm: %s\n", clean(err.Error(), true))
		default:
			if err := c.show(env, api.Address(), status); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		status, err = api.Status(ctx)
	}
}

func (c *statusCommand) show(env *Environment, address string, status adminapi.Status) error {
	if c.Watch && !c.JSON && isTerminal(env.Stdout) {
		if _, err := io.WriteString(env.Stdout, clearScreen); err != nil {
			return err
		}
	}
	return c.print(env, status, func(w io.Writer) error { return statusReport(w, address, status) })
}

// verdict is the error of a status that is bad enough for one.
func verdict(s adminapi.Status) error {
	switch {
	case s.Postgres == adminapi.DependencyDown && s.NATS == adminapi.DependencyDown:
		return unreachableError{errors.New("the edge can't reach Postgres and NATS")}
	case s.Postgres == adminapi.DependencyDown:
		return unreachableError{errors.New("the edge can't reach Postgres")}
	case s.NATS == adminapi.DependencyDown:
		return unreachableError{errors.New("the edge can't reach NATS")}
	case !s.Ready:
		return errors.New("the edge isn't ready")
	}
	return nil
}

func statusReport(w io.Writer, address string, s adminapi.Status) error {
	state := "ready"
	if !s.Ready {
		state = "not ready"
	}
	fmt.Fprintf(w, "OwnLLM %s at %s is %s (postgres %s, nats %s)\n\n", clean(s.Version, false), address, state,
		clean(s.Postgres, false), clean(s.NATS, false))
	if len(s.Agents) == 0 {
		_, err := fmt.Fprintln(w, "No agent has connected yet: start one with `ownllm worker` on a machine with a GPU.")
		return err
	}
	if err := agentTable(w, s.Agents...); err != nil {
		return err
	}
	var rows [][]string
	for _, a := range s.Agents {
		for _, m := range a.Models {
			rows = append(rows, []string{
				m.ID, cmp.Or(a.Name, string(a.ID)), string(m.State), m.Backend, number(m.ContextWindow),
				strconv.Itoa(m.Queued), m.Detail,
			})
		}
	}
	if len(rows) == 0 {
		return nil
	}
	fmt.Fprintln(w)
	return table(w, []string{"MODEL", "AGENT", "STATE", "BACKEND", "CONTEXT", "QUEUED", "DETAIL"}, rows)
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}
