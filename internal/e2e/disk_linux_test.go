package e2e

import (
	"net/http"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/worker/demo"
)

// full has the disk of something fill up while a reply runs, and says what clients are told
// until there is room again: the reply goes on to its end, new requests get internal_error
// and when to come back, and nothing is lost or held.
func full(t *testing.T, c *stack.Cluster, disk *stack.Disk, mend func()) {
	t.Helper()
	backend := stack.StartBackend(t, demo.Options{})
	c.StartWorker(backend.URL).Serving()
	setPrice(t, c, demo.ModelID, books.MicroCents)
	edge := c.StartEdge()
	awaitModel(t, []*stack.Edge{edge}, c.Key.Reveal(), demo.ModelID)
	key, secret := newKey(t, c, books.NewKey{BudgetCents: new(int64(100_000)), Concurrency: new(1000)})
	client := newClient(edge.BaseURL, secret)
	defer client.close()
	f := depart(t, c, edge, backend, ask{stream: true, tokens: 100, pace: 20})

	disk.Fill()
	short := func() reply { return client.chat(t.Context(), true, priced(t, 5, nil)) }
	served, refused := 0, 0
	stack.Until(t, 60*time.Second, "requests to be refused", func() bool {
		r := short()
		switch {
		case r.done && r.err == nil:
			served++ // there is room left in what is written to
		case r.status == http.StatusInternalServerError && r.code() == "internal_error" && r.header.Get("Retry-After") != "":
			refused++
		default:
			t.Fatalf("with the disk full: status %d, error %+v, broken %v", r.status, r.err, r.broken)
		}
		return refused >= 3
	})
	f.land()
	if r := f.taps[0].reply; !r.done || r.text != numbered(100) {
		t.Errorf("the reply that ran has %d tokens, error %+v, broken %v", tokensOf(r.text), r.err, r.broken)
	}
	disk.Free()
	mended := time.Now()
	mend()
	stack.Until(t, 60*time.Second, "requests to be served again", func() bool {
		r := short()
		if r.done {
			served++
		}
		return r.done
	})
	t.Logf("%d requests served, %d refused; served again %s after there was room", served, refused, time.Since(mended).Round(10*time.Millisecond))
	l := openLedger(t, c.DatabaseURL)
	done := 0
	for _, e := range l.wantClosed(key, 30*time.Second) {
		if e.Outcome == "done" {
			done++
		}
	}
	if done != served {
		t.Errorf("%d requests were served, and the ledger has %d", served, done)
	}
	f.wantPaid(t, l.wantClosed(f.key, 30*time.Second))
}

// TestDiskOfNATSFull: nats-server takes no job while its disk is full. It may have to be
// started again once there is room.
func TestDiskOfNATSFull(t *testing.T) {
	disk := stack.NewDisk(t, 4<<20)
	c := stack.StartClusterIn(t, disk.Dir)
	full(t, c, disk, func() {
		_ = c.NATS.Stop()
		c.StartNATS()
	})
}

// TestDiskOfPostgresFull: Postgres admits nobody while its disk is full. It may end by itself,
// and is then started again, as its service manager would.
func TestDiskOfPostgresFull(t *testing.T) {
	disk := stack.NewDisk(t, 256<<20)
	postgres := stack.StartPostgresIn(t, disk.Dir)
	full(t, stack.StartClusterOn(t, postgres.Address), disk, func() {
		if postgres.Ended() {
			t.Log("Postgres has ended by itself")
			postgres.Kill()
			postgres.Start()
		}
	})
}
