package dispatch_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/schemas"
)

// slowStream stands in for a JetStream that takes its time: jobs come out of the
// channel, and the test acknowledges them.
func (h *house) slowStream() <-chan *nats.Msg {
	h.t.Helper()
	nc := h.server.Core("slow stream")
	jobs := make(chan *nats.Msg, 16)
	if _, err := nc.ChanSubscribe(schemas.JobSubjects, jobs); err != nil {
		h.t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		h.t.Fatal(err)
	}
	return jobs
}

// acknowledge tells the publisher that its job is stored.
func acknowledge(t testing.TB, m *nats.Msg, seq uint64) {
	t.Helper()
	if err := m.Respond(fmt.Appendf(nil, `{"stream":%q,"seq":%d}`, schemas.JobStreamPrefix+"00", seq)); err != nil {
		t.Fatal(err)
	}
}

// refuse tells the publisher that the queue is full.
func refuse(t testing.TB, m *nats.Msg) {
	t.Helper()
	const full = `{"error":{"code":503,"err_code":10077,"description":"maximum messages per subject exceeded"}}`
	if err := m.Respond([]byte(full)); err != nil {
		t.Fatal(err)
	}
}

// startLater starts a request whose publish takes its time. The channel is closed
// without a reply if the request is refused.
func (h *house) startLater(req dispatch.Request) <-chan *dispatch.Reply {
	started := make(chan *dispatch.Reply, 1)
	go func() {
		defer close(started)
		reply, _, err := h.d.Start(context.Background(), req)
		if err != nil {
			h.t.Error(err)
			return
		}
		started <- reply
	}()
	return started
}
