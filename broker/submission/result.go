package submission

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/broker/chat"
	"github.com/ownllm/ownllm/schemas"
)

// Submit records a request, and says how it stands. That is all it waits for: whether the
// model can be had, and the money, shows when it is run. The error is a *schemas.Error, or
// wraps one, for the publisher.
func (s *Scheduler) Submit(ctx context.Context, id books.Identity, r schemas.SubmitRequest) (schemas.Accepted, error) {
	body := string(r.Request)
	req, err := chat.Parse(body)
	if err != nil {
		return schemas.Accepted{}, err
	}
	if !id.Allows(req.Model) {
		_, err := s.Desk.Model(id, req.Model)
		return schemas.Accepted{}, err
	}
	n := books.NewSubmission{
		Key: id.Key, Tenant: id.Tenant, Client: r.ID, Model: req.Model, Request: body, Digest: digest(r.Request),
	}
	if r.DeadlineSeconds != nil {
		seconds := min(max(int64(*r.DeadlineSeconds), 0), int64(2*books.MaxSubmissionWait/time.Second))
		n.Wait = max(time.Duration(seconds)*time.Second, 1) // 0 would be the default
	}
	sub, duplicate, err := s.Books.Submit(ctx, n)
	if err != nil {
		return schemas.Accepted{}, away(err)
	}
	if !duplicate {
		s.Wake()
	}
	return schemas.Accepted{Kind: schemas.KindAccepted, ID: r.ID, State: sub.State, Duplicate: duplicate}, nil
}

// digest tells requests apart, but for the white space between their tokens.
func digest(request []byte) [sha256.Size]byte {
	var compact bytes.Buffer
	if err := json.Compact(&compact, request); err != nil {
		return sha256.Sum256(request)
	}
	return sha256.Sum256(compact.Bytes())
}

// away turns the error of books that can't be reached into one for a publisher.
func away(err error) error {
	var refusal *schemas.Error
	if errors.As(err, &refusal) {
		return err
	}
	return errors.Join(schemas.Errorf(schemas.CodeInternalError,
		"This server can't reach its database just now. Try again in a few seconds.").WithRetryAfter(2*time.Second), err)
}

// waiter is told when a submission may have ended. It holds one token.
type waiter chan struct{}

// resultPoll is how often somebody who waits for a result looks at the books, whatever is
// told.
const resultPoll = 2 * time.Second

// Result says how a submission of the key stands. If it hasn't ended, it waits for that, at
// most for the time that r says, or until ctx ends. The error is a *schemas.Error, or wraps
// one, for the publisher.
func (s *Scheduler) Result(ctx context.Context, key schemas.KeyID, r schemas.ResultRequest) (*schemas.Result, error) {
	over := time.NewTimer(time.Duration(r.WaitSeconds) * time.Second)
	defer over.Stop()
	// Before the first look, so that no end falls between the two.
	told, release := s.await(name{key, r.ID})
	defer release()
	for {
		look, cancel := context.WithTimeout(context.WithoutCancel(ctx), booksWait)
		sub, err := s.Books.FindSubmission(look, key, r.ID)
		cancel()
		if err != nil {
			return nil, away(err)
		}
		if sub.State.Ended() || r.WaitSeconds == 0 {
			return s.fit(&sub), nil
		}
		again := time.NewTimer(resultPoll)
		select {
		case <-told:
		case <-again.C:
		case <-over.C:
			r.WaitSeconds = 0
		case <-ctx.Done():
			again.Stop()
			return s.fit(&sub), nil
		}
		again.Stop()
	}
}

// await registers somebody who waits for the end of a submission.
func (s *Scheduler) await(n name) (told waiter, release func()) {
	told = make(waiter, 1)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.waiting[n] = append(s.waiting[n], told)
	return told, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		list := s.waiting[n]
		for i, w := range list {
			if w == told {
				s.waiting[n] = append(list[:i:i], list[i+1:]...)
				break
			}
		}
		if len(s.waiting[n]) == 0 {
			delete(s.waiting, n)
		}
	}
}

// hear listens to the results that all schedulers push, this one included.
func (s *Scheduler) hear() (*nats.Subscription, error) {
	return s.Ingress.Subscribe(schemas.ResultAny, func(m *nats.Msg) {
		key, id, err := schemas.ParseResultSubject(m.Subject)
		if err != nil {
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, w := range s.waiting[name{key, id}] {
			select {
			case w <- struct{}{}:
			default:
			}
		}
	})
}

// publish pushes the result of a claim, if it was recorded.
func (s *Scheduler) publish(ctx context.Context, c *books.Claim, recorded bool) {
	if !recorded {
		return
	}
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), booksWait)
	defer cancel()
	sub, err := s.Books.FindSubmission(bounded, c.Key, c.Client)
	if err != nil {
		s.Log.WarnContext(ctx, "result not pushed", "key", c.Key, "error", err)
		return
	}
	s.push(&sub)
}

// push tells whoever listens how a submission has ended. Nobody may: the result is kept.
func (s *Scheduler) push(sub *books.Submission) {
	err := s.Ingress.Publish(schemas.ResultSubject(sub.Key, sub.Client), s.fit(sub).Encode())
	if err != nil && !bus.Down(err) {
		s.Log.Warn("result not pushed", "key", sub.Key, "error", err)
	}
}

// envelope is what a result has around its completion, in bytes, at the most.
const envelope = 4 << 10

// fit returns the wire form of a submission. A completion that the bus doesn't carry is left
// out, with an error that says so.
func (s *Scheduler) fit(sub *books.Submission) *schemas.Result {
	r := &schemas.Result{
		Kind: schemas.KindResult, ID: sub.Client, State: sub.State, Request: sub.Request, Created: sub.Created.Unix(),
	}
	if !sub.State.Ended() {
		return r
	}
	r.Finished, r.Expires = sub.Ended.Unix(), sub.Expires.Unix()
	if sub.Err != nil {
		r.Error = sub.Err.Client()
	}
	if sub.Completion == "" {
		return r
	}
	r.Usage = sub.Usage.Total()
	if most := s.Ingress.MaxPayload(); int64(len(sub.Completion))+envelope > most {
		r.Error = schemas.Errorf(schemas.CodeRequestTooLarge,
			"The completion has %d bytes, and the message bus carries messages of at most %d. Ask for a shorter one, or use HTTP.", len(sub.Completion), most).Client()
		return r
	}
	r.Completion = json.RawMessage(sub.Completion)
	return r
}
