package ingress_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/ingress"
	"github.com/ownllm/ownllm/schemas"
)

func TestStream(t *testing.T) {
	h := build(t, plan{})
	r := h.ask("chat", body(true), nil)
	a, m := r.next()
	if a.Kind != schemas.FrameProgress || m.Reply != schemas.ProgressSubject(key, h.brokers[0].disp.Owner(), a.Request) {
		t.Errorf("the first message is %+v, to be answered at %q", a, m.Reply)
	}
	run := h.pull()
	if run.job.Request != a.Request || run.job.Key != key || run.job.Tenant != tenant || !run.job.Stream || run.raw != body(true) {
		t.Errorf("job %+v, body %s", run.job, run.raw)
	}
	const first, second, third = `{"a": "<1>"}`, `{"b":"é\u2028"}`, `{"c":3}`
	run.chunk(first + "\n")
	run.chunk(second + "\n" + third + "\n")
	run.done(`{"d":4}` + "\n")
	text, last, _ := r.read()
	if want := first + second + third + `{"d":4}`; text != want {
		t.Errorf("chunks %s, want %s", text, want)
	}
	if last.Kind != schemas.FrameDone || *last.Usage != (schemas.TotalUsage{PromptTokens: 3, CompletionTokens: 3, TotalTokens: 6}) || last.Completion != nil {
		t.Errorf("end %+v, usage %+v", last, last.Usage)
	}
	r.silent()
	if s := h.books.Charged(t, r.id); s.Completion != 3 || *s.Prompt != 3 {
		t.Errorf("settled as %+v", s)
	}
	h.until("the reply not to be guarded any more", func() bool { return h.keys.guarded() == 0 })
}

func TestWhole(t *testing.T) {
	h := build(t, plan{})
	r := h.ask("chat", body(false), nil)
	run := h.pull()
	const whole = `{"choices": [{"message":{"content":"<a>"}}]}`
	run.chunk(whole[:10])
	run.done(whole[10:])
	text, last, asked := r.read()
	if text != "" || asked == 0 || string(last.Completion) != whole || last.Usage.TotalTokens != 5 {
		t.Errorf("text %q, asked %d times, end %+v with %s", text, asked, last, last.Completion)
	}
}

// What a broken worker sends doesn't break a message.
func TestNonsense(t *testing.T) {
	h := build(t, plan{})
	for _, stream := range []bool{true, false} {
		r := h.ask("chat", body(stream), nil)
		run := h.pull()
		run.chunk(`{"a":1},"kind":"done"` + "\n")
		if stream {
			run.stopped()
		} else {
			run.done("")
		}
		r.wantError(schemas.CodeBackendError)
	}
}

func TestReplyThatIsTooLarge(t *testing.T) {
	h := build(t, plan{})
	r := h.ask("chat", body(false), nil)
	run := h.pull()
	piece := strings.Repeat("x", 600<<10)
	run.chunk(`{"a":"` + piece)
	run.chunk(piece)
	run.done(`"}`)
	if last := r.wantError(schemas.CodeInvalidValue); last.Error.Param == nil || *last.Error.Param != "stream" {
		t.Errorf("error %+v", last.Error)
	}
}

// Everything that is wrong with a request itself is told at once, as over HTTP.
func TestRefusals(t *testing.T) {
	h := build(t, plan{ingress: ingress.Config{BodyLimit: 1000}})
	for _, c := range []struct {
		operation, body string
		header          nats.Header
		code            schemas.Code
		param           string
	}{
		{"chat", "", nil, schemas.CodeInvalidJSON, ""},
		{"chat", "[]", nil, schemas.CodeInvalidJSON, ""},
		{"chat", `{"messages":[{"role":"user","content":"x"}]}`, nil, schemas.CodeModelRequired, "model"},
		{"chat", strings.Repeat(" ", 1001), nil, schemas.CodeRequestTooLarge, ""},
		{"chat", body(true), nats.Header{schemas.HeaderWait: {"soon"}}, schemas.CodeInvalidValue, schemas.HeaderWait},
		{"chat", body(true), nats.Header{"ownllm-wait": {"-1"}}, schemas.CodeInvalidValue, schemas.HeaderWait},
		{"cancel", "", nil, schemas.CodeInvalidJSON, ""},
		{"cancel", `{"request_id":"x"}`, nil, schemas.CodeInvalidValue, "request_id"},
		{"embeddings", "{}", nil, schemas.CodeNotFound, ""},
	} {
		last := h.ask(c.operation, c.body, c.header).wantError(c.code)
		param := ""
		if last.Error.Param != nil {
			param = *last.Error.Param
		}
		if last.Seq != 1 || param != c.param || last.Error.Type != c.code.Info().Type || schemas.ValidateID(string(last.Request), "req_") != nil {
			t.Errorf("%s %.50s: %+v, error %+v", c.operation, c.body, last, last.Error)
		}
	}
	why := schemas.Errorf(schemas.CodeTenantDisabled, "suspended")
	h.keys.revoke(key, why)
	for _, operation := range []string{"chat", "models", "whoami", "cancel"} {
		h.ask(operation, body(true), nil).wantError(schemas.CodeTenantDisabled)
	}
}

// The wait that a publisher asks for gets to the worker.
func TestWaitHeader(t *testing.T) {
	h := build(t, plan{})
	r := h.ask("chat", body(true), nats.Header{schemas.HeaderWait: {"7"}})
	run := h.pull()
	if run.job.ColdWait != 7000 {
		t.Errorf("cold wait %d ms", run.job.ColdWait)
	}
	run.done("")
	r.read()
}

// What can't be answered is counted and logged, and answered nowhere: neither in another's
// inbox nor among the subjects that brokers listen to.
func TestForeignReplySubjects(t *testing.T) {
	h := build(t, plan{})
	spy := h.server.Ingress("spy")
	spied, err := spy.SubscribeSync("_INBOX_key_2.>")
	if err != nil {
		t.Fatal(err)
	}
	if err := spy.Flush(); err != nil {
		t.Fatal(err)
	}
	before, began := h.logged("request of a publisher can't be answered"), time.Now()
	for _, operation := range []string{"chat", "models", "nonsense"} {
		for _, to := range []string{"", "_INBOX_key_2.x", schemas.InSubject(key, "models"), schemas.PeerCancelSubject(key, "req_1"), "_INBOX_" + string(key)} {
			if err := h.pub.PublishMsg(&nats.Msg{Subject: schemas.InSubject(key, operation), Reply: to, Data: []byte(body(true))}); err != nil {
				t.Fatal(err)
			}
		}
	}
	// Each operation has a queue of its own, so each is asked once more.
	for _, operation := range []string{"chat", "nonsense"} {
		h.ask(operation, "", nil).read()
	}
	if _, err := h.pub.Request(schemas.InSubject(key, "models"), nil, patience); err != nil {
		t.Fatal(err)
	}
	if err := spy.Flush(); err != nil {
		t.Fatal(err)
	}
	if n, _, _ := spied.Pending(); n != 0 {
		m, err := spied.NextMsg(patience)
		t.Errorf("%q got %s, %v", m.Subject, m.Data, err)
	}
	if n := h.logged("request of a publisher can't be answered") - before; n == 0 || n > 2+int(time.Since(began)/time.Second) { // at most one each second
		t.Errorf("%d lines in the log for 15 messages in %s", n, time.Since(began))
	}
}

func TestModelsAndWhoami(t *testing.T) {
	h := build(t, plan{})
	get := func(nc *nats.Conn, as schemas.KeyID, operation string, answer any) {
		t.Helper()
		m, err := nc.Request(schemas.InSubject(as, operation), nil, patience)
		if err == nil {
			err = json.Unmarshal(m.Data, answer)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	var list schemas.ModelsAnswer
	if get(h.pub, key, "models", &list); list.Kind != schemas.KindModels || list.Object != "list" || len(list.Data) != 1 || list.Data[0].ID != model || list.Data[0].OwnedBy != "ownllm" {
		t.Errorf("%+v", list)
	}
	var who schemas.Whoami
	if get(h.pub, key, "whoami", &who); who.Kind != schemas.KindWhoami || who.Key != key || who.Tenant != tenant || who.Slug != "acme" || who.Expires != 0 {
		t.Errorf("%+v", who)
	}
	h.keys.mu.Lock()
	id := h.keys.known[key]
	expires := time.Now().Add(time.Hour)
	id.BudgetCents, id.ExpiresAt, id.Scopes = new(int64(7)), &expires, []string{"model:other"}
	h.keys.known[key] = id
	h.keys.mu.Unlock()
	stranger := schemas.KeyID(secret.Hash().Fingerprint())
	cfg := h.server.Config("stranger").As("anybody", "stranger")
	cfg.Password, cfg.InboxPrefix = secret.Reveal(), schemas.PublisherInboxPrefix(stranger)
	get(h.server.Open(cfg), stranger, "whoami", &who)
	if who.Key != key || *who.BudgetCents != 7 || who.Expires != expires.Unix() {
		t.Errorf("by the fingerprint: %+v", who)
	}
	if get(h.pub, key, "models", &list); len(list.Data) != 0 {
		t.Errorf("models beyond the scope: %+v", list)
	}
}

// A publisher whose inbox nobody listens to any more stops the backend within a second or so.
func TestPublisherIsGone(t *testing.T) {
	for _, stream := range []bool{true, false} {
		h := build(t, plan{})
		r := h.ask("chat", body(stream), nil)
		run := h.pull()
		run.chunk(`{"a":1}` + "\n")
		r.next()
		at := time.Now()
		if err := r.sub.Unsubscribe(); err != nil {
			t.Fatal(err)
		}
		run.stopped()
		if took := time.Since(at); took > 5*time.Second {
			t.Errorf("stream %v: stopped after %s", stream, took)
		}
		if s := h.books.Charged(t, r.id); s.Completion != 1 {
			t.Errorf("settled as %+v", s)
		}
	}
}

// A publisher that has left before its request was let in is gone as soon as it was.
func TestPublisherThatNeverWaits(t *testing.T) {
	h := build(t, plan{})
	if err := h.pub.PublishRequest(schemas.InSubject(key, "chat"), h.pub.NewInbox(), []byte(body(true))); err != nil {
		t.Fatal(err)
	}
	h.until("a request to come and go", func() bool {
		admitted := 0
		h.books.Set(func() { admitted = len(h.books.Agents) })
		return admitted == 1 && h.brokers[0].disp.Active() == 0 && h.keys.guarded() == 0
	})
	// The queue is empty: the next job is that of the next request.
	r := h.ask("chat", body(true), nil)
	run := h.pull()
	run.done("")
	if _, last, _ := r.read(); last.Request != run.job.Request || last.Kind != schemas.FrameDone {
		t.Errorf("end %+v of job %s", last, run.job.Request)
	}
}

// One that has answered once has to go on, and one that never has needn't.
func TestSilence(t *testing.T) {
	h := build(t, plan{ingress: ingress.Config{Beat: 20 * time.Millisecond, Silence: 1500 * time.Millisecond}})
	mute := h.ask("chat", body(true), nil)
	muteRun := h.pull()
	talker := h.ask("chat", body(true), nil)
	run := h.pull()
	_, m := talker.next()
	if err := m.Respond(nil); err != nil {
		t.Fatal(err)
	}
	at := time.Now()
	for time.Since(at) < 4*time.Second { // longer than it may be silent
		if a, m := talker.next(); a.Kind == schemas.FrameProgress {
			if err := m.Respond(nil); err != nil {
				t.Fatal(err)
			}
		}
	}
	if v := run.request(schemas.Frame{Kind: schemas.FrameProgress}); !v.Go {
		t.Fatalf("ended, though the publisher answers: %+v", v)
	}
	run.stopped() // now it doesn't
	muteRun.done("")
	if _, last, _ := mute.read(); last.Kind != schemas.FrameDone {
		t.Errorf("who never answered got %+v", last.Error)
	}
}

func TestRevocation(t *testing.T) {
	h := build(t, plan{})
	r := h.ask("chat", body(true), nil)
	run := h.pull()
	run.chunk(`{"a":1}` + "\n")
	h.until("a guard", func() bool { return h.keys.guarded() == 1 })
	h.keys.revoke(key, schemas.Errorf(schemas.CodeKeyInvalid, "revoked"))
	r.wantError(schemas.CodeKeyInvalid)
	run.stopped()
}

// A cancel works at whichever broker takes it, for requests of the same key only.
func TestCancel(t *testing.T) {
	h := build(t, plan{brokers: 2})
	other := apikeyOf(h, "key_2")
	for range 6 {
		r := h.ask("chat", body(true), nil)
		run := h.pull()
		r.next()
		ask := string(schemas.CancelRequest{Request: r.id}.Encode())
		m, err := other.Request(schemas.InSubject("key_2", "cancel"), []byte(ask), patience)
		if err != nil {
			t.Fatal(err)
		}
		if a, err := schemas.DecodeAnswer(m.Data); err != nil || a.Error.Code != schemas.CodeInvalidValue || !run.request(schemas.Frame{Kind: schemas.FrameProgress}).Go {
			t.Fatalf("a stranger's cancel: %s, %v", m.Data, err)
		}
		m, err = h.pub.Request(schemas.InSubject(key, "cancel"), []byte(ask), patience)
		if err != nil || string(m.Data) != `{"kind":"cancelled","request_id":"`+string(r.id)+`"}` {
			t.Fatalf("%s, %v", m.Data, err)
		}
		r.wantError(schemas.CodeNotFound)
		run.stopped()
		r.silent()
	}
}

// apikeyOf makes another key of the same tenant, and connects with it.
func apikeyOf(h *house, id schemas.KeyID) *nats.Conn {
	h.keys.mu.Lock()
	identity := h.keys.known[key]
	identity.Key = id
	h.keys.known[id] = identity
	h.keys.mu.Unlock()
	return h.server.Publisher(id, otherSecret)
}

// A broker that stops finishes what runs, and takes nothing new.
func TestDrain(t *testing.T) {
	h := build(t, plan{ingress: ingress.Config{Drain: patience}})
	r := h.ask("chat", body(true), nil)
	run := h.pull()
	run.chunk(`{"a":1}` + "\n")
	h.brokers[0].stop()
	h.until("nobody to answer", func() bool {
		_, err := h.pub.Request(schemas.InSubject(key, "models"), nil, time.Second)
		return errors.Is(err, nats.ErrNoResponders)
	})
	run.done(`{"b":2}` + "\n")
	if text, last, _ := r.read(); text != `{"a":1}{"b":2}` || last.Kind != schemas.FrameDone {
		t.Errorf("text %s, end %+v", text, last)
	}
	if err := <-h.brokers[0].ended; err != nil {
		t.Error(err)
	}
}

// What takes longer than the drain ends with an error that says so.
func TestDrainEnds(t *testing.T) {
	h := build(t, plan{ingress: ingress.Config{Drain: 100 * time.Millisecond}})
	r := h.ask("chat", body(true), nil)
	run := h.pull()
	h.brokers[0].stop()
	if last := r.wantError(schemas.CodeInternalError); !strings.Contains(last.Error.Message, "shutting down") {
		t.Errorf("error %+v", last.Error)
	}
	run.stopped()
	if err := <-h.brokers[0].ended; err != nil {
		t.Error(err)
	}
}

// A broker whose own connection was lost doesn't pretend that the reply is whole.
func TestOwnConnectionLost(t *testing.T) {
	var conn *nats.Conn
	h := build(t, plan{parts: func(p *ingress.Parts) { conn = p.Conn }})
	r := h.ask("chat", body(true), nil)
	run := h.pull()
	run.chunk(`{"a":1}` + "\n")
	for a, _ := r.next(); a.Kind != schemas.FrameChunk; a, _ = r.next() {
	}
	before := conn.Stats().Reconnects
	if err := conn.ForceReconnect(); err != nil {
		t.Fatal(err)
	}
	h.until("the connection to be back", func() bool { return conn.Stats().Reconnects > before })
	if last := r.wantError(schemas.CodeInternalError); !strings.Contains(last.Error.Message, "lost") || last.RetryAfter == 0 {
		t.Errorf("error %+v", last.Error)
	}
	run.stopped()
}

// A key that asks for more than may be on its way to admission is told so, and delays no
// other.
func TestEntrance(t *testing.T) {
	h := build(t, plan{})
	slow := make(chan struct{})
	h.keys.mu.Lock() // nobody gets further than to this
	go func() {
		<-slow
		h.keys.mu.Unlock()
	}()
	sub, err := h.pub.SubscribeSync(h.pub.NewInbox())
	if err != nil {
		t.Fatal(err)
	}
	if err := sub.SetPendingLimits(-1, -1); err != nil {
		t.Fatal(err)
	}
	for range 300 {
		if err := h.pub.PublishRequest(schemas.InSubject(key, "chat"), sub.Subject, nil); err != nil {
			t.Fatal(err)
		}
	}
	codes := map[schemas.Code]int{}
	count := func(n int) {
		for range n {
			m, err := sub.NextMsg(patience)
			if err != nil {
				t.Fatal(err)
			}
			a, err := schemas.DecodeAnswer(m.Data)
			if err != nil {
				t.Fatal(err)
			}
			codes[a.Error.Code]++
		}
	}
	count(300 - 256)
	if codes[schemas.CodeConcurrencyLimit] != 300-256 {
		t.Errorf("%v", codes)
	}
	close(slow)
	count(256)
	if codes[schemas.CodeInvalidJSON] != 256 {
		t.Errorf("%v", codes)
	}
	h.ask("chat", "", nil).wantError(schemas.CodeInvalidJSON)
}
