package natsd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/ownllm/ownllm/broker/access"
)

// door lets clients in. It implements server.Authentication.
type door struct {
	token     string
	directory access.Directory
	log       *slog.Logger
	srv       *server.Server // set before the server starts
}

// Check implements server.Authentication.
func (d *door) Check(c server.ClientAuthentication) bool {
	ctx, cancel := context.WithTimeout(context.Background(), access.AuthTimeout)
	defer cancel()
	who := c.GetOpts()
	login := access.Login{User: who.Username, Password: who.Password, Token: who.Token}
	grant, err := access.Authenticate(ctx, d.directory, d.token, login)
	if err == nil && (who.Nkey != "" || who.JWT != "") {
		// The server would show these in place of the user, unchecked, and so hide who it is
		// that is to be cut off.
		err = fmt.Errorf("%s shows an nkey or a token of NATS, too: %w", grant.User, access.ErrDenied)
	}
	if err != nil {
		level := slog.LevelError
		if errors.Is(err, access.ErrDenied) {
			level = slog.LevelInfo
		}
		d.log.Log(ctx, level, "not let in", "user", login.Name(), "address", fmt.Sprint(c.RemoteAddress()), "error", err)
		return false
	}
	account, err := d.srv.LookupAccount(grant.Account)
	if err != nil {
		d.log.Error("not let in", "user", login.Name(), "account", grant.Account, "error", err)
		return false
	}
	user := &server.User{Username: grant.User, Account: account, Permissions: permissions(grant)}
	if grant.Remaining > 0 {
		user.ConnectionDeadline = time.Now().Add(grant.Remaining)
	}
	c.RegisterUser(user)
	return true
}

// permissions is a grant in the server's own form.
func permissions(g access.Grant) *server.Permissions {
	if g.All {
		return nil
	}
	p := &server.Permissions{
		Publish:   &server.SubjectPermission{Allow: g.Publish},
		Subscribe: &server.SubjectPermission{Allow: g.Subscribe},
	}
	if g.Answer {
		p.Response = &server.ResponsePermission{MaxMsgs: access.Answers, Expires: access.AnswerWithin}
	}
	return p
}
