package bus_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/internal/natstest"
	"github.com/ownllm/ownllm/schemas"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	tenant = schemas.TenantID("ten_1")
	agentA = schemas.AgentID("agt_a")
	agentB = schemas.AgentID("agt_q") // in the same stream as agentA
	agentC = schemas.AgentID("agt_b") // in another one
	model  = "qwen/qwen2.5:32b"

	// patience is how long a test waits for what has to come.
	patience = 30 * time.Second
)

func job(request string, attempt int) *schemas.Job {
	return &schemas.Job{
		Version: schemas.ProtocolVersion, Request: schemas.RequestID(request), Attempt: attempt,
		Nonce: schemas.NewNonce(), Owner: "own_1", Tenant: tenant, Operation: "chat", Model: model,
		Deadline: time.Now().Add(time.Minute).UnixMilli(),
	}
}

// pull asks a consumer for one message.
func pull(t *testing.T, nc *nats.Conn, consumer string, wait time.Duration) *nats.Msg {
	t.Helper()
	inbox := nc.NewInbox()
	sub, err := nc.SubscribeSync(inbox)
	if err != nil {
		t.Fatal(err)
	}
	defer sub.Unsubscribe()
	request, err := json.Marshal(map[string]any{"batch": 1, "expires": wait.Nanoseconds()})
	if err != nil {
		t.Fatal(err)
	}
	if err := nc.PublishRequest("$JS.API.CONSUMER.MSG.NEXT."+schemas.JobStream(agentA)+"."+consumer, inbox, request); err != nil {
		t.Fatal(err)
	}
	m, err := sub.NextMsg(wait + patience)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestQueueBoundIsPerAgentAndModelAndCountsWhatRuns(t *testing.T) {
	nc, q := natstest.Start(t).Queue(2)
	ctx := t.Context()
	name, err := q.EnsureConsumer(ctx, tenant, agentA, model)
	if err != nil {
		t.Fatal(err)
	}
	for i, id := range []string{"req_1", "req_2"} {
		if _, err := q.Publish(ctx, agentA, job(id, 1), "{}", nats.Header{}); err != nil {
			t.Fatalf("job %d: %v", i, err)
		}
	}
	running := pull(t, nc, name, patience)
	if len(running.Data) == 0 {
		t.Fatalf("nothing was delivered: %v", running.Header)
	}
	third := job("req_3", 1)
	if _, err := q.Publish(ctx, agentA, third, "{}", nats.Header{}); !errors.Is(err, bus.ErrQueueFull) {
		t.Fatalf("third job of two: got %v, want ErrQueueFull", err)
	}
	if _, err := q.Publish(ctx, agentB, job("req_4", 1), "{}", nats.Header{}); err != nil {
		t.Fatalf("another agent's queue is full too: %v", err)
	}
	// An acknowledged job makes room, and a refusal hasn't used up the id.
	if err := nc.Publish(running.Reply, []byte("+ACK")); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(patience)
	for {
		_, err := q.Publish(ctx, agentA, third, "{}", nats.Header{})
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("no room after an acknowledgement: %v", err)
		}
	}
}

// A failover publishes the same request to another agent inside the deduplication
// window. Without the attempt in the id JetStream would swallow it.
func TestSecondAttemptIsNotADuplicate(t *testing.T) {
	_, q := natstest.Start(t).Queue(10)
	first, err := q.Publish(t.Context(), agentA, job("req_1", 1), "{}", nats.Header{})
	if err != nil {
		t.Fatal(err)
	}
	second, err := q.Publish(t.Context(), agentB, job("req_1", 2), "{}", nats.Header{})
	if err != nil {
		t.Fatal(err)
	}
	if second <= first {
		t.Fatalf("second attempt has sequence %d, not after %d", second, first)
	}
	if _, err := q.Publish(t.Context(), agentB, job("req_1", 2), "{}", nats.Header{}); err == nil {
		t.Fatal("the same attempt was published twice without an error")
	}
}

// The jobs of different agents may be in different streams. What is said of one is said of all.
func TestDepthsOfAllStreams(t *testing.T) {
	_, q := natstest.Start(t).Queue(10)
	agents := []schemas.AgentID{agentA, agentB, agentC}
	if one, two := schemas.JobStream(agentA), schemas.JobStream(agentC); one != schemas.JobStream(agentB) || one == two {
		t.Fatalf("the agents are in the streams %s, %s and %s", one, schemas.JobStream(agentB), two)
	}
	for i, agent := range agents {
		for n := range i + 1 {
			if _, err := q.Publish(t.Context(), agent, job(fmt.Sprintf("req_%d_%d", i, n), 1), "{}", nats.Header{}); err != nil {
				t.Fatal(err)
			}
		}
	}
	of := func(i int) string { return schemas.JobSubject(tenant, agents[i], model) }
	all := map[string]uint64{of(0): 1, of(1): 2, of(2): 3}
	for _, c := range []struct {
		tenant schemas.TenantID
		agents []schemas.AgentID
		want   map[string]uint64
	}{
		{tenant, nil, all},
		{tenant, agents, all},
		{tenant, []schemas.AgentID{agentC}, map[string]uint64{of(2): 3}},
		{"ten_other", nil, map[string]uint64{}},
	} {
		got, err := q.Depths(t.Context(), c.tenant, c.agents...)
		if diff := cmp.Diff(c.want, got); diff != "" || err != nil {
			t.Errorf("%s, %v: %v\n%s", c.tenant, c.agents, err, diff)
		}
	}
}

func TestDeletedJobIsNotDelivered(t *testing.T) {
	nc, q := natstest.Start(t).Queue(10)
	ctx := t.Context()
	name, err := q.EnsureConsumer(ctx, tenant, agentA, model)
	if err != nil {
		t.Fatal(err)
	}
	seq, err := q.Publish(ctx, agentA, job("req_1", 1), "{}", nats.Header{})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time it is gone already
		if err := q.Delete(ctx, agentA, seq); err != nil {
			t.Fatal(err)
		}
	}
	// JetStream has other words for a message that is gone from between others.
	var between uint64
	for i := range 3 {
		n, err := q.Publish(ctx, agentB, job(fmt.Sprintf("req_b%d", i), 1), "{}", nats.Header{})
		if err != nil {
			t.Fatal(err)
		}
		if i == 1 {
			between = n
		}
	}
	for range 2 {
		if err := q.Delete(ctx, agentB, between); err != nil {
			t.Fatal(err)
		}
	}
	if m := pull(t, nc, name, 200*time.Millisecond); m.Header.Get("Status") != "408" {
		t.Fatalf("got %v %q, want nothing", m.Header, m.Data)
	}
}

// Consumers live in memory, jobs on disk: after a restart the jobs are still there,
// and the consumer has to be made again.
func TestJobsOutliveARestart(t *testing.T) {
	server := natstest.Start(t)
	nc, q := server.Queue(10)
	ctx := t.Context()
	name, err := q.EnsureConsumer(ctx, tenant, agentA, model)
	if err != nil {
		t.Fatal(err)
	}
	want := job("req_1", 1)
	if _, err := q.Publish(ctx, agentA, want, `{"a":1}`, nats.Header{}); err != nil {
		t.Fatal(err)
	}
	server.Restart(func() {
		if _, err := q.Publish(ctx, agentA, job("req_2", 1), "{}", nats.Header{}); !bus.Down(err) {
			t.Errorf("publish without a server: got %v, want an error that says that the bus is down", err)
		}
	})
	deadline := time.Now().Add(patience)
	for {
		ensure, cancel := context.WithTimeout(ctx, time.Second)
		again, err := q.EnsureConsumer(ensure, tenant, agentA, model)
		cancel()
		if err == nil && again == name {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("consumer not made again: %v", err)
		}
	}
	m := pull(t, nc, name, patience)
	got, body, err := schemas.DecodeJob(m.Data)
	if err != nil {
		t.Fatalf("%v (%v)", err, m.Header)
	}
	if got.Nonce != want.Nonce || string(body) != `{"a":1}` {
		t.Fatalf("got job %+v with body %q", got, body)
	}
}

// Names go into file names and subjects.
func TestConsumerNamesAreSafe(t *testing.T) {
	seen := map[string]string{}
	for _, m := range []string{"a", "a.b", "a>b", "../../x", "a b", "ä", strings.Repeat("x", 5000)} {
		name := bus.ConsumerName("agt_a.b", m)
		if strings.ContainsAny(name, ".*> /\\") || len(name) > 200 {
			t.Errorf("consumer of model %.20q has the name %q", m, name)
		}
		if other, ok := seen[name]; ok {
			t.Errorf("models %q and %q share a consumer", m, other)
		}
		seen[name] = m
	}
}

func TestConnectErrorHidesThePassword(t *testing.T) {
	_, err := bus.Connect(bus.Config{URL: "nats://me:hunter2@127.0.0.1:1", Name: "x"}, natstest.Log)
	if !errors.Is(err, bus.ErrUnavailable) {
		t.Fatalf("got %v, want ErrUnavailable", err)
	}
	if strings.Contains(err.Error(), "hunter2") {
		t.Fatalf("the error shows the password: %v", err)
	}
}

// An agent may run as many jobs at once as the queue takes: a server's own bound on messages
// that aren't acknowledged, 1000, isn't ours.
func TestManyJobsRunAtOnce(t *testing.T) {
	const jobs = 1100
	nc, q := natstest.Start(t).Queue(jobs)
	name, err := q.EnsureConsumer(t.Context(), tenant, agentA, model)
	if err != nil {
		t.Fatal(err)
	}
	inbox := nc.NewInbox()
	sub, err := nc.SubscribeSync(inbox)
	if err != nil {
		t.Fatal(err)
	}
	for i := range jobs {
		if _, err := q.Publish(t.Context(), agentA, job(fmt.Sprint("req_", i), 1), "{}", nats.Header{}); err != nil {
			t.Fatalf("job %d: %v", i, err)
		}
	}
	request := fmt.Sprintf(`{"batch":%d,"expires":%d}`, jobs, patience)
	if err := nc.PublishRequest("$JS.API.CONSUMER.MSG.NEXT."+schemas.JobStream(agentA)+"."+name, inbox, []byte(request)); err != nil {
		t.Fatal(err)
	}
	for i := range jobs {
		if m, err := sub.NextMsg(2 * patience); err != nil || len(m.Data) == 0 {
			t.Fatalf("job %d wasn't delivered: %v, %v", i, m, err)
		}
	}
}
