package access

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	// sweepWait is how long servers are waited for that may be there, after the last word of
	// any; sweepAnswer for one that is known to be.
	sweepWait   = time.Second
	sweepAnswer = 5 * time.Second
	// sweepPage is how many connections a server tells of at once. The next page begins a
	// little before the end of the last, since those that close meanwhile move it.
	sweepPage    = 2048
	sweepOverlap = 64
)

// Scope is whose connections are looked at: those of a user, or of all in the account.
type Scope struct{ Account, User string }

// Sweep looks at the connections of agents or publishers at every server of the cluster,
// and closes those of whom it is told to. ended gets the users of some connections, as in
// Grant.User, and returns those that may not be there any more. Whoever shouldn't come back
// has to have lost its credential before.
//
// nc is a connection of bus.UserSystem. An error means that connections may be left; so does a
// server that tells of some of its connections, and then no more.
func Sweep(ctx context.Context, nc *nats.Conn, scope Scope, ended func(ctx context.Context, users []string) ([]string, error)) error {
	inbox := nc.NewInbox()
	answers, err := nc.SubscribeSync(inbox + ".*")
	if err != nil {
		return fmt.Errorf("sweep connections: %w", err)
	}
	defer answers.Unsubscribe()
	s := sweep{nc: nc, scope: scope, inbox: inbox, asked: make(map[string]bool)}
	if err := s.ask("PING", "CONNZ", scope.question(0)); err != nil {
		return fmt.Errorf("sweep connections: %w", err)
	}
	wait := sweepAnswer // that of nc itself
	for {
		m, err := next(ctx, answers, wait)
		switch {
		case errors.Is(err, context.DeadlineExceeded) && wait == sweepWait && ctx.Err() == nil:
			return nil // all have answered, as far as anybody can know
		case err == nil:
			err = s.look(ctx, m, ended)
		}
		if err != nil {
			return fmt.Errorf("sweep connections: %w", err)
		}
		if wait = sweepWait; len(s.asked) > 0 {
			wait = sweepAnswer
		}
	}
}

func next(ctx context.Context, answers *nats.Subscription, wait time.Duration) (*nats.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	return answers.NextMsgWithContext(ctx)
}

// sweep is one run of Sweep.
type sweep struct {
	nc    *nats.Conn
	scope Scope
	inbox string
	asked map[string]bool // servers that owe a further page
}

// question asks for the connections from an offset on.
func (s Scope) question(offset int) map[string]any {
	q := map[string]any{"auth": true, "acc": s.Account, "limit": sweepPage, "offset": offset}
	if s.User != "" {
		q["user"] = s.User
	}
	return q
}

func (s *sweep) ask(server, what string, question map[string]any) error {
	body, err := json.Marshal(question)
	if err != nil {
		return err
	}
	return s.nc.PublishRequest("$SYS.REQ.SERVER."+server+"."+what, s.inbox+"."+what, body)
}

// page is a server's word of its connections. A server answers a kick, too, which is like
// a page without connections.
type page struct {
	Server struct {
		ID string `json:"id"`
	} `json:"server"`
	Data struct {
		Offset      int `json:"offset"`
		Connections []struct {
			ID   uint64 `json:"cid"`
			User string `json:"authorized_user"`
		} `json:"connections"`
	} `json:"data"`
}

// look closes what is to be closed of a page, and asks for the next if there is one.
func (s *sweep) look(ctx context.Context, m *nats.Msg, ended func(context.Context, []string) ([]string, error)) error {
	var p page
	if err := json.Unmarshal(m.Data, &p); err != nil {
		return err
	}
	open := make(map[string][]uint64)
	for _, c := range p.Data.Connections {
		if systemAccounts[c.User] == "" && (s.scope.User == "" || s.scope.User == c.User) {
			open[c.User] = append(open[c.User], c.ID)
		}
	}
	closed := 0
	if len(open) > 0 {
		users := make([]string, 0, len(open))
		for user := range open {
			users = append(users, user)
		}
		slices.Sort(users)
		list, err := ended(ctx, users)
		if err != nil {
			return err
		}
		for _, user := range list {
			for _, id := range open[user] {
				// A server does it only for who wants an answer.
				if err := s.ask(p.Server.ID, "KICK", map[string]any{"cid": id}); err != nil {
					return err
				}
				closed++
			}
		}
	}
	if m.Subject == s.inbox+".CONNZ" {
		delete(s.asked, p.Server.ID)
	}
	if n := len(p.Data.Connections); n == sweepPage {
		s.asked[p.Server.ID] = true
		return s.ask(p.Server.ID, "CONNZ", s.scope.question(p.Data.Offset+n-closed-sweepOverlap))
	}
	return nil
}
