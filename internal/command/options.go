package command

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/ownllm/ownllm/internal/secret"
	"github.com/ownllm/ownllm/internal/telemetry"
	"github.com/ownllm/ownllm/schemas"
)

// problems collects all that is wrong with the flags of a command, so that a person
// sees it at once.
type problems []error

func (p *problems) add(format string, args ...any) { *p = append(*p, fmt.Errorf(format, args...)) }

// err is nil if there were no problems.
func (p problems) err() error { return errors.Join(p...) }

// secret returns a secret that is given by an environment variable, or by a file,
// which wins; "-" is standard input. It is empty if neither is given.
func (env *Environment) secret(variable, file string) (secret.String, error) {
	var (
		b   []byte
		err error
	)
	switch file {
	case "":
		return secret.String(env.Getenv(variable)), nil
	case "-":
		b, err = io.ReadAll(io.LimitReader(env.Stdin, 64<<10))
	default:
		b, err = os.ReadFile(file)
	}
	if err != nil {
		return "", usageError{fmt.Errorf("read secret: %w", err)}
	}
	text := strings.TrimSpace(string(b))
	if text == "" {
		return "", usageError{fmt.Errorf("read secret: %s is empty", file)}
	}
	return secret.String(text), nil
}

// DataOptions say where `ownllm up` keeps its data.
type DataOptions struct {
	DataDir string `default:"~/.ownllm" placeholder:"DIR" help:"Data directory of ownllm up. Default: ~/.ownllm."`
}

// dir is the data directory as a path.
func (o DataOptions) dir(env *Environment) (string, error) {
	rest, ok := strings.CutPrefix(o.DataDir, "~")
	if !ok || rest != "" && !os.IsPathSeparator(rest[0]) {
		return o.DataDir, nil
	}
	home := env.Getenv("HOME")
	if home == "" {
		return "", usageError{errors.New("--data-dir: ~ stands for $HOME, and that is empty")}
	}
	return filepath.Join(home, rest), nil
}

// NATSOptions are the same for every role that connects to NATS.
type NATSOptions struct {
	NATSURL     secret.String `name:"nats-url" placeholder:"URL" help:"Address of NATS, nats://host:4222, tls://host:4222, ws://host or wss://host; of a cluster several, with commas."`
	NATSTLSCA   string        `name:"nats-tls-ca" placeholder:"FILE" help:"Certificates of the authorities that NATS's certificate is checked against; without it the system's."`
	NATSTLSCert string        `name:"nats-tls-cert" placeholder:"FILE" help:"Our certificate towards NATS."`
	NATSTLSKey  string        `name:"nats-tls-key" placeholder:"FILE" help:"Key of our certificate."`
}

func (o NATSOptions) check(p *problems) {
	for server := range strings.SplitSeq(o.NATSURL.Reveal(), ",") {
		u, err := url.Parse(strings.TrimSpace(server))
		if server != "" && (err != nil || u.Host == "" || u.Scheme != "nats" && u.Scheme != "tls" && u.Scheme != "ws" && u.Scheme != "wss") {
			p.add("--nats-url: an address doesn't look like nats://host:4222 or tls://host:4222") // it may hold a password
		}
	}
	pair(p, "--nats-tls-cert", o.NATSTLSCert, "--nats-tls-key", o.NATSTLSKey)
	exists(p, "--nats-tls-ca", o.NATSTLSCA)
	exists(p, "--nats-tls-cert", o.NATSTLSCert)
	exists(p, "--nats-tls-key", o.NATSTLSKey)
}

// TokenOptions say where the shared secret of edges, brokers and NATS is.
type TokenOptions struct {
	NATSTokenFile string `name:"nats-token-file" placeholder:"FILE" help:"File with the shared secret of NATS, - for standard input; or give the secret itself in $$OWNLLM_NATS_TOKEN."`
}

// token is the shared secret of NATS, which has to be given.
func (o TokenOptions) token(env *Environment) (secret.String, error) {
	token, err := env.secret("OWNLLM_NATS_TOKEN", o.NATSTokenFile)
	if err == nil && token == "" {
		err = usageError{errNoToken}
	}
	return token, err
}

var errNoToken = errors.New("the shared secret of NATS is needed, in $OWNLLM_NATS_TOKEN or by --nats-token-file")

// lacking is errNoToken if the secret isn't given at all.
func (o TokenOptions) lacking(env *Environment) error {
	if o.NATSTokenFile == "" && env.Getenv("OWNLLM_NATS_TOKEN") == "" {
		return errNoToken
	}
	return nil
}

// BusOptions are of the roles that are trusted with all of NATS.
type BusOptions struct {
	NATSOptions
	TokenOptions
}

func (o BusOptions) check(p *problems) {
	if o.NATSURL == "" {
		p.add("--nats-url is needed: the address of NATS, nats://host:4222 say")
	}
	o.NATSOptions.check(p)
}

// The bounds of --database-conns: below, a process would wait for itself.
const leastConns, mostConns = 4, 1000

// DatabaseOptions say where Postgres is.
type DatabaseOptions struct {
	DatabaseURL   secret.String `placeholder:"URL" help:"Address of Postgres, postgres://user@host/database; with ?sslmode=verify-full&sslrootcert=FILE by TLS. Give one with a password by the environment, not as a flag."`
	DatabaseConns int           `default:"8" placeholder:"N" help:"Connections to Postgres that this process may have. Default: 8."`
}

func (o DatabaseOptions) check(p *problems, needed bool) {
	u, err := url.Parse(o.DatabaseURL.Reveal())
	switch {
	case o.DatabaseURL == "" && needed:
		p.add("--database-url is needed: the address of Postgres, postgres://user@host/database say")
	case o.DatabaseURL != "" && (err != nil || u.Scheme != "postgres" && u.Scheme != "postgresql"):
		p.add("--database-url: the address doesn't look like postgres://user@host/database") // it may hold a password
	}
	if o.DatabaseConns < leastConns || o.DatabaseConns > mostConns {
		p.add("--database-conns: %d isn't from %d to %d", o.DatabaseConns, leastConns, mostConns)
	}
}

// DeadlineOptions bound how long a request may take, for a role that owns some.
type DeadlineOptions struct {
	ColdWait          time.Duration `default:"5s" placeholder:"DURATION" help:"How long a request waits for a model that isn't in memory, before it gets model_loading. Default: 5s."`
	FirstTokenTimeout time.Duration `default:"120s" placeholder:"DURATION" help:"Longest wait for the first token. Default: 120s."`
	IdleTimeout       time.Duration `default:"60s" placeholder:"DURATION" help:"Longest wait between two tokens. Default: 60s."`
	TotalTimeout      time.Duration `default:"10m" placeholder:"DURATION" help:"Longest time for a whole reply. Default: 10m."`
	DrainOptions
}

func (o DeadlineOptions) check(p *problems) {
	for _, d := range []struct {
		flag string
		d    time.Duration
		zero bool
	}{
		{"--cold-wait", o.ColdWait, true},
		{"--first-token-timeout", o.FirstTokenTimeout, false},
		{"--idle-timeout", o.IdleTimeout, false},
		{"--total-timeout", o.TotalTimeout, false},
	} {
		if d.d < 0 || d.d == 0 && !d.zero {
			p.add("%s: %s isn't a time to wait", d.flag, d.d)
		}
	}
	o.DrainOptions.check(p)
	if o.TotalTimeout > 0 && o.TotalTimeout < o.FirstTokenTimeout {
		p.add("--total-timeout: %s is shorter than --first-token-timeout, %s", o.TotalTimeout, o.FirstTokenTimeout)
	}
}

// DrainOptions bound the end of every command that runs until it is stopped.
type DrainOptions struct {
	DrainTimeout time.Duration `default:"30s" placeholder:"DURATION" help:"How long requests in flight may go on after the signal to stop. Default: 30s."`
}

func (o DrainOptions) check(p *problems) {
	if o.DrainTimeout < 0 {
		p.add("--drain-timeout: %s isn't a time to wait", o.DrainTimeout)
	}
}

// OpsOptions say where a role serves its operators.
type OpsOptions struct {
	OpsListen string `default:"127.0.0.1:9192" placeholder:"ADDR" help:"Address of /metrics, /healthz, /readyz and pprof; port 0 picks a free one. Default: 127.0.0.1:9192."`
}

func (o OpsOptions) check(p *problems) { address(p, "--ops-listen", o.OpsListen) }

// ListenOptions are the addresses of a role that serves the API.
type ListenOptions struct {
	Listen string `default:"127.0.0.1:9191" placeholder:"ADDR" help:"Address of the API; port 0 picks a free one. Default: 127.0.0.1:9191."`
	OpsOptions
}

func (o ListenOptions) check(p *problems) {
	address(p, "--listen", o.Listen)
	o.OpsOptions.check(p)
}

// LogOptions are of every command that runs until it is stopped.
type LogOptions struct {
	LogLevel  slog.Level `default:"info" placeholder:"LEVEL" help:"Least severe level to log: debug, info, warn or error. Default: info."`
	LogFormat string     `default:"text" enum:"text,json" placeholder:"FORMAT" help:"Form of the log: text or json. Default: text."`
}

// logger returns the logger, which writes to standard error.
func (o LogOptions) logger(env *Environment) (*slog.Logger, error) {
	return telemetry.NewLogger(env.Stderr, o.LogLevel, telemetry.Format(o.LogFormat))
}

// HTTPOptions shape the API of an edge.
type HTTPOptions struct {
	TLSCert      string         `name:"tls-cert" placeholder:"FILE" help:"Certificate of the API; with it, it speaks HTTPS."`
	TLSKey       string         `name:"tls-key" placeholder:"FILE" help:"Key of the certificate."`
	TrustedProxy []netip.Prefix `placeholder:"CIDR" help:"Network of a proxy whose X-Forwarded-For is believed. May be repeated."`
	BaseDomain   string         `placeholder:"DOMAIN" help:"On a host SLUG.DOMAIN only that tenant's keys are valid."`
	CORSOrigin   []string       `name:"cors-origin" placeholder:"ORIGIN" help:"Origin whose pages may call the API, https://app.example.com say, or * for all. May be repeated."`
	BodyLimit    ByteSize       `default:"32MB" placeholder:"SIZE" help:"Largest request body. Default: 32MB."`
	DrainDelay   time.Duration  `default:"0s" placeholder:"DURATION" help:"How long new requests are still served after the signal to stop, while /readyz says that the edge drains: as long as a load balancer in front needs to see that. Default: 0s."`
}

func (o HTTPOptions) check(p *problems) {
	pair(p, "--tls-cert", o.TLSCert, "--tls-key", o.TLSKey)
	exists(p, "--tls-cert", o.TLSCert)
	exists(p, "--tls-key", o.TLSKey)
	if strings.ContainsAny(o.BaseDomain, "/:* ") || strings.HasPrefix(o.BaseDomain, ".") {
		p.add("--base-domain: %q isn't a domain like ownllm.example.com", o.BaseDomain)
	}
	for _, origin := range o.CORSOrigin {
		u, err := url.Parse(origin)
		if origin != "*" && (err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" || u.Path != "" || u.RawQuery != "") {
			p.add("--cors-origin: %q is neither * nor like https://app.example.com", origin)
		}
	}
	if o.BodyLimit <= 0 {
		p.add("--body-limit: no request has a body of 0 bytes")
	}
	if o.DrainDelay < 0 {
		p.add("--drain-delay: %s isn't a time to wait", o.DrainDelay)
	}
}

// BackendOptions say which inference servers a worker offers, and what it can't
// learn from them.
type BackendOptions struct {
	Backend        []string     `placeholder:"URL" help:"Inference server, http://127.0.0.1:11434 say, or demo; without any, the usual local ports are probed. May be repeated."`
	BackendKeyFile string       `placeholder:"FILE" help:"File with the API key of the backends, - for standard input; or give the key itself in $$OWNLLM_BACKEND_KEY."`
	Slots          int          `placeholder:"N" help:"How many requests a backend runs at once; without it, what the backend says."`
	Model          []Offer      `placeholder:"ID[=ALIAS]" help:"Offer only this model, under this name. May be repeated."`
	Capability     []Capability `placeholder:"MODEL:NAMES" help:"What a model can do, qwen3:tools|vision say: completion, vision, embedding, tools, thinking. May be repeated."`
}

func (o BackendOptions) check(p *problems) {
	for _, backend := range o.Backend {
		u, err := url.Parse(backend)
		if backend != "demo" && (err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https") {
			p.add("--backend: %q is neither demo nor like http://127.0.0.1:11434", backend)
		}
	}
	if o.Slots < 0 {
		p.add("--slots: %d is less than none", o.Slots)
	}
	names := map[string]bool{}
	for _, m := range o.Model {
		if names[m.Alias] {
			p.add("--model: two models can't both be called %q", m.Alias)
		}
		names[m.Alias] = true
	}
}

// key is the API key of the backends, empty if none is given.
func (o BackendOptions) key(env *Environment) (secret.String, error) {
	return env.secret("OWNLLM_BACKEND_KEY", o.BackendKeyFile)
}

// checkID checks an argument that is an id. kong itself says when it is missing.
func checkID(id, prefix string) error {
	if id == "" {
		return nil
	}
	return schemas.ValidateID(id, prefix)
}

// pair reports a file that is given without the other.
func pair(p *problems, flag, file, otherFlag, otherFile string) {
	if (file == "") != (otherFile == "") {
		p.add("%s and %s go together", flag, otherFlag)
	}
}

// exists reports a file that is given and can't be read.
func exists(p *problems, flag, file string) {
	if file == "" {
		return
	}
	f, err := os.Open(file)
	if err != nil {
		p.add("%s: %w", flag, err)
		return
	}
	_ = f.Close()
}

// address reports an address that nothing can listen on.
func address(p *problems, flag, addr string) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		p.add("%s: %q isn't like 127.0.0.1:9191 or :9191", flag, addr)
		return
	}
	if n, err := strconv.Atoi(port); err != nil || n < 0 || n > 65535 {
		p.add("%s: %q isn't a port", flag, port)
	}
	if strings.ContainsAny(host, "/ ") {
		p.add("%s: %q isn't a host", flag, host)
	}
}
