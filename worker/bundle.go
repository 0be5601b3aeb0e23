package worker

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/schemas"
)

// bundles gathers chunk frames of many runs, and sends those for the same owner as one
// message: what a message costs the bus and both its ends is then paid once for all of them.
// Frames are gathered only while so many come from so many runs that each bundle has several;
// at any other time a frame is sent at once, by itself.
//
// A bundle is as good as its frames sent one after the other. What a run sends by itself
// doesn't overtake those of its frames that are in a bundle, since the bundle is sent first
// (see send); what gets lost with a bundle shows in the next verdict of each of its runs, and
// is sent again.
type bundles struct {
	agent  schemas.AgentID
	tokens *nats.Conn
	log    *slog.Logger
	begun  chan struct{} // holds one token: a bundle waits
	sent   atomic.Int64  // frames since the last look that could be in bundles
	many   atomic.Bool   // frames are gathered
	looked time.Time     // belongs to who looks
	// frames and runs are bundleFrames and bundleRuns, but for tests.
	frames, runs int

	// out is held while a bundle is sent, which may have to wait for the bus: whoever fills
	// the next one meanwhile doesn't. It is taken before mu.
	out sync.Mutex

	mu      sync.Mutex
	last    uint64 // number of the last bundle
	open    map[schemas.OwnerID]*bundle
	leaving []*bundle // in the order in which they are to be sent
}

// bundle is what waits for an owner.
type bundle struct {
	number  uint64
	subject string
	entries []byte
}

const (
	// bundleWait is how long a frame may wait for others.
	bundleWait = time.Millisecond
	// Where fewer than bundleFrames come in bundleWait for each owner, or from fewer than
	// bundleRuns runs, nobody waits: one run alone, however fast, would gain nothing.
	bundleFrames = 4
	bundleRuns   = 64
	// maxBundle is how many bytes a bundle has at the most, and maxEntry a frame that goes
	// into one: a large one costs more to copy than a message does.
	maxBundle = 64 << 10
	maxEntry  = 8 << 10
	// maxLeaving is how many bundles may wait for the bus before whoever has a frame waits, too.
	maxLeaving = 4
	// entryHead is more than the head of an entry has.
	entryHead = 64
)

func newBundles(agent schemas.AgentID, tokens *nats.Conn, log *slog.Logger) *bundles {
	return &bundles{
		agent: agent, tokens: tokens, log: log, begun: make(chan struct{}, 1),
		frames: bundleFrames, runs: bundleRuns, open: make(map[schemas.OwnerID]*bundle),
	}
}

// run sends each bundle bundleWait after its first frame, until ctx ends.
func (b *bundles) run(ctx context.Context) error {
	timer := time.NewTimer(bundleWait)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			b.sendAll()
			return nil
		case <-b.begun:
		}
		timer.Reset(bundleWait)
		select {
		case <-ctx.Done():
		case <-timer.C:
		}
		b.sendAll()
	}
}

// look decides, by what was sent since the last look and by the runs at hand, whether frames
// are gathered.
func (b *bundles) look(now time.Time, runs []*run) {
	passed := now.Sub(b.looked)
	if passed < pumpEvery/2 {
		return // too little to tell
	}
	b.looked = now
	sent := time.Duration(b.sent.Swap(0))
	if len(runs) < b.runs || sent*bundleWait < time.Duration(b.frames)*passed {
		b.many.Store(false)
		return
	}
	owners := make(map[schemas.OwnerID]struct{})
	for _, r := range runs {
		owners[r.owner] = struct{}{}
	}
	b.many.Store(sent*bundleWait >= time.Duration(b.frames*len(owners))*passed)
}

// add puts a chunk frame into the bundle for its owner, and returns the number of that, or 0
// if the frame has to be sent by itself. before is the number of the bundle that has the last
// frame of the same run, 0 if none has; it is sent first.
func (b *bundles) add(to schemas.OwnerID, n schemas.Nonce, frame []byte, before uint64) uint64 {
	b.sent.Add(1)
	if !b.many.Load() || len(frame) > maxEntry {
		if before != 0 {
			b.send(to, before)
		}
		return 0
	}
	b.mu.Lock()
	for len(b.leaving) >= maxLeaving {
		b.mu.Unlock()
		b.publish()
		b.mu.Lock()
	}
	o := b.open[to]
	full := o != nil && len(o.entries)+entryHead+len(frame) > maxBundle
	if full {
		b.close(to, o)
		o = nil
	}
	if o == nil {
		o = spareBundles.Get().(*bundle) // holds nothing else
		b.last++
		o.number, o.subject = b.last, schemas.BundleSubject(b.agent, to)
		b.open[to] = o
		signal(b.begun)
	}
	o.entries = schemas.AppendEntry(o.entries, n, frame)
	number := o.number // from here on it may be sent
	b.mu.Unlock()
	if full {
		b.publish()
	}
	return number
}

// send returns once the bundle of that number for the owner is sent.
func (b *bundles) send(to schemas.OwnerID, number uint64) {
	b.mu.Lock()
	if o := b.open[to]; o != nil && o.number == number {
		b.close(to, o)
	}
	b.mu.Unlock()
	b.publish() // others may just be about to send it
}

func (b *bundles) sendAll() {
	b.mu.Lock()
	for to, o := range b.open {
		b.close(to, o)
	}
	b.mu.Unlock()
	b.publish()
}

// close has a bundle leave. b.mu is held.
func (b *bundles) close(to schemas.OwnerID, o *bundle) {
	delete(b.open, to)
	b.leaving = append(b.leaving, o)
}

// publish returns once all bundles are sent that were leaving when it was called.
func (b *bundles) publish() {
	b.out.Lock()
	defer b.out.Unlock()
	for {
		b.mu.Lock()
		if len(b.leaving) == 0 {
			b.mu.Unlock()
			return
		}
		o := b.leaving[0]
		b.leaving = slices.Delete(b.leaving, 0, 1)
		b.mu.Unlock()
		if err := b.tokens.Publish(o.subject, o.entries); err != nil && !bus.Down(err) {
			b.log.Warn("frame not sent", "error", err)
		}
		o.entries = o.entries[:0]
		spareBundles.Put(o)
	}
}

// spareBundles are bundles that were sent, for their buffers.
var spareBundles = sync.Pool{New: func() any { return new(bundle) }}
