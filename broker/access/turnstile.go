package access

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"golang.org/x/sync/errgroup"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/bus"
)

// Turnstile is a Directory that bounds the connections of publishers: each secret of a key
// has so many at all servers together, and whoever comes with one more isn't let in.
//
// It counts by what the servers say of connections that open and close, and whom it has let
// in without word of it so far. Where it alone lets in, as before the embedded server, there are never more
// than may be. Several brokers may each let in what only one of them should have; each
// hears of it at once and closes the newest, and they agree on which these are.
//
// Words may get lost, and a server that dies says nothing of its connections. So all are counted
// anew each recountEvery, after a reconnect, and those of one who isn't let in at that moment:
// nobody is kept out for long by connections that don't exist.
type Turnstile struct {
	Directory
	limit int
	log   *slog.Logger
	doubt chan string // users that weren't let in, to be counted

	mu    sync.Mutex
	users map[string]*crowd
	// gone are the connections that closed since the count began that runs; nil: none runs.
	gone map[place]bool
}

// place is where a connection is, at which server under which number.
type place struct {
	server string
	id     uint64
}

// crowd are the connections of one user.
type crowd struct {
	open    map[place]time.Time // since when
	coming  []time.Time         // when they were let in; no server has told of them yet
	counted time.Time           // for doubt
}

const (
	// recountEvery is how often all connections are counted, and recountPause how often those
	// of one user for doubt.
	recountEvery = time.Minute
	recountPause = 2 * time.Second
	// turnstileBacklog is how many words of servers may wait.
	turnstileBacklog = 1 << 16
)

// errCrowded wraps ErrDenied.
var errCrowded = fmt.Errorf("too many connections: %w", ErrDenied)

// NewTurnstile returns a directory that knows whom d knows, and lets each secret of a key in
// limit times. It has to run.
func NewTurnstile(d Directory, limit int, log *slog.Logger) *Turnstile {
	return &Turnstile{Directory: d, limit: limit, log: log, doubt: make(chan string, 64), users: make(map[string]*crowd)}
}

// Publisher implements Directory.
func (t *Turnstile) Publisher(ctx context.Context, hash apikey.Hash) (Publisher, error) {
	p, err := t.Directory.Publisher(ctx, hash)
	if err != nil {
		return p, err
	}
	if !t.enter(publisherUser(p.Key, p.Secret), time.Now()) {
		return Publisher{}, fmt.Errorf("%s has %d connections, which is as many as it may have: %w", p.Key, t.limit, errCrowded)
	}
	return p, nil
}

// enter reports whether there is room for one more.
func (t *Turnstile) enter(user string, now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	c := t.crowd(user)
	c.expire(now)
	if len(c.open)+len(c.coming) < t.limit {
		c.coming = append(c.coming, now)
		return true
	}
	if now.Sub(c.counted) > recountPause {
		select {
		case t.doubt <- user:
			c.counted = now
		default: // the next one who isn't let in
		}
	}
	return false
}

// crowd returns the connections of a user. t.mu is held.
func (t *Turnstile) crowd(user string) *crowd {
	c := t.users[user]
	if c == nil {
		c = &crowd{open: make(map[place]time.Time)}
		t.users[user] = c
	}
	return c
}

// expire forgets those who didn't come.
func (c *crowd) expire(now time.Time) {
	c.coming = slices.DeleteFunc(c.coming, func(at time.Time) bool { return now.Sub(at) > AuthTimeout })
}

// event is a server's word of a connection that has opened or closed.
type event struct {
	Server struct {
		ID string `json:"id"`
	} `json:"server"`
	Client struct {
		ID    uint64    `json:"id"`
		User  string    `json:"user"`
		Start time.Time `json:"start"`
	} `json:"client"`
}

// Run counts until ctx ends. nc is a connection of bus.UserSystem.
func (t *Turnstile) Run(ctx context.Context, nc *nats.Conn) error {
	prefix := "$SYS.ACCOUNT." + AccountIngress + "."
	events := make(chan *nats.Msg, turnstileBacklog)
	sub, err := nc.ChanSubscribe(prefix+"*", events)
	if err != nil {
		return fmt.Errorf("listen to connections: %w", err)
	}
	defer sub.Unsubscribe()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		t.recount(ctx, nc)
		return nil
	})
	group.Go(func() error {
		for {
			select {
			case <-ctx.Done():
				return nil
			case m := <-events:
				var e event
				if err := json.Unmarshal(m.Data, &e); err != nil {
					t.log.WarnContext(ctx, "word of a connection dropped", "subject", m.Subject, "error", err)
					continue
				}
				at := place{e.Server.ID, e.Client.ID}
				switch strings.TrimPrefix(m.Subject, prefix) {
				case "CONNECT":
					t.kick(ctx, nc, t.opened(e.Client.User, at, e.Client.Start))
				case "DISCONNECT":
					t.closed(e.Client.User, at)
				}
			}
		}
	})
	return group.Wait()
}

// opened notes a connection, and returns those of the user that are too many.
func (t *Turnstile) opened(user string, at place, since time.Time) []tooMany {
	if _, _, ok := ParsePublisherUser(user); !ok {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	c := t.crowd(user)
	if len(c.coming) > 0 {
		c.coming = c.coming[1:]
	}
	c.open[at] = since
	return t.excess(user, c)
}

// closed forgets a connection.
func (t *Turnstile) closed(user string, at place) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.gone != nil {
		t.gone[at] = true
	}
	if c := t.users[user]; c != nil {
		delete(c.open, at)
		t.tidy(user, c, time.Now())
	}
}

// tidy forgets a user who has no connections. t.mu is held.
func (t *Turnstile) tidy(user string, c *crowd, now time.Time) {
	if c.expire(now); len(c.open)+len(c.coming) == 0 {
		delete(t.users, user)
	}
}

// tooMany is a connection that is to be closed.
type tooMany struct {
	user string
	at   place
}

// excess takes the newest connections of a user away that are beyond the limit. t.mu is held.
func (t *Turnstile) excess(user string, c *crowd) (list []tooMany) {
	if len(c.open) <= t.limit {
		return nil
	}
	places := make([]place, 0, len(c.open))
	for at := range c.open {
		places = append(places, at)
	}
	slices.SortFunc(places, func(a, b place) int { // the same for all brokers
		return cmp.Or(c.open[a].Compare(c.open[b]), cmp.Compare(a.server, b.server), cmp.Compare(a.id, b.id))
	})
	for _, at := range places[t.limit:] {
		delete(c.open, at)
		list = append(list, tooMany{user, at})
	}
	return list
}

// kick closes connections.
func (t *Turnstile) kick(ctx context.Context, nc *nats.Conn, list []tooMany) {
	s := sweep{nc: nc, inbox: nc.NewInbox()} // nobody listens to what the server says to it
	for _, c := range list {
		key, _, _ := ParsePublisherUser(c.user)
		t.log.InfoContext(ctx, "key has too many connections, the newest is closed", "key", key)
		if err := s.ask(c.at.server, "KICK", map[string]any{"cid": c.at.id}); err != nil && !bus.Down(err) {
			t.log.WarnContext(ctx, "connection not closed", "key", key, "error", err)
		}
	}
}

// recount counts until ctx ends.
func (t *Turnstile) recount(ctx context.Context, nc *nats.Conn) {
	back := nc.StatusChanged(nats.CONNECTED)
	defer nc.RemoveStatusListener(back)
	tick := time.NewTicker(recountEvery)
	defer tick.Stop()
	scope := Scope{Account: AccountIngress}
	for {
		if err := t.count(ctx, nc, scope); err != nil && ctx.Err() == nil && !bus.Down(err) {
			t.log.WarnContext(ctx, "connections not counted", "account", scope.Account, "error", err)
		}
		scope.User = ""
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-back:
		case scope.User = <-t.doubt:
		}
	}
}

// count corrects what is known of the connections in a scope.
func (t *Turnstile) count(ctx context.Context, nc *nats.Conn, scope Scope) error {
	before := t.begin(scope)
	found := make(map[place]connection)
	err := walk(ctx, nc, scope, func(_ context.Context, p *page) ([]uint64, error) {
		for _, c := range p.Data.Connections {
			found[place{p.Server.ID, c.ID}] = c
		}
		return nil, nil
	})
	t.kick(ctx, nc, t.correct(before, found, err))
	return err
}

// begin returns the connections that are known in a scope, and from now on notes those that
// close.
func (t *Turnstile) begin(scope Scope) map[place]string {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.gone = make(map[place]bool)
	known := make(map[place]string)
	for user, c := range t.users {
		if scope.User == "" || scope.User == user {
			for at := range c.open {
				known[at] = user
			}
		}
	}
	return known
}

// correct takes what was found for true, but for what has closed meanwhile, and returns what
// is too many. If the count has failed, nothing is corrected.
func (t *Turnstile) correct(before map[place]string, found map[place]connection, failed error) (list []tooMany) {
	t.mu.Lock()
	defer t.mu.Unlock()
	gone := t.gone
	t.gone = nil
	if failed != nil {
		return nil
	}
	for at, user := range before {
		if c := t.users[user]; c != nil && found[at].User == "" {
			delete(c.open, at)
		}
	}
	for at, c := range found {
		if _, _, ok := ParsePublisherUser(c.User); ok && !gone[at] {
			t.crowd(c.User).open[at] = c.Start
		}
	}
	now := time.Now()
	for user, c := range t.users {
		list = append(list, t.excess(user, c)...)
		t.tidy(user, c, now)
	}
	return list
}
