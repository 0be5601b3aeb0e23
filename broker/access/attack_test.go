package access_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/internal/natstest"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(stack.Tests{M: m}) }

const (
	patience = 30 * time.Second
	tenant   = schemas.TenantID("ten_1")
	other    = schemas.TenantID("ten_2")
	mallory  = schemas.AgentID("agt_mallory")
	victim   = schemas.AgentID("agt_dave") // whose jobs are in the same stream as mallory's
	model    = "qwen/qwen2.5:32b"
)

// bench is a server with two agents of two tenants, each with a queue, and somebody who
// sees all that is published in the agents' account.
type bench struct {
	t       *testing.T
	core    *nats.Conn
	queue   *bus.Queue
	house   *nats.Conn // of edges and brokers
	mallory *nats.Conn
	victim  *nats.Conn
	seen    *nats.Subscription

	mu      sync.Mutex
	refused []error // what the server didn't let mallory do
}

// newBench connects mallory and the victim to a server, whatever kind it is.
func newBench(t *testing.T, server site) *bench {
	t.Helper()
	if schemas.JobStream(mallory) != schemas.JobStream(victim) {
		t.Fatal("mallory and its victim should share a stream")
	}
	b := &bench{t: t}
	b.core, b.queue = server.Queue(10)
	for agent, of := range map[schemas.AgentID]schemas.TenantID{mallory: tenant, victim: other} {
		if _, err := b.queue.EnsureConsumer(t.Context(), of, agent, model); err != nil {
			t.Fatal(err)
		}
	}
	b.house = server.Connect("house")
	b.mallory = server.Agent(tenant, mallory, model)
	b.mallory.SetErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.refused = append(b.refused, err)
	})
	b.victim = server.Agent(other, victim, model)
	var err error
	if b.seen, err = b.house.SubscribeSync(">"); err != nil {
		t.Fatal(err)
	}
	b.must(b.house.Flush())
	return b
}

// site is a nats-server, embedded or by itself.
type site interface {
	Connect(name string) *nats.Conn
	Ingress(name string) *nats.Conn
	Config(name string) bus.Config
	Open(bus.Config) *nats.Conn
	System() *nats.Conn
	Agents() *natstest.Agents
	AgentConfig(schemas.TenantID, schemas.AgentID, ...string) bus.Config
	Queue(perModel int64) (*nats.Conn, *bus.Queue)
	Agent(schemas.TenantID, schemas.AgentID, ...string) *nats.Conn
}

func (b *bench) must(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

// job puts a job into the queue of an agent and returns its place in the stream.
func (b *bench) job(of schemas.TenantID, agent schemas.AgentID) uint64 {
	b.t.Helper()
	job := &schemas.Job{
		Version: schemas.ProtocolVersion, Request: schemas.NewRequestID(), Attempt: 1, Nonce: schemas.NewNonce(),
		Owner: "own_1", Tenant: of, Operation: "chat", Model: model, Deadline: time.Now().Add(time.Minute).UnixMilli(),
	}
	seq, err := b.queue.Publish(b.t.Context(), agent, job, `{"model":"x"}`, nats.Header{})
	b.must(err)
	return seq
}

// stored are the messages of both streams, by subject.
func (b *bench) stored() map[string]uint64 {
	b.t.Helper()
	all := make(map[string]uint64)
	for _, stream := range []string{schemas.JobStream(victim), schemas.UsageStream} {
		m, err := b.core.Request("$JS.API.STREAM.INFO."+stream, []byte(`{"subjects_filter":">"}`), patience)
		b.must(err)
		var info struct {
			State struct {
				Subjects map[string]uint64 `json:"subjects"`
			} `json:"state"`
		}
		b.must(json.Unmarshal(m.Data, &info))
		for subject, n := range info.State.Subjects {
			all[subject] = n
		}
	}
	return all
}

// open counts the deliveries of the victim that aren't acknowledged.
func (b *bench) open(agent schemas.AgentID) int {
	b.t.Helper()
	m, err := b.core.Request("$JS.API.CONSUMER.INFO."+schemas.JobStream(agent)+"."+bus.ConsumerName(agent, model), nil, patience)
	b.must(err)
	var info struct {
		Acks int `json:"num_ack_pending"`
	}
	b.must(json.Unmarshal(m.Data, &info))
	return info.Acks
}

// settled waits until the server has done all that mallory asked of it.
func (b *bench) settled() {
	b.t.Helper()
	b.must(b.mallory.Flush())
	b.must(b.core.Flush())
	b.stored()
	b.must(b.house.Flush())
}

// heard returns what was published in the agents' account since the last call, but for
// inboxes of the house itself.
func (b *bench) heard() (list []*nats.Msg) {
	b.t.Helper()
	for {
		n, _, err := b.seen.Pending()
		b.must(err)
		if n == 0 {
			return list
		}
		m, err := b.seen.NextMsg(patience)
		b.must(err)
		list = append(list, m)
	}
}

func next(agent schemas.AgentID) string {
	return "$JS.API.CONSUMER.MSG.NEXT." + schemas.JobStream(agent) + "." + bus.ConsumerName(agent, model)
}

// pull takes a job of its own queue, as any worker does.
func pull(t *testing.T, nc *nats.Conn, agent schemas.AgentID) *nats.Msg {
	t.Helper()
	m, err := nc.Request(next(agent), []byte(`{"batch":1,"expires":5000000000}`), patience)
	if err != nil || len(m.Data) == 0 {
		t.Fatalf("%s can't pull its own jobs: %v %v", agent, m, err)
	}
	return m
}

// What a worker needs works with what an agent may do.
func TestAgentCanWork(t *testing.T) { eachSite(t, canWork) }

func canWork(t *testing.T, server site) {
	b := newBench(t, server)
	b.job(tenant, mallory)
	m := pull(t, b.mallory, mallory)
	if b.open(mallory) != 1 {
		t.Error("the job isn't with the worker")
	}
	b.must(b.mallory.Publish(m.Reply, []byte("+WPI")))
	b.must(b.mallory.Publish(m.Reply, []byte("+ACK")))
	stack.Until(t, patience, "the job to be gone with its acknowledgement", func() bool { return len(b.stored()) == 0 })
	report := &schemas.UsageReport{Version: schemas.ProtocolVersion, Request: "req_1", Attempt: 1}
	b.must(bus.ReportUsage(t.Context(), b.mallory, tenant, mallory, report))
	if all := b.stored(); all[schemas.UsageSubject(tenant, mallory)] != 1 {
		t.Errorf("the report isn't stored: %v", all)
	}
	for _, subject := range []string{
		schemas.OutSubject(mallory, "own_1", "n"), schemas.HeartbeatSubject(tenant, mallory), schemas.HelloSubject(tenant, mallory),
		schemas.BodySubject(mallory, "own_1", "n"),
	} {
		b.must(b.mallory.PublishRequest(subject, b.mallory.NewInbox(), []byte("word")))
		b.settled()
		if got := b.heard(); len(got) == 0 || got[len(got)-1].Subject != subject {
			t.Errorf("%s doesn't arrive", subject)
		}
	}
	sub, err := b.mallory.Subscribe(schemas.ControlSubject(mallory), func(m *nats.Msg) { _ = m.Respond([]byte("here")) })
	b.must(err)
	defer sub.Unsubscribe()
	b.must(b.mallory.Flush())
	for range 3 {
		if m, err := b.house.Request(schemas.ControlSubject(mallory), nil, patience); err != nil || string(m.Data) != "here" {
			t.Errorf("a question gets %v, %v", m, err)
		}
	}
	if len(b.refused) != 0 {
		t.Errorf("refused: %v", b.refused)
	}
}

// An agent's credential opens nothing of another agent, and nothing of JetStream but its
// own consumers.
func TestAgentIsFencedIn(t *testing.T) { eachSite(t, fencedIn) }

func fencedIn(t *testing.T, server site) {
	b := newBench(t, server)
	b.job(other, victim)
	before := fmt.Sprint(b.stored())
	theirs := bus.ConsumerName(victim, model)
	ours := bus.ConsumerName(mallory, model)
	for _, subject := range []string{
		next(victim),
		"$JS.ACK." + schemas.JobStream(victim) + "." + theirs + ".1.1.1.1.0",
		"$JS.ACK._.x." + schemas.JobStream(victim) + "." + theirs + ".1.1.1.1.0",
		"$JS.API.INFO",
		"$JS.API.STREAM.NAMES",
		"$JS.API.STREAM.INFO." + schemas.JobStream(victim),
		"$JS.API.STREAM.PURGE." + schemas.JobStream(victim),
		"$JS.API.STREAM.DELETE." + schemas.JobStream(victim),
		"$JS.API.STREAM.MSG.GET." + schemas.JobStream(victim),
		"$JS.API.STREAM.MSG.DELETE." + schemas.JobStream(victim),
		"$JS.API.STREAM.CREATE.MINE",
		"$JS.API.DIRECT.GET." + schemas.JobStream(victim),
		"$JS.API.CONSUMER.CREATE." + schemas.JobStream(victim),
		"$JS.API.CONSUMER.CREATE." + schemas.JobStream(mallory) + "." + ours,
		"$JS.API.CONSUMER.CREATE." + schemas.JobStream(mallory) + "." + ours + "." + schemas.JobSubject(other, victim, model),
		"$JS.API.CONSUMER.DURABLE.CREATE." + schemas.JobStream(mallory) + "." + ours,
		"$JS.API.CONSUMER.DELETE." + schemas.JobStream(mallory) + "." + ours,
		"$JS.API.CONSUMER.INFO." + schemas.JobStream(victim) + "." + theirs,
		"$JS.API.CONSUMER.INFO." + schemas.JobStream(mallory) + "." + ours,
		"$JS.API.CONSUMER.MSG.NEXT." + schemas.UsageStream + ".settle",
		"$JS.ACK." + schemas.UsageStream + ".settle.1.1.1.1.0",
		schemas.JobSubject(other, victim, model),
		schemas.JobSubject(tenant, mallory, model),
		schemas.HeartbeatSubject(other, victim),
		schemas.HeartbeatSubject(other, mallory),
		schemas.HelloSubject(other, victim),
		schemas.UsageSubject(other, victim),
		schemas.UsageSubject(tenant, mallory) + ".more",
		schemas.OutSubject(victim, "own_1", "nonce"),
		schemas.BodySubject(victim, "own_1", "nonce"),
		schemas.ControlSubject(victim),
		schemas.ControlSubject(mallory),
		"_INBOX.anybody",
		schemas.AgentInboxPrefix(victim) + ".x",
		"_R_.x.y",
		"$SYS.REQ.USER.AUTH", "$SYS.REQ.SERVER.PING", "$SYS.ACCOUNT.AGENTS.DISCONNECT",
	} {
		b.heard()
		b.mu.Lock()
		b.refused = nil
		b.mu.Unlock()
		b.must(b.mallory.PublishRequest(subject, schemas.AgentInboxPrefix(mallory)+".a", []byte(`{}`)))
		b.settled()
		if got := b.heard(); len(got) > 0 {
			t.Errorf("publishing to %s lets %s through", subject, got[0].Subject)
		}
		b.expectRefusal("publish to " + subject)
	}
	for _, subject := range []string{
		">", "*", "_INBOX.>", "_INBOX_*.>", "ownllm.>", "$JS.>", "$SYS.>", schemas.HeartbeatWildcard, schemas.HelloWildcard, schemas.JobSubjects,
		schemas.ControlSubject(victim), schemas.Prefix + "ctl.*", schemas.AgentInboxPrefix(victim) + ".>",
		schemas.OutWildcard("own_1"), schemas.BodyWildcard("own_1"),
		schemas.HeartbeatSubject(other, victim), schemas.UsageSubjects,
	} {
		b.mu.Lock()
		b.refused = nil
		b.mu.Unlock()
		sub, err := b.mallory.SubscribeSync(subject)
		b.must(err)
		b.settled()
		b.expectRefusal("subscribe to " + subject)
		_ = sub.Unsubscribe()
	}
	if after := fmt.Sprint(b.stored()); after != before || b.open(victim) != 0 {
		t.Errorf("the streams hold %s, and held %s; the victim has %d", after, before, b.open(victim))
	}
	pull(t, b.victim, victim)
}

func (b *bench) expectRefusal(what string) {
	b.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		b.mu.Lock()
		n := len(b.refused)
		right := n > 0 && errors.Is(b.refused[0], nats.ErrPermissionViolation)
		b.mu.Unlock()
		if right {
			return
		}
		if n > 0 || time.Now().After(deadline) {
			b.t.Errorf("%s isn't refused: %v", what, b.refused)
			return
		}
	}
}

// The server answers to any reply subject. Whatever mallory asks that it may ask, with
// whatever reply subject, nothing is stored, no job of the victim is touched, and what
// comes out in the agents' account is nothing that edges and brokers take.
func TestForgedReplySubjects(t *testing.T) { eachSite(t, forgedReplies) }

func forgedReplies(t *testing.T, server site) {
	b := newBench(t, server)
	// The victim works on a job, and another waits.
	b.job(other, victim)
	theirs := pull(t, b.victim, victim)
	b.job(other, victim)
	pulls := []string{
		`{"batch":1,"no_wait":true}`,
		`{"batch":1,"expires":1000000}`,
		`{"batch":2,"expires":20000000,"idle_heartbeat":5000000}`,
		`nonsense`,
	}
	for _, reply := range []string{
		theirs.Reply, // an empty answer would acknowledge the victim's job
		"$JS.ACK." + schemas.JobStream(victim) + "." + bus.ConsumerName(victim, model) + ".1.1.1.1.0",
		next(victim),
		next(mallory),
		schemas.UsageSubject(other, victim),
		schemas.UsageSubject(tenant, mallory),
		schemas.JobSubject(other, victim, model),
		schemas.JobSubject(tenant, mallory, model),
		schemas.HeartbeatSubject(other, victim),
		schemas.HelloSubject(other, victim),
		schemas.OutSubject(victim, "own_1", "nonce"),
		schemas.ControlSubject(victim),
		schemas.AgentInboxPrefix(victim) + ".x",
		"$JS.API.STREAM.PURGE." + schemas.JobStream(victim),
		"$JS.API.STREAM.DELETE." + schemas.JobStream(victim),
		"$JS.API.CONSUMER.DELETE." + schemas.JobStream(victim) + "." + bus.ConsumerName(victim, model),
		"$SYS.REQ.SERVER.PING",
	} {
		name := strings.ReplaceAll(reply, ".", "-")
		before := fmt.Sprint(b.stored(), b.open(victim))
		check := func(what string) {
			t.Helper()
			b.settled()
			// Nothing signals that an answer has nowhere to go.
			for end := time.Now().Add(30 * time.Millisecond); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
				if after := fmt.Sprint(b.stored(), b.open(victim)); after != before {
					t.Fatalf("%s with the reply subject %s: the streams hold %s, and held %s", what, reply, after, before)
				}
			}
			for _, m := range b.heard() {
				b.harmless(what, m)
			}
		}
		t.Run(name, func(t *testing.T) {
			for _, body := range pulls {
				b.must(b.mallory.PublishRequest(next(mallory), reply, []byte(body)))
				check("pull " + body)
			}
			// With a job that is there, and one that comes later.
			for _, early := range []bool{true, false} {
				if early {
					b.job(tenant, mallory)
				}
				b.must(b.mallory.PublishRequest(next(mallory), reply, []byte(`{"batch":1,"expires":200000000}`)))
				if !early {
					b.settled()
					b.job(tenant, mallory)
				}
				b.settled()
				b.clear()
				check("pull of a job")
			}
			// Acknowledgements can be requests too.
			for _, word := range []string{"+ACK", "+NXT", `+NXT {"batch":1,"no_wait":true}`, "-NAK", "+WPI", "+TERM", ""} {
				b.job(tenant, mallory)
				m := pull(t, b.mallory, mallory)
				b.job(tenant, mallory)
				b.must(b.mallory.PublishRequest(m.Reply, reply, []byte(word)))
				b.settled()
				b.clear()
				check("acknowledgement " + word)
			}
		})
	}
	// A report can be published for an answer.
	for _, reply := range []string{
		theirs.Reply, next(victim), schemas.UsageSubject(other, victim), schemas.HeartbeatSubject(other, victim), schemas.JobSubject(other, victim, model),
	} {
		b.must(b.mallory.PublishRequest(schemas.UsageSubject(tenant, mallory), reply, []byte("a report")))
		b.settled()
		all := b.stored()
		delete(all, schemas.UsageSubject(tenant, mallory))
		if len(all) != 1 || all[schemas.JobSubject(other, victim, model)] != 2 || b.open(victim) != 1 {
			t.Errorf("a report with the reply subject %s leaves %v, %d", reply, all, b.open(victim))
		}
		for _, m := range b.heard() {
			b.harmless("report", m)
		}
	}
}

// clear takes mallory's jobs out of the queue, and makes its consumer anew.
func (b *bench) clear() {
	b.t.Helper()
	defer func() {
		consumer := schemas.JobStream(mallory) + "." + bus.ConsumerName(mallory, model)
		if _, err := b.core.Request("$JS.API.CONSUMER.DELETE."+consumer, nil, patience); err != nil {
			b.t.Fatal(err)
		}
		if _, err := b.queue.EnsureConsumer(b.t.Context(), tenant, mallory, model); err != nil {
			b.t.Fatal(err)
		}
	}()
	body := fmt.Sprintf(`{"filter":%q}`, schemas.JobSubject(tenant, mallory, model))
	if _, err := b.core.Request("$JS.API.STREAM.PURGE."+schemas.JobStream(mallory), []byte(body), patience); err != nil {
		b.t.Fatal(err)
	}
}

// harmless checks that a message that mallory made the server publish is nothing that
// edges and brokers take: it is no request that they would answer, and no heartbeat.
func (b *bench) harmless(what string, m *nats.Msg) {
	b.t.Helper()
	if schemas.AnswersTo(m.Subject, m.Reply) && !strings.Contains(m.Subject, string(mallory)) {
		b.t.Errorf("%s: the server published a request to %s", what, m.Subject)
	}
	var hb schemas.Heartbeat
	if json.Unmarshal(m.Data, &hb) == nil && hb.Version == schemas.ProtocolVersion && hb.State != "" && hb.Incarnation != "" {
		b.t.Errorf("%s: the server published %s to %s, which reads as a heartbeat", what, m.Data, m.Subject)
	}
}
