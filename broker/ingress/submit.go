package ingress

import (
	"context"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/schemas"
)

// Submissions records requests that are to be run once, and knows what has come of them.
type Submissions interface {
	Submit(ctx context.Context, id books.Identity, r schemas.SubmitRequest) (schemas.Accepted, error)
	Result(ctx context.Context, key schemas.KeyID, r schemas.ResultRequest) (*schemas.Result, error)
}

// submit records a request, and answers once it is. A publisher that wants no answer hears of
// a refusal where it would get the result.
func (in *Ingress) submit(ctx context.Context, c *call, id books.Identity) error {
	r, err := schemas.DecodeSubmitRequest(c.body)
	var accepted schemas.Accepted
	if err == nil {
		accepted, err = in.Submissions.Submit(ctx, id, r)
	}
	if err == nil {
		return c.tell(accepted)
	}
	if c.inbox == "" && books.CheckSubmissionID(r.ID) == nil {
		in.pushRefusal(ctx, id.Key, r.ID, err)
	}
	return err
}

// pushRefusal pushes a result that says why there will be none, unless something else was
// submitted under the same id: that result is none of this request's business.
func (in *Ingress) pushRefusal(ctx context.Context, key schemas.KeyID, id string, refusal error) {
	if _, err := in.Submissions.Result(ctx, key, schemas.ResultRequest{ID: id}); err == nil {
		return
	}
	now := time.Now().Unix()
	result := schemas.Result{
		Kind: schemas.KindResult, ID: id, State: schemas.SubmissionError, Error: schemas.AsError(refusal).Client(),
		Created: now, Finished: now, Expires: now,
	}
	if err := in.Conn.Publish(schemas.ResultSubject(key, id), result.Encode()); err != nil && !bus.Down(err) {
		in.Log.WarnContext(ctx, "refusal not pushed", "key", key, "error", err)
	}
}

// result says how a submission stands, and may wait for its end.
func (in *Ingress) result(ctx context.Context, c *call, id books.Identity) error {
	r, err := schemas.DecodeResultRequest(c.body)
	if err != nil {
		return err
	}
	in.letIn(c)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(in.open, cancel)()
	result, err := in.Submissions.Result(ctx, id.Key, r)
	if err != nil {
		return err
	}
	return c.publish(result.Encode())
}
