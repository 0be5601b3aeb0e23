package ingress_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/desk"
	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/broker/ingress"
	"github.com/ownllm/ownllm/broker/presence"
	"github.com/ownllm/ownllm/broker/quota"
	"github.com/ownllm/ownllm/internal/logtest"
	"github.com/ownllm/ownllm/internal/natstest"
	"github.com/ownllm/ownllm/internal/quotatest"
	"github.com/ownllm/ownllm/schemas"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	tenant = schemas.TenantID("ten_1")
	agent  = schemas.AgentID("agt_a")
	model  = "qwen/qwen2.5:32b"
	key    = schemas.KeyID("key_1")

	patience = 30 * time.Second
)

var secret, otherSecret = apikey.New(), apikey.New()

// fakeKeys knows keys that a test changes by hand.
type fakeKeys struct {
	mu     sync.Mutex
	known  map[schemas.KeyID]books.Identity
	hashes map[apikey.Hash]schemas.KeyID
	errs   map[schemas.KeyID]error
	guards map[*func(*schemas.Error)]schemas.KeyID
}

// Identify implements ingress.Keys.
func (k *fakeKeys) Identify(_ context.Context, id schemas.KeyID) (books.Identity, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.errs[id]; err != nil {
		return books.Identity{}, err
	}
	if known, ok := k.known[id]; ok {
		return known, nil
	}
	return books.Identity{}, schemas.Errorf(schemas.CodeKeyInvalid, "unknown")
}

// Recognize implements ingress.Keys.
func (k *fakeKeys) Recognize(ctx context.Context, hash apikey.Hash, _ string) (books.Identity, error) {
	k.mu.Lock()
	id := k.hashes[hash]
	k.mu.Unlock()
	return k.Identify(ctx, id)
}

// GuardID implements ingress.Keys.
func (k *fakeKeys) GuardID(id books.Identity, end func(*schemas.Error)) (release func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.guards[&end] = id.Key
	return func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		delete(k.guards, &end)
	}
}

func (k *fakeKeys) revoke(id schemas.KeyID, why *schemas.Error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.errs[id] = why
	for end, guarded := range k.guards {
		if guarded == id {
			(*end)(why)
		}
	}
}

// guarded counts what goes on only as long as its key is valid.
func (k *fakeKeys) guarded() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.guards)
}

// house is an ingress with all that it needs, one publisher, and an agent that a test plays
// by hand.
type house struct {
	t      testing.TB
	server *natstest.Server
	table  *presence.Table
	keys   *fakeKeys
	books  *quotatest.Books
	log    *logtest.Book
	pub    *nats.Conn
	worker *nats.Conn
	// consumer is where the agent pulls.
	consumer string
	brokers  []*broker
}

// broker is one of the brokers of a house.
type broker struct {
	disp *dispatch.Dispatcher
	// stop ends the ingress, and ended gets how.
	stop  context.CancelFunc
	ended chan error
}

type plan struct {
	ingress ingress.Config
	brokers int
	parts   func(*ingress.Parts)
}

func build(t testing.TB, p plan) *house {
	t.Helper()
	h := &house{t: t, server: natstest.Start(t), table: presence.NewTable(), books: quotatest.New(), log: &logtest.Book{}}
	h.keys = &fakeKeys{
		known:  map[schemas.KeyID]books.Identity{key: {Key: key, Tenant: tenant, Slug: "acme", User: "usr_1", Scopes: []string{books.ScopeAll}, Concurrency: 32, QPS: 32}},
		hashes: map[apikey.Hash]schemas.KeyID{secret.Hash(): key},
		errs:   map[schemas.KeyID]error{}, guards: map[*func(*schemas.Error)]schemas.KeyID{},
	}
	_, queue := h.server.Queue(64)
	for range max(p.brokers, 1) {
		h.broker(p)
	}
	h.pub = h.server.Publisher(key, secret)
	h.worker = h.server.Agent(tenant, agent, model)
	var err error
	if h.consumer, err = queue.EnsureConsumer(t.Context(), tenant, agent, model); err != nil {
		t.Fatal(err)
	}
	inventory := schemas.Inventory{Models: []schemas.Model{{ID: model, State: schemas.ModelReady, Backend: "demo", Slots: 4, Capabilities: schemas.Capabilities{Completion: true}}}}
	h.table.Observe(tenant, agent, &schemas.Heartbeat{
		Version: schemas.ProtocolVersion, Incarnation: schemas.NewIncarnation(), State: schemas.AgentUp, Hash: inventory.Hash(), Inventory: &inventory, Slots: 4,
	}, time.Now())
	h.until("brokers that answer", func() bool {
		for range 8 * len(h.brokers) {
			if _, err := h.pub.Request(schemas.InSubject(key, "models"), nil, time.Second); err != nil {
				return false
			}
		}
		_, err := h.pub.Request(schemas.InSubject(key, "nonsense"), nil, time.Second)
		return err == nil
	})
	return h
}

// broker starts one more broker. All share a table, which hears nobody.
func (h *house) broker(p plan) {
	h.t.Helper()
	core := h.server.Core("core")
	queue, err := bus.NewQueue(core)
	if err != nil {
		h.t.Fatal(err)
	}
	tokens := h.server.Connect("tokens")
	feed := presence.NewFeed(tokens, h.table, natstest.Log)
	b := &broker{}
	b.disp = dispatch.New(dispatch.Parts{
		Tokens: tokens, Bulk: h.server.Connect("bulk"), Queue: queue, Agents: h.table, Feed: feed,
		Gate: h.books.Gate(h.t, quota.Config{}), Log: natstest.Log,
	}, dispatch.DefaultConfig())
	h.run(b.disp.Run)
	parts := ingress.Parts{
		Conn: h.server.Ingress("ingress"), Keys: h.keys, Desk: desk.New(h.table, feed), Dispatcher: b.disp,
		Log: slog.New(slog.NewTextHandler(h.log, nil)),
	}
	if p.parts != nil {
		p.parts(&parts)
	}
	b.stop, b.ended = h.run(ingress.New(p.ingress, parts).Run)
	h.brokers = append(h.brokers, b)
}

// run runs a part until the test ends, or stop is called.
func (h *house) run(part func(context.Context) error) (stop context.CancelFunc, ended chan error) {
	ctx, stop := context.WithCancel(context.Background())
	ended = make(chan error, 2)
	go func() {
		err := part(ctx)
		ended <- err
		ended <- err
	}()
	h.t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			h.t.Error(err)
		}
	})
	return stop, ended
}

// until waits for a condition that nothing signals.
func (h *house) until(what string, ok func() bool) {
	h.t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			h.t.Fatalf("waited in vain for %s; log:\n%s", what, h.log)
		}
	}
}

// reply is what a publisher hears of one request.
type reply struct {
	h   *house
	sub *nats.Subscription
	seq uint64
	id  schemas.RequestID
}

// ask sends a request, and returns where its answers come.
func (h *house) ask(operation, body string, header nats.Header) *reply {
	h.t.Helper()
	sub, err := h.pub.SubscribeSync(h.pub.NewInbox())
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { _ = sub.Unsubscribe() })
	m := &nats.Msg{Subject: schemas.InSubject(key, operation), Reply: sub.Subject, Header: header, Data: []byte(body)}
	if err := h.pub.PublishMsg(m); err != nil {
		h.t.Fatal(err)
	}
	return &reply{h: h, sub: sub}
}

func body(stream bool) string {
	return fmt.Sprintf(`{"model":%q,"messages":[{"role":"user","content":"x"}],"stream":%v}`, model, stream)
}

// next waits for the next message, and checks its number.
func (r *reply) next() (*schemas.Answer, *nats.Msg) {
	r.h.t.Helper()
	m, err := r.sub.NextMsg(patience)
	if err != nil {
		r.h.t.Fatalf("no message after %d: %v; log:\n%s", r.seq, err, r.h.log)
	}
	a, err := schemas.DecodeAnswer(m.Data)
	if err != nil {
		r.h.t.Fatalf("message %s: %v", m.Data, err)
	}
	if r.seq++; a.Seq != r.seq || r.id != "" && r.id != a.Request {
		r.h.t.Fatalf("message %s, want number %d of %q", m.Data, r.seq, r.id)
	}
	r.id = a.Request
	return a, m
}

// read reads to the end, and returns the text of the chunks, the last message and how often
// it was asked whether somebody is there.
func (r *reply) read() (text string, last *schemas.Answer, asked int) {
	r.h.t.Helper()
	for {
		a, _ := r.next()
		switch a.Kind {
		case schemas.FrameProgress:
			asked++
		case schemas.FrameChunk:
			text += string(a.Chunk)
		default:
			return text, a, asked
		}
	}
}

// wantError reads to the end, which has to be an error with the code.
func (r *reply) wantError(code schemas.Code) *schemas.Answer {
	r.h.t.Helper()
	_, last, _ := r.read()
	if last.Error == nil || last.Error.Code != code {
		r.h.t.Fatalf("the end is %s %+v, want %s", last.Kind, last.Error, code)
	}
	return last
}

// silent checks that nothing more comes: an answer to a later request is the first.
func (r *reply) silent() {
	r.h.t.Helper()
	r.h.ask("models", "", nil)
	if err := r.h.pub.Flush(); err != nil {
		r.h.t.Fatal(err)
	}
	if n, _, _ := r.sub.Pending(); n != 0 {
		m, err := r.sub.NextMsg(patience)
		r.h.t.Errorf("after the end came %s, %v", m.Data, err)
	}
}

// run is a job that the agent runs.
type run struct {
	h   *house
	ack string
	job *schemas.Job
	raw string
	run string
	seq uint64
}

// pull waits for a job, and claims it.
func (h *house) pull() *run {
	h.t.Helper()
	sub, err := h.worker.SubscribeSync(h.worker.NewInbox())
	if err != nil {
		h.t.Fatal(err)
	}
	defer sub.Unsubscribe()
	ask := fmt.Sprintf(`{"batch":1,"expires":%d}`, patience.Nanoseconds())
	if err := h.worker.PublishRequest("$JS.API.CONSUMER.MSG.NEXT."+schemas.JobStream(agent)+"."+h.consumer, sub.Subject, []byte(ask)); err != nil {
		h.t.Fatal(err)
	}
	m, err := sub.NextMsg(2 * patience)
	if err != nil || len(m.Data) == 0 {
		h.t.Fatalf("no job: %v", err)
	}
	job, raw, err := schemas.DecodeJob(m.Data)
	if err != nil {
		h.t.Fatal(err)
	}
	r := &run{h: h, ack: m.Reply, job: job, raw: string(raw), run: string(schemas.NewNonce())}
	if v := r.request(schemas.Frame{Kind: schemas.FrameClaim}); !v.Go {
		h.t.Fatalf("claim: %+v", v)
	}
	return r
}

func (r *run) encode(f schemas.Frame) (string, []byte) {
	r.h.t.Helper()
	f.Run = r.run
	b, err := schemas.AppendFrame(nil, &f)
	if err != nil {
		r.h.t.Fatal(err)
	}
	return schemas.OutSubject(agent, r.job.Owner, r.job.Nonce), b
}

// request sends a frame and returns the verdict.
func (r *run) request(f schemas.Frame) (v schemas.Verdict) {
	r.h.t.Helper()
	subject, b := r.encode(f)
	m, err := r.h.worker.Request(subject, b, patience)
	if err == nil {
		err = json.Unmarshal(m.Data, &v)
	}
	if err != nil {
		r.h.t.Fatal(err)
	}
	return v
}

// chunk sends the next lines, or the next piece.
func (r *run) chunk(lines string) {
	r.h.t.Helper()
	r.seq++
	subject, b := r.encode(schemas.Frame{Kind: schemas.FrameChunk, Seq: r.seq, Tokens: int(r.seq), Payload: []byte(lines)})
	if err := r.h.worker.Publish(subject, b); err != nil {
		r.h.t.Fatal(err)
	}
}

// done ends the reply.
func (r *run) done(lines string) {
	r.h.t.Helper()
	r.seq++
	r.request(schemas.Frame{
		Kind: schemas.FrameDone, Seq: r.seq, Tokens: int(r.seq), Payload: []byte(lines),
		Usage: &schemas.Usage{PromptTokens: 3, CompletionTokens: int(r.seq)},
	})
	if _, err := r.h.worker.Request(r.ack, []byte("+ACK"), patience); err != nil {
		r.h.t.Fatal(err)
	}
}

// stopped waits until the owner says that the run is over.
func (r *run) stopped() {
	r.h.t.Helper()
	r.h.until("the run to be over", func() bool { return !r.request(schemas.Frame{Kind: schemas.FrameProgress, Seq: r.seq}).Go })
}

// logged counts the lines of the log that hold the text.
func (h *house) logged(text string) int { return strings.Count(h.log.String(), text) }
