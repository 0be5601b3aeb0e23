package worker

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/backend"
)

// stock is what the worker has to offer: its backends, their models, and their slots.
type stock struct {
	shelves []*shelf
	log     *slog.Logger
	loaded  chan struct{} // holds one token: a load has begun or ended

	loads sync.WaitGroup // loads under way

	mu     sync.Mutex
	hash   string
	models schemas.Inventory
	places map[string]*place // by model id
	load   map[string]*load  // loads under way, by model id
}

// shelf is one inference server. It belongs to refresh, but for its slots.
type shelf struct {
	config  backend.Config
	backend *backend.Backend // nil until somebody answers at the address
	models  []schemas.Model  // as last heard
	heard   bool             // the server has said at least once what it has
	missing string           // the last complaint about the address, so that each is logged once
	slots   slots
}

// place is where a model is.
type place struct {
	backend *backend.Backend
	slots   *slots
	state   schemas.ModelState
}

// load is a model on its way into memory.
type load struct {
	done chan struct{} // closed at the end
	err  error         // valid once done is closed
}

func newStock(backends []backend.Config, log *slog.Logger) *stock {
	s := &stock{log: log, loaded: make(chan struct{}, 1), places: map[string]*place{}, load: map[string]*load{}}
	for _, c := range backends {
		s.shelves = append(s.shelves, &shelf{config: c})
	}
	s.hash = s.models.Hash()
	return s
}

// slotCount is how many jobs can run at once, over all backends.
func (s *stock) slotCount() int {
	n := 0
	for _, sh := range s.shelves {
		n += sh.slots.count()
	}
	return n
}

// askWait bounds how long one backend may take to say what it has.
const askWait = 5 * time.Second

// refresh asks all backends what they have, and reports whether the set of models
// has changed, or how much of it is known. The models of a backend that doesn't answer stay
// known, as failed; until one has answered for the first time, the inventory is partial. It
// is called by one goroutine at a time.
func (s *stock) refresh(ctx context.Context) (setChanged bool) {
	var asks sync.WaitGroup
	for _, sh := range s.shelves {
		asks.Go(func() { sh.refresh(ctx, s.log) })
	}
	asks.Wait()

	s.mu.Lock()
	defer s.mu.Unlock()
	places := make(map[string]*place)
	inv := schemas.Inventory{Models: []schemas.Model{}}
	for _, sh := range s.shelves {
		inv.Partial = inv.Partial || !sh.heard
		for _, m := range sh.models {
			if places[m.ID] != nil {
				continue // an earlier backend serves it
			}
			if s.load[m.ID] != nil && m.State != schemas.ModelReady {
				m.State = schemas.ModelLoading
			}
			places[m.ID] = &place{sh.backend, &sh.slots, m.State}
			inv.Models = append(inv.Models, m)
		}
	}
	setChanged = len(places) != len(s.places) || inv.Partial != s.models.Partial
	for id := range places {
		setChanged = setChanged || s.places[id] == nil
	}
	s.models, s.hash, s.places = inv, inv.Hash(), places
	return setChanged
}

// refresh asks the server what it has; at first, what it is.
func (sh *shelf) refresh(ctx context.Context, log *slog.Logger) {
	askCtx, cancel := context.WithTimeout(ctx, askWait)
	defer cancel()
	err := sh.ask(askCtx)
	switch {
	case err == nil:
		if sh.missing != "" {
			log.Info("backend is back", "url", sh.backend.URL(), "kind", sh.backend.Kind())
		}
		sh.missing = ""
		sh.slots.resize(sh.backend.Slots())
	case ctx.Err() == nil:
		if sh.missing != err.Error() {
			sh.missing = err.Error()
			log.Warn("backend isn't answering", "error", err)
		}
		sh.fail()
	}
}

func (sh *shelf) ask(ctx context.Context) error {
	if sh.backend == nil {
		b, err := backend.Probe(ctx, sh.config)
		if err != nil {
			return err
		}
		sh.backend = b
	}
	models, err := sh.backend.Models(ctx)
	if err == nil {
		sh.models, sh.heard = models, true
	}
	return err
}

func (sh *shelf) fail() {
	failed := slices.Clone(sh.models)
	for i := range failed {
		failed[i].State = schemas.ModelFailed
		failed[i].Detail = "its " + sh.backend.Kind().Label() + " server isn't answering"
	}
	sh.models = failed
}

// close ends what the backends keep open. It comes after the last refresh.
func (s *stock) close() {
	for _, sh := range s.shelves {
		if sh.backend != nil {
			sh.backend.Close()
		}
	}
}

// inventory returns what is offered, and its hash.
func (s *stock) inventory() (string, *schemas.Inventory) {
	s.mu.Lock()
	defer s.mu.Unlock()
	inv := s.models
	return s.hash, &inv
}

// find returns where a model is.
func (s *stock) find(model string) (*place, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, ok := s.places[model]
	return p, ok
}

// cold reports whether the model has to be loaded first.
func (p *place) cold() bool {
	return p.state == schemas.ModelCold || p.state == schemas.ModelLoading
}

// loadWait bounds a load, however large the model.
const loadWait = 30 * time.Minute

// warm starts to load a model, unless that is under way, and returns the load. A
// load belongs to no request: it goes on when those who wait for it give up.
func (s *stock) warm(life context.Context, p *place, model string) *load {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.load[model]; l != nil {
		return l
	}
	l := &load{done: make(chan struct{})}
	s.load[model] = l
	s.loads.Add(1)
	go func() {
		defer s.loads.Done()
		loadCtx, cancel := context.WithTimeout(life, loadWait)
		defer cancel()
		l.err = p.backend.Load(loadCtx, model)
		if l.err != nil && life.Err() == nil {
			s.log.Warn("model not loaded", "model", model, "error", l.err)
		}
		s.mu.Lock()
		delete(s.load, model)
		s.mu.Unlock()
		close(l.done)
		signal(s.loaded)
	}()
	signal(s.loaded) // so that the others hear of the load
	return l
}

// waitLoads returns once ctx has ended, and with it all loads.
func (s *stock) waitLoads(ctx context.Context) error {
	<-ctx.Done()
	s.loads.Wait()
	return nil
}

const (
	// loadUnknown is what a client is told to wait for a load of which nothing is known, and
	// loadLeast and loadMost bound what it is told of any other.
	loadUnknown = 5 * time.Second
	loadLeast   = 2 * time.Second
	loadMost    = 10 * time.Second
)

// loading is the error for a request that doesn't wait any longer for a model: it tells how
// much of the load is done, as far as the backend does, and when to come back.
func (p *place) loading(model, asked string) *schemas.Error {
	wait, percent := p.backend.LoadLeft(model)
	if wait == 0 {
		wait = loadUnknown
	}
	done := ""
	if percent > 0 {
		done = fmt.Sprintf(" (%d%% done)", percent)
	}
	return schemas.Errorf(schemas.CodeModelLoading, "The model %q is being loaded into memory%s. Try again in a few seconds.", asked, done).
		WithRetryAfter(min(max(wait, loadLeast), loadMost))
}
