package demo

import (
	"net/http"
	"strconv"
	"sync/atomic"
	"time"
)

var completions atomic.Int64

// run is one chat completion.
type run struct {
	server *Server
	done   <-chan struct{} // closed when the client is gone
	w      http.ResponseWriter
	flush  http.Flusher
	q      *request
	f      *Faults
	p      *reply
	pace   pacer
	buf    []byte
	head   []byte // of each chunk: id, object, created, model
	begun  bool   // the role has been sent
	ended  bool   // the outcome has been counted
}

// end counts the outcome. That comes before the last bytes are sent: whoever has read
// the end of a reply finds it in the statistics, and its hanging up is no abort.
func (r *run) end(o outcome) {
	if !r.ended {
		r.ended = true
		r.server.stats.end(o)
	}
}

// aborted is called when the client is gone, or the server stops. Both must not look
// like the end of a reply, so it cuts the connection.
func (r *run) aborted() {
	r.end(outcomeAborted)
	panic(http.ErrAbortHandler)
}

func (r *run) refuse(status int, message string) {
	r.end(outcomeFailed)
	writeError(r.w, status, message)
}

func (s *Server) serveChat(w http.ResponseWriter, hr *http.Request) {
	r := &run{server: s, done: hr.Context().Done(), w: w}
	s.stats.begin()
	defer r.end(outcomeFailed) // if a bug panics
	body, err := readBody(w, hr)
	if err != nil {
		if hr.Context().Err() != nil {
			r.aborted()
		}
		r.refuse(400, err.Error())
		return
	}
	if r.q, err = parseRequest(body); err != nil {
		r.refuse(400, err.Error())
		return
	}
	info, faults, ok := s.use(r.q.model)
	if !ok {
		r.refuse(404, noModel(r.q.model))
		return
	}
	r.f = &faults
	if r.q.demo.Exists() {
		if err := faults.overlay([]byte(r.q.demo.Raw)); err != nil {
			r.refuse(400, err.Error())
			return
		}
	}
	if faults.Status != 0 {
		r.refuseAsAsked()
		return
	}
	r.q.stated(&faults)
	if faults.IgnoreLimit {
		r.q.maxTokens = 0
	}
	if err := r.q.check(info); err != nil {
		r.refuse(400, err.Error())
		return
	}
	if r.p, err = plan(r.q, r.f, info); err != nil {
		r.refuse(400, err.Error())
		return
	}
	until, failed := s.load(info.ID, time.Duration(faults.LoadMS)*time.Millisecond)
	if failed {
		r.refuse(500, "The model `"+info.ID+"` failed to load.")
		return
	}
	if !until.IsZero() {
		if !r.pace.wait(r.done, until) {
			r.aborted()
		}
	}
	r.pace.begin(r.f, r.q.seed)
	r.buf = make([]byte, 0, 512)
	if r.q.stream {
		r.streamed()
	} else {
		r.whole()
	}
}

// refuseAsAsked answers with the status that the faults ask for.
func (r *run) refuseAsAsked() {
	if r.f.RetryAfter > 0 {
		r.w.Header().Set("Retry-After", strconv.Itoa(r.f.RetryAfter))
	}
	if r.f.ErrorBody == "" {
		r.refuse(r.f.Status, "The demo model was asked to fail.")
		return
	}
	r.end(outcomeFailed)
	r.w.Header()["Content-Type"] = jsonType
	r.w.WriteHeader(r.f.Status)
	_, _ = r.w.Write([]byte(r.f.ErrorBody))
}
