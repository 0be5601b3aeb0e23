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
	nc        *nats.Conn
	directory Directory
	key       nkeys.KeyPair
	log       *slog.Logger
}

// NewCallout returns a callout that isn't listening yet. The connection is one of
// bus.UserSystem, and the token that of ServerConfig.
func NewCallout(nc *nats.Conn, d Directory, token string, log *slog.Logger) (*Callout, error) {
	key, err := issuer(token)
	if err != nil {
		return nil, err
	}
	return &Callout{nc: nc, directory: d, key: key, log: log}, nil
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
	shown := question.ConnectOptions
	login := Login{User: shown.Username, Password: shown.Password, Token: shown.Token}
	grant, err := Authenticate(ctx, c.directory, "", login)
	switch {
	case errors.Is(err, ErrDenied):
		answer.Error = "access denied"
		c.log.InfoContext(ctx, "not let in", "user", login.Name(), "host", question.ClientInformation.Host, "error", err)
	case err != nil:
		answer.Error = "nobody knows right now"
		c.log.ErrorContext(ctx, "not let in", "user", login.Name(), "error", err)
	default:
		if answer.Jwt, err = c.sign(question.UserNkey, grant); err != nil {
			c.log.ErrorContext(ctx, "not let in", "user", grant.User, "error", err)
			return
		}
	}
	text, err := answer.Encode(c.key)
	if err == nil {
		err = m.Respond([]byte(text))
	}
	if err != nil && !bus.Down(err) {
		c.log.ErrorContext(ctx, "auth callout not answered", "user", login.Name(), "error", err)
	}
}

// connectionTypes are how clients may come: not as a leaf node, and not by MQTT, where these
// are open.
var connectionTypes = []string{jwt.ConnectionTypeStandard, jwt.ConnectionTypeWebsocket}

// sign writes a grant in the server's own form.
func (c *Callout) sign(nkey string, g Grant) (string, error) {
	claims := jwt.NewUserClaims(nkey)
	claims.Name = g.User
	claims.Audience = g.Account
	claims.AllowedConnectionTypes.Add(connectionTypes...)
	if g.Remaining > 0 {
		// The server lets it stay for the whole seconds from its own time, cut to a second, to
		// this. Rounded up, since its second may be the next one already.
		claims.Expires = time.Now().Add(g.Remaining + time.Second - 1).Unix()
	}
	if !g.All {
		claims.Pub.Allow.Add(g.Publish...)
		claims.Sub.Allow.Add(g.Subscribe...)
	}
	if g.Answer {
		claims.Resp = &jwt.ResponsePermission{MaxMsgs: Answers, Expires: AnswerWithin}
	}
	text, err := claims.Encode(c.key)
	if err != nil {
		return "", fmt.Errorf("sign the grant of %s: %w", g.User, err)
	}
	return text, nil
}
