package command

import (
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"slices"
	"strings"

	"github.com/alecthomas/kong"
	"go.yaml.in/yaml/v3"
)

// ConfigOptions name the file that flags may stand in.
type ConfigOptions struct {
	Config string `placeholder:"FILE" help:"YAML file with a line for each flag, without its dashes: listen: :9191. Flags and environment go before it. One file may serve several roles; secrets stay in the environment or in files of their own."`
}

// settings find the values of flags that the command line doesn't give: in the
// environment, or else in the file that --config names. They note all that is wrong with
// either, so that it is said together with what the command itself finds.
type settings struct {
	env      *Environment
	file     map[string][]string // by the names of flags; nil: not read yet
	path     string
	problems problems
}

// Validate implements kong.Resolver.
func (*settings) Validate(*kong.Application) error { return nil }

// Resolve implements kong.Resolver.
func (s *settings) Resolve(line *kong.Context, parent *kong.Path, flag *kong.Flag) (any, error) {
	if flag.Name == "help" {
		return nil, nil
	}
	if value := s.env.Getenv(variable(flag.Name)); value != "" {
		return s.checked(flag, value, "$"+variable(flag.Name)), nil
	}
	i := slices.IndexFunc(parent.Flags, func(f *kong.Flag) bool { return f.Name == "config" })
	if i < 0 || flag.Name == "config" {
		return nil, nil
	}
	path, _ := line.FlagValue(parent.Flags[i]).(string)
	if path == "" {
		path = s.env.Getenv(variable("config"))
	}
	s.read(path)
	list, ok := s.file[flag.Name]
	if !ok {
		return nil, nil
	}
	where := s.path + ", " + flag.Name
	if len(list) != 1 && !flag.IsSlice() {
		s.problems.add("%s: there can be only one", where)
		return nil, nil
	}
	return s.checked(flag, kong.JoinEscaped(list, flag.Tag.Sep), where), nil
}

// checked returns the text of a flag's value, or nil if it isn't one.
func (s *settings) checked(flag *kong.Flag, text, where string) any {
	err := flag.Parse(kong.Scan().PushTyped(text, kong.FlagValueToken), reflect.New(flag.Target.Type()).Elem())
	if err == nil && flag.Enum != "" && !flag.EnumMap()[text] {
		err = fmt.Errorf("%q is none of %s", text, flag.Enum)
	}
	if err == nil {
		return text
	}
	s.problems.add("%s: %s", where, strings.TrimPrefix(err.Error(), flag.ShortSummary()+": "))
	return nil
}

// read reads the file once, if there is one.
func (s *settings) read(path string) {
	if s.file != nil {
		return
	}
	s.file, s.path = make(map[string][]string), path
	if path == "" {
		return
	}
	f, err := os.Open(path)
	if err != nil {
		s.problems.add("--config: %w", err)
		return
	}
	defer f.Close()
	var entries map[string]yaml.Node
	if err := yaml.NewDecoder(f).Decode(&entries); err != nil && !errors.Is(err, io.EOF) {
		s.problems.add("--config: %s isn't a list of flags: %w", s.path, err)
		return
	}
	known := configurable()
	names := make([]string, 0, len(entries))
	for name := range entries {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		node := entries[name]
		list, ok := values(&node)
		switch {
		case !known[name]:
			s.problems.add("--config: %s, line %d: there is no flag %q", s.path, node.Line, name)
		case !ok:
			s.problems.add("--config: %s, line %d: %s is neither a value nor a list of values", s.path, node.Line, name)
		default:
			s.file[name] = list
		}
	}
}

// values are what stands for a flag in the file: a value, as it is written there, or a list
// of them.
func values(node *yaml.Node) (list []string, ok bool) {
	each := []*yaml.Node{node}
	if node.Kind == yaml.SequenceNode {
		each = node.Content
	}
	for _, n := range each {
		if n.Kind != yaml.ScalarNode || n.Tag == "!!null" {
			return nil, false
		}
		list = append(list, n.Value)
	}
	return list, true
}

// configurable are the flags of all commands that have --config: those of one role may
// stand in the file of another.
func configurable() map[string]bool {
	known := make(map[string]bool)
	model, err := kong.New(&cli{})
	if err != nil {
		return known // it was built before
	}
	for _, command := range model.Model.Leaves(false) {
		if slices.ContainsFunc(command.Flags, func(f *kong.Flag) bool { return f.Name == "config" }) {
			for _, f := range command.Flags {
				known[f.Name] = f.Name != "config" && f.Name != "help"
			}
		}
	}
	return known
}
