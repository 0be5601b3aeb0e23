package ingress

import (
	"context"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/schemas"
)

// Submissions records requests that are to be run once, and knows what has come of them.
type Submissions interface {
	Submit(ctx context.Context, id books.Identity, r schemas.SubmitRequest) (schemas.Accepted, error)
	Result(ctx context.Context, key schemas.KeyID, r schemas.ResultRequest) (*schemas.Result, error)
}

// submit records a request, and answers once it is.
func (in *Ingress) submit(ctx context.Context, c *call, id books.Identity) error {
	r, err := schemas.DecodeSubmitRequest(c.body)
	if err != nil {
		return err
	}
	accepted, err := in.Submissions.Submit(ctx, id, r)
	if err != nil {
		return err
	}
	return c.tell(accepted)
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
