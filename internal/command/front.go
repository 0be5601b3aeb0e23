package command

import (
	"context"
	"log/slog"
	"net"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/edge"
	"github.com/ownllm/ownllm/internal/secret"
)

type frontOptions struct {
	http       HTTPOptions
	deadlines  DeadlineOptions
	limits     LimitOptions
	adminToken secret.String
	// agentNATSURL is the address of NATS that machines are told; without one it is that of
	// this edge, with natsPort, if that isn't empty.
	agentNATSURL, natsPort string
}

// newEdge returns the HTTP door of an owner.
func newEdge(w *owner, store *books.Store, tel *tele, o frontOptions, log *slog.Logger) *edge.Edge {
	return edge.New(edge.Config{
		CertFile: o.http.TLSCert, KeyFile: o.http.TLSKey, TrustedProxies: o.http.TrustedProxy,
		BaseDomain: o.http.BaseDomain, CORSOrigins: o.http.CORSOrigin, BodyLimit: int(o.http.BodyLimit),
		FailureRate: o.limits.FailureRate, FailureBurst: o.limits.FailureBurst,
		AgentNATSURL: o.agentNATSURL, NATSPort: o.natsPort,
		AdminToken: o.adminToken.Reveal(), DrainDelay: o.http.DrainDelay, Drain: o.deadlines.DrainTimeout, Version: Version(),
	}, edge.Parts{
		Keys: w.keys, Agents: w.agents, Feed: w.feed, Aside: w.feed, Dispatcher: w.dispatcher, Gate: w.gate, Books: store, Queue: w.queue,
		Desk: w.desk, Roster: w.roster,
		Metrics: tel.metrics, Tracer: tel.tracer, Log: log,
	})
}

// serveHTTP is a part that serves on the listener.
func serveHTTP(e *edge.Edge, l net.Listener) part {
	return part{"edge", func(ctx context.Context) error { return e.Serve(ctx, l) }}
}
