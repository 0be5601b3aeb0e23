package natsd_test

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/goleak"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/natsd"
	"github.com/ownllm/ownllm/internal/natstest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 10 * time.Second

// start starts a server that stops at the end of the test, unless it was before.
func start(t *testing.T, cfg natsd.Config) *natsd.Server {
	t.Helper()
	cfg.Log = natstest.Log
	if cfg.StoreDir == "" {
		cfg.StoreDir = t.TempDir()
	}
	s, err := natsd.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Stop)
	return s
}

func connect(t *testing.T, cfg bus.Config) *nats.Conn {
	t.Helper()
	nc, err := bus.Connect(cfg, natstest.Log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return nc
}

func TestTokenOpensTheServer(t *testing.T) {
	s := start(t, natsd.Config{Listen: "127.0.0.1:0", Token: "secret"})
	if strings.Contains(s.URL(), "secret") {
		t.Errorf("the address %s gives the token away", s.URL())
	}
	for _, cfg := range []bus.Config{
		{}, {Password: "secret"}, {User: bus.UserCore}, {User: bus.UserCore, Password: "other"}, {User: "admin", Password: "secret"},
		{User: "agt_1", Password: "secret"}, {User: "agt_1", Password: natstest.Credential("agt_1").Reveal()},
	} {
		cfg.URL = s.URL()
		if nc, err := bus.Connect(cfg, natstest.Log); err == nil {
			nc.Close()
			t.Errorf("%q with %q opens the server", cfg.User, cfg.Password)
		} else if !errors.Is(err, nats.ErrAuthorization) {
			t.Errorf("%q with %q gets %v", cfg.User, cfg.Password, err)
		}
	}
	over := connect(t, bus.Config{URL: s.URL(), User: bus.UserAgents, Password: "secret"})
	within := connect(t, bus.Config{URL: s.URL(), User: bus.UserAgents, Password: "secret", InProcess: s})
	elsewhere := connect(t, bus.Config{URL: s.URL(), User: bus.UserCore, Password: "secret"})
	sub, err := over.SubscribeSync("x")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(over.Flush(), elsewhere.Publish("x", []byte("foreign")), elsewhere.Flush(), within.Publish("x", []byte("hi"))); err != nil {
		t.Fatal(err)
	}
	if m, err := sub.NextMsg(patience); err != nil || string(m.Data) != "hi" {
		t.Errorf("got %v, %v", m, err)
	}
}

// A server without a token lets nobody in.
func TestNoTokenOpensNothing(t *testing.T) {
	s := start(t, natsd.Config{Listen: "127.0.0.1:0"})
	if nc, err := bus.Connect(bus.Config{URL: s.URL(), User: bus.UserCore}, natstest.Log); err == nil {
		nc.Close()
		t.Error("an empty password opens it")
	}
}

// A port that is taken is no reason not to serve.
func TestTakenPort(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := start(t, natsd.Config{Listen: l.Addr().String(), Token: "secret"})
	if s.Addr() == l.Addr().String() {
		t.Errorf("the server says that it listens on %s, too", s.Addr())
	}
	connect(t, bus.Config{URL: s.URL(), User: bus.UserCore, Password: "secret"})
}

func TestBadConfig(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, cfg := range map[string]natsd.Config{
		"no address":    {Listen: ""},
		"no port":       {Listen: "127.0.0.1"},
		"port name":     {Listen: "127.0.0.1:nats"},
		"large port":    {Listen: "127.0.0.1:65536"},
		"negative port": {Listen: "127.0.0.1:-1"},
		"websocket":     {Listen: "127.0.0.1:0", WebSocket: "127.0.0.1:ws"},
		"store":         {Listen: "127.0.0.1:0", StoreDir: file},
	} {
		cfg.Log = natstest.Log
		if cfg.StoreDir == "" {
			cfg.StoreDir = t.TempDir()
		}
		began := time.Now()
		if s, err := natsd.Start(t.Context(), cfg); err == nil {
			s.Stop()
			t.Errorf("%s: the server runs", name)
		}
		if took := time.Since(began); took > patience/2 {
			t.Errorf("%s: it took %s to find out", name, took)
		}
	}
}

// What is in a stream is there after a restart, and the server stops though it holds more
// than a handful of consumers, each of which would take 10 ms if it were on disk.
func TestStreamSurvives(t *testing.T) {
	cfg := natsd.Config{Listen: "127.0.0.1:0", StoreDir: t.TempDir(), Token: "secret"}
	first := start(t, cfg)
	js, err := jetstream.New(connect(t, bus.Config{URL: first.URL(), User: bus.UserCore, Password: "secret"}))
	if err != nil {
		t.Fatal(err)
	}
	_, err = js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}, Storage: jetstream.FileStorage})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.Publish(t.Context(), "s.1", []byte("kept")); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		_, err := js.CreateConsumer(t.Context(), "S", jetstream.ConsumerConfig{AckPolicy: jetstream.AckExplicitPolicy, MemoryStorage: true})
		if err != nil {
			t.Fatal(err)
		}
	}
	address := first.Addr()
	first.Stop()
	first.Stop() // once more does no harm
	if _, err := net.DialTimeout("tcp", address, time.Second); err == nil {
		t.Error("a server that was stopped still accepts connections")
	}
	second := start(t, cfg)
	js, err = jetstream.New(connect(t, bus.Config{URL: second.URL(), User: bus.UserCore, Password: "secret"}))
	if err != nil {
		t.Fatal(err)
	}
	stream, err := js.Stream(t.Context(), "S")
	if err != nil {
		t.Fatal(err)
	}
	if m, err := stream.GetMsg(t.Context(), 1); err != nil || string(m.Data) != "kept" {
		t.Errorf("got %v, %v", m, err)
	}
}

// A peer that is there, but silent, is noticed by its pings.
func TestBlackHole(t *testing.T) {
	s := start(t, natsd.Config{Listen: "127.0.0.1:0", Token: "secret"})
	conn, err := net.Dial("tcp", s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("CONNECT {\"user\":\"core\",\"pass\":\"secret\"}\r\n")); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := conn.SetReadDeadline(began.Add(patience)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4096)
	for err == nil { // pings come, and nobody answers
		_, err = conn.Read(buf)
	}
	if timeout := net.Error(nil); errors.As(err, &timeout) && timeout.Timeout() {
		t.Errorf("the server holds a silent connection for %s", time.Since(began))
	}
}
