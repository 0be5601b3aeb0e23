package bus_test

import (
	"context"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/internal/natstest"
	"github.com/ownllm/ownllm/schemas"
)

func usageReport(request string) *schemas.UsageReport {
	return &schemas.UsageReport{
		Version: schemas.ProtocolVersion, Request: schemas.RequestID(request), Attempt: 1,
		Usage: schemas.Usage{PromptTokens: 17, CompletionTokens: 40},
	}
}

func storeReport(t *testing.T, nc *nats.Conn, request string) {
	t.Helper()
	if err := bus.ReportUsage(t.Context(), nc, tenant, agentA, usageReport(request)); err != nil {
		t.Fatal(err)
	}
}

// next takes reports until one comes, and checks whose it is.
func next(t *testing.T, reports *bus.Reports, most int) []bus.Report {
	t.Helper()
	for deadline := time.Now().Add(patience); ; {
		list, err := reports.Next(t.Context(), most)
		if err != nil && time.Now().After(deadline) {
			t.Fatal(err)
		}
		for _, r := range list {
			tenantOf, agentOf, err := schemas.ParseAgentSubject(r.Subject())
			if err != nil || tenantOf != tenant || agentOf != agentA {
				t.Errorf("report of %s, %s, %v", tenantOf, agentOf, err)
			}
		}
		if len(list) > 0 {
			return list
		}
		if time.Now().After(deadline) {
			t.Fatal("no report comes")
		}
	}
}

func request(t *testing.T, r bus.Report) schemas.RequestID {
	t.Helper()
	u, err := schemas.DecodeUsageReport(r.Data())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(usageReport(string(u.Request)), u); diff != "" {
		t.Errorf("report came back changed (-sent +got):\n%s", diff)
	}
	return u.Request
}

// A report is delivered to one broker until it is done, and comes at once.
func TestReports(t *testing.T) {
	server := natstest.Start(t)
	nc, q := server.Queue(10)
	_, other := server.Queue(10)
	first, second := q.Reports(), other.Reports()
	waiting := make(chan []bus.Report, 1)
	go func() { waiting <- next(t, first, 8) }()
	storeReport(t, nc, "req_1")
	begun := time.Now()
	list := <-waiting
	if took := time.Since(begun); len(list) != 1 || took > time.Second {
		t.Fatalf("%d reports after %s", len(list), took)
	}
	if id := request(t, list[0]); id != "req_1" {
		t.Errorf("got %s", id)
	}
	if got, err := second.Next(t.Context(), 8); len(got) != 0 || err != nil {
		t.Errorf("the other broker got %d reports, %v", len(got), err)
	}
	if err := list[0].Later(200 * time.Millisecond); err != nil {
		t.Fatal(err)
	}
	begun = time.Now()
	list = next(t, second, 8)
	if took := time.Since(begun); took > 1500*time.Millisecond {
		t.Errorf("what was put off for 200 ms came after %s", took)
	}
	if err := list[0].Done(); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"req_2", "req_3", "req_4"} {
		storeReport(t, nc, id)
	}
	// What one broker asked for in vain may still be on its way to it, so there may be fewer.
	if list = next(t, first, 2); len(list) > 2 {
		t.Errorf("got %d reports, want no more than the 2 that were asked for", len(list))
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	begun = time.Now()
	if _, err := first.Next(ctx, 8); err != nil || time.Since(begun) > time.Second {
		t.Errorf("when all is over: %v after %s", err, time.Since(begun))
	}
}

// Reports and what was done of them outlive a restart, and so does the memory of what is
// stored.
func TestReportsOutliveARestart(t *testing.T) {
	server := natstest.Start(t)
	nc, q := server.Queue(10)
	reports := q.Reports()
	storeReport(t, nc, "req_1")
	storeReport(t, nc, "req_2")
	list := next(t, reports, 1)
	done := request(t, list[0])
	if err := list[0].Done(); err != nil {
		t.Fatal(err)
	}
	// What it acknowledges a server does some time after it has read it, if it still runs.
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		stream, err := js.Stream(t.Context(), schemas.UsageStream)
		if err == nil && stream.CachedInfo().State.Msgs == 1 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("what is done is still there: %v", err)
		}
	}
	server.Restart(func() {
		if err := bus.ReportUsage(t.Context(), nc, tenant, agentA, usageReport("req_3")); !bus.Down(err) {
			t.Errorf("report without a server: got %v, want an error that says that the bus is down", err)
		}
	})
	open := "req_1"
	if done == "req_1" {
		open = "req_2"
	}
	for deadline := time.Now().Add(patience); ; {
		err := bus.ReportUsage(t.Context(), nc, tenant, agentA, usageReport(open))
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	list = next(t, reports, 8)
	if got := request(t, list[0]); len(list) != 1 || string(got) != open {
		t.Errorf("got %d reports, the first of %s, want that of %s", len(list), got, open)
	}
}

// Where there is no stream for them, nobody is told that a report was stored.
func TestReportWithoutAStream(t *testing.T) {
	server := natstest.Start(t)
	if err := bus.ReportUsage(t.Context(), server.Connect("worker"), tenant, agentA, usageReport("req_1")); err == nil {
		t.Error("a report that nobody has stored counts as stored")
	}
}
