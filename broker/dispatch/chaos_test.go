package dispatch_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/schemas"
)

const chaosLines = 20

// serve runs jobs until ctx ends, each to its end or until the owner wants no more.
// Now and then a frame is repeated.
func (a *agent) serve(ctx context.Context) {
	var runs sync.WaitGroup
	defer runs.Wait()
	for ctx.Err() == nil {
		m := a.request(20 * time.Millisecond)
		if len(m.Data) == 0 {
			continue
		}
		d := a.deliver(m.Data, m.Reply)
		runs.Go(func() {
			defer d.finish()
			if !d.ask(schemas.Frame{Kind: schemas.FrameClaim}).Go {
				return
			}
			for n := range chaosLines {
				f := schemas.Frame{Kind: schemas.FrameChunk, Seq: uint64(n + 1), Payload: []byte(strconv.Itoa(n) + "\n")}
				d.send(f)
				if rand.IntN(4) == 0 {
					d.send(f)
				}
				if rand.IntN(8) == 0 && !d.ask(schemas.Frame{Kind: schemas.FrameProgress, Seq: f.Seq}).Go {
					return
				}
			}
			d.ask(schemas.Frame{Kind: schemas.FrameDone, Seq: chaosLines + 1})
		})
	}
}

// Whatever happens to agents and clients, a reply is either whole, or the beginning of
// the whole and an error; and in the end nothing is left of any request.
func TestChaos(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 1000, nil)
	agents := []*agent{h.agent(agentA), h.agent(agentB)}
	ctx, stop := context.WithCancel(context.Background())
	var background sync.WaitGroup
	for _, a := range agents {
		background.Go(func() { a.serve(ctx) })
	}
	background.Go(func() {
		for ctx.Err() == nil {
			a := agents[rand.IntN(len(agents))]
			switch rand.IntN(3) {
			case 0:
				a.lost()
			case 1:
				a.beat(schemas.AgentDraining)
			}
			select {
			case <-time.After(time.Duration(rand.IntN(15)) * time.Millisecond):
			case <-ctx.Done():
			}
			a.restart()
		}
	})
	var whole strings.Builder
	for n := range chaosLines {
		whole.WriteString(strconv.Itoa(n) + "\n")
	}
	var complete, broken, refused int
	var mu sync.Mutex
	var clients sync.WaitGroup
	for range 8 {
		clients.Go(func() {
			for range 40 {
				reply, _, err := h.d.Start(context.Background(), request())
				if errors.Is(err, schemas.Errorf(schemas.CodeAgentOffline, "")) {
					mu.Lock()
					refused++
					mu.Unlock()
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				text, ended := readUntil(reply, rand.IntN(4))
				reply.Close()
				mu.Lock()
				switch {
				case ended == nil && text == whole.String():
					complete++
				case ended != nil && strings.HasPrefix(whole.String(), text) && strings.HasSuffix("\n"+text, "\n"):
					broken++
				default:
					t.Errorf("reply is %q and ends with %v", text, ended)
				}
				mu.Unlock()
			}
		})
	}
	clients.Wait()
	stop()
	background.Wait()
	t.Logf("%d complete, %d broken off, %d refused", complete, broken, refused)
	if complete == 0 {
		t.Error("no reply was complete")
	}
	for _, a := range agents {
		a.restart()
	}
	h.settled(agentA, agentB)
	until(t, "an empty queue", func() bool { return h.depth() == 0 })
}

var errLeft = schemas.Errorf(schemas.CodeInternalError, "left")

// readUntil reads to the end; or, if leave is 1, to the first event only; or, if it is 2,
// until it is interrupted at some moment.
func readUntil(reply *dispatch.Reply, leave int) (string, *schemas.Error) {
	if leave == 2 {
		timer := time.AfterFunc(time.Duration(rand.IntN(5))*time.Millisecond, func() { reply.Interrupt(errLeft) })
		defer timer.Stop()
	}
	var text strings.Builder
	for {
		ev := next(reply)
		for _, p := range ev.Payload {
			text.Write(p)
		}
		switch {
		case ev.Kind == dispatch.EventDone || ev.Kind == dispatch.EventError:
			return text.String(), ev.Err
		case leave == 1:
			return text.String(), errLeft
		}
	}
}
