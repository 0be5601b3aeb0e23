package backend

import (
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"github.com/ownllm/ownllm/internal/secret"
)

// Config says where an inference server is, and what it can't tell itself.
type Config struct {
	// URL is the server's address, with or without /v1 and a trailing slash. Without a
	// scheme it is http.
	URL string
	// Key is the server's own API key, sent as a bearer token; or empty.
	Key secret.String
	// Slots is how many requests the server runs at once, 0 for what it tells itself.
	Slots int
	// Models, if it isn't empty, lists the models to offer: the server's own id, and
	// the id that clients use for it, which may be the same. A model that isn't listed
	// isn't offered. The operator's list is for all backends together, so a listed
	// model that this one doesn't have is no error.
	Models map[string]string
	// Capabilities states what models can do, by the server's id or the clients':
	// tools, vision, thinking, embedding, completion. They add to what the server
	// tells. A model with embedding, but without completion, doesn't chat.
	Capabilities map[string][]string
}

// CapabilityNames are the capabilities that an operator can state.
var CapabilityNames = []string{"completion", "vision", "embedding", "tools", "thinking"}

// check finds everything that is wrong with the configuration, and returns the
// server's address in its plain form.
func (c *Config) check() (base string, err error) {
	base, err = baseURL(c.URL)
	errs := []error{err}
	if c.Slots < 0 {
		errs = append(errs, fmt.Errorf("slots %d: must not be negative", c.Slots))
	}
	taken := map[string]string{}
	for id, public := range c.Models {
		if id == "" || public == "" {
			errs = append(errs, fmt.Errorf("model %q=%q: neither id may be empty", id, public))
		} else if other, ok := taken[public]; ok {
			first, second := min(id, other), max(id, other)
			errs = append(errs, fmt.Errorf("models %q and %q: both would be offered as %q", first, second, public))
		}
		taken[public] = id
	}
	for id, list := range c.Capabilities {
		for _, name := range list {
			if !slices.Contains(CapabilityNames, name) {
				errs = append(errs, fmt.Errorf("capability %q of model %q: must be one of %s", name, id, strings.Join(CapabilityNames, ", ")))
			}
		}
	}
	return base, errors.Join(errs...)
}

// baseURL brings an address into the form scheme://host[:port][/path].
func baseURL(s string) (string, error) {
	if s == "" {
		return "", errors.New("backend URL is empty")
	}
	if !strings.Contains(s, "://") {
		s = "http://" + s
	}
	u, err := url.Parse(s)
	if err != nil {
		// The error of url.Parse quotes the address, which may hold a password.
		return "", errors.New("backend URL can't be parsed: give scheme, host and port, as in http://127.0.0.1:11434")
	}
	switch {
	case u.User != nil:
		return "", errors.New("backend URL holds a user or password: give the backend's key by itself")
	case u.Scheme != "http" && u.Scheme != "https":
		return "", fmt.Errorf("backend URL %s: scheme must be http or https", u.Redacted())
	case u.Hostname() == "":
		return "", fmt.Errorf("backend URL %s: host is missing", u.Redacted())
	case u.RawQuery != "" || u.Fragment != "":
		return "", fmt.Errorf("backend URL %s://%s: no query and no fragment", u.Scheme, u.Host)
	}
	path := strings.TrimRight(u.EscapedPath(), "/")
	path = strings.TrimRight(strings.TrimSuffix(path, "/v1"), "/")
	return u.Scheme + "://" + u.Host + path, nil
}
