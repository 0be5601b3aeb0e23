package command

import (
	"cmp"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"

	"github.com/ownllm/ownllm/schemas"
)

// version is set by the linker for a release: -ldflags "-X …/command.version=v1.2.3".
var version string

// Version is the version of this program: what the linker was told, else the
// version of the module, else "devel".
func Version() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "(devel)" {
		return cmp.Or(version, info.Main.Version, "devel")
	}
	return cmp.Or(version, "devel")
}

// versionCommand is `ownllm version`.
type versionCommand struct {
	Output
}

// Help shows examples.
func (versionCommand) Help() string {
	return "Examples:\n\n    ownllm version\n    ownllm version --json | jq -r .version"
}

// Run prints the version.
func (c *versionCommand) Run(env *Environment) error {
	v := struct {
		Version  string `json:"version"`
		Commit   string `json:"commit"`
		Go       string `json:"go"`
		Platform string `json:"platform"`
		Protocol int    `json:"protocol"`
	}{Version(), commit(), runtime.Version(), runtime.GOOS + "/" + runtime.GOARCH, schemas.ProtocolVersion}
	return c.print(env, v, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "ownllm %s (commit %s, %s, %s, bus protocol %d)\n",
			v.Version, cmp.Or(v.Commit, "unknown"), v.Go, v.Platform, v.Protocol)
		return err
	})
}

// commit is the commit that the program was built from, marked if there were
// changes on top of it, or empty if the build doesn't say.
func commit() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	var revision, mark string
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			revision = s.Value[:min(12, len(s.Value))]
		case s.Key == "vcs.modified" && s.Value == "true":
			mark = "+changes"
		}
	}
	if revision == "" {
		return ""
	}
	return revision + mark
}
