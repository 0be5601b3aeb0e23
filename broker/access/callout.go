package access

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"
	"golang.org/x/sync/errgroup"

	"github.com/ownllm/ownllm/broker/bus"
)

// AuthTimeout is how long a nats-server waits for whoever connects to be let in. After a
// restart all agents come at once, and each costs a look into the books.
const AuthTimeout = 5 * time.Second

const (
	calloutSubject = "$SYS.REQ.USER.AUTH"
	calloutGroup   = "ownllm"
	// calloutParallel is how many are let in at once; calloutBacklog may wait.
	calloutParallel = 16
	calloutBacklog  = 4096
)

// Callout tells external nats-servers who may do what. Every broker runs one; they share
// the questions in a queue group.
type Callout struct {
	nc     *nats.Conn
	agents Agents
	key    nkeys.KeyPair
	log    *slog.Logger
}

// NewCallout returns a callout that isn't listening yet. The connection is one of
// bus.UserSystem, and the token that of ServerConfig.
func NewCallout(nc *nats.Conn, agents Agents, token string, log *slog.Logger) (*Callout, error) {
	key, err := issuer(token)
	if err != nil {
		return nil, err
	}
	return &Callout{nc: nc, agents: agents, key: key, log: log}, nil
}

// Run answers until ctx ends.
func (c *Callout) Run(ctx context.Context) error {
	questions := make(chan *nats.Msg, calloutBacklog)
	sub, err := c.nc.ChanQueueSubscribe(calloutSubject, calloutGroup, questions)
	if err != nil {
		return fmt.Errorf("listen to auth callouts: %w", err)
	}
	defer sub.Unsubscribe()
	var work errgroup.Group
	for range calloutParallel {
		work.Go(func() error {
			for {
				select {
				case <-ctx.Done():
					return nil
				case m := <-questions:
					c.answer(ctx, m)
				}
			}
		})
	}
	return work.Wait()
}

func (c *Callout) answer(ctx context.Context, m *nats.Msg) {
	question, err := jwt.DecodeAuthorizationRequestClaims(string(m.Data))
	if err != nil {
		c.log.WarnContext(ctx, "auth callout dropped", "error", err)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, AuthTimeout)
	defer cancel()
	answer := jwt.NewAuthorizationResponseClaims(question.UserNkey)
	answer.Audience = question.Server.ID
	// System users never come here: the server knows their passwords itself.
	user := question.ConnectOptions.Username
	grant, err := Authenticate(ctx, c.agents, "", user, question.ConnectOptions.Password)
	switch {
	case errors.Is(err, ErrDenied):
		answer.Error = "access denied"
		c.log.InfoContext(ctx, "agent not let in", "user", user, "host", question.ClientInformation.Host, "error", err)
	case err != nil:
		answer.Error = "nobody knows right now"
		c.log.ErrorContext(ctx, "agent not let in", "user", user, "error", err)
	default:
		if answer.Jwt, err = c.sign(question.UserNkey, user, grant); err != nil {
			c.log.ErrorContext(ctx, "agent not let in", "user", user, "error", err)
			return
		}
	}
	text, err := answer.Encode(c.key)
	if err == nil {
		err = m.Respond([]byte(text))
	}
	if err != nil && !bus.Down(err) {
		c.log.ErrorContext(ctx, "auth callout not answered", "user", user, "error", err)
	}
}

// sign writes a grant in the server's own form.
func (c *Callout) sign(nkey, user string, g Grant) (string, error) {
	claims := jwt.NewUserClaims(nkey)
	claims.Name = user
	claims.Audience = g.Account
	if !g.All {
		claims.Pub.Allow.Add(g.Publish...)
		claims.Sub.Allow.Add(g.Subscribe...)
		claims.Resp = &jwt.ResponsePermission{MaxMsgs: Answers, Expires: AnswerWithin}
	}
	text, err := claims.Encode(c.key)
	if err != nil {
		return "", fmt.Errorf("sign the grant of %s: %w", user, err)
	}
	return text, nil
}
