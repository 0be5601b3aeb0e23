package backend

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/tidwall/gjson"
)

// DefaultURLs are the usual local addresses of inference servers: Ollama, vLLM,
// llama.cpp, LM Studio and SGLang.
var DefaultURLs = []string{
	"http://127.0.0.1:11434",
	"http://127.0.0.1:8000",
	"http://127.0.0.1:8080",
	"http://127.0.0.1:1234",
	"http://127.0.0.1:30000",
}

const (
	// probeTimeout bounds all questions of one probe, discoverTimeout those of
	// Discover, which asks at addresses where mostly nobody is.
	probeTimeout    = 10 * time.Second
	discoverTimeout = 1500 * time.Millisecond
)

// Probe finds out what kind of server is at the address. A server that is still
// loading its model is found too, if it answers at all; vLLM doesn't until it is
// done. The error says what was asked and what came back.
func Probe(ctx context.Context, c Config) (*Backend, error) {
	base, err := c.check()
	if err != nil {
		return nil, fmt.Errorf("backend: %w", err)
	}
	b := &Backend{
		base:      base,
		config:    c,
		upstream:  map[string]string{},
		transport: newTransport(),
		known:     map[string]*known{},
		loads:     map[string]*load{},
		shows:     map[string]ollamaShow{},
		props:     map[string]llamaProps{},
		continues: map[string]continuing{},
	}
	for id, public := range c.Models {
		b.upstream[public] = id
	}
	limited, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	if err := b.identify(limited); err != nil {
		b.Close()
		return nil, fmt.Errorf("probe %s: %w", base, because(ctx, err))
	}
	return b, nil
}

// identify asks one question after the other until the answer gives the server away.
// The most telling come first: llama.cpp and LM Studio imitate parts of others.
func (b *Backend) identify(ctx context.Context) error {
	var tried []string
	ask := func(path string) (answer, gjson.Result, error) {
		a, err := b.do(ctx, http.MethodGet, path, nil)
		if err != nil {
			return a, gjson.Result{}, err
		}
		tried = append(tried, fmt.Sprintf("GET %s (%d)", path, a.status))
		if !gjson.ValidBytes(a.body) {
			return a, gjson.Result{}, nil
		}
		return a, gjson.ParseBytes(a.body), nil
	}

	_, reply, err := ask("/api/demo")
	if err != nil {
		// Nobody there: no further question would help.
		return err
	}
	if reply.Get("demo").Bool() {
		b.kind = Demo
		return nil
	}
	a, _, err := ask("/")
	if err != nil {
		return err
	}
	if a.status == http.StatusOK && strings.Contains(string(a.body), "Ollama is running") {
		b.kind = Ollama
		return nil
	}
	if a, reply, err = ask("/props"); err != nil {
		return err
	}
	c := readComplaint(a.status, a.body)
	if reply.Get("default_generation_settings").Exists() || reply.Get("role").String() == "router" ||
		a.status == http.StatusServiceUnavailable && c.loading() {
		b.kind = LlamaCPP
		return nil
	}
	if _, reply, err = ask("/api/version"); err != nil {
		return err
	}
	// An Ollama behind a proxy that answers / itself.
	if reply.Get("version").Type == gjson.String {
		if _, reply, err = ask("/api/tags"); err != nil {
			return err
		}
		if reply.Get("models").IsArray() {
			b.kind = Ollama
			return nil
		}
	}
	if a, reply, err = ask("/v1/models"); err != nil {
		return err
	}
	switch {
	case a.status == http.StatusUnauthorized || a.status == http.StatusForbidden:
		return fmt.Errorf("the server refuses the key (status %d): give its API key as OWNLLM_BACKEND_KEY", a.status)
	case a.status != http.StatusOK || !reply.Get("data").IsArray():
		return fmt.Errorf("no inference server answers there: tried %s", strings.Join(tried, ", "))
	}
	switch reply.Get("data.0.owned_by").String() {
	case "vllm":
		b.kind = VLLM
		return nil
	case "llamacpp":
		b.kind = LlamaCPP
		return nil
	}
	b.kind = OpenAI
	if _, reply, err = ask("/api/v0/models"); err == nil {
		b.lmStudio = reply.Get("data.0.state").Exists() && reply.Get("data.0.type").Exists()
	}
	return nil
}

// Discover probes the usual local addresses, all at once and for a second and a half
// at most, and returns the servers that it found, in the order of DefaultURLs. The
// configuration is for each of them; its URL is ignored.
func Discover(ctx context.Context, c Config) []*Backend {
	return discover(ctx, c, DefaultURLs)
}

var errTooSlow = errors.New("no answer in time")

func discover(ctx context.Context, c Config, urls []string) []*Backend {
	ctx, cancel := context.WithTimeoutCause(ctx, discoverTimeout, errTooSlow)
	defer cancel()
	all := make([]*Backend, len(urls))
	var group sync.WaitGroup
	for i, url := range urls {
		group.Go(func() {
			c := c
			c.URL = url
			if b, err := Probe(ctx, c); err == nil {
				all[i] = b
			}
		})
	}
	group.Wait()
	found := all[:0]
	for _, b := range all {
		if b != nil {
			found = append(found, b)
		}
	}
	return found
}
