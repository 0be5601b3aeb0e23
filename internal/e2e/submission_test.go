package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// submitter is a publisher that submits, and goes away between two calls.
type submitter struct {
	t      *testing.T
	c      *stack.Cluster
	key    schemas.KeyID
	secret string
}

// newSubmitter makes a key for one, and waits until the brokers know a model of its tenant.
func newSubmitter(t *testing.T, c *stack.Cluster, n books.NewKey) *submitter {
	t.Helper()
	key, secret := newKey(t, c, n)
	s := &submitter{t, c, key, secret}
	nc := s.connect()
	defer nc.Close()
	// Until they do, a model is one that nobody has.
	(&publisher{nc: nc, key: key}).awaitModel(t)
	return s
}

func (s *submitter) connect() *nats.Conn {
	s.t.Helper()
	return connect(s.t, s.c.NATSURL(), nats.Token(s.secret), nats.CustomInboxPrefix(schemas.PublisherInboxPrefix(s.key)), nats.NoReconnect())
}

// outcome is an answer to a submitter.
type outcome struct {
	Kind      string
	ID        string
	State     schemas.SubmissionState
	Duplicate bool
	Request   schemas.RequestID `json:"request_id"`
	Usage     *schemas.TotalUsage
	Error     *schemas.ClientError
	Created   int64
	Finished  int64
	Expires   int64
	// Completion is that of a chat.
	Completion struct {
		Choices []struct{ Message struct{ Content string } }
	}
}

func (o *outcome) text() string {
	if len(o.Completion.Choices) == 0 {
		return ""
	}
	return o.Completion.Choices[0].Message.Content
}

// ask asks until a broker answers.
func (s *submitter) ask(operation string, payload any) (o outcome) {
	s.t.Helper()
	b, err := json.Marshal(payload)
	if err != nil {
		s.t.Fatal(err)
	}
	stack.Until(s.t, 60*time.Second, "an answer to "+operation, func() bool {
		nc := s.connect()
		defer nc.Close()
		m, err := nc.Request(schemas.InSubject(s.key, operation), b, 40*time.Second)
		if err != nil {
			return false
		}
		o = outcome{}
		if err := json.Unmarshal(m.Data, &o); err != nil {
			s.t.Fatalf("%s: %v", m.Data, err)
		}
		// What a broker says that is just starting.
		return o.Error == nil || o.Kind == schemas.KindResult || o.Error.Code != schemas.CodeInternalError
	})
	return o
}

func (s *submitter) submit(id string, fields map[string]any, more ...map[string]any) outcome {
	s.t.Helper()
	payload := map[string]any{"id": id, "request": json.RawMessage(chatBody(false, fields))}
	for _, m := range more {
		for k, v := range m {
			payload[k] = v
		}
	}
	return s.ask(schemas.OperationSubmit, payload)
}

// accept submits what has to be accepted.
func (s *submitter) accept(id string, fields map[string]any, more ...map[string]any) {
	s.t.Helper()
	if o := s.submit(id, fields, more...); o.Kind != schemas.KindAccepted || o.ID != id || o.Duplicate {
		s.t.Fatalf("submit %s: %+v, %+v", id, o, o.Error)
	}
}

// result waits for the end of a submission.
func (s *submitter) result(id string) (o outcome) {
	s.t.Helper()
	stack.Until(s.t, 90*time.Second, "the result of "+id, func() bool {
		o = s.ask(schemas.OperationResult, map[string]any{"id": id, "wait_seconds": 20})
		if o.Kind != schemas.KindResult || o.ID != id {
			s.t.Fatalf("result of %s: %+v, %+v", id, o, o.Error)
		}
		return o.State.Ended()
	})
	return o
}

func (s *submitter) done(id, text string) outcome {
	s.t.Helper()
	o := s.result(id)
	if o.State != schemas.SubmissionDone || o.text() != text || o.Usage == nil || o.Request == "" || o.Error != nil || o.Finished == 0 || o.Expires <= o.Finished {
		s.t.Errorf("%s: %+v, %+v", id, o, o.Error)
	}
	return o
}

func (s *submitter) failed(id string, code schemas.Code) outcome {
	s.t.Helper()
	o := s.result(id)
	if o.State != schemas.SubmissionError || o.Error == nil || o.Error.Code != code || o.text() != "" {
		s.t.Errorf("%s: %+v, %+v; want %s", id, o, o.Error, code)
	}
	return o
}

// executions counts the requests of the key that came into the ledger.
func (s *submitter) executions() int {
	s.t.Helper()
	rows, _, err := s.c.Books.Usage(s.t.Context(), books.UsageQuery{Key: s.key})
	if err != nil {
		s.t.Fatal(err)
	}
	n := 0
	for _, r := range rows {
		n += int(r.Requests)
	}
	return n
}

func says(text string) map[string]any { return map[string]any{"demo": map[string]any{"text": text}} }

// slow is a reply that takes about so long.
func slow(d time.Duration) map[string]any {
	return map[string]any{"demo": map[string]any{"text": "late", "first_token_ms": d.Milliseconds()}}
}

func TestSubmission(t *testing.T) {
	t.Parallel()
	c := stack.StartCluster(t)
	backend := stack.StartBackend(t, demo.Options{})
	c.StartWorker(backend.URL).Serving()
	s := newSubmitter(t, c, books.NewKey{})

	// Somebody listens to what is pushed.
	nc := s.connect()
	defer nc.Close()
	pushed, err := nc.SubscribeSync(schemas.ResultWildcard(s.key))
	if err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	// The same id from twenty sides.
	var work sync.WaitGroup
	fresh := make(chan bool, 20)
	for range 20 {
		work.Go(func() { fresh <- !s.submit("a.b *>", says("first")).Duplicate })
	}
	work.Wait()
	n := 0
	for range 20 {
		if <-fresh {
			n++
		}
	}
	if n != 1 {
		t.Errorf("%d of 20 submissions of one id were new", n)
	}
	first := s.done("a.b *>", "first")
	m, err := pushed.NextMsg(10 * time.Second)
	if err != nil {
		t.Fatal(err)
	}
	var o outcome
	if err := json.Unmarshal(m.Data, &o); err != nil || m.Subject != schemas.ResultSubject(s.key, "a.b *>") || o.Request != first.Request || o.text() != "first" {
		t.Errorf("%s: %s, %v", m.Subject, m.Data, err)
	}
	if o := s.submit("a.b *>", says("first")); !o.Duplicate || o.State != schemas.SubmissionDone {
		t.Errorf("again: %+v, %+v", o, o.Error)
	}
	stack.Until(t, 30*time.Second, "the ledger to have the run", func() bool { return s.executions() > 0 })
	if n := backend.Stats().Started; n != 1 || s.executions() != 1 {
		t.Errorf("it was run %d times, and %d times by the ledger", n, s.executions())
	}
	// What streams over HTTP is one piece here.
	s.accept("stream", map[string]any{"stream": true, "stream_options": map[string]any{"include_usage": true}, "demo": map[string]any{"text": "whole"}})
	s.done("stream", "whole")

	// What is refused, at once and in the end.
	for name, c := range map[string]struct {
		operation string
		payload   any
		code      schemas.Code
		param     string
	}{
		"another request":    {schemas.OperationSubmit, map[string]any{"id": "a.b *>", "request": json.RawMessage(chatBody(false, says("second")))}, schemas.CodeInvalidValue, "id"},
		"no id":              {schemas.OperationSubmit, map[string]any{"request": map[string]any{}}, schemas.CodeInvalidValue, "id"},
		"bad id":             {schemas.OperationSubmit, map[string]any{"id": "é", "request": json.RawMessage(chatBody(false, nil))}, schemas.CodeInvalidValue, "id"},
		"no request":         {schemas.OperationSubmit, map[string]any{"id": "x"}, schemas.CodeInvalidValue, "request"},
		"no model":           {schemas.OperationSubmit, map[string]any{"id": "x", "request": map[string]any{"messages": []any{}}}, schemas.CodeModelRequired, "model"},
		"a deadline of none": {schemas.OperationSubmit, map[string]any{"id": "x", "request": json.RawMessage(chatBody(false, nil)), "deadline_seconds": 0}, schemas.CodeInvalidValue, "deadline_seconds"},
		"no JSON":            {schemas.OperationSubmit, json.RawMessage(`[1]`), schemas.CodeInvalidJSON, ""},
		"unknown id":         {schemas.OperationResult, map[string]any{"id": "x"}, schemas.CodeInvalidValue, "id"},
		"a long wait":        {schemas.OperationResult, map[string]any{"id": "x", "wait_seconds": 61}, schemas.CodeInvalidValue, "wait_seconds"},
	} {
		o := s.ask(c.operation, c.payload)
		param := ""
		if o.Error != nil && o.Error.Param != nil {
			param = *o.Error.Param
		}
		if o.Kind != "error" || o.Error == nil || o.Error.Code != c.code || param != c.param {
			t.Errorf("%s: %+v, %+v", name, o, o.Error)
		}
	}
	s.accept("unknown model", map[string]any{"model": "nobody-has-it"})
	s.failed("unknown model", schemas.CodeModelNotFound)
	s.accept("backend", map[string]any{"demo": map[string]any{"status": 500}})
	s.failed("backend", schemas.CodeBackendError)
	// All of it is measured.
	stack.Until(t, 20*time.Second, "none to be active", func() bool { // a result can be had a little earlier
		n, series := measured(t, c.Brokers[0].OpsURL, "ownllm_submission_active", "")
		return n == 0 && series == 1
	})
	for code, want := range map[string]float64{"ok": 2, "model_not_found": 1, "backend_error": 1} {
		if n, _ := measured(t, c.Brokers[0].OpsURL, "ownllm_submissions_total", `code="`+code+`"`); n != want {
			t.Errorf("%v submissions ended with %s by the metrics, want %v", n, code, want)
		}
	}
	// Another key sees nothing of it.
	if o := newSubmitter(t, c, books.NewKey{}).ask(schemas.OperationResult, map[string]any{"id": "stream"}); o.Error == nil {
		t.Errorf("another key got %+v", o)
	}
}

// A broker is killed while it runs a submission, and nats-server restarts; the publisher is
// away. The result is there, once, and the ledger has a row for each run.
func TestSubmissionOutlivesEverything(t *testing.T) {
	t.Parallel()
	c := stack.StartCluster(t)
	backend := stack.StartBackend(t, demo.Options{})
	c.StartWorker(backend.URL).Serving()
	s := newSubmitter(t, c, books.NewKey{Concurrency: new(1)})
	const long = 12 * time.Second // more than a worker takes to see that its owner is gone
	s.accept("runs", slow(long))
	s.accept("waits", says("later"))
	stack.Until(t, 30*time.Second, "the first run", func() bool { return backend.Stats().Started == 1 })
	c.Broker.Kill()
	c.NATS.Kill()
	c.StartNATS()
	c.StartBroker()
	s.done("runs", "late")
	s.done("waits", "later")
	if o := s.submit("runs", slow(long)); !o.Duplicate || o.State != schemas.SubmissionDone {
		t.Errorf("%+v", o)
	}
	if n := backend.Stats().Finished; n != 2 {
		// The worker has ended the first one by itself, since nobody was there for it.
		t.Errorf("%d replies came to their ends, want 2", n)
	}
}

// A broker that is stopped gives back what it doesn't finish, and that isn't a lost run.
func TestSubmissionIsHandedOver(t *testing.T) {
	t.Parallel()
	c := stack.StartCluster(t, "--drain-timeout=500ms")
	backend := stack.StartBackend(t, demo.Options{})
	c.StartWorker(backend.URL).Serving()
	s := newSubmitter(t, c, books.NewKey{})
	s.accept("runs", slow(3*time.Second))
	for i := range books.MaxLostRuns + 1 {
		stack.Until(t, 30*time.Second, "a run", func() bool { return backend.Stats().Active == 1 })
		if err := c.Broker.Stop(); err != nil {
			t.Fatal(i, err)
		}
		stack.Until(t, 30*time.Second, "the run to end", func() bool { return backend.Stats().Active == 0 })
		c.StartBroker("--drain-timeout=500ms")
	}
	s.done("runs", "late")
}

// What kills its worker each time ends.
func TestPoisonousSubmission(t *testing.T) {
	t.Parallel()
	c := stack.StartCluster(t)
	backend := stack.StartBackend(t, demo.Options{})
	w := c.StartWorker(backend.URL).Serving()
	s := newSubmitter(t, c, books.NewKey{})
	s.accept("poison", map[string]any{"demo": map[string]any{"stall_after": 1}})
	for n := range books.MaxLostRuns {
		stack.Until(t, 40*time.Second, fmt.Sprintf("run %d", n+1), func() bool { return backend.Stats().Started == int64(n+1) })
		w.Kill()
		if n < books.MaxLostRuns-1 {
			w = c.RestartWorker(w.Dir, backend.URL).Serving()
		}
	}
	o := s.failed("poison", schemas.CodeInternalError)
	if !strings.Contains(o.Error.Message, "3 times") {
		t.Errorf("%+v", o.Error)
	}
	// Its agent is back, and serves others.
	c.RestartWorker(w.Dir, backend.URL).Serving()
	s.accept("next", says("fine"))
	s.done("next", "fine")
}

// What can't be run waits for its model, its key's validity, or its deadline.
func TestSubmissionWaits(t *testing.T) {
	t.Parallel()
	c := stack.StartCluster(t)
	backend := stack.StartBackend(t, demo.Options{})
	w := c.StartWorker(backend.URL).Serving()
	s, revoked := newSubmitter(t, c, books.NewKey{}), newSubmitter(t, c, books.NewKey{})
	s.accept("before", says("before"))
	s.done("before", "before")
	if err := w.Stop(); err != nil {
		t.Fatal(err)
	}
	s.accept("late", says("late"), map[string]any{"deadline_seconds": 2})
	s.accept("waits", says("waited"))
	for i := range 5 {
		revoked.accept(fmt.Sprint(i), says("never"))
	}
	stack.Until(t, 30*time.Second, "the metrics to tell what waits", func() bool {
		n, _ := measured(t, c.Brokers[0].OpsURL, "ownllm_submission_waiting", "")
		oldest, _ := measured(t, c.Brokers[0].OpsURL, "ownllm_submission_oldest_seconds", "")
		return n == 6 && oldest > 0 // "late" has met its deadline by the time of the second count
	})
	o := s.failed("late", schemas.CodeAgentTimeout)
	if !strings.Contains(o.Error.Message, string(schemas.CodeAgentOffline)) {
		t.Errorf("%+v", o.Error)
	}
	if _, err := c.Books.RevokeKey(t.Context(), revoked.key); err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		stack.Until(t, 30*time.Second, "the end of what a revoked key waits for", func() bool {
			sub, err := c.Books.FindSubmission(t.Context(), revoked.key, fmt.Sprint(i))
			return err == nil && sub.State == schemas.SubmissionError && sub.Err.Code == schemas.CodeKeyInvalid
		})
	}
	c.RestartWorker(w.Dir, backend.URL).Serving()
	s.done("waits", "waited")
}

// A key with a long line delays no other key: a model gets no more than it has slots for, and
// keys take turns.
func TestFairSubmissions(t *testing.T) {
	t.Parallel()
	const slots, backlog = 2, 200
	c := stack.StartCluster(t)
	model := demo.DefaultModel()
	model.Slots = slots
	inner := demo.New(demo.Options{Models: []schemas.Model{model}})
	var mu sync.Mutex
	var begun []string // the users of the requests, in the order in which these came
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		var request struct{ User string }
		if json.Unmarshal(body, &request) == nil && request.User != "" {
			mu.Lock()
			begun = append(begun, request.User)
			mu.Unlock()
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(backend.Close)
	of := func(user string, fields map[string]any) map[string]any {
		fields["user"] = user
		return fields
	}
	c.StartWorker(backend.URL).Serving()
	a, b := newSubmitter(t, c, books.NewKey{}), newSubmitter(t, c, books.NewKey{})
	nc := a.connect()
	defer nc.Close()
	for i := range backlog {
		payload, _ := json.Marshal(map[string]any{"id": fmt.Sprint(i), "request": json.RawMessage(chatBody(false, of("a", slow(300*time.Millisecond))))})
		if _, err := nc.Request(schemas.InSubject(a.key, schemas.OperationSubmit), payload, 20*time.Second); err != nil {
			t.Fatal(err)
		}
	}
	b.accept("one", of("b", says("soon")))
	mu.Lock()
	before := len(begun)
	mu.Unlock()
	b.done("one", "soon")
	// Those that the model had been given ahead, and whose turn it was, and no more, however long
	// it takes this test to submit, and to hear of the result.
	mu.Lock()
	defer mu.Unlock()
	if n := slices.Index(begun, "b") - before; n > 4*slots {
		t.Errorf("%d requests began between the other key's submission and its run", n)
	}
}

// Two brokers share the work, under the limits of the key.
func TestSubmissionsOfTwoBrokers(t *testing.T) {
	t.Parallel()
	const n, concurrency = 60, 4
	c := stack.StartCluster(t)
	c.StartBroker()
	backend := stack.StartBackend(t, demo.Options{})
	c.StartWorker(backend.URL).Serving()
	s := newSubmitter(t, c, books.NewKey{Concurrency: new(concurrency)})
	for i := range n {
		s.accept(fmt.Sprint(i), slow(50*time.Millisecond))
	}
	for i := range n {
		s.done(fmt.Sprint(i), "late")
	}
	if st := backend.Stats(); st.Started != n || st.Peak > concurrency {
		t.Errorf("%d were run, %d at once", st.Started, st.Peak)
	}
	stack.Until(t, 30*time.Second, "the ledger to have all runs", func() bool { return s.executions() == n })
}
