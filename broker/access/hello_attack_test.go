package access_test

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/presence"
	"github.com/ownllm/ownllm/broker/registry"
	"github.com/ownllm/ownllm/internal/logtest"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
)

// reported takes everything, and counts.
type reported struct {
	mu sync.Mutex
	n  int
}

func (r *reported) UpsertAgent(context.Context, books.AgentReport) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.n++
	return nil
}

func (r *reported) TouchAgents(context.Context, []schemas.AgentID) error { return nil }

func (r *reported) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.n
}

// An agent that says hello and wants the answer elsewhere gets none, wherever that is: the
// broker could publish there, and the agent couldn't.
func TestHelloWithAForgedReplySubject(t *testing.T) { eachSite(t, forgedHellos) }

func forgedHellos(t *testing.T, server site) {
	b := newBench(t, server)
	log, store := &logtest.Book{}, &reported{}
	nc := server.Connect("broker")
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- registry.New(nc, b.queue, store, presence.NewTable(), slog.New(slog.NewTextHandler(log, nil))).Run(ctx)
	}()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	hello := schemas.Hello{
		Version: schemas.ProtocolVersion, Incarnation: schemas.NewIncarnation(), Software: "test", Host: "host",
		Inventory: schemas.Inventory{Models: []schemas.Model{{ID: model, State: schemas.ModelReady}}},
	}.Encode()
	subject := schemas.HelloSubject(tenant, mallory)
	// This one is answered, so the broker is there.
	stack.Until(t, patience, "an answer", func() bool {
		m, err := b.mallory.Request(subject, hello, 200*time.Millisecond) // "house" listens, too, and is silent
		return err == nil && strings.Contains(string(m.Data), bus.ConsumerName(mallory, model))
	})
	b.settled()
	b.heard()
	before, taken := b.stored(), store.count()
	forged := []string{
		"",
		schemas.HeartbeatSubject(other, victim), schemas.HeartbeatSubject(tenant, mallory),
		schemas.HelloSubject(other, victim), schemas.HelloSubject(tenant, mallory),
		schemas.ControlSubject(victim), schemas.ControlSubject(mallory),
		schemas.OutSubject(victim, "own_1", "nonce"), schemas.BodySubject(victim, "own_1", "nonce"),
		schemas.JobSubject(other, victim, model), schemas.JobSubject(tenant, mallory, model),
		schemas.UsageSubject(other, victim), schemas.UsageSubject(tenant, mallory),
		schemas.AsideSubject(other, victim),
		schemas.AgentInboxPrefix(victim) + ".x.1", schemas.AgentInboxPrefix(mallory), schemas.AgentInboxPrefix(mallory) + "x.1",
		next(victim), "$JS.API.STREAM.PURGE." + schemas.JobStream(victim),
		"_INBOX.anybody", "anything",
	}
	for _, reply := range forged {
		if schemas.AnswersTo(subject, reply) {
			t.Errorf("mallory may be answered at %s", reply)
		}
		b.must(b.mallory.PublishMsg(&nats.Msg{Subject: subject, Reply: reply, Data: hello}))
	}
	b.settled()
	// This one the server itself refuses.
	b.must(b.mallory.PublishRequest(subject, "$JS.ACK."+schemas.JobStream(victim)+"."+bus.ConsumerName(victim, model)+".1.1.1.1.0", hello))
	b.settled()
	b.expectRefusal("a hello with an acknowledgement as its reply subject")
	stack.Until(t, patience, "the broker to have dropped them all", func() bool {
		return log.Count("hello with a foreign reply subject dropped") == len(forged)
	})
	b.must(nc.Flush())
	b.settled()
	for _, m := range b.heard() {
		if m.Subject != subject || string(m.Data) != string(hello) {
			t.Errorf("the broker published %q to %s", m.Data, m.Subject)
		}
	}
	if after := b.stored(); len(after) != len(before) {
		t.Errorf("stored is %v, and was %v", after, before)
	}
	if n := store.count(); n != taken {
		t.Errorf("%d of them were taken in", n-taken)
	}
	if m, err := b.mallory.Request(subject, hello, patience); err != nil || len(m.Data) == 0 {
		t.Errorf("a hello like any other afterwards: %v, %v", m, err)
	}
}
