package bus

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/ownllm/ownllm/schemas"
)

const (
	// usageAge is how long a report waits for a broker; usageTwice for how long a report
	// that is published again is known as the same, which is longer than a worker tries.
	usageAge   = 24 * time.Hour
	usageTwice = 15 * time.Minute
	// usageConsumer is shared by all brokers. usageWait is how long one of them may be
	// busy with a report before another gets it.
	usageConsumer = "settle"
	usageWait     = 5 * time.Second
	// usageFetch is how long a broker waits for a report before it asks again: a server
	// that restarts has forgotten the question.
	usageFetch = 2 * time.Second
	// maxUsage bounds a report, in bytes, and usageOpen how many are in work at once.
	maxUsage  = 4 << 10
	usageOpen = 1000
)

// provisionUsage makes the stream of usage reports.
func (q *Queue) provisionUsage(ctx context.Context, replicas int) error {
	return q.provision(ctx, jetstream.StreamConfig{
		Name:        schemas.UsageStream,
		Description: "OwnLLM: what workers report of requests whose owner is gone",
		Subjects:    []string{schemas.UsageSubjects},
		Retention:   jetstream.WorkQueuePolicy,
		Storage:     jetstream.FileStorage,
		Replicas:    replicas,
		MaxAge:      usageAge,
		MaxMsgSize:  maxUsage,
		Duplicates:  usageTwice,
	})
}

// ReportUsage stores a report of an agent in the stream of usage reports. After an error
// it may be stored or not, and can be reported again: it is stored once, as long as it
// isn't Done before a server restarts, which forgets what it doesn't have.
func ReportUsage(ctx context.Context, nc *nats.Conn, tenant schemas.TenantID, agent schemas.AgentID, report *schemas.UsageReport) error {
	js, err := jetstream.New(nc)
	if err != nil {
		return fmt.Errorf("report usage of %s: %w", report.Request, err)
	}
	ctx, cancel := context.WithTimeout(ctx, publishWait)
	defer cancel()
	msg := &nats.Msg{
		Subject: schemas.UsageSubject(tenant, agent), Data: report.Encode(),
		Header: nats.Header{schemas.HeaderMsgID: {report.MsgID(tenant, agent)}},
	}
	if _, err := js.PublishMsg(ctx, msg, jetstream.WithRetryAttempts(0), jetstream.WithExpectStream(schemas.UsageStream)); err != nil {
		return fmt.Errorf("report usage of %s: %w", report.Request, err)
	}
	return nil
}

// Report is a usage report that has been delivered. It is delivered again, to some broker,
// until it is Done.
type Report struct{ msg jetstream.Msg }

// Subject says whose report it is.
func (r Report) Subject() string { return r.msg.Subject() }

// Data is a schemas.UsageReport as it is on the wire, or what somebody took for one.
func (r Report) Data() []byte { return r.msg.Data() }

// Done takes the report out of the stream.
func (r Report) Done() error { return r.msg.Ack() }

// Later has the report delivered again after a while.
func (r Report) Later(after time.Duration) error { return r.msg.NakWithDelay(after) }

// Reports is the queue of usage reports as one broker sees it. It is for one goroutine.
type Reports struct {
	q        *Queue
	consumer jetstream.Consumer // nil: not known to be there
}

// Reports returns the queue of usage reports, from which any number of brokers may take.
func (q *Queue) Reports() *Reports { return &Reports{q: q} }

// Next returns up to most reports that no broker has at hand. It waits for the first one
// for a while, and then returns none.
func (r *Reports) Next(ctx context.Context, most int) (list []Report, err error) {
	if r.consumer == nil {
		r.consumer, err = r.q.js.CreateOrUpdateConsumer(ctx, schemas.UsageStream, jetstream.ConsumerConfig{
			Durable:       usageConsumer,
			AckPolicy:     jetstream.AckExplicitPolicy,
			AckWait:       usageWait,
			MaxDeliver:    -1,
			MaxAckPending: usageOpen,
		})
		if err != nil {
			r.consumer = nil
			return nil, fmt.Errorf("make consumer of usage reports: %w", err)
		}
	}
	waitCtx, cancel := context.WithTimeout(ctx, usageFetch)
	defer cancel()
	list, err = gather(nil, func() (jetstream.MessageBatch, error) { return r.consumer.Fetch(1, jetstream.FetchContext(waitCtx)) })
	if len(list) > 0 && most > 1 {
		list, err = gather(list, func() (jetstream.MessageBatch, error) { return r.consumer.FetchNoWait(most - 1) })
	}
	switch {
	case err == nil, errors.Is(err, context.DeadlineExceeded):
	case ctx.Err() == nil:
		r.consumer = nil // it may be gone
		if len(list) == 0 {
			return nil, fmt.Errorf("fetch usage reports: %w", err)
		}
	}
	return list, nil
}

func gather(list []Report, fetch func() (jetstream.MessageBatch, error)) ([]Report, error) {
	batch, err := fetch()
	if err != nil {
		return list, err
	}
	for m := range batch.Messages() {
		list = append(list, Report{m})
	}
	return list, batch.Error()
}
