// Package natsd runs the embedded nats-server of `ownllm up`. It is the only
// package that imports nats-server.
package natsd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/ownllm/ownllm/broker/access"
)

// Config says how the embedded server runs.
type Config struct {
	// Listen is the address for workers and publishers, "127.0.0.1:4222". Port 0 takes
	// a free one.
	Listen string
	// StoreDir is the folder of JetStream.
	StoreDir string
	// WebSocket is the address for workers that come by ws://, "127.0.0.1:9196". Port 0
	// takes a free one; without an address there is none.
	WebSocket string
	// Token is the shared secret of edges and brokers, the password of the system users.
	Token string
	// Directory knows the credentials of agents and publishers; nil lets none in.
	Directory access.Directory
	// Log gets what the server has to say.
	Log *slog.Logger
}

// Server is a running nats-server with JetStream. It provides in-process
// connections (nats.InProcessServer), which skip the network.
type Server struct {
	srv *server.Server
}

// The dead peer of a black-holed connection is noticed after about three seconds:
// two pings, a second apart, that nobody answers.
const (
	pingInterval = time.Second
	maxPingsOut  = 2
)

// Start runs a server and returns once it accepts connections. If the port is
// taken, it takes a free one.
func Start(ctx context.Context, cfg Config) (*Server, error) {
	host, portText, err := net.SplitHostPort(cfg.Listen)
	if err != nil {
		return nil, fmt.Errorf("nats listen address %q: %w", cfg.Listen, err)
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("nats listen address %q: %w", cfg.Listen, err)
	}
	if port != 0 && taken(cfg.Listen) {
		cfg.Log.Warn("nats port is taken, another free one is used", "address", cfg.Listen)
		port = 0
	}
	log := logger{cfg.Log.With("component", "nats"), new(atomic.Pointer[string])}
	door := &door{token: cfg.Token, directory: cfg.Directory, log: log.log}
	opts := &server.Options{
		ServerName:   "ownllm",
		Host:         host,
		Port:         int(port),
		JetStream:    true,
		StoreDir:     cfg.StoreDir,
		NoSigs:       true,
		PingInterval: pingInterval,
		MaxPingsOut:  maxPingsOut,
		AuthTimeout:  access.AuthTimeout.Seconds(),
		// The default of 1,000 consumers for a stream is a few hundred agents.
		JetStreamLimits:            server.JSLimitOpts{DefaultMaxConsumers: -1},
		CustomClientAuthentication: door,
	}
	if err := opts.ProcessConfigString(access.Accounts(cfg.Token)); err != nil {
		return nil, fmt.Errorf("embedded nats-server: %w", err)
	}
	if port == 0 {
		opts.Port = server.RANDOM_PORT
	}
	if err := webSocket(opts, cfg.WebSocket); err != nil {
		return nil, err
	}
	srv, err := server.NewServer(opts)
	if err != nil {
		return nil, fmt.Errorf("embedded nats-server: %w", err)
	}
	door.srv = srv
	srv.SetLoggerV2(log, false, false, false)
	srv.Start()
	if reason := log.fatal.Load(); reason != nil {
		srv.Shutdown()
		return nil, fmt.Errorf("embedded nats-server: %s", *reason)
	}
	deadline := 20 * time.Second
	if d, ok := ctx.Deadline(); ok {
		deadline = min(deadline, time.Until(d))
	}
	if !srv.ReadyForConnections(deadline) {
		srv.Shutdown()
		return nil, errors.New("embedded nats-server didn't become ready")
	}
	if !srv.JetStreamEnabled() {
		srv.Shutdown()
		return nil, fmt.Errorf("embedded nats-server has no JetStream; is %s writable?", cfg.StoreDir)
	}
	return &Server{srv}, nil
}

// webSocket sets where WebSocket connections are taken. TLS is for the proxy in front.
func webSocket(opts *server.Options, listen string) error {
	if listen == "" {
		return nil
	}
	host, portText, err := net.SplitHostPort(listen)
	if err != nil {
		return fmt.Errorf("nats websocket address %q: %w", listen, err)
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil {
		return fmt.Errorf("nats websocket address %q: %w", listen, err)
	}
	opts.Websocket = server.WebsocketOpts{Host: host, Port: int(port), NoTLS: true}
	if port == 0 {
		opts.Websocket.Port = server.RANDOM_PORT
	}
	return nil
}

func taken(addr string) bool {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return true
	}
	_ = l.Close()
	return false
}

// URL is the address for clients, without credentials.
func (s *Server) URL() string { return s.srv.ClientURL() }

// Addr is the address that the server listens on.
func (s *Server) Addr() string { return s.srv.Addr().String() }

// WebSocketURL is the address for clients that come by WebSocket, empty without one.
func (s *Server) WebSocketURL() string { return s.srv.WebsocketURL() }

// InProcessConn implements nats.InProcessConnProvider.
func (s *Server) InProcessConn() (net.Conn, error) { return s.srv.InProcessConn() }

// Stop shuts the server down and waits until it has.
func (s *Server) Stop() {
	s.srv.Shutdown()
	s.srv.WaitForShutdown()
}

// logger writes the server's log lines to slog. Its notices are many and are meant
// for operators of NATS, so they are debug here.
type logger struct {
	log   *slog.Logger
	fatal *atomic.Pointer[string] // why the server can't run, if it can't
}

func (l logger) Noticef(format string, v ...any) { l.log.Debug(fmt.Sprintf(format, v...)) }
func (l logger) Warnf(format string, v ...any)   { l.log.Warn(fmt.Sprintf(format, v...)) }
func (l logger) Debugf(format string, v ...any)  { l.log.Debug(fmt.Sprintf(format, v...)) }
func (l logger) Tracef(string, ...any)           {}

// Errorf is for what went wrong in the server. A worker that pulls from a new consumer before
// its connection is allowed to is no such thing: it is told no, and connects anew. Whom the
// door didn't let in it has logged itself, without what the client says of itself, which may
// be a secret.
func (l logger) Errorf(format string, v ...any) {
	text := fmt.Sprintf(format, v...)
	if strings.Contains(text, "authentication error - ") {
		return
	}
	if strings.Contains(text, `Publish Violation - Subject "$JS.API.CONSUMER.MSG.NEXT.`) {
		l.log.Debug(text)
		return
	}
	l.log.Error(text)
}

// Fatalf notes what would end a nats-server that runs by itself.
func (l logger) Fatalf(format string, v ...any) {
	reason := fmt.Sprintf(format, v...)
	l.fatal.Store(&reason)
}
