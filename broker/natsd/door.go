package natsd

import (
	"context"
	"errors"
	"log/slog"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/ownllm/ownllm/broker/access"
)

// door lets clients in. It implements server.Authentication.
type door struct {
	token  string
	agents access.Agents
	log    *slog.Logger
	srv    *server.Server // set before the server starts
}

// Check implements server.Authentication.
func (d *door) Check(c server.ClientAuthentication) bool {
	ctx, cancel := context.WithTimeout(context.Background(), access.AuthTimeout)
	defer cancel()
	who := c.GetOpts()
	grant, err := access.Authenticate(ctx, d.agents, d.token, who.Username, who.Password)
	if err != nil {
		level := slog.LevelError
		if errors.Is(err, access.ErrDenied) {
			level = slog.LevelInfo
		}
		d.log.Log(ctx, level, "not let in", "user", who.Username, "error", err)
		return false
	}
	account, err := d.srv.LookupAccount(grant.Account)
	if err != nil {
		d.log.Error("not let in", "user", who.Username, "account", grant.Account, "error", err)
		return false
	}
	c.RegisterUser(&server.User{Username: who.Username, Account: account, Permissions: permissions(grant)})
	return true
}

// permissions is a grant in the server's own form.
func permissions(g access.Grant) *server.Permissions {
	if g.All {
		return nil
	}
	return &server.Permissions{
		Publish:   &server.SubjectPermission{Allow: g.Publish},
		Subscribe: &server.SubjectPermission{Allow: g.Subscribe},
		Response:  &server.ResponsePermission{MaxMsgs: access.Answers, Expires: access.AnswerWithin},
	}
}
