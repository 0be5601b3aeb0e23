package e2e

import (
	"context"
	"encoding/json"
	"fmt"
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

// What comes without a reply subject is counted, and nothing comes of it; but a submission has
// an id, under which its result can be had.
func TestNoReplySubject(t *testing.T) {
	t.Parallel()
	c := stack.StartCluster(t)
	backend := stack.StartBackend(t, demo.Options{})
	c.StartWorker(backend.URL).Serving()
	s := newSubmitter(t, c, books.NewKey{})
	s.accept("known", says("known"))
	s.done("known", "known")
	nc := s.connect()
	defer nc.Close()
	results, err := nc.SubscribeSync(schemas.ResultWildcard(s.key))
	if err != nil {
		t.Fatal(err)
	}
	sent := 0.0
	send := func(operation, payload string) {
		t.Helper()
		sent++
		if err := nc.Publish(schemas.InSubject(s.key, operation), []byte(payload)); err != nil {
			t.Fatal(err)
		}
	}
	submission := func(id, request string) string { return `{"id":"` + id + `","request":` + request + `}` }
	for _, operation := range []string{schemas.OperationChat, schemas.OperationCancel, schemas.OperationWhoami, schemas.OperationResult, "embed"} {
		send(operation, string(chatBody(true, nil)))
	}
	send(schemas.OperationSubmit, "not JSON")
	send(schemas.OperationSubmit, submission(strings.Repeat("x", 5000), string(chatBody(false, nil))))
	send(schemas.OperationSubmit, submission("tab\\t", string(chatBody(false, nil))))
	send(schemas.OperationSubmit, submission("known", string(chatBody(false, says("another")))))
	send(schemas.OperationSubmit, submission("empty", "{}"))
	next := func(id string) (o outcome) {
		t.Helper()
		m, err := results.NextMsg(20 * time.Second)
		if err == nil {
			err = json.Unmarshal(m.Data, &o)
		}
		if err != nil || o.ID != id || m.Subject != schemas.ResultSubject(s.key, id) {
			t.Fatalf("the result of %s: %+v, %v", id, o, err)
		}
		return o
	}
	if o := next("empty"); o.State != schemas.SubmissionError || o.Error == nil || o.Error.Code != schemas.CodeModelRequired {
		t.Errorf("%+v, %+v", o, o.Error)
	}
	send(schemas.OperationSubmit, submission("new", string(chatBody(false, says("done all the same")))))
	if o := next("new"); o.State != schemas.SubmissionDone || o.text() != "done all the same" {
		t.Errorf("%+v, %+v", o, o.Error)
	}
	s.done("new", "done all the same")
	s.done("known", "known")
	if n := backend.Stats().Started; n != 2 {
		t.Errorf("%d requests were run, want 2", n)
	}
	dropped := 0.0
	stack.Until(t, 20*time.Second, "all without a reply subject to be counted", func() bool {
		dropped, _ = measured(t, c.Brokers[0].OpsURL, "ownllm_ingress_dropped_total", `reason="no_reply"`)
		return dropped >= sent
	})
	if dropped != sent {
		t.Errorf("%v requests without a reply subject were counted, want %v", dropped, sent)
	}
	stack.Until(t, 30*time.Second, "a word of it in the log", func() bool { return logged(c.Broker, "request of a publisher can't be answered") })
}

// The database restarts, more than once, while submissions come and are run. Each is run, and
// its result is its own.
func TestSubmissionsOutliveTheDatabase(t *testing.T) {
	t.Parallel()
	n := count(60, 400)
	pg := stack.StartPostgres(t)
	c := stack.StartClusterOn(t, pg.Address)
	backend := stack.StartBackend(t, demo.Options{})
	c.StartWorker(backend.URL).Serving()
	s := newSubmitter(t, c, books.NewKey{Concurrency: new(8)})
	var work sync.WaitGroup
	for i := range n {
		work.Go(func() {
			// Until it is known that it was taken: the same id is the same submission.
			s.submit(fmt.Sprint(i), map[string]any{"demo": map[string]any{"text": fmt.Sprint("reply ", i), "first_token_ms": 200}})
		})
		if i%(n/3) == n/6 {
			pg.Stop()
			time.Sleep(500 * time.Millisecond) // it is away for a while
			pg.Start()
		}
	}
	work.Wait()
	for i := range n {
		s.done(fmt.Sprint(i), fmt.Sprint("reply ", i))
	}
	// Nothing was lost, and nothing is held.
	entries := openLedger(t, pg.Address).wantClosed(s.key, 30*time.Second)
	if len(entries) < n {
		t.Errorf("%d rows in the ledger for %d submissions", len(entries), n)
	}
	stack.Until(t, 30*time.Second, "the backend to be idle", func() bool { return backend.Stats().Active == 0 })
	t.Logf("%d submissions, %d runs", n, len(entries))
}

// One of two brokers is killed under load, while it runs submissions and more wait. The other
// ends them all, and interactive requests go on.
func TestSubmissionsOutliveABroker(t *testing.T) {
	t.Parallel()
	n := count(80, 400)
	// What a dead broker had admitted and nobody knows of is settled at its deadline.
	deadlines := []string{"--total-timeout", "15s", "--first-token-timeout", "10s"}
	c := stack.StartCluster(t, deadlines...)
	c.StartBroker(deadlines...)
	backend := stack.StartBackend(t, demo.Options{})
	c.StartWorker(backend.URL, "--slots", "16").Serving()
	s := newSubmitter(t, c, books.NewKey{Concurrency: new(8)}) // so that most of them wait for a while
	other, secret := newKey(t, c, books.NewKey{Concurrency: new(100)})
	p := newPublisher(t, c.NATSURL(), other, secret)
	nc := s.connect()
	defer nc.Close()
	var pushed sync.Map
	if _, err := nc.Subscribe(schemas.ResultWildcard(s.key), func(m *nats.Msg) {
		_, id, _ := schemas.ParseResultSubject(m.Subject)
		pushed.Store(id, true)
	}); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		s.accept(fmt.Sprint(i), map[string]any{"demo": map[string]any{"text": fmt.Sprint("reply ", i), "first_token_ms": 800}})
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var clients sync.WaitGroup
	whole, broken := 0, 0
	clients.Go(func() {
		for ctx.Err() == nil {
			bounded, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			if r := p.chat(bounded, true, map[string]any{"demo": map[string]any{"tokens": 10}}); r.usage != nil {
				whole++
			} else {
				broken++
			}
			cancel()
		}
	})
	stack.Until(t, 30*time.Second, "submissions to run at both", func() bool {
		for _, b := range c.Brokers {
			if active, _ := measured(t, b.OpsURL, "ownllm_submission_active", ""); active == 0 {
				return false
			}
		}
		return true
	})
	c.Brokers[0].Kill()
	for i := range n {
		s.done(fmt.Sprint(i), fmt.Sprint("reply ", i))
	}
	stop()
	clients.Wait()
	entries := openLedger(t, c.DatabaseURL).wantClosed(s.key, time.Minute)
	// What the dead one ran was run again, and its rows are there, too. What it had recorded and
	// not pushed yet isn't pushed any more.
	if len(entries) < n || len(entries) > n+16 {
		t.Errorf("%d rows in the ledger for %d submissions", len(entries), n)
	}
	if whole == 0 || broken > 2 {
		t.Errorf("%d replies were whole, and %d broken", whole, broken)
	}
	told := 0
	pushed.Range(func(any, any) bool { told++; return true })
	if told < n-16 {
		t.Errorf("%d of %d results were pushed", told, n)
	}
	t.Logf("%d submissions, %d runs, %d results pushed; %d replies meanwhile, %d broken", n, len(entries), told, whole, broken)
}
