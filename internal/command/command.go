// Package command is the command line of OwnLLM: one struct per command, each with
// a Run method that does the work or wires it together.
//
// # How commands are made
//
// A command is a field of cli (cli.go) and a struct in a file of its own. Its fields
// are its flags, its Help method holds examples, its Validate method reports all
// problems of its flags at once, and kong calls Run with whatever it asks for of
//
//	context.Context   done on the first interrupt; a second one ends the process
//	*Environment      the standard streams, the environment, secrets
//
// What Run returns decides the exit code: nil 0, a usageError 2, an unreachableError
// or an *adminapi.UnreachableError 3, anything else 1. Nothing but main exits.
//
// Every flag has the environment variable OWNLLM_<FLAG>, which a flag overrides; an
// empty variable is one that isn't set. The roles take a file, too (settings.go), which both
// override. Secrets have no flag, but an environment
// variable and a flag that names a file.
package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/alecthomas/kong"

	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/schemas"
)

// The exit codes.
const (
	ExitOK = 0
	// ExitFailed is for a command that was understood, but didn't succeed.
	ExitFailed = 1
	// ExitUsage is for a command line that makes no sense.
	ExitUsage = 2
	// ExitUnreachable is for a dependency that can't be reached.
	ExitUnreachable = 3
)

// Environment is what a command sees of the world.
type Environment struct {
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
	Getenv func(string) string
}

// usageError says that the command line makes no sense.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// unreachableError says that a dependency can't be reached.
type unreachableError struct{ error }

func (e unreachableError) Unwrap() error { return e.error }

// exited is the panic by which kong leaves the parser after printing a help text.
type exited int

// Main runs the command that args name, without the program's own name, and returns
// the exit code. It prints errors to stderr.
func Main(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer, getenv func(string) string) int {
	env := &Environment{stdin, stdout, stderr, getenv}
	parser, err := newParser(ctx, &cli{}, env)
	if err != nil {
		return env.fail(err)
	}
	if len(args) == 0 {
		parser.Stdout = stderr // nobody asked for the help text, so it is no result
		_, _, _ = parse(parser, []string{"--help"})
		return ExitUsage
	}
	command, done, err := parse(parser, args)
	switch {
	case err != nil:
		return env.fail(usageError{fmt.Errorf("%w\n%s", err, moreHelp(command, err))})
	case done:
		return ExitOK
	}
	if err := command.Run(); err != nil {
		return env.fail(err)
	}
	return ExitOK
}

// newParser builds the parser of a grammar, which is a *cli, or a part of one in a
// test.
func newParser(ctx context.Context, grammar any, env *Environment) (*parser, error) {
	s := &settings{env: env}
	k, err := kong.New(grammar,
		kong.Name("ownllm"),
		kong.Description("OwnLLM is a broker between OpenAI clients and the GPUs that you own."),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true}),
		kong.Writers(env.Stdout, env.Stderr),
		kong.Exit(func(code int) { panic(exited(code)) }),
		kong.ExplicitGroups(groups),
		kong.ValueFormatter(describe),
		kong.Resolvers(s),
		kong.Bind(env),
		kong.BindTo(ctx, (*context.Context)(nil)),
	)
	if err != nil {
		return nil, err
	}
	return &parser{k, s}, nil
}

// parser is kong's, with what it finds outside of the command line.
type parser struct {
	*kong.Kong
	settings *settings
}

// secretive is a command that takes secrets, which aren't flags, and tells what is wrong with
// them.
type secretive interface{ amiss(*Environment) error }

// problems are all that is wrong, with the settings, the flags, and the secrets.
func (p *parser) problems(command *kong.Context, err error) error {
	all := append(problems(nil), p.settings.problems...)
	if refused := (*kong.ParseError)(nil); errors.As(err, &refused) {
		command = refused.Context
	}
	if err != nil {
		all = append(all, err)
	}
	if command != nil && command.Error == nil && command.Selected() != nil {
		if c, ok := command.Selected().Target.Addr().Interface().(secretive); ok {
			if err := c.amiss(p.settings.env); err != nil {
				all = append(all, err)
			}
		}
	}
	return all.err()
}

// parse parses args. done says that a help text was asked for and printed.
func parse(parser *parser, args []string) (command *kong.Context, done bool, err error) {
	defer func() {
		switch p := recover().(type) {
		case nil:
		case exited:
			done = true
		default:
			panic(p)
		}
	}()
	command, err = parser.Parse(args)
	return command, false, parser.problems(command, err)
}

// variable is the name of a flag's environment variable. kong has its own way for
// these, but that reads the process's environment, and ours is an argument of Main.
func variable(flag string) string {
	return "OWNLLM_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// describe is the help text of a flag or an argument.
func describe(value *kong.Value) string {
	if value.Flag == nil || value.Name == "help" {
		return value.Help
	}
	return strings.TrimSuffix(value.Help, ".") + " ($" + variable(value.Name) + ")."
}

// moreHelp says where to read on after an error of the parser.
func moreHelp(command *kong.Context, err error) string {
	path := "ownllm"
	if p := (*kong.ParseError)(nil); errors.As(err, &p) {
		command = p.Context
	}
	if command != nil && command.Selected() != nil {
		path = command.Selected().FullPath()
	}
	return fmt.Sprintf("Run %q for more.", path+" --help")
}

// fail prints an error for people and returns its exit code.
func (env *Environment) fail(err error) int {
	text, code := err.Error(), ExitFailed
	var (
		usage   usageError
		away    unreachableError
		noAdmin *adminapi.UnreachableError
		refused *schemas.Error
	)
	switch {
	case errors.As(err, &usage):
		code = ExitUsage
	case errors.As(err, &away):
		code = ExitUnreachable
	case errors.As(err, &noAdmin):
		code = ExitUnreachable
		text += "\nStart it with `ownllm up`, or name a running edge by --server or OWNLLM_SERVER."
	case errors.As(err, &refused):
		text = explain(refused)
	case errors.Is(err, context.Canceled):
		text = "interrupted"
	}
	fmt.Fprintf(env.Stderr, "ownllm: %s\n", clean(text, true))
	return code
}

// explain is the text for a request that the edge refused.
func explain(e *schemas.Error) string {
	details := string(e.Code)
	if e.Param != "" {
		details += ", " + e.Param
	}
	text := fmt.Sprintf("%s (%s)", e.Message, details)
	switch {
	case e.Code.Info().Status == 401:
		text += "\nThe admin token comes from OWNLLM_ADMIN_TOKEN, from --admin-token-file, or from the ready.json of a running `ownllm up`."
	case e.RetryAfter > 0:
		text += fmt.Sprintf("\nTry again in %s.", e.RetryAfter.Round(time.Second))
	}
	return text
}
