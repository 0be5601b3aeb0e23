package presence

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/schemas"
)

// Feed keeps a Table up to date: it hears heartbeats, asks for inventories that it
// missed, looks after agents that have missed a beat, and expires those that stay
// silent.
//
// Safety comes from time: an agent counts as here only within StaleAfter of its last
// word. Liveness comes from asking: one missed beat makes the feed ask the agent's
// control subject, and if nobody is there, the bus says so at once, long before
// StaleAfter.
//
// Silence says something of an agent only while this process can hear, and its own link
// can be dead for seconds before the client library notices. So the feed sends itself an
// echo with every sweep, and judges nobody unless one of the last second has come back.
type Feed struct {
	nc    *nats.Conn
	table *Table
	log   *slog.Logger
	ready atomic.Bool
	// learned is closed with the first time that ready is set.
	learned chan struct{}
	asked   atomic.Uint64 // numbers the questions
}

// NewFeed returns a feed of the table from the connection.
func NewFeed(nc *nats.Conn, table *Table, log *slog.Logger) *Feed {
	return &Feed{nc: nc, table: table, log: log, learned: make(chan struct{})}
}

const (
	beat       = time.Second
	sweepEvery = 250 * time.Millisecond
	// deafAfter is how old the last echo may be.
	deafAfter = time.Second
	// suspectAfter is a beat and some slack.
	suspectAfter = 1300 * time.Millisecond
	// rejoinWait is how much longer than usual an agent may be silent after this process
	// itself lost the bus, since the agent may have lost it, too: a worker that comes back
	// to a server before those that let it in have, hangs in its first attempt for the two
	// seconds of the client library.
	rejoinWait = 2500 * time.Millisecond
)

// Ready reports whether the feed has listened for long enough to know who is here:
// one beat and some slack, and the bus is connected.
func (f *Feed) Ready() bool { return f.ready.Load() && f.nc.IsConnected() }

// Learned is closed once the feed has listened for long enough to know who is here. Until
// then an agent that is here may seem to be away.
func (f *Feed) Learned() <-chan struct{} { return f.learned }

// Connected reports whether this process itself is on the bus. While it isn't,
// nothing that the table says about agents means anything.
func (f *Feed) Connected() bool { return f.nc.IsConnected() }

// Await waits until this process is on the bus, for wait at the most, and reports whether it
// is.
func (f *Feed) Await(ctx context.Context, wait time.Duration) bool { return bus.Await(ctx, f.nc, wait) }

// Run listens until ctx ends.
func (f *Feed) Run(ctx context.Context) error {
	beats := make(chan *nats.Msg, 4096)
	sub, err := f.nc.ChanSubscribe(schemas.HeartbeatWildcard, beats)
	if err != nil {
		return fmt.Errorf("listen to heartbeats: %w", err)
	}
	defer sub.Unsubscribe()
	inbox := f.nc.NewInbox()
	answers := make(chan *nats.Msg, 1024)
	inboxSub, err := f.nc.ChanSubscribe(inbox+".*.*.*", answers)
	if err != nil {
		return fmt.Errorf("listen to inventories: %w", err)
	}
	defer inboxSub.Unsubscribe()

	echo := f.nc.NewInbox()
	echoes := make(chan *nats.Msg, 16)
	echoSub, err := f.nc.ChanSubscribe(echo, echoes)
	if err != nil {
		return fmt.Errorf("listen to echoes: %w", err)
	}
	defer echoSub.Unsubscribe()

	asides := make(chan *nats.Msg, 256)
	asideSub, err := f.nc.ChanSubscribe(schemas.AsideWildcard, asides)
	if err != nil {
		return fmt.Errorf("listen to heartbeats over HTTPS: %w", err)
	}
	defer asideSub.Unsubscribe()

	started := time.Now()
	echoed := started // when the last echo that came back was sent
	hears := true
	var reconnects uint64
	suspects := make(map[Suspect]time.Time)
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case m := <-beats:
			f.heard(m, inbox)
		case m := <-asides:
			f.heardAside(m)
		case m := <-answers:
			f.answered(m, inbox)
		case m := <-echoes:
			if since, err := time.ParseDuration(string(m.Data)); err == nil {
				echoed = started.Add(since)
			}
		case now := <-tick.C:
			if err := f.nc.Publish(echo, []byte(now.Sub(started).String())); err != nil && !bus.Down(err) {
				f.log.Warn("echo not sent", "error", err)
			}
			if n := f.nc.Stats().Reconnects; n != reconnects {
				// It can be back before a sweep has seen it gone.
				reconnects, hears = n, false
			}
			if !f.nc.IsConnected() || now.Sub(echoed) > deafAfter {
				hears = false
				continue
			}
			if !hears {
				hears = true
				f.table.Excuse(now.Add(rejoinWait))
			}
			if now.Sub(started) > beat+sweepEvery {
				if !f.ready.Swap(true) {
					close(f.learned)
				}
			}
			f.lookAfter(now, suspects, inbox)
			f.table.Expire(now)
		}
	}
}

func (f *Feed) heard(m *nats.Msg, inbox string) {
	tenant, id, err := schemas.ParseAgentSubject(m.Subject)
	if m.Reply != "" { // a worker wants no answer, but what the bus answers to a forged reply subject may have one
		err = errors.New("it has a reply subject")
	}
	if err != nil {
		f.log.Warn("heartbeat dropped", "error", err)
		return
	}
	f.observe(tenant, id, m.Data, inbox)
}

// Aside passes on a heartbeat that came over HTTPS to this edge, to all others and to
// itself. The error is a *schemas.Error if the heartbeat makes no sense.
func (f *Feed) Aside(tenant schemas.TenantID, id schemas.AgentID, data []byte) error {
	hb, err := decode(data)
	if err != nil {
		return schemas.Errorf(schemas.CodeInvalidValue, "This isn't a heartbeat that makes sense here: %v.", err)
	}
	f.table.ObserveAside(tenant, id, hb, time.Now()) // this edge may be off the bus itself
	if err := f.nc.Publish(schemas.AsideSubject(tenant, id), data); err != nil && !bus.Down(err) {
		f.log.Warn("heartbeat over HTTPS not passed on", "agent", id, "error", err)
	}
	return nil
}

func (f *Feed) heardAside(m *nats.Msg) {
	tenant, id, err := schemas.ParseAgentSubject(m.Subject)
	if err != nil {
		f.log.Warn("heartbeat dropped", "error", err)
		return
	}
	hb, err := decode(m.Data)
	if err != nil {
		f.log.Warn("heartbeat dropped", "agent", id, "error", err)
		return
	}
	f.table.ObserveAside(tenant, id, hb, time.Now())
}

// decode reads a heartbeat and checks that it makes sense.
func decode(data []byte) (*schemas.Heartbeat, error) {
	var hb schemas.Heartbeat
	if err := json.Unmarshal(data, &hb); err != nil {
		return nil, errors.New("it isn't valid JSON")
	}
	if !schemas.Protocol.Speak(hb.Version) {
		return nil, fmt.Errorf("it is of version %d of the protocol, and this build speaks %s", hb.Version, schemas.Protocol)
	}
	if !meaningful(&hb) {
		return nil, fmt.Errorf("it names no run, or has the unknown state %q", hb.State)
	}
	return &hb, nil
}

func (f *Feed) observe(tenant schemas.TenantID, id schemas.AgentID, data []byte, inbox string) {
	hb, err := decode(data)
	if err != nil {
		f.log.Warn("heartbeat dropped", "agent", id, "error", err)
		return
	}
	if f.table.Observe(tenant, id, hb, time.Now()) && inbox != "" {
		f.ask(tenant, id, inbox)
	}
}

// meaningful reports whether the heartbeat says who speaks and a state that is known.
func meaningful(hb *schemas.Heartbeat) bool {
	switch hb.State {
	case schemas.AgentUp, schemas.AgentDraining, schemas.AgentBye:
		return hb.Incarnation != ""
	}
	return false
}

// ask requests the full heartbeat of an agent. The answer comes to the inbox, whose
// last tokens say whose it is. The one before them is a number: the bus lets an agent
// answer once to each subject, and the next question may come before that.
func (f *Feed) ask(tenant schemas.TenantID, id schemas.AgentID, inbox string) {
	body := schemas.Control{Operation: schemas.ControlInventory}.Encode()
	inbox += "." + strconv.FormatUint(f.asked.Add(1), 10)
	if err := f.nc.PublishRequest(schemas.ControlSubject(id), schemas.AgentInbox(inbox, tenant, id), body); err != nil && !bus.Down(err) {
		f.log.Warn("agent not asked", "agent", id, "error", err)
	}
}

// answered takes in the answer of an agent, or the bus's word that nobody answers
// for it.
func (f *Feed) answered(m *nats.Msg, inbox string) {
	number, _, _ := strings.Cut(strings.TrimPrefix(m.Subject, inbox+"."), ".")
	tenant, id, err := schemas.ParseAgentInbox(inbox+"."+number, m.Subject)
	if err != nil {
		f.log.Warn("inventory dropped", "error", err)
		return
	}
	if len(m.Data) == 0 && m.Header.Get("Status") == "503" {
		f.table.Lost(tenant, id, "")
		return
	}
	// A second mismatch is left to the next heartbeat.
	f.observe(tenant, id, m.Data, "")
}

// lookAfter asks every agent that has missed a beat, once for every beat that it misses.
func (f *Feed) lookAfter(now time.Time, asked map[Suspect]time.Time, inbox string) {
	for s, at := range asked {
		if now.Sub(at) > StaleAfter {
			delete(asked, s)
		}
	}
	for _, s := range f.table.Suspects(now, suspectAfter) {
		if at, ok := asked[s]; ok && now.Sub(at) < beat {
			continue
		}
		asked[s] = now
		f.ask(s.Tenant, s.Agent, inbox)
	}
}
