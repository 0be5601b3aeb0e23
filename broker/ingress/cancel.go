package ingress

import (
	"context"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/schemas"
)

// errCancelled ends a reply that its publisher has cancelled. Nothing has failed, and trying
// again is no good: the request isn't there any more.
var errCancelled = schemas.Errorf(schemas.CodeNotFound, "The request was cancelled, as was asked for with its key.")

// peerWait is how long the other brokers have to say that they have a request.
const peerWait = time.Second

// cancel ends a request of the same key, whichever broker has it.
func (in *Ingress) cancel(ctx context.Context, c *call, id books.Identity) error {
	req, err := schemas.DecodeCancelRequest(c.body)
	if err != nil {
		return err
	}
	if target := in.find(id.Key, req.Request); target != nil {
		target.reply.Interrupt(errCancelled)
	} else if err := in.askPeers(ctx, id.Key, req.Request); err != nil {
		return err
	}
	return c.tell(schemas.Cancelled{Kind: schemas.KindCancelled, Request: req.Request})
}

// askPeers has another broker end a request. Who doesn't have it says nothing.
func (in *Ingress) askPeers(ctx context.Context, key schemas.KeyID, id schemas.RequestID) error {
	ctx, cancel := context.WithTimeout(ctx, peerWait)
	defer cancel()
	_, err := in.Conn.RequestWithContext(ctx, schemas.PeerCancelSubject(key, id), nil)
	switch {
	case err == nil:
		return nil
	case bus.Down(err) && !in.Conn.IsConnected():
		return errLost
	case bus.Down(err):
		return schemas.Errorf(schemas.CodeInvalidValue, "No request %s of your key is running; it may have ended.", id).WithParam("request_id")
	}
	return err
}

// peerCancel is the callback of what other brokers ask, and of this one's own questions.
func (in *Ingress) peerCancel(m *nats.Msg) {
	key, id, err := schemas.ParsePeerCancelSubject(m.Subject)
	if err != nil {
		return
	}
	if c := in.find(key, id); c != nil {
		c.reply.Interrupt(errCancelled)
		if err := m.Respond(nil); err != nil && !bus.Down(err) {
			in.Log.Warn("peer not answered", "request", id, "error", err)
		}
	}
}
