// Package sentrytest is the receiving end of Sentry, for tests: it takes envelopes as a
// server of Sentry does, and shows what came.
package sentrytest

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
)

const (
	project = "42"
	key     = "public-key-of-the-test"
)

// Event is a report, as far as tests look at it.
type Event struct {
	Level       string
	Release     string
	Environment string
	Fingerprint []string
	Tags        map[string]string
	User        struct{ ID string }
	Contexts    map[string]map[string]any
	Exception   []struct {
		Type, Value string
		Stacktrace  *struct{ Frames []struct{ Function string } }
	}
}

// Title is the message that was logged.
func (e Event) Title() string {
	if len(e.Exception) == 0 {
		return ""
	}
	return e.Exception[0].Type
}

// Server takes reports.
type Server struct {
	// DSN is what a program needs to know of it.
	DSN string
	t   testing.TB

	mu     sync.Mutex
	events []Event
	raw    bytes.Buffer
	status int
}

// Start starts a server that runs until the test ends.
func Start(t testing.TB) *Server {
	t.Helper()
	s := &Server{t: t, status: http.StatusOK}
	web := httptest.NewServer(s)
	t.Cleanup(web.Close)
	s.DSN = strings.Replace(web.URL, "://", "://"+key+"@", 1) + "/" + project
	return s
}

// Answer sets the status that reports are answered with from now on.
func (s *Server) Answer(status int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status = status
}

// Events returns what came so far.
func (s *Server) Events() []Event {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Event(nil), s.events...)
}

// Raw returns all that came so far, headers and bodies, byte for byte.
func (s *Server) Raw() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.raw.String()
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	s.mu.Lock()
	defer s.mu.Unlock()
	if path := "/api/" + project + "/envelope/"; err != nil || r.Method != http.MethodPost || r.URL.Path != path {
		s.t.Errorf("%s %s: %v, want POST %s", r.Method, r.URL.Path, err, path)
	}
	if auth := r.Header.Get("X-Sentry-Auth"); !strings.Contains(auth, "sentry_key="+key) {
		s.t.Errorf("a report without the key of the project: %q", auth)
	}
	_ = r.Header.Write(&s.raw)
	s.raw.Write(body)
	s.take(body)
	w.WriteHeader(s.status)
}

// take reads an envelope: a line of JSON, and for each item another one and a line of payload.
func (s *Server) take(body []byte) {
	lines := bytes.Split(bytes.TrimSpace(body), []byte("\n"))
	for i := 1; i+1 < len(lines); i += 2 {
		var item struct{ Type string }
		if err := json.Unmarshal(lines[i], &item); err != nil {
			s.t.Errorf("the header of an item: %v: %s", err, lines[i])
		}
		if item.Type != "event" {
			s.t.Errorf("an item of the type %q", item.Type)
			continue
		}
		var e Event
		if err := json.Unmarshal(lines[i+1], &e); err != nil {
			s.t.Errorf("an event: %v: %s", err, lines[i+1])
		}
		s.events = append(s.events, e)
	}
}
