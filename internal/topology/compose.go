package main

import (
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"regexp"

	"go.yaml.in/yaml/v3"
)

// compose is what is run of docker-compose.yml.
type compose struct {
	dir      string            // where it lies
	values   map[string]string // of its variables
	Services map[string]*service
}

// service is one of its services.
type service struct {
	Image       string
	Profiles    []string
	Entrypoint  []string
	Command     []string
	Environment map[string]string
	Volumes     []string
	DependsOn   map[string]struct{ Condition string } `yaml:"depends_on"`
	Healthcheck struct{ Test []string }
}

var variable = regexp.MustCompile(`\$(\$|\{(\w+)(?::-([^}]*))?[^}]*\})`)

// readCompose reads the file, with a secret for each of its variables that has no default.
func readCompose(path string) (*compose, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	c := &compose{dir: dir, values: make(map[string]string)}
	b = variable.ReplaceAllFunc(b, func(m []byte) []byte {
		parts := variable.FindSubmatch(m)
		name, standard := string(parts[2]), parts[3]
		switch {
		case name == "":
			return []byte("$")
		case standard != nil:
			return standard
		case c.values[name] == "":
			c.values[name] = "x" + rand.Text() // it begins with a letter, for all who read it
		}
		return []byte(c.values[name])
	})
	if err := yaml.Unmarshal(b, c); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}
