package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/access"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/internal/natstest"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// lossPatience is how long a reply is waited for: one whose end gets lost with a server never
// comes.
const lossPatience = 6 * time.Second

// said is a reply that a publisher got.
type said struct {
	end    schemas.FrameKind // done or error; empty: the reply broke off
	err    *schemas.ClientError
	chunks int
	why    error // of a reply that broke off
}

// talk has a publisher send a chat request, and takes the whole reply.
func talk(ctx context.Context, nc *nats.Conn, key schemas.KeyID, body []byte) (s said) {
	replies, err := nc.SubscribeSync(nc.NewInbox())
	if err != nil {
		return said{why: err}
	}
	defer replies.Unsubscribe()
	if err := nc.PublishRequest(schemas.InSubject(key, schemas.OperationChat), replies.Subject, body); err != nil {
		return said{why: err}
	}
	for seq := uint64(1); ; seq++ {
		m, err := replies.NextMsgWithContext(ctx)
		if err != nil {
			return said{why: err}
		}
		var a schemas.Answer
		if err := json.Unmarshal(m.Data, &a); err != nil || a.Seq != seq {
			return said{why: fmt.Errorf("after %d messages came %q with %v: %w", seq-1, m.Data, m.Header, err)}
		}
		switch a.Kind {
		case schemas.FrameChunk:
			s.chunks++
		case schemas.FrameDone, schemas.FrameError:
			s.end, s.err = a.Kind, a.Error
			return s
		}
	}
}

// loss is three nats-servers with two brokers, an edge, two workers, and three publishers
// with a key each, one at each server.
type loss struct {
	*stack.Cluster
	keys       []schemas.KeyID
	publishers []*busClient
	http       *client

	mu    sync.Mutex
	rows  map[string]int // how many good replies there were without a bad one between, by client
	worst map[string]time.Duration
	good  map[string]time.Time
	bad   map[string]int // the others, by how they ended
}

// note keeps how a reply ended.
func (l *loss) note(client string, ok bool, how string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !ok {
		defer time.Sleep(50 * time.Millisecond) // with mu held: all take it a little slower
		l.rows[client] = 0
		l.bad[client+": "+how]++
		return
	}
	now := time.Now()
	if last := l.good[client]; !last.IsZero() {
		l.worst[client] = max(l.worst[client], now.Sub(last))
	}
	l.rows[client], l.good[client] = l.rows[client]+1, now
}

// awaitGood waits until each client has had some good replies in a row.
func (l *loss) awaitGood(t *testing.T, why string) {
	t.Helper()
	l.mu.Lock()
	clear(l.rows)
	l.mu.Unlock()
	// Mostly it takes some seconds. Who was unlucky has lost the end of a reply, and then a job
	// to AckWait.
	stack.Until(t, 90*time.Second, "good replies "+why, func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		n := 0
		for _, row := range l.rows {
			if row >= 5 {
				n++
			}
		}
		return n == len(l.publishers)+1
	})
}

// users are the users that are connected to an account, by the names of the servers.
func users(t *testing.T, system *nats.Conn, account string) map[string][]string {
	t.Helper()
	found := make(map[string][]string)
	inbox, err := system.SubscribeSync(system.NewInbox())
	if err != nil {
		t.Fatal(err)
	}
	defer inbox.Unsubscribe()
	question := fmt.Appendf(nil, `{"auth":true,"acc":%q}`, account)
	if err := system.PublishRequest("$SYS.REQ.SERVER.PING.CONNZ", inbox.Subject, question); err != nil {
		t.Fatal(err)
	}
	for {
		m, err := inbox.NextMsg(500 * time.Millisecond)
		if err != nil {
			return found
		}
		var answer struct {
			Server struct {
				Name string `json:"name"`
			} `json:"server"`
			Data struct {
				Connections []struct {
					User string `json:"authorized_user"`
				} `json:"connections"`
			} `json:"data"`
		}
		if err := json.Unmarshal(m.Data, &answer); err != nil {
			t.Fatal(err)
		}
		for _, c := range answer.Data.Connections {
			found[answer.Server.Name] = append(found[answer.Server.Name], c.User)
		}
	}
}

// TestNATSClusterLosesAServer kills one of three nats-servers, that of a worker and of a
// publisher, and one of two brokers. All clients come back, and go on.
func TestNATSClusterLosesAServer(t *testing.T) {
	t.Parallel()
	backend := stack.StartBackend(t, demo.Options{})
	began := time.Now()
	c := stack.StartRouted(t, "--queue-replicas", "3")
	doomed := c.Broker
	c.StartBroker("--queue-replicas", "3")
	workers := []*stack.Worker{c.StartWorker(backend.URL), c.StartWorker(backend.URL)}
	l := &loss{Cluster: c, rows: map[string]int{}, worst: map[string]time.Duration{}, good: map[string]time.Time{}, bad: map[string]int{}}
	edges := c.StartEdges(1)
	for _, w := range workers {
		w.Serving()
	}
	awaitModel(t, edges, c.Key.Reveal(), demo.ModelID)
	l.http = clientsOf(t, edges, c.Key.Reveal())[0]
	for i := range c.Servers {
		k, secret, err := c.Books.CreateKey(t.Context(), books.NewKey{Tenant: string(c.Tenant.ID), User: string(c.User.ID), Concurrency: new(1000)})
		if err != nil {
			t.Fatal(err)
		}
		p := dial(t, c.ServerURL(i)+","+c.NATSURL(), func(o *nats.Options) error {
			o.NoRandomize, o.InboxPrefix = true, schemas.PublisherInboxPrefix(k.ID)
			return nats.Token(secret.Reveal())(o)
		})
		(&publisher{nc: p.Conn, key: k.ID}).awaitModel(t)
		l.keys, l.publishers = append(l.keys, k.ID), append(l.publishers, p)
	}
	t.Logf("up after %s", time.Since(began).Round(100*time.Millisecond))

	ctx, stop := context.WithCancel(t.Context())
	var load sync.WaitGroup
	defer load.Wait()
	defer stop()
	fields := map[string]any{"max_tokens": 20}
	for i, p := range l.publishers {
		load.Go(func() {
			for ctx.Err() == nil {
				patience, cancel := context.WithTimeout(ctx, lossPatience)
				s := talk(patience, p.Conn, l.keys[i], chatBody(i != 0, fields))
				cancel()
				if ctx.Err() == nil {
					l.note(fmt.Sprint("publisher ", i), s.end == schemas.FrameDone, fmt.Sprintf("%q %+v %v", s.end, s.err, s.why))
				}
			}
		})
	}
	load.Go(func() {
		for ctx.Err() == nil {
			patience, cancel := context.WithTimeout(ctx, lossPatience)
			r := l.http.chat(patience, true, fields)
			cancel()
			if ctx.Err() == nil {
				l.note("http", r.done, fmt.Sprintf("%d %+v %v", r.status, r.err, r.broken))
			}
		}
	})
	l.awaitGood(t, "before anything is lost")

	system, err := bus.Connect(bus.Config{URL: c.NATSURL(), User: bus.UserSystem, Password: c.Token()}, natstest.Log)
	if err != nil {
		t.Fatal(err)
	}
	defer system.Close()
	victim := -1
	stack.Until(t, 30*time.Second, "a server to say that a worker is there", func() bool {
		agents := users(t, system, access.AccountAgents)
		for i := range c.Servers {
			if slices.ContainsFunc(agents[fmt.Sprint("nats-server-", i)], func(u string) bool { return strings.HasPrefix(u, "agt_") }) {
				victim = i
			}
		}
		return victim >= 0
	})
	l.mu.Lock()
	early := len(l.bad)
	clear(l.worst)
	l.mu.Unlock()
	if early > 0 {
		t.Errorf("before anything is lost: %v", l.bad)
	}
	c.Servers[victim].Kill()
	doomed.Kill()
	lost := time.Now()
	l.awaitGood(t, "after the loss")
	t.Logf("all have good replies again %s after the loss", time.Since(lost).Round(10*time.Millisecond))

	// Who comes new is let in by the broker that is left, at both servers.
	for i := range c.Servers {
		if i == victim {
			continue
		}
		for range 5 {
			dialKey(t, c.ServerURL(i), c.Key).Close()
		}
	}
	// Both workers are back; one that had something to report has its second connection, too.
	stack.Until(t, 30*time.Second, "the workers to be back", func() bool {
		back := make(map[string]bool)
		for _, list := range users(t, system, access.AccountAgents) {
			for _, user := range list {
				if strings.HasPrefix(user, "agt_") {
					back[user] = true
				}
			}
		}
		return len(back) == len(workers)
	})
	for i, p := range l.publishers {
		if was := len(p.lost) > 0; was != (i == victim) || !p.IsConnected() {
			t.Errorf("publisher %d lost its connection: %v; it is connected: %v", i, was, p.IsConnected())
		}
	}
	l.awaitGood(t, "in the end")
	l.mu.Lock()
	t.Logf("the longest times between good replies: %v; replies that weren't good: %v", l.worst, l.bad)
	l.mu.Unlock()
}
