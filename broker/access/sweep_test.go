package access_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"golang.org/x/sync/errgroup"

	"github.com/ownllm/ownllm/broker/access"
	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/internal/natstest"
	"github.com/ownllm/ownllm/schemas"
)

// An agent that is removed loses all its connections at once and can't come back, and
// nobody else loses any.
func TestRemovalCuts(t *testing.T) { eachSite(t, removalCuts) }

func removalCuts(t *testing.T, server site) {
	system := server.System()
	lost := make(chan string, 16)
	var cut []*nats.Conn
	for _, name := range []string{"tokens", "bulk"} {
		nc := server.Agent(tenant, mallory, model)
		nc.SetDisconnectErrHandler(func(*nats.Conn, error) { lost <- name })
		cut = append(cut, nc)
	}
	bystander := server.Agent(other, victim, model)
	bystander.SetDisconnectErrHandler(func(*nats.Conn, error) { lost <- "the victim" })
	server.Agents().Remove(mallory)
	ended := make(chan error, 1)
	began := time.Now()
	go func() {
		ended <- access.Sweep(t.Context(), system, access.Scope{Account: access.AccountAgents, User: string(mallory)},
			func(_ context.Context, users []string) ([]string, error) { return users, nil })
	}()
	for range 2 {
		select {
		case name := <-lost:
			if name == "the victim" {
				t.Error("another agent was cut off")
			}
		case <-time.After(patience):
			t.Fatal("a connection is still there")
		}
	}
	t.Logf("cut after %s", time.Since(began))
	if err := <-ended; err != nil {
		t.Error(err)
	}
	cfg := server.AgentConfig(tenant, mallory, model)
	server.Agents().Remove(mallory)
	if nc, err := bus.Connect(cfg, natstest.Log); !errors.Is(err, nats.ErrAuthorization) {
		if err == nil {
			nc.Close()
		}
		t.Errorf("an agent that was removed gets %v", err)
	}
	for _, nc := range cut {
		if nc.IsConnected() {
			t.Error("it came back")
		}
	}
	if !bystander.IsConnected() {
		t.Error("another agent was cut off")
	}
}

// More connections than a server tells of at once are looked at all the same, and of these
// only those are closed that are to be.
func TestSweepOfMany(t *testing.T) {
	const many, together = 2048 + 300, 8
	// The house's own interval has a server on busy cores close connections by itself.
	server := startExternal(t, `ping_interval: "10m"`)
	system := server.System()
	lost := make(chan int, many)
	clients := make([]*nats.Conn, many)
	var connecting errgroup.Group
	connecting.SetLimit(together)
	for i := range clients {
		connecting.Go(func() (err error) {
			key, id := apikey.New(), schemas.KeyID(fmt.Sprintf("key_%d", i))
			server.Agents().Issue(id, key, 0)
			clients[i], err = nats.Connect(server.Config("").URL, nats.Token(key.Reveal()), nats.NoReconnect(), nats.Timeout(patience),
				nats.ClosedHandler(func(*nats.Conn) { lost <- i }))
			return err
		})
	}
	err := connecting.Wait()
	for _, nc := range clients {
		if nc != nil {
			defer nc.Close()
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	odd := func(user string) (number int, odd bool) {
		key, _, ok := access.ParsePublisherUser(user)
		if _, err := fmt.Sscanf(string(key), "key_%d", &number); !ok || err != nil {
			t.Errorf("asked for %q", user)
		}
		return number, number%2 == 1
	}
	var asked []string
	err = access.Sweep(t.Context(), system, access.Scope{Account: access.AccountIngress}, func(_ context.Context, users []string) (ended []string, err error) {
		asked = append(asked, users...)
		for _, user := range users {
			if _, ends := odd(user); ends {
				ended = append(ended, user)
			}
		}
		return ended, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(asked)
	if n := len(slices.Compact(asked)); n != many {
		t.Errorf("asked for %d users", n)
	}
	for range many / 2 {
		select {
		case i := <-lost:
			if i%2 == 0 {
				t.Errorf("client %d was cut off", i)
			}
		case <-time.After(patience):
			t.Fatal("some are still there")
		}
	}
	for i, nc := range clients {
		if i%2 == 0 && !nc.IsConnected() {
			t.Errorf("client %d was cut off", i)
		}
	}
}

// A server that owes a further page of its connections is waited for, longer than others that
// may be there; and if it doesn't come, the sweep doesn't count as done.
func TestSweepWaitsForEveryPage(t *testing.T) {
	const page = 2048
	for name, c := range map[string]struct {
		later time.Duration // 0: never
		users int
	}{"late": {1500 * time.Millisecond, page + 1}, "never": {0, page}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := natstest.Start(t)
			play := server.Core("a server that is played")
			users := func(from, to int) []byte {
				var list []string
				for i := from; i < to; i++ {
					list = append(list, fmt.Sprintf(`{"cid":%d,"authorized_user":"agt_%d"}`, i+1, i))
				}
				return fmt.Appendf(nil, `{"server":{"id":"played"},"data":{"offset":%d,"connections":[%s]}}`, from, strings.Join(list, ","))
			}
			for subject, answer := range map[string]func(*nats.Msg){
				"$SYS.REQ.SERVER.PING.CONNZ": func(m *nats.Msg) { _ = m.Respond(users(0, page)) },
				"$SYS.REQ.SERVER.played.CONNZ": func(m *nats.Msg) {
					if c.later > 0 {
						time.AfterFunc(c.later, func() { _ = m.Respond(users(page, page+1)) })
					}
				},
			} {
				if _, err := play.Subscribe(subject, answer); err != nil {
					t.Fatal(err)
				}
			}
			if err := play.Flush(); err != nil {
				t.Fatal(err)
			}
			asked := make(map[string]bool)
			err := access.Sweep(t.Context(), server.Core("sweep"), access.Scope{Account: access.AccountAgents}, func(_ context.Context, users []string) ([]string, error) {
				for _, user := range users {
					asked[user] = strings.HasPrefix(user, "agt_")
				}
				return nil, nil
			})
			if (err == nil) != (c.later > 0) || len(asked) != c.users {
				t.Errorf("%v, asked for %d users", err, len(asked))
			}
		})
	}
}

// A sweep that couldn't ask who is to go says so, and closes nothing.
func TestSweepFails(t *testing.T) {
	server := natstest.Start(t)
	nc := server.Publisher(ourKey, apikey.New())
	away := errors.New("the books are away")
	err := access.Sweep(t.Context(), server.System(), access.Scope{Account: access.AccountIngress},
		func(context.Context, []string) ([]string, error) { return nil, away })
	if !errors.Is(err, away) || !nc.IsConnected() {
		t.Errorf("%v, still connected: %v", err, nc.IsConnected())
	}
}
