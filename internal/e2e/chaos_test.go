package e2e

import (
	"context"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ownllm/ownllm/internal/faultproxy"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/worker/demo"
)

var chaosTime = flag.Duration("chaos", 20*time.Second, "for how long TestChaos makes faults")

// The roles of a chaos run.
const (
	roleEdge     = "edge"
	roleBroker   = "broker"
	roleWorker   = "worker"
	roleServer   = "nats-server"
	rolePostgres = "postgres"
)

// member is one process of a chaos run, with lines of its own that can fail.
type member struct {
	name, role string
	*stack.Process
	nats  []*faultproxy.Proxy // to each of the nats-servers
	books *faultproxy.Proxy
	again func() *stack.Process // starts it once it has ended, and waits until it is up
}

// restart starts a member that has ended.
func (m *member) restart() { m.Process = m.again() }

// spell is a fault: from its first effect until it was undone.
type spell struct {
	role, name, kind string
	from, to         time.Time // to is zero while it lasts
}

// chaos is a whole OwnLLM whose parts fail, one after the other: three nats-servers,
// Postgres, two edges, two brokers, three workers.
type chaos struct {
	*stack.Cluster
	t        *testing.T
	postgres *stack.Postgres
	backend  *stack.Backend
	members  []*member
	edges    []*stack.Edge

	mu     sync.Mutex
	spells []spell
}

// chaosDeadlines keep the longest wait for a request in step with a short run.
var chaosDeadlines = []string{"--total-timeout", "30s", "--first-token-timeout", "20s", "--idle-timeout", "10s"}

func startChaos(t *testing.T) *chaos {
	c := &chaos{t: t, backend: stack.StartBackend(t, longDemo()), postgres: stack.StartPostgres(t)}
	c.Cluster = stack.NewRouted(t, c.postgres.Address)
	for i := range c.Servers {
		c.members = append(c.members, &member{
			name: fmt.Sprint(roleServer, " ", i), role: roleServer, Process: c.Servers[i],
			again: func() *stack.Process { return c.RestartServer(i) },
		})
	}
	for range 2 {
		m, args := c.join(roleBroker)
		args = append(args, "--queue-replicas", "3")
		m.again = func() *stack.Process { return c.StartBroker(args...) }
		m.restart()
	}
	for i := range 2 {
		m, args := c.join(roleEdge)
		c.edges = append(c.edges, c.StartEdge(args...))
		m.again = func() *stack.Process {
			c.edges[i] = c.RestartEdge(c.edges[i], args...)
			return c.edges[i].Process
		}
		m.Process = c.edges[i].Process
	}
	for range 3 {
		m, args := c.join(roleWorker)
		w := c.StartWorker(c.backend.URL, args...).Serving()
		m.again = func() *stack.Process { return c.RestartWorker(w.Dir, c.backend.URL, args...).Process }
		m.Process = w.Process
	}
	awaitModel(t, c.edges, c.Key.Reveal(), demo.ModelID)
	return c
}

// join makes a member of a role, and the flags that lead it over its own lines.
func (c *chaos) join(role string) (*member, []string) {
	m := &member{role: role}
	same := slices.DeleteFunc(slices.Clone(c.members), func(o *member) bool { return o.role != role })
	m.name = fmt.Sprint(role, " ", len(same))
	var urls []string
	for i := range c.Servers {
		p := faultproxy.New(c.t, c.ServerURL(i))
		m.nats, urls = append(m.nats, p), append(urls, p.URL())
	}
	args := []string{"--nats-url", strings.Join(urls, ",")}
	if role != roleWorker {
		m.books = faultproxy.New(c.t, c.DatabaseURL)
		args = append(args, "--database-url", m.books.URL())
		args = append(args, chaosDeadlines...)
	}
	c.members = append(c.members, m)
	return m, args
}

// card is one kind of fault at one role. deal makes it and undoes it.
type card struct {
	role, kind string
	deal       func(*member)
}

// deck has each kind of fault once.
func (c *chaos) deck() []card {
	pause := func(least, most time.Duration) { time.Sleep(least + rand.N(most-least)) }
	kill := func(m *member) {
		m.Kill()
		pause(0, 2*time.Second)
		m.restart()
	}
	freeze := func(m *member) {
		thaw := freeze(c.t, m.Process)
		pause(200*time.Millisecond, 6*time.Second)
		thaw()
	}
	restart := func(m *member) {
		if err := m.Stop(); err != nil && m.role != roleServer { // that one's status is its signal
			c.t.Errorf("%s ended with %v", m.name, err)
		}
		m.restart()
	}
	lines := func(of func(*member) []*faultproxy.Proxy, fail func(*faultproxy.Proxy)) func(*member) {
		return func(m *member) {
			for _, p := range of(m) {
				fail(p)
			}
			pause(100*time.Millisecond, 5*time.Second)
			for _, p := range of(m) {
				p.Restore()
			}
		}
	}
	bus := func(m *member) []*faultproxy.Proxy { return m.nats }
	books := func(m *member) []*faultproxy.Proxy { return []*faultproxy.Proxy{m.books} }
	var cards []card
	for _, role := range []string{roleEdge, roleBroker, roleWorker, roleServer} {
		cards = append(cards, card{role, "killed", kill}, card{role, "frozen", freeze}, card{role, "restarted", restart})
		if role != roleServer {
			cards = append(cards, card{role, "cut off from NATS", lines(bus, (*faultproxy.Proxy).Cut)},
				card{role, "dead line to NATS", lines(bus, (*faultproxy.Proxy).Stall)})
		}
		if role == roleEdge || role == roleBroker {
			cards = append(cards, card{role, "cut off from Postgres", lines(books, (*faultproxy.Proxy).Cut)},
				card{role, "dead line to Postgres", lines(books, (*faultproxy.Proxy).Stall)})
		}
	}
	return append(cards,
		card{rolePostgres, "killed", func(*member) {
			c.postgres.Kill()
			pause(0, 2*time.Second)
			c.postgres.Start()
		}},
		card{rolePostgres, "restarted", func(*member) {
			c.postgres.Stop()
			c.postgres.Start()
		}})
}

// rage makes one fault after the other, each kind once before any comes again.
func (c *chaos) rage(within time.Duration) {
	var cards []card
	for end := time.Now().Add(within); time.Now().Before(end); {
		if len(cards) == 0 {
			cards = c.deck()
			rand.Shuffle(len(cards), func(i, j int) { cards[i], cards[j] = cards[j], cards[i] })
		}
		next := cards[0]
		cards = cards[1:]
		of := slices.DeleteFunc(slices.Clone(c.members), func(m *member) bool { return m.role != next.role })
		victim := &member{name: next.role}
		if len(of) > 0 {
			victim = of[rand.IntN(len(of))]
		}
		c.mu.Lock()
		c.spells = append(c.spells, spell{role: next.role, name: victim.name, kind: next.kind, from: time.Now()})
		c.mu.Unlock()
		next.deal(victim)
		c.mu.Lock()
		c.spells[len(c.spells)-1].to = time.Now()
		c.mu.Unlock()
		time.Sleep(300*time.Millisecond + rand.N(time.Second))
		for _, m := range c.members {
			if !m.Alive() {
				c.t.Fatalf("%s has ended by itself: %v", m.name, m.Err())
			}
		}
	}
}

// blame reports whether a fault that ok accepts fell into a time. What one has left behind
// may show a little later.
func (c *chaos) blame(from, to time.Time, ok func(spell) bool) bool {
	const echo = 5 * time.Second
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.ContainsFunc(c.spells, func(s spell) bool {
		return ok(s) && s.from.Before(to) && (s.to.IsZero() || s.to.Add(echo).After(from))
	})
}

// faults counts the faults by kind.
func (c *chaos) faults() map[string]int {
	n := make(map[string]int)
	for _, s := range c.spells {
		n[s.role+" "+s.kind]++
	}
	return n
}

// TestChaos has the parts of a whole OwnLLM fail one after the other under mixed load, and
// looks at what is left: every reply ended as it should, each token once, nobody holds
// anything, and the ledger has what was delivered. `make chaos` does it for long.
func TestChaos(t *testing.T) {
	c := startChaos(t)
	l := newChaosLoad(t, c)
	warm := l.begin(t.Context())
	l.awaitGood(t, 60*time.Second, "before anything fails")
	warm()
	before := c.size(t)

	began := time.Now()
	stop := l.begin(t.Context())
	c.rage(*chaosTime)
	raged := time.Since(began)
	l.awaitGood(t, 90*time.Second, "after all is mended")
	stop()

	t.Logf("%d faults in %s: %v", len(c.spells), raged.Round(time.Second), c.faults())
	l.report(t)
	l.wantSettled(t)
	stack.Until(t, 30*time.Second, "the backend to be idle", func() bool { return c.backend.Stats().Active == 0 })
	stack.Until(t, 30*time.Second, "an empty queue", func() bool { return jobs(t, c.Cluster) == 0 })
	c.wantSize(t, before)
}

// size is what the processes of a role come to, at the most: goroutines, and bytes in use
// after a collection.
func (c *chaos) size(t *testing.T) map[string][2]int {
	t.Helper()
	sizes := make(map[string][2]int)
	for _, m := range c.members {
		if m.OpsURL == "" {
			continue // not ours
		}
		was := sizes[m.role]
		sizes[m.role] = [2]int{
			max(was[0], profiled(t, m.OpsURL+"/debug/pprof/goroutine?debug=1", "goroutine profile: total ")),
			max(was[1], profiled(t, m.OpsURL+"/debug/pprof/heap?debug=1&gc=1", "# HeapInuse = ")),
		}
	}
	return sizes
}

// wantSize waits until no process is larger than those of its role were at first, but for
// what buffers and pools keep.
func (c *chaos) wantSize(t *testing.T, before map[string][2]int) {
	t.Helper()
	const slackRoutines, slackBytes = 15, 12 << 20
	var now map[string][2]int
	fits := func() bool {
		now = c.size(t)
		for role, s := range now {
			if s[0] > before[role][0]+slackRoutines || s[1] > before[role][1]*3/2+slackBytes {
				return false
			}
		}
		return true
	}
	for deadline := time.Now().Add(40 * time.Second); !fits(); time.Sleep(time.Second) {
		if time.Now().After(deadline) {
			t.Errorf("goroutines and bytes were %v, and are %v", before, now)
			return
		}
	}
	for _, role := range slices.Sorted(maps.Keys(now)) {
		t.Logf("%s: %d goroutines and %d KiB before, %d and %d after", role,
			before[role][0], before[role][1]>>10, now[role][0], now[role][1]>>10)
	}
}

// patience bounds a request of a chaos run: each ends by itself before that.
func patience(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, 60*time.Second)
}

// killed are the faults after which an edge or broker can't say a last word.
func killed(role, name string) func(spell) bool {
	return func(s spell) bool {
		return s.role == role && (name == "" || s.name == name) && (s.kind == "killed" || s.kind == "restarted")
	}
}
