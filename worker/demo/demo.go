// Package demo is the built-in model "demo": a deterministic OpenAI-compatible
// server with no model in it.
//
// It does two jobs. It answers a first run on a machine with no GPU, and says that it
// is a demo. And it is the backend of load tests and fault tests: it can be asked for
// long or numbered replies, for a pace, and for every way in which a real backend
// fails. What it says depends only on the request, never on chance or time.
//
// It is the yardstick of benchmarks, so that its hot path is one small append, one
// Write and one Flush for each chunk.
//
// # Endpoints
//
//	GET  /api/demo             {"demo":true}: how a worker knows it
//	GET  /health               200
//	GET  /v1/models            models with capabilities, context window, size and state
//	POST /v1/chat/completions  streamed and not
//	POST /tokenize             as vLLM's, from a prompt or messages
//	GET  /demo/stats           what it has done so far, see Stats
//	GET  /demo/faults          the faults that are set
//	PUT  /demo/faults          sets the faults of all models, or of one: ?model=ID
//	POST /demo/unload          makes all models cold, or one: ?model=ID
//	POST /demo/remove          takes all models away, or one: ?model=ID, as if deleted
//	POST /demo/reset           everything as it was at the start
//
// A request sets its own faults with an object "demo" in its body. It counts over
// what was set before, field by field; see Faults for the fields.
//
// # Tokens
//
// A token is a word with the white space before it, of at most 16 bytes. A prompt has
// as many tokens as its texts have words, 3 for each message and 85 for each image,
// unless the faults state how many.
//
// # Continuing
//
// If the last message is the assistant's, the reply goes on exactly where that text
// ends (or from its start, if the text isn't the start of this reply). With
// continue_final_message the rules of vLLM hold: add_generation_prompt must be false.
package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/ownllm/ownllm/schemas"
)

// ModelID is the id of the built-in model.
const ModelID = "demo"

// DefaultModel returns the built-in model: ready, with all capabilities but
// embedding, and a window of 32768 tokens.
func DefaultModel() schemas.Model {
	return schemas.Model{
		ID:            ModelID,
		Capabilities:  schemas.Capabilities{Completion: true, Vision: true, Tools: true, Thinking: true},
		ContextWindow: 32768,
		SizeMB:        1,
		State:         schemas.ModelReady,
		Created:       1767225600,
		Slots:         256,
	}
}

// Options say how a Server begins. The zero value is the built-in model without a
// fault.
type Options struct {
	// Models are what it serves; none stands for the built-in model alone. A State of
	// cold makes the first request load it, one of failed makes every request fail.
	Models []schemas.Model
	// Faults are the defaults of all models; nil stands for NoFaults.
	Faults *Faults
	// Key, if not empty, is the API key that /v1 and /tokenize ask for.
	Key string
}

// Server is the demo server. It starts no goroutine; its requests end when their
// clients go away.
type Server struct {
	options Options
	mux     *http.ServeMux
	stats   counters

	mu     sync.Mutex // guards what follows
	models map[string]*model
	all    setting // the faults of models that have none of their own
}

// model is one model and its state. All but info is guarded by the Server's mutex.
type model struct {
	info      schemas.Model
	own       *setting
	state     schemas.ModelState // ready, cold or failed
	loadedAt  time.Time          // when the load that runs will be done
	isLoading bool
	removed   bool // what runs ends as it would have, and nothing new begins
}

// setting is a set of faults that was set, and how many requests it is still for.
type setting struct {
	faults Faults
	left   int // -1: all
}

func newSetting(f Faults) setting {
	if f.Times == 0 {
		return setting{f, -1}
	}
	return setting{f, f.Times}
}

// New returns a Server.
func New(o Options) *Server {
	if len(o.Models) == 0 {
		o.Models = []schemas.Model{DefaultModel()}
	}
	if o.Faults == nil {
		f := NoFaults()
		o.Faults = &f
	}
	s := &Server{options: o, mux: http.NewServeMux()}
	s.resetModels()
	s.mux.HandleFunc("GET /api/demo", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, 200, map[string]bool{"demo": true}) })
	s.mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) })
	s.mux.HandleFunc("GET /v1/models", s.authorized(s.serveModels))
	s.mux.HandleFunc("POST /v1/chat/completions", s.authorized(s.serveChat))
	s.mux.HandleFunc("POST /tokenize", s.authorized(s.serveTokenize))
	s.mux.HandleFunc("GET /demo/stats", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, 200, s.Stats()) })
	s.mux.HandleFunc("GET /demo/faults", s.serveFaults)
	s.mux.HandleFunc("PUT /demo/faults", s.serveSetFaults)
	s.mux.HandleFunc("POST /demo/unload", s.serveUnload)
	s.mux.HandleFunc("POST /demo/remove", s.serveRemove)
	s.mux.HandleFunc("POST /demo/reset", func(w http.ResponseWriter, _ *http.Request) {
		s.Reset()
		writeJSON(w, 200, s.Stats())
	})
	return s
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.mux.ServeHTTP(w, r) }

// Serve answers requests on the listener until ctx is done, then ends what runs,
// closes the listener and returns nil. It returns earlier only with an error.
func Serve(ctx context.Context, listener net.Listener, o Options) error {
	return New(o).Serve(ctx, listener)
}

// Serve is the function Serve for a Server that already exists.
func (s *Server) Serve(ctx context.Context, listener net.Listener) error {
	server := &http.Server{
		Handler: s,
		// Replies end with ctx, so that shutting down needn't wait for a stalled one.
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ReadHeaderTimeout: 10 * time.Second,
	}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	select {
	case err := <-failed:
		_ = server.Close() // the listener is what failed
		return fmt.Errorf("serve demo model: %w", err)
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	if server.Shutdown(grace) != nil {
		_ = server.Close() // connections that never sent a request
	}
	if err := <-failed; !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve demo model: %w", err)
	}
	return nil
}

// Reset makes everything as it was at the start: models, faults and counters.
func (s *Server) Reset() {
	s.resetModels()
	s.stats.reset()
}

func (s *Server) resetModels() {
	models := make(map[string]*model, len(s.options.Models))
	for _, info := range s.options.Models {
		m := &model{info: info, state: info.State}
		if m.state == "" {
			m.state = schemas.ModelReady
		}
		models[info.ID] = m
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.models, s.all = models, newSetting(*s.options.Faults)
	if s.all.faults.LoadMS > 0 {
		s.unloadLocked("")
	}
}

// SetFaults sets the faults of one model, or of all if the id is empty, which also
// ends what was set for single ones. A LoadMS above 0 makes the models cold.
func (s *Server) SetFaults(id string, f Faults) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	set := newSetting(f)
	if id == "" {
		s.all = set
		for _, m := range s.models {
			m.own = nil
		}
	} else {
		m, ok := s.models[id]
		if !ok {
			return fmt.Errorf("set faults of model %q: no such model", id)
		}
		m.own = &set
	}
	if f.LoadMS > 0 {
		s.unloadLocked(id)
	}
	return nil
}

// Unload makes one model cold, or all if the id is empty.
func (s *Server) Unload(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if id != "" && s.models[id] == nil {
		return fmt.Errorf("unload model %q: no such model", id)
	}
	s.unloadLocked(id)
	return nil
}

func (s *Server) unloadLocked(id string) {
	for _, m := range s.models {
		if (id == "" || m.info.ID == id) && m.state != schemas.ModelFailed {
			m.state, m.isLoading = schemas.ModelCold, false
		}
	}
}

// Remove takes one model away, or all if the id is empty, until Reset. What runs goes on.
func (s *Server) Remove(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if id != "" && s.models[id] == nil {
		return fmt.Errorf("remove model %q: no such model", id)
	}
	for _, m := range s.models {
		m.removed = m.removed || id == "" || m.info.ID == id
	}
	return nil
}

// settleLocked ends a load whose time is up. A load goes on without the request that
// began it, and needs no goroutine: its end is an instant known beforehand.
func (m *model) settleLocked(now time.Time) {
	if m.isLoading && !now.Before(m.loadedAt) {
		m.state, m.isLoading = schemas.ModelReady, false
	}
}

// use returns the model and the faults for one request.
func (s *Server) use(id string) (info *schemas.Model, f Faults, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m, ok := s.models[id]
	if !ok || m.removed {
		return nil, Faults{}, false
	}
	set := s.settingLocked(m)
	if set.left == 0 {
		return &m.info, NoFaults(), true
	}
	if set.left > 0 {
		set.left--
	}
	return &m.info, set.faults, true
}

// peek returns the faults of a model that exists, without using one up.
func (s *Server) peek(id string) Faults {
	s.mu.Lock()
	defer s.mu.Unlock()
	if set := s.settingLocked(s.models[id]); set.left != 0 {
		return set.faults
	}
	return NoFaults()
}

func (s *Server) settingLocked(m *model) *setting {
	if m.own != nil {
		return m.own
	}
	return &s.all
}

// load begins the load of a cold model and returns when it is in memory: the zero
// time if it already is.
func (s *Server) load(id string, takes time.Duration) (until time.Time, failed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m, now := s.models[id], time.Now()
	m.settleLocked(now)
	switch {
	case m.state == schemas.ModelFailed:
		return time.Time{}, true
	case m.state != schemas.ModelCold:
		return time.Time{}, false
	case !m.isLoading:
		m.isLoading, m.loadedAt = true, now.Add(takes)
	}
	return m.loadedAt, false
}

// snapshot returns the model as /v1/models shows it.
func (s *Server) snapshot(id string) (m schemas.Model, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	found, ok := s.models[id]
	if !ok || found.removed {
		return m, false
	}
	now := time.Now()
	found.settleLocked(now)
	m = found.info
	m.State = found.state
	if found.isLoading {
		m.State = schemas.ModelLoading
		m.LoadMS = found.loadedAt.Sub(now).Milliseconds()
	}
	return m, true
}

// entry is one model in /v1/models: OpenAI's fields, ours, and the name that vLLM has
// for the window.
type entry struct {
	ID            string               `json:"id"`
	Object        string               `json:"object"`
	Created       int64                `json:"created"`
	OwnedBy       string               `json:"owned_by"`
	Capabilities  schemas.Capabilities `json:"capabilities"`
	ContextWindow int                  `json:"context_window"`
	MaxModelLen   int                  `json:"max_model_len"`
	SizeMB        int                  `json:"size_mb"`
	State         schemas.ModelState   `json:"state"`
	LoadMS        int64                `json:"load_ms,omitempty"`
	Slots         int                  `json:"slots"`
	Continues     bool                 `json:"continues"`
}

func (s *Server) serveModels(w http.ResponseWriter, _ *http.Request) {
	list := struct {
		Object string  `json:"object"`
		Data   []entry `json:"data"`
	}{"list", []entry{}}
	for _, info := range s.options.Models {
		m, ok := s.snapshot(info.ID)
		if !ok {
			continue
		}
		list.Data = append(list.Data, entry{
			ID: m.ID, Object: "model", Created: m.Created, OwnedBy: "ownllm-demo", Capabilities: m.Capabilities,
			ContextWindow: m.ContextWindow, MaxModelLen: m.ContextWindow, SizeMB: m.SizeMB, State: m.State, LoadMS: m.LoadMS, Slots: m.Slots, Continues: true,
		})
	}
	writeJSON(w, 200, list)
}

func (s *Server) serveFaults(w http.ResponseWriter, _ *http.Request) {
	s.mu.Lock()
	set := struct {
		Default Faults            `json:"default"`
		Models  map[string]Faults `json:"models"`
	}{s.all.faults, map[string]Faults{}}
	for id, m := range s.models {
		if m.own != nil {
			set.Models[id] = m.own.faults
		}
	}
	s.mu.Unlock()
	writeJSON(w, 200, set)
}

func (s *Server) serveSetFaults(w http.ResponseWriter, r *http.Request) {
	body, err := readBody(w, r)
	if err != nil {
		writeError(w, 400, err.Error())
		return
	}
	f, err := ParseFaults(body)
	if err != nil {
		writeError(w, 400, err.Error())
		return
	}
	if err := s.SetFaults(r.URL.Query().Get("model"), f); err != nil {
		writeError(w, 404, err.Error())
		return
	}
	s.serveFaults(w, r)
}

func (s *Server) serveUnload(w http.ResponseWriter, r *http.Request) {
	if err := s.Unload(r.URL.Query().Get("model")); err != nil {
		writeError(w, 404, err.Error())
		return
	}
	s.serveModels(w, r)
}

func (s *Server) serveRemove(w http.ResponseWriter, r *http.Request) {
	if err := s.Remove(r.URL.Query().Get("model")); err != nil {
		writeError(w, 404, err.Error())
		return
	}
	s.serveModels(w, r)
}

// authorized asks for the key, if there is one.
func (s *Server) authorized(next http.HandlerFunc) http.HandlerFunc {
	if s.options.Key == "" {
		return next
	}
	want := "Bearer " + s.options.Key
	return func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != want {
			writeError(w, 401, "Invalid API key.")
			return
		}
		next(w, r)
	}
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		panic("demo: reply can't be marshalled: " + err.Error()) // plain data only
	}
	w.Header()["Content-Type"] = jsonType
	w.WriteHeader(status)
	_, _ = w.Write(append(b, '\n')) // a client that is gone doesn't read it
}

var (
	jsonType  = []string{"application/json"}
	eventType = []string{"text/event-stream; charset=utf-8"}
	noCache   = []string{"no-cache"}
)

// writeError answers with an error in the form of vLLM, whose code is a number.
func writeError(w http.ResponseWriter, status int, message string) {
	w.Header()["Content-Type"] = jsonType
	w.WriteHeader(status)
	_, _ = w.Write(appendError(nil, status, message))
}

func appendError(dst []byte, status int, message string) []byte {
	kind := "InternalServerError"
	switch status {
	case 400:
		kind = "BadRequestError"
	case 401:
		kind = "AuthenticationError"
	case 404:
		kind = "NotFoundError"
	case 429:
		kind = "RateLimitError"
	case 503:
		kind = "ServiceUnavailableError"
	}
	dst = append(dst, `{"error":{"message":`...)
	dst = schemas.AppendString(dst, message)
	dst = append(dst, `,"type":"`...)
	dst = append(dst, kind...)
	dst = append(dst, `","param":null,"code":`...)
	dst = strconv.AppendInt(dst, int64(status), 10)
	return append(dst, `}}`...)
}
