package command

import (
	"log/slog"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/submission"
)

// SubmissionOptions shape what publishers submit.
type SubmissionOptions struct {
	SubmissionRuns int           `default:"256" placeholder:"N" help:"How many submitted requests this process runs at once. Default: 256."`
	ResultKeep     time.Duration `default:"168h" placeholder:"DURATION" help:"How long the result of a submitted request can be fetched, from its end. Default: 168h, a week."`
	ResultKeepID   time.Duration `name:"result-keep-id" default:"2160h" placeholder:"DURATION" help:"How long the id of a submitted request is known, from its end, so that it isn't run again. Default: 2160h, 90 days."`
}

func (o SubmissionOptions) check(p *problems) {
	if o.SubmissionRuns < 1 {
		p.add("--submission-runs: %d is less than 1", o.SubmissionRuns)
	}
	if o.ResultKeep < time.Second {
		p.add("--result-keep: %s is less than a second", o.ResultKeep)
	}
	if o.ResultKeepID < o.ResultKeep {
		p.add("--result-keep-id: %s is less than --result-keep, %s", o.ResultKeepID, o.ResultKeep)
	}
}

// newScheduler returns what runs submissions for an owner, and the connection that it has for
// itself.
func newScheduler(w *owner, natsConfig bus.Config, store *books.Store, tel *tele, o SubmissionOptions, drain time.Duration, log *slog.Logger) (*submission.Scheduler, conns, error) {
	c, err := connect(log, natsConfig.As(bus.UserIngress, "ownllm-submissions"))
	if err != nil {
		return nil, nil, err
	}
	return submission.New(submission.Parts{
		Books: store, Keys: w.keys, Desk: w.desk, Agents: w.agents, Feed: w.feed, Gate: w.gate, Dispatcher: w.dispatcher,
		Metrics: tel.metrics, Tracer: tel.tracer, Ingress: c[0], Log: log,
	}, submission.Config{Runs: o.SubmissionRuns, Keep: o.ResultKeep, KeepID: o.ResultKeepID, Drain: drain}), c, nil
}
