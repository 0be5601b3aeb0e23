package bus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"

	"github.com/ownllm/ownllm/schemas"
)

// QueueConfig bounds the queue of jobs.
type QueueConfig struct {
	// PerModel is how many jobs one (agent, model) may have, queued and running
	// together.
	PerModel int64
	// MaxAge is how long a job may lie in its stream at the most; it has to be longer
	// than any job's deadline.
	MaxAge time.Duration
	// Replicas of each stream, 1 on a single server.
	Replicas int
}

// AckWait is how long a worker may be silent about a job before JetStream delivers it
// again. Workers report progress three times as often.
const AckWait = 15 * time.Second

// Queue is the work queue of admitted jobs, in schemas.JobShards streams of JetStream. It is
// transport: a job in it is run only if the owner of its request grants the claim.
type Queue struct {
	nc *nats.Conn
	js jetstream.JetStream
}

// NewQueue returns the queue as seen through the connection.
func NewQueue(nc *nats.Conn) (*Queue, error) {
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, fmt.Errorf("open JetStream: %w", err)
	}
	return &Queue{nc, js}, nil
}

// provisionWait bounds Provision. In a cluster that has just started, or has lost a server,
// streams wait for leaders.
const provisionWait = 45 * time.Second

// Provision creates the streams of jobs, or updates them to the given bounds, and that of
// usage reports. It can be called again and again, by several brokers. A stream is never
// taken back: ErrNewerStream, ErrMoreReplicas. That of a build before there were shards
// goes once it is empty: ErrOldStream.
func (q *Queue) Provision(ctx context.Context, cfg QueueConfig) error {
	ctx, cancel := context.WithTimeout(ctx, provisionWait)
	defer cancel()
	if err := patiently(ctx, q.retire); err != nil {
		return err
	}
	// At once: in a cluster each waits until it has a leader.
	group, streamCtx := errgroup.WithContext(ctx)
	for name, subjects := range schemas.JobStreams() {
		group.Go(func() error {
			return q.provision(streamCtx, jetstream.StreamConfig{
				Name:        name,
				Description: "OwnLLM: admitted jobs of a part of the agents, one subject for each agent and model",
				Subjects:    []string{subjects},
				Retention:   jetstream.WorkQueuePolicy,
				Storage:     jetstream.FileStorage,
				Replicas:    cfg.Replicas,
				// A full (agent, model) refuses, and only itself.
				Discard:              jetstream.DiscardNew,
				DiscardNewPerSubject: true,
				MaxMsgsPerSubject:    cfg.PerModel,
				MaxAge:               cfg.MaxAge,
				AllowMsgTTL:          true,
				Duplicates:           min(2*time.Minute, cfg.MaxAge),
				MaxConsumers:         -1,
			})
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	return q.provisionUsage(ctx, cfg.Replicas)
}

// ErrQueueFull says that the (agent, model) has as many jobs as it may.
var ErrQueueFull = errors.New("queue is full")

// publishWait bounds one try to publish. The deduplication id makes one job of all of them,
// and if a cluster that changes its leader stores two all the same, the claim fences one.
const publishWait = 2 * time.Second

// publishMost is for how long a publish is tried whose acknowledgement doesn't come.
const publishMost = 2 * publishWait

// electionMost is for how long a publish is tried at a NATS cluster. One that has lost the
// leader of the queue chooses another after 4 to 9 s, and once more if two stand at a time.
const electionMost = 20 * time.Second

// ReturnWait is how long whoever needs the bus waits for a connection that was lost. After a
// restart of the bus the connections of a process come back up to 0.2 s apart, so that one
// of them can be there and another not yet.
const ReturnWait = time.Second

// A JetStream that isn't there yet is asked again after lookFirst, and then less and less
// often, down to every lookMost.
const (
	lookFirst = 20 * time.Millisecond
	lookMost  = 250 * time.Millisecond
)

// Publish puts a job into the queue of its (agent, model) and returns its sequence
// number in the stream of the agent. A queue that isn't there is waited for: for as long as ReturnWait while the
// connection is lost or a single server comes up, and for as long as a cluster takes to
// choose a leader. It returns ErrQueueFull, or an error for which Down is true if nobody
// knows whether the job was stored.
func (q *Queue) Publish(ctx context.Context, agent schemas.AgentID, job *schemas.Job, body string, header nats.Header) (uint64, error) {
	payload, err := job.Encode(body)
	if err != nil {
		return 0, err
	}
	header[schemas.HeaderMsgID] = []string{job.MsgID()}
	if job.Deadline != 0 {
		// A second more than the deadline, so that the message outlives the job.
		left := max(0, time.Until(time.UnixMilli(job.Deadline)))
		header[schemas.HeaderTTL] = []string{strconv.Itoa(int(left/time.Second) + 2)}
	}
	msg := &nats.Msg{Subject: schemas.JobSubject(job.Tenant, agent, job.Model), Header: header, Data: payload}
	began, sent := time.Now(), false // whether some try may have reached the stream
	for look := lookFirst; ; look = min(2*look, lookMost) {
		tryCtx, cancel := context.WithTimeout(ctx, publishWait)
		ack, err := q.js.PublishMsg(tryCtx, msg, jetstream.WithRetryAttempts(0))
		cancel()
		switch {
		case err == nil && ack.Duplicate && !sent:
			return 0, fmt.Errorf("publish job %s: its id %s was taken", job.Request, job.MsgID())
		case err == nil:
			return ack.Sequence, nil
		case full(err):
			return 0, ErrQueueFull
		case !q.mayReturn(ctx, err, time.Since(began), look):
			return 0, fmt.Errorf("publish job %s: %w", job.Request, err)
		}
		sent = sent || !unsent(err)
	}
}

// unsent reports whether err says that the message has reached nobody.
func unsent(err error) bool {
	return errors.Is(err, nats.ErrReconnectBufExceeded) || errors.Is(err, nats.ErrConnectionReconnecting) ||
		errors.Is(err, jetstream.ErrNoStreamResponse) || errors.Is(err, nats.ErrNoResponders)
}

// leaderless reports whether err is what JetStream says while a stream changes its leader.
func leaderless(err error) bool {
	const (
		notAvailable jetstream.ErrorCode = 10008
		notLeader    jetstream.ErrorCode = 10009
		offline      jetstream.ErrorCode = 10118
		inProcess    jetstream.ErrorCode = 10158 // an earlier try of the same
	)
	var api *jetstream.APIError
	return errors.As(err, &api) && slices.Contains([]jetstream.ErrorCode{notAvailable, notLeader, offline, inProcess}, api.ErrorCode)
}

// mayReturn waits a moment for a queue that has failed like this, and reports whether to try
// again. gone is how long it has been tried.
func (q *Queue) mayReturn(ctx context.Context, err error, gone, look time.Duration) bool {
	timedOut := errors.Is(err, context.DeadlineExceeded)
	if ctx.Err() != nil || !timedOut && !unsent(err) && !leaderless(err) || !Await(ctx, q.nc, ReturnWait) {
		return false
	}
	most := ReturnWait
	switch {
	case q.nc.ConnectedClusterName() != "":
		most = electionMost
	case timedOut:
		most = publishMost
	}
	if gone >= most {
		return false
	}
	timer := time.NewTimer(min(look, most-gone))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// full recognises the refusal of a subject at its bound. JetStream gives it the
// generic code of a failed store, so the description has to tell.
func full(err error) bool {
	const storeFailed jetstream.ErrorCode = 10077
	var api *jetstream.APIError
	return errors.As(err, &api) && api.ErrorCode == storeFailed &&
		strings.Contains(api.Description, "maximum messages per subject")
}

// Delete removes a job of an agent that nobody shall run any more. That it is gone already
// is no error. It speaks to the API directly: the client library would ask for the state of
// the stream first, and hides the code of a refusal.
func (q *Queue) Delete(ctx context.Context, agent schemas.AgentID, seq uint64) error {
	request := []byte(`{"no_erase":true,"seq":` + strconv.FormatUint(seq, 10) + `}`)
	m, err := q.nc.RequestWithContext(ctx, "$JS.API.STREAM.MSG.DELETE."+schemas.JobStream(agent), request)
	if err != nil {
		return fmt.Errorf("delete job %d: %w", seq, err)
	}
	var answer struct {
		Error *jetstream.APIError `json:"error"`
	}
	if err := json.Unmarshal(m.Data, &answer); err != nil {
		return fmt.Errorf("delete job %d: %w", seq, err)
	}
	if answer.Error != nil && !gone(answer.Error) {
		return fmt.Errorf("delete job %d: %w", seq, answer.Error)
	}
	return nil
}

// gone recognises the refusal to delete a message that isn't there. JetStream has a
// code for one between others, and none of its own for one before all others.
func gone(err *jetstream.APIError) bool {
	const (
		notFound     jetstream.ErrorCode = 10043
		deleteFailed jetstream.ErrorCode = 10057
	)
	return err.ErrorCode == notFound ||
		err.ErrorCode == deleteFailed && strings.Contains(err.Description, "no message found")
}

// ConsumerName is the name of the durable consumer of one (agent, model). Names are
// bounded, model ids are not, so the model is in it as a hash.
func ConsumerName(agent schemas.AgentID, model string) string {
	return schemas.EncodeToken(string(agent)) + "-" + shortHash(model)
}

// consumerIdle is how long a consumer that nobody pulls from is kept.
const consumerIdle = time.Hour

// maxDeliver bounds how often a job is delivered: a worker that dies of a job takes
// it a few times at the most.
const maxDeliver = 5

// EnsureConsumer makes the consumer from which the agent pulls the jobs of a model.
// It lives in memory: a server that restarts forgets it, and the next hello of the
// agent makes it again.
func (q *Queue) EnsureConsumer(ctx context.Context, tenant schemas.TenantID, agent schemas.AgentID, model string) (string, error) {
	name := ConsumerName(agent, model)
	_, err := q.js.CreateOrUpdateConsumer(ctx, schemas.JobStream(agent), jetstream.ConsumerConfig{
		Durable:       name,
		FilterSubject: schemas.JobSubject(tenant, agent, model),
		AckPolicy:     jetstream.AckExplicitPolicy,
		AckWait:       AckWait,
		MaxDeliver:    maxDeliver,
		// The stream bounds the jobs of a model already; the server's own bound is 1000.
		MaxAckPending:     -1,
		InactiveThreshold: consumerIdle,
		MemoryStorage:     true,
	})
	if err != nil {
		return "", fmt.Errorf("make consumer of %s for %s: %w", agent, model, err)
	}
	return name, nil
}

// Depths counts the jobs of a tenant, queued and running together, by their subject. If any
// agents are named, only the streams of these are asked.
func (q *Queue) Depths(ctx context.Context, tenant schemas.TenantID, agents ...schemas.AgentID) (map[string]uint64, error) {
	named := make(map[string]bool, schemas.JobShards)
	for _, agent := range agents {
		named[schemas.JobStream(agent)] = true
	}
	all := make(map[string]uint64)
	for name := range schemas.JobStreams() {
		if len(named) > 0 && !named[name] {
			continue
		}
		stream, err := q.js.Stream(ctx, name)
		if err != nil {
			return nil, fmt.Errorf("depths of queues: %w", err)
		}
		info, err := stream.Info(ctx, jetstream.WithSubjectFilter(schemas.JobTenantWildcard(tenant)))
		if err != nil {
			return nil, fmt.Errorf("depths of queues: %w", err)
		}
		maps.Copy(all, info.State.Subjects)
	}
	return all, nil
}

func redact(rawURL string) string {
	parts := strings.Split(rawURL, ",")
	for i, p := range parts {
		if u, err := url.Parse(strings.TrimSpace(p)); err == nil {
			parts[i] = u.Redacted()
		}
	}
	return strings.Join(parts, ",")
}
